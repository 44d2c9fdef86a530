"""Several processes at once: one conversion, one run, and a clear word to the others."""

import json
import os
import signal
import time
from collections.abc import Callable, Generator, Iterator
from pathlib import Path
from typing import Any

import filelock
import numpy as np
import pytest
import torch

from fastcifar import checkpoint, runs
from fastcifar.config import TrainConfig
from fastcifar.data import datasets
from fastcifar.data.content import Content, SourceFile
from fastcifar.data.datasets import open_store
from fastcifar.data.store import ArrayStore
from fastcifar.data.writer import make_store, write_content
from fastcifar.engine import fit
from fastcifar.errors import OutputError
from fastcifar.recipes import resolve
from fastcifar.reporter import NullReporter
from tests.cifar_files import tiny_cifar10
from tests.effort import effort
from tests.faults import tiny_runs
from tests.faults.children import end_of, start

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")

_PROCESSES = 16


def at_once(works: list[Callable[[], str]], place: Path) -> list[str]:
    """What each of `works` gave, or its OutputError's line; all begin at the same moment, each in a child."""
    ready, go = os.pipe()
    place.mkdir()
    children = []
    for number, work in enumerate(works):

        def waiting(number: int = number, work: Callable[[], str] = work) -> None:
            os.close(go)
            os.read(ready, 1)  # until no one has the other end
            try:
                said = work()
            except OutputError as error:
                said = f"OutputError: {error}"
            (place / str(number)).write_text(said)

        children.append(start(waiting))
    os.close(go)
    assert [end_of(child) for child in children] == ["done"] * len(works)
    os.close(ready)
    return [(place / str(number)).read_text() for number in range(len(works))]


class NoLock:
    """In the place of `filelock.FileLock`: keeps nobody out."""

    def __init__(self, path: Path) -> None:
        pass

    def __enter__(self) -> None:
        pass

    def __exit__(self, *error: object) -> None:
        pass


def wait_for(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 30
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.001)


@pytest.mark.parametrize("locked", [True, False], ids=["locked", "without the lock"])
def test_sixteen_processes_open_one_archive(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, locked: bool) -> None:
    home, archive, log = tmp_path / "home", tiny_cifar10(tmp_path / "tiny.tar.gz", per_file=10), tmp_path / "log"
    expected = open_store("cifar10", data=archive, allow_unverified=True, home=tmp_path / "expected")
    log.touch()

    def converting(*arguments: Any) -> None:
        with log.open("a") as handle:
            handle.write("x")
        if not locked:
            wait_for(lambda: log.stat().st_size == _PROCESSES)
        write_content(*arguments)

    monkeypatch.setattr(datasets, "write_content", converting)
    if not locked:
        monkeypatch.setattr(filelock, "FileLock", NoLock)
    for number in range(effort(2)):
        os.truncate(log, 0)

        def work(home: Path = home / str(number)) -> str:
            return open_store("cifar10", data=archive, allow_unverified=True, home=home, verify=True).digest

        assert at_once([work] * _PROCESSES, tmp_path / f"said-{number}") == [expected.digest] * _PROCESSES
        assert log.stat().st_size == (1 if locked else _PROCESSES)
        left = {path.name for path in (home / str(number) / "stores").iterdir()}
        assert left - {f".{expected.path.name}.lock"} == {expected.path.name}


def content(brightness: int, wait: Callable[[], object]) -> Content:
    """40 images; `wait` is called half way."""
    images, labels = np.full((20, 8, 8, 3), brightness, np.uint8), np.arange(20) % 4

    def files() -> Generator[SourceFile, None, None]:
        yield SourceFile("train", images, labels)
        wait()
        yield SourceFile("test", images, labels)

    splits = {"full": {"train": ["train"], "test": ["test"]}}
    return Content(name="mine", classes=None, splits=splits, source={"verified": True}, files=files())


@pytest.mark.parametrize("equal", [True, False], ids=["of the same images", "of others"])
def test_two_conversions_to_one_place(tmp_path: Path, equal: bool) -> None:
    out = tmp_path / "place" / "out"

    def work(number: int) -> str:
        def half_way() -> None:
            (tmp_path / f"half-{number}").touch()
            wait_for(lambda: len(list(tmp_path.glob("half-*"))) == 2)

        return make_store(out, content(1 if equal else number, half_way)).digest

    said = at_once([lambda: work(1), lambda: work(2)], tmp_path / "said")
    store = ArrayStore(out, verify=True)
    assert [path.name for path in out.parent.iterdir()] == ["out"]
    if equal:
        assert said == [store.digest] * 2
    else:
        first = int(store.images[0, 0, 0, 0]) - 1
        assert said[first] == store.digest
        assert said[1 - first].startswith(f"OutputError: {out} exists already: another process was first")
        assert said[1 - first].isprintable()


@pytest.fixture
def alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[dict[str, torch.Tensor]]:
    """The weights of a run that had its folder to itself."""
    tiny_runs.prepare(monkeypatch, tmp_path)
    with tiny_runs.one_thread():
        fit(tiny_runs.config("alone"))
        yield tiny_runs.weights(Path("alone"))


def trained(config: TrainConfig) -> str:
    return f"trained {fit(config).history[-1].epoch} epochs"


def test_of_several_with_one_out_one_trains(alone: dict[str, torch.Tensor], tmp_path: Path) -> None:
    for number in range(effort(4)):
        run = tmp_path / f"run-{number}"
        said = at_once([lambda run=run: trained(tiny_runs.config(str(run)))] * 4, tmp_path / f"said-{number}")
        assert sorted(said)[-1] == "trained 2 epochs"
        for line in sorted(said)[:-1]:
            assert line.startswith(f"OutputError: {run} is in use: ")
            assert line.isprintable()
        assert json.loads((run / "config.json").read_text())["config"]["arch"] == "tiny"
        assert tiny_runs.equal(tiny_runs.weights(run), alone)


class Waiting(NullReporter):
    """Says when the second epoch begins, and waits there."""

    def __init__(self, begun: Path, go: Path) -> None:
        self.begun, self.go = begun, go

    def epoch_start(self, epoch: int) -> None:
        if epoch == 2:
            self.begun.touch()
            wait_for(self.go.exists)


def test_a_run_that_is_trained_is_resumed_by_nobody_else(alone: dict[str, torch.Tensor], tmp_path: Path) -> None:
    run, begun, go = tmp_path / "run", tmp_path / "begun", tmp_path / "go"
    child = start(lambda: fit(tiny_runs.config(str(run)), reporter=Waiting(begun, go)))
    wait_for(lambda: begun.exists() and bool(checkpoint.saved(run / "checkpoints")))
    before = sorted(run.rglob("*"))
    for config in (TrainConfig(resume=run), tiny_runs.config(str(run))):
        with pytest.raises(OutputError, match=r"run is in use: another process is working on it") as caught:
            fit(config)
        assert str(caught.value).isprintable()
    assert sorted(run.rglob("*")) == before
    go.touch()
    assert end_of(child) == "done"
    assert tiny_runs.equal(tiny_runs.weights(run), alone)


def test_the_lock_of_a_killed_process_is_free(alone: dict[str, torch.Tensor], tmp_path: Path) -> None:
    run, begun = tmp_path / "run", tmp_path / "begun"
    child = start(lambda: fit(tiny_runs.config(str(run)), reporter=Waiting(begun, tmp_path / "never")))
    wait_for(lambda: begun.exists() and bool(checkpoint.saved(run / "checkpoints")))
    os.kill(child, signal.SIGKILL)
    assert end_of(child) == "killed"
    fit(TrainConfig(resume=run))
    assert tiny_runs.equal(tiny_runs.weights(run), alone)


def test_a_start_that_comes_late_leaves_the_run_as_it_is(alone: dict[str, torch.Tensor]) -> None:
    config = tiny_runs.config()
    late = runs.create(config, resolve(config))  # and another process trains, from its start to its end
    fit(config)
    before = {path: path.read_bytes() for path in Path("run").rglob("*") if path.is_file()}
    with pytest.raises(OutputError, match="'run' is not empty: resume it"), late.claimed(new=True):
        pass
    assert {path: path.read_bytes() for path in Path("run").rglob("*") if path.is_file()} == before
    assert tiny_runs.equal(tiny_runs.weights(Path("run")), alone)
