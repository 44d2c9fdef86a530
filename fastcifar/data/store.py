"""ArrayStore: images and labels as two memory-mapped `.npy` files and a manifest. Written once, then only read.

A store is a folder with `images.npy` (uint8[N, H, W, C]), `labels.npy` (int64[N]) and `manifest.json`.
It is published atomically. Opening one compares the files' sizes and headers with the manifest and
maps them; the bytes are checked against their checksums when they are first copied (`load`) or at
once (`verify`). NHWC, because permuting it to a channels-last NCHW tensor is free.

    store = ArrayStore(path)
    image, label = store.images[0], store.labels[0]
"""

import hashlib
import io
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import xxhash
from numpy.typing import NDArray

from fastcifar.data.splits import Segment, Split, split_names, take_split
from fastcifar.errors import DataError
from fastcifar.publish import publish_folder

__all__ = ["ArrayStore", "SourceFile", "write_store"]

_FORMAT, _VERSION = "fastcifar-store", 1
_CHUNK = 4 * 1024 * 1024  # bytes under one checksum
_ROWS = 1024  # images converted at a time, to bound memory
_HEADER = 128  # bytes of a .npy header of ours
_CONTENT = ("format", "version", "name", "images", "labels", "classes", "segments", "splits", "chunk_bytes", "chunks")


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


def _npy_header(dtype: str, shape: tuple[int, ...]) -> bytes:
    buffer = io.BytesIO()
    header = {"descr": dtype, "fortran_order": False, "shape": shape}
    np.lib.format.write_array_header_1_0(buffer, header)
    return buffer.getvalue()


def _checksums(handle: BinaryIO, into: memoryview | None = None) -> list[str]:
    """XXH3 of each 4 MiB of a file, filling `into` with its bytes on the way where that is given."""
    buffer = into if into is not None else memoryview(bytearray(_CHUNK))
    sums: list[str] = []
    position = 0
    while True:
        chunk = buffer[position : position + _CHUNK] if into is not None else buffer
        count = handle.readinto(chunk) if len(chunk) else 0  # type: ignore[attr-defined]
        if not count:
            return sums
        sums.append(xxhash.xxh3_64_hexdigest(chunk[:count]))
        position += count


def _channel_sums(images: NDArray[np.uint8]) -> tuple[NDArray[np.uint64], NDArray[np.uint64]]:
    """Exact sums of the pixels and of their squares in each channel of uint8[n, H, W, C], n <= 2**16."""
    rows = images.reshape(len(images), -1)
    squares = np.square(rows, dtype=np.uint16)
    per_channel = (-1, images.shape[-1])
    return (
        np.add.reduce(rows, axis=0, dtype=np.uint32).reshape(per_channel).sum(0, dtype=np.uint64),
        np.add.reduce(squares, axis=0, dtype=np.uint32).reshape(per_channel).sum(0, dtype=np.uint64),
    )


def _content_digest(manifest: Mapping[str, Any]) -> str:
    """SHA-256 of what the store holds, wherever it came from."""
    content = {key: manifest[key] for key in _CONTENT}
    return hashlib.sha256(json.dumps(content, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


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
            out.write(bytes(_HEADER))  # the real one when the number of images is known
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
            out.write(_npy_header("|u1", (start, *shape)))
        with open(folder / "labels.npy", "wb") as out:
            out.write(_npy_header("<i8", (start,)))
            out.write(np.concatenate(labels).astype("<i8").data)
        known = {segment.name for segment in segments}
        for scheme, parts in splits.items():
            for part, names in parts.items():
                if missing := [n for n in names if n not in known]:
                    raise DataError(f"{name}: split {scheme}/{part} needs the file {missing[0]!r}, which is not there")
        chunks = {}
        for file_name in ("images.npy", "labels.npy"):
            with open(folder / file_name, "rb") as handle:
                chunks[file_name] = _checksums(handle)
        manifest: dict[str, Any] = {
            "format": _FORMAT,
            "version": _VERSION,
            "name": name,
            "images": {"shape": [start, *shape], "dtype": "uint8"},
            "labels": {"shape": [start], "dtype": "int64"},
            "classes": list(classes),
            "segments": [segment.to_json() for segment in segments],
            "splits": {s: {p: list(names) for p, names in parts.items()} for s, parts in splits.items()},
            "chunk_bytes": _CHUNK,
            "chunks": chunks,
            "source": dict(source),
        }
        manifest["digest"] = _content_digest(manifest)
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


class ArrayStore:
    """A store on disk, memory-mapped.

    Attributes:
        path: the folder.
        name: of the data set.
        images: uint8[N, H, W, C], a read-only memory map.
        labels: int64[N], in memory.
        classes: K names, in label order.
        digest: SHA-256 of the content; equal for equal images, labels, classes and splits.
        source: where the images came from; `source["verified"]` is False for a copy whose checksum
            was not the published one.

    Args:
        path: folder written by `write_store`.
        verify: check every byte now, not when it is first copied.

    Raises:
        DataError: no store is there, it is damaged, or a newer fastcifar wrote it.
    """

    def __init__(self, path: Path | str, *, verify: bool = False) -> None:
        self.path = Path(path)
        manifest = _read_manifest(self.path)
        try:
            self.name: str = manifest["name"]
            self.classes: tuple[str, ...] = tuple(manifest["classes"])
            self.digest: str = manifest["digest"]
            self.source: dict[str, Any] = manifest["source"]
            self._segments = [Segment.from_json(value) for value in manifest["segments"]]
            self._splits: dict[str, dict[str, list[str]]] = manifest["splits"]
            self._chunks: dict[str, list[str]] = manifest["chunks"]
            self._shape: tuple[int, ...] = tuple(manifest["images"]["shape"])
            intact = self.digest == _content_digest(manifest) and len(self._shape) == 4
        except (KeyError, TypeError, ValueError, AttributeError):
            intact = False
        if not intact:
            raise self._damaged("manifest.json", "its digest does not fit its content")
        self._check_size("images.npy", _npy_header("|u1", self._shape), int(np.prod(self._shape)))
        self._check_size("labels.npy", _npy_header("<i8", self._shape[:1]), 8 * self._shape[0])
        self.images: NDArray[np.uint8] = np.memmap(
            self.path / "images.npy", np.uint8, mode="r", offset=_HEADER, shape=self._shape
        )
        self.labels: NDArray[np.int64] = self._load("labels.npy").view("<i8")
        if verify:
            self.verify()

    def __len__(self) -> int:
        return self._shape[0]

    def __repr__(self) -> str:
        return f"ArrayStore({self.name!r}, {' x '.join(map(str, self._shape))}, {len(self.classes)} classes)"

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """(H, W, C)."""
        return self._shape[1], self._shape[2], self._shape[3]

    @property
    def verified(self) -> bool:
        """Whether the source's checksum was the published one (True for bundled data)."""
        return bool(self.source.get("verified", False))

    def split_names(self) -> list[str]:
        """The splits there are, such as "train", "test" and "report/train"."""
        return split_names(self._splits)

    def split(self, name: str, *, scale: bool = False) -> Split:
        """A part of the data, with random access: `store.split("train")[i]` or `[[i, j]]`.

        Args:
            name: "train" and "test" (of the scheme `full`), or SCHEME/PART with a scheme of
                "report", "full" and "holdout", such as "report/validation".
            scale: whether indexing maps pixels linearly from 0..255 to [-1, 1] (float32); raw uint8 if not.

        Raises:
            ConfigError: there is no such split; the message lists those there are.
        """
        return take_split(name, self._segments, self._splits, self.images, self.labels, scale=scale)

    def load(self) -> NDArray[np.uint8]:
        """The images in memory, uint8[N, H, W, C], each byte checked on the way.

        Raises:
            DataError: a chunk does not have its checksum; the message says which.
        """
        return self._load("images.npy").reshape(self._shape)

    def verify(self) -> None:
        """Check every byte against its checksum.

        Raises:
            DataError: as `load`.
        """
        for name in ("images.npy", "labels.npy"):
            self._compare(name, None)

    def _load(self, name: str) -> NDArray[np.uint8]:
        content = np.empty((self.path / name).stat().st_size, np.uint8)
        self._compare(name, content.data)
        return content[_HEADER:]

    def _compare(self, name: str, into: memoryview | None) -> None:
        with open(self.path / name, "rb") as handle:
            found = _checksums(handle, into)
        for chunk, (a, b) in enumerate(zip(found, self._chunks[name], strict=False)):
            if a != b:
                start = chunk * _CHUNK
                raise self._damaged(name, f"bytes {start} to {start + _CHUNK} do not have their checksum")
        if len(found) != len(self._chunks[name]):
            raise self._damaged(name, "it was cut while it was read")

    def _check_size(self, name: str, header: bytes, content: int) -> None:
        try:
            size = (self.path / name).stat().st_size
            with open(self.path / name, "rb") as handle:
                found = handle.read(len(header))
        except OSError as error:
            raise self._damaged(name, error.strerror or str(error)) from None
        if size != len(header) + content:
            raise self._damaged(name, f"it has {size} bytes instead of {len(header) + content}")
        if found != header:
            raise self._damaged(name, "its header is not the one that was written")

    def _damaged(self, name: str, what: str) -> DataError:
        return DataError(f"{self.path / name}: {what}; delete the folder {self.path} to have it made again")


def _read_manifest(path: Path) -> dict[str, Any]:
    try:
        manifest = json.loads((path / "manifest.json").read_bytes())
    except FileNotFoundError:
        raise DataError(f"{path} is not a store: there is no manifest.json in it") from None
    except OSError as error:
        raise DataError(f"{path / 'manifest.json'} cannot be read: {error.strerror}") from None
    except (ValueError, RecursionError):
        raise DataError(f"{path / 'manifest.json'} is not JSON; delete the folder to have it made again") from None
    if not isinstance(manifest, dict) or manifest.get("format") != _FORMAT:
        raise DataError(f"{path} is not a store: its manifest.json is not one of fastcifar's")
    if manifest.get("version") != _VERSION:
        raise DataError(
            f"{path} has format version {manifest.get('version')!r}, this fastcifar reads {_VERSION}: update fastcifar"
        )
    return manifest
