"""What a run tells the world while it goes on: one protocol, and the implementations without a screen.

The engine calls a `Reporter` and never asks which. `fastcifar.console` has the one for people.
Only `JsonLinesReporter` touches anything: the file it was given.

    reporter = TeeReporter(ConsoleReporter(), JsonLinesReporter(run / "metrics.jsonl"))
    reporter.start(summary, history=())
    reporter.epoch_end(stats)
"""

import json
import logging
import math
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, BinaryIO, Literal, Protocol, TypeAlias

from fastcifar.errors import FastcifarError, OutputError
from fastcifar.metrics import EpochStats, TestStats
from fastcifar.publish import publish_bytes

__all__ = [
    "JsonLinesReporter",
    "NullReporter",
    "Progress",
    "Reporter",
    "RunResult",
    "RunSummary",
    "TeeReporter",
    "Unit",
]

_log = logging.getLogger(__name__)

Progress: TypeAlias = Callable[[int, int | None], None]  # (done, total or None if it isn't known)
Unit: TypeAlias = Literal["bytes", "images"]


@dataclass(frozen=True, kw_only=True)
class RunSummary:
    """What is known before the first step.

    `choices` are what the runtime decided and why, such as `("device", "cpu: 2 threads")`;
    `evaluated` names the part of the data the evaluation columns are from; there is an evaluation every `eval_every`
    epochs, and after the last.
    """

    title: str
    choices: tuple[tuple[str, str], ...]
    epochs: int
    steps_per_epoch: int
    evaluated: str
    notices: tuple[str, ...]
    eval_every: int = 1

    def is_evaluated(self, epoch: int) -> bool:
        """Whether epoch `epoch`, of which 1 is the first, ends in an evaluation; the last does."""
        return epoch % self.eval_every == 0 or epoch == self.epochs


@dataclass(frozen=True, kw_only=True)
class RunResult:
    """What is known after the last. Times are seconds; warm-up and compilation are in none but their own."""

    test: TestStats
    epochs: int
    train_seconds: float
    eval_seconds: float
    warmup_seconds: float
    images_per_second: float
    parameters: int
    files: tuple[tuple[str, str], ...]  # what -> the path it was written to


class Reporter(Protocol):
    """Hears what a run does. `start` is called once, `close` always, also after an error or Ctrl-C."""

    def start(self, summary: RunSummary, history: Sequence[EpochStats]) -> None:
        """Begin; `history` are the epochs a resumed run has done already."""

    def epoch_start(self, epoch: int) -> None:
        """Epoch `epoch` (1 is the first) begins."""

    def train_step(self, step: int, steps: int, images_per_second: float) -> None:
        """`step` of the epoch's `steps` are done. Called every step, so it must return at once."""

    def evaluate_start(self, part: str) -> None:
        """Evaluation on `part` ("validation", "test") begins."""

    def epoch_end(self, stats: EpochStats) -> None:
        """An epoch and its evaluation are done."""

    def finish(self, result: RunResult) -> None:
        """The run is done and everything is written."""

    def message(self, text: str) -> None:
        """Something a person should read."""

    def transfer(self, description: str, unit: Unit) -> AbstractContextManager[Progress]:
        """Show a download or conversion while the block runs; it yields `callback(done, total)`."""
        ...

    def close(self) -> None:
        """Let go of the terminal or file. May be called more than once."""


class NullReporter:
    """Says nothing: for libraries, tests and every rank but the first."""

    def start(self, summary: RunSummary, history: Sequence[EpochStats]) -> None:
        """Nothing."""

    def epoch_start(self, epoch: int) -> None:
        """Nothing."""

    def train_step(self, step: int, steps: int, images_per_second: float) -> None:
        """Nothing."""

    def evaluate_start(self, part: str) -> None:
        """Nothing."""

    def epoch_end(self, stats: EpochStats) -> None:
        """Nothing."""

    def finish(self, result: RunResult) -> None:
        """Nothing."""

    def message(self, text: str) -> None:
        """Nothing."""

    @contextmanager
    def transfer(self, description: str, unit: Unit) -> Iterator[Progress]:
        """Yield a callback that does nothing."""
        yield lambda done, total: None

    def close(self) -> None:
        """Nothing."""


class JsonLinesReporter(NullReporter):
    """One JSON object a line: first kind "run", then an "epoch" each, then "test".

    An "epoch" line has the fields of `EpochStats`, "test" those of `TestStats` and `RunResult`. A number that isn't
    finite, or isn't there, is `null`. Each line reaches the operating system before the call returns.

    `start` writes the file anew from the history it is given, so after a resume nothing is there
    twice, and no epoch that the checkpoint didn't know.

    Args:
        path: the file; missing folders above it are made.

    Raises:
        OutputError: by any call, when the file cannot be written.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._handle: BinaryIO | None = None

    def start(self, summary: RunSummary, history: Sequence[EpochStats]) -> None:
        """Write "run" and the history, atomically, in place of any older file."""
        self.close()
        lines = [_line("run", asdict(summary)), *(_line("epoch", asdict(stats)) for stats in history)]
        with self._writing():
            self._path.parent.mkdir(parents=True, exist_ok=True)
            publish_bytes(self._path, b"".join(lines))
            self._handle = open(self._path, "ab")  # noqa: SIM115 - closed by close()

    def epoch_end(self, stats: EpochStats) -> None:
        """Append an "epoch" line."""
        self._append(_line("epoch", asdict(stats)))

    def finish(self, result: RunResult) -> None:
        """Append the "test" line, and close: some systems say only then that what was written is lost."""
        fields = asdict(result)
        self._append(_line("test", fields.pop("test") | fields | {"files": dict(result.files)}))
        with self._writing():
            self.close()

    def close(self) -> None:
        """Close the file."""
        handle, self._handle = self._handle, None
        if handle is not None:
            handle.close()

    def _append(self, line: bytes) -> None:
        if self._handle is None:
            raise RuntimeError(f"JsonLinesReporter({self._path}) was not started")
        with self._writing():
            self._handle.write(line)
            self._handle.flush()

    @contextmanager
    def _writing(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise OutputError(f"{self._path} cannot be written: {error.strerror or error}") from None


def _line(kind: str, fields: dict[str, Any]) -> bytes:
    # ASCII escapes, so that a path with undecodable bytes can be written too
    return json.dumps({"kind": kind} | _finite(fields), allow_nan=False).encode() + b"\n"


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


class TeeReporter:
    """Passes every call on to each of several reporters; none can stop the run, but by an error of fastcifar's own.

    One that raises (its pipe is closed, its disk full, a character has no code) is closed, named
    in one logged warning, and left out from then on. `KeyboardInterrupt` and `SystemExit` pass:
    they are meant for the run.
    """

    def __init__(self, *reporters: Reporter) -> None:
        self._reporters = list(reporters)

    def start(self, summary: RunSummary, history: Sequence[EpochStats]) -> None:
        """Pass on."""
        self._each(lambda reporter: reporter.start(summary, history))

    def epoch_start(self, epoch: int) -> None:
        """Pass on."""
        self._each(lambda reporter: reporter.epoch_start(epoch))

    def train_step(self, step: int, steps: int, images_per_second: float) -> None:
        """Pass on."""
        self._each(lambda reporter: reporter.train_step(step, steps, images_per_second))

    def evaluate_start(self, part: str) -> None:
        """Pass on."""
        self._each(lambda reporter: reporter.evaluate_start(part))

    def epoch_end(self, stats: EpochStats) -> None:
        """Pass on."""
        self._each(lambda reporter: reporter.epoch_end(stats))

    def finish(self, result: RunResult) -> None:
        """Pass on."""
        self._each(lambda reporter: reporter.finish(result))

    def message(self, text: str) -> None:
        """Pass on."""
        self._each(lambda reporter: reporter.message(text))

    @contextmanager
    def transfer(self, description: str, unit: Unit) -> Iterator[Progress]:
        """Enter each one's transfer; the callback calls those that are still there."""
        contexts: dict[Reporter, AbstractContextManager[Progress]] = {}
        callbacks: dict[Reporter, Progress] = {}

        def enter(reporter: Reporter) -> None:
            context = reporter.transfer(description, unit)
            callbacks[reporter] = context.__enter__()
            contexts[reporter] = context

        def leave(reporter: Reporter) -> None:
            if reporter in contexts:
                contexts[reporter].__exit__(*sys.exc_info())

        def progress(done: int, total: int | None) -> None:
            self._each(lambda reporter: callbacks[reporter](done, total))

        self._each(enter)
        try:
            yield progress
        finally:
            self._each(leave)

    def close(self) -> None:
        """Pass on."""
        self._each(lambda reporter: reporter.close())

    def _each(self, call: Callable[[Reporter], object]) -> None:
        for reporter in tuple(self._reporters):
            try:
                call(reporter)
            except FastcifarError:  # the run's own record cannot be written: that does stop it
                raise
            except Exception as error:
                self._drop(reporter, error)

    def _drop(self, reporter: Reporter, error: Exception) -> None:
        self._reporters.remove(reporter)
        with suppress(Exception):  # it has failed already; this only gives back what it can
            reporter.close()
        _log.warning(
            "%s stopped reporting, all else goes on: %s: %s", type(reporter).__name__, type(error).__name__, error
        )
