"""Many runs, each in its own folder: one after another in this process, or some at a time.

At a time they have a process each, or on CUDA a thread and a stream each of this one.

A run that is done is not done again, one that was stopped goes on, and one that fails leaves the others be.

    members = [Member(f"seed {seed}", replace(config, seed=seed, out=folder / f"seed-{seed}")) for seed in seeds]
    outcomes = run_all(members, {}, parallel=2, reporter=reporter, lines=True, record=write, go_on="fastcifar ...")
    outcomes["seed 0"].figures.test_accuracy
"""

import contextlib
import dataclasses
import json
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from queue import Empty, SimpleQueue
from typing import Any, Literal, TypeAlias

import torch

from fastcifar import signals
from fastcifar.checkpoint import saved
from fastcifar.config import TrainConfig
from fastcifar.engine import check_options, find_data, fit
from fastcifar.errors import ConfigError, FastcifarError, StoppedError
from fastcifar.publish import read_file
from fastcifar.recipes import resolve
from fastcifar.reporter import Reporter
from fastcifar.runs import clear_unsaved
from fastcifar.runtime import find_device
from fastcifar.stream_worker import StreamWorker, stream_threads, suits
from fastcifar.worker import LineReporter, Lines, Worker

__all__ = ["Figures", "Member", "Outcome", "Record", "run_all"]

_GLANCE = 0.2  # seconds between two looks at whether a signal came


@dataclass(frozen=True)
class Member:
    """One of the runs: the name that lines about it begin with, and its options, `out` being its folder."""

    name: str
    config: TrainConfig

    @property
    def path(self) -> Path:
        """Its folder."""
        return self.config.out or Path()


@dataclass(frozen=True, kw_only=True)
class Figures:
    """What a finished run's metrics.jsonl says: accuracies are fractions, times seconds.

    `steps` are the optimiser's, `eval_accuracy` is the last epoch's, on the part that `evaluated` names; `tta` is the
    recipe's test-time augmentation, and `tta_accuracy` the test accuracy with it (None where it is "none").
    """

    steps: int
    evaluated: str
    eval_accuracy: float
    test_accuracy: float
    tta: str
    tta_accuracy: float | None
    train_seconds: float


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """How a run ended: its figures, or else what went wrong and the exit status that it alone would have had."""

    figures: Figures | None = None
    error: str | None = None
    exit_status: int = 0

    @property
    def state(self) -> Literal["done", "diverged", "failed"]:
        """In one word."""
        return "done" if self.figures else "diverged" if self.exit_status == 3 else "failed"

    def to_json(self) -> dict[str, Any]:
        """The state with the figures, or with the error."""
        return {"state": self.state} | (dataclasses.asdict(self.figures) if self.figures else {"error": self.error})


Record: TypeAlias = Callable[[Mapping[str, Outcome], str | None], None]
"""Called with all outcomes so far and the name of the newest (None at the start), to write them down."""


def run_all(
    members: Sequence[Member],
    diverged: Mapping[str, str],
    *,
    parallel: int,
    reporter: Reporter,
    lines: bool,
    record: Record,
    go_on: str,
) -> dict[str, Outcome]:
    """Run what is not done yet.

    Args:
        members: the runs, under different names.
        diverged: name -> error of runs known to diverge: they would again.
        parallel: runs at a time; more than one get a process each, and a share of the threads, or on CUDA a stream.
        reporter: hears all of each run, or of messages alone where `lines` is true or runs are side by side.
        lines: whether an epoch is no more than a line.
        record: keeps the outcomes.
        go_on: the command that goes on with what a signal stopped.

    Returns:
        Name -> outcome, in the order of `members`.

    Raises:
        FastcifarError: all failed, and not by diverging; or the first `parallel` that ended did, one of them new: the
            others would as well.
        StoppedError: a signal came; runs that had begun are saved.
    """
    found = {name: Outcome(error=error, exit_status=3) for name, error in diverged.items()}
    for member in members:
        if (figures := _read_figures(member.path)) is not None:
            found[member.name] = Outcome(figures=figures)
    left = [member for member in members if member.name not in found]
    new = {member.name for member in left if not member.path.exists()}  # what ends others may be of its folder alone
    together = min(parallel, len(members))
    record(found, None)
    try:
        _check(left)
        _open_data(left, reporter)
        runs = _side_by_side(left, together, reporter) if parallel > 1 else _in_turn(left, reporter, lines)
        with contextlib.closing(runs):
            for member, error in runs:
                if error is None:
                    found[member.name] = Outcome(figures=_read_figures(member.path))
                else:
                    found[member.name] = Outcome(error=str(error), exit_status=error.exit_status)
                    failed = [outcome.state == "failed" for outcome in found.values()]
                    often = len(failed) >= together and member.name in new
                    if all(failed) and (often or len(failed) == len(members)):
                        raise error
                record(found, member.name)
    except (StoppedError, KeyboardInterrupt) as stop:
        status = stop.exit_status if isinstance(stop, StoppedError) else 130
        kept = "are saved" if isinstance(stop, StoppedError) else "go on from their last epoch"
        done = f"{len(found)} of {len(members)} runs have ended, those begun {kept}"
        raise StoppedError(f"stopped: {done}; go on with: {go_on}", status) from None
    return {member.name: found[member.name] for member in members}


def _check(members: Sequence[Member]) -> None:
    """Refuse what none of them could be trained with, before data are fetched for it."""
    errors: list[ConfigError] = []
    if members:
        find_device(members[0].config.device)  # all have the same
    for member in members:
        try:
            check_options(member.config, resolve(member.config))
        except ConfigError as error:
            errors.append(error)
    if members and len(errors) == len(members):
        raise errors[0]


def _open_data(left: Sequence[Member], reporter: Reporter) -> None:
    """Fetch and convert the data once, where the reporter sees it; runs with a checkpoint know their store."""
    new = [member for member in left if not saved(member.path / "checkpoints")]
    if new:
        with signals.stop_at_once("before training began"):
            find_data(new[0].config, new[0].path, reporter)


def _in_turn(
    members: Iterable[Member], reporter: Reporter, lines: bool
) -> Generator[tuple[Member, FastcifarError | None], None, None]:
    for member in members:
        failure = None
        try:
            heard = _lines_of(member.name, reporter) if lines else reporter
            fit(_to_go_on(member.config), reporter=heard, complete=True)
        except StoppedError:
            raise
        except FastcifarError as error:
            failure = error
        yield member, failure


def _side_by_side(
    members: Iterable[Member], parallel: int, reporter: Reporter
) -> Generator[tuple[Member, FastcifarError | None], None, None]:
    left, running = deque(members), dict[str, tuple[Member, Worker | StreamWorker]]()
    queue: Lines = SimpleQueue()
    unfinished = 0
    with _starter(left, parallel, queue) as start, _ended(running), signals.catch_stop() as stop:
        while running or (left and stop.signum is None):
            if stop.signum is not None:
                for _, worker in running.values():
                    worker.stop()
            while left and len(running) < parallel and stop.signum is None:
                member = left.popleft()
                try:
                    running[member.name] = member, start(member.name, _to_go_on(member.config))
                except FastcifarError as error:
                    yield member, error
            try:
                name, message = queue.get(timeout=_GLANCE)
            except Empty:
                continue
            if "say" in message:
                _lines_of(name, reporter).message(message["say"])
                continue
            member, _ = running.pop(name)
            if message["stopped"] and stop.signum is not None:
                unfinished += 1
            else:
                yield member, _failure(message)
        if stop.signum is not None and (left or unfinished):
            raise StoppedError(stop.signum.name, 128 + stop.signum)


@contextlib.contextmanager
def _ended(running: Mapping[str, tuple[Member, Worker | StreamWorker]]) -> Iterator[None]:
    """For a block that starts runs: at its end they are told to stop, and waited for unless a second signal came."""
    try:
        yield
    except KeyboardInterrupt:  # a second signal
        for _, worker in running.values():
            worker.kill()
        raise
    finally:
        for _, worker in running.values():
            worker.stop()
        for _, worker in running.values():
            worker.wait()


@contextlib.contextmanager
def _starter(
    members: Sequence[Member], parallel: int, queue: Lines
) -> Iterator[Callable[[str, TrainConfig], Worker | StreamWorker]]:
    """Within the block starts a run beside others, all of them with the same device."""
    if members and suits(config := members[0].config):
        with stream_threads(config.device, parallel) as threads:
            yield partial(StreamWorker, threads=threads, queue=queue)
    else:
        yield partial(Worker, threads=max(1, torch.get_num_threads() // parallel), queue=queue)


def _failure(message: Mapping[str, Any]) -> FastcifarError | None:
    if message["error"] is None:
        return None
    error = FastcifarError(message["error"])
    error.exit_status = message["status"]
    return error


def _lines_of(name: str, reporter: Reporter) -> LineReporter:
    return LineReporter(lambda text: reporter.message(f"{name}: {text}"))


def _to_go_on(config: TrainConfig) -> TrainConfig:
    """The options to start a run with, or to go on with it if it was begun.

    Raises:
        OutputError: another process works on it.
    """
    clear_unsaved(config)  # what a crash before the first checkpoint left
    path = config.out or Path()
    return dataclasses.replace(config, out=None, resume=path) if saved(path / "checkpoints") else config


def _read_figures(path: Path) -> Figures | None:
    """The figures of the run in that folder; None if it isn't finished."""
    try:
        *_, epoch, test = [json.loads(line) for line in read_file(path / "metrics.jsonl").splitlines()]
        if (epoch["kind"], test["kind"]) != ("epoch", "test"):
            return None
        tta = test["tta_accuracy"]
        return Figures(
            steps=int(epoch["step"]),
            evaluated=str(epoch["evaluated"]),
            eval_accuracy=float(epoch["eval_accuracy"]),
            test_accuracy=float(test["accuracy"]),
            tta=str(test["tta"]),
            tta_accuracy=float(tta) if tta is not None else None,
            train_seconds=float(test["train_seconds"]),
        )
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return None
