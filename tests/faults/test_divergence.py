"""NaN and infinity from anywhere, at any step: the run ends with status 3, says where, and saves none of it."""

import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from fastcifar import checkpoint, trainer
from fastcifar.commands import main
from fastcifar.config import TrainConfig
from fastcifar.engine import fit
from fastcifar.errors import DivergedError, StoppedError
from fastcifar.job import FitResult
from fastcifar.metrics import LossNotFiniteError, LossWatch, Totals, not_finite
from fastcifar.reporter import Reporter
from fastcifar.trainer import Trainer
from tests.effort import effort
from tests.faults import tiny_runs
from tests.test_engine import StopAfter

STEPS = 6
VALUES = (math.nan, math.inf, -math.inf)


@pytest.fixture(autouse=True)
def _place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    tiny_runs.prepare(monkeypatch, tmp_path)
    with tiny_runs.one_thread():
        yield


def in_images(patch: pytest.MonkeyPatch, when: Callable[[int], bool], value: float) -> None:
    real = Trainer.step_no_sync

    def step(self: Trainer, images: Tensor, labels: Tensor) -> None:
        images = images.clone()
        if when(self.step + 1):
            images[-1, 1, 7, 5] = value
        real(self, images, labels)

    patch.setattr(Trainer, "step_no_sync", step)


def in_a_weight(patch: pytest.MonkeyPatch, when: Callable[[int], bool], value: float) -> None:
    real = Trainer.step_no_sync

    def step(self: Trainer, *batch: Tensor) -> None:
        if when(self.step + 1):
            with torch.no_grad():
                dict(self.model.named_parameters())["classifier.1.weight"][0, 0] = value
        real(self, *batch)

    patch.setattr(Trainer, "step_no_sync", step)


def in_a_gradient(patch: pytest.MonkeyPatch, when: Callable[[int], bool], value: float) -> None:
    real = Trainer.__init__

    def init(self: Trainer, *arguments: Any, **options: Any) -> None:
        real(self, *arguments, **options)
        weight = dict(self.model.named_parameters())["classifier.1.weight"]
        weight.register_hook(lambda gradient: gradient + value if when(self.step + 1) else gradient)

    patch.setattr(Trainer, "__init__", init)


def in_the_loss(patch: pytest.MonkeyPatch, when: Callable[[int], bool], value: float) -> None:
    real = Trainer._loss

    def loss(self: Trainer, *arguments: Any) -> tuple[Tensor, Tensor]:
        logits, found = real(self, *arguments)
        return logits, found * value if when(self.step + 1) else found

    patch.setattr(Trainer, "_loss", loss)


PLACES = {
    in_images: r"features\.\S+ and \d+ more tensors not finite",
    in_a_weight: r"classifier\.\S+ and \d+ more tensors not finite",
    in_a_gradient: r"\S+ and \d+ more tensors not finite",
    in_the_loss: "all weights are finite still",
}


def assert_finite(folder: Path) -> None:
    for path in checkpoint.saved(folder):
        found = checkpoint._load(path, ())
        for name, tensor in {**found.model, **found.training}.items():
            assert bool(tensor.isfinite().all()), f"{name} in {path}"


@pytest.mark.parametrize("place", PLACES)
def test_the_step_is_named_and_nothing_of_it_saved(place: Callable[..., None]) -> None:
    fit(tiny_runs.config("undisturbed"))
    expected = tiny_runs.weights(Path("undisturbed"))
    for number, step in enumerate([step for step in range(1, STEPS + 1) for _ in VALUES[: effort(1)]]):
        value, run = VALUES[(number + step) % 3], Path(f"run-{number}")
        with pytest.MonkeyPatch.context() as patch, pytest.raises(DivergedError) as caught:
            place(patch, lambda now, step=step: now == step, value)
            fit(tiny_runs.config(str(run)))
        message = str(caught.value)
        # a gradient is in the weights by the time that a loss, or the end of an epoch, tells
        late = place is in_a_gradient and step % 3 != 0
        assert f"at step {step + late} of {STEPS}, in epoch {(step + late - 1) // 3 + 1} (" in message
        assert caught.value.exit_status == 3
        assert caught.match(PLACES[place])
        saved = step > 3
        assert message.endswith(f": try a lower --lr; the last good checkpoint is in {run}/checkpoints") == saved
        assert message.endswith(": try a lower --lr") != saved
        assert run.exists() == saved
        if saved:
            assert_finite(run / "checkpoints")
            assert checkpoint.load_newest(run / "checkpoints").step == 3
            fit(TrainConfig(resume=run))
            assert tiny_runs.equal(tiny_runs.weights(run), expected)


def test_the_command_ends_with_status_3_and_one_line(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    in_the_loss(monkeypatch, lambda step: step == 5, math.inf)
    options = {"arch": "tiny", "split": "report", "epochs": "2", "batch-size": "16", "dataset": "data", "out": "run"}
    assert main(["train", "--device", "cpu", *(f"--{name}={value}" for name, value in options.items())]) == 3
    error = capfd.readouterr().err
    assert error.startswith("fastcifar: the training loss became inf at step 5 of 6, in epoch 2 (")
    assert error.endswith("the last good checkpoint is in run/checkpoints\n")
    assert error.count("\n") == 1


def half(name: str, *, reporter: Reporter | None = None, **options: Any) -> FitResult:
    """A run in float16 with gradient scaling: 24 steps an epoch."""
    return fit(tiny_runs.config(name, amp=True, amp_dtype="float16", batch_size=2, **options), reporter=reporter)


@pytest.mark.parametrize("place", [in_images, in_a_gradient, in_the_loss])
def test_gradient_scaling_lives_through_some(place: Callable[..., None], monkeypatch: pytest.MonkeyPatch) -> None:
    kept: list[bool] = []
    real = Trainer.step_no_sync

    def step(self: Trainer, *batch: Tensor) -> None:
        before = {name: tensor.detach().clone() for name, tensor in self.model.named_parameters()}
        real(self, *batch)
        kept.append(all(torch.equal(tensor, before[name]) for name, tensor in self.model.named_parameters()))

    monkeypatch.setattr(Trainer, "step_no_sync", step)
    if place is in_images:  # the norms' statistics would keep it
        monkeypatch.setattr(torch.nn.BatchNorm2d, "train", lambda self, mode=True: torch.nn.Module.train(self, False))
        monkeypatch.setattr(torch.nn.BatchNorm1d, "train", lambda self, mode=True: torch.nn.Module.train(self, False))
    place(monkeypatch, lambda now: now in (5, 6, 30), math.nan)
    result = half("run")
    skipped = {number for number, same in enumerate(kept, 1) if same}
    assert skipped >= {5, 6, 30}
    assert len(skipped) <= 6  # some overflow by themselves
    assert all(math.isfinite(stats.train_loss) and stats.train_loss > 0.1 for stats in result.history)
    assert_finite(Path("run/checkpoints"))


@pytest.mark.parametrize("stop", [10, 30])
def test_the_scale_goes_on_where_it_was(monkeypatch: pytest.MonkeyPatch, stop: int) -> None:
    in_a_gradient(monkeypatch, lambda now: now in (5, 6), math.inf)
    half("through")
    with pytest.raises(StoppedError):
        half("stopped", reporter=StopAfter(stop))
    fit(TrainConfig(resume=Path("stopped")))
    found = tiny_runs.weights(Path("stopped"))
    assert found["scaler.scale"] <= 2.0**14  # it begins at 2**16
    assert tiny_runs.equal(found, tiny_runs.weights(Path("through")))


def test_gradients_that_always_overflow_end_the_run(monkeypatch: pytest.MonkeyPatch) -> None:
    in_a_gradient(monkeypatch, lambda now: True, math.inf)
    with pytest.raises(DivergedError, match=r"gradients overflow at any scale at step 48 of 480, in epoch 2 \(all"):
        half("run", epochs=20)
    assert_finite(Path("run/checkpoints"))


def test_a_loss_that_is_never_finite_ends_the_run(monkeypatch: pytest.MonkeyPatch) -> None:
    in_the_loss(monkeypatch, lambda now: now > 24, math.nan)
    # each halves the scale, so that at the end of the third epoch, before the fiftieth in a row, none is left
    with pytest.raises(DivergedError, match="gradients overflow at any scale at step 72 of 480, in epoch 3"):
        half("run", epochs=20)
    assert checkpoint.load_newest(Path("run/checkpoints")).step == 48
    assert_finite(Path("run/checkpoints"))
    monkeypatch.setattr(trainer, "_SKIPS", 5)
    with pytest.raises(DivergedError, match="the training loss became nan at step 25 of 480, in epoch 2") as caught:
        half("other", epochs=20)
    assert caught.value.exit_status == 3
    assert checkpoint.load_newest(Path("other/checkpoints")).step == 24


def test_an_epoch_without_one_finite_batch_has_no_loss(monkeypatch: pytest.MonkeyPatch) -> None:
    in_images(monkeypatch, lambda now: True, math.nan)
    with pytest.raises(DivergedError, match=r"the training loss became nan at step \d+ of 48"):
        half("run")
    assert not Path("run").exists()


def test_batches_that_are_not_finite_count_nothing_where_their_steps_change_nothing() -> None:
    good, bad, labels = torch.tensor([[0.0, 0.0]]), torch.tensor([[math.nan, 0.0]]), torch.tensor([0])
    totals, strict = Totals(torch.device("cpu"), lenient=True), Totals(torch.device("cpu"))
    for logits in (good, bad, good):
        totals.add_no_sync(logits, labels)
        strict.add_no_sync(logits, labels)
    loss, accuracy, samples = totals.read()
    assert (loss, accuracy, samples) == (pytest.approx(math.log(2)), 1.0, 2)
    assert math.isnan(strict.read()[0])


def watch(patience: int, *losses: float, every: int = 1) -> tuple[int, float] | None:
    """The step and the loss that a watch which looks after every so many steps complains of."""
    found = LossWatch(patience)
    try:
        for step, loss in enumerate(losses, 1):
            found.add_no_sync(step, torch.tensor(loss))
            if step % every == 0:
                found.check()
        found.check()
    except LossNotFiniteError as error:
        return error.step, error.loss
    return None


NAN, INF = math.nan, math.inf


@pytest.mark.parametrize("every", [1, 2, 3, 100])
def test_a_watch_knows_where_a_row_of_bad_losses_began(every: int) -> None:
    assert watch(1, 1.0, 2.0, 0.0, every=every) is None
    assert watch(1, 1.0, INF, 2.0, every=every) == (2, INF)
    assert watch(1, -INF, NAN, every=every) == (1, -INF)
    assert watch(3, 1.0, INF, NAN, INF, 1.0, every=every) == (2, INF)
    assert watch(3, INF, NAN, 1.0, INF, INF, every=every) is None  # a finite one ends the row
    assert watch(3, INF, 1.0, -INF, INF, NAN, NAN, every=every) == (3, -INF)
    assert watch(2, every=every) is None


def test_a_watch_takes_losses_of_any_precision() -> None:
    for dtype in (torch.float64, torch.bfloat16, torch.float16):
        found = LossWatch()
        for step in (1, 2):
            found.add_no_sync(step, torch.tensor(1.0, dtype=dtype, requires_grad=True))
        found.check()
        found.add_no_sync(3, torch.tensor(INF, dtype=dtype))
        with pytest.raises(LossNotFiniteError, match="inf at step 3"):
            found.check()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("value", VALUES)
def test_tensors_that_are_not_finite_are_named(dtype: torch.dtype, value: float) -> None:
    largest = torch.full((2, 3), torch.finfo(dtype).max, dtype=dtype)  # whose sum overflows
    good = {
        "largest": largest,
        "least": -largest,
        "empty": torch.empty(0, dtype=dtype),
        "scalar": torch.tensor(1.0, dtype=dtype),
        "integers": torch.tensor([2**62, -1]),
        "flags": torch.tensor([True]),
        "other": torch.zeros(3, dtype=torch.float64),
    }
    assert not_finite({}) == []
    assert not_finite({"empty": good["empty"]}) == []
    assert not_finite(good) == []
    for index in range(6):
        bad = torch.zeros(2, 3, dtype=dtype)
        bad.view(-1)[index] = value
        assert not_finite({"first": bad, **good}) == ["first"]
        assert not_finite({**good, "last": bad, "too": torch.tensor(value, dtype=dtype)}) == ["last", "too"]
