"""ArrayStore: images and labels as two memory-mapped `.npy` files and a manifest. Written once, then only read.

A store is a folder with `images.npy` (uint8[N, H, W, C]), `labels.npy` (int64[N]) and `manifest.json`.
It is published atomically. Opening one compares the files' sizes and headers with the manifest and
maps them; the bytes are checked against their checksums when they are first copied (`load`) or at
once (`verify`). NHWC, because permuting it to a channels-last NCHW tensor is free.

    store = ArrayStore(path)
    image, label = store.images[0], store.labels[0]
"""

import contextlib
import functools
import json
import math
import os
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import xxhash
from numpy.typing import NDArray

from fastcifar.checks import check_path
from fastcifar.data.layout import CHUNK, FORMAT, HEADER, VERSION, manifest_problem, npy_header
from fastcifar.data.splits import Segment, Split, split_names, take_split
from fastcifar.errors import DamagedStoreError, DataError

__all__ = ["ArrayStore"]


class ArrayStore:
    """A store on disk, memory-mapped.

    Attributes:
        path: the folder.
        name: of the data set.
        images: uint8[N, H, W, C], a read-only memory map.
        labels: int64[N], in memory.
        classes: K names, in label order.
        digest: SHA-256 of the content; equal for equal images, labels, classes, splits and name.
        source: where the images came from; `source["verified"]` is False for a copy whose checksum
            was not the published one.

    Args:
        path: folder written by `write_store`.
        verify: check every byte now, not when it is first copied.

    Raises:
        ConfigError: `path` is no path.
        DataError: no store is there, it is damaged, or a newer fastcifar wrote it.
    """

    def __init__(self, path: Path | str, *, verify: bool = False) -> None:
        self.path = check_path("path", path).absolute()  # the working folder may change
        manifest = _read_manifest(self.path)
        if (wrong := manifest_problem(manifest)) is not None:
            raise _damaged(self.path, "manifest.json", wrong)
        self.name: str = manifest["name"]
        self.classes: tuple[str, ...] = tuple(manifest["classes"])
        self.digest: str = manifest["digest"]
        self.source: dict[str, Any] = manifest["source"]
        self._segments = [Segment.from_json(value) for value in manifest["segments"]]
        self._splits: dict[str, dict[str, list[str]]] = manifest["splits"]
        self._chunks: dict[str, list[str]] = manifest["chunks"]
        self._shape: tuple[int, ...] = tuple(manifest["images"]["shape"])
        self._check_size("images.npy", npy_header("|u1", self._shape), math.prod(self._shape))
        self._check_size("labels.npy", npy_header("<i8", self._shape[:1]), 8 * self._shape[0])
        self._checked: set[int] = set()  # chunks of images.npy
        with _reading(self.path, "images.npy"), open(self.path / "images.npy", "rb") as handle:
            self._mapped = _identity(handle.fileno())
            self.images: NDArray[np.uint8] = np.memmap(handle, np.uint8, mode="r", offset=HEADER, shape=self._shape)
        self.labels: NDArray[np.int64] = self._load("labels.npy").view("<i8")
        if self.labels.size and not 0 <= self.labels.min() <= self.labels.max() < len(self.classes):
            low, high = self.labels.min(), self.labels.max()
            raise _damaged(
                self.path, "labels.npy", f"labels run from {low} to {high}, there are {len(self.classes)} classes"
            )
        if verify:
            self.verify()

    def __len__(self) -> int:
        return self._shape[0]

    def __reduce__(self) -> tuple[Any, ...]:
        return ArrayStore, (self.path,)  # a copy opens it again

    def __repr__(self) -> str:
        return f"ArrayStore({self.name!r}, {' x '.join(map(str, self._shape))}, {len(self.classes)} classes)"

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """(H, W, C)."""
        return self._shape[1], self._shape[2], self._shape[3]

    @property
    def verified(self) -> bool:
        """Whether the source's checksum was the published one (True for bundled data and your own)."""
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
            DataError: of the scheme `holdout`, whose statistics need pixels: they do not have their checksum.
        """
        return take_split(
            name,
            self._segments,
            self._splits,
            self.images,
            self.labels,
            scale=scale,
            check=self.check_rows,
            again=functools.partial(self.split, name, scale=scale),
        )

    def load(self) -> NDArray[np.uint8]:
        """The images in memory, uint8[N, H, W, C], each byte checked on the way.

        Raises:
            DataError: a chunk does not have its checksum; the message says which.
        """
        return self._load("images.npy").reshape(self._shape)

    def check_rows(self, rows: NDArray[np.int64]) -> None:
        """Check the bytes of some images, in the file's chunks, each once for as long as the store is open.

        Args:
            rows: int64[n] or int64.

        Raises:
            DataError: as `load`.
        """
        each = self._shape[1] * self._shape[2] * self._shape[3]
        if each <= CHUNK:
            starts = HEADER + rows * each
            chunks = {*np.atleast_1d(starts // CHUNK).tolist(), *np.atleast_1d((starts + (each - 1)) // CHUNK).tolist()}
        else:
            chunks = set(range(len(self._chunks["images.npy"])))
        self._check_size("images.npy", b"", HEADER + self.images.nbytes)  # a map beyond the file's end kills
        if new := sorted(chunks - self._checked):
            self._compare_part("images.npy", new, None)
            with _reading(self.path, "images.npy"):
                now = _identity(self.path / "images.npy")
            if now != self._mapped:  # another's bytes are sound
                raise DataError(f"{self.path} was replaced since it was opened: open it again")
            self._checked.update(new)

    def verify(self) -> None:
        """Check every byte against its checksum.

        Raises:
            DataError: as `load`.
        """
        for name in ("images.npy", "labels.npy"):
            self._compare(name, None)

    def damaged_parts(self) -> list[str]:
        """The parts of the files without their checksums, a line each: "images.npy: bytes 0 to 4194304 ..."."""
        found = []
        for name, chunks in self._chunks.items():
            for chunk in range(len(chunks)):
                try:
                    self._compare_part(name, [chunk], None)
                except DamagedStoreError:
                    start, size = chunk * CHUNK, (self.path / name).stat().st_size
                    found.append(f"{name}: bytes {start} to {min(start + CHUNK, size)} do not have their checksum")
        return found

    def _load(self, name: str) -> NDArray[np.uint8]:
        size = self._shape[0] * 8 if name == "labels.npy" else math.prod(self._shape)
        content = np.empty(HEADER + size, np.uint8)
        self._compare(name, content.data)
        return content[HEADER:]

    def _compare(self, name: str, into: memoryview | None) -> None:
        """Check a file's chunks, filling `into` on the way if that is given; on up to four threads."""
        chunks = range(len(self._chunks[name]))
        workers = min(4, os.cpu_count() or 1, len(chunks))
        if workers == 1:
            self._compare_part(name, chunks, into)
            return
        try:
            with ThreadPoolExecutor(workers) as pool:
                list(pool.map(lambda k: self._compare_part(name, chunks[k::workers], into), range(workers)))
        except RuntimeError:  # the system has no thread to give
            self._compare_part(name, chunks, into)

    def _compare_part(self, name: str, chunks: Sequence[int], into: memoryview | None) -> None:
        own = memoryview(bytearray(CHUNK)) if into is None else None
        # buffered: it reads on where the system gives less than asked
        with _reading(self.path, name), open(self.path / name, "rb") as handle:
            for chunk in chunks:
                handle.seek(chunk * CHUNK)
                start, stop = chunk * CHUNK, (chunk + 1) * CHUNK
                content = own if own is not None else into[start:stop]  # type: ignore[index]
                count = handle.readinto(content)
                if xxhash.xxh3_64_hexdigest(content[:count]) != self._chunks[name][chunk]:
                    raise _damaged(self.path, name, f"bytes {start} to {stop} do not have their checksum")

    def _check_size(self, name: str, header: bytes, content: int) -> None:
        with _reading(self.path, name):
            size, found = os.stat(f"{self.path}/{name}").st_size, header
            if header and size == len(header) + content:  # else it may be a FIFO, which waits for its writer
                with open(self.path / name, "rb") as handle:
                    found = handle.read(len(header))
        if size != len(header) + content:
            raise _damaged(self.path, name, f"it has {size} bytes instead of {len(header) + content}")
        if found != header:
            raise _damaged(self.path, name, "its header is not the one that was written")


@contextlib.contextmanager
def _reading(path: Path, name: str) -> Iterator[None]:
    """For a block that reads a file of the store at `path`.

    Raises:
        DamagedStoreError: there is none.
        DataError: it cannot be read now: nothing says that it is damaged.
    """
    try:
        yield
    except (FileNotFoundError, NotADirectoryError, IsADirectoryError) as error:
        raise _damaged(path, name, error.strerror or str(error)) from None
    except OSError as error:
        raise DataError(f"{path / name} cannot be read: {error.strerror or error}") from None


def _identity(file: Path | int) -> tuple[int, int]:
    """Which file it is, of a path or a descriptor."""
    status = os.stat(file)
    return status.st_dev, status.st_ino


def _damaged(path: Path, name: str, what: str) -> DamagedStoreError:
    return DamagedStoreError(f"{path / name}: {what}", f"delete the folder {path} and make it anew")


def _read_manifest(path: Path) -> dict[str, Any]:
    try:
        manifest = json.loads((path / "manifest.json").read_bytes())
    except FileNotFoundError:
        raise DamagedStoreError(f"{path} is not a store: there is no manifest.json in it") from None
    except OSError as error:
        raise DataError(f"{path / 'manifest.json'} cannot be read: {error.strerror}") from None
    except (ValueError, RecursionError):
        raise _damaged(path, "manifest.json", "is not JSON") from None
    if not isinstance(manifest, dict) or manifest.get("format") != FORMAT:
        raise DamagedStoreError(f"{path} is not a store: its manifest.json is not one of fastcifar's")
    version = manifest.get("version")
    if type(version) is not int:
        raise _damaged(path, "manifest.json", "has no version")
    if version != VERSION:
        raise DataError(f"{path} has format version {version}, this fastcifar reads {VERSION}: update fastcifar")
    return manifest
