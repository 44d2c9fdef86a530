"""The common form of all data: what a store is made of, and what a data set known by name can do.

Folders, arrays, CIFAR's archives and the digits each become a `Content`; `writer` takes it from there. Types only:
this module touches nothing.

    Content(name="mine", classes=("cat", "dog"), splits={}, source={"verified": True}, files=blocks())
"""

from collections.abc import Callable, Generator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from fastcifar.data.download import Progress

__all__ = ["BLOCK_BYTES", "Content", "Dataset", "Found", "SourceFile", "Splits", "rows_in_a_block"]

Splits = Mapping[str, Mapping[str, Sequence[str]]]
"""Scheme -> part -> names of the source files that make it up."""

BLOCK_BYTES = 4 << 20
"""Bytes of images held at a time, wherever images are streamed."""


@dataclass(frozen=True)
class SourceFile:
    """Images of one source file: all of them, or a block. Neighbours of the same name are one file.

    Args:
        name: of the file; splits refer to it.
        images: uint8[n, H, W, C], any strides.
        labels: integers [n], each an index into the class names.
    """

    name: str
    images: NDArray[np.uint8]
    labels: NDArray[np.int64]


@dataclass(frozen=True, kw_only=True)
class Content:
    """What a store is made of.

    Attributes:
        name: of the data set.
        classes: K names, in label order; None for "0", "1", ... up to the largest label.
        splits: which files make up which part.
        source: JSON values saying where the images came from, with `verified: bool`. It is read after the last
            file, so that `files` may add to it.
        files: the images, made as they are asked for. It may hold processes: whoever reads it closes it.
        total: how many images there are at most, where that is known before.
    """

    name: str
    classes: Sequence[str] | None
    splits: Splits
    source: Mapping[str, Any]
    files: Generator[SourceFile, None, None]
    total: int | None = None


@dataclass(frozen=True)
class Found:
    """A data set's source, found and checked, but not yet read.

    Attributes:
        folder: name of the store that is made from it; another source gives another name.
        content: opens it.
    """

    folder: str
    content: Callable[[], Content]


class Dataset(Protocol):
    """A data set known by name."""

    @property
    def published(self) -> str:
        """Name of the store that is made from the source as it was published."""
        ...

    def find(self, *, data: Path | None, home: Path, allow_unverified: bool, progress: Progress | None) -> Found:
        """Find the source, or fetch it.

        Args:
            data: where the source is, instead of a download.
            home: folder whose `downloads` keeps archives.
            allow_unverified: accept a source that is not the published one.
            progress: called with bytes done and bytes in all (None where unknown).

        Raises:
            ConfigError: this data set takes no `data`.
            DataError: the source cannot be had, or is not the published one.
            OutputError: HOME/downloads cannot be written.
        """
        ...


def rows_in_a_block(shape: Sequence[int]) -> int:
    """How many images of `shape` (H, W, C, in any order) make up a block; at least 1, at most 1024."""
    return max(1, min(1024, BLOCK_BYTES // max(1, int(np.prod(shape)))))
