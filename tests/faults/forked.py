"""A command in a fork: what `python -m fastcifar ...` does, without the seconds of imports, and with one thread.

command = Forked("train", "--dataset", "data", "--out", "run")
os.kill(command.pid, signal.SIGTERM)
assert command.wait() == 143
assert command.stderr.count("\n") == 1
"""

import contextlib
import fcntl
import os
import pty
import signal
import sys
import tempfile
import threading
import time
import traceback
import weakref
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager

import torch

from fastcifar.commands import entry

__all__ = ["Forked", "end_of_process"]

_STOPS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


class Forked:
    """A command that runs.

    Args:
        arguments: the command's name and its options.
        within: made and entered by the child, around the command; it may change what it likes.
        on_terminal: whether it has a terminal of its own, whose other end is `terminal`, and not two files.
    """

    def __init__(
        self,
        *arguments: str,
        within: Callable[[], AbstractContextManager[object]] = contextlib.nullcontext,
        on_terminal: bool = False,
    ) -> None:
        self._out, self._err = (_Output() for _ in range(2))
        self.started = time.monotonic()
        before = signal.pthread_sigmask(signal.SIG_BLOCK, _STOPS)
        self.pid, self.terminal = pty.fork() if on_terminal else (os.fork(), -1)
        if self.pid == 0:
            try:
                for number in _STOPS:  # until the command listens they end it, and raise nothing here
                    signal.signal(number, signal.SIG_DFL)
                signal.pthread_sigmask(signal.SIG_SETMASK, before)
                if not on_terminal:
                    self._out.take(1)
                    self._err.take(2)
                sys.stdout, sys.stderr = os.fdopen(1, "w"), os.fdopen(2, "w", buffering=1)
                sys.unraisablehook, threading.excepthook = sys.__unraisablehook__, threading.__excepthook__
                sys.argv[1:] = arguments
                torch.set_num_threads(1)
                with within():
                    entry()
            except SystemExit as end:
                with contextlib.suppress(OSError):
                    sys.stdout.flush()
                os._exit(int(end.code or 0))
            except BaseException:
                os.write(2, traceback.format_exc().encode())
            finally:
                os._exit(99)
        signal.pthread_sigmask(signal.SIG_SETMASK, before)

    def wait(self, seconds: float = 60.0) -> int:
        """Its exit status; one that takes longer fails the test."""
        return end_of_process(self.pid, seconds)

    @property
    def stdout(self) -> str:
        """What it has said."""
        return self._out.read()

    @property
    def stderr(self) -> str:
        """What it has complained of."""
        return self._err.read()


class _Output:
    """A file without a name, which goes with whoever holds it: thousands of commands leave nothing behind."""

    def __init__(self) -> None:
        self._descriptor, path = tempfile.mkstemp(prefix="fastcifar-forked-")
        os.unlink(path)
        weakref.finalize(self, os.close, self._descriptor)
        fcntl.fcntl(self._descriptor, fcntl.F_SETFL, os.O_APPEND)

    def take(self, descriptor: int) -> None:
        """Be what that descriptor of this process writes to."""
        os.dup2(self._descriptor, descriptor)

    def read(self) -> str:
        """All that was written."""
        return os.pread(self._descriptor, os.fstat(self._descriptor).st_size, 0).decode()


def end_of_process(pid: int, seconds: float) -> int:
    """Wait for a child of this process; its exit status, or less than 0 if a signal ended it."""
    for _ in _until(seconds):
        ended, code = os.waitpid(pid, os.WNOHANG)
        if ended:
            return os.waitstatus_to_exitcode(code)
    os.kill(pid, 9)
    os.waitpid(pid, 0)
    raise AssertionError(f"process {pid} had not ended after {seconds:g} s")


def _until(seconds: float) -> Iterator[None]:
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        yield
        time.sleep(0.002)
