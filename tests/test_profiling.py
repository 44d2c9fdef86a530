"""The profile of a run: sums that agree, files that are there or not, and a run that is as it was without."""

import gc
import gzip
import json
import weakref
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.autograd import DeviceType
from torch.autograd.profiler_util import FunctionEvent
from torch.profiler import ProfilerActivity, profile

from fastcifar import checkpoint
from fastcifar.config import TrainConfig
from fastcifar.data.writer import SourceFile, write_store
from fastcifar.engine import fit
from fastcifar.errors import ConfigError, DivergedError, OutputError
from fastcifar.kernels import norms, winograd
from fastcifar.nets import ARCHS, Arch
from fastcifar.profiling import StepProfiler, breakdown, phase_scope, scoped_batches
from fastcifar.reporter import NullReporter
from fastcifar.runs import reopen

CPU, CUDA = torch.device("cpu"), torch.device("cuda")
PHASES = ("loader", "resolution", "forward", "loss", "backward", "optimiser", "totals")


def event(name: str, start: float, end: float, parent: FunctionEvent | None = None, *, busy: float = 0) -> Any:
    """An operator of the host from `start` to `end` (us), with a kernel that keeps the device busy for so long."""
    made = FunctionEvent(id=0, name=name, thread=1, start_us=start, end_us=end, use_device="cuda")
    if busy:
        made.append_kernel("kernel", 0, busy)
    if parent is not None:
        parent.append_cpu_child(made)
        made.set_cpu_parent(parent)
    return made


def two_steps() -> list[Any]:
    """Two steps that count, of 1,000 us each, and the beginning of a third."""
    found: list[Any] = []
    for start in (0, 1000, 2000):
        step = event(f"ProfilerStep#{start}", start, start + (1000 if start < 2000 else 90))
        scope = {
            name: event(f"fastcifar.{name}", start + first, start + last, step)
            for name, first, last in (("loader", 0, 50), ("forward", 60, 400), ("optimiser", 900, 990))
        }
        pool = event("aten::max_pool2d", start + 100, start + 200, scope["forward"])
        convolution = event("aten::conv2d", start + 200, start + 390, scope["forward"])
        found += [
            step,
            *scope.values(),
            pool,
            event("aten::fill_", start + 110, start + 150, pool, busy=7),
            convolution,
            event("aten::copy_", start + 210, start + 230, convolution, busy=11),
            event("aten::cudnn_convolution", start + 230, start + 380, convolution, busy=100),
            event("aten::mm", start + 910, start + 950, scope["optimiser"], busy=3),
            # of autograd's own thread: no parent here, and between the phases
            event("aten::native_batch_norm_backward", start + 500, start + 580, busy=40),
        ]
    return found


@pytest.mark.parametrize(
    ("function", "title"),
    [
        (winograd._Convolution, "convolutions, matrix products"),
        (norms._ReluNorm, "batch normalisation"),
        (norms._NormGelu, "batch normalisation"),
        (norms._Halve, "pooling"),
    ],
)
@pytest.mark.parametrize("suffix", ["", "Backward"])
def test_operations_of_our_own_are_in_the_groups_of_those_they_replace(
    function: type[torch.autograd.Function], title: str, suffix: str
) -> None:
    span = [event("ProfilerStep#0", 0, 1000), event(function.__name__ + suffix, 100, 400)]
    assert breakdown(span, steps=1, device=CPU).groups[title] == pytest.approx(0.3)


def test_wall_time_is_added_up_by_phase_and_by_operator() -> None:
    found = breakdown(two_steps(), steps=2, device=CPU)
    assert found.total == pytest.approx(1.0)
    assert found.clock == "wall"
    assert {name: round(1000 * value) for name, value in found.phases.items()} == {
        **dict.fromkeys(PHASES, 0),
        "loader": 50,
        "forward": 340,
        "optimiser": 90,
        "between them": 1000 - 480,
    }
    assert {name: round(1000 * value) for name, value in found.groups.items()} == {
        "convolutions, matrix products": 170,
        "batch normalisation": 80,
        "pooling": 100,
        "activations": 0,
        "copies and layout": 20,
        "loader": 50,
        "resolution": 0,
        "optimiser": 90,  # its matrix product too
        "other operators, Python": 1000 - 510,
    }


def test_on_a_gpu_it_is_the_time_the_device_was_busy() -> None:
    events = two_steps()
    kernel = event("a kernel, seen by the device", 300, 390)
    kernel.device_type = DeviceType.CUDA
    found = breakdown([*events, kernel], steps=2, device=CUDA)
    assert found.clock == "busy cuda"
    assert found.total == pytest.approx(0.161)
    assert {name: round(1000 * value) for name, value in found.phases.items() if value} == {
        "forward": 118,
        "optimiser": 3,
        "between them": 40,
    }
    assert {name: round(1000 * value) for name, value in found.groups.items() if value} == {
        "convolutions, matrix products": 100,
        "batch normalisation": 40,
        "pooling": 7,
        "copies and layout": 11,
        "optimiser": 3,
    }


@pytest.mark.parametrize(
    ("operator", "group"),
    [
        ("aten::mkldnn_convolution", "convolutions, matrix products"),
        ("aten::convolution_backward", "convolutions, matrix products"),
        ("aten::conv2d", "convolutions, matrix products"),
        ("aten::mm", "convolutions, matrix products"),
        ("aten::baddbmm", "convolutions, matrix products"),
        ("aten::addmm", "convolutions, matrix products"),
        ("aten::native_batch_norm", "batch normalisation"),
        ("aten::cudnn_batch_norm_backward", "batch normalisation"),
        ("aten::max_pool2d_with_indices_backward", "pooling"),
        ("aten::relu", "activations"),
        ("aten::threshold_backward", "activations"),
        ("aten::gelu_backward", "activations"),
        ("aten::_to_copy", "copies and layout"),
        ("aten::contiguous", "copies and layout"),
        ("aten::clone", "copies and layout"),
        ("aten::sum", "other operators, Python"),
        ("aten::comm", "other operators, Python"),
    ],
)
def test_operators_have_their_groups(operator: str, group: str) -> None:
    step = event("ProfilerStep#0", 0, 10)
    found = breakdown([step, event(operator, 0, 10, step)], steps=1, device=CPU)
    assert found.groups[group] == pytest.approx(0.01)


def work(size: int = 64) -> None:
    """A step with two of the phases."""
    with phase_scope("forward"):
        images = torch.randn(2, 3, size, size, requires_grad=True)
        loss = torch.relu(torch.conv2d(images, torch.randn(8, 3, 3, 3))).sum()
    with phase_scope("backward"):
        loss.backward()


def test_ten_steps_are_profiled_and_written_once(tmp_path: Path) -> None:
    told: list[str] = []
    with StepProfiler(tmp_path / "profile", CPU, tell=told.append) as profiler:
        for number in range(20):
            work()
            profiler.step()
            assert len(told) == (number >= 12)
    with profiler:  # the next epoch
        profiler.step()
    assert {path.name for path in (tmp_path / "profile").iterdir()} == {"trace.json.gz", "steps.txt"}
    trace = json.loads(gzip.decompress((tmp_path / "profile" / "trace.json.gz").read_bytes()))
    names = [entry.get("name") for entry in trace["traceEvents"]]
    assert names.count("fastcifar.forward") == names.count("fastcifar.backward") == 10
    text = (tmp_path / "profile" / "steps.txt").read_text()
    assert "aten::convolution_backward" in text
    assert len(told) == 1
    *table, last = told[0].splitlines()
    assert text.startswith("\n".join(table))
    assert str(tmp_path / "profile" / "trace.json.gz") in last
    assert "mean of 10 after 3 not counted" in table[0]
    total = float(table[0].split(":")[1].split()[0])
    cells = [line.split() for line in table[1:]]
    sums = [0.0, 0.0]
    for row in cells:
        if row[-2:] == ["ms", "share"]:
            sums = [sums[1], 0.0]
        else:
            sums[1] += float(row[-3])
    assert sums == pytest.approx([total, total], abs=0.1)  # each of 8 or 9 rows is rounded to 0.01


def test_a_short_epoch_counts_what_it_has(tmp_path: Path) -> None:
    told: list[str] = []
    with StepProfiler(tmp_path / "five", CPU, tell=told.append) as profiler:
        for _ in range(5):
            work(8)
            profiler.step()
    assert "mean of 2 after 3 not counted" in told[0]
    with StepProfiler(tmp_path / "three", CPU, tell=told.append) as profiler:
        for _ in range(3):
            work(8)
            profiler.step()
    assert told[1:] == ["profile: nothing to show, the epoch had 3 steps and the first 3 don't count"]
    assert not (tmp_path / "three").exists()


def test_an_error_leaves_no_profiler_on_and_no_file(tmp_path: Path) -> None:
    told: list[str] = []
    with (
        pytest.raises(KeyboardInterrupt),
        StepProfiler(tmp_path / "profile", CPU, tell=told.append) as profiler,
    ):
        for _ in range(5):
            work(8)
            profiler.step()
        raise KeyboardInterrupt
    assert not (tmp_path / "profile").exists()
    assert told == []
    with profile(activities=[ProfilerActivity.CPU]):  # another one can begin
        work(8)


def test_another_profiler_is_named(tmp_path: Path) -> None:
    profiler = StepProfiler(tmp_path, CPU, tell=print)
    with (
        profile(activities=[ProfilerActivity.CPU]),
        pytest.raises(ConfigError, match="profile cannot be used while another"),
        profiler,
    ):
        pass


def test_a_folder_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    (tmp_path / "profile").touch()
    with (
        pytest.raises(OutputError, match="profile cannot be written: "),
        StepProfiler(tmp_path / "profile", CPU, tell=print) as profiler,
    ):
        for _ in range(13):
            work(8)
            profiler.step()


def test_scopes_are_seen_by_any_profiler_and_nothing_without_one() -> None:
    with phase_scope("loss") as scope:
        assert scope is None
    with profile(activities=[ProfilerActivity.CPU]) as watched:
        assert list(scoped_batches([1, 2])) == [1, 2]
        with phase_scope("loss"):
            pass
    counts = {entry.key: entry.count for entry in watched.key_averages()}
    assert counts["fastcifar.loader"] == 3  # the last one finds the end
    assert counts["fastcifar.loss"] == 1


def test_a_batch_is_not_held_while_the_next_is_made() -> None:
    alive: list[int] = []
    made: list[weakref.ref[torch.Tensor]] = []

    def batches() -> Iterator[torch.Tensor]:
        for _ in range(3):
            gc.collect()
            alive.append(sum(reference() is not None for reference in made))
            batch = torch.zeros(1)
            made.append(weakref.ref(batch))
            yield batch
            del batch

    for batch in scoped_batches(batches()):
        del batch
    assert alive == [0, 0, 0]


@pytest.fixture
def data(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setitem(ARCHS, "tiny", Arch(blocks=((4,), (4,), (4,), (4,)), hidden=(8,)))
    monkeypatch.chdir(tmp_path)
    generator = np.random.default_rng(0)
    files = [
        SourceFile(name, generator.integers(0, 255, (count, 24, 24, 3), np.uint8), generator.integers(0, 3, count))
        for name, count in (("a", 64), ("b", 20))
    ]
    splits = {"full": {"train": ["a"], "test": ["b"]}}
    write_store(tmp_path / "store", files, name="noise", classes=["x", "y", "z"], splits=splits, source={})
    return str(tmp_path / "store")


class Listener(NullReporter):
    def __init__(self) -> None:
        self.heard: list[str] = []

    def message(self, text: str) -> None:
        self.heard.append(text)


def config(data: str, **options: Any) -> TrainConfig:
    return TrainConfig(**{"arch": "tiny", "dataset": data, "epochs": 1, "batch_size": 4, "device": "cpu", **options})


def test_a_profiled_run_is_the_run_it_would_have_been(data: str) -> None:
    plain = fit(config(data, out=Path("plain")))
    listener = Listener()
    profiled = fit(config(data, out=Path("profiled"), profile=True), reporter=listener)
    a, b = (checkpoint.load_newest(run.path / "checkpoints") for run in (plain, profiled))
    for before, after in ((a.model, b.model), (a.training, b.training)):
        assert before.keys() == after.keys()
        assert all(torch.equal(tensor, after[name]) for name, tensor in before.items())
    assert reopen(Path("plain")).config_hash() == reopen(Path("profiled")).config_hash()
    assert not (plain.path / "profile").exists()
    assert {path.name for path in (profiled.path / "profile").iterdir()} == {"trace.json.gz", "steps.txt"}
    (told,) = listener.heard
    assert "mean of 10 after 3 not counted" in told
    trace = json.loads(gzip.decompress((profiled.path / "profile" / "trace.json.gz").read_bytes()))
    names = [entry.get("name") for entry in trace["traceEvents"]]
    assert {name: names.count(f"fastcifar.{name}") for name in PHASES} == dict.fromkeys(PHASES, 10)


def test_a_run_that_leaves_nothing_leaves_no_profile(data: str) -> None:
    with pytest.raises(DivergedError):
        fit(config(data, out=Path("run"), profile=True, lr=1e30))
    assert not Path("run").exists()
