"""Runs of several ranks: one is killed, or signalled, at any step; none waits for ever, and the run goes on exactly."""

import contextlib
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch

from fastcifar import checkpoint
from fastcifar.engine import fit
from fastcifar.trainer import Trainer
from tests.effort import effort
from tests.faults import tiny_runs
from tests.faults.forked import Forked
from tests.ranked import environment, meeting_place

pytestmark = pytest.mark.skipif(not os.path.isdir("/proc/self/fd"), reason="needs fork and /proc")

STEPS = 6  # two epochs of three
AtStep = Callable[[int, int], None]
"""Called with the rank and the number of the step that is to come, from 1."""


def start(*options: str, port: int, size: int = 2, at_step: AtStep | None = None, **variables: str) -> list[Forked]:
    """`fastcifar train` on `size` ranks, of the tiny net."""
    real = Trainer.step_no_sync

    def within(rank: int) -> contextlib.AbstractContextManager[object]:
        def step(trainer: Trainer, images: torch.Tensor, labels: torch.Tensor) -> None:
            if at_step is not None:
                at_step(rank, trainer.step + 1)
            real(trainer, images, labels)

        stack = contextlib.ExitStack()
        stack.enter_context(mock.patch.dict(os.environ, environment(rank=rank, size=size, port=port, **variables)))
        stack.enter_context(mock.patch.object(Trainer, "step_no_sync", step))
        return stack

    given = {"arch": "tiny", "recipe": "fast", "split": "report", "epochs": "2", "batch-size": "16"}
    given |= {"dataset": "data", "device": "cpu"}
    arguments = (
        [text for name, value in given.items() for text in (f"--{name}", value)] if "--resume" not in options else []
    )
    return [Forked("train", *arguments, *options, within=lambda rank=rank: within(rank)) for rank in range(size)]


def begin(*options: str, **rest: Any) -> list[Forked]:
    """`start` with a meeting place of its own."""
    return start(*options, port=meeting_place(), **rest)


def ends(ranks: list[Forked]) -> list[int]:
    return [rank.wait() for rank in ranks]


def ends_as_torchrun_does(ranks: list[Forked]) -> list[int]:
    """When one has failed the others are asked to stop, and after 30 s killed."""
    status: dict[int, int] = {}
    asked, kill = False, time.monotonic() + 90
    while len(status) < len(ranks):
        for number, rank in enumerate(ranks):
            if number in status:
                continue
            ended, code = os.waitpid(rank.pid, os.WNOHANG)
            if ended:
                status[number] = os.waitstatus_to_exitcode(code)
            elif time.monotonic() > kill:
                os.kill(rank.pid, signal.SIGKILL)
        if any(status.values()) and not asked:
            asked, kill = True, time.monotonic() + 30
            for number, rank in enumerate(ranks):
                if number not in status:
                    os.kill(rank.pid, signal.SIGTERM)
        time.sleep(0.002)
    return [status[number] for number in range(len(ranks))]


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    folder = tmp_path_factory.mktemp("ranks")
    with pytest.MonkeyPatch.context() as patch:
        tiny_runs.prepare(patch, folder)
        with tiny_runs.one_thread():  # imports and compiles here, so that no child has to
            fit(tiny_runs.config("alone"))
        for size in (1, 2, 3):
            assert ends(begin("--out", f"undisturbed-{size}", size=size)) == [0] * size
        yield folder


def test_one_process_under_torchrun_is_as_without(prepared: Path) -> None:
    assert tiny_runs.equal(undisturbed(1), tiny_runs.weights(Path("alone")))


def undisturbed(size: int) -> dict[str, torch.Tensor]:
    return tiny_runs.weights(Path(f"undisturbed-{size}"))


def test_the_first_rank_writes_what_one_alone_would(prepared: Path) -> None:
    names = [sorted(path.name for path in Path(run).rglob("*")) for run in ("alone", "undisturbed-2", "undisturbed-3")]
    assert names[0] == names[1] == names[2]
    ranks = begin("--out", "again")
    assert ends(ranks) == [0, 0]
    assert [rank.stderr for rank in ranks] == ["", ""]
    assert "ranks: 2, each with a part of every batch, joined by gloo" in ranks[0].stdout
    assert ranks[1].stdout == ""
    assert tiny_runs.equal(tiny_runs.weights(Path("again")), undisturbed(2))


@pytest.mark.parametrize("size", [2, 3])
def test_the_run_is_that_of_one_process_but_for_rounding(prepared: Path, size: int) -> None:
    alone, joined = tiny_runs.lines(Path("alone")), tiny_runs.lines(Path(f"undisturbed-{size}"))
    assert [line["kind"] for line in joined] == [line["kind"] for line in alone] == ["run", "epoch", "epoch", "test"]
    for ours, theirs in zip(joined[1:], alone[1:], strict=True):
        assert ours["samples"] == theirs["samples"]
    assert joined[1]["train_loss"] == pytest.approx(alone[1]["train_loss"], rel=1e-3)
    assert joined[2]["train_loss"] == pytest.approx(alone[2]["train_loss"], rel=0.05)


def kill(victim: int, step: int) -> AtStep:
    def at_step(rank: int, coming: int) -> None:
        if (rank, coming) == (victim, step):
            os.kill(os.getpid(), signal.SIGKILL)

    return at_step


CASES = [(size, victim, step) for size in (1, 2, 3) for victim in range(size) for step in range(1, STEPS + 1)]


@pytest.mark.parametrize(("size", "victim", "step"), random.Random(0).sample(CASES, min(effort(6), len(CASES))))
def test_a_rank_is_killed_and_all_start_again(prepared: Path, size: int, victim: int, step: int) -> None:
    out = f"killed-{size}-{victim}-{step}"
    port = meeting_place()  # of both starts, as with torchrun
    ranks = start("--out", out, size=size, port=port, at_step=kill(victim, step), TORCHELASTIC_MAX_RESTARTS="1")
    assert ends(ranks) == [-signal.SIGKILL if rank == victim else 4 for rank in range(size)]
    for number, rank in enumerate(ranks):
        if number != victim:
            assert rank.stderr.startswith("fastcifar: another rank has ended, whose own message says why ("), (
                rank.stderr
            )
            assert rank.stderr.count("\n") == 1
    saved = bool(checkpoint.saved(Path(out) / "checkpoints"))  # it may have been killed while that was written
    restarted = {"TORCHELASTIC_MAX_RESTARTS": "1", "TORCHELASTIC_RESTART_COUNT": "1"}
    again = start("--out", out, size=size, port=port, **restarted)
    assert ends(again) == [0] * size, [rank.stderr for rank in again]
    assert ("resumed after step 3 of 6" in again[0].stdout) == saved
    assert tiny_runs.equal(tiny_runs.weights(Path(out)), undisturbed(size))
    assert not list(Path(out).rglob(".tmp-*"))


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
@pytest.mark.parametrize("victim", [0, 1])
def test_one_rank_is_signalled_and_all_stop(prepared: Path, number: signal.Signals, victim: int) -> None:
    for step in random.Random(victim + number).sample(range(1, STEPS + 1), min(effort(1), STEPS)):
        out = f"signalled-{number.name}-{victim}-{step}"

        def at_step(rank: int, coming: int, step: int = step) -> None:
            if (rank, coming) == (victim, step):
                os.kill(os.getpid(), number)

        ranks = begin("--out", out, at_step=at_step)
        assert ends(ranks) == [128 + number] * 2, [rank.stderr for rank in ranks]
        said = f"fastcifar: stopped by {number.name} after step {step} of 6, saved; "
        assert all(rank.stderr.startswith(said) for rank in ranks), [rank.stderr for rank in ranks]
        assert checkpoint.load_newest(Path(out) / "checkpoints").step == step
        assert ends(begin("--resume", out)) == [0, 0]
        assert tiny_runs.equal(tiny_runs.weights(Path(out)), undisturbed(2))


@pytest.fixture(scope="module")
def seconds(prepared: Path) -> float:
    began = time.monotonic()
    assert ends(begin("--out", "timed")) == [0, 0]
    return time.monotonic() - began


@pytest.mark.parametrize("moment", range(effort(2)))
def test_a_rank_is_signalled_at_any_moment(prepared: Path, seconds: float, moment: int) -> None:
    draw, out = random.Random(moment), f"moment-{moment}"
    victim, number = draw.randrange(2), draw.choice([signal.SIGTERM, signal.SIGINT])
    ranks = begin("--out", out)
    time.sleep(seconds * draw.random())
    with contextlib.suppress(ProcessLookupError):
        os.kill(ranks[victim].pid, number)
    status = ends_as_torchrun_does(ranks)
    # 130: the first was done with saving when it was asked again, as the other had ended
    expected = {0, 2, 4, 128 + number, 143, 130}
    assert set(status) <= expected, (status, [rank.stderr for rank in ranks])
    for rank, code in zip(ranks, status, strict=True):  # torch's own store may say something too
        ours = [line for line in rank.stderr.splitlines() if line.startswith("fastcifar: ")]
        assert len(ours) == (code != 0), ours
        assert code != 2 or "the 2 ranks cannot find each other" in rank.stderr
    if status != [0, 0]:
        saved = checkpoint.saved(Path(out) / "checkpoints")
        assert saved or not Path(out).exists()
        assert ends(begin(*(["--resume", out] if saved else ["--out", out]))) == [0, 0]
    assert tiny_runs.equal(tiny_runs.weights(Path(out)), undisturbed(2))


def test_one_rank_diverges_and_all_say_where(prepared: Path) -> None:
    def at_step(rank: int, coming: int) -> None:
        if (rank, coming) == (1, 5):
            patch = mock.patch.object(
                torch.nn.functional, "cross_entropy", lambda logits, *_, **__: logits.sum() * torch.nan
            )
            patch.start()

    ranks = begin("--out", "diverged", at_step=at_step)
    assert ends(ranks) == [3, 3]
    assert all("the training loss became nan at step 5 of 6" in rank.stderr for rank in ranks)
    assert checkpoint.load_newest(Path("diverged/checkpoints")).step == 3


def test_a_run_goes_on_with_another_number_of_ranks(prepared: Path) -> None:
    def at_step(rank: int, coming: int) -> None:
        if coming == 5:
            os.kill(os.getpid(), signal.SIGTERM)

    assert ends(begin("--out", "fewer", size=3, at_step=at_step)) == [143] * 3
    alone = Forked("train", "--resume", "fewer")
    assert alone.wait() == 0, alone.stderr
    assert "ranks 3 became 1: the run goes on, but not bit for bit" in alone.stdout
    through, other = tiny_runs.lines(Path("undisturbed-3")), tiny_runs.lines(Path("fewer"))
    assert [line.get("step") for line in other] == [line.get("step") for line in through]
    assert [line.get("samples") for line in other] == [line.get("samples") for line in through]
    assert other[1]["train_loss"] == through[1]["train_loss"]  # the epoch before the stop
    assert other[2]["train_loss"] == pytest.approx(through[2]["train_loss"], rel=0.01)
    assert tiny_runs.weights(Path("fewer")).keys() == undisturbed(3).keys()


def test_what_cannot_be_is_said(prepared: Path) -> None:
    for options, variables, status, words in (
        (("--out", "alone"), {}, [2, 4], "out 'alone' is not empty"),
        ((), {"TORCHELASTIC_MAX_RESTARTS": "3"}, [2, 2], "out must be given where torchrun may restart the ranks"),
        (("--out", "small", "--batch-size", "2"), {}, [0, 0], ""),
        (("--out", "smaller", "--seeds", "0,1"), {}, [2, 2], "several runs cannot be trained by 2 ranks"),
    ):
        ranks = begin(*options, **variables)
        assert ends(ranks) == status, [rank.stderr for rank in ranks]
        assert words in ranks[0].stderr
    too_many = begin("--out", "smaller", "--batch-size", "2", size=3)
    assert ends(too_many) == [2] * 3
    assert "batch_size 2 is less than an image for each of 3 ranks" in too_many[0].stderr
    assert not Path("smaller").exists()


@pytest.mark.skipif(effort(1) == 1, reason="takes a minute: make test-long")
def test_torchrun_itself_restarts_a_run(tmp_path: Path) -> None:
    run = tmp_path / "run"
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", "--max-restarts=1"]
    train = ["-m", "fastcifar.train", "--arch=fast", "--dataset=digits", "--epochs=4", "--device=cpu", f"--out={run}"]
    running = subprocess.Popen([*torchrun, *train], stdout=subprocess.PIPE, text=True)
    children = Path(f"/proc/{running.pid}/task/{running.pid}/children")
    try:
        while not checkpoint.saved(run / "checkpoints"):
            time.sleep(0.05)
            assert running.poll() is None
        os.kill(int(children.read_text().split()[1]), signal.SIGKILL)
        said, _ = running.communicate(timeout=300)
    finally:
        if running.poll() is None:
            for child in children.read_text().split():
                os.kill(int(child), signal.SIGKILL)
            running.kill()
    assert running.returncode == 0
    assert "resumed after step" in said
    assert len((run / "metrics.jsonl").read_bytes().splitlines()) == 1 + 4 + 1
