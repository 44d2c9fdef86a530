"""A disk that is full, broken, over quota or read-only: an error in one line, and what was there before is sound."""

import contextlib
import errno
import gc
import itertools
import json
import os
import random
import re
import shutil
import signal
import subprocess
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeAlias

import numpy as np
import pytest
import torch

from fastcifar import checkpoint
from fastcifar.config import TrainConfig
from fastcifar.data.arrays import convert_arrays
from fastcifar.data.datasets import open_store
from fastcifar.data.store import ArrayStore
from fastcifar.engine import fit
from fastcifar.errors import OutputError, StoppedError
from fastcifar.reporter import JsonLinesReporter, NullReporter, RunResult
from tests.cifar_files import tiny_cifar10
from tests.effort import effort
from tests.faults import tiny_runs
from tests.faults.steps import Failing, Kind, steps
from tests.sample_stats import make_epochs, make_result, make_summary

pytestmark = pytest.mark.skipif(not os.path.isdir("/proc/self/fd"), reason="needs /proc")

_WRITING: tuple[Kind, ...] = ("open", "mkdir", "write", "fsync", "close", "rename")


@dataclass(frozen=True)
class Fault:
    """What a step fails with: once or from then on, and which steps can."""

    code: int
    lasting: bool
    kinds: tuple[Kind, ...] = _WRITING

    def at(self, number: int) -> Failing:
        return Failing(number, self.code, lasting=self.lasting, kinds=self.kinds)

    @property
    def lets_remove(self) -> bool:
        return "remove" not in self.kinds


FAULTS = {
    "full": Fault(errno.ENOSPC, lasting=True),
    "over quota once": Fault(errno.EDQUOT, lasting=False),
    "broken once": Fault(errno.EIO, lasting=False),
    "read-only": Fault(errno.EROFS, lasting=True, kinds=(*_WRITING, "remove")),
}


@pytest.fixture(params=FAULTS.values(), ids=FAULTS.keys())
def fault(request: pytest.FixtureRequest) -> Fault:
    found: Fault = request.param
    return found


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def refused(place: Path, failing: Failing, work: Callable[[], object], quiet: Sequence[str] = ("remove",)) -> bool:
    """Whether `work` in `place` failed, in one line that names something there; it must where it could not write.

    Steps that are `quiet` may fail without a word.
    """
    message = None
    with steps(place, failing):
        try:
            work()
        except OutputError as error:
            message = str(error)
    if message is None:
        assert set(failing.failed) <= {*quiet}
        return False
    assert failing.failed
    assert message.isprintable()
    assert str(place) in message
    assert re.search(f"cannot be written.*{os.strerror(failing.code)}", message)
    return True


def failed_at_each_step(
    place: Path,
    fault: Fault,
    *,
    before: Callable[[], object],
    work: Callable[[], object],
    check: Callable[[], object],
    quiet: Sequence[str] = ("remove",),
) -> int:
    """How many steps of `work` in `place`, emptied each time, were failed, until none was; `check` follows each."""
    for number in itertools.count(1):
        shutil.rmtree(place, ignore_errors=True)
        place.mkdir()
        before()
        failing = fault.at(number)
        refused(place, failing, work, quiet)
        check()
        if not failing.failed:
            return number - 1
    raise AssertionError


def save(folder: Path, step: int) -> None:
    checkpoint.save(folder, step=step, model=tensors(step), training={}, state={"step": step})


def tensors(step: int) -> dict[str, torch.Tensor]:
    return {"filters": torch.randn(3, 5, generator=torch.Generator().manual_seed(step))}


def test_a_checkpoint_that_cannot_be_written_leaves_those_before(tmp_path: Path, fault: Fault) -> None:
    place = tmp_path / "place"
    seen = set()

    def check() -> None:
        found = checkpoint.load_newest(place)
        assert tiny_runs.equal(found.model, tensors(found.step))
        assert found.skipped == ()
        seen.add(found.step)
        if fault.lets_remove:
            assert not list(place.glob(".tmp-*"))
        save(place, 3)
        assert names(place) == ["00000002", "00000003"]

    def work() -> None:
        save(place, 3)
        assert (place / "00000003").is_dir()  # or it is said

    steps_failed = failed_at_each_step(
        place,
        fault,
        before=lambda: [save(place, step) for step in (1, 2)],
        work=work,
        check=check,
        quiet=("remove", "rename"),  # the oldest is renamed before it is removed
    )
    assert seen == {2, 3}
    assert steps_failed >= 16


IMAGES = np.random.default_rng(0).integers(0, 256, (40, 8, 8, 3), np.uint8)
LABELS = np.arange(40) % 4


def test_a_store_that_cannot_be_written_is_not_there(tmp_path: Path, fault: Fault) -> None:
    place = tmp_path / "place"

    def work() -> ArrayStore:
        return convert_arrays(place / "out", IMAGES, LABELS, name="mine")

    expected = convert_arrays(tmp_path / "expected", IMAGES, LABELS, name="mine").digest

    def check() -> None:
        if fault.lets_remove:
            assert set(names(place)) <= {"out"}
        if not (place / "out").exists():
            work()
        assert ArrayStore(place / "out", verify=True).digest == expected
        assert names(place) == ["out"]

    assert failed_at_each_step(place, fault, before=lambda: None, work=work, check=check) >= 16


@pytest.mark.parametrize("fault", [FAULTS["full"], FAULTS["broken once"]], ids=["full", "broken once"])
def test_a_data_set_that_cannot_be_converted_is_converted_later(tmp_path: Path, fault: Fault) -> None:
    place, archive = tmp_path / "place", tiny_cifar10(tmp_path / "tiny.tar.gz", per_file=10)

    def work(home: Path = place) -> ArrayStore:
        return open_store("cifar10", data=archive, allow_unverified=True, home=home)

    expected = work(tmp_path / "expected")

    def check() -> None:
        assert work().digest == expected.digest
        left = set(names(place / "stores")) - {f".{expected.path.name}.lock"}
        assert left == {expected.path.name}

    assert failed_at_each_step(place, fault, before=lambda: None, work=work, check=check) >= 18


def test_a_record_that_cannot_be_written_is_an_error_at_once(tmp_path: Path, fault: Fault) -> None:
    place = tmp_path / "place"
    path = place / "run" / "metrics.jsonl"
    epochs = make_epochs(2)

    def work() -> None:
        reporter = JsonLinesReporter(path)
        try:
            reporter.start(make_summary(), ())
            for stats in epochs:
                reporter.epoch_end(stats)
            reporter.finish(make_result())
        finally:
            with contextlib.suppress(OSError):
                reporter.close()

    def check() -> None:
        whole = [json.loads(line)["kind"] for line in path.read_bytes().splitlines(keepends=True) if b"\n" in line]
        if whole != ["old"]:
            assert whole == ["run", "epoch", "epoch", "test"][: len(whole)]
        work()
        assert path.read_bytes().count(b"\n") == 4
        assert names(path.parent) == ["metrics.jsonl"]

    def before() -> None:
        path.parent.mkdir()
        path.write_text('{"kind": "old"}\n')

    assert failed_at_each_step(place, fault, before=before, work=work, check=check) >= 14


class Heard(NullReporter):
    """Whether a run said that it is done."""

    done = False

    def finish(self, result: RunResult) -> None:
        self.done = True


@pytest.fixture
def run_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[dict[str, torch.Tensor]]:
    """The weights of a run that no disk failed."""
    tiny_runs.prepare(monkeypatch, tmp_path)
    with tiny_runs.one_thread():  # faster, for so little
        fit(tiny_runs.config("alone"))
        yield tiny_runs.weights(Path("alone"))


def test_a_run_that_cannot_write_does_not_claim_success(run_alone: dict[str, torch.Tensor], fault: Fault) -> None:
    counted = Failing(0, 0, lasting=False, kinds=fault.kinds)
    with steps(Path(), counted):
        fit(tiny_runs.config("counted"))
    assert counted.seen > 80
    others = range(3, counted.seen + 1)
    chosen = [1, 2, *random.Random(fault.code).sample(others, min(len(others), effort(8)))]  # 1 and 2 begin the folder
    went_on = 0
    for number in chosen:
        run, heard = Path(f"run-{number}"), Heard()
        failed = refused(
            run, fault.at(number), lambda run=run, heard=heard: fit(tiny_runs.config(str(run)), reporter=heard)
        )
        if checkpoint.saved(run / "checkpoints"):
            assert checkpoint.load_newest(run / "checkpoints").skipped == ()
            if failed:
                fit(TrainConfig(resume=run))
                went_on += 1
            assert tiny_runs.equal(tiny_runs.weights(run), run_alone)
        elif fault.lets_remove:
            assert not run.exists()
        assert failed != heard.done
    assert went_on > 0


def test_a_stop_that_cannot_be_saved_is_no_stop(run_alone: dict[str, torch.Tensor]) -> None:
    class Stop(NullReporter):
        def epoch_start(self, epoch: int) -> None:
            if epoch == 2:
                os.kill(os.getpid(), signal.SIGTERM)

    def stopped(failing: Failing, run: str) -> None:
        with steps(Path(run), failing):
            fit(tiny_runs.config(run), reporter=Stop())

    counted = Failing(0, 0, lasting=False, kinds=_WRITING)
    with pytest.raises(StoppedError):
        stopped(counted, "counted")
    for back in range(2, 9):  # the last step closes metrics.jsonl, which going on writes anew
        run = f"run-{back}"
        with pytest.raises(OutputError, match="cannot be written"):
            stopped(Failing(counted.seen + 1 - back, errno.ENOSPC, lasting=True, kinds=_WRITING), run)
        fit(TrainConfig(resume=Path(run)))
        assert tiny_runs.equal(tiny_runs.weights(Path(run)), run_alone)


@contextlib.contextmanager
def pretended_read_only(folder: Path) -> Iterator[None]:
    with steps(folder, Failing(1, errno.EROFS, lasting=True, kinds=FAULTS["read-only"].kinds)):
        yield


@contextlib.contextmanager
def mounted_read_only(folder: Path) -> Iterator[None]:
    """Mount a folder over itself, read-only."""
    mount = ["mount", "--bind", str(folder), str(folder)]
    if shutil.which("mount") is None or subprocess.run(mount, capture_output=True, check=False).returncode:
        pytest.skip("mounting is not permitted here")
    try:
        subprocess.run(["mount", "-o", "remount,ro,bind", str(folder)], check=True)
        with pytest.raises(OSError, match="Read-only"):
            (folder / "file").touch()
        yield
    finally:
        gc.collect()  # memory maps keep it busy
        subprocess.run(["umount", "--lazy", str(folder)], check=True)


READ_ONLY = pytest.mark.parametrize("read_only", [pretended_read_only, mounted_read_only])
ReadOnly: TypeAlias = Callable[[Path], contextlib.AbstractContextManager[None]]


@READ_ONLY
def test_a_read_only_store_trains(run_alone: dict[str, torch.Tensor], tmp_path: Path, read_only: ReadOnly) -> None:
    with read_only(tmp_path / "data"):
        assert fit(tiny_runs.config()).history[-1].epoch == 2
    assert tiny_runs.equal(tiny_runs.weights(Path("run")), run_alone)


@READ_ONLY
def test_a_read_only_home_opens_what_it_has_and_says_what_it_cannot_make(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, read_only: ReadOnly
) -> None:
    home, archive = tmp_path / "home", tiny_cifar10(tmp_path / "tiny.tar.gz", per_file=10)
    other = tiny_cifar10(tmp_path / "other.tar.gz", per_file=10, seed=1)
    monkeypatch.setenv("FASTCIFAR_HOME", str(home))
    digests = [open_store("digits").digest, open_store("cifar10", data=archive, allow_unverified=True).digest]
    before = sorted(home.rglob("*"))
    with read_only(home):
        again = [open_store("digits", verify=True), open_store("cifar10", data=archive, allow_unverified=True)]
        assert [store.digest for store in again] == digests
        with pytest.raises(OutputError, match=r"cannot be written: Read-only file system; see FASTCIFAR_HOME$"):
            open_store("cifar10", data=other, allow_unverified=True)
        del again
    assert sorted(home.rglob("*")) == before
