"""A tree of class folders, as torchvision's ImageFolder reads it, to a store. `tree` says what it may look like.

Example:
    store = convert_folder("pets-32", "pets", size=32)
"""

import dataclasses
import re
from collections.abc import Generator, Sequence
from contextlib import closing
from numbers import Integral
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
import PIL

from fastcifar.checks import check_choice, check_integer, check_names, check_path
from fastcifar.data.content import Content, SourceFile, rows_in_a_block
from fastcifar.data.decoders import available_cores, decode_blocks
from fastcifar.data.download import Progress
from fastcifar.data.images import Decoding, Failure, Resize, peek
from fastcifar.data.store import ArrayStore
from fastcifar.data.tree import Tree, read_tree
from fastcifar.data.writer import make_store
from fastcifar.errors import ConfigError, DataError

__all__ = ["Broken", "convert_folder", "folder_content", "read_size"]

Broken = Literal["refuse", "skip"]

_LARGEST = 1 << 14  # pixels a side
_BLOCK = 128  # images, or fewer where they are large: progress is told, and work is dealt out, by blocks
_WORTH_A_PROCESS = 300  # images; a process takes as long to start as these to decode


def convert_folder(
    path: Path | str, folder: Path | str, *, progress: Progress | None = None, **options: Any
) -> ArrayStore:
    """Convert a tree of class folders to a new store.

    Args:
        path: of the store; nothing may be there.
        folder: the tree.
        progress: called with images done and images in all.
        options: those of `folder_content`.

    Raises:
        ConfigError, DataError: as `folder_content`, or an image cannot be read and is not to be skipped.
        OutputError: something is at `path` already, or it cannot be written. Nothing is left behind.
    """
    return make_store(path, folder_content(folder, **options), progress)


def folder_content(
    folder: Path | str,
    *,
    size: int | str | tuple[int, int] | None = None,
    resize: Resize = "crop",
    grey: bool = False,
    upright: bool = False,
    shuffle: bool = False,
    broken: Broken = "refuse",
    workers: int | None = None,
    classes: Sequence[str] | None = None,
    name: str | None = None,
) -> Content:
    """What a tree of class folders holds. The store does not depend on `workers`.

    Args:
        folder: the tree.
        size: of the stored images, in pixels: a side, (H, W) or "HxW"; None where all have one size already.
        resize: "crop" (scale the shorter side, cut the longer one evenly) or "squash" (scale both); bilinear, with
            antialiasing, once.
        grey: make all grey. Otherwise images have one channel only where all are grey.
        upright: turn images as their EXIF orientation says; torchvision doesn't.
        shuffle: store the images of a part in a shuffled order, always the same, not class by class: for the order
            `block` of a Loader, which reads neighbours together.
        broken: what to do about images that cannot be read: "refuse" the first, or "skip" them, and list them in the
            store's `source["skipped"]`.
        workers: processes that decode; None for as many as there are cores, if there is enough to do.
        classes: the class folders to take, in label order; None for all, sorted.
        name: of the data set; the folder's own if None.

    Raises:
        ConfigError: an option is not allowed.
        DataError: the folder is no such tree.
    """
    check_choice("resize", resize, get_args(Resize))
    check_choice("broken", broken, get_args(Broken))
    if workers is not None:
        check_integer("workers", workers, 1)
    if classes is not None:
        check_names("classes", classes)
    wanted = read_size(size) if size is not None else None
    tree = read_tree(check_path("folder", folder), tuple(classes) if classes is not None else None)
    if shuffle:
        tree = dataclasses.replace(tree, parts={part: _shuffled(images) for part, images in tree.parts.items()})
    found, channels = _look(tree, wanted, grey=grey, upright=upright, skip=broken == "skip")
    how = Decoding(
        size=wanted or found, channels=channels, resize=resize if wanted is not None else None, upright=upright
    )
    count = sum(map(len, tree.parts.values()))
    auto = min(available_cores(), 1 + count // _WORTH_A_PROCESS)
    skipped: list[list[str]] = []
    source = {
        "origin": str(tree.root.absolute()),
        "verified": True,  # nothing was published that it could differ from
        "resize": resize if wanted is not None else None,
        "upright": upright,
        "pillow": PIL.__version__,  # its decoders' rounding is part of the pixels
        "skipped": skipped,
    }
    return Content(
        name=name or tree.root.resolve().name,
        classes=tree.classes,
        splits={"full": {part: (part,) for part in tree.parts}},
        source=source,
        files=_files(tree, how, workers or auto, skipped if broken == "skip" else None),
        total=count,
    )


def _shuffled(images: list[tuple[int, str]]) -> list[tuple[int, str]]:
    # RandomState's streams are frozen for good
    return [images[i] for i in np.random.RandomState(0).permutation(len(images))]


def read_size(size: int | str | tuple[int, int]) -> tuple[int, int]:
    """(H, W) from a side, a pair or "HxW".

    Raises:
        ConfigError: it is none of these.
    """
    match = re.fullmatch(r"([0-9]{1,5})(?:x([0-9]{1,5}))?", size) if isinstance(size, str) else None
    if match:
        height, width = int(match[1]), int(match[2] or match[1])
    elif isinstance(size, Integral):
        height = width = int(size)
    elif isinstance(size, tuple) and len(size) == 2 and all(isinstance(side, Integral) for side in size):
        height, width = map(int, size)
    else:
        height = width = 0
    if not (1 <= height <= _LARGEST and 1 <= width <= _LARGEST):
        raise ConfigError(
            f"size must be a side or HxW, in pixels from 1 to {_LARGEST}, such as 32 or 32x48, got {size!r}"
        )
    return height, width


def _look(
    tree: Tree, size: tuple[int, int] | None, *, grey: bool, upright: bool, skip: bool
) -> tuple[tuple[int, int], int]:
    """The first good image's (H, W), and how many channels all have: looks no further than it must.

    Where broken ones are skipped, what their headers say is nothing.
    """
    first = size
    for images in tree.parts.values():
        for _, path in images:
            if first is not None and grey:
                return first, 1
            seen = peek(f"{tree.root}/{path}", upright=upright)
            if seen is not None and skip and (first is None or not (grey or seen[1])):
                seen = peek(f"{tree.root}/{path}", upright=upright, whole=True)
            if seen is not None:
                first = first or seen[0]
                if not grey and not seen[1]:
                    return first, 3
    return first or (1, 1), 1  # where nothing can be read, that is said when it is tried


def _files(
    tree: Tree, how: Decoding, workers: int, skipped: list[list[str]] | None
) -> Generator[SourceFile, None, None]:
    """Blocks of the parts' images; adds to `skipped`, or refuses if that is None."""
    rows = min(_BLOCK, rows_in_a_block((*how.size, how.channels)))
    blocks = (
        ([f"{tree.root}/{path}" for _, path in images[row : row + rows]], (part, row))
        for part, images in tree.parts.items()
        for row in range(0, len(images), rows)
    )
    left = dict.fromkeys(tree.parts, 0)
    with closing(decode_blocks(blocks, how, workers)) as decoded:
        for block, (part, row) in decoded:
            images = tree.parts[part][row : row + rows]
            for failure in block.failures:
                path = images[failure.index][1]
                _take(failure, path, tree.root, skipped)
            bad = [failure.index for failure in block.failures]
            labels = np.delete(np.array([label for label, _ in images], np.int64), bad)
            left[part] += len(labels)
            yield SourceFile(part, block.images, labels)
    for part, count in left.items():
        if count == 0:
            raise DataError(f"{tree.root}: not one of the {len(tree.parts[part])} {part} images can be read")


def _take(failure: Failure, path: str, root: Path, skipped: list[list[str]] | None) -> None:
    if not failure.fits:
        raise DataError(f"{root}/{path}: {failure.reason}: give the size that all shall have, such as --size 32")
    if skipped is None:
        raise DataError(f"{root}/{path}: {failure.reason}; --broken skip leaves such images out")
    skipped.append([path, failure.reason])
