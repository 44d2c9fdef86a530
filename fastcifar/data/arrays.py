"""NumPy arrays to a store, as they are: uint8 images and integer labels. `arrayfiles` has those that lie in files.

Example:
    store = convert_arrays("mine", images, labels, splits={"train": slice(0, 900), "test": slice(900, 1000)})
"""

import math
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
from numpy.typing import NDArray

from fastcifar.checks import check_choice, check_kind, check_path
from fastcifar.data.content import Content, SourceFile, rows_in_a_block
from fastcifar.data.download import Progress
from fastcifar.data.store import ArrayStore
from fastcifar.data.writer import make_store
from fastcifar.errors import ConfigError, DataError, one_line

__all__ = [
    "PARTS",
    "Arrangement",
    "Layout",
    "Stored",
    "arrangement",
    "as_nhwc",
    "check_pair",
    "convert_arrays",
    "in_memory",
]

_MOST_VALUES = 3 << 26  # in an image
PARTS = ("train", "test", "validation")
Layout = Literal["auto", "nhwc", "nchw"]
Arrangement = Literal["nhw", "nhwc", "nchw"]


@dataclass(frozen=True)
class Stored:
    """An array, wherever it is: `blocks(rows)` gives it in order, `rows` along the first axis at a time.

    `where` names it in messages.
    """

    where: str
    shape: tuple[int, ...]
    dtype: np.dtype[Any]
    blocks: Callable[[int], Iterator[NDArray[Any]]]


def convert_arrays(
    path: Path | str,
    images: Any,
    labels: Any,
    *,
    classes: Sequence[str] | None = None,
    splits: Mapping[str, Any] | None = None,
    layout: Layout = "auto",
    name: str | None = None,
    progress: Progress | None = None,
) -> ArrayStore:
    """Convert arrays to a new store.

    Args:
        path: of the store; nothing may be there.
        images: uint8[N, H, W], [N, H, W, C] or [N, C, H, W] with C 1 or 3, as NumPy takes it; a memory map is read in
            blocks.
        labels: integers [N] or [N, 1], from 0.
        classes: K names, in label order; None for "0", "1", ... up to the largest label.
        splits: "train", and "test" and "validation" where there are such -> the rows of that part: a slice, a range,
            indices or a mask. Rows in none of them are left out. None if all are for training.
        layout: of four axes: "nhwc", "nchw", or "auto" where only one of them can be meant.
        name: of the data set; the last part of `path` if None.
        progress: called with images done and images in all.

    Raises:
        ConfigError: an option is not allowed.
        DataError: the arrays are not of that kind, or labels are out of range.
        OutputError: something is at `path` already, or it cannot be written. Nothing is left behind.
    """
    try:
        pixels, targets = np.asanyarray(images), np.asarray(labels)
    except ValueError as error:
        raise DataError(f"images or labels are no array: {one_line(error)}") from None
    pair = (in_memory("images", pixels), in_memory("labels", targets))
    arranged, numbers = check_pair(*pair, layout)
    if splits is None:
        splits = {"train": slice(None)}
    chosen = _rows(splits, len(pixels))

    def files() -> Generator[SourceFile, None, None]:
        step = rows_in_a_block(pixels.shape[1:])
        for part, rows in chosen.items():
            for start in range(0, len(rows), step):
                block = rows[start : start + step]
                yield SourceFile(part, as_nhwc(pixels[block], arranged), numbers[block])

    content = Content(
        name=name or check_path("path", path).name,
        classes=classes,
        splits={"full": {part: (part,) for part in chosen}},
        source={"origin": "arrays", "verified": True},
        files=files(),
        total=sum(map(len, chosen.values())),
    )
    return make_store(path, content, progress)


def arrangement(shape: Sequence[int], layout: Layout, where: str) -> Arrangement:
    """Which axis of [N, ...] images is which.

    Raises:
        ConfigError: the layout is none, or must be given.
        DataError: these are no images.
    """
    check_choice("layout", layout, get_args(Layout))
    if len(shape) == 3 and layout == "auto":
        return "nhw"
    channels = {"nhwc": shape[3], "nchw": shape[1]} if len(shape) == 4 else {}
    both: tuple[Arrangement, ...] = ("nhwc", "nchw")
    fit = [kind for kind in both if channels.get(kind) in (1, 3) and layout in (kind, "auto")]
    if len(fit) == 2:
        raise ConfigError(f"{where}: {list(shape)} can be read in two ways: give the layout, nhwc or nchw")
    if not fit:
        kinds = {"auto": "[N, H, W], [N, H, W, C] or [N, C, H, W]", "nhwc": "[N, H, W, C]", "nchw": "[N, C, H, W]"}
        raise DataError(f"{where}: has shape {list(shape)}, expected {kinds[layout]} with C 1 or 3")
    return fit[0]


def as_nhwc(images: NDArray[np.uint8], arranged: Arrangement) -> NDArray[np.uint8]:
    """A view as [N, H, W, C]."""
    if arranged == "nhw":
        return images[..., None]
    return images if arranged == "nhwc" else images.transpose(0, 2, 3, 1)


def check_pair(images: Stored, labels: Stored, layout: Layout) -> tuple[Arrangement, NDArray[np.int64]]:
    """How the images are arranged, and all labels, int64[N].

    Raises:
        ConfigError: the layout must be given.
        DataError: these are not uint8 images and as many integer labels.
    """
    if images.dtype != np.uint8:
        raise DataError(
            f"{images.where}: is {images.dtype}, expected uint8 from 0 to 255: scale and round it yourself, "
            "so that it is known how"
        )
    if math.prod(images.shape[1:]) > _MOST_VALUES:
        raise DataError(f"{images.where}: has images of {list(images.shape[1:])}, which are too large")
    arranged = arrangement(images.shape, layout, images.where)
    count = images.shape[0]
    if labels.dtype.kind not in "iu" or labels.shape not in ((count,), (count, 1)):
        raise DataError(f"{labels.where}: is {labels.dtype}, {list(labels.shape)}, expected integers [{count}]")
    found = np.concatenate([np.empty(0, labels.dtype), *(block.reshape(-1) for block in labels.blocks(1 << 16))])
    if len(found) and (found.min() < 0 or found.max() > np.iinfo(np.int64).max):
        raise DataError(f"{labels.where}: labels run from {found.min()} to {found.max()}, expected 0 to K - 1")
    return arranged, found.astype(np.int64)


def _rows(splits: Mapping[str, Any], count: int) -> dict[str, NDArray[np.int64]]:
    """The rows of each part, in the order train, test, validation."""
    check_kind("splits", splits, Mapping, "parts and their rows, such as {'train': slice(0, 900)}")
    if unknown := [part for part in splits if part not in PARTS]:
        raise ConfigError(f"splits: there is no part {unknown[0]!r}: choose from {', '.join(PARTS)}")
    if "train" not in splits:
        raise ConfigError(f"splits: train is missing; there are {', '.join(splits) or 'none'}")
    every = np.arange(count)
    taken = np.zeros(count, bool)
    chosen = {}
    for part in PARTS:
        if part not in splits:
            continue
        try:
            rows = every[splits[part]] if isinstance(splits[part], slice) else every[np.asarray(splits[part])]
        except (IndexError, TypeError, ValueError) as error:
            raise ConfigError(f"splits: {part} does not fit {count} images: {error}") from None
        if rows.ndim != 1 or not len(rows):
            raise ConfigError(f"splits: {part} takes no rows of {count} images")
        if taken[rows].any() or len(np.unique(rows)) < len(rows):
            raise ConfigError(f"splits: {part} takes a row that was taken before")
        taken[rows] = True
        chosen[part] = rows
    return chosen


def in_memory(where: str, array: NDArray[Any]) -> Stored:
    """An array in memory or a memory map.

    Raises:
        DataError: it has no axes.
    """

    def blocks(rows: int) -> Iterator[NDArray[Any]]:
        return (array[start : start + rows] for start in range(0, len(array), rows))

    if not array.ndim:
        raise DataError(f"{where}: has no axes, expected an array")
    return Stored(where, array.shape, array.dtype, blocks)
