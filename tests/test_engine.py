"""Training end to end on tiny data: exact resuming, evaluation that moves nothing, files that tell the truth."""

import dataclasses
import hashlib
import json
import os
import signal
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from fastcifar import checkpoint, engine, job, runs, runtime
from fastcifar.commands import main
from fastcifar.config import Augment, TrainConfig, Tta
from fastcifar.data.arrays import convert_arrays
from fastcifar.data.store import ArrayStore
from fastcifar.data.writer import SourceFile, write_store
from fastcifar.engine import evaluate, evaluate_run, fit
from fastcifar.errors import CheckpointError, ConfigError, DivergedError, FastcifarError, OutputError, StoppedError
from fastcifar.evaluation import StopSeenError, eval_loader, tta_logits
from fastcifar.kernels import norms, winograd
from fastcifar.loader import Batch, Loader
from fastcifar.metrics import EpochStats
from fastcifar.nets import ARCHS, Arch, build_model
from fastcifar.recipes import RECIPES, resolve
from fastcifar.reporter import NullReporter, RunSummary
from fastcifar.seeds import fit_seeds
from fastcifar.signals import StopRequest
from fastcifar.trainer import Trainer
from fastcifar.whitening import first_images, whiten_
from tests.threads import on_threads

TINY = Arch(blocks=((4,), (4,), (4,), (4,)), hidden=(8,))


@pytest.fixture(autouse=True)
def _tiny(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setitem(ARCHS, "tiny", TINY)
    monkeypatch.chdir(tmp_path)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> str:
    """70 training, 30 validation and 40 test images of 3 classes that differ in brightness."""
    generator = np.random.default_rng(0)

    def images(count: int) -> tuple[NDArray[np.uint8], NDArray[np.int64]]:
        labels = generator.integers(0, 3, count)
        noise = generator.integers(0, 60, (count, 22, 22, 3))
        return (noise + 70 * labels[:, None, None, None]).astype(np.uint8), labels

    path = tmp_path_factory.mktemp("engine") / "bright"
    files = [SourceFile(name, *images(count)) for name, count in (("a", 70), ("b", 30), ("c", 40))]
    splits = {
        "report": {"train": ["a"], "validation": ["b"], "test": ["c"]},
        "full": {"train": ["a", "b"], "test": ["c"]},
    }
    write_store(path, files, name="bright", classes=["dark", "grey", "light"], splits=splits, source={"verified": True})
    return str(path)


def config(data: str, **options: Any) -> TrainConfig:
    defaults: dict[str, Any] = {"arch": "tiny", "recipe": "fast", "epochs": 2, "batch_size": 16, "device": "cpu"}
    return TrainConfig(**{**defaults, "dataset": data, **options})


class StopAfter(NullReporter):
    """Sends this process a signal when so many steps are done."""

    def __init__(self, steps: int, number: signal.Signals = signal.SIGINT) -> None:
        self.left, self.number = steps, number

    def train_step(self, step: int, steps: int, images_per_second: float) -> None:
        self.left -= 1
        if self.left == 0:
            os.kill(os.getpid(), self.number)


class StopInEvaluation(NullReporter):
    """Sends this process SIGTERM when the evaluation number `number` begins."""

    def __init__(self, number: int) -> None:
        self.left = number

    def evaluate_start(self, part: str) -> None:
        self.left -= 1
        if self.left == 0:
            os.kill(os.getpid(), signal.SIGTERM)


def weights(run: Path) -> dict[str, torch.Tensor]:
    found = checkpoint.load_newest(run / "checkpoints")
    return {**found.model, **found.training}


def assert_equal(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> None:
    assert a.keys() == b.keys()
    for name, tensor in a.items():
        assert torch.equal(tensor, b[name]), name


def without_times(history: tuple[EpochStats, ...]) -> list[EpochStats]:
    zero = {"train_seconds": 0.0, "eval_seconds": 0.0, "images_per_second": 0.0}
    return [dataclasses.replace(stats, **zero) for stats in history]


def test_a_run_learns_and_its_files_tell_the_same(data: str) -> None:
    result = fit(config(data, epochs=12, recipe="report", lr=0.01, out=Path("run")))
    assert result.test.accuracy > 0.6  # by chance 0.33; how much more depends on the threads' order of summation
    assert result.history[-1].train_loss < result.history[0].train_loss / 2
    assert result.path == Path("run")
    names = {path.name for path in result.path.iterdir()} - {".lock"}  # for as long as it ran
    assert names == {"config.json", "environment.json", "metrics.jsonl", "checkpoints", "figures", "report.html"}
    figures = {"loss.png", "accuracy.png", "confusion.png", *["mistakes.png"] * (result.test.accuracy < 1)}
    assert {path.name for path in (result.path / "figures").iterdir()} == figures
    lines = [json.loads(line) for line in (result.path / "metrics.jsonl").read_text().splitlines()]
    assert [line["kind"] for line in lines] == ["run", *["epoch"] * 12, "test"]
    assert [line["train_loss"] for line in lines[1:-1]] == [stats.train_loss for stats in result.history]
    assert lines[-1]["accuracy"] == result.test.accuracy
    assert [stats.samples for stats in result.history] == [70] * 12  # the short last batch is trained on and counted
    assert result.history[-1].step == 12 * 5
    assert {stats.evaluated for stats in result.history} == {"validation"}
    stored = json.loads((result.path / "config.json").read_text())
    assert stored["recipe"]["lr"] == 0.01
    assert stored["config"]["arch"] == "tiny"
    again = evaluate_run(result.path, device="cpu")
    assert dataclasses.replace(again, seconds=result.test.seconds) == result.test


def test_the_test_table_is_of_the_test_images(data: str) -> None:
    result = fit(config(data, recipe="report", out=Path("run")))
    assert result.test.samples == 40
    store = ArrayStore(data)
    rows = np.asarray(store.split("report/test").rows)
    counts = np.bincount(store.labels[rows], minlength=3)
    correct = sum(a * n for a, n in zip(result.test.class_accuracies, counts, strict=True))
    assert correct / 40 == pytest.approx(result.test.accuracy)
    assert np.sum(result.test.confusion, axis=1) == pytest.approx(1.0)


def test_full_has_no_validation_part_and_says_test(data: str) -> None:
    result = fit(config(data, split="full", out=Path("run")))
    assert {stats.evaluated for stats in result.history} == {"test"}
    assert result.history[-1].eval_accuracy == result.test.accuracy
    assert result.history[0].samples == 96  # of 100: the recipe drops the short batch


def test_only_some_epochs_are_evaluated_and_training_is_the_same(data: str) -> None:
    options: dict[str, Any] = {"recipe": "report", "epochs": 5}
    each = fit(config(data, out=Path("each"), **options))
    with pytest.raises(StoppedError):
        fit(config(data, out=Path("some"), eval_every=3, **options), reporter=StopAfter(22))  # in the fifth epoch
    some = fit(TrainConfig(resume=Path("some")))
    assert [stats.epoch for stats in some.history if stats.eval_accuracy is not None] == [3, 5]
    for one, other in zip(without_times(some.history), without_times(each.history), strict=True):
        left_out = {} if one.epoch in (3, 5) else {"eval_loss": None, "eval_accuracy": None}
        assert one == dataclasses.replace(other, **left_out)
    assert_equal(weights(Path("some")), weights(Path("each")))
    assert some.test.confusion == each.test.confusion
    lines = [json.loads(line) for line in (some.path / "metrics.jsonl").read_text().splitlines()]
    assert lines[0]["eval_every"] == 3
    assert [line["eval_loss"] is None for line in lines[1:-1]] == [True, True, False, True, False]
    assert [line["eval_seconds"] > 0 for line in lines[1:-1]] == [False, False, True, False, True]


@pytest.mark.parametrize(("every", "expected"), [(2, [False, True, False, True]), (1, [False, True, True, True])])
def test_a_resumed_run_may_be_evaluated_more_often(data: str, every: int, expected: list[bool]) -> None:
    with pytest.raises(StoppedError):
        fit(config(data, out=Path("run"), epochs=4, eval_every=9), reporter=StopAfter(7))  # six steps an epoch
    history = fit(TrainConfig(resume=Path("run"), eval_every=every)).history
    assert [stats.eval_loss is not None for stats in history] == expected


def test_holdout_validates_on_training_images_it_does_not_train_on(data: str) -> None:
    result = fit(config(data, split="holdout", out=Path("run")))
    assert {stats.evaluated for stats in result.history} == {"validation"}
    assert result.history[0].samples == 80  # of 90
    assert result.test.samples == 40


def test_a_store_without_the_split_says_which_it_has(tmp_path: Path) -> None:
    images = np.zeros((40, 20, 20, 3), np.uint8)
    files = [SourceFile(name, images + 9 * i, np.zeros(40, np.int64)) for i, name in enumerate("ab")]
    splits = {"full": {"train": ["a"], "test": ["b"]}}
    write_store(tmp_path / "s", files, name="s", classes=["only"], splits=splits, source={})
    with pytest.raises(ConfigError, match="split report is not one of s's: choose from full, holdout"):
        fit(config(str(tmp_path / "s"), recipe="report", out=Path("run")))
    assert not Path("run").exists()


def test_equal_seeds_give_equal_weights_and_others_do_not(data: str) -> None:
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        fit(config(data, seed=seed, out=Path(name)))
    assert_equal(weights(Path("a")), weights(Path("b")))
    assert not torch.equal(weights(Path("a"))["classifier.1.weight"], weights(Path("c"))["classifier.1.weight"])


def test_the_recipe_and_the_seed_reach_training(data: str, monkeypatch: pytest.MonkeyPatch) -> None:
    given: list[tuple[torch.Tensor, torch.Tensor]] = []
    drawn: dict[str, torch.Tensor] = {}
    real = Trainer.step_no_sync

    def step(self: Trainer, images: torch.Tensor, labels: torch.Tensor) -> None:
        if not given:
            drawn.update({name: tensor.clone() for name, tensor in self.model.state_dict().items()})
        given.append((images.clone(), labels.clone()))
        real(self, images, labels)

    monkeypatch.setattr(Trainer, "step_no_sync", step)
    augment = {"crop": 2, "padding": "zero", "flip": "random", "cutout": 3, "policy": "trivial", "mixup": 0.4}
    change = (*(f"augment.{name}={value}" for name, value in augment.items()), "whiten=none", "scaling=unit")
    fit(config(data, seed=5, epochs=2, change=change, out=Path("run")))
    options: Any = {"batch_size": 16, "seed": 5, "scaling": "unit", "drop_last": True}
    loader = Loader(data, split="full/train", augment=Augment(**augment), **options)  # type: ignore[arg-type]
    expected = [batch for _ in range(2) for batch in loader]
    assert len(given) == len(expected) == 12
    for (images, labels), batch in zip(given, expected, strict=True):
        assert torch.equal(images, batch.images)
        assert torch.equal(labels, batch.labels)
    torch.manual_seed(5)
    for name, tensor in build_model("tiny", num_classes=3).state_dict().items():
        assert torch.equal(drawn[name], tensor), name


def test_a_recipes_policy_ends_after_its_fraction_of_the_epochs(data: str) -> None:
    ends = {"part": ("policy_fraction=0.5",), "number": ("augment.policy_epochs=1",), "all": ()}
    for name, change in ends.items():
        fit(config(data, change=("augment.policy=trivial", *change), out=Path(name)))
    assert_equal(weights(Path("part")), weights(Path("number")))
    name = "classifier.1.weight"
    assert not torch.equal(weights(Path("part"))[name], weights(Path("all"))[name])


@pytest.mark.parametrize("amp", [False, True])
def test_training_computes_in_the_type_that_amp_chose(data: str, amp: bool) -> None:
    types = set()

    def hook(module: torch.nn.Module, inputs: Any, output: Any) -> None:
        if isinstance(module, torch.nn.Conv2d | torch.nn.Linear) and module.training:
            types.add(output.dtype)

    handle = torch.nn.modules.module.register_module_forward_hook(hook)
    try:
        fit(config(data, epochs=1, amp=amp, amp_dtype="bfloat16" if amp else "auto", out=Path("run")))
    finally:
        handle.remove()
    assert types == {torch.bfloat16 if amp else torch.float32}


def test_the_time_before_a_stop_counts(data: str) -> None:
    class Slow(StopAfter):
        def train_step(self, step: int, steps: int, images_per_second: float) -> None:
            time.sleep(0.2)
            super().train_step(step, steps, images_per_second)

    with pytest.raises(StoppedError):
        fit(config(data, out=Path("run")), reporter=Slow(3))
    first = fit(TrainConfig(resume=Path("run"))).history[0]
    assert first.train_seconds >= 0.6
    assert first.images_per_second == first.samples / first.train_seconds


# Together they use every ingredient of a recipe
MIXTURES: dict[str, dict[str, Any]] = {
    "muon": {
        "optimizer": "muon",
        "lr": 0.1,
        "muon_momentum": 0.5,
        "head_lr": 0.5,
        "vector_lr": 2.0,
        "averaging": "lookahead",
        "averaging_every": 2,
        "whiten": "frozen",
        "tta": "shift",
        "schedule": "cosine",
    },
    "adam": {
        "optimizer": "adam",
        "averaging": "ema",
        "averaging_every": 3,
        "whiten": "init",
        "tta": "flip",
        "norm_momentum": 0.3,
        "final_lr": 0.1,
        "resolutions": ((17, 0.4), (19, 0.3)),
    },
}


@pytest.mark.parametrize(
    ("recipe", "amp"),
    [("report", False), ("report", True), ("fast", False), ("fast", True), ("muon", False), ("adam", False)],
)
def test_resuming_at_any_step_goes_on_bit_for_bit(
    data: str, recipe: str, amp: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if recipe in MIXTURES:
        monkeypatch.setitem(RECIPES, recipe, dataclasses.replace(RECIPES["fast"], **MIXTURES[recipe]))
    monkeypatch.setattr("fastcifar.figures.write_figures", lambda *arguments, **options: ())  # a second each
    options: dict[str, Any] = {"recipe": recipe, "amp": amp, "amp_dtype": "bfloat16" if amp else "auto"}
    through = fit(config(data, out=Path("through"), **options))
    steps = through.history[-1].step
    for stop in range(1, steps + 1):
        out = Path(f"stopped-{stop}")
        with pytest.raises(StoppedError, match=f"after step {stop} of {steps}, saved") as caught:
            fit(config(data, out=out, **options), reporter=StopAfter(stop))
        assert caught.value.exit_status == 130
        assert str(out) in str(caught.value)
        resumed = fit(TrainConfig(resume=out))
        assert_equal(weights(out), weights(Path("through")))
        assert without_times(resumed.history) == without_times(through.history)
        assert dataclasses.replace(resumed.test, seconds=through.test.seconds) == through.test
        lines = [json.loads(line)["kind"] for line in (out / "metrics.jsonl").read_text().splitlines()]
        assert lines == ["run", "epoch", "epoch", "test"]


@pytest.mark.parametrize("amp", [False, True])
def test_resuming_goes_on_bit_for_bit_with_the_compiled_loops(
    data: str, amp: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    options: dict[str, Any] = {"arch": "wider", "amp": amp, "amp_dtype": "bfloat16" if amp else "auto"}
    monkeypatch.setattr(winograd, "halves_here", lambda: True)
    monkeypatch.setitem(ARCHS, "wider", Arch(blocks=((16,), (16,), (16,), (16,)), hidden=(16,)))
    ran = set()
    for module, name in ((norms, "relu_norm"), (winograd, "conv2d")):
        real = getattr(module, name)
        spy = lambda *values, name=name, real=real, **options: (ran.add(name), real(*values, **options))[1]  # noqa: E731
        monkeypatch.setattr(module, name, spy)
    fit(config(data, **options, out=Path("through")))
    assert ran == {"relu_norm", "conv2d"}
    with pytest.raises(StoppedError):
        fit(config(data, **options, out=Path("stopped")), reporter=StopAfter(5))
    fit(TrainConfig(resume=Path("stopped")))
    assert_equal(weights(Path("stopped")), weights(Path("through")))


class Notices(NullReporter):
    """Remembers the notices of the run's start."""

    def start(self, summary: RunSummary, history: Sequence[EpochStats]) -> None:
        self.heard = summary.notices


def test_a_resumed_run_says_what_its_last_bits_depend_on_and_has_changed(data: str) -> None:
    threads = torch.get_num_threads()
    for name, now in (("same", threads), ("other", threads + 1)):
        with pytest.raises(StoppedError):
            fit(config(data, out=Path(name)), reporter=StopAfter(2))
        reporter = Notices()
        with on_threads(now):
            fit(TrainConfig(resume=Path(name)), reporter=reporter)
        assert reporter.heard[0] == "resumed after step 2 of 12"
        said = [line for line in reporter.heard if line.endswith("the run goes on, but not bit for bit")]
        assert len(said) == (name == "other")
        assert all(f"{threads} threads became" in line and f"{now} threads:" in line for line in said)


def test_steps_that_are_taken_otherwise_are_said_to_be(data: str, monkeypatch: pytest.MonkeyPatch) -> None:
    real = runtime.choose
    monkeypatch.setattr(
        runtime, "choose", lambda *given: dataclasses.replace(found := real(*given), reasons=(*found.reasons, graphs))
    )
    graphs = ("steps", "CUDA graphs")
    with pytest.raises(StoppedError):
        fit(config(data, out=Path("run")), reporter=StopAfter(2))
    reporter = Notices()
    graphs = ("steps", "one operation after another: --profile takes a step apart")
    fit(TrainConfig(resume=Path("run")), reporter=reporter)
    told = "steps CUDA graphs became one operation after another: the run goes on, but not bit for bit"
    assert told in reporter.heard


def test_a_run_from_before_a_field_was_there_goes_on(data: str) -> None:
    with pytest.raises(StoppedError):
        fit(config(data, out=Path("run")), reporter=StopAfter(2))
    place = Path("run/config.json")
    old = json.loads(place.read_text())
    del old["recipe"]["policy_fraction"], old["recipe"]["augment"]["policy_epochs"]
    place.write_text(json.dumps(old))
    old["config"] = {name: value for name, value in old["config"].items() if name not in runs._FREE}
    saved = checkpoint.load_newest(Path("run/checkpoints"))
    assert saved.state["config_hash"] == hashlib.sha256(json.dumps(old, sort_keys=True).encode()).hexdigest()
    fit(TrainConfig(resume=Path("run")))
    fit(config(data, out=Path("alone")))
    assert_equal(weights(Path("run")), weights(Path("alone")))


def test_a_run_says_where_its_data_are(data: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fastcifar.placement._placed", {})
    fit(config(data, epochs=1, out=Path("run")))
    line = json.loads(Path("run/metrics.jsonl").read_text().splitlines()[0])
    assert dict(line["choices"])["placement"].startswith("device: 0 MB of ")
    monkeypatch.setattr("fastcifar.placement.free_memory", lambda device: 1)
    monkeypatch.setattr("fastcifar.placement._placed", {})
    fit(config(data, epochs=1, out=Path("tight")))
    line = json.loads(Path("tight/metrics.jsonl").read_text().splitlines()[0])
    assert dict(line["choices"])["placement"].startswith("stream; 0 MB are more than 60% of the 0 MB that are free")
    assert_equal(weights(Path("run")), weights(Path("tight")))


@pytest.mark.parametrize("number", [1, 2, 3])
def test_resuming_from_within_an_evaluation_trains_nothing_twice(data: str, number: int) -> None:
    options: dict[str, Any] = {"recipe": "report"}  # two epochs' validations, then the test
    through = fit(config(data, out=Path("through"), **options))
    with pytest.raises(StoppedError):
        fit(config(data, out=Path("stopped"), **options), reporter=StopInEvaluation(number))
    resumed = fit(TrainConfig(resume=Path("stopped")))
    assert without_times(resumed.history) == without_times(through.history)
    assert_equal(weights(Path("stopped")), weights(Path("through")))
    assert resumed.test.confusion == through.test.confusion
    states = [checkpoint.load_newest(Path(run) / "checkpoints").state for run in ("stopped", "through")]
    assert [state["epoch"] for state in states] == [2, 2]
    assert [len(state["history"]) for state in states] == [2, 2]


def test_a_damaged_checkpoint_is_made_again(data: str) -> None:
    first = fit(config(data, out=Path("run")))
    good = weights(Path("run"))
    newest = checkpoint.load_newest(Path("run/checkpoints")).path
    content = (newest / "model.safetensors").read_bytes()
    (newest / "model.safetensors").write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    assert fit(TrainConfig(resume=Path("run"))).test.confusion == first.test.confusion
    assert checkpoint.load_newest(Path("run/checkpoints")).path == newest
    assert_equal(weights(Path("run")), good)
    assert evaluate_run("run", device="cpu").accuracy == first.test.accuracy


@pytest.mark.parametrize("name", MIXTURES)
def test_a_checkpoint_holds_the_net_that_was_tested(data: str, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(RECIPES, name, dataclasses.replace(RECIPES["fast"], **MIXTURES[name]))
    result = fit(config(data, recipe=name, out=Path("run")))
    assert result.test.tta == MIXTURES[name]["tta"]
    assert result.test.tta_accuracy is not None
    again = evaluate_run(result.path, device="cpu")
    assert dataclasses.replace(again, seconds=result.test.seconds) == result.test
    found = checkpoint.load_newest(result.path / "checkpoints")
    own = found.training["net.features.0.bias"]  # of the net that took the last step
    assert torch.equal(own, found.model["features.0.bias"]) == (name == "muon")  # 12 steps: lookahead's last was now
    line = json.loads((result.path / "metrics.jsonl").read_text().splitlines()[-1])
    assert (line["tta"], line["tta_accuracy"]) == (result.test.tta, result.test.tta_accuracy)
    assert "accuracy with test-time augmentation" in (result.path / "report.html").read_text()


def test_whitening_makes_the_first_filters_and_freezes_them(data: str, monkeypatch: pytest.MonkeyPatch) -> None:
    nets = {}
    for whiten in ("none", "init", "frozen"):
        monkeypatch.setitem(RECIPES, "white", dataclasses.replace(RECIPES["report"], whiten=whiten))
        result = fit(config(data, recipe="white", epochs=1, out=Path(whiten)))
        nets[whiten] = checkpoint.load_newest(result.path / "checkpoints").model["features.0.weight"]
        assert result.run.parameters == sum(p.numel() for p in build_model("tiny", num_classes=3).parameters())
    expected = build_model("tiny", num_classes=3).features[0]
    store = ArrayStore(data)
    images = torch.from_numpy(store.load()[:70]).permute(0, 3, 1, 2).float()  # of the report split, scaled as it is
    whiten_(expected, images)
    torch.testing.assert_close(nets["frozen"], expected.weight.detach(), rtol=1e-5, atol=1e-7)
    assert 0 < (nets["init"] - nets["frozen"]).abs().max() < 0.1  # moved a little
    assert not torch.allclose(nets["none"], nets["init"], atol=0.1)


def test_whitening_filters_are_of_images_of_all_classes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    labels = np.repeat(np.arange(4), 200)  # class by class, as folders are converted
    images = np.broadcast_to((80 * labels).astype(np.uint8)[:, None, None, None], (800, 20, 20, 3))
    convert_arrays(tmp_path / "sorted", images, labels, splits={"train": range(600), "test": range(600, 800)})
    given: list[torch.Tensor] = []

    def some(loader: Loader) -> torch.Tensor:
        given.append(first_images(loader, 50))
        return given[-1]

    monkeypatch.setattr("fastcifar.job.first_images", some)
    fit(config(str(tmp_path / "sorted"), split="full", epochs=1, change=("scaling=raw",), out=Path("run")))
    assert set(given[0].flatten(1).mean(1).tolist()) == {0.0, 80.0, 160.0}


def test_momentum_of_every_norm_is_the_recipes(data: str) -> None:
    model = build_model("tiny", num_classes=3)
    recipe = dataclasses.replace(RECIPES["fast"], norm_momentum=0.3)
    Trainer(model, recipe, runtime.choose(TrainConfig(device="cpu")), steps=1)
    norms = [module for module in model.modules() if isinstance(module, torch.nn.BatchNorm1d | torch.nn.BatchNorm2d)]
    assert [norm.momentum for norm in norms] == [0.3] * 5


def test_test_time_augmentation_is_a_mean_over_views() -> None:
    images = torch.arange(3 * 4.0).reshape(1, 1, 3, 4)
    weights = torch.linspace(-1, 1, 12).reshape(3, 4) ** 3

    def predict(views: torch.Tensor) -> torch.Tensor:
        assert views.shape == images.shape
        return (views * weights).sum((2, 3)).tanh()

    def both(view: torch.Tensor) -> torch.Tensor:
        return (predict(view) + predict(view.flip(3))) / 2

    plain = predict(images)
    torch.testing.assert_close(tta_logits(predict, images, plain, "flip"), both(images))
    up = images[:, :, [1, 0, 1]][..., [1, 0, 1, 2]]  # what was at (0, 0) is at (1, 1), mirrored at the border
    down = images[:, :, [1, 2, 1]][..., [1, 2, 3, 2]]
    expected = both(images) / 2 + both(up) / 4 + both(down) / 4
    torch.testing.assert_close(tta_logits(predict, images, plain, "shift"), expected)


def test_sigterm_saves_too(data: str) -> None:
    with pytest.raises(StoppedError, match="SIGTERM") as caught:
        fit(config(data, out=Path("run")), reporter=StopAfter(2, signal.SIGTERM))
    assert caught.value.exit_status == 143
    assert checkpoint.load_newest(Path("run/checkpoints")).step == 2


def test_a_finished_run_resumes_to_its_end_at_once(data: str) -> None:
    first = fit(config(data, out=Path("run")))
    again = fit(TrainConfig(resume=Path("run")))
    assert again.history == first.history
    assert again.test.confusion == first.test.confusion


def test_resuming_keeps_the_runs_options(data: str) -> None:
    fit(config(data, out=Path("run")))
    with pytest.raises(ConfigError, match="epochs 9 differs from the run's 2"):
        fit(TrainConfig(resume=Path("run"), epochs=9))
    with pytest.raises(CheckpointError, match=r"nowhere is not a run: config\.json: No such file"):
        fit(TrainConfig(resume=Path("nowhere")))
    stored = json.loads(Path("run/config.json").read_text())
    stored["recipe"]["lr"] = 0.123
    Path("run/config.json").write_text(json.dumps(stored))
    with pytest.raises(CheckpointError, match="is of other options"):
        fit(TrainConfig(resume=Path("run")))
    Path("run/config.json").write_text("{")
    with pytest.raises(CheckpointError, match=r"config\.json is damaged"):
        fit(TrainConfig(resume=Path("run")))


def test_the_runs_own_amp_dtype_may_be_given_again(data: str) -> None:
    with pytest.raises(StoppedError):
        fit(config(data, amp=True, amp_dtype="bfloat16", out=Path("run")), reporter=StopAfter(2))
    with pytest.raises(ConfigError, match="amp_dtype 'float16' differs from the run's 'bfloat16'"):
        fit(TrainConfig(resume=Path("run"), amp_dtype="float16"))
    assert main(["train", "--resume", "run", "--amp-dtype", "bfloat16"]) == 0


def test_a_checkpoint_of_another_net_is_refused(data: str, monkeypatch: pytest.MonkeyPatch) -> None:
    fit(config(data, out=Path("run")))
    monkeypatch.setitem(ARCHS, "tiny", Arch(blocks=((4,), (4,), (4,), (6,)), hidden=(8,)))
    with pytest.raises(CheckpointError, match=r"another net: .* has shape"):
        fit(TrainConfig(resume=Path("run")))
    monkeypatch.setitem(ARCHS, "tiny", Arch(blocks=((4,), (4,), (4,), (4,)), hidden=()))
    with pytest.raises(CheckpointError, match=r"another net: classifier\.\d"):
        fit(TrainConfig(resume=Path("run")))


def test_evaluation_moves_nothing_and_counts_each_image_once(data: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fastcifar.evaluation._BATCH", 16)  # 40 images: a padded last batch
    store = ArrayStore(data)
    torch.manual_seed(0)
    model = build_model("tiny", num_classes=3).train()
    frozen = model.features[2].eval()  # type: ignore[index,operator,union-attr]
    rt = runtime.choose(TrainConfig(device="cpu"))
    loader = eval_loader(store, "report/test", RECIPES["report"], rt)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    found = evaluate(model, loader, rt)
    assert_equal(before, model.state_dict())
    assert model.training
    assert [module for module in model.modules() if not module.training] == [frozen]
    model.eval()
    images = torch.from_numpy(store.load()[100:140]).permute(0, 3, 1, 2).float()
    logits, labels = model(images), torch.from_numpy(store.labels[100:140])
    assert found.loss == pytest.approx(torch.nn.functional.cross_entropy(logits, labels).item(), rel=1e-5)
    assert torch.equal(found.labels, labels)
    assert torch.equal(found.predictions, logits.argmax(1))
    assert found.accuracy == (logits.argmax(1) == labels).sum().item() / 40


@pytest.mark.parametrize(("tta", "passes"), [("none", 3), ("flip", 6), ("shift", 18)])
def test_a_stop_is_seen_before_the_next_pass(data: str, tta: Tta, passes: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """One pass may take seconds, and test-time augmentation makes six of them for a batch."""
    monkeypatch.setattr("fastcifar.evaluation._BATCH", 16)
    rt, model = runtime.choose(TrainConfig(device="cpu")), build_model("tiny", num_classes=3)
    stop: StopRequest | None = None
    seen: list[object] = []
    loader = eval_loader(ArrayStore(data), "report/test", RECIPES["report"], rt)

    def forwarded(*_: object) -> None:
        seen.append(stop)
        if stop is not None and len(seen) == 2:
            stop.ask()

    model.register_forward_hook(forwarded)
    evaluate(model, loader, rt, tta=tta)
    assert len(seen) == passes
    seen.clear()
    stop = StopRequest()
    with pytest.raises(StopSeenError):
        evaluate(model, loader, rt, tta=tta, stop=stop)
    assert len(seen) == 2


def test_warming_up_leaves_the_net_as_it_was() -> None:
    torch.manual_seed(0)
    rt = runtime.choose(TrainConfig(device="cpu"))
    recipe = dataclasses.replace(RECIPES["fast"], averaging="lookahead", resolutions=((17, 0.3), (19, 0.3)))
    trainer = Trainer(build_model("tiny", num_classes=3), recipe, rt, steps=10)
    trainer.step = 3  # the first size is behind it, but for its epoch's evaluation
    images, labels = torch.rand(8, 3, 20, 20), torch.arange(8) % 3
    seen: list[tuple[bool, int]] = []
    trainer.model.register_forward_hook(lambda net, inputs, _: seen.append((net.training, inputs[0].shape[2])))
    before = {name: tensor.clone() for name, tensor in trainer.model.state_dict().items()}
    trainer.warm_up([Batch(images, labels)], images)
    assert seen == [(True, 19), (True, 20), (False, 17), (False, 19), (False, 20)]
    assert_equal(before, trainer.model.state_dict())
    assert_equal(before, trainer.weights())
    assert all(parameter.grad is None for parameter in trainer.model.parameters())
    assert trainer.model.training
    assert (trainer.step, trainer.totals.read()[2], trainer.optimizer.state_dict()["state"]) == (3, 0, {})


def test_stages_of_resolution_come_in_order_then_the_images_own(data: str, monkeypatch: pytest.MonkeyPatch) -> None:
    sizes: list[tuple[int, ...]] = []
    recipe = dataclasses.replace(RECIPES["fast"], resolutions=((17, 0.5), (20, 0.2)), tta="none")
    monkeypatch.setitem(RECIPES, "low", recipe)
    forward = torch.nn.Module.__call__

    evaluated: list[tuple[int, ...]] = []

    def spy(self: torch.nn.Module, *arguments: Any, **options: Any) -> Any:
        if type(self).__name__ == "ConvNet":
            (sizes if self.training else evaluated).append(tuple(arguments[0].shape[2:]))
        return forward(self, *arguments, **options)

    monkeypatch.setattr(torch.nn.Module, "__call__", spy)
    fit(config(data, recipe="low", epochs=3, batch_size=50, out=Path("run")))
    assert sizes == [(17, 17)] * 3 + [(20, 20)] + [(22, 22)] * 2  # two steps an epoch
    assert evaluated == [(17, 17), (20, 20), (22, 22)]  # as each one's last step; the last is the test's too
    evaluated.clear()
    monkeypatch.setitem(RECIPES, "low", dataclasses.replace(recipe, resolutions=((17, 1.0),)))
    fit(config(data, recipe="low", epochs=3, batch_size=50, out=Path("all-low")))
    assert evaluated == [(17, 17)] * 3 + [(22, 22)]
    sizes.clear()
    monkeypatch.setitem(RECIPES, "low", dataclasses.replace(recipe, resolutions=((22, 0.5), (32, 0.5))))
    fit(config(data, recipe="low", epochs=1, batch_size=50, out=Path("own")))
    assert sizes == [(22, 22)] * 2


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"resolutions": ((16, 0.5),)}, "these nets take images of 17 to 32 pixels a side, got 16 x 16"),
        ({"averaging": "ema", "averaging_every": 13}, "averaging_every 13 is more than the run's 12 steps"),
    ],
)
def test_a_recipe_that_does_not_fit_the_data_is_refused(
    data: str, monkeypatch: pytest.MonkeyPatch, change: dict[str, Any], message: str
) -> None:
    monkeypatch.setitem(RECIPES, "changed", dataclasses.replace(RECIPES["fast"], **change))
    with pytest.raises(ConfigError, match=message):
        fit(config(data, recipe="changed", out=Path("run")))
    assert not Path("run").exists()


def test_a_run_that_diverges_stops_and_keeps_the_last_good_checkpoint(
    data: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    rates = iter([0.01] * 6 + [float("nan")] * 100)  # so the sixth's weights are the last good ones
    monkeypatch.setattr("fastcifar.trainer.learning_rate", lambda recipe, step, steps: next(rates))
    with pytest.raises(
        DivergedError, match=r"the training loss became nan at step 8 of 24, in epoch 2 \(.* more tensors not finite\)"
    ) as caught:
        fit(config(data, epochs=4, out=Path("run")))
    assert caught.value.exit_status == 3
    found = checkpoint.load_newest(Path("run/checkpoints"))
    assert found.state["epoch"] == 1
    assert all(torch.isfinite(tensor).all() for tensor in found.model.values() if tensor.is_floating_point())


def test_weights_that_are_not_finite_are_never_saved(data: str, monkeypatch: pytest.MonkeyPatch) -> None:
    steps = Trainer.step_no_sync

    def poison(self: Trainer, *arguments: Any, **options: Any) -> None:
        steps(self, *arguments, **options)
        if self.step == 8:  # the last step of epoch 2: its loss is finite still
            with torch.no_grad():
                next(self.model.parameters())[0, 0, 0, 0] = float("nan")

    monkeypatch.setattr(Trainer, "step_no_sync", poison)
    with pytest.raises(DivergedError, match=r"at step 8 of 12, in epoch 2 \(features\.0\.weight not finite\)"):
        fit(config(data, epochs=3, split="report", out=Path("run")))
    assert checkpoint.load_newest(Path("run/checkpoints")).state["epoch"] == 1


def test_reported_losses_are_free_of_label_smoothing(data: str, monkeypatch: pytest.MonkeyPatch) -> None:
    still = dataclasses.replace(RECIPES["fast"], lr=1e-30, resolutions=(), label_smoothing=0.0)
    losses = []
    moving: list[tuple[torch.Tensor, torch.Tensor, torch.Tensor]] = []  # logits, labels and the loss that is minimised
    real = Trainer._loss

    def loss(
        self: Trainer, images: torch.Tensor, labels: torch.Tensor, size: int | None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        logits, found = real(self, images, labels, size)
        moving.append((logits.detach(), labels, found.detach()))
        return logits, found

    monkeypatch.setattr(Trainer, "_loss", loss)
    for smoothing in (0.0, 0.5):
        moving.clear()
        monkeypatch.setitem(RECIPES, "still", dataclasses.replace(still, label_smoothing=smoothing))
        result = fit(config(data, recipe="still", epochs=1, out=Path(f"run-{smoothing}")))
        losses.append(result.history[0].train_loss)
        assert len(moving) == 6
        for logits, labels, found in moving:
            assert torch.equal(found, torch.nn.functional.cross_entropy(logits, labels, label_smoothing=smoothing))
    assert losses[0] == losses[1]


def test_a_run_whose_record_cannot_be_written_stops(data: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*arguments: Any, **options: Any) -> None:
        raise OSError(28, "No space left on device", "somewhere")

    monkeypatch.setattr("fastcifar.figures.write_figures", fail)
    with pytest.raises(OutputError, match="somewhere cannot be written: No space left"):
        fit(config(data, out=Path("run")))
    monkeypatch.setattr("fastcifar.reporter.publish_bytes", fail)
    with pytest.raises(OutputError, match=r"metrics\.jsonl cannot be written: No space left"):
        fit(config(data, out=Path("other")))
    assert not Path("other").exists()


def test_too_little_memory_is_said(data: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*arguments: Any, **options: Any) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB. More words")

    monkeypatch.setattr(Trainer, "step_no_sync", fail)
    with pytest.raises(FastcifarError, match=r"too little memory \(CUDA out of memory\): try a smaller --batch-size"):
        fit(config(data, out=Path("run")))
    assert not Path("run").exists()


def test_too_little_memory_of_a_cpu_is_said(data: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*arguments: Any, **options: Any) -> None:
        raise RuntimeError(
            "[enforce fail] . DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes. X"
        )

    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "step_no_sync", fail)
        message = r"cpu has too little memory \(can't allocate memory: you tried to allocate 9 bytes\): try a smaller"
        with pytest.raises(FastcifarError, match=message):
            fit(config(data, out=Path("run")))
    assert not Path("run").exists()
    fit(config(data, out=Path("run")))
    monkeypatch.setattr("fastcifar.engine.evaluate", fail)
    with pytest.raises(FastcifarError, match="too little memory"):
        evaluate_run(Path("run"), device="cpu")


def test_a_last_stage_of_the_images_own_size_is_the_test(data: str) -> None:
    result = fit(config(data, split="full", change=("resolutions=17:0.5,32:0.5",), out=Path("run")))
    assert result.history[-1].eval_seconds == result.test.seconds  # made once


def test_a_run_that_begins_in_the_same_second_has_another_folder(data: str, monkeypatch: pytest.MonkeyPatch) -> None:
    mkdir, beaten = Path.mkdir, []

    def late(path: Path, *arguments: Any, **options: Any) -> None:
        if path.parent.name == "runs" and not beaten:  # another process makes it first
            beaten.append(path)
            os.makedirs(path)
        mkdir(path, *arguments, **options)

    monkeypatch.setattr(Path, "mkdir", late)
    made = runs.create(config(data), RECIPES["fast"])
    assert made.path == beaten[0].with_name(f"{beaten[0].name}-2")
    assert made.path.is_dir()
    assert beaten[0] not in made.made


def restarted(monkeypatch: pytest.MonkeyPatch) -> None:
    """As by torchrun, after a process of the run had ended."""
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "1")
    monkeypatch.setenv("TORCHELASTIC_MAX_RESTARTS", "3")


def test_a_restart_leaves_a_run_that_another_process_trains(data: str, monkeypatch: pytest.MonkeyPatch) -> None:
    other = runs.create(config(data, out=Path("run")), resolve(config(data)))
    with other.claimed(new=True):
        other.write({}, resumed=False)
        before = sorted(Path("run").rglob("*"))
        restarted(monkeypatch)
        with pytest.raises(OutputError, match="run is in use: another process is working on it"):
            fit(config(data, out=Path("run")))
        assert sorted(Path("run").rglob("*")) == before


def test_a_restart_leaves_the_folder_of_several_runs(data: str, monkeypatch: pytest.MonkeyPatch) -> None:
    fit_seeds(config(data, out=Path("all"), epochs=1), (0,))
    before = {path: path.read_bytes() for path in Path("all").rglob("*") if path.is_file()}
    restarted(monkeypatch)
    with pytest.raises(OutputError, match="'all' is not empty: resume it"):
        fit(config(data, out=Path("all"), epochs=1))
    assert {path: path.read_bytes() for path in Path("all").rglob("*") if path.is_file()} == before


@pytest.mark.parametrize("left", ["config.json", ".tmp-config.json-0123456789abcdef"])
def test_a_restart_begins_anew_where_a_kill_left_the_folders_beginning(
    data: str, left: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = runs.create(config(data, out=Path("run"), epochs=1), resolve(config(data, epochs=1)))
    (run.path / ".lock").touch()
    (run.path / left).write_text(json.dumps(run.config_json()))
    restarted(monkeypatch)
    fit(config(data, out=Path("run"), epochs=1))
    assert checkpoint.saved(run.checkpoints)
    assert not [*run.path.glob(".tmp-*")]


def test_what_cannot_be_compiled_is_said(data: str, monkeypatch: pytest.MonkeyPatch) -> None:
    from torch._dynamo.exc import TorchDynamoException

    def fail(*arguments: Any, **options: Any) -> None:
        raise TorchDynamoException("no C++ compiler\n\nmore")

    monkeypatch.setattr(Trainer, "warm_up", fail)
    with pytest.raises(ConfigError, match=r"cannot be compiled here \(no C\+\+ compiler more\): use --compile off"):
        fit(config(data, compile="on", out=Path("run")))
    assert not Path("run").exists()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"arch": "huge"}, "unknown arch 'huge': choose from big, fast, small"),
        ({"recipe": "slow"}, "unknown recipe 'slow'"),
        ({"batch_size": 71, "recipe": "fast", "split": "report"}, "batch_size 71 is more than the 70 training images"),
        ({"batch_size": 23, "recipe": "report"}, "batch_size 23 leaves one of 70 images over"),
        ({"dataset": "nothing"}, "unknown dataset 'nothing'"),
    ],
)
def test_a_wrong_option_leaves_no_folder(data: str, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        fit(config(data, **{"out": Path("run"), **options}))
    assert not Path("run").exists()


def test_an_output_folder_that_cannot_be_used_is_said(data: str) -> None:
    Path("file").write_text("")
    with pytest.raises(OutputError, match="'file/run' cannot be written"):
        fit(config(data, out=Path("file/run")))
    Path("full").mkdir()
    Path("full/mine.txt").write_text("precious")
    with pytest.raises(OutputError, match="'full' is not empty"):
        fit(config(data, out=Path("full")))
    assert Path("full/mine.txt").read_text() == "precious"


def test_runs_without_a_name_get_one_each(data: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("time.strftime", lambda form: "20260101-000000")
    paths = [fit(config(data, epochs=1)).path for _ in range(2)]
    assert [path.name for path in paths] == ["bright-tiny-fast-20260101-000000", "bright-tiny-fast-20260101-000000-2"]


def test_the_engines_names_are_the_designs() -> None:
    assert {"fit", "train_epoch", "evaluate"} <= set(engine.__all__)
    assert engine.FitResult is job.FitResult


def test_a_store_without_test_images_is_refused_before_training(tmp_path: Path) -> None:
    images = np.random.default_rng(0).integers(0, 256, (40, 32, 32, 3), np.uint8)
    convert_arrays(tmp_path / "store", images, np.arange(40) % 4)
    for split in ("full", "holdout"):
        with pytest.raises(ConfigError, match=f"has no test images in split '{split}'"):
            fit(TrainConfig(arch="small", dataset=str(tmp_path / "store"), split=split, batch_size=4))


def test_compiling_the_fused_layers_is_in_no_epoch(data: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """They are there before the first step asks for them."""
    asked: list[str] = []
    monkeypatch.setattr(norms, "prepare", lambda: asked.append("prepare"))
    monkeypatch.setattr(norms, "fits", lambda values, norm: bool(asked.append("fits")))
    fit(config(data, arch="small", epochs=1, out=Path("run")))
    assert asked[0] == "prepare"
    assert "fits" in asked
