"""A command in a fork: what `python -m fastcifar ...` does, without the seconds of imports, and with one thread.

command = Forked("train", "--dataset", "data", "--out", "run")
os.kill(command.pid, signal.SIGTERM)
assert command.wait() == 143
assert command.stderr.count("\n") == 1
"""

import contextlib
import os
import pty
import signal
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from pathlib import Path

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
        self._folder = Path(tempfile.mkdtemp(prefix="fastcifar-forked-"))
        self.started = time.monotonic()
        before = signal.pthread_sigmask(signal.SIG_BLOCK, _STOPS)
        self.pid, self.terminal = pty.fork() if on_terminal else (os.fork(), -1)
        if self.pid == 0:
            try:
                for number in _STOPS:  # until the command listens they end it, and raise nothing here
                    signal.signal(number, signal.SIG_DFL)
                signal.pthread_sigmask(signal.SIG_SETMASK, before)
                if not on_terminal:
                    _redirect(self._folder / "out", 1)
                    _redirect(self._folder / "err", 2)
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
        return (self._folder / "out").read_text()

    @property
    def stderr(self) -> str:
        """What it has complained of."""
        return (self._folder / "err").read_text()


def _redirect(path: Path, descriptor: int) -> None:
    opened = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(opened, descriptor)
    os.close(opened)


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
