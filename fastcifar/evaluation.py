"""Evaluation: in eval mode, moving nothing, each sample counted once; the loss is the mean over samples.

Example:
    found = evaluate(model, eval_loader(store, "test", ...), runtime)
    found.accuracy
"""

import signal
import time
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastcifar.config import Recipe, Tta
from fastcifar.data.splits import Split
from fastcifar.data.store import ArrayStore
from fastcifar.loader import Loader
from fastcifar.metrics import Mistakes, TestStats, Totals
from fastcifar.ranks import ALONE, Ranks
from fastcifar.runtime import Runtime
from fastcifar.signals import StopRequest

__all__ = ["Evaluation", "StopSeenError", "eval_loader", "evaluate", "mistakes", "reduce", "test_stats", "tta_logits"]

_BATCH = 500
_SHOWN = 40
"""Mistakes that are shown, at most."""


class StopSeenError(Exception):
    """The stop request was seen before a prediction; `signum` asked for it."""

    def __init__(self, signum: signal.Signals) -> None:
        super().__init__(signum.name)
        self.signum = signum


@dataclass(frozen=True, kw_only=True)
class Evaluation:
    """A net's answers on one part of the data.

    `loss` is the mean cross-entropy (without smoothing) over samples, `accuracy` a fraction, `seconds`
    the time taken; `predictions` and `labels` are int64[N] on the CPU, in the data's order. These are
    of the images as they are; `tta_accuracy` is with the test-time augmentation `tta`, None without one.
    """

    loss: float
    accuracy: float
    seconds: float
    predictions: Tensor
    labels: Tensor
    tta: Tta = "none"
    tta_accuracy: float | None = None


def reduce(images: Tensor, size: int | None) -> Tensor:
    """Images reduced to `size` pixels a side, floating [B, C, size, size]; as they are where they are no larger."""
    if size is None or size >= min(images.shape[2:]):
        return images
    return F.interpolate(images, size=(size, size), mode="bilinear", antialias=True)


def tta_logits(predict: Callable[[Tensor], Tensor], images: Tensor, logits: Tensor, tta: Tta) -> Tensor:
    """Logits with test-time augmentation: a mean over views of each image.

    `flip` is the mean over the image and its mirror. `shift` counts that by half, and by a quarter each the same of
    two windows a pixel up and left, and down and right, of the image padded by reflection (airbench, Jordan 2024).

    Args:
        predict: images to floating [B, K].
        images: floating [B, C, H, W].
        logits: what it predicts of them.
        tta: flip or shift.

    Returns:
        floating [B, K].
    """
    mean = (logits + predict(images.flip(-1))) / 2
    if tta == "flip":
        return mean
    padded = F.pad(images, (1, 1, 1, 1), mode="reflect")
    windows = (padded[:, :, :-2, :-2], padded[:, :, 2:, 2:])
    return mean / 2 + sum((predict(window) + predict(window.flip(-1))) / 8 for window in windows)


@torch.no_grad()
def evaluate(
    model: nn.Module,
    loader: Loader,
    runtime: Runtime,
    *,
    size: int | None = None,
    tta: Tta = "none",
    stop: StopRequest | None = None,
    ranks: Ranks = ALONE,
) -> Evaluation:
    """Evaluate in eval mode: each sample counts once, and no running statistic moves.

    Args:
        model: the net; the mode of each of its modules is afterwards what it was.
        loader: the data, in order and without augmentation.
        runtime: precision and device.
        size: side in pixels to which the images are reduced; None for their own.
        tta: test-time augmentation, whose accuracy is found beside the plain one.
        stop: looked at before each prediction, of which one may take seconds.
        ranks: that evaluate together, each its part of each batch of its `loader`; all find the same.
    """

    def predict(images: Tensor) -> Tensor:
        if (signum := ranks.asked(stop)) is not None:
            raise StopSeenError(signum)
        with runtime.autocast():  # one layout for all views, or what is compiled would be compiled again
            logits: Tensor = model(images.contiguous(memory_format=runtime.memory_format))
        return logits.float()

    started = time.perf_counter()
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    totals, tta_totals = (Totals(runtime.device, everywhere=ranks.sum_no_sync) for _ in range(2))
    predictions, truth = [], []
    try:
        for step in range(len(loader)):
            images, labels = loader.batch(0, step)
            images = reduce(images, size)
            logits = predict(images)
            totals.add_no_sync(logits, labels)
            if tta != "none":
                tta_totals.add_no_sync(tta_logits(predict, images, logits, tta), labels)
            predictions.append(logits.argmax(1))
            truth.append(labels)
    finally:
        for module, training in modes:
            module.training = training
    loss, accuracy, _ = totals.read()
    found, labels = (_in_order(parts, ranks) for parts in (predictions, truth))
    real = labels >= 0  # the last batch was padded
    return Evaluation(
        loss=loss,
        accuracy=accuracy,
        seconds=time.perf_counter() - started,
        predictions=found[real],
        labels=labels[real],
        tta=tta,
        tta_accuracy=tta_totals.read()[1] if tta != "none" else None,
    )


def _in_order(parts: list[Tensor], ranks: Ranks) -> Tensor:
    """Each batch's rows of all ranks, int64[N] on the CPU: a rank has the rows behind those of the one before it."""
    return ranks.gather_no_sync(torch.stack(parts)).transpose(0, 1).reshape(-1).cpu()


def eval_loader(
    store: ArrayStore,
    split: str,
    recipe: Recipe,
    runtime: Runtime,
    *,
    ranks: Ranks = ALONE,
    shuffled: bool = False,
) -> Loader:
    """A split without augmentation, scaled as in training, in order unless shuffled; its last batch is padded, masked.

    Each of `ranks` gets its part of each batch, padded to the same size.
    """
    return Loader(
        store,
        split=split,
        batch_size=_BATCH * ranks.size,
        scaling=recipe.scaling,
        device=runtime.device,
        channels_last=runtime.memory_format == torch.channels_last,
        order="random" if shuffled else "sequential",
        pad_last=True,
        rank=ranks.rank,
        world_size=ranks.size,
    )


def test_stats(found: Evaluation, classes: tuple[str, ...]) -> TestStats:
    """What an evaluation says class by class.

    Args:
        found: on the test images.
        classes: K names, in label order.
    """
    size = len(classes)
    places = np.asarray(found.labels) * size + np.asarray(found.predictions)
    counts = np.bincount(places, minlength=size * size).reshape(size, size)
    there = counts.sum(1, keepdims=True)
    matrix = counts / np.maximum(there, 1)
    accuracies = np.where(there[:, 0] > 0, matrix.diagonal(), np.nan)
    return TestStats(
        loss=found.loss,
        accuracy=found.accuracy,
        samples=len(found.labels),
        seconds=found.seconds,
        classes=classes,
        class_accuracies=tuple(float(x) for x in accuracies),
        confusion=tuple(tuple(float(x) for x in row) for row in matrix),
        tta=found.tta,
        tta_accuracy=found.tta_accuracy,
    )


def mistakes(found: Evaluation, split: Split, classes: tuple[str, ...]) -> Mistakes:
    """Some of the images that an evaluation got wrong, taken evenly from all of them.

    Args:
        found: on the test images.
        split: these.
        classes: K names, in label order.

    Raises:
        DataError: their bytes do not have their checksums any more.
    """
    labels, predictions = np.asarray(found.labels), np.asarray(found.predictions)
    wrong = np.flatnonzero(labels != predictions)
    some = wrong[np.linspace(0, len(wrong) - 1, min(len(wrong), _SHOWN)).astype(np.int64)]
    return Mistakes(
        images=split[some][1].transpose(0, 2, 3, 1),
        truth=tuple(classes[label] for label in labels[some]),
        taken_for=tuple(classes[label] for label in predictions[some]),
        wrong=len(wrong),
    )
