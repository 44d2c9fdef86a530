"""A run whose table is made again: which checkpoint it is of, where its store is now, and classes without images."""

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import torch

import fastcifar
from fastcifar.ablation import ablate
from fastcifar.commands import main
from fastcifar.config import TrainConfig
from fastcifar.data.arrays import convert_arrays
from fastcifar.engine import evaluate_run, fit
from fastcifar.errors import CheckpointError, ConfigError, DataError, FastcifarError, StoppedError
from fastcifar.evaluation import Evaluation, mistakes
from fastcifar.nets import ARCHS, Arch, FastArch
from fastcifar.reporter import NullReporter
from fastcifar.seeds import fit_seeds
from fastcifar.signals import request_stop


@pytest.fixture(autouse=True)
def _tiny(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setitem(ARCHS, "tiny", Arch(blocks=((4,), (4,), (4,), (4,)), hidden=(8,)))
    monkeypatch.chdir(tmp_path)


def store(name: str = "mine", *, tested: int = 3, seed: int = 0) -> str:
    """Of three classes, of which the first `tested` have test images; 48 to train on."""
    generator = np.random.default_rng(seed)
    labels = np.concatenate([np.arange(48) % 3, np.arange(30) % tested])
    images = (generator.integers(0, 60, (78, 20, 20, 3)) + 70 * labels[:, None, None, None]).astype(np.uint8)
    parts = {"train": slice(0, 48), "test": slice(48, 78)}
    convert_arrays(name, images, labels, splits=parts, classes=["dark", "grey", "bright"])
    return name


def config(data: str, **options: Any) -> TrainConfig:
    return TrainConfig(**{"arch": "tiny", "dataset": data, "epochs": 2, "batch_size": 16, "device": "cpu", **options})


class Heard(NullReporter):
    """What it was told; asks for a stop after so many steps."""

    def __init__(self, steps: int = -1) -> None:
        self.left, self.messages = steps, list[str]()

    def train_step(self, step: int, steps: int, images_per_second: float) -> None:
        self.left -= 1
        if self.left == 0:
            request_stop()

    def message(self, text: str) -> None:
        self.messages.append(text)


def test_it_says_which_checkpoint_it_is_of() -> None:
    with pytest.raises(StoppedError):
        fit(config(store(), out=Path("run")), reporter=Heard(steps=4))
    heard = Heard()
    evaluate_run(Path("run"), device="cpu", reporter=heard)
    assert heard.messages == ["checkpoint of step 4, after 1 of 2 epochs: the run is not finished"]
    fit(TrainConfig(resume=Path("run")))
    heard = Heard()
    evaluate_run(Path("run"), device="cpu", reporter=heard)
    assert heard.messages == ["checkpoint of step 6, after 2 of 2 epochs"]


def test_a_store_that_was_moved_is_named_where_it_is(capfd: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(StoppedError):
        fit(config(store(), out=Path("run")), reporter=Heard(steps=4))
    shutil.move("mine", "moved")
    message = rf"{Path.cwd()}/mine is not the store that it was: put it back, or name its new place with --data"
    for go_on in (lambda: evaluate_run(Path("run"), device="cpu"), lambda: fit(TrainConfig(resume=Path("run")))):
        with pytest.raises(DataError, match=message):
            go_on()
    other = Path(store("other", seed=1))
    with pytest.raises(DataError, match=message):
        fit(TrainConfig(resume=Path("run"), data=other))
    Path("empty").mkdir()
    assert main(["evaluate", "run", "--data", "empty"]) == 2
    assert "(empty is not a store: there is no manifest.json in it; " in capfd.readouterr().err.replace(
        f"{Path.cwd()}/", ""
    )
    assert main(["evaluate", "run", "--data", "nowhere"]) == 2
    assert "nowhere: does not exist" in capfd.readouterr().err
    with pytest.raises(ConfigError, match="data 'nowhere' does not exist"):
        fit(TrainConfig(resume=Path("run"), data=Path("nowhere")))
    assert main(["evaluate", "run", "--data", "moved"]) == 0
    assert "checkpoint of step 4" in capfd.readouterr().out
    result = fit(TrainConfig(resume=Path("run"), data=Path("moved")))
    assert len(result.history) == 2
    assert json.loads(Path("run/config.json").read_text())["config"]["data"] == str(Path("moved").absolute())
    heard = Heard()
    with pytest.raises(DataError, match="put it back, or name its new place with --data"):
        evaluate_run(Path("run"), device="cpu", data=other, reporter=heard)
    assert f"{other} holds other data than the run's: it is not used" in heard.messages
    assert evaluate_run(Path("run"), device="cpu").accuracy == result.test.accuracy  # its place is known now


def test_options_that_were_changed_to_resume_are_kept() -> None:
    data = store()
    options: dict[str, Any] = {"out": Path("run"), "epochs": 6, "eval_every": 5}
    with pytest.raises(StoppedError):
        fit(config(data, **options), reporter=Heard(steps=2))
    with pytest.raises(StoppedError):
        fit(TrainConfig(resume=Path("run"), eval_every=2), reporter=Heard(steps=2))
    assert json.loads(Path("run/config.json").read_text())["config"]["eval_every"] == 2
    result = fit(TrainConfig(resume=Path("run")))
    assert [stats.epoch for stats in result.history if stats.eval_loss is not None] == [2, 4, 6]


def test_a_class_without_test_images_has_no_accuracy(capfd: pytest.CaptureFixture[str]) -> None:
    result = fit(config(store(tested=2), out=Path("run")))
    assert np.isnan(result.test.class_accuracies).tolist() == [False, False, True]
    assert result.test.confusion[2] == (0.0, 0.0, 0.0)
    test = json.loads(Path("run/metrics.jsonl").read_text().splitlines()[-1])
    assert test["class_accuracies"][2] is None
    assert "<td>bright</td><td>-</td>" in Path("run/report.html").read_text()
    assert main(["evaluate", "run"]) == 0
    assert "\nbright        -\n" in capfd.readouterr().out


@pytest.mark.parametrize(("wrong", "shown"), [(0, 0), (1, 1), (40, 40), (55, 40)])
def test_mistakes_are_those_of_all_the_data(tmp_path: Path, wrong: int, shown: int) -> None:
    images = np.random.default_rng(0).integers(0, 256, (60, 8, 8, 3), np.uint8)
    labels = np.arange(60) % 3
    own = convert_arrays(tmp_path / "s", images, labels, classes=("a", "b", "c"))
    predictions = torch.from_numpy(labels)
    predictions = torch.where(torch.arange(60) >= 60 - wrong, (predictions + 1) % 3, predictions)
    found = Evaluation(
        loss=0.0,
        accuracy=0.0,
        seconds=0.0,
        predictions=predictions,
        labels=torch.from_numpy(labels),
        tta="none",
        tta_accuracy=None,
    )
    made = mistakes(found, own.split("train"), own.classes)
    assert (made.wrong, len(made.images)) == (wrong, shown)
    places = [int(np.flatnonzero((images == image).all((1, 2, 3)))[0]) for image in made.images]
    assert len(set(places)) == shown
    assert places == sorted(places)
    if wrong:
        assert (places[0], places[-1]) == (60 - wrong, 59 if wrong > 1 else 60 - wrong)
    assert made.truth == tuple("abc"[place % 3] for place in places)
    assert made.taken_for == tuple("abc"[(place + 1) % 3] for place in places)


def test_several_runs_are_no_run() -> None:
    fit_seeds(config(store(), out=Path("all"), epochs=1), [3])
    with pytest.raises(CheckpointError, match=r"^all holds several runs: name one of them, such as all/seed-3$"):
        evaluate_run(Path("all"))


def test_the_runs_of_an_ablation_are_named() -> None:
    ablate(config(store(), out=Path("all"), epochs=1), seeds=[3], variants=["lr=0.01"])
    with pytest.raises(CheckpointError, match=r"^all holds several runs: name one of them, such as all/0-base/seed-3$"):
        fastcifar.load_model("all")


def test_a_net_is_loaded_from_its_run_alone() -> None:
    result = fit(config(store(), out=Path("run")))
    images, labels = fastcifar.Loader("mine", split="test", batch_size=30, order="sequential").batch(0, 0)
    shutil.rmtree("mine")
    torch.manual_seed(7)
    before = torch.get_rng_state()
    model = fastcifar.load_model("run")
    assert torch.equal(torch.get_rng_state(), before)
    assert not model.training
    assert all(tensor.device.type == "cpu" for tensor in model.state_dict().values())
    with torch.no_grad():
        right = (model(images).argmax(1) == labels).double().mean().item()
    assert right == pytest.approx(result.test.accuracy)
    assert model.features[0].weight.requires_grad  # type: ignore[index]


def test_a_grey_net_of_any_arch_is_loaded_as_it_was(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(ARCHS, "tiny", FastArch(patterns=3, widths=(4, 4)))
    grey = np.random.default_rng(0).integers(0, 256, (40, 20, 20, 1), np.uint8)
    convert_arrays("grey", grey, np.arange(40) % 4, splits={"train": slice(0, 32), "test": slice(32, 40)})
    changes = ("whiten=none", "tta=none", "resolutions=none")
    fit(config("grey", out=Path("run"), epochs=1, change=changes))
    model = fastcifar.load_model(Path("run"))
    (saved,) = Path("run/checkpoints").iterdir()
    weights = safetensors.torch.load_file(saved / "model.safetensors")
    assert {name: tensor.tolist() for name, tensor in model.state_dict().items()} == {
        name: tensor.tolist() for name, tensor in weights.items()
    }
    assert model.features[0].in_channels == 1  # type: ignore[index]
    assert not model.features[4].weight.requires_grad  # type: ignore[index]  # as it was trained


@pytest.mark.parametrize(
    ("place", "message"),
    [("nowhere", "nowhere is not a run: config.json: No such file"), (None, "run must be a folder, got None")],
)
def test_what_is_no_run_has_no_net(place: Any, message: str) -> None:
    with pytest.raises(FastcifarError, match=message):
        fastcifar.load_model(place)
    with pytest.raises(FastcifarError, match=message):
        evaluate_run(place)


def test_another_net_in_a_checkpoint_is_not_loaded(monkeypatch: pytest.MonkeyPatch) -> None:
    fit(config(store(), out=Path("run"), epochs=1))
    monkeypatch.setitem(ARCHS, "tiny", Arch(blocks=((4,), (4,), (4,), (4, 4)), hidden=(8,)))
    with pytest.raises(CheckpointError, match="the checkpoint is of another net: features"):
        fastcifar.load_model("run")


def test_a_split_that_the_store_has_not_is_said() -> None:
    with pytest.raises(ConfigError, match=r"^split report is not one of mine's: choose from full, holdout$"):
        fit(config(store(), recipe="report", out=Path("run")))
    assert not Path("run").exists()


def test_one_class_is_said() -> None:
    images = np.random.default_rng(0).integers(0, 256, (60, 20, 20, 3), np.uint8)
    convert_arrays("one", images, np.zeros(60, np.int64), splits={"train": slice(0, 40), "test": slice(40, 60)})
    result = fit(config("one", out=Path("run")))
    assert result.test.accuracy == 1
    assert "the data have one class" in Path("run/metrics.jsonl").read_text().splitlines()[0]


def test_what_is_there_and_is_no_store_can_be_made_one() -> None:
    Path("pictures").mkdir()
    with pytest.raises(ConfigError, match=r"^dataset 'pictures' is no store: make one of it with fastcifar convert"):
        fit(config("pictures"))
