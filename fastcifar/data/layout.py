"""The layout of a store on disk: what its writer and its reader agree on.

Example:
    checksums(handle)       # one for each 4 MiB
"""

import hashlib
import io
import json
import math
from collections.abc import Mapping
from typing import Any, BinaryIO

import numpy as np
import xxhash

__all__ = ["CHUNK", "FORMAT", "HEADER", "VERSION", "checksums", "content_digest", "manifest_problem", "npy_header"]

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


def manifest_problem(manifest: Mapping[str, Any]) -> str | None:
    """What is wrong with a manifest, in words; None if it is one that `writer` could have written.

    A right digest proves nothing about who wrote it: every number is checked that an index or a size is made of.
    """
    try:
        if manifest["digest"] != content_digest(manifest):
            return "its digest does not fit its content"
        if not isinstance(manifest["name"], str) or not isinstance(manifest["source"], dict):
            return "its name or source is none"
        shape, classes = manifest["images"]["shape"], manifest["classes"]
        if len(shape) != 4 or not all(type(side) is int and side > 0 for side in shape):
            return "its images have no shape"
        if not isinstance(classes, list) or not classes or not all(isinstance(one, str) for one in classes):
            return "its classes are no names"
        if manifest["labels"]["shape"] != shape[:1]:
            return "its labels are not as many as its images"
        sizes = {"images.npy": math.prod(shape), "labels.npy": 8 * shape[0]}
        needed = {name: -(-(HEADER + size) // CHUNK) for name, size in sizes.items()}
        chunks = manifest["chunks"]
        if (
            not all(isinstance(sums, list) for sums in chunks.values())
            or {k: len(v) for k, v in chunks.items()} != needed
        ):
            return "its checksums are not one for each 4 MiB"
        return _segments_problem(manifest["segments"], shape) or _splits_problem(manifest)
    except (KeyError, TypeError, ValueError, AttributeError, RecursionError):
        return "it does not hold what a store's does"


def _segments_problem(segments: Any, shape: list[int]) -> str | None:
    row = 0
    for segment in segments:
        name, start, stop, sums, squares = (segment[key] for key in ("name", "start", "stop", "sums", "squares"))
        if not isinstance(name, str) or not type(start) is type(stop) is int or not row == start <= stop:
            return "its segments do not follow each other"
        pixels, row = (stop - start) * shape[1] * shape[2], stop
        for total, square in zip(sums, squares, strict=True):
            # x^2 <= 255 x of each pixel, and Cauchy-Schwarz: no variance is below zero
            whole = type(total) is type(square) is int
            if not whole or not 0 <= square <= 255 * total or total**2 > pixels * square:
                return "its sums are those of no pixels"
        if len(sums) != shape[3]:
            return "its sums are not one for each channel"
    names = [segment["name"] for segment in segments]
    return None if row == shape[0] and len(set(names)) == len(names) else "its segments are not all its rows, each once"


def _splits_problem(manifest: Mapping[str, Any]) -> str | None:
    known = {segment["name"] for segment in manifest["segments"]}
    for scheme, parts in manifest["splits"].items():
        if scheme == "holdout" or "train" not in parts or any("/" in name for name in (scheme, *parts)):
            return "its splits have names that none has"
        for names in parts.values():
            if not isinstance(names, list) or not names or len(set(names)) < len(names) or not known.issuperset(names):
                return "its splits are of segments that are not there"
    return None
