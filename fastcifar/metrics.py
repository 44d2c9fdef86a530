"""Sums kept on the device while an epoch runs, read back once at its end.

Nothing here waits for the device except `Totals.read`.

    totals = Totals(device)
    totals.add_no_sync(logits, labels)              # every step
    loss, accuracy, samples = totals.read()         # once
"""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

__all__ = ["EpochStats", "TestStats", "Totals", "first_not_finite"]


@dataclass(frozen=True, kw_only=True)
class EpochStats:
    """What one epoch did.

    Losses are means over samples, accuracies fractions in [0, 1], times seconds.
    `evaluated` names the part of the data the evaluation columns are from ("validation" or, where
    a split has no validation part, "test"); nothing is selected by it. An epoch is
    evaluated on images of its last step's size; `TestStats` are of the images' own size.
    """

    epoch: int  # 1 is the first
    epochs: int
    step: int  # optimiser steps since the start of the run, at this epoch's end
    samples: int  # training samples seen in this epoch
    train_loss: float
    train_accuracy: float
    evaluated: str
    eval_loss: float
    eval_accuracy: float
    train_seconds: float
    eval_seconds: float
    images_per_second: float  # training samples / train_seconds
    learning_rate: float  # of the epoch's last step


@dataclass(frozen=True, kw_only=True)
class TestStats:
    """Evaluation on the test images, in eval mode.

    `confusion[i][j]` is the fraction of class i's images that were taken for class j (rows sum to
    1); `class_accuracies[i]` is its diagonal. `classes` gives the names in that order. All of it
    is without test-time augmentation; `tta` names the one that `tta_accuracy` is with, None where
    there was none. `seconds` were taken by both.
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


class Totals:
    """Loss, correct predictions and samples, summed on `device`; padded samples (label -100) don't count."""

    def __init__(self, device: torch.device) -> None:
        # float64 where the device has it (Apple's MPS has not): 10^4 losses summed in float32 lose digits
        self._precision = torch.float32 if device.type == "mps" else torch.float64
        self.loss = torch.zeros((), dtype=self._precision, device=device)
        self.correct = torch.zeros((), dtype=torch.int64, device=device)
        self.samples = torch.zeros((), dtype=torch.int64, device=device)

    def add_no_sync(self, logits: Tensor, labels: Tensor) -> None:
        """Add one batch: its cross-entropy, without label smoothing, and its correct predictions.

        Args:
            logits: float32[B, K].
            labels: int64[B], -100 where a sample is padding.
        """
        logits = logits.detach()
        self.loss += F.cross_entropy(logits, labels, reduction="sum")
        self.correct += (logits.argmax(1) == labels).sum()
        self.samples += (labels >= 0).sum()

    def read(self) -> tuple[float, float, int]:
        """Mean loss, accuracy and number of samples. Waits for the device."""
        samples = int(self.samples)
        if samples == 0:
            return float("nan"), float("nan"), 0
        return float(self.loss) / samples, int(self.correct) / samples, samples

    def state_dict(self) -> dict[str, Tensor]:
        """The three sums, to go on from within an epoch."""
        return {"loss": self.loss, "correct": self.correct, "samples": self.samples}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Take over sums saved by `state_dict`."""
        self.loss.copy_(state["loss"])
        self.correct.copy_(state["correct"])
        self.samples.copy_(state["samples"])


def first_not_finite(tensors: Mapping[str, Tensor]) -> str | None:
    """The name of the first tensor with a NaN or an infinity; None if there is none. Waits for the device once."""
    floating = {name: tensor for name, tensor in tensors.items() if tensor.is_floating_point()}
    device = next((tensor.device for tensor in floating.values() if tensor.device.type != "cpu"), torch.device("cpu"))
    finite = torch.stack([tensor.isfinite().all().to(device) for tensor in floating.values()]).tolist()
    return next((name for name, good in zip(floating, finite, strict=True) if not good), None)
