"""Checkpoints that were cut, flipped, swapped or forged: the newest that is whole is taken, and it is said."""

import hashlib
import json
import pickle
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import torch

from fastcifar import ArrayStore, TrainConfig, checkpoint, evaluate_run, fit
from fastcifar.data.writer import SourceFile, write_store
from fastcifar.errors import CheckpointError, ConfigError
from fastcifar.metrics import EpochStats
from fastcifar.nets import ARCHS, Arch
from fastcifar.reporter import NullReporter, RunSummary
from tests.effort import effort
from tests.faults.tiny_runs import config, equal, one_thread, prepare, weights
from tests.faults.watch import in_a_child, nothing_happens

FILES = ("model.safetensors", "training.safetensors", "manifest.json")
OLD, NEW = "00000003", "00000006"


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a finished run of two epochs, `run`, and its data."""
    folder = tmp_path_factory.mktemp("checkpoints")
    with pytest.MonkeyPatch.context() as patch, one_thread():
        prepare(patch, folder)
        fit(config())
    return folder


@pytest.fixture
def saved(trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The checkpoints of a copy of it, in the working folder."""
    prepare(monkeypatch, tmp_path)
    shutil.copytree(trained / "run", tmp_path / "run")
    return Path("run/checkpoints")


def write_again(folder: Path, change: Callable[[dict[str, Any]], object]) -> None:
    """Change a checkpoint's manifest, and make all digests right again."""
    manifest = json.loads((folder / "manifest.json").read_bytes())
    manifest["files"] = {name: hashlib.sha256((folder / name).read_bytes()).hexdigest() for name in FILES[:2]}
    change(manifest)
    manifest["digest"] = checkpoint._digest(manifest)
    (folder / "manifest.json").write_text(json.dumps(manifest))


def cut(at: float) -> Callable[[Path], object]:
    def damage(path: Path) -> None:
        content = path.read_bytes()
        path.write_bytes(content[: int(at * len(content)) if at < 1 else -1])

    return damage


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 3] ^= 16
    path.write_bytes(content)


def replace_by_folder(path: Path) -> None:
    path.unlink()
    path.mkdir()


def replace_by_pickle(path: Path) -> None:
    path.write_bytes(pickle.dumps({"a": torch.ones(3)}))


FAULTS: dict[str, Callable[[Path], object]] = {
    "emptied": cut(0),
    "cut at a tenth": cut(0.1),
    "cut in the middle": cut(0.5),
    "cut by a byte": cut(1),
    "flipped": flip,
    "missing": Path.unlink,
    "swapped": lambda path: shutil.copy(path.parent.parent / OLD / path.name, path),
    "a folder": replace_by_folder,
    "a pickle": replace_by_pickle,
    "of another kind": lambda path: path.write_bytes(b'{"format": "else"}'),
}


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("fault", FAULTS)
def test_the_newest_that_is_whole_is_taken(saved: Path, name: str, fault: str) -> None:
    FAULTS[fault](saved / NEW / name)
    found = checkpoint.load_newest(saved)
    assert found.path == saved / OLD
    assert found.step == 3
    assert len(found.skipped) == 1
    assert found.skipped[0].startswith(f"skipped checkpoint {saved / NEW}: ")
    assert found.skipped[0].isprintable()
    swapped_manifest = fault == "swapped" and name == "manifest.json"
    assert ("is of step 3" if swapped_manifest else name) in found.skipped[0]
    assert checkpoint.problem(saved / NEW) is not None
    FAULTS["missing"](saved / OLD / "manifest.json")
    with pytest.raises(CheckpointError, match=rf"holds no checkpoint to go on from .*{NEW}: .*{OLD}: ") as caught:
        checkpoint.load_newest(saved)
    assert str(caught.value).isprintable()


class Heard(NullReporter):
    notices: tuple[str, ...] = ()
    epochs = 0

    def start(self, summary: RunSummary, history: Sequence[EpochStats]) -> None:
        self.notices = summary.notices

    def epoch_end(self, stats: EpochStats) -> None:
        self.epochs += 1


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("fault", ["cut in the middle", "flipped", "missing", "swapped", "a folder", "a pickle"])
def test_a_run_goes_on_from_it_to_the_same_weights(trained: Path, saved: Path, name: str, fault: str) -> None:
    FAULTS[fault](saved / NEW / name)
    heard = Heard()
    with one_thread():
        result = fit(TrainConfig(resume=Path("run")), reporter=heard)
    assert heard.epochs == 1
    assert heard.notices[0].startswith(f"skipped checkpoint {saved / NEW}: ")
    assert heard.notices[1] == "resumed after step 3 of 6"
    assert len(result.history) == 2
    assert equal(weights(Path("run")), weights(trained / "run"))
    assert checkpoint.load_newest(saved).skipped == ()


def test_every_flip_is_found(saved: Path) -> None:
    generator = np.random.default_rng(1)
    good = {name: (saved / NEW / name).read_bytes() for name in FILES}

    def check(index: int) -> bool:
        name = FILES[index % 3]
        bit = int(generator.integers(8 * len(good[name])))
        content = bytearray(good[name])
        content[bit // 8] ^= 1 << bit % 8
        (saved / NEW / name).write_bytes(content)
        found = checkpoint.load_newest(saved)
        (saved / NEW / name).write_bytes(good[name])
        return found.step == 3 or json.loads(bytes(content)) == json.loads(good[name])  # white space

    assert all(in_a_child(effort(600), check))


@pytest.mark.parametrize("fault", ["a file", "empty", "another's", "named alike"])
def test_folders_that_are_no_checkpoints_are_passed_over(saved: Path, fault: str) -> None:
    newest = saved / NEW
    if fault == "named alike":  # to int() and to the eye, but not ours
        newest.rename(saved / "²")
    else:
        shutil.rmtree(newest)
    if fault == "a file":
        newest.write_text("no folder")
    elif fault == "empty":
        newest.mkdir()
    elif fault == "another's":  # whole in itself: a run would go on at step 3 and never save step 6
        shutil.copytree(saved / OLD, newest)
    found = checkpoint.load_newest(saved)
    assert found.path == saved / OLD
    assert len(found.skipped) == (fault in ("empty", "another's"))
    if fault == "another's":
        assert found.skipped[0].endswith("manifest.json is of step 3")


def test_a_newer_format_is_refused_and_not_skipped(saved: Path) -> None:
    write_again(saved / NEW, lambda manifest: manifest.update(version=2, files="in a form to come"))
    message = f"{saved / NEW} has format version 2, this fastcifar reads 1: update fastcifar"
    for go_on in (lambda: fit(TrainConfig(resume=Path("run"))), lambda: evaluate_run("run", device="cpu")):
        with pytest.raises(CheckpointError) as caught:
            go_on()
        assert str(caught.value) == message
    write_again(saved / NEW, lambda manifest: manifest.update(version="2"))  # no number: damaged
    assert checkpoint.load_newest(saved).step == 3


def test_another_net_is_refused_by_its_first_tensor(saved: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = saved / NEW / "model.safetensors"
    own = safetensors.torch.load(path.read_bytes())
    first = min(own)
    for tensors, message in (
        ({name: tensor for name, tensor in own.items() if name != first}, f"{first} is only in one of them"),
        (own | {"a.stranger": torch.ones(1)}, "a.stranger is only in one of them"),
        (own | {first: torch.ones(2, 2)}, rf"{first} has shape \[2, 2\] instead of"),
    ):
        path.write_bytes(safetensors.torch.save(tensors))
        write_again(saved / NEW, lambda manifest: None)
        for go_on in (lambda: fit(TrainConfig(resume=Path("run"))), lambda: evaluate_run("run", device="cpu")):
            with pytest.raises(CheckpointError, match=f"the checkpoint is of another net: {message}"):
                go_on()
    monkeypatch.setitem(ARCHS, "other", Arch(blocks=((6,), (4,), (4,), (4,)), hidden=(8,)))
    stored = Path("run/config.json")
    stored.write_text(stored.read_text().replace('"arch": "tiny"', '"arch": "other"'))
    with pytest.raises(CheckpointError, match=r"is of other options than run/config\.json now holds"):
        fit(TrainConfig(resume=Path("run")))


def test_other_data_are_refused(saved: Path) -> None:
    store = ArrayStore("data")
    pixels = 255 - store.load()
    rows = {name: slice(start, stop) for name, start, stop in (("a", 0, 48), ("b", 48, 64), ("c", 64, 80))}
    files = [SourceFile(name, pixels[rows[name]], store.labels[rows[name]]) for name in rows]
    splits = {"report": {"train": ["a"], "validation": ["b"], "test": ["c"]}}
    shutil.rmtree("data")
    Path("run/environment.json").unlink()  # it says where the copied run's own data are
    write_store(Path("data"), files, name="data", classes=store.classes, splits=splits, source={"verified": True})
    with pytest.raises(ConfigError, match="loader state does not fit: its digest is"):
        fit(TrainConfig(resume=Path("run")))
    with pytest.raises(CheckpointError, match=r"was trained on other data than .*data holds"):
        evaluate_run("run", device="cpu")


@pytest.mark.parametrize(
    "change",
    [
        lambda state: state.clear(),
        lambda state: state.update(loader=None),
        lambda state: state["loader"].update(step=10**6),
        lambda state: state["loader"].update(epoch=-1),
        lambda state: state.update(epoch=float("inf")),
        lambda state: state.update(elapsed=10**400),
        lambda state: state.update(elapsed="long"),
        lambda state: state.update(history=[{"epoch": 1}]),
        lambda state: state.update(history=7),
    ],
)
def test_a_forged_state_is_refused_in_one_line(saved: Path, change: Callable[[dict[str, Any]], object]) -> None:
    write_again(saved / NEW, lambda manifest: change(manifest["state"]))
    with pytest.raises((CheckpointError, ConfigError)) as caught:
        fit(TrainConfig(resume=Path("run")))
    assert str(caught.value).isprintable()


class Evil:
    def __reduce__(self) -> tuple[Callable[..., Any], tuple[str, str]]:
        return open, ("owned", "w")


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("form", ["pickle", "torch.save", "old torch.save"])
def test_no_pickle_is_read(saved: Path, name: str, form: str) -> None:
    path = saved / NEW / name
    if form == "pickle":
        path.write_bytes(pickle.dumps({"a": Evil()}))
    else:
        torch.save({"a": Evil()}, path, _use_new_zipfile_serialization=form == "torch.save")
    if name != "manifest.json":
        write_again(saved / NEW, lambda manifest: None)  # what forged it had the digests right
    with nothing_happens("os.", "glob.", "pathlib.", folder=saved):
        found = checkpoint.load_newest(saved)
    assert found.step == 3
    assert name in found.skipped[0]
    assert "header" in found.skipped[0] or name == "manifest.json"
    assert not Path("owned").exists()
