"""What the contestants' files share: what a run is to be, and what came of it.

Example:
    images, labels = job.part("train")
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

__all__ = ["Job", "Outcome"]


@dataclass(frozen=True, kw_only=True)
class Job:
    """One run.

    Attributes:
        store: folder with images.npy (uint8[N, H, W, 3]) and labels.npy (int64[N]).
        scratch: empty folder of its own, with train.npy and test.npy: the rows of the two parts, int64[n].
        split: the scheme that the parts are of.
        arch: the net, for who has not its own.
        epochs: passes over the training images.
        seed: of everything that is drawn.
        change: changes to fastcifar's recipe.
    """

    store: Path
    scratch: Path
    split: str
    arch: str
    epochs: float
    seed: int
    change: tuple[str, ...] = ()

    @classmethod
    def from_json(cls, values: dict[str, Any]) -> "Job":
        """Read what `to_json` gave."""
        paths = {name: Path(values[name]) for name in ("store", "scratch")}
        return cls(**{**values, **paths, "change": tuple(values["change"])})

    def to_json(self) -> dict[str, Any]:
        """As JSON values."""
        return {**self.__dict__, "store": str(self.store), "scratch": str(self.scratch), "change": list(self.change)}

    def part(self, name: str) -> tuple[NDArray[np.uint8], NDArray[np.int64]]:
        """The images, uint8[n, H, W, 3], and labels, int64[n], of part "train" or "test", in memory."""
        rows = np.load(self.scratch / f"{name}.npy")
        return np.load(self.store / "images.npy", mmap_mode="r")[rows], np.load(self.store / "labels.npy")[rows]


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """What came of a run. Accuracies are fractions.

    Attributes:
        accuracy: on the test images, at the end.
        tta: what is averaged at test time, or "none".
        tta_accuracy: with that; None without it.
        train_seconds: of training alone, its input included, evaluation not.
        eval_seconds: of all evaluations.
        curve: (training seconds, accuracy) after each epoch that was evaluated.
        curve_of: the part of the data that the curve's accuracies are of: "test" or "validation".
        batch_size: samples in a batch.
        threads: of the framework.
        precision: type that most is computed in.
        recipe: how it was trained, as far as it can be told.
        versions: package -> version.
    """

    accuracy: float
    tta: str
    tta_accuracy: float | None
    train_seconds: float
    eval_seconds: float
    curve: tuple[tuple[float, float], ...]
    curve_of: str
    batch_size: int
    threads: int
    precision: str
    recipe: dict[str, Any]
    versions: dict[str, str]
