"""Atomic publishing: a file or folder is there whole, or not at all.

Everything is written under a unique temporary name beside its target, flushed to disk, renamed,
and the folder that holds it is flushed too. A crash at any instant leaves the old state or the
new one, and at worst a temporary whose name starts with `.tmp-`. Its writer holds a lock on it, which
the system takes back when the process ends, however it ends: the next one to publish there removes
what nobody holds.

    with publish_folder(Path("runs/a/checkpoints/100")) as folder:
        (folder / "manifest.json").write_text("{}")
"""

import errno
import json
import os
import secrets
import shutil
import stat
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

try:
    import fcntl
except ImportError:  # Windows cannot lock a folder: there nothing counts as left over
    fcntl = None  # type: ignore[assignment]

__all__ = ["publish_bytes", "publish_folder", "publish_json", "read_file", "remove_folder", "remove_stale"]

_PREFIX = ".tmp-"
_LARGEST = 1 << 30  # bytes of a file that is read whole
_LONGEST = 50  # letters of the target's name in a temporary's: with its ends they must fit 255 bytes


def _sync_file(path: Path) -> None:
    with open(path, "rb+") as handle:
        os.fsync(handle.fileno())


def _sync_folder(path: Path) -> None:
    if os.name == "nt":  # a folder cannot be opened there; NTFS journals the rename itself
        return
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def publish_bytes(path: Path, content: bytes) -> None:
    """Write `content` to `path`, replacing an old file atomically.

    Raises:
        OSError: the folder is missing or full or cannot be written; the old file is intact.
    """
    with _temporary(path, lambda place: os.close(os.open(place, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o666))) as place:
        with open(place, "wb") as handle:
            handle.write(content)
            handle.flush()
            os.fsync(handle.fileno())
        os.replace(place, path)
        _sync_folder(path.parent)


def publish_json(path: Path, value: Any) -> None:
    """Write `value` to `path` as indented JSON, atomically."""
    text = json.dumps(value, indent=2, ensure_ascii=False) + "\n"
    publish_bytes(path, text.encode("utf-8", "backslashreplace"))  # JSON's own escape for what a path may hold


@contextmanager
def publish_folder(path: Path) -> Iterator[Path]:
    """Yield an empty temporary folder that becomes `path` when the block ends without an error.

    If `path` exists by then (another process was first), the new folder replaces it where the
    system allows and is otherwise discarded: publish the same content from each process.

    Raises:
        OSError: as raised by the block or the rename; `path` is as it was, and folders made for it are gone.
    """
    with _made_parents(path), _temporary(path, os.mkdir) as place:
        yield place
        for file in place.rglob("*"):
            if file.is_file():
                _sync_file(file)
        _sync_folder(place)
        try:
            os.rename(place, path)
        except OSError:
            if not path.is_dir():
                raise
            shutil.rmtree(place)
        _sync_folder(path.parent)


@contextmanager
def _made_parents(path: Path) -> Iterator[None]:
    """The folders above `path` are there; those that were not go again where the block fails, if nothing is in them."""
    made = missing(path.parent)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        yield
    except BaseException:
        remove_empty(made)
        raise


def missing(folder: Path) -> tuple[Path, ...]:
    """What is not there of a folder and of those above it, innermost first."""
    return tuple(each for each in (folder, *folder.parents) if not each.exists())


def remove_empty(folders: Iterable[Path]) -> None:
    """Delete folders in this order, as far as nothing is in them."""
    with suppress(OSError):
        for folder in folders:
            folder.rmdir()


def read_file(path: Path) -> bytes:
    """A regular file's bytes.

    Raises:
        OSError: it cannot be read, or is a device or the like, which may have no end, or has more than a gigabyte.
    """
    status = os.stat(path)
    if not stat.S_ISREG(status.st_mode) and not stat.S_ISDIR(status.st_mode):
        raise OSError(errno.EINVAL, "is no regular file", str(path))
    if status.st_size > _LARGEST:
        raise OSError(errno.EFBIG, f"has {status.st_size:,} bytes, more than the {_LARGEST:,} allowed", str(path))
    return path.read_bytes()


def remove_folder(path: Path) -> None:
    """Delete a folder: it is gone at once, and what a crash leaves of it is a temporary.

    Raises:
        OSError: it cannot be renamed; it is as it was.
    """
    aside = _beside(path)
    os.rename(path, aside)
    shutil.rmtree(aside, ignore_errors=True)


def remove_stale(folder: Path, name: str = "") -> None:
    """Delete temporaries in `folder`, of all targets or of `name`, whose writers are gone; what is in use stays."""
    for leftover in folder.glob(f"{_PREFIX}{_escape(name[:_LONGEST])}*"):
        try:
            lock = _lock(leftover)
        except BlockingIOError:
            continue
        if lock is None:
            continue
        try:
            _remove(leftover)
        finally:
            os.close(lock)


def _beside(path: Path) -> Path:
    """A temporary's name, which nothing has."""
    return path.with_name(f"{_PREFIX}{path.name[:_LONGEST]}-{secrets.token_hex(8)}")


def _remove(place: Path) -> None:
    if place.is_dir():
        shutil.rmtree(place, ignore_errors=True)
    else:
        with suppress(OSError):
            place.unlink()


def _escape(name: str) -> str:
    return "".join(f"[{letter}]" if letter in "*?[" else letter for letter in name)


@contextmanager
def _temporary(path: Path, make: Callable[[Path], object]) -> Iterator[Path]:
    """A new file or folder beside `path`, made by `make` and locked while the block runs; removed where that fails."""
    remove_stale(path.parent, path.name)
    place = lock = None
    try:  # before it is made: a signal may raise at any instant
        while True:
            place = _beside(path)
            make(place)
            held, lock = _hold(place)
            if held:
                break
        yield place
    except BaseException as error:
        if place is not None:
            _remove(place)
            if isinstance(error, OSError) and isinstance(error.filename, str):  # a user knows the target alone
                error.filename = error.filename.replace(str(place), str(path))
        raise
    finally:
        if lock is not None:
            os.close(lock)


def _hold(place: Path) -> tuple[bool, int | None]:
    """Lock what was just made: whether it is still there, or another process took it for a leftover; and the lock."""
    try:
        lock = _lock(place)
    except BlockingIOError:
        return False, None
    if place.exists():
        return True, lock
    if lock is not None:
        os.close(lock)
    return False, None


def _lock(place: Path) -> int | None:
    """A descriptor that holds the lock on a file or folder; None where it is gone or there are no such locks.

    Raises:
        BlockingIOError: another one has it.
    """
    if fcntl is None:
        return None
    try:
        descriptor = os.open(place, os.O_RDONLY | os.O_NONBLOCK | os.O_NOFOLLOW)  # a FIFO would wait for its writer
    except OSError:
        return None
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        os.close(descriptor)
        if isinstance(error, BlockingIOError):
            raise
        return None
    return descriptor
