"""CIFAR's binary form: the same store as from the pickles, and every mistake in a file said."""

import contextlib
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from fastcifar.data import archive
from fastcifar.data.binary import read_batch, read_label_names
from fastcifar.data.cifar import recognise_cifar
from fastcifar.data.datasets import open_store
from fastcifar.errors import DataError
from tests.cifar_files import CLASSES, batch_pickle, meta_pickle, tiny_cifar10, write_archive

FINE = tuple(f"fine {k}" for k in range(100))


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("FASTCIFAR_HOME", str(tmp_path / "home"))
    return tmp_path / "home"


def records(images: NDArray[np.uint8], *labels: NDArray[np.int64]) -> bytes:
    return np.concatenate([*(column.astype(np.uint8)[:, None] for column in labels), images], axis=1).tobytes()


def both_forms(name: str, per_file: int = 13) -> tuple[dict[str, bytes], dict[str, bytes]]:
    """The members of the Python and of the binary archive, with equal images and labels."""
    generator = np.random.default_rng(0)
    python: dict[str, bytes] = {}
    binary: dict[str, bytes] = {}
    if name == "cifar10":
        python["batches.meta"], binary["batches.meta.txt"] = meta_pickle(), ("\n".join(CLASSES) + "\n\n").encode()
        members = [*(f"data_batch_{k}" for k in range(1, 6)), "test_batch"]
    else:
        python["meta"] = meta_pickle(FINE, key="fine_label_names")
        binary["fine_label_names.txt"] = "".join(f"{each}\r\n" for each in FINE).encode()
        members = ["train", "test"]
    for member in members:
        images = generator.integers(0, 256, (per_file, 3072), np.uint8)
        if name == "cifar10":
            labels = generator.integers(0, 10, per_file)
            python[member] = batch_pickle(images, labels.tolist())
            binary[f"{member}.bin"] = records(images, labels)
        else:
            labels = generator.integers(0, 100, per_file)
            python[member] = batch_pickle(images, labels.tolist(), label_key="fine_labels")
            binary[f"{member}.bin"] = records(images, labels // 5, labels)
    return python, binary


def write(path: Path, folder: str, members: Mapping[str, bytes], form: str) -> Path:
    if form == "archive":
        return write_archive(path.with_suffix(".tar.gz"), members, folder=folder)
    (path / folder).mkdir(parents=True)
    for name, content in members.items():
        (path / folder / name).write_bytes(content)
    return path / folder if form == "folder" else path


FOLDERS = {
    "cifar10": ("cifar-10-batches-py", "cifar-10-batches-bin"),
    "cifar100": ("cifar-100-python", "cifar-100-binary"),
}


@pytest.mark.parametrize("name", ["cifar10", "cifar100"])
@pytest.mark.parametrize("form", ["archive", "folder", "folder above"])
def test_both_forms_give_the_same_store(tmp_path: Path, home: Path, name: str, form: str) -> None:
    stores = []
    for members, folder in zip(both_forms(name), FOLDERS[name], strict=True):
        data = write(tmp_path / folder.replace("-", "_"), folder, members, form)
        found = recognise_cifar(data)
        assert found is not None
        assert (found[0].name, found[1].spec.folder) == (name, folder)
        stores.append(open_store(name, data=data, allow_unverified=True))
    assert stores[0].digest == stores[1].digest
    assert stores[0].path != stores[1].path
    np.testing.assert_array_equal(stores[0].images, stores[1].images)
    np.testing.assert_array_equal(stores[0].labels, stores[1].labels)
    assert stores[1].split("report/train").rows == stores[0].split("report/train").rows
    assert not stores[1].verified


def test_the_published_archive_needs_no_permission(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data = write(tmp_path / "x", "cifar-10-batches-bin", both_forms("cifar10")[1], "archive")
    with pytest.raises(DataError, match=r"is not the published cifar-10-binary\.tar\.gz: .*--allow-unverified"):
        open_store("cifar10", data=data)
    monkeypatch.setattr(archive, "file_sha256", lambda path: archive.CIFAR10_BINARY.sha256)
    store = open_store("cifar10", data=data)
    assert store.verified
    assert store.path.name == "cifar10-c4a38c50a1bc"


def test_a_folder_in_binary_form_cannot_be_checked(tmp_path: Path) -> None:
    data = write(tmp_path / "x", "cifar-10-batches-bin", both_forms("cifar10")[1], "folder")
    with pytest.raises(DataError, match=r"cannot be checked, .*: give cifar-10-binary\.tar\.gz; --allow-unverified"):
        open_store("cifar10", data=data)
    (data / "data_batch_3.bin").unlink()
    with pytest.raises(DataError, match=r"lacks data_batch_3\.bin"):
        open_store("cifar10", data=data, allow_unverified=True)


def test_what_is_no_cifar_is_not_recognised(tmp_path: Path) -> None:
    assert recognise_cifar(tmp_path) is None
    (tmp_path / "train").mkdir()
    (tmp_path / "test").mkdir()
    (tmp_path / "meta").write_text("one file of such a name is chance")
    assert recognise_cifar(tmp_path) is None
    for content in (b"", b"\x1f\x8b", b"PK\3\4", b"\x1f\x8b" + bytes(100)):
        (tmp_path / "file").write_bytes(content)
        assert recognise_cifar(tmp_path / "file") is None
    other = write_archive(tmp_path / "other.tar.gz", {"a": b"1"}, folder="photos")
    assert recognise_cifar(other) is None
    assert recognise_cifar(tiny_cifar10(tmp_path / "holder" / "cifar-10-batches-py").parent) is not None


@settings(max_examples=60, deadline=None)
@given(data=st.data(), count=st.integers(1, 20), columns=st.sampled_from([(10,), (20, 100), (3, 7, 256)]))
def test_any_records_are_read(data: st.DataObject, count: int, columns: tuple[int, ...]) -> None:
    images = np.random.default_rng(count).integers(0, 256, (count, 3072), np.uint8)
    draw = [
        np.array(data.draw(st.lists(st.integers(0, classes - 1), min_size=count, max_size=count)))
        for classes in columns
    ]
    blob = records(images, *draw)
    batch = read_batch(blob, source="x", labels=columns)
    np.testing.assert_array_equal(batch.data, images)
    np.testing.assert_array_equal(batch.labels, draw[-1])
    assert batch.labels.dtype == np.int64
    # any other length is refused, and any label out of range
    length = data.draw(st.integers(0, len(blob)))
    if length % (len(columns) + 3072) or not length:
        with pytest.raises(DataError, match=f"x: has {length} bytes, which is not a number of records"):
            read_batch(blob[:length], source="x", labels=columns)
    row, column = data.draw(st.integers(0, count - 1)), data.draw(st.integers(0, len(columns) - 1))
    if columns[column] < 256:
        bad = bytearray(blob)
        wrong = data.draw(st.integers(columns[column], 255))
        bad[row * (len(columns) + 3072) + column] = wrong
        with pytest.raises(DataError, match=f"label {column + 1} of record {row} is {wrong}, outside 0 to"):
            read_batch(bytes(bad), source="x", labels=columns)


@settings(max_examples=200, deadline=None)
@given(st.binary(max_size=7000))
def test_any_bytes_are_read_or_refused(blob: bytes) -> None:
    for labels in ((10,), (20, 100)):
        with contextlib.suppress(DataError):
            batch = read_batch(blob, source="x", labels=labels)
            assert batch.data.shape == (len(batch.labels), 3072)
            assert batch.labels.max() < labels[-1]
    with contextlib.suppress(DataError):
        assert len(read_label_names(blob, source="x", classes=3)) == 3


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (b"", "holds 1 names, expected 3"),
        (b"a\nb\n", "holds 2 names, expected 3"),
        (b"a\nb\nc\nd", "holds 4 names"),
        (b"a\n\nc", "entry 1 is not a name: ''"),
        (b"a\nb\x07\nc", "entry 1 is not a name"),
        (b"a\na\nc", "holds a name twice"),
    ],
)
def test_names_that_are_none_are_said(text: bytes, message: str) -> None:
    with pytest.raises(DataError, match=f"x: {message}"):
        read_label_names(text, source="x", classes=3)


def test_names_end_as_they_may() -> None:
    for text in (b"a\nb c\nc", b"a\nb c\nc\n", b"a\nb c\nc\n\n", b"a\r\nb c\r\nc\r\n"):
        assert read_label_names(text, source="x", classes=3) == ("a", "b c", "c")
