import json
import shutil
import threading
from pathlib import Path
from typing import Any

import pytest
import torch

from fastcifar import checkpoint
from fastcifar.errors import CheckpointError, OutputError


def save(folder: Path, step: int) -> Path:
    generator = torch.Generator().manual_seed(step)
    filters = torch.randn(2, 3, 4, 4, generator=generator).to(memory_format=torch.channels_last)
    model = {"filters": filters, "count": torch.tensor(step)}
    training = {"optimizer.0.step": torch.tensor(1.0), "sum": torch.tensor(2.0, dtype=torch.float64)}
    return checkpoint.save(folder, step=step, model=model, training=training, state={"epoch": step, "name": "ü"})


def test_what_is_saved_is_loaded(tmp_path: Path) -> None:
    path = save(tmp_path / "c", 7)
    found = checkpoint.load_newest(tmp_path / "c")
    assert (found.path, found.step, found.state, found.skipped) == (path, 7, {"epoch": 7, "name": "ü"}, ())
    expected = torch.randn(2, 3, 4, 4, generator=torch.Generator().manual_seed(7))
    assert torch.equal(found.model["filters"], expected)
    assert found.model["count"].dtype == torch.int64
    assert found.training["sum"].dtype == torch.float64


def test_what_is_saved_is_as_it_was_when_it_was_given(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    given, real = threading.Event(), checkpoint.save

    def late(*arguments: Any, **options: Any) -> Path:
        assert given.wait(60)
        return real(*arguments, **options)

    monkeypatch.setattr(checkpoint, "save", late)
    weight, momentum, state = torch.zeros(3), torch.ones(2), {"epoch": 1}
    saver = checkpoint.Saver(tmp_path)
    saver.save(step=1, model={"weight": weight}, training={"momentum": momentum}, state=state)
    weight.add_(1)  # the next step
    momentum.add_(1)
    state["epoch"] = 2
    given.set()
    saver.wait()
    saver.close()
    found = checkpoint.load_newest(tmp_path)
    assert (found.model["weight"].tolist(), found.training["momentum"].tolist()) == ([0, 0, 0], [1, 1])
    assert found.state == {"epoch": 1}


def test_the_newest_two_are_kept(tmp_path: Path) -> None:
    for step in (5, 99, 100):
        save(tmp_path, step)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["00000099", "00000100"]
    assert checkpoint.load_newest(tmp_path).step == 100


def test_a_damaged_newer_one_costs_no_sound_one(tmp_path: Path) -> None:
    for step in (9, 12):
        save(tmp_path, step)
    (tmp_path / "00000012/model.safetensors").write_bytes(b"")
    save(tmp_path, 10)  # a run that went on from 9
    (tmp_path / "00000010/model.safetensors").write_bytes(b"")
    assert checkpoint.load_newest(tmp_path).step == 9


@pytest.mark.parametrize("name", ["model.safetensors", "training.safetensors", "manifest.json"])
@pytest.mark.parametrize("fault", ["cut", "flip", "missing", "swapped"])
def test_a_damaged_one_is_skipped_and_said(tmp_path: Path, name: str, fault: str) -> None:
    save(tmp_path, 1)
    newest = save(tmp_path, 2)
    path = newest / name
    good = path.read_bytes()
    if fault == "cut":
        path.write_bytes(good[:-3])
    elif fault == "flip":
        path.write_bytes(good[:40] + bytes([good[40] ^ 1]) + good[41:])
    elif fault == "missing":
        path.unlink()
    else:
        shutil.copy(tmp_path / "00000001" / name, path)
        if name == "training.safetensors" or name == "manifest.json":
            path.write_bytes(good + b" ")  # equal in both, or whole in itself: something else is swapped in
        if name == "manifest.json":
            path.write_text(json.dumps({"format": "else"}))
    found = checkpoint.load_newest(tmp_path)
    assert found.step == 1
    assert len(found.skipped) == 1
    assert str(newest) in found.skipped[0]
    assert name in found.skipped[0]


def test_no_sound_one_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="holds no checkpoint"):
        checkpoint.load_newest(tmp_path / "nowhere")
    (save(tmp_path, 1) / "model.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"holds no checkpoint.*skipped checkpoint.*model\.safetensors"):
        checkpoint.load_newest(tmp_path)


def test_a_newer_format_is_refused(tmp_path: Path) -> None:
    path = save(tmp_path, 1) / "manifest.json"
    manifest = json.loads(path.read_text()) | {"version": 2}
    path.write_text(json.dumps(manifest | {"digest": checkpoint._digest(manifest)}))
    with pytest.raises(CheckpointError, match="format version 2, this fastcifar reads 1"):
        checkpoint.load_newest(tmp_path)


def test_a_full_disk_leaves_the_old_ones(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save(tmp_path, 1)

    def fail(*arguments: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", fail)
    with pytest.raises(OutputError, match="cannot be written: No space left"):
        save(tmp_path, 2)
    assert [path.name for path in tmp_path.iterdir()] == ["00000001"]
    assert checkpoint.load_newest(tmp_path).step == 1
