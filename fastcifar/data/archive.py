"""Finds a CIFAR archive, or fetches it, checks it, and gives its files one at a time.

An archive counts as verified if its SHA-256 is the published one, an unpacked folder if each file's MD5
is; both are computed before anything is parsed but the first headers that an archive is recognised by. Nothing is ever
extracted. `download` and `tarstream` do the work; this module decides what to use, and writes only to HOME/downloads.

    source = find(CIFAR10, data=None, home=Path("cache"), allow_unverified=False)
    for name, content in source.members():
        ...
"""

import hashlib
import logging
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import filelock

from fastcifar.data.download import Progress, fetch, file_sha256
from fastcifar.data.published import CIFAR10, CIFAR10_BINARY, CIFAR100, CIFAR100_BINARY, ArchiveSpec
from fastcifar.data.tarstream import MAX_MEMBER, read_members, top_folder
from fastcifar.errors import DataError, DownloadError, OutputError

__all__ = ["CIFAR10", "CIFAR10_BINARY", "CIFAR100", "CIFAR100_BINARY", "ArchiveSpec", "Source", "find", "recognise"]

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Source:
    """An archive or folder that was found and checked.

    Attributes:
        spec: what was looked for.
        path: the archive, or the folder that holds the files.
        sha256: names the content. An archive's own; for a folder whose files are the published ones, the
            published archive's; for another folder, of its files' names and MD5 sums.
        verified: whether the content is the published one.
        kind: "archive" or "folder".
        origin: the address that it was fetched from just now, or its path.
    """

    spec: ArchiveSpec
    path: Path
    sha256: str
    verified: bool
    kind: Literal["archive", "folder"]
    origin: str

    def members(self) -> Iterator[tuple[str, bytes]]:
        """Each file's name and content, one at a time: in the archive's order, or the spec's for a folder.

        Raises:
            DataError: the archive is damaged or dangerous or lacks a file; after the last one it has.
        """
        sums = self.spec.member_md5 if self.verified else {}
        for name, content in self._read():
            if name in sums and _md5(content) != sums[name]:
                raise DataError(f"{self.path}: {name} has changed since it was checked")
            yield name, content

    def _read(self) -> Iterator[tuple[str, bytes]]:
        if self.kind == "archive":
            return read_members(self.path, self.spec.folder, self.spec.members)
        return ((name, _read_file(self.path / name)) for name in self.spec.members)


def find(
    spec: ArchiveSpec,
    *,
    data: Path | None,
    home: Path,
    allow_unverified: bool,
    progress: Progress | None = None,
) -> Source:
    """Find the data set's archive or folder, or fetch the archive to HOME/downloads.

    Args:
        spec: what to look for.
        data: the archive, its unpacked folder, or a folder that holds either; nothing is fetched then.
        home: folder whose `downloads` keeps archives.
        allow_unverified: accept content that is not the published one.
        progress: called with bytes done and bytes in all (None where unknown), at most 20 times a second.

    Raises:
        DataError: the content is not there, or not the published one.
        DownloadError: the archive could not be fetched.
        OutputError: HOME/downloads cannot be written.
    """
    if data is not None:
        return _given(spec, data, allow_unverified)
    target = home / "downloads" / spec.name
    if target.is_file() and (source := _archive(spec, target)).verified:
        return source  # needs no lock, and no folder that can be written
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with filelock.FileLock(target.with_name(f".{spec.name}.lock")):
            return _kept(spec, target, allow_unverified) or _fetched(spec, target, progress)
    except OSError as error:
        raise OutputError(f"{error.filename or target}: cannot be written: {error.strerror or error}") from None


def recognise(data: Path, specs: Sequence[ArchiveSpec]) -> ArchiveSpec | None:
    """Which of `specs` an archive or folder is a copy of, by names inside; None if it is none; or a `DataError`."""
    try:
        if data.is_dir():
            return next((spec for spec in specs if _is_folder_of(spec, data)), None)
        folder = top_folder(data) if data.is_file() else None
    except OSError as error:
        raise DataError(f"{data}: cannot be read: {error.strerror or error}") from None
    return next((spec for spec in specs if spec.folder == folder), None)


def _is_folder_of(spec: ArchiveSpec, data: Path) -> bool:
    # one file alone may have such a name by chance: CIFAR-100's are "meta", "train" and "test"
    loose = sum((data / name).is_file() for name in spec.members)
    return loose > 1 or (loose == 0 and _folder_in(spec, data) is not None)


def _kept(spec: ArchiveSpec, target: Path, allow_unverified: bool) -> Source | None:
    """What lies at `target`, after other processes have finished there; a wrong file is set aside."""
    if not target.is_file():
        return None
    source = _archive(spec, target)
    if source.verified or allow_unverified:
        return source
    aside = target.with_name(f"{target.name}.wrong-{source.sha256[:8]}")
    os.replace(target, aside)
    _log.warning("%s is not the published file (SHA-256 %s): set aside as %s", target, source.sha256, aside.name)
    return None


def _fetched(spec: ArchiveSpec, target: Path, progress: Progress | None) -> Source:
    try:
        url = fetch(spec.urls, target, sha256=spec.sha256, size=spec.size, progress=progress)
    except DownloadError as error:
        raise DownloadError(
            f"{spec.name} could not be had: {error}. Put it at {target.absolute()} by hand, "
            "give its place with --data PATH, or use --dataset digits, which needs no download"
        ) from None
    return Source(spec, target, spec.sha256, True, "archive", url)


def _given(spec: ArchiveSpec, data: Path, allow_unverified: bool) -> Source:
    expected = f"expected {spec.name}, or its unpacked folder {spec.folder}"
    try:
        if data.is_dir():
            place = _folder_in(spec, data)
            if place is None:
                raise DataError(
                    f"{data}: holds neither {spec.folder} nor its files ({', '.join(spec.members)}); {expected}"
                )
        elif data.is_file():
            with open(data, "rb") as file:
                if file.read(2) != b"\x1f\x8b":
                    raise DataError(f"{data}: is no gzip file; {expected}")
            place = data
        else:
            raise DataError(f"{data}: {'is no file or folder' if data.exists() else 'does not exist'}; {expected}")
    except OSError as error:
        raise DataError(f"{data}: cannot be read: {error.strerror or error}") from None
    if place.is_dir():
        return _folder(spec, place, allow_unverified)
    source = _archive(spec, place)
    if not source.verified and not allow_unverified:
        raise DataError(
            f"{place}: is not the published {spec.name}: its SHA-256 is {source.sha256}, expected {spec.sha256} "
            f"(it has {place.stat().st_size} bytes, expected {spec.size}); "
            "--allow-unverified uses it all the same"
        )
    return source


def _folder_in(spec: ArchiveSpec, data: Path) -> Path | None:
    if any((data / name).is_file() for name in spec.members):
        return data
    if data.name == spec.folder or (data / spec.folder).is_dir():
        return data if data.name == spec.folder else data / spec.folder
    archive = data / spec.name
    return archive if archive.is_file() else None


def _archive(spec: ArchiveSpec, path: Path) -> Source:
    try:
        sha256 = file_sha256(path)
    except OSError as error:
        raise DataError(f"{path}: cannot be read: {error.strerror or error}") from None
    return Source(spec, path, sha256, sha256 == spec.sha256, "archive", str(path))


def _folder(spec: ArchiveSpec, path: Path, allow_unverified: bool) -> Source:
    missing = [name for name in spec.members if not (path / name).is_file()]
    if missing:
        raise DataError(f"{path}: lacks {', '.join(missing)}; expected {', '.join(spec.members)}")
    # MD5 is what is published for the files; a second file with a given MD5 is still out of reach
    sums = {name: _md5(_read_file(path / name)) for name in spec.members}
    wrong = [name for name in spec.members if sums[name] != spec.member_md5.get(name)]
    if not spec.member_md5 and not allow_unverified:
        raise DataError(
            f"{path}: cannot be checked, since sums are published for the archive alone: give {spec.name}; "
            "--allow-unverified uses the files all the same"
        )
    if wrong and not allow_unverified:
        name = wrong[0]
        others = f" ({len(wrong) - 1} more differ)" if len(wrong) > 1 else ""
        raise DataError(
            f"{path / name}: is not the published file: its MD5 is {sums[name]}, expected {spec.member_md5[name]}"
            f"{others}; --allow-unverified uses it all the same"
        )
    content = hashlib.sha256("".join(f"{name} {sums[name]}\n" for name in spec.members).encode()).hexdigest()
    return Source(spec, path, content if wrong else spec.sha256, not wrong, "folder", str(path))


def _md5(content: bytes) -> str:
    return hashlib.md5(content, usedforsecurity=False).hexdigest()


def _read_file(path: Path) -> bytes:
    try:
        if path.stat().st_size > MAX_MEMBER:
            raise DataError(f"{path}: has {path.stat().st_size} bytes, more than the {MAX_MEMBER} allowed")
        return path.read_bytes()
    except OSError as error:
        raise DataError(f"{path}: cannot be read: {error.strerror or error}") from None
