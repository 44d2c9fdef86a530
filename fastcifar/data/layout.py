"""The layout of a store on disk: what its writer and its reader agree on.

Example:
    checksums(handle)       # one for each 4 MiB
"""

import hashlib
import io
import json
from collections.abc import Mapping
from typing import Any, BinaryIO

import numpy as np
import xxhash

__all__ = ["CHUNK", "FORMAT", "HEADER", "VERSION", "checksums", "content_digest", "npy_header"]

FORMAT, VERSION = "fastcifar-store", 1
CHUNK = 4 * 1024 * 1024
"""Bytes under one checksum."""
HEADER = 128
"""Bytes of a .npy header of ours."""

_CONTENT = ("format", "version", "name", "images", "labels", "classes", "segments", "splits", "chunk_bytes", "chunks")


def npy_header(dtype: str, shape: tuple[int, ...]) -> bytes:
    """The header of a .npy file, as NumPy writes it."""
    buffer = io.BytesIO()
    header = {"descr": dtype, "fortran_order": False, "shape": shape}
    np.lib.format.write_array_header_1_0(buffer, header)
    return buffer.getvalue()


def checksums(handle: BinaryIO) -> list[str]:
    """XXH3 of each 4 MiB of a file."""
    return [xxhash.xxh3_64_hexdigest(chunk) for chunk in iter(lambda: handle.read(CHUNK), b"")]


def content_digest(manifest: Mapping[str, Any]) -> str:
    """SHA-256 of what the store holds, wherever it came from."""
    content = {key: manifest[key] for key in _CONTENT}
    return hashlib.sha256(json.dumps(content, sort_keys=True, separators=(",", ":")).encode()).hexdigest()
