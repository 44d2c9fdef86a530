"""Sums kept on the device while an epoch runs, read back once at its end.

Nothing here waits for the device except `Totals.read`, `LossWatch.check` and `not_finite`.

    totals = Totals(device)
    totals.add_no_sync(logits, labels)              # every step
    loss, accuracy, samples = totals.read()         # once
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

__all__ = ["EpochStats", "LossNotFiniteError", "LossWatch", "Mistakes", "TestStats", "Totals", "not_finite"]


@dataclass(frozen=True, kw_only=True)
class EpochStats:
    """What one epoch did.

    Losses are means over samples, accuracies fractions in [0, 1], times seconds.
    `evaluated` names the part of the data the evaluation columns are from ("validation" or, where
    a split has no validation part, "test"); nothing is selected by it. An epoch is
    evaluated on images of its last step's size; `TestStats` are of the images' own size. One that is
    not evaluated has neither loss nor accuracy there.
    """

    epoch: int  # 1 is the first
    epochs: int
    step: int  # optimiser steps since the start of the run, at this epoch's end
    samples: int  # training samples seen in this epoch
    train_loss: float
    train_accuracy: float
    evaluated: str
    eval_loss: float | None
    eval_accuracy: float | None
    train_seconds: float
    eval_seconds: float
    images_per_second: float  # training samples / train_seconds
    learning_rate: float  # of the epoch's last step

    @property
    def is_sound(self) -> bool:
        """Whether each value is what it should be, as what a file held may not be."""
        kinds = {"evaluated": str, "eval_loss": int | float | None, "eval_accuracy": int | float | None}
        return (
            all(isinstance(value, kinds.get(name, int | float)) for name, value in vars(self).items())
            and self.train_seconds > 0
        )


@dataclass(frozen=True, kw_only=True)
class TestStats:
    """Evaluation on the test images, in eval mode.

    `confusion[i][j]` is the fraction of class i's images that were taken for class j (rows sum to
    1); `class_accuracies[i]` is its diagonal. Where there is no image of a class they are 0, and NaN.
    `classes` gives the names in that order. All of it is without test-time augmentation; `tta` names
    the one that `tta_accuracy` is with, None where there was none. `seconds` were taken by both.
    """

    __test__ = False  # not a pytest class

    loss: float
    accuracy: float
    samples: int
    seconds: float
    classes: tuple[str, ...]
    class_accuracies: tuple[float, ...]
    confusion: tuple[tuple[float, ...], ...]
    tta: str = "none"
    tta_accuracy: float | None = None


@dataclass(frozen=True, kw_only=True)
class Mistakes:
    """Some of the `wrong` test images that were taken for another class.

    `images` are uint8[n, H, W, C] as they are stored, `truth` and `taken_for` n names of classes.
    """

    images: NDArray[np.uint8]
    truth: tuple[str, ...]
    taken_for: tuple[str, ...]
    wrong: int


class Totals:
    """Loss, correct predictions and samples, summed on `device`; padded samples (label -100) don't count.

    Args:
        device: where the sums are.
        lenient: a batch whose loss is not finite doesn't count: its step changes no weight under gradient scaling.
        everywhere: where several processes sum, makes the sum of all of each process's tensors; see `Ranks`.
    """

    def __init__(
        self,
        device: torch.device,
        *,
        lenient: bool = False,
        everywhere: Callable[[Sequence[Tensor]], Sequence[Tensor]] = lambda tensors: tensors,
    ) -> None:
        self._lenient = lenient
        self._everywhere = everywhere
        # float64 where the device has it (Apple's MPS has not): 10^4 losses summed in float32 lose digits
        self._precision = torch.float32 if device.type == "mps" else torch.float64
        self.loss = torch.zeros((), dtype=self._precision, device=device)
        self.correct = torch.zeros((), dtype=torch.int64, device=device)
        self.samples = torch.zeros((), dtype=torch.int64, device=device)

    def reset(self) -> None:
        """Begin at zero, in the same tensors: a CUDA graph may add to them."""
        for tensor in self.sums:
            tensor.zero_()

    @property
    def sums(self) -> tuple[Tensor, Tensor, Tensor]:
        """The tensors, of this process alone: loss, correct predictions, samples."""
        return self.loss, self.correct, self.samples

    def add_no_sync(self, logits: Tensor, labels: Tensor) -> None:
        """Add one batch: its cross-entropy, without label smoothing, and its correct predictions.

        Args:
            logits: float32[B, K].
            labels: int64[B], -100 where a sample is padding.
        """
        logits = logits.detach()
        loss = F.cross_entropy(logits, labels, reduction="sum")
        correct, samples = (logits.argmax(1) == labels).sum(), (labels >= 0).sum()
        if self._lenient:
            counts = loss.isfinite()
            loss, correct, samples = loss.nan_to_num(0.0, 0.0, 0.0), correct * counts, samples * counts
        self.loss += loss
        self.correct += correct
        self.samples += samples

    def read(self) -> tuple[float, float, int]:
        """Mean loss, accuracy and number of samples. Waits for the device."""
        sums = self.state_dict()
        samples = int(sums["samples"])
        if samples == 0:
            return float("nan"), float("nan"), 0
        return float(sums["loss"]) / samples, int(sums["correct"]) / samples, samples

    def state_dict(self) -> dict[str, Tensor]:
        """The three sums, of all processes, to go on from within an epoch."""
        (loss,), (correct, samples) = self._everywhere([self.loss]), self._everywhere([self.correct, self.samples])
        return {"loss": loss, "correct": correct, "samples": samples}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Take over sums saved by `state_dict`."""
        self.loss.copy_(state["loss"])
        self.correct.copy_(state["correct"])
        self.samples.copy_(state["samples"])


class LossNotFiniteError(Exception):
    """The loss stopped being finite at optimiser step `step`, 1 being the first, and has the value `loss`."""

    def __init__(self, step: int, loss: float) -> None:
        super().__init__(f"{loss} at step {step}")
        self.step, self.loss = step, loss


class LossWatch:
    """Notices losses that are not finite, and knows at which step they began.

    Args:
        patience: how many in a row are too many; float16 with gradient scaling lives through some.
    """

    def __init__(self, patience: int = 1) -> None:
        self._patience = patience
        self._losses: list[Tensor] = []
        self._steps: list[int] = []
        self._bad: tuple[int, float] | None = None  # where the running row of them began
        self._length = 0

    def add_no_sync(self, step: int, loss: Tensor) -> None:
        """Remember the loss of step `step`, floating []."""
        self._losses.append(loss.detach())
        self._steps.append(step)

    def check(self) -> None:
        """Look at what was remembered, and forget it. Waits for the device.

        Raises:
            LossNotFiniteError: too many in a row were not finite.
        """
        losses, steps = self._losses, self._steps
        self._losses, self._steps = [], []
        values = [loss.item() for loss in losses[:1]] if len(losses) < 2 else torch.stack(losses).tolist()
        for step, value in zip(steps, values, strict=True):
            if math.isfinite(value):
                self._bad, self._length = None, 0
                continue
            self._bad = self._bad or (step, value)
            self._length += 1
            if self._length >= self._patience:
                raise LossNotFiniteError(*self._bad)


def not_finite(tensors: Mapping[str, Tensor]) -> list[str]:
    """The names of the tensors with a NaN or an infinity. Waits for the device."""
    floating = {name: tensor for name, tensor in tensors.items() if tensor.is_floating_point() and tensor.numel()}
    # one pass over all of them, without copies, which nearly always is the last: NaN goes through the maximum
    if not floating or torch.nn.utils.get_total_norm(floating.values(), math.inf).isfinite():
        return []
    return [name for name, tensor in floating.items() if not tensor.isfinite().all()]
