"""Writes a store: streams source files into two arrays, with checksums, and publishes them when all is there.

Example:
    write_store(path, [SourceFile("a", images, labels)], name="mine", classes=["x"], splits={}, source={})
"""

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fastcifar.data.layout import CHUNK, FORMAT, HEADER, VERSION, checksums, content_digest, npy_header
from fastcifar.data.splits import Segment
from fastcifar.errors import DataError
from fastcifar.publish import publish_folder

__all__ = ["SourceFile", "write_store"]

_ROWS = 1024  # images converted at a time, to bound memory


@dataclass(frozen=True)
class SourceFile:
    """One source file's images.

    Args:
        name: of the file; splits refer to it.
        images: uint8[n, H, W, C], any strides.
        labels: integers [n], each an index into the class names.
    """

    name: str
    images: NDArray[np.uint8]
    labels: NDArray[np.int64]


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
    classes: Sequence[str],
    splits: Mapping[str, Mapping[str, Sequence[str]]],
    source: Mapping[str, Any],
) -> None:
    """Convert `files`, one at a time, into a store at `path`, published when it is complete.

    Args:
        path: folder to make. If another process publishes it first, that one is kept.
        files: the images, in the order in which rows are numbered.
        name: of the data set.
        classes: K names, in label order.
        splits: scheme -> part -> names of the files that make it up.
        source: JSON values saying where the images came from, with `verified: bool`.

    Raises:
        DataError: the files disagree in shape, are not uint8, hold labels out of range, or a split
            names a file that is not there.
        OSError: the store cannot be written; nothing is left behind.
    """
    with publish_folder(path) as folder:
        segments, labels = [], []
        shape: tuple[int, ...] | None = None
        start = 0
        with open(folder / "images.npy", "wb") as out:
            out.write(bytes(HEADER))  # the real one when the number of images is known
            for file in files:
                shape = _check_file(file, shape, len(classes))
                total, squares = np.zeros(shape[-1], np.uint64), np.zeros(shape[-1], np.uint64)
                for row in range(0, len(file.images), _ROWS):
                    block = np.ascontiguousarray(file.images[row : row + _ROWS])
                    out.write(block.data)
                    sums = _channel_sums(block)
                    total += sums[0]
                    squares += sums[1]
                stop = start + len(file.images)
                segments.append(Segment(file.name, start, stop, tuple(map(int, total)), tuple(map(int, squares))))
                labels.append(np.asarray(file.labels, np.int64))
                start = stop
            if shape is None or start == 0:
                raise DataError(f"{name}: there are no images to convert")
            out.seek(0)
            out.write(npy_header("|u1", (start, *shape)))
        with open(folder / "labels.npy", "wb") as out:
            out.write(npy_header("<i8", (start,)))
            out.write(np.concatenate(labels).astype("<i8").data)
        known = {segment.name for segment in segments}
        for scheme, parts in splits.items():
            for part, names in parts.items():
                if missing := [n for n in names if n not in known]:
                    raise DataError(f"{name}: split {scheme}/{part} needs the file {missing[0]!r}, which is not there")
        chunks = {}
        for file_name in ("images.npy", "labels.npy"):
            with open(folder / file_name, "rb") as handle:
                chunks[file_name] = checksums(handle)
        manifest: dict[str, Any] = {
            "format": FORMAT,
            "version": VERSION,
            "name": name,
            "images": {"shape": [start, *shape], "dtype": "uint8"},
            "labels": {"shape": [start], "dtype": "int64"},
            "classes": list(classes),
            "segments": [segment.to_json() for segment in segments],
            "splits": {s: {p: list(names) for p, names in parts.items()} for s, parts in splits.items()},
            "chunk_bytes": CHUNK,
            "chunks": chunks,
            "source": dict(source),
        }
        manifest["digest"] = content_digest(manifest)
        (folder / "manifest.json").write_text(json.dumps(manifest, indent=1), encoding="utf-8")


def _check_file(file: SourceFile, shape: tuple[int, ...] | None, classes: int) -> tuple[int, ...]:
    images, labels = file.images, file.labels
    if images.dtype != np.uint8 or images.ndim != 4:
        raise DataError(f"{file.name}: images must be uint8 [N, H, W, C], got {images.dtype} {list(images.shape)}")
    if shape is not None and images.shape[1:] != shape:
        raise DataError(f"{file.name}: images are {list(images.shape[1:])}, those before are {list(shape)}")
    if labels.shape != (len(images),):
        raise DataError(f"{file.name}: {len(images)} images, but labels of shape {list(labels.shape)}")
    if len(labels) and not 0 <= labels.min() <= labels.max() < classes:
        raise DataError(f"{file.name}: labels run from {labels.min()} to {labels.max()}, there are {classes} classes")
    return images.shape[1:]
