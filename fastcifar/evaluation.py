"""Evaluation: in eval mode, moving nothing, each sample counted once; the loss is the mean over samples.

Example:
    found = evaluate(model, eval_loader(store, "test", ...), runtime)
    found.accuracy
"""

import signal
import time
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastcifar.config import Recipe
from fastcifar.data.store import ArrayStore
from fastcifar.loader import Loader
from fastcifar.metrics import TestStats, Totals
from fastcifar.runtime import Runtime, StopRequest

__all__ = ["Evaluation", "StopSeenError", "eval_loader", "evaluate", "reduce", "test_stats"]

_BATCH = 500


class StopSeenError(Exception):
    """The stop request was seen between two batches; `signum` asked for it."""

    def __init__(self, signum: signal.Signals) -> None:
        super().__init__(signum.name)
        self.signum = signum


@dataclass(frozen=True, kw_only=True)
class Evaluation:
    """A net's answers on one part of the data.

    `loss` is the mean cross-entropy (without smoothing) over samples, `accuracy` a fraction, `seconds`
    the time taken; `predictions` and `labels` are int64[N] on the CPU, in the data's order.
    """

    loss: float
    accuracy: float
    seconds: float
    predictions: Tensor
    labels: Tensor


def reduce(images: Tensor, size: int | None) -> Tensor:
    """Images reduced to `size` pixels a side, floating [B, C, size, size]; as they are where that is None."""
    if size is None:
        return images
    return F.interpolate(images, size=(size, size), mode="bilinear", antialias=True)


@torch.no_grad()
def evaluate(
    model: nn.Module, loader: Loader, runtime: Runtime, *, size: int | None = None, stop: StopRequest | None = None
) -> Evaluation:
    """Evaluate in eval mode: each sample counts once, and no running statistic moves.

    Args:
        model: the net; its mode is afterwards what it was.
        loader: the data, in order and without augmentation.
        runtime: precision and device.
        size: side in pixels to which the images are reduced; None for their own.
        stop: looked at between batches.
    """
    started = time.perf_counter()
    was_training = model.training
    model.eval()
    totals = Totals(runtime.device)
    predictions, truth = [], []
    try:
        for step in range(len(loader)):
            images, labels = loader.batch(0, step)
            images = reduce(images, size)
            with runtime.autocast():
                logits = model(images).float()
            totals.add_no_sync(F.cross_entropy(logits, labels, reduction="sum"), logits, labels)
            predictions.append(logits.argmax(1))
            truth.append(labels)
            if stop is not None and stop.signum is not None:
                raise StopSeenError(stop.signum)
    finally:
        model.train(was_training)
    loss, accuracy, _ = totals.read()
    labels = torch.cat(truth).cpu()
    real = labels >= 0  # the last batch was padded
    return Evaluation(
        loss=loss,
        accuracy=accuracy,
        seconds=time.perf_counter() - started,
        predictions=torch.cat(predictions).cpu()[real],
        labels=labels[real],
    )


def eval_loader(store: ArrayStore, split: str, recipe: Recipe, runtime: Runtime) -> Loader:
    """A split in order, without augmentation, scaled as in training; its last batch is padded and masked."""
    return Loader(
        store,
        split=split,
        batch_size=_BATCH,
        scaling=recipe.scaling,
        device=runtime.device,
        channels_last=runtime.memory_format == torch.channels_last,
        order="sequential",
        pad_last=True,
    )


def test_stats(found: Evaluation, classes: tuple[str, ...]) -> TestStats:
    """What an evaluation says class by class; scikit-learn computes the row-normalised confusion matrix.

    Args:
        found: on the test images.
        classes: K names, in label order.
    """
    from sklearn.metrics import confusion_matrix  # a second to import: only when it is needed

    matrix = confusion_matrix(found.labels, found.predictions, labels=range(len(classes)), normalize="true")
    return TestStats(
        loss=found.loss,
        accuracy=found.accuracy,
        samples=len(found.labels),
        seconds=found.seconds,
        classes=classes,
        class_accuracies=tuple(float(x) for x in matrix.diagonal()),
        confusion=tuple(tuple(float(x) for x in row) for row in matrix),
    )
