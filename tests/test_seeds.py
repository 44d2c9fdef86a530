"""Several seeds: each run is the one that `fit` makes alone, whatever stops or fails on the way."""

import dataclasses
import io
import json
import os
import shutil
import signal
import sys
import threading
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import filelock
import numpy as np
import pytest
import torch
from rich.console import Console
from scipy import stats

from fastcifar import checkpoint, job, many, page_worker, runtime, worker
from fastcifar.ablation import ablate
from fastcifar.commands import main
from fastcifar.commands.options import parse_seeds
from fastcifar.config import TrainConfig
from fastcifar.console import print_table
from fastcifar.data.writer import SourceFile, write_store
from fastcifar.engine import FitResult, fit
from fastcifar.errors import (
    CheckpointError,
    ConfigError,
    DataError,
    DivergedError,
    FastcifarError,
    OutputError,
    StoppedError,
)
from fastcifar.estimates import estimate, interval_text
from fastcifar.formats import percent
from fastcifar.nets import ARCHS, Arch, build_model
from fastcifar.recipes import RECIPES
from fastcifar.reporter import NullReporter
from fastcifar.seeds import SeedsResult, fit_seeds, seeds_table
from fastcifar.stream_worker import StreamWorker, suits
from tests.test_page_worker import CLAIMS
from tests.threads import on_threads

TINY = Arch(blocks=((4,), (4,), (4,), (4,)), hidden=(8,))
# What a process of its own needs beside: the net.
CODE = """
import json, os, sys
sys.path[:] = json.loads(sys.argv[1])
import fastcifar.worker
from fastcifar.nets import ARCHS, Arch
ARCHS["tiny"] = Arch(blocks=((4,), (4,), (4,), (4,)), hidden=(8,))
fit = fastcifar.worker.fit
def talk(*arguments, **options):
    print("not for the parent")
    os.write(1, b"nor what a C library prints\\n")
    return fit(*arguments, **options)
fastcifar.worker.fit = talk
fastcifar.worker.serve()
"""
# Stands for such a process where only the parent is tested: seed 7 diverges, 8 dies, 9 waits until it is stopped.
STUB = """
import json, os, sys
order = json.loads(sys.stdin.readline())
out, seed = order["config"]["out"], order["config"]["seed"]
print(json.dumps({"say": f"threads {order['threads']}"}), flush=True)
end = {"status": 0, "error": None, "stopped": False}
if seed == 7:
    end |= {"status": 3, "error": "the training loss became nan"}
if seed == 8:
    sys.exit(9)
if seed == 9:
    sys.stdin.read()
    end |= {"status": 143, "error": "stopped by SIGTERM", "stopped": True}
if seed < 7:
    os.makedirs(out)
    with open(f"{out}/metrics.jsonl", "w") as file:
        print(json.dumps({"kind": "epoch", "step": 4, "evaluated": "test", "eval_accuracy": 0.25}), file=file)
        test = {"accuracy": seed / 8, "tta": "flip", "tta_accuracy": seed / 4, "train_seconds": seed + 1}
        print(json.dumps({"kind": "test"} | test), file=file)
print(json.dumps(end), flush=True)
"""


@pytest.fixture(autouse=True)
def _tiny(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[None]:
    monkeypatch.setitem(ARCHS, "tiny", TINY)
    monkeypatch.setattr("fastcifar.figures.write_figures", lambda *arguments, **options: ())
    monkeypatch.setattr(worker, "_CODE", CODE)
    monkeypatch.chdir(tmp_path)
    with on_threads(1):
        yield


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> str:
    """40 training and 20 test images of 3 classes."""
    generator = np.random.default_rng(0)
    path = tmp_path_factory.mktemp("seeds") / "noise"
    files = [
        SourceFile(name, generator.integers(0, 256, (count, 24, 24, 3), np.uint8), generator.integers(0, 3, count))
        for name, count in (("a", 40), ("b", 20))
    ]
    splits = {"full": {"train": ["a"], "test": ["b"]}}
    write_store(path, files, name="noise", classes=["x", "y", "z"], splits=splits, source={"verified": True})
    return str(path)


def other_data() -> str:
    """A store of other images."""
    files = [SourceFile(name, np.zeros((20, 24, 24, 3), np.uint8), np.arange(20) % 3) for name in ("a", "b")]
    splits = {"full": {"train": ["a"], "test": ["b"]}}
    write_store(Path("others"), files, name="noise", classes=["x", "y", "z"], splits=splits, source={"verified": True})
    return "others"


def config(data: str, **options: Any) -> TrainConfig:
    defaults: dict[str, Any] = {"arch": "tiny", "recipe": "report", "split": "full", "change": ("drop_last=yes",)}
    defaults |= {"epochs": 2, "batch_size": 16, "device": "cpu", "out": Path("all")}
    return TrainConfig(**{**defaults, "dataset": data, **options})


def weights(run: Path) -> dict[str, torch.Tensor]:
    found = checkpoint.load_newest(run / "checkpoints")
    return {**found.model, **found.training}


def assert_same_run(a: Path, b: Path) -> None:
    first, second = weights(a), weights(b)
    assert first.keys() == second.keys()
    for name, tensor in first.items():
        assert torch.equal(tensor, second[name]), name


def record(folder: str = "all") -> dict[str, Any]:
    return dict(json.loads((Path(folder) / "seeds.json").read_text()))


def states(folder: str = "all") -> list[str]:
    return [run["state"] for run in record(folder)["runs"]]


class Heard(NullReporter):
    """Keeps what it is told; sends this process a signal when a message has `stop_at` in it, or after some steps."""

    def __init__(self, stop_at: str = "", steps: int = -1) -> None:
        self.messages: list[str] = []
        self.stop_at, self.left = stop_at, steps

    def message(self, text: str) -> None:
        self.messages.append(text)
        if self.stop_at and self.stop_at in text:
            self.stop_at = ""
            os.kill(os.getpid(), signal.SIGINT)

    def train_step(self, step: int, steps: int, images_per_second: float) -> None:
        self.left -= 1
        if self.left == 0:
            os.kill(os.getpid(), signal.SIGTERM)


def test_seeds_in_turn_are_the_runs_that_fit_makes_alone(data: str) -> None:
    result = fit_seeds(config(data), [3, 0])
    alone = {seed: fit(config(data, seed=seed, out=Path(f"alone-{seed}"))) for seed in (3, 0)}
    assert list(result.runs) == [3, 0]
    assert (result.path, result.exit_status) == (Path("all"), 0)
    for seed, outcome in result.runs.items():
        assert_same_run(Path(f"all/seed-{seed}"), Path(f"alone-{seed}"))
        assert outcome.figures is not None
        assert outcome.figures.test_accuracy == alone[seed].test.accuracy
    assert not torch.equal(
        weights(Path("alone-3"))["classifier.1.weight"], weights(Path("alone-0"))["classifier.1.weight"]
    )
    accuracies = [alone[seed].test.accuracy for seed in (3, 0)]
    assert result.test_accuracy == estimate(accuracies)
    assert result.tta_accuracy is None
    times = [
        json.loads(Path(f"all/seed-{s}/metrics.jsonl").read_text().splitlines()[-1])["train_seconds"] for s in (3, 0)
    ]
    assert result.train_seconds == estimate(times)
    stored = record()
    assert stored["seeds"] == [3, 0]
    assert [(run["seed"], run["folder"], run["state"]) for run in stored["runs"]] == [
        (3, "seed-3", "done"),
        (0, "seed-0", "done"),
    ]
    assert [run["test_accuracy"] for run in stored["runs"]] == accuracies
    assert stored["summary"]["test_accuracy"]["mean"] == pytest.approx(np.mean(accuracies))
    assert {"config.json", "environment.json", "seeds.json"} <= {path.name for path in Path("all").iterdir()}


def test_side_by_side_a_failure_loses_no_other_run(data: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(worker, "_CODE", STUB)
    heard = Heard()
    torch.set_num_threads(8)
    result = fit_seeds(config(data), [1, 7, 8, 2], parallel=3, reporter=heard)
    assert {seed: outcome.state for seed, outcome in result.runs.items()} == {
        1: "done",
        7: "diverged",
        8: "failed",
        2: "done",
    }
    assert result.exit_status == 3
    assert sorted(heard.messages) == [
        "seed 1: test accuracy 12.50 %, 2.00 s of training",
        "seed 1: threads 2",
        "seed 2: test accuracy 25.00 %, 3.00 s of training",
        "seed 2: threads 2",
        "seed 7: diverged: the training loss became nan",
        "seed 7: threads 2",
        "seed 8: failed: its process ended with status 9",
        "seed 8: threads 2",
    ]
    assert states() == ["done", "diverged", "failed", "done"]
    assert (result.test_accuracy, result.tta_accuracy) == (estimate([0.125, 0.25]), estimate([0.25, 0.5]))
    assert seeds_table(result)[:3] == [
        ("seed", "test accuracy", "with flip TTA", "train s"),
        ("1", "12.50 %", "25.00 %", "2.00"),
        ("7", "diverged", "", ""),
    ]
    assert seeds_table(result)[-2] == ("deviation", "8.84 %", "17.68 %", "0.71")


@pytest.mark.parametrize(
    ("parallel", "started"), [(2, ["seed 3", "seed 9"]), (4, ["seed 3", "seed 9", "seed 10", "seed 11"])]
)
def test_a_signal_stops_what_is_under_way_and_starts_no_more(
    data: str, monkeypatch: pytest.MonkeyPatch, parallel: int, started: list[str]
) -> None:
    monkeypatch.setattr(worker, "_CODE", STUB.replace("seed == 9", "seed >= 9"))
    names: list[str] = []

    class Counted(worker.Worker):
        def __init__(self, name: str, *arguments: Any, **options: Any) -> None:
            names.append(name)
            super().__init__(name, *arguments, **options)

    monkeypatch.setattr(many, "Worker", Counted)
    with pytest.raises(StoppedError, match=r"stopped: 1 of 4 runs have ended, .* --resume all$") as caught:
        fit_seeds(config(data), [3, 9, 10, 11], parallel=parallel, reporter=Heard("seed 3: test accuracy"))
    assert caught.value.exit_status == 130
    assert names == started
    assert states() == ["done", "unfinished", "unfinished", "unfinished"]


def test_a_second_signal_ends_the_processes_at_once(data: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(worker, "_CODE", STUB.replace("sys.stdin.read()", "import time; time.sleep(100)"))
    monkeypatch.setattr(worker.Worker, "stop", lambda self: os.kill(os.getpid(), signal.SIGINT))
    with pytest.raises(StoppedError, match="stopped: 0 of 1 runs") as caught:
        fit_seeds(config(data), [9], parallel=2, reporter=Heard("seed 9: threads"))
    assert caught.value.exit_status == 130


def test_a_run_that_someone_else_stops_is_a_failure(data: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(worker, "_CODE", STUB.replace("sys.stdin.read()", "pass"))
    result = fit_seeds(config(data), [1, 9], parallel=2)
    assert (result.runs[9].state, result.exit_status) == ("failed", 143)


def test_processes_told_to_stop_save_and_go_on_bit_for_bit(data: str, capfd: pytest.CaptureFixture[str]) -> None:
    epochs = 30
    with pytest.raises(StoppedError):
        fit_seeds(config(data, epochs=epochs), [0, 1], parallel=2, reporter=Heard("epoch 1/"))
    assert states() == ["unfinished"] * 2
    out, err = capfd.readouterr()
    assert out == ""
    assert "not for the parent" in err
    begun = [path for path in Path("all").glob("seed-*") if (path / "checkpoints").exists()]
    assert begun
    assert {json.loads((path / "environment.json").read_text())["threads"] for path in begun} == {1}
    assert all(0 < checkpoint.load_newest(path / "checkpoints").step < 2 * epochs for path in begun)
    fit_seeds(TrainConfig(resume=Path("all")))
    for path in begun:
        fit(config(data, epochs=epochs, seed=int(path.name[5:]), out=Path(f"alone-{path.name}")))
        assert_same_run(path, Path(f"alone-{path.name}"))
    assert states() == ["done"] * 2


@pytest.fixture
def in_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    """Runs share this process, as they do on CUDA; what draws their pages says at once that it has."""
    monkeypatch.setattr(many, "suits", lambda config: True)
    monkeypatch.setattr(page_worker, "_CODE", CLAIMS)


@pytest.mark.usefixtures("in_threads")
def test_runs_in_threads_are_the_runs_that_fit_makes_alone(data: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def slowly(*arguments: Any, **options: Any) -> torch.nn.Module:
        time.sleep(0.1)  # another run would seed the generators now, if it might
        return build_model(*arguments, **options)

    monkeypatch.setattr(job, "build_model", slowly)
    heard, interval = Heard(), sys.getswitchinterval()
    result = fit_seeds(config(data), range(3), parallel=2, reporter=heard)
    assert (states(), result.exit_status) == (["done"] * 3, 0)
    assert sum("s of training" in line for line in heard.messages) == 3
    assert sum("epoch 2/2" in line for line in heard.messages) == 3
    for seed in range(3):
        fit(config(data, seed=seed, out=Path(f"alone-{seed}")))
        assert not Path(f"all/seed-{seed}/report.html").exists()  # whoever draws only says so here
        assert_same_run(Path(f"all/seed-{seed}"), Path(f"alone-{seed}"))
    assert sys.getswitchinterval() == interval


@pytest.mark.usefixtures("in_threads")
def test_threads_that_cannot_begin_fail_their_runs(data: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(device: torch.device) -> None:
        raise RuntimeError("CUDA error: out of streams")

    monkeypatch.setattr(runtime, "use_own_stream", fails)
    with pytest.raises(FastcifarError, match="its thread ended with BrokenThreadPool"):
        fit_seeds(config(data), range(4), parallel=2)


@pytest.mark.usefixtures("in_threads")
def test_threads_told_to_stop_save_and_go_on_bit_for_bit(data: str) -> None:
    epochs = 30
    with pytest.raises(StoppedError, match="stopped: 0 of 2 runs have ended") as caught:
        fit_seeds(config(data, epochs=epochs), [0, 1], parallel=2, reporter=Heard("epoch 1/"))
    assert caught.value.exit_status == 130
    assert states() == ["unfinished"] * 2
    begun = [path for path in Path("all").glob("seed-*") if (path / "checkpoints").exists()]
    assert begun
    assert all(0 < checkpoint.load_newest(path / "checkpoints").step < 2 * epochs for path in begun)
    fit_seeds(TrainConfig(resume=Path("all")), parallel=2)
    for path in begun:
        fit(config(data, epochs=epochs, seed=int(path.name[5:]), out=Path(f"alone-{path.name}")))
        assert_same_run(path, Path(f"alone-{path.name}"))
    assert states() == ["done"] * 2


@pytest.mark.usefixtures("in_threads")
def test_in_threads_a_failure_loses_no_other_run(
    data: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def spoiled(given: TrainConfig, **options: Any) -> FitResult:
        if given.seed == 1:
            raise DivergedError("the training loss became nan")
        if given.seed == 2:
            raise RuntimeError("a fault of ours")
        return fit(given, **options)

    monkeypatch.setattr(worker, "fit", spoiled)
    result = fit_seeds(config(data), [0, 1, 2, 3], parallel=2)
    assert [outcome.state for outcome in result.runs.values()] == ["done", "diverged", "failed", "done"]
    assert result.runs[2].error == "its thread ended with RuntimeError('a fault of ours')"
    assert "in spoiled" in capsys.readouterr().err


@pytest.mark.usefixtures("in_threads")
def test_a_second_signal_waits_for_no_thread(data: str, monkeypatch: pytest.MonkeyPatch) -> None:
    held = threading.Event()
    real = StreamWorker.stop

    def stop(self: StreamWorker) -> None:
        real(self)
        os.kill(os.getpid(), signal.SIGINT)

    def endless(given: TrainConfig, *, reporter: worker.LineReporter, complete: bool) -> None:
        reporter.message("begun")
        assert held.wait(60)

    monkeypatch.setattr(worker, "fit", endless)
    monkeypatch.setattr(StreamWorker, "stop", stop)
    try:
        with pytest.raises(StoppedError, match="stopped: 0 of 2 runs") as caught:
            fit_seeds(config(data), [0, 1], parallel=2, reporter=Heard("begun"))
    finally:
        held.set()
    assert caught.value.exit_status == 130


def test_processes_where_a_process_can_have_only_one() -> None:
    assert not suits(TrainConfig(device="cpu"))
    assert not suits(TrainConfig(device="nowhere", compile="on"))
    assert not suits(TrainConfig(device="nowhere", profile=True))


def test_a_run_in_lines(data: str) -> None:
    lines: list[str] = []
    with pytest.raises(StoppedError):
        fit(config(data, out=Path("run")), reporter=Heard(steps=3))
    fit(TrainConfig(resume=Path("run")), reporter=worker.LineReporter(lines.append))
    assert lines[0] == "note: resumed after step 3 of 4"
    assert [line.partition(":")[0] for line in lines[1:]] == ["epoch 1/2", "epoch 2/2"][-len(lines[1:]) :]


def test_a_signal_between_steps_stops_the_whole_and_it_goes_on(data: str, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(StoppedError, match=r"1 of 3 runs have ended, .* --resume all$") as caught:
        fit_seeds(config(data), [0, 1, 2], reporter=Heard(steps=5))
    assert caught.value.exit_status == 143
    assert states() == ["done", "unfinished", "unfinished"]
    assert not Path("all/seed-2").exists()
    trained = spy_on_fit(monkeypatch)
    fit_seeds(TrainConfig(resume=Path("all")), [0, 1, 2])
    assert [given.resume or given.out for given in trained] == [Path("all/seed-1"), Path("all/seed-2")]
    for seed in (1, 2):
        fit(config(data, seed=seed, out=Path(f"alone-{seed}")))
        assert_same_run(Path(f"all/seed-{seed}"), Path(f"alone-{seed}"))
    trained.clear()
    fit_seeds(TrainConfig(resume=Path("all")))
    assert trained == []


def test_a_seeds_folder_that_is_a_link_is_left_alone(data: str) -> None:
    with pytest.raises(StoppedError):
        fit_seeds(config(data), [0], reporter=Heard(steps=1))
    shutil.rmtree("all/seed-0")
    Path("mine/checkpoints/00000001").mkdir(parents=True)
    Path("mine/config.json").write_text("{}")
    Path("all/seed-0").symlink_to(Path("mine").absolute())
    with pytest.raises(CheckpointError, match="seed-0 leads elsewhere by a link"):
        fit_seeds(TrainConfig(resume=Path("all")))
    assert sorted(path.name for path in Path("mine").rglob("*")) == ["00000001", "checkpoints", "config.json"]


def test_an_option_that_is_given_at_its_default_is_taken_over(data: str) -> None:
    with pytest.raises(StoppedError):
        fit_seeds(config(data, compile="off"), [0], reporter=Heard(steps=1))
    assert main(["train", "--resume", "all", "--compile", "auto"]) == 0
    for folder in ("all", "all/seed-0"):
        assert json.loads(Path(folder, "config.json").read_text())["config"]["compile"] == "auto"


def spy_on_fit(monkeypatch: pytest.MonkeyPatch, diverging: int | None = None) -> list[TrainConfig]:
    """The configs that runs are made of from now on; one seed diverges."""
    given: list[TrainConfig] = []

    def spied(config: TrainConfig, **options: Any) -> FitResult:
        given.append(config)
        if config.seed == diverging:
            raise DivergedError("the training loss became nan in epoch 1")
        return fit(config, **options)

    monkeypatch.setattr(many, "fit", spied)
    return given


def test_a_run_that_diverges_is_named_and_not_tried_again(data: str, monkeypatch: pytest.MonkeyPatch) -> None:
    trained = spy_on_fit(monkeypatch, diverging=0)
    heard = Heard()
    result = fit_seeds(config(data, epochs=1), [0, 1], reporter=heard)
    assert result.exit_status == 3
    assert heard.messages == ["seed 0: diverged: the training loss became nan in epoch 1"]
    assert result.test_accuracy is not None
    assert result.test_accuracy.count == 1
    assert record()["runs"][0]["error"] == "the training loss became nan in epoch 1"
    trained.clear()
    again = fit_seeds(TrainConfig(resume=Path("all")))
    assert trained == []
    assert again.runs[0].state == "diverged"
    assert seeds_table(result) == [
        ("seed", "test accuracy", "train s"),
        ("0", "diverged", ""),
        ("1", percent(result.test_accuracy.mean), f"{result.train_seconds.mean:.2f}"),  # type: ignore[union-attr]
        ("mean", percent(result.test_accuracy.mean), f"{result.train_seconds.mean:.2f}"),  # type: ignore[union-attr]
        ("deviation", "", ""),
        ("95 % interval", "", ""),
    ]


def test_what_fails_for_every_seed_is_said_once_and_leaves_no_folder(
    data: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(ConfigError, match="unknown arch 'huge'"):
        fit_seeds(config(data, arch="huge"), [0, 1])
    monkeypatch.setattr(worker, "_CODE", STUB.replace("seed == 8", "seed in (8, 88)"))
    with pytest.raises(FastcifarError, match="its process ended with status 9"):
        fit_seeds(config(data), [8, 88, 9], parallel=2)
    assert not Path("all").exists()


def test_wrong_options_are_said_before_data_are_fetched(data: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def fetch(*arguments: Any) -> None:
        raise AssertionError("data were opened")

    monkeypatch.setattr(many, "find_data", fetch)
    for options, told in (
        ({"arch": "huge"}, "unknown arch 'huge'"),
        ({"device": "abacus"}, "device 'abacus' cannot be used here"),
        ({"change": ("resolutions=16:0.5",)}, "these nets take images of 17 to 32 pixels a side"),
    ):
        with pytest.raises(ConfigError, match=told):
            fit_seeds(config(data, **options), [0, 1])
    assert not Path("all").exists()


def test_a_seed_whose_folder_is_in_the_way_blocks_no_other(data: str) -> None:
    with pytest.raises(StoppedError):
        fit_seeds(config(data), [0, 1], reporter=Heard(steps=1))
    shutil.rmtree("all/seed-0")
    Path("all/seed-0").mkdir()
    Path("all/seed-0/mine.txt").write_text("precious")
    result = fit_seeds(TrainConfig(resume=Path("all")))
    assert {seed: outcome.state for seed, outcome in result.runs.items()} == {0: "failed", 1: "done"}
    assert "is not empty" in str(result.runs[0].error)
    assert Path("all/seed-0/mine.txt").read_text() == "precious"


def test_seeds_that_have_not_begun_take_the_store_from_where_it_is_now(data: str) -> None:
    for name, source in (("mine", data), ("other", other_data())):
        shutil.copytree(source, name)
    with pytest.raises(StoppedError):
        fit_seeds(config("mine"), [0, 1], reporter=Heard(steps=1))
    Path("mine").rename("moved")
    for wrong, told in (("other", ""), ("all", "all is not a store")):
        before, heard = Path("all/config.json").read_bytes(), Heard()
        with pytest.raises(DataError, match=f"mine is not the store that it was: put it back.*{told}"):
            fit_seeds(TrainConfig(resume=Path("all"), data=Path(wrong)), reporter=heard)
        assert any("other holds other data than the run's" in line for line in heard.messages) == (wrong == "other")
        assert json.loads(Path("all/config.json").read_bytes()) == json.loads(before)  # and nothing of it is kept
    with pytest.raises(ConfigError, match="unknown dataset 'mine'"):  # which nothing was begun with
        fit_seeds(dataclasses.replace(config("mine", out=Path("new")), data=Path("moved")), [0])
    with pytest.raises(StoppedError):
        fit_seeds(TrainConfig(resume=Path("all"), data=Path("moved")), reporter=Heard(steps=1))
    Path("moved").rename("mine")  # back again, or in both places
    shutil.copytree("mine", "moved")
    result = fit_seeds(TrainConfig(resume=Path("all"), data=Path("moved")))
    assert [outcome.state for outcome in result.runs.values()] == ["done", "done"]
    fit(config(data, seed=1, out=Path("alone")))
    assert_same_run(Path("all/seed-1"), Path("alone"))


def test_a_run_of_other_data_in_a_folder_of_several_has_its_own(data: str) -> None:
    fit_seeds(config(data, epochs=1), [0])
    fit(config(other_data(), epochs=1, out=Path("all/other")))
    stored = json.loads(Path("all/other/environment.json").read_text())
    assert stored["data"]["store"] == str(Path("others").absolute())


def test_fewer_seeds_than_there_may_be_at_a_time_share_all_threads(data: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(worker, "_CODE", STUB)
    heard = Heard()
    torch.set_num_threads(8)
    fit_seeds(config(data), [1, 2], parallel=4, reporter=heard)
    assert [text for text in sorted(heard.messages) if "threads" in text] == ["seed 1: threads 4", "seed 2: threads 4"]


def test_what_a_crash_left_before_the_first_checkpoint_is_begun_anew(data: str) -> None:
    with pytest.raises(StoppedError):
        fit_seeds(config(data), [0], reporter=Heard(steps=1))
    run = Path("all/seed-0")
    for saved in (run / "checkpoints").iterdir():
        saved.rename(run / "checkpoints" / f".tmp-{saved.name}-x")
    (run / ".tmp-metrics.jsonl-x").write_text("half")
    fit_seeds(TrainConfig(resume=Path("all")))
    fit(config(data, out=Path("alone")))
    assert_same_run(run, Path("alone"))
    assert not list(run.rglob(".tmp-*"))


def test_a_member_that_another_process_works_on_stays_as_it_is(data: str) -> None:
    with pytest.raises(StoppedError):
        fit_seeds(config(data), [0], reporter=Heard(steps=1))
    run = Path("all/seed-0")
    shutil.rmtree(run / "checkpoints")  # it has none yet, and is at work
    before = sorted(path.name for path in run.iterdir())
    with filelock.FileLock(run / ".lock"), pytest.raises(OutputError, match=r"seed-0 is in use: another process"):
        fit_seeds(TrainConfig(resume=Path("all")))
    assert sorted(path.name for path in run.iterdir()) == before


def test_side_by_side_a_member_that_is_in_use_loses_no_other_run(data: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def go_on(config: TrainConfig) -> TrainConfig:
        if config.seed == 3:
            raise OutputError("seed-3 is in use: another process works on it")
        return config

    monkeypatch.setattr(worker, "_CODE", STUB)
    monkeypatch.setattr(many, "_to_go_on", go_on)
    result = fit_seeds(config(data), [1, 2, 3, 4, 5], parallel=2)
    assert [outcome.state for outcome in result.runs.values()] == ["done", "done", "failed", "done", "done"]
    assert result.runs[3].error == "seed-3 is in use: another process works on it"


@pytest.mark.parametrize("parallel", [1, 2])
def test_a_reporter_that_fails_stops_no_run(data: str, monkeypatch: pytest.MonkeyPatch, parallel: int) -> None:
    class Closed(NullReporter):
        def start(self, *arguments: Any) -> None:
            raise BrokenPipeError

        message = transfer = start  # type: ignore[assignment]

    monkeypatch.setattr(worker, "_CODE", CODE)
    result = fit_seeds(config(data, epochs=1), [0, 1], parallel=parallel, reporter=Closed())
    assert [outcome.state for outcome in result.runs.values()] == ["done", "done"]


@pytest.mark.parametrize(
    "record",
    [
        {"seeds": 0, "runs": []},
        {"seeds": ["0"], "runs": []},
        {"seeds": [0], "runs": [{"name": "seed 0"}]},
        {"seeds": [0], "runs": [{"name": "seed 0", "state": "diverged"}]},
        {"seeds": [0], "runs": [0]},
        {"seeds": [0], "runs": {}},
        [],
    ],
)
def test_a_damaged_record_is_said(data: str, record: Any) -> None:
    fit_seeds(config(data, epochs=1), [0])
    Path("all/seeds.json").write_text(json.dumps(record))
    with pytest.raises(CheckpointError, match=r"seeds\.json is damaged: no seeds, or no runs with a name and a state"):
        fit_seeds(TrainConfig(resume=Path("all")))


def test_a_folder_of_seeds_belongs_to_one_process(data: str) -> None:
    fit_seeds(config(data, out=Path("all")), [0])
    record = Path("all/seeds.json").read_bytes()
    with filelock.FileLock("all/.lock"), pytest.raises(OutputError, match="all is in use: another process"):
        fit_seeds(TrainConfig(resume=Path("all")))
    with filelock.FileLock("all/.lock"), pytest.raises(OutputError, match="all is in use: another process"):
        fit_seeds(config(data, out=Path("all")), [0])
    assert Path("all/seeds.json").read_bytes() == record


def test_a_folder_of_seeds_keeps_its_options(data: str, monkeypatch: pytest.MonkeyPatch) -> None:
    fit_seeds(config(data, epochs=1), [0])
    with pytest.raises(ConfigError, match="seeds 0,1 differ from the folder's 0: a resumed run keeps its options"):
        fit_seeds(TrainConfig(resume=Path("all")), [0, 1])
    with pytest.raises(ConfigError, match="epochs 2 differs from the run's 1"):
        fit_seeds(TrainConfig(resume=Path("all"), epochs=2))
    with pytest.raises(CheckpointError, match=r"all/seed-0 is no folder of seeds: seeds\.json: No such file"):
        fit_seeds(TrainConfig(resume=Path("all/seed-0")))
    with pytest.raises(OutputError, match="'all' is not empty: resume it with --resume all"):
        fit_seeds(config(data), [0])
    monkeypatch.setitem(RECIPES, "report", dataclasses.replace(RECIPES["report"], weight_decay=0.5))
    with pytest.raises(CheckpointError, match="all: recipe 'report' has changed since: start anew"):
        fit_seeds(TrainConfig(resume=Path("all")))
    Path("all/seeds.json").write_text("{")
    with pytest.raises(CheckpointError, match=r"seeds\.json is damaged"):
        fit_seeds(TrainConfig(resume=Path("all")))
    assert Path("all/seed-0/metrics.jsonl").exists()


def test_wrong_seeds_are_said_before_anything_is_made(data: str) -> None:
    for seeds, message in (([], "seeds: give at least one"), ([1, 2, 1], "seeds: 1 is given twice")):
        with pytest.raises(ConfigError, match=message):
            fit_seeds(config(data), seeds)
    with pytest.raises(ConfigError, match="seed must be a whole number from 0"):
        fit_seeds(config(data), [-1])
    with pytest.raises(ConfigError, match="parallel must be a whole number at least 1, got 0"):
        fit_seeds(config(data), [0], parallel=0)
    with pytest.raises(ConfigError, match="parallel must be a whole number at least 1, got '2'"):
        fit_seeds(config(data), [0], parallel="2")  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="seeds must be whole numbers, got 3"):
        fit_seeds(config(data), 3)  # type: ignore[arg-type]
    for start in (fit, partial(fit_seeds, seeds=[0]), partial(ablate, seeds=[0])):
        with pytest.raises(ConfigError, match="config must be a TrainConfig, got None"):
            start(None)  # type: ignore[arg-type]
    assert not Path("all").exists()


@pytest.mark.parametrize("seeds", [np.arange(2), {0, 1}, iter([0, 1]), range(2)])
def test_seeds_may_be_any_whole_numbers(data: str, seeds: Any) -> None:
    result = fit_seeds(config(data, epochs=1), seeds)
    assert [*result.runs] == [0, 1]
    assert json.loads(Path("all/seeds.json").read_text())["seeds"] == [0, 1]


def test_seeds_are_read_as_ranges_and_lists() -> None:
    assert parse_seeds("0..4") == (0, 1, 2, 3, 4)
    assert parse_seeds("0,3,7") == (0, 3, 7)
    assert parse_seeds("0..2, 7,9..9") == (0, 1, 2, 7, 9)
    assert parse_seeds("5") == (5,)
    assert len(parse_seeds("1..1000")) == 1000
    for text in ("", "a", "4..0", "0..", "..3", "-1", "1.5", "0,,1", "0...3"):
        with pytest.raises(ConfigError, match=r"seeds must be whole numbers such as 0\.\.4 or 0,3,7, got"):
            parse_seeds(text)
    for text in ("0..1000", "0..500,1000..1600", "0..99999999999999999999"):
        with pytest.raises(ConfigError, match="are more than 1000"):
            parse_seeds(text)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--seeds", "4..0"], "seeds must be whole numbers such as 0..4 or 0,3,7, got '4..0'"),
        (["--seeds", "0,1", "--seed", "3"], "seed 3 cannot be given with seeds (--seeds): name it there"),
        (["--parallel", "2"], "parallel 2 is for several seeds (--seeds)"),
    ],
)
def test_wrong_options_are_one_line(
    arguments: list[str], message: str, capfd: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    assert main(["train", *arguments]) == 2
    out, err = capfd.readouterr()
    assert (out, err) == ("", f"fastcifar: {message}\n")
    assert not list(tmp_path.iterdir())


def test_the_command_ends_with_a_table_and_resumes_its_folder(
    data: str, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    spy_on_fit(monkeypatch, diverging=1)
    arguments = ["--dataset", data, "--arch", "tiny", "--recipe", "report", "--split", "full", "--epochs", "1"]
    assert main(["train", *arguments, "--seeds", "0,1", "--out", "all"]) == 3
    lines = capfd.readouterr().out.splitlines()
    table = lines[lines.index("2 seeds") :]
    assert [line.split()[0] for line in table[1:-2]] == ["seed", "0", "1", "mean", "deviation", "95"]
    assert table[-2:] == ["seed 1 diverged: the training loss became nan in epoch 1", "written to all"]
    assert main(["train", "--resume", "all"]) == 3
    assert capfd.readouterr().out.splitlines() == table
    assert main(["train", "--resume", "all", "--epochs", "2"]) == 2
    assert main(["train", "--resume", "all", "--seeds", "0..1"]) == 3


@pytest.mark.parametrize("values", [[0.9, 0.92], [1.0, 2.0, 4.0, 7.5], [3.0] * 5])
def test_estimates_are_students(values: list[float]) -> None:
    found = estimate(values)
    assert found is not None
    assert found.count == len(values)
    assert found.mean == pytest.approx(np.mean(values))
    assert found.deviation == pytest.approx(np.std(values, ddof=1))
    error = np.std(values, ddof=1) / len(values) ** 0.5
    if error:
        assert found.interval95 == pytest.approx(stats.t.interval(0.95, len(values) - 1, np.mean(values), error))
    else:
        assert found.interval95 == (3.0, 3.0)


def test_one_value_has_no_interval_and_none_no_mean() -> None:
    found = estimate([0.5])
    assert found is not None
    assert (found.count, found.mean, found.deviation, found.interval95) == (1, 0.5, None, None)
    assert interval_text(found, percent) == ""
    assert estimate([]) is None


ROWS = [("seed", "accuracy"), ("0", "93.00 %"), ("mean of all", "9.00 %")]


def test_a_table_off_the_terminal_is_plain_columns() -> None:
    console = Console(file=io.StringIO(), force_terminal=False, width=20)
    print_table("2 seeds", ROWS, ["a note that is longer than the console is wide"], console)
    assert console.file.getvalue().splitlines() == [  # type: ignore[attr-defined]
        "2 seeds",
        "seed         accuracy",
        "0             93.00 %",
        "mean of all    9.00 %",
        "a note that is longer than the console is wide",
    ]


@pytest.mark.parametrize("width", [12, 20, 80])
def test_a_table_on_a_terminal_is_no_wider_than_it(width: int) -> None:
    console = Console(file=io.StringIO(), force_terminal=True, width=width, color_system=None, legacy_windows=False)
    print_table("2 seeds", [*ROWS, ("bad \x1b[31m[b]", "x")], ["a note"], console)
    text = console.file.getvalue()  # type: ignore[attr-defined]
    assert all(len(line) <= width for line in text.splitlines())
    assert "\x1b" not in text
    assert width < 80 or ("93.00 %" in text and "bad ?[31m[b]" in text)


def test_the_result_is_a_public_name() -> None:
    import fastcifar

    assert fastcifar.fit_seeds is fit_seeds
    assert fastcifar.SeedsResult is SeedsResult
