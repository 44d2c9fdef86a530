"""Stores of random images for the benchmarks: no speed here depends on what an image shows."""

import argparse
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fastcifar import ArrayStore
from fastcifar.data.writer import SourceFile, write_store
from fastcifar.errors import DataError

__all__ = ["given_or_random", "noise", "random_store"]

_MEAN, _STD = np.array([125.3, 123.0, 113.9]), np.array([63.0, 62.1, 66.7])  # near CIFAR-10's
_SPREAD = 1.75  # deviations at most: standardised, they stay below 2, where bfloat16 still tells pixels apart


def noise(count: int, side: int, *, seed: int = 0) -> NDArray[np.uint8]:
    """uint8[count, side, side, 3], with about the mean and deviation of CIFAR-10."""
    generator = np.random.default_rng(seed)
    images = np.empty((count, side, side, 3), np.uint8)
    for start in range(0, count, 4096):
        part = images[start : start + 4096]
        drawn = generator.standard_normal(part.shape, np.float32).clip(-_SPREAD, _SPREAD)
        part[:] = np.rint(_MEAN + _STD * drawn).clip(0, 255)
    return images


def random_store(folder: Path, *, count: int = 50_000, side: int = 32) -> ArrayStore:
    """A store in `folder`, with split "train"."""
    labels = np.random.default_rng(1).integers(0, 10, count)
    file = SourceFile("all", noise(count, side), labels)
    classes = [str(i) for i in range(10)]
    write_store(folder / "store", [file], name="random", classes=classes, splits=_SPLITS, source={})
    return ArrayStore(folder / "store")


@contextmanager
def given_or_random(arguments: list[str], *, count: int = 50_000) -> Iterator[ArrayStore]:
    """The store whose path is the one argument; without one, random images in a folder that is removed."""
    parser = argparse.ArgumentParser()
    parser.add_argument("store", nargs="?", help=f"the folder of a store; if it is left out, {count:,} random images")
    place = parser.parse_args(arguments).store
    if place is not None:
        try:
            store = ArrayStore(place)
        except DataError as error:
            sys.exit(str(error))
        yield store
    else:
        with tempfile.TemporaryDirectory(prefix="fastcifar-bench-") as folder:
            yield random_store(Path(folder), count=count)


_SPLITS: dict[str, Any] = {"full": {"train": ["all"]}}
