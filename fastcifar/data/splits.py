"""Splits: which rows of a store are for training, validation and test.

A scheme is a set of parts. `report` and `full` are lists of source files in the manifest; `holdout` is
derived from `full`: a tenth of its training rows, drawn once with a fixed seed, is for validation.

    label, image = store.split("report/validation")[7]       # int, uint8[C, H, W]
"""

import itertools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fastcifar.data.content import Splits
from fastcifar.errors import ConfigError

__all__ = ["Segment", "Split", "split_names", "take_split"]

_DEFAULT_SCHEME = "full"
_HOLDOUT_SEED = 0
_AT_A_TIME = 4 << 20  # bytes of images that are summed up


@dataclass(frozen=True)
class Segment:
    """The rows of one source file, with the exact sums of its pixels and their squares in each channel."""

    name: str
    start: int
    stop: int
    sums: tuple[int, ...]
    squares: tuple[int, ...]

    def to_json(self) -> dict[str, Any]:
        """As JSON values."""
        return {
            "name": self.name,
            "start": self.start,
            "stop": self.stop,
            "sums": list(self.sums),
            "squares": list(self.squares),
        }

    def followed_by(self, other: "Segment") -> "Segment":
        """This one and the next as one, under this one's name."""
        sums = tuple(a + b for a, b in zip(self.sums, other.sums, strict=True))
        squares = tuple(a + b for a, b in zip(self.squares, other.squares, strict=True))
        return Segment(self.name, self.start, other.stop, sums, squares)

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> "Segment":
        """Read what `to_json` gave."""
        return cls(value["name"], value["start"], value["stop"], tuple(value["sums"]), tuple(value["squares"]))


@dataclass(frozen=True, eq=False)
class Split:
    """A part of a store.

    Attributes:
        name: SCHEME/PART.
        rows: the rows of the store it consists of, in order: a range, or int64[n] where they are not contiguous.
        mean: float64[C], of the pixels (0..255) of the same scheme's training part.
        std: float64[C], their standard deviation (of the population).
        scale: whether indexing maps pixels to [-1, 1].

    Indexing gives (label, image) as the original report's data sets do: one index gives an int and
    [C, H, W]; a list of indices gives int64[n] and [n, C, H, W]. Images are uint8, or float32 in [-1, 1]
    with `scale`. Bytes that do not have their checksum are a `DataError`.
    """

    name: str
    rows: range | NDArray[np.int64]
    mean: NDArray[np.float64]
    std: NDArray[np.float64]
    scale: bool
    _images: NDArray[np.uint8]
    _labels: NDArray[np.int64]
    _check: Callable[[NDArray[np.int64]], object]
    _again: "Callable[[], Split]"

    def __reduce__(self) -> tuple[Any, ...]:
        return self._again, ()  # of its store, which is opened again

    def __repr__(self) -> str:
        return f"Split({self.name!r}, {len(self)} images{', scaled' * self.scale})"

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int | Sequence[int] | NDArray[np.int64]) -> tuple[Any, NDArray[Any]]:
        count = len(self)
        wanted = np.asarray(index)
        if (wanted.dtype.kind not in "iu" and wanted.size) or wanted.ndim > 1:
            raise TypeError(f"a split takes an int or a list of ints, got {index!r}")
        if wanted.size and (wanted.min() < -count or wanted.max() >= count):
            raise IndexError(f"index {index!r} is out of range for {self.name}, which has {count} images")
        wanted = wanted.astype(np.int64)  # a smaller type may not hold the sum
        places = np.where(wanted < 0, wanted + count, wanted)
        rows = self.rows.start + places if isinstance(self.rows, range) else self.rows[places]
        self._check(rows)
        images = np.moveaxis(np.asarray(self._images[rows]), -1, -3)  # [..., H, W, C] -> [..., C, H, W]
        pixels = images.astype(np.float32) * np.float32(2 / 255) - np.float32(1) if self.scale else images
        return (int(self._labels[rows]) if wanted.ndim == 0 else self._labels[rows]), np.ascontiguousarray(pixels)


def split_names(splits: Splits) -> list[str]:
    """All names that `take_split` accepts."""
    names = [f"{scheme}/{part}" for scheme, parts in splits.items() for part in parts]
    if _DEFAULT_SCHEME in splits:
        derived = ["train", "validation", *(["test"] if "test" in splits[_DEFAULT_SCHEME] else [])]
        names = [*splits[_DEFAULT_SCHEME], *names, *(f"holdout/{part}" for part in derived)]
    return names


def take_split(
    name: str,
    segments: Sequence[Segment],
    splits: Splits,
    images: NDArray[np.uint8],
    labels: NDArray[np.int64],
    *,
    scale: bool,
    check: Callable[[NDArray[np.int64]], object],
    again: Callable[[], Split],
) -> Split:
    """The split called `name` ("train", "test", or SCHEME/PART).

    `check` is told of rows before their pixels are read, and `again` gives the same split once more: to its copies.

    Raises:
        ConfigError: there is none of that name.
    """
    if name not in split_names(splits):
        raise ConfigError(f"unknown split {name!r}: choose from {', '.join(split_names(splits))}")
    scheme, part = name.split("/") if "/" in name else (_DEFAULT_SCHEME, name)
    files = {segment.name: segment for segment in segments}
    listed = splits[_DEFAULT_SCHEME if scheme == "holdout" else scheme]
    training = [files[file] for file in listed["train"]]
    count = sum(segment.stop - segment.start for segment in training)
    sums = np.sum([segment.sums for segment in training], axis=0, dtype=np.uint64)
    squares = np.sum([segment.squares for segment in training], axis=0, dtype=np.uint64)

    if scheme == "holdout":
        every, held = np.asarray(_rows(training)), _held(count)
        rows: range | NDArray[np.int64] = every[held] if part == "validation" else np.delete(every, held)
        # the validation images must not shape the training part's statistics
        check(every[held])
        for some in np.array_split(every[held], max(1, images[:1].nbytes * len(held) // _AT_A_TIME)):
            pixels = np.asarray(images[some]).reshape(-1, images.shape[-1])
            sums = sums - pixels.sum(0, dtype=np.uint64)
            squares = squares - np.square(pixels, dtype=np.uint16).sum(0, dtype=np.uint64)
        count -= len(held)
    if scheme != "holdout" or part == "test":
        rows = _rows([files[file] for file in listed[part]])
    pixel_count = count * images.shape[1] * images.shape[2]
    mean = sums.astype(np.float64) / pixel_count
    variance = squares.astype(np.float64) / pixel_count - mean**2
    return Split(f"{scheme}/{part}", rows, mean, np.sqrt(variance), scale, images, labels, check, again)


def _held(count: int) -> NDArray[np.int64]:
    """Positions, among `count` training rows, of the tenth that is held out; sorted."""
    # RandomState's streams are frozen for good; a Generator's may change with NumPy
    order = np.random.RandomState(_HOLDOUT_SEED).permutation(count)
    return np.sort(order[: count // 10])


def _rows(segments: Sequence[Segment]) -> range | NDArray[np.int64]:
    ranges = [range(segment.start, segment.stop) for segment in segments]
    if all(a.stop == b.start for a, b in itertools.pairwise(ranges)):
        return range(ranges[0].start, ranges[-1].stop)
    return np.concatenate([np.asarray(r, np.int64) for r in ranges])
