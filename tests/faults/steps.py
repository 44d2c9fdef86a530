"""The steps in which a block changes files: something of the test's own happens before each of them.

A step is to make a folder or file, to write the first half of some bytes or the second, to flush, to close
what was written (some systems first say there that it was lost), to rename or remove.

    with steps(folder, lambda kind, path: seen.append(kind)):
        publish_bytes(folder / "a", b"new")
"""

import builtins
import contextlib
import io
import os
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Literal, TypeAlias
from unittest import mock

__all__ = ["Before", "Failing", "Kind", "kill_at", "steps"]

Kind: TypeAlias = Literal["open", "mkdir", "write", "fsync", "close", "rename", "remove"]
Before: TypeAlias = Callable[[Kind, Path], None]


@contextlib.contextmanager
def steps(folder: Path, before: Before) -> Iterator[None]:
    """Call `before` ahead of each step on something in `folder`; it may raise, or end the process."""
    folder = folder.resolve()

    def step(kind: Kind, path: Any, dir_fd: int | None = None) -> None:
        place = os.readlink(f"/proc/self/fd/{dir_fd}") if dir_fd is not None else os.getcwd()
        full = Path(place, path)
        if full.is_relative_to(folder):
            before(kind, full)

    class File(io.FileIO):
        half = False  # whether one was just written

        def write(self, content: Any) -> int:
            step("write", self.name)
            self.half = not self.half
            whole = memoryview(content).cast("B")
            return super().write(whole[: -(-len(whole) // 2)] if self.half else whole)

        def close(self) -> None:
            try:
                if not self.closed:
                    step("close", self.name)
            finally:  # a file is closed also where that failed
                super().close()

    def opened(file: Any, mode: str = "r", buffering: int = -1, *rest: Any, **options: Any) -> Any:
        if isinstance(file, int) or not set(mode) & set("wax+"):
            return real_open(file, mode, buffering, *rest, **options)
        step("open", file)
        raw = File(file, mode.replace("b", "").replace("t", ""))
        buffered = io.BufferedRandom(raw) if "+" in mode else io.BufferedWriter(raw)
        return buffered if "b" in mode else io.TextIOWrapper(buffered, *rest, **options)

    def os_open(path: Any, flags: int, *rest: Any, **options: Any) -> int:
        if flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT):
            step("open", path, options.get("dir_fd"))
        return real["open"](path, flags, *rest, **options)

    def mkdir(path: Any, *rest: Any, **options: Any) -> None:
        if not os.path.lexists(path):  # else it only says that there is one
            step("mkdir", path)
        real["mkdir"](path, *rest, **options)

    def fsync(descriptor: int) -> None:
        step("fsync", os.readlink(f"/proc/self/fd/{descriptor}"))
        real["fsync"](descriptor)

    def changed(kind: Kind, name: str) -> Callable[..., None]:
        def change(path: Any, *rest: Any, **options: Any) -> None:
            step(kind, path, options.get("dir_fd"))
            real[name](path, *rest, **options)

        return change

    real_open = builtins.open
    patched: dict[str, Callable[..., Any]] = {"open": os_open, "mkdir": mkdir, "fsync": fsync}
    patched |= {name: changed("rename", name) for name in ("rename", "replace")}
    patched |= {name: changed("remove", name) for name in ("unlink", "remove", "rmdir")}
    real: dict[str, Callable[..., Any]] = {name: getattr(os, name) for name in patched}
    with contextlib.ExitStack() as stack:
        for name, function in patched.items():
            stack.enter_context(mock.patch.object(os, name, function))
        stack.enter_context(mock.patch.object(builtins, "open", opened))
        stack.enter_context(mock.patch.object(io, "open", opened))
        yield


def kill_at(number: int) -> Before:
    """End the process with SIGKILL before step `number` (1 is the first)."""
    left = number

    def before(kind: Kind, path: Path) -> None:
        nonlocal left
        left -= 1
        if left == 0:
            os.kill(os.getpid(), signal.SIGKILL)

    return before


class Failing:
    """Fails step `number` (1 is the first), and where it is `lasting` all after it, as the system would.

    Attributes:
        failed: kinds of the steps that failed.
        seen: how many steps there were that can.
        code: the errno.

    Args:
        number: of the step.
        code: of `OSError`.
        lasting: whether it goes on; a disk that became read-only lets nothing be removed either.
        kinds: that can fail.
    """

    def __init__(self, number: int, code: int, *, lasting: bool, kinds: tuple[Kind, ...]) -> None:
        self.code = code
        self._number, self._lasting, self._kinds = number, lasting, kinds
        self.failed: list[Kind] = []
        self.seen = 0

    def __call__(self, kind: Kind, path: Path) -> None:
        if kind not in self._kinds:
            return
        self.seen += 1
        if self.seen == self._number or (self._lasting and self.seen > self._number):
            self.failed.append(kind)
            named = () if kind in ("write", "fsync", "close") else (str(path),)
            raise OSError(self.code, os.strerror(self.code), *named)
