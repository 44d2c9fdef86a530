"""Any map-style data set to a store: anything with a length whose items are (image, label), such as torchvision's.

It knows torch only by what its tensors can do, and imports none of it.

    store = convert_dataset("mine", train=torchvision_train, test=torchvision_test)
"""

import operator
from collections.abc import Generator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from fastcifar.checks import check_path
from fastcifar.data.arrays import PARTS, Layout, arrangement, as_nhwc
from fastcifar.data.content import Content, SourceFile, rows_in_a_block
from fastcifar.data.download import Progress
from fastcifar.data.images import is_grey, pixels
from fastcifar.data.store import ArrayStore
from fastcifar.data.writer import make_store
from fastcifar.errors import ConfigError, DataError

__all__ = ["convert_dataset"]


def convert_dataset(
    path: Path | str,
    train: Any,
    *,
    test: Any = None,
    validation: Any = None,
    classes: Sequence[str] | None = None,
    layout: Layout = "auto",
    name: str | None = None,
    progress: Progress | None = None,
) -> ArrayStore:
    """Convert map-style data sets to a new store; each item is asked for once, in order, by this thread.

    Args:
        path: of the store; nothing may be there.
        train: the training images: has `len` and gives (image, label) for each index. An image is a Pillow image, or
            uint8 [H, W], [H, W, C] or [C, H, W] with C 1 or 3, as an array or tensor; all have one shape. A label is an
            integer from 0. Randomness in the data set's transforms ends up in the store: leave it out.
        test: the test images, if there are any.
        validation: likewise.
        classes: K names, in label order; None for the data set's own `classes`, or else "0", "1", ...
        layout: of arrays and tensors with three axes: "nhwc" for [H, W, C], "nchw" for [C, H, W], or "auto" where only
            one of them can be meant.
        name: of the data set; the last part of `path` if None.
        progress: called with images done and images in all.

    Raises:
        ConfigError: an option is not allowed.
        DataError: a data set or an item is not of that kind.
        OutputError: something is at `path` already, or it cannot be written. Nothing is left behind.
    """
    given = {"train": train, "test": test, "validation": validation}
    parts = {part: given[part] for part in PARTS if given[part] is not None or part == "train"}
    for part, dataset in parts.items():
        if not (hasattr(dataset, "__len__") and hasattr(dataset, "__getitem__")) or isinstance(dataset, Mapping):
            raise ConfigError(f"{part} must be a data set with a length and items, got {type(dataset).__name__}")
        if not len(dataset):
            raise DataError(f"{part}: the data set is empty")
    own = getattr(train, "classes", None)
    named = isinstance(own, list | tuple) and all(isinstance(one, str) for one in own)
    content = Content(
        name=name or check_path("path", path).name,
        classes=classes if classes is not None else own if named else None,
        splits={"full": {part: (part,) for part in parts}},
        source={"origin": f"{type(train).__module__}.{type(train).__qualname__}", "verified": True},
        files=_files(parts, layout),
        total=sum(map(len, parts.values())),
    )
    return make_store(path, content, progress)


def _files(parts: Mapping[str, Any], layout: Layout) -> Generator[SourceFile, None, None]:
    for part, dataset in parts.items():
        images: list[NDArray[np.uint8]] = []
        labels: list[int] = []
        for index in range(len(dataset)):
            image, label = _item(dataset, index, f"{part}[{index}]", layout)
            if images and image.shape != images[0].shape:
                raise DataError(
                    f"{part}[{index}]: the image is {list(image.shape)}, those before are {list(images[0].shape)}"
                )
            images.append(image)
            labels.append(label)
            if len(images) == rows_in_a_block(image.shape) or index == len(dataset) - 1:
                yield SourceFile(part, np.stack(images), np.array(labels, np.int64))
                images, labels = [], []


def _item(dataset: Any, index: int, where: str, layout: Layout) -> tuple[NDArray[np.uint8], int]:
    """An item as uint8[H, W, C] and its label."""
    try:
        item = dataset[index]
    except OSError as error:  # not to be taken for one of ours, about the store
        raise DataError(f"{where}: cannot be had: {error}") from error
    if not isinstance(item, list | tuple) or len(item) != 2:
        raise DataError(f"{where}: is {_kind(item)}, expected (image, label)")
    image, label = item
    try:
        number = operator.index(label)
    except TypeError:
        raise DataError(f"{where}: the label is {_kind(label)}, expected an integer") from None
    if not 0 <= number <= np.iinfo(np.int64).max:
        raise DataError(f"{where}: the label is {number}, expected 0 to K - 1")
    if isinstance(image, Image.Image):
        try:
            return pixels(image, 1 if is_grey(image) else 3), number
        except ValueError as error:
            raise DataError(f"{where}: the image {error}") from None
    array = image.numpy() if hasattr(image, "numpy") else image
    if not isinstance(array, np.ndarray):
        raise DataError(f"{where}: the image is {_kind(image)}, expected a Pillow image, an array or a tensor")
    if array.dtype != np.uint8:
        raise DataError(
            f"{where}: the image is {array.dtype}, expected uint8 from 0 to 255: leave out what scales it, such as "
            "ToTensor or Normalize; the loader scales batches"
        )
    arranged = arrangement((1, *array.shape), layout if array.ndim == 3 else "auto", f"{where}: the image")
    return as_nhwc(array[None], arranged)[0].copy(), number  # the data set may use its memory again


def _kind(value: object) -> str:
    shape = getattr(value, "shape", None)
    return f"a {type(value).__name__}" + (f" of shape {list(shape)}" if isinstance(shape, tuple) else "")
