"""What hostile input may not do, and where it is tried: an audit hook, and children that may crash.

with nothing_happens():
    read_batch(blob, source="evil")
"""

import os
import resource
import signal
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

_HARMLESS = ("sys._getframe", "cpython._PySys", "object.__getattr__", "builtins.id")
_WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND
_ROOM = 1 << 30  # bytes that a child may take beside what it has: an input weighs a few thousand

_watching = False
_readable = ""  # what lies under it may be read
_allowed: tuple[str, ...] = ()
events: list[str] = []


def _hook(event: str, arguments: tuple[Any, ...]) -> None:
    # what the interpreter does for the tests' own tracing is no deed of the reader
    if not _watching or event.startswith((*_HARMLESS, *_allowed)):
        return
    if event == "open" and _readable and str(arguments[0]).startswith(_readable) and not arguments[2] & _WRITING:
        return
    events.append(f"{event} {arguments!r:.80}")


sys.addaudithook(_hook)


@contextmanager
def nothing_happens(*allowed: str, folder: Path | None = None) -> Iterator[None]:
    """No audit event at all: no import, open, exec, compile, socket, subprocess, unpickling.

    Args:
        allowed: beginnings of events that may be.
        folder: what lies in it may be read, and not written.
    """
    global _watching, _readable, _allowed
    events.clear()
    _readable, _allowed = "" if folder is None else f"{folder}{os.sep}", allowed
    _watching = True
    try:
        yield
    finally:
        _watching = False
    assert not events, "; ".join(events)


def in_a_child(count: int, check: Callable[[int], object], *, seconds: float = 1) -> list[bool]:
    """Call `check(0)` to `check(count - 1)` in one forked child, where a signal kills nothing but the child.

    Each may take `seconds` of its thread's time, in one of three attempts, and all together a bounded amount of memory.

    Returns:
        What they returned, as truths.

    Raises:
        AssertionError: one of them did not return; says which, and how it ended.
    """
    read, write = os.pipe()
    sys.stdout.flush()
    child = os.fork()
    if child == 0:
        status = 1
        try:
            os.close(read)
            size = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
            resource.setrlimit(resource.RLIMIT_AS, (size + _ROOM, resource.RLIM_INFINITY))
            for index in range(count):
                signal.setitimer(signal.ITIMER_REAL, 60)  # whatever hangs is ended by it
                for last in (False, False, True):  # a machine that is taken away for a second counts it as ours
                    started = time.thread_time()
                    found = check(index)
                    took = time.thread_time() - started
                    if took < seconds:
                        break
                    assert not last, f"it took {took} s"
                os.write(write, b"y" if found else b"n")
            status = 0
        except BaseException:
            os.write(write, b"!" + traceback.format_exc().encode("utf-8", "replace"))
        finally:
            os._exit(status)
    os.close(write)
    with open(read, "rb") as pipe:
        done, _, said = pipe.read().partition(b"!")
    status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    assert status == 0, f"input {len(done)}: exit status {status}\n{said.decode()}"
    assert len(done) == count
    return [letter == ord("y") for letter in done]
