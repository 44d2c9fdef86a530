"""What the contestants' files share: the task, what a loader is to the race, and code where a peer has none."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True, kw_only=True)
class Task:
    """What every contestant is given.

    Attributes:
        store: folder with images.npy (uint8[N, H, W, 3]) and labels.npy (int64[N]).
        scratch: folder for files of its own, kept from one process of the contestant to the next.
        mean: of the pixels, 0..255.
        std: of the pixels.
        count: N, how many of the store's images are used: the first ones.
        batch_size: samples in a batch.
        crop: pixels of padding at each side.
    """

    store: Path
    scratch: Path
    mean: tuple[float, ...]
    std: tuple[float, ...]
    count: int
    batch_size: int
    crop: int

    def images(self) -> NDArray[np.uint8]:
        """In memory, uint8[N, H, W, 3]."""
        return np.array(np.load(self.store / "images.npy", mmap_mode="r")[: self.count])

    def labels(self) -> NDArray[np.int64]:
        """In memory, int64[N]."""
        return np.load(self.store / "labels.npy")[: self.count]


@dataclass(frozen=True, kw_only=True)
class Opened:
    """A loader that is ready.

    Attributes:
        epoch: each call begins an epoch: an iterable of (images, labels), tensors or arrays.
        settle: batches taken before the clock starts, so that what workers made ahead is not counted.
        whole_epochs: whether only whole epochs are timed, since an epoch's work is not spread evenly over it.
        scaling: the mean and deviation in use, where not the task's.
    """

    epoch: Callable[[], Iterable[tuple[Any, Any]]]
    settle: int = 0
    whole_epochs: bool = False
    scaling: tuple[tuple[float, ...], tuple[float, ...]] | None = None


class Windows:
    """Random crops and flips of a whole batch at once, in NumPy, for peers that have none for arrays.

    Every image is padded and mirrored once, before; a batch is then one gather from overlapping windows.
    It was the quickest of the six ways tried in NumPy and torch.

    Args:
        images: uint8[N, H, W, C].
        crop: pixels of padding at each side, reflected.
    """

    def __init__(self, images: NDArray[np.uint8], crop: int) -> None:
        self._both = pad_and_flip(images, crop)
        self._count, self._crop = len(images), crop

    def take(self, rows: NDArray[np.int64], generator: np.random.Generator) -> NDArray[np.uint8]:
        """uint8[B, H, W, C]."""
        flips = generator.integers(0, 2, len(rows))
        return crop_each(self._both, rows + self._count * flips, self._crop, generator)


def pad_and_flip(images: NDArray[np.uint8], crop: int) -> NDArray[np.uint8]:
    """All images padded, then all of them flipped, too: [2 N, H + 2 crop, W + 2 crop, C]."""
    padded = pad(images, crop)
    return np.concatenate([padded, padded[:, :, ::-1]])


def crop_each(
    padded: NDArray[np.uint8], rows: NDArray[np.int64], crop: int, generator: np.random.Generator
) -> NDArray[np.uint8]:
    """A random window of each of padded[rows], uint8[N, H + 2 crop, W + 2 crop, C] -> uint8[B, H, W, C]."""
    count, height, width, channels = padded.shape
    height, width = height - 2 * crop, width - 2 * crop
    shifts = 2 * crop + 1
    image, row, pixel, _ = padded.strides
    windows = np.lib.stride_tricks.as_strided(
        padded, (count, shifts, shifts, height, width * channels), (image, row, pixel, row, 1), writeable=False
    )
    y, x = generator.integers(0, shifts, (2, len(rows)))
    return windows[rows, y, x].reshape(len(rows), height, width, channels)


def pad(images: NDArray[np.uint8], crop: int) -> NDArray[np.uint8]:
    """[N, H + 2 crop, W + 2 crop, C], reflected."""
    return np.pad(images, ((0, 0), (crop, crop), (crop, crop), (0, 0)), mode="reflect")


def batches_of(count: int, batch_size: int, generator: np.random.Generator) -> list[NDArray[np.int64]]:
    """A new order of `count` rows, cut into full batches."""
    order = generator.permutation(count)
    return [order[i : i + batch_size] for i in range(0, count - batch_size + 1, batch_size)]
