"""Reads chosen files out of a .tar.gz, one at a time and in order, without ever extracting it.

Python's `tarfile` reads long names and extended headers of any size into memory and follows links; this
reader knows plain files and folders, refuses everything else by name, and bounds every number it is given.
It reads one file and writes nothing.

    for name, content in read_members(Path("cifar-10-python.tar.gz"), "cifar-10-batches-py", ["test_batch"]):
        ...
"""

import gzip
import re
import zlib
from collections.abc import Collection, Iterator
from pathlib import Path

from fastcifar.errors import DataError

__all__ = ["MAX_MEMBER", "read_members", "top_folder"]

MAX_MEMBER = 256 << 20  # bytes; CIFAR-100's largest has 155 MB
_MAX_MEMBERS = 256
_MAX_TOTAL = 512 << 20
_MAX_RATIO = 20  # CIFAR's archives have 1.1
_FREE = 64 << 20  # bytes that an archive may hold whatever its ratio
_MAX_EXTENDED = 16 << 10
_FIRST = 4  # headers in which the first member's name must be
_BLOCK = 512
_PIECE = 1 << 20

_KINDS = {
    b"1": "a hard link",
    b"2": "a symbolic link",
    b"3": "a device",
    b"4": "a device",
    b"6": "a FIFO",
    b"S": "a sparse file",
    b"L": "a name of over 100 bytes",
    b"K": "a link of over 100 bytes",
}


class _Stream:
    """The unpacked bytes, counted: what an archive unpacks to is bounded by what it weighs."""

    def __init__(self, path: Path, file: gzip.GzipFile, weight: int) -> None:
        self._path = path
        self._file = file
        self._left = min(_MAX_TOTAL, _FREE + _MAX_RATIO * weight)

    def read(self, size: int, *, whole: bool = True) -> bytes:
        self._left -= size
        if self._left < 0:
            raise DataError(f"{self._path}: unpacks to far more than a CIFAR archive holds")
        try:
            content = self._file.read(size)
        except EOFError:
            raise DataError(f"{self._path}: is cut short: its gzip data has no end") from None
        except (OSError, zlib.error) as error:
            raise DataError(f"{self._path}: is no intact gzip file: {error}") from None
        if whole and len(content) != size:
            raise DataError(f"{self._path}: is cut short: its tar data has no end")
        return content

    def skip(self, size: int) -> None:
        while size > 0:
            size -= len(self.read(min(size, _PIECE)))

    def skip_rest(self) -> None:
        """Read to the end, which makes gzip compare its checksum."""
        while self.read(_PIECE, whole=False):
            pass


def read_members(path: Path, folder: str, names: Collection[str]) -> Iterator[tuple[str, bytes]]:
    """Yield `folder`'s files that are among `names`, in the archive's order, each once.

    Other plain files are passed over (the published archives hold a readme); anything else ends it.

    Args:
        path: a .tar.gz file.
        folder: the archive's folder that holds them.
        names: the files that must be there.

    Yields:
        A file's name, without its folder, and its content.

    Raises:
        DataError: it is not a gzip tar, is damaged, holds something dangerous, or lacks a file.
    """
    wanted = {f"{folder}/{name}": name for name in names}
    seen: set[str] = set()
    with _opened(path) as file:
        stream = _Stream(path, file, path.stat().st_size)
        for _ in range(_MAX_MEMBERS):
            header = stream.read(_BLOCK)
            if header.count(0) == _BLOCK:
                break
            member, kind, size = _parse(header, path)
            padding = -size % _BLOCK
            if kind in b"xg":
                if size > _MAX_EXTENDED:
                    raise DataError(f"{path}: an extended header of {size} bytes is not allowed")
                _check_extended(stream.read(size + padding)[:size], path)
            elif kind == b"5" or member not in wanted:
                stream.skip(size + padding)
            elif member in seen:
                raise DataError(f"{path}: member {member!r} occurs twice")
            else:
                seen.add(member)
                content = stream.read(size)
                stream.skip(padding)
                yield wanted[member], content
                del content  # not kept while the next one is read
        else:
            raise DataError(f"{path}: holds more than the {_MAX_MEMBERS} members allowed")
        stream.skip_rest()
    missing = [name for member, name in wanted.items() if member not in seen]
    if missing:
        raise DataError(f"{path}: lacks {', '.join(missing)} in a folder {folder}; expected {', '.join(names)}")


def top_folder(path: Path) -> str | None:
    """The folder at the top of a .tar.gz, by its first member; None if it is no such file, or a dangerous one."""
    try:
        with _opened(path) as file:
            stream = _Stream(path, file, path.stat().st_size)
            for _ in range(_FIRST):
                member, kind, size = _parse(stream.read(_BLOCK), path)
                if kind in b"05" and member:  # not "./", nor a header that precedes another
                    return member.split("/")[0]
                stream.skip(size + -size % _BLOCK)
    except (DataError, OSError):
        pass
    return None


def _opened(path: Path) -> gzip.GzipFile:
    try:
        return gzip.open(path)
    except OSError as error:
        raise DataError(f"{path}: cannot be read: {error.strerror or error}") from None


def _parse(header: bytes, path: Path) -> tuple[str, bytes, int]:
    """A header's name, type and size, checked."""
    # the checksum counts its own 8 bytes as spaces
    if _octal(header[148:156]) != sum(header) - sum(header[148:156]) + 8 * 0x20:
        raise DataError(f"{path}: is no tar file, or a damaged one: a header's checksum is wrong")
    name = header[:100].split(b"\0")[0].decode("utf-8", "backslashreplace")
    if header[257:263] == b"ustar\0":  # GNU's own form keeps other things there
        prefix = header[345:500].split(b"\0")[0].decode("utf-8", "backslashreplace")
        name = f"{prefix}/{name}" if prefix else name
    kind = header[156:157].replace(b"\0", b"0").replace(b"7", b"0")
    if kind not in b"05xg":
        what = _KINDS.get(kind, f"of the unknown type {kind!r}")
        raise DataError(f"{path}: member {name!r} is {what}: only plain files and folders are allowed")
    if name.startswith("/") or "\\" in name or name[1:2] == ":" or ".." in name.split("/"):
        raise DataError(f"{path}: member {name!r} points outside its folder")
    size = _octal(header[124:136])
    if size is None or size > MAX_MEMBER:
        raise DataError(f"{path}: member {name!r} claims {size or 'no valid number of'} bytes")
    return name.removeprefix("./"), kind, size


def _octal(field: bytes) -> int | None:
    digits = field.strip(b"\0 ")
    return int(digits, 8) if re.fullmatch(rb"[0-7]{1,12}", digits) else None


def _check_extended(records: bytes, path: Path) -> None:
    """Let times and owners pass; refuse a name, size or link that would replace the header's own."""
    while records:
        match = re.match(rb"([0-9]{1,5}) ([^=\n]{1,64})=", records)
        length = int(match[1]) if match else 0
        if match is None or not match.end() < length <= len(records) or records[length - 1 : length] != b"\n":
            raise DataError(f"{path}: an extended header is malformed")
        key = match[2].decode("ascii", "backslashreplace")
        if key in {"path", "size", "linkpath"} or key.startswith("GNU.sparse"):
            raise DataError(f"{path}: an extended header that sets {key!r} is not allowed")
        records = records[length:]
