"""Worker processes seen from the race: started, asked, and stopped dead while others run.

Example:
    with Remote(python, "plain", task, {"convert": "numpy"}) as remote:
        remote.ask("open")
        remote.freeze()
        remote.ask("run", seconds=1.0)           # goes on first
"""

import contextlib
import dataclasses
import json
import os
import selectors
import signal
import subprocess
import tempfile
import time
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from benchmarks.contestants.common import Task
from benchmarks.processes import session, ticks

__all__ = ["Remote", "WorkerError"]

_ROOT = Path(__file__).parent.parent
_LOOKS = 3
"""Looks, `_INTERVAL` apart, without processor time used, for a process to count as quiet."""
_INTERVAL = 0.05


class WorkerError(Exception):
    """A worker failed, ended or did not answer; the message is the reason, in one line."""


class Remote:
    """A worker process, leader of a session of its own, so that its workers are found and ended with it.

    Args:
        python: the interpreter.
        file, task, setting: see `worker`.
        patience: seconds in which it must answer.
    """

    def __init__(self, python: Path, file: str, task: Task, setting: dict[str, Any], *, patience: float = 300) -> None:
        self._patience = patience
        self._frozen = False
        self._log = tempfile.TemporaryFile("w+", encoding="utf-8", errors="replace")  # noqa: SIM115
        described = dataclasses.asdict(task) | {"store": str(task.store), "scratch": str(task.scratch)}
        command = [str(python), "-m", "benchmarks.worker", file, json.dumps(described), json.dumps(setting)]
        pipe = subprocess.PIPE
        self._process = subprocess.Popen(
            command, cwd=_ROOT, stdin=pipe, stdout=pipe, stderr=self._log, start_new_session=True
        )

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.end()

    def ask(self, what: str, **arguments: Any) -> dict[str, Any]:
        """The answer to a request.

        Raises:
            WorkerError: there is none, or it says that something failed.
        """
        self.thaw()
        pipe, out = self._process.stdin, self._process.stdout
        assert pipe is not None
        assert out is not None
        try:
            pipe.write((json.dumps({"do": what, **arguments}) + "\n").encode())
            pipe.flush()
        except OSError:
            pass  # it has ended: what it said is still there to be read
        with selectors.DefaultSelector() as selector:
            selector.register(out, selectors.EVENT_READ)
            if not selector.select(self._patience):
                raise WorkerError(f"no answer to {what!r} in {self._patience:g} s")
        line = out.readline()
        if not line:
            raise WorkerError(self._last_words())
        answer: dict[str, Any] = json.loads(line)
        if "error" in answer:
            raise WorkerError(answer["error"])
        return answer

    def freeze(self) -> bool:
        """Let its processes finish what they have begun, then stop them. Returns whether they came to rest."""
        quiet = self._come_to_rest()
        self._signal(signal.SIGSTOP)
        self._frozen = True
        return quiet

    def thaw(self) -> None:
        """Let its processes go on."""
        if self._frozen:
            self._signal(signal.SIGCONT)
            self._frozen = False

    def end(self) -> None:
        """End its processes."""
        self._signal(signal.SIGKILL)
        self._process.wait()
        for pipe in (self._process.stdin, self._process.stdout):
            assert pipe is not None
            with contextlib.suppress(OSError):
                pipe.close()
        self._log.close()

    def _come_to_rest(self, limit: float = 10) -> bool:
        deadline, before, quiet = time.monotonic() + limit, -1, 0
        while time.monotonic() < deadline:
            used = ticks(self._process.pid)
            quiet = quiet + 1 if used == before else 0
            if quiet == _LOOKS:
                return True
            before = used
            time.sleep(_INTERVAL)
        return False

    def _signal(self, number: signal.Signals) -> None:
        for pid in session(self._process.pid):
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, number)

    def _last_words(self) -> str:
        status = self._process.wait()
        self._log.seek(0)
        lines = [line.strip() for line in self._log if line.strip()]
        return f"ended with status {status}" + (f": {lines[-1]}" if lines else "")
