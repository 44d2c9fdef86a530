import os
import threading
from pathlib import Path

import numpy as np
import pytest

from fastcifar.config import TrainConfig
from fastcifar.data import cifar, datasets
from fastcifar.data.arrays import convert_arrays
from fastcifar.data.datasets import DATASETS, open_store
from fastcifar.data.home import find_home
from fastcifar.errors import ConfigError, DataError, OutputError
from tests.cifar_files import batch_pickle, meta_pickle, tiny_cifar10, write_archive


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("FASTCIFAR_HOME", str(tmp_path / "home"))
    return tmp_path / "home"


def test_digits_need_no_download(home: Path) -> None:
    store = open_store("digits")
    assert store.image_shape == (32, 32, 3)
    assert store.classes == tuple("0123456789")
    assert store.verified
    assert store.path == home / "stores" / "digits"
    assert len(store) == len(store.split("train")) + len(store.split("test")) == 1797
    counts = np.bincount(store.labels[np.asarray(store.split("test").rows)], minlength=10)
    assert counts.min() > 15  # each digit is tested
    image = store.images[0]
    assert (image[0:4, 0:4] == image[0, 0]).all()  # one stored pixel is 4x4 now
    assert store.images.max() == 255
    again = open_store("digits")
    assert again.digest == store.digest


@pytest.mark.parametrize("form", ["archive", "folder"])
def test_rows_do_not_depend_on_the_order_in_the_archive(tmp_path: Path, form: str) -> None:
    generator = np.random.default_rng(0)
    batches = {
        name: (generator.integers(0, 256, (4, 3072), np.uint8), generator.integers(0, 10, 4))
        for name in ("data_batch_1", "data_batch_2", "data_batch_3", "data_batch_4", "data_batch_5", "test_batch")
    }
    files = {name: batch_pickle(images, labels.tolist()) for name, (images, labels) in batches.items()}
    names = [f"class {i}" for i in range(10)]
    files["batches.meta"] = meta_pickle(names)
    published = [
        "data_batch_4",
        "test_batch",
        "data_batch_3",
        "batches.meta",
        "data_batch_2",
        "data_batch_5",
        "data_batch_1",
    ]
    if form == "archive":
        data = tmp_path / "a.tar.gz"
        write_archive(data, {name: files[name] for name in published})
    else:
        data = tmp_path / "cifar-10-batches-py"
        data.mkdir()
        for name in published:
            (data / name).write_bytes(files[name])
    seen: list[int] = []
    store = open_store(
        "cifar10", data=data, allow_unverified=True, convert_progress=lambda done, total: seen.append(done)
    )
    images = np.concatenate([images for images, _ in batches.values()]).reshape(-1, 3, 32, 32)
    np.testing.assert_array_equal(store.images, images.transpose(0, 2, 3, 1))
    np.testing.assert_array_equal(store.labels, np.concatenate([labels for _, labels in batches.values()]))
    assert store.classes == tuple(names)
    assert not store.verified
    assert seen[-1] == 24
    label, image = store.split("report/validation")[1]
    assert label == batches["data_batch_2"][1][1]
    np.testing.assert_array_equal(image, batches["data_batch_2"][0][1].reshape(3, 32, 32))


def test_cifar100_has_the_same_form(tmp_path: Path) -> None:
    generator = np.random.default_rng(0)
    folder = tmp_path / "cifar-100-python"
    folder.mkdir()
    fine = {"train": generator.integers(0, 100, 53), "test": generator.integers(0, 100, 7)}
    for name, labels in fine.items():
        images = generator.integers(0, 256, (len(labels), 3072), np.uint8)
        (folder / name).write_bytes(batch_pickle(images, labels.tolist(), label_key="fine_labels"))
    (folder / "meta").write_bytes(meta_pickle([f"class {i}" for i in range(100)], key="fine_label_names"))
    store = open_store("cifar100", data=folder, allow_unverified=True)
    assert len(store.classes) == 100
    np.testing.assert_array_equal(store.labels, np.concatenate([fine["train"], fine["test"]]))
    parts = [store.split(f"report/{part}").rows for part in ("train", "validation", "test")]
    assert parts == [range(10), range(10, 21), range(53, 60)]


def test_an_unverified_copy_has_to_be_allowed(tmp_path: Path) -> None:
    data = tmp_path / "copy.tar.gz"
    tiny_cifar10(data)
    with pytest.raises(DataError, match="allow-unverified"):
        open_store("cifar10", data=data)
    assert not open_store("cifar10", data=data, allow_unverified=True).verified


def test_a_converted_store_needs_its_archive_no_more(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data = tmp_path / "copy.tar.gz"
    tiny_cifar10(data)
    store = open_store("cifar10", data=data, allow_unverified=True)
    assert open_store(store.path).digest == store.digest
    published = store.path.with_name(DATASETS["cifar10"].published)
    store.path.rename(published)
    monkeypatch.setattr(cifar.archive, "find", None)  # may not even look
    assert open_store("cifar10").digest == store.digest


def test_many_at_once_convert_once(monkeypatch: pytest.MonkeyPatch) -> None:
    conversions, digests = [], []
    convert = datasets.write_content

    def counting(*arguments: object, **options: object) -> None:
        conversions.append(1)
        convert(*arguments, **options)  # type: ignore[arg-type]

    monkeypatch.setattr(datasets, "write_content", counting)
    threads = [threading.Thread(target=lambda: digests.append(open_store("digits").digest)) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(conversions) == 1
    assert len(digests) == 4
    assert len(set(digests)) == 1


def test_names_that_are_none_are_said(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="unknown dataset 'mnist': choose from cifar10, cifar100, digits, or"):
        open_store("mnist")
    with pytest.raises(ConfigError, match=r"unknown dataset 'a+'"):
        open_store("a" * 300)
    with pytest.raises(ConfigError, match=r"^dataset 'digits': there is no such folder; .* the name 'digits' alone$"):
        open_store(Path("digits"))
    with pytest.raises(ConfigError, match=r"^dataset './mine': there is no such folder$"):
        open_store("./mine")
    (tmp_path / "text").write_text("x")
    with pytest.raises(ConfigError, match=r"text' is no store: make one of it with fastcifar convert \S*text OUT$"):
        open_store(tmp_path / "text")
    for form in ("cifar", "cifar.tar.gz"):
        place = tiny_cifar10(tmp_path / form)
        with pytest.raises(ConfigError) as caught:
            open_store(place)
        known = f"it is cifar10's archive or folder: give the name cifar10, and {place} as data (--data)"
        assert str(caught.value) == f"dataset {str(place)!r} is no store: {known}"
    with pytest.raises(ConfigError, match="home must be a path or None, got 5"):
        open_store("digits", home=5)  # type: ignore[arg-type]
    with pytest.raises(DataError, match=r"a+: cannot be read"):
        open_store("cifar10", data="a" * 300)
    with pytest.raises(ConfigError, match="store must be a name or a folder, got None"):
        open_store(None)  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="bundled"):
        open_store("digits", data=tmp_path)
    with pytest.raises(ConfigError, match="cannot be given with the store"):
        open_store(open_store("digits").path, data=tmp_path)


def test_a_path_is_a_folder_whatever_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    images = np.zeros((20, 8, 8, 3), np.uint8)
    own = convert_arrays(Path("digits"), images, np.arange(20) % 2)
    assert open_store(Path("digits")).digest == open_store("./digits").digest == own.digest
    assert len(open_store("digits")) == 1797
    assert TrainConfig(dataset=Path("digits")).dataset == "./digits"  # type: ignore[arg-type]


def test_a_home_that_cannot_be_written_is_said(tmp_path: Path) -> None:
    blocked = tmp_path / "file"
    blocked.write_text("not a folder")
    with pytest.raises(OutputError, match=r"file.*cannot be written.*FASTCIFAR_HOME"):
        open_store("digits", home=blocked)


def test_home_is_the_variable_then_the_cache_then_a_temporary_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("FASTCIFAR_HOME", str(tmp_path / "ü b"))
    assert find_home() == tmp_path / "ü b"
    monkeypatch.delenv("FASTCIFAR_HOME")
    monkeypatch.setattr("platformdirs.user_cache_path", lambda name: tmp_path / "cache" / name)
    assert find_home() == tmp_path / "cache" / "fastcifar"
    (tmp_path / "file").write_text("")
    monkeypatch.setattr("platformdirs.user_cache_path", lambda name: tmp_path / "file" / name)
    monkeypatch.setattr("tempfile.gettempdir", lambda: str(tmp_path / "tmp"))
    assert find_home().parent == tmp_path / "tmp"
    assert find_home().name.startswith("fastcifar")
    if hasattr(os, "getuid"):
        with monkeypatch.context() as patch:
            made, own = find_home(), os.getuid()
            patch.setattr("os.getuid", lambda: own + 1)
            of_others = made.rename(made.with_name(f"fastcifar-{own + 1}"))  # by its name it is ours
            assert find_home() != of_others
    made = find_home()
    made.rename(made.with_name("elsewhere"))
    made.symlink_to(made.with_name("elsewhere"))  # which may lead to another place later
    assert find_home() != made
    made.unlink()
    made.write_text("a file")
    assert find_home() != made

    def fail(name: str) -> Path:
        raise RuntimeError("could not determine the home directory")

    monkeypatch.setattr("platformdirs.user_cache_path", fail)
    assert find_home().parent == tmp_path / "tmp"
    assert "FASTCIFAR_HOME" in caplog.text
    monkeypatch.setenv("FASTCIFAR_HOME", "~no-such-user/x")
    assert find_home().parent == tmp_path / "tmp"
