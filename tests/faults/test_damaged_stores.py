"""Stores that were cut, flipped or taken away: always noticed before a byte is used, never a signal, and made anew."""

import json
import logging
import os
import shutil
from collections.abc import Generator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fastcifar import ArrayStore, Loader, TrainConfig, convert_arrays, fit, open_store
from fastcifar.data.content import Content, Found, SourceFile
from fastcifar.data.datasets import DATASETS
from fastcifar.data.writer import write_store
from fastcifar.engine import evaluate_run
from fastcifar.errors import DamagedStoreError, DataError
from fastcifar.nets import ARCHS, Arch
from tests.effort import effort
from tests.faults.watch import in_a_child

FILES = ("images.npy", "labels.npy", "manifest.json")
SPLITS = {
    "report": {"train": ("a",), "validation": ("b",), "test": ("c",)},
    "full": {"train": ("a", "b"), "test": ("c",)},
}


def source_files(side: int = 2, counts: tuple[int, ...] = (10, 4, 6)) -> Generator[SourceFile, None, None]:
    generator = np.random.default_rng(3)
    for name, count in zip("abc", counts, strict=True):
        yield SourceFile(name, generator.integers(0, 256, (count, side, side, 3), np.uint8), np.arange(count) % 3)


def write(path: Path, **sizes: Any) -> Path:
    files = list(source_files(**sizes))
    write_store(path, files, name="tiny", classes=["x", "y", "z"], splits=SPLITS, source={"verified": True, "url": "u"})
    return path


def refuses(path: Path, name: str) -> bool:
    """Whether opening the store and checking it is refused, in a line that names the file."""
    try:
        ArrayStore(path, verify=True)
    except DataError as error:
        return any(said in str(error) for said in (name, f"{path} is not a store", f"{path} has format version"))
    return False


def copying_refuses(path: Path, placement: Any) -> bool:
    """Whether a loader that makes every batch of it is refused."""
    try:
        for split in ("train", "test"):
            for _ in Loader(path, split=split, batch_size=8, placement=placement):
                pass
    except DataError:
        return True
    return False


def test_every_flipped_bit_is_found(scratch: Path) -> None:
    path = write(scratch / "flipped_bit")
    good = {name: (path / name).read_bytes() for name in FILES}
    manifest = json.loads(good["manifest.json"])
    bits = [(name, bit) for name in FILES[:2] for bit in range(8 * len(good[name]))]
    drawn = np.random.default_rng(0).choice(8 * len(good["manifest.json"]), 10_000 - len(bits), replace=False)
    every = range(8 * len(good["manifest.json"]))
    bits += [("manifest.json", int(bit)) for bit in (every if effort(1) > 1 else drawn)]
    assert len(bits) >= 10_000

    def check(index: int) -> bool:
        name, bit = bits[index]
        content = bytearray(good[name])
        content[bit // 8] ^= 1 << bit % 8
        (path / name).write_bytes(content)
        found = refuses(path, name)
        if not found:  # then the manifest says the same but for where the data came from
            assert name == "manifest.json"
            now = json.loads(bytes(content))
            assert {**now, "source": None} == {**manifest, "source": None}
        (path / name).write_bytes(good[name])
        return found

    found = in_a_child(len(bits), check)
    assert np.mean(found) > 0.9
    assert all(seen for seen, (name, _) in zip(found, bits, strict=True) if name != "manifest.json")
    ArrayStore(path, verify=True)


@pytest.mark.parametrize("placement", ["device", "host", "stream"])
def test_every_flipped_pixel_is_found_when_it_is_copied(scratch: Path, placement: str) -> None:
    path = write(scratch / placement)
    assert not copying_refuses(path, placement)
    good = (path / "images.npy").read_bytes()

    def check(index: int) -> bool:
        content = bytearray(good)
        content[128 + index] ^= 1 << index % 8
        (path / "images.npy").write_bytes(content)
        return copying_refuses(path, placement)

    assert all(in_a_child(len(good) - 128, check))


def test_every_cut_is_found(scratch: Path) -> None:
    path = write(scratch / "cut_is_foun")
    good = {name: (path / name).read_bytes() for name in FILES}
    cuts = [(name, length) for name in FILES for length in range(len(good[name]))]

    def check(index: int) -> bool:
        name, length = cuts[index]
        (path / name).write_bytes(good[name][:length])
        found = refuses(path, name)
        (path / name).write_bytes(good[name])
        return found

    assert all(in_a_child(len(cuts), check))


@pytest.mark.parametrize("placement", ["device", "host", "stream"])
def test_a_file_cut_after_it_was_opened_is_an_error_and_no_signal(tmp_path: Path, placement: Any) -> None:
    path = write(tmp_path / "s", side=16, counts=(90, 10, 20))  # 23 pages
    good = (path / "images.npy").read_bytes()
    lengths = [0, 1, 127, 128, 4095, 4096, 4097, *range(8192, len(good), 4096), len(good) - 1]

    def check(index: int) -> bool:
        (path / "images.npy").write_bytes(good)
        store = ArrayStore(path)
        split = ("train", "report/train", "holdout/train")[index % 3]
        os.truncate(path / "images.npy", lengths[index // 3])
        with pytest.raises(DamagedStoreError, match=r"images\.npy"):
            for _ in Loader(store, split=split, batch_size=16, placement=placement):
                pass
        return True

    assert all(in_a_child(3 * len(lengths), check))


def test_a_file_cut_after_it_was_checked_is_an_error_and_no_signal(tmp_path: Path) -> None:
    path = write(tmp_path / "s", side=16, counts=(90, 10, 20))
    good = (path / "images.npy").read_bytes()

    def check(index: int) -> bool:
        (path / "images.npy").write_bytes(good)
        loader = Loader(ArrayStore(path), batch_size=16, placement="stream")
        for _ in loader:
            pass
        os.truncate(path / "images.npy", 4096 * index)
        with pytest.raises(DamagedStoreError, match=r"images\.npy: it has"):
            for _ in loader:
                pass
        return True

    assert all(in_a_child(20, check))


@pytest.mark.parametrize("name", FILES[:2])
def test_a_file_taken_away_after_it_was_opened_is_an_error(tmp_path: Path, name: str) -> None:
    store = ArrayStore(write(tmp_path / "s"))
    (store.path / name).unlink()
    with pytest.raises(DamagedStoreError, match=f"{name}: No such file"):
        store.verify()
    if name == "images.npy":
        with pytest.raises(DamagedStoreError, match="No such file"):
            store.load()
        with pytest.raises(DamagedStoreError, match="No such file"):
            Loader(store, placement="device")


def test_pixels_that_shape_the_statistics_are_checked_first(tmp_path: Path) -> None:
    path = write(tmp_path / "s")
    flip(path / "images.npy")
    with pytest.raises(DamagedStoreError, match="do not have their checksum"):
        ArrayStore(path).split("holdout/train")


# --- made anew -----------------------------------------------------------------------------------------------------


class Bundled:
    """A data set that is always at hand."""

    published = "bundled"

    def find(self, **options: Any) -> Found:
        files = source_files(side=22, counts=(40, 16, 16))
        return Found(
            "bundled",
            lambda: Content(
                name="bundled", classes=("x", "y", "z"), splits=SPLITS, source={"verified": True}, files=files
            ),
        )


@pytest.fixture
def stores(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("FASTCIFAR_HOME", str(tmp_path / "home"))
    monkeypatch.setitem(DATASETS, "bundled", Bundled())
    monkeypatch.setitem(ARCHS, "tiny", Arch(blocks=((4,), (4,), (4,), (4,)), hidden=(8,)))
    monkeypatch.setattr("fastcifar.figures.write_figures", lambda *arguments, **options: ())  # they take seconds
    monkeypatch.chdir(tmp_path)
    return tmp_path / "home" / "stores"


def flip(path: Path, at: int = -5) -> None:
    content = bytearray(path.read_bytes())
    content[at] ^= 4
    path.write_bytes(content)


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-9])


FAULTS = {
    "manifest cut": lambda path: cut(path / "manifest.json"),
    "manifest of another version": lambda path: (path / "manifest.json").write_text('{"format": "fastcifar-store"}'),
    "manifest missing": lambda path: (path / "manifest.json").unlink(),
    "images flipped": lambda path: flip(path / "images.npy"),
    "images cut": lambda path: cut(path / "images.npy"),
    "images missing": lambda path: (path / "images.npy").unlink(),
    "labels flipped": lambda path: flip(path / "labels.npy"),
    "labels missing": lambda path: (path / "labels.npy").unlink(),
    "everything missing": lambda path: [(path / name).unlink() for name in FILES],
}


def one_warning(caplog: pytest.LogCaptureFixture, stores: Path) -> None:
    """One store was set aside, and one line says so."""
    aside = [path for path in stores.iterdir() if ".damaged-" in path.name]
    lines = [record.getMessage() for record in caplog.records if record.levelno >= logging.WARNING]
    assert len(aside) == len(lines) == 1, lines
    assert str(stores / "bundled") in lines[0]
    assert lines[0].endswith(f": set aside as {aside[0].name}, and made anew")
    assert "delete" not in lines[0]


@pytest.mark.parametrize("fault", FAULTS)
def test_a_damaged_store_of_ours_is_made_anew(stores: Path, fault: str, caplog: pytest.LogCaptureFixture) -> None:
    path = open_store("bundled").path
    good = {name: (path / name).read_bytes() for name in FILES}
    FAULTS[fault](path)
    again = open_store("bundled", verify=True)
    assert again.path == path == stores / "bundled"
    assert {name: (path / name).read_bytes() for name in FILES} == good
    one_warning(caplog, stores)


@pytest.mark.parametrize("fault", ["manifest cut", "images flipped", "images missing", "labels flipped"])
def test_training_goes_on_with_a_store_that_was_made_anew(
    stores: Path, fault: str, caplog: pytest.LogCaptureFixture
) -> None:
    path = open_store("bundled").path
    good = (path / "images.npy").read_bytes()
    FAULTS[fault](path)
    config = TrainConfig(dataset="bundled", arch="tiny", epochs=1, batch_size=8, device="cpu", out=Path("run"))
    result = fit(config)
    assert (path / "images.npy").read_bytes() == good
    assert result.test.samples == 16
    one_warning(caplog, stores)
    recorded = json.loads((result.path / "environment.json").read_text())["data"]["store"]
    assert recorded == str(path)


def test_a_resumed_run_goes_on_with_a_store_that_was_made_anew(stores: Path, caplog: pytest.LogCaptureFixture) -> None:
    config = TrainConfig(dataset="bundled", arch="tiny", epochs=2, batch_size=8, device="cpu", out=Path("run"))
    first = fit(config)
    newest = max((Path("run") / "checkpoints").iterdir())
    shutil.rmtree(newest)
    flip(stores / "bundled" / "images.npy")
    resumed = fit(TrainConfig(resume=Path("run")))
    assert resumed.test.confusion == first.test.confusion
    one_warning(caplog, stores)


def test_an_evaluation_goes_on_with_a_store_that_was_made_anew(stores: Path, caplog: pytest.LogCaptureFixture) -> None:
    config = TrainConfig(dataset="bundled", arch="tiny", epochs=1, batch_size=8, device="cpu", out=Path("run"))
    first = fit(config)
    flip(stores / "bundled" / "images.npy")
    again = evaluate_run(Path("run"), device="cpu")
    assert again.confusion == first.test.confusion
    one_warning(caplog, stores)


def test_a_store_that_is_found_damaged_on_the_way_is_set_aside(
    stores: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr("fastcifar.placement.free_memory", lambda device: 1000)  # it stays on disk
    config = TrainConfig(dataset="bundled", arch="tiny", epochs=2, batch_size=8, device="cpu", out=Path("run"))
    first = fit(config)
    shutil.rmtree(max((Path("run") / "checkpoints").iterdir()))
    flip(stores / "bundled" / "images.npy")
    with pytest.raises(DataError, match=r"do not have their checksum; the store is set aside.*--resume run"):
        fit(TrainConfig(resume=Path("run")))
    assert fit(TrainConfig(resume=Path("run"))).test.confusion == first.test.confusion
    one_warning(caplog, stores)


@pytest.mark.parametrize("fault", [fault for fault in FAULTS if "manifest missing" != fault != "everything missing"])
def test_a_damaged_store_of_the_users_own_is_left_in_place(
    stores: Path, tmp_path: Path, fault: str, caplog: pytest.LogCaptureFixture
) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (40, 22, 22, 3), np.uint8)
    splits = {"train": slice(0, 30), "test": slice(30, 40)}
    path = convert_arrays(tmp_path / "mine", pixels, np.arange(40) % 3, splits=splits).path
    FAULTS[fault](path)
    before = {name: (path / name).read_bytes() for name in FILES if (path / name).exists()}
    options: dict[str, Any] = {"arch": "tiny", "split": "full", "epochs": 1, "batch_size": 8, "device": "cpu"}
    with pytest.raises(DamagedStoreError) as caught:
        fit(TrainConfig(dataset=str(path), out=Path("run"), **options))
    message = str(caught.value)
    assert message.startswith(str(path))
    assert f"{fault.split()[0]}." in message
    assert message.endswith(f"delete the folder {path} and make it anew")
    assert {name: (path / name).read_bytes() for name in FILES if (path / name).exists()} == before
    assert not caplog.records
    assert not Path("run").exists()
    assert not any(".damaged-" in found.name for found in tmp_path.rglob("*"))
