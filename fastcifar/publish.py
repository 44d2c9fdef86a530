"""Atomic publishing: a file or folder is there whole, or not at all.

Everything is written under a unique temporary name beside its target, flushed to disk, renamed,
and the folder that holds it is flushed too. A crash at any instant leaves the old state or the
new one, and at worst a temporary whose name starts with `.tmp-`.

    with publish_folder(Path("runs/a/checkpoints/100")) as folder:
        (folder / "manifest.json").write_text("{}")
"""

import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

__all__ = ["publish_bytes", "publish_folder", "publish_json", "remove_stale"]

_PREFIX = ".tmp-"


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
    descriptor, name = tempfile.mkstemp(prefix=f"{_PREFIX}{path.name}-", dir=path.parent)
    temporary = Path(name)
    try:
        with os.fdopen(descriptor, "wb") as handle:
            handle.write(content)
            handle.flush()
            os.fsync(handle.fileno())
        os.chmod(temporary, 0o666 & ~_umask())
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    _sync_folder(path.parent)


def publish_json(path: Path, value: Any) -> None:
    """Write `value` to `path` as indented JSON, atomically."""
    publish_bytes(path, (json.dumps(value, indent=2, ensure_ascii=False) + "\n").encode())


@contextmanager
def publish_folder(path: Path) -> Iterator[Path]:
    """Yield an empty temporary folder that becomes `path` when the block ends without an error.

    If `path` exists by then (another process was first), the new folder replaces it where the
    system allows and is otherwise discarded: publish the same content from each process.

    Raises:
        OSError: as raised by the block or the rename; `path` is as it was.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(prefix=f"{_PREFIX}{path.name}-", dir=path.parent))
    try:
        os.chmod(temporary, 0o777 & ~_umask())
        yield temporary
        for file in temporary.rglob("*"):
            if file.is_file():
                _sync_file(file)
        _sync_folder(temporary)
        try:
            os.rename(temporary, path)
        except OSError:
            if not path.is_dir():
                raise
            shutil.rmtree(temporary)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    _sync_folder(path.parent)


def remove_stale(folder: Path, name: str = "") -> None:
    """Delete temporaries that a crash left in `folder`, of all targets or of `name`. No one else may write them."""
    for leftover in folder.glob(f"{_PREFIX}{name}*"):
        if leftover.is_dir():
            shutil.rmtree(leftover, ignore_errors=True)
        else:
            leftover.unlink(missing_ok=True)


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
