"""Writes a store: streams source files into two arrays, with checksums, and publishes them when all is there.

Example:
    write_store(path, [SourceFile("a", images, labels)], name="mine", classes=["x"], splits={}, source={})
"""

import contextlib
import json
import os
import shutil
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from numpy.typing import NDArray

from fastcifar.checks import check_kind, check_names, check_path
from fastcifar.data.content import Content, SourceFile, rows_in_a_block
from fastcifar.data.download import Progress
from fastcifar.data.layout import CHUNK, FORMAT, HEADER, VERSION, checksums, content_digest, npy_header
from fastcifar.data.splits import Segment
from fastcifar.data.store import ArrayStore
from fastcifar.errors import ConfigError, DataError, OutputError
from fastcifar.publish import publish_folder

__all__ = ["SourceFile", "make_store", "write_content", "write_store"]

_MOST_CLASSES = 1 << 16  # where classes are numbered by the labels: a wrong column must not make a billion names


def make_store(path: Path | str, content: Content, progress: Progress | None = None) -> ArrayStore:
    """Make a store where nothing is yet.

    Args:
        path: folder to make, and those above it.
        content: what it is made of.
        progress: called with images done and images in all (None where unknown).

    Raises:
        ConfigError: the path, the name or the class names are none.
        DataError: the content is not fit for a store.
        OutputError: there is something at `path`, or it cannot be written; nothing is left behind.
    """
    path, names = check_path("path", path), content.classes
    with contextlib.closing(content.files):
        check_kind("name", content.name, str, "text")
        if names is not None:
            check_names("classes", names)
            if len(set(names)) < len(names):
                raise ConfigError(f"classes: a name comes twice in {', '.join(names)}")
        if os.path.lexists(path):
            raise OutputError(f"{path} exists already: delete it first, or choose another place for the store")
        try:
            digest = write_content(path, content, progress)
        except OSError as error:
            raise OutputError(f"{error.filename or path} cannot be written: {error.strerror or error}") from None
    store = ArrayStore(path)
    if store.digest != digest:
        raise OutputError(
            f"{path} exists already: another process was first and made it of other content; "
            "delete it first, or choose another place for the store"
        )
    return store


def write_content(path: Path, content: Content, progress: Progress | None = None) -> str:
    """`write_store` for a `Content`."""
    return write_store(
        path,
        content.files,
        name=content.name,
        classes=content.classes,
        splits=content.splits,
        source=content.source,
        total=content.total,
        progress=progress,
    )


def _channel_sums(images: NDArray[np.uint8]) -> tuple[NDArray[np.uint64], NDArray[np.uint64]]:
    """Exact sums of the pixels and of their squares in each channel of uint8[n, H, W, C], n <= 2**16."""
    rows = images.reshape(len(images), -1)
    squares = np.square(rows, dtype=np.uint16)
    per_channel = (-1, images.shape[-1])
    return (
        np.add.reduce(rows, axis=0, dtype=np.uint32).reshape(per_channel).sum(0, dtype=np.uint64),
        np.add.reduce(squares, axis=0, dtype=np.uint32).reshape(per_channel).sum(0, dtype=np.uint64),
    )


def write_store(
    path: Path,
    files: Iterable[SourceFile],
    *,
    name: str,
    classes: Sequence[str] | None,
    splits: Mapping[str, Mapping[str, Sequence[str]]],
    source: Mapping[str, Any],
    total: int | None = None,
    progress: Progress | None = None,
) -> str:
    """Convert `files`, one at a time, into a store at `path`, published when it is complete.

    Args:
        path: folder to make. If another process publishes it first, that one is kept.
        files: the images, in the order in which rows are numbered.
        name: of the data set.
        classes: K names, in label order; None for "0", "1", ... up to the largest label.
        splits: scheme -> part -> names of the files that make it up.
        source: JSON values saying where the images came from, with `verified: bool`; read after the last file.
        total: how many images there are at most, where that is known.
        progress: called with images done and `total`.

    Returns:
        The digest of what was written; that of the store at `path` differs if another process was first with
        something else.

    Raises:
        DataError: the files disagree in shape, are not uint8, hold labels out of range, or a split
            names a file that is not there.
        OutputError: there is too little room for `total` images.
        OSError: the store cannot be written; nothing is left behind.
    """
    with publish_folder(path) as folder:
        with open(folder / "images.npy", "wb") as out:
            out.write(bytes(HEADER))  # the real one when the number of images is known
            written = _Written(out, name, len(classes) if classes is not None else _MOST_CLASSES)
            for file in files:
                written.add(file, total, progress)
            shape = written.finish()
        labels = np.concatenate(written.labels)
        with open(folder / "labels.npy", "wb") as out:
            out.write(npy_header("<i8", shape[:1]))
            out.write(labels.astype("<i8").data)
        known = {segment.name for segment in written.segments}
        for scheme, parts in splits.items():
            for part, names in parts.items():
                if missing := [n for n in names if n not in known]:
                    raise DataError(f"{name}: split {scheme}/{part} needs images of {missing[0]!r}, and there are none")
        chunks = {}
        for file_name in ("images.npy", "labels.npy"):
            with open(folder / file_name, "rb") as handle:
                chunks[file_name] = checksums(handle)
        manifest: dict[str, Any] = {
            "format": FORMAT,
            "version": VERSION,
            "name": name,
            "images": {"shape": list(shape), "dtype": "uint8"},
            "labels": {"shape": [shape[0]], "dtype": "int64"},
            "classes": list(classes) if classes is not None else [str(label) for label in range(labels.max() + 1)],
            "segments": [segment.to_json() for segment in written.segments],
            "splits": {s: {p: list(names) for p, names in parts.items()} for s, parts in splits.items()},
            "chunk_bytes": CHUNK,
            "chunks": chunks,
            "source": dict(source),
        }
        manifest["digest"] = content_digest(manifest)
        (folder / "manifest.json").write_text(json.dumps(manifest, indent=1), encoding="utf-8")
    digest: str = manifest["digest"]
    return digest


class _Written:
    """The images that were written so far, and what is remembered of them."""

    def __init__(self, out: BinaryIO, name: str, classes: int) -> None:
        self.segments: list[Segment] = []
        self.labels: list[NDArray[np.int64]] = []
        self._out, self._name, self._classes = out, name, classes
        self._shape: tuple[int, ...] | None = None  # (H, W, C)
        self._count = 0

    def add(self, file: SourceFile, total: int | None, progress: Progress | None) -> None:
        """Write the images of a file, or of its next block."""
        shape = _check_file(file, self._shape, self._classes)
        if self._shape is None and total is not None:
            self._check_room(total * int(np.prod(shape)))
        self._shape = shape
        sums, squares = np.zeros(shape[-1], np.uint64), np.zeros(shape[-1], np.uint64)
        rows = rows_in_a_block(shape)
        for row in range(0, len(file.images), rows):
            block = np.ascontiguousarray(file.images[row : row + rows])
            self._out.write(block.data)
            found = _channel_sums(block)
            sums += found[0]
            squares += found[1]
            if progress is not None:
                progress(self._count + row + len(block), total)
        stop = self._count + len(file.images)
        segment = Segment(file.name, self._count, stop, tuple(map(int, sums)), tuple(map(int, squares)))
        self._count = stop
        self.labels.append(np.asarray(file.labels, np.int64))
        if self.segments and self.segments[-1].name == file.name:
            segment = self.segments.pop().followed_by(segment)
        self.segments.append(segment)

    def finish(self) -> tuple[int, ...]:
        """Write the header, now that the number of images is known; the shape [N, H, W, C]."""
        if self._shape is None or self._count == 0:
            raise DataError(f"{self._name}: there are no images to convert")
        names = [segment.name for segment in self.segments]
        if len(set(names)) < len(names):
            raise DataError(f"{self._name}: two files have the same name; all are {', '.join(names)}")
        shape = (self._count, *self._shape)
        self._out.seek(0)
        self._out.write(npy_header("|u1", shape))
        return shape

    def _check_room(self, needed: int) -> None:
        folder = os.path.dirname(self._out.name)
        free = shutil.disk_usage(folder).free
        if free < needed:
            raise OutputError(f"{os.path.dirname(folder)} has {free} bytes free, {self._name} needs {needed}")


def _check_file(file: SourceFile, shape: tuple[int, ...] | None, classes: int) -> tuple[int, ...]:
    images, labels = file.images, file.labels
    if images.dtype != np.uint8 or images.ndim != 4:
        raise DataError(f"{file.name}: images must be uint8 [N, H, W, C], got {images.dtype} {list(images.shape)}")
    if not all(images.shape[1:]):
        raise DataError(f"{file.name}: images of {list(images.shape[1:])} have no pixels")
    if shape is not None and images.shape[1:] != shape:
        raise DataError(f"{file.name}: images are {list(images.shape[1:])}, those before are {list(shape)}")
    if labels.shape != (len(images),):
        raise DataError(f"{file.name}: {len(images)} images, but labels of shape {list(labels.shape)}")
    if len(labels) and not 0 <= labels.min() <= labels.max() < classes:
        there = f"there can be at most {classes:,}" if classes == _MOST_CLASSES else f"there are {classes}"
        raise DataError(f"{file.name}: labels run from {labels.min()} to {labels.max()}, {there} classes")
    return images.shape[1:]
