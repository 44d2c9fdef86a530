import copy
import errno
import json
import os
import pickle
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from fastcifar.data import splits
from fastcifar.data import store as store_module
from fastcifar.data.arrays import convert_arrays
from fastcifar.data.folders import convert_folder
from fastcifar.data.items import convert_dataset
from fastcifar.data.store import ArrayStore
from fastcifar.data.writer import SourceFile, write_store
from fastcifar.errors import ConfigError, DamagedStoreError, DataError

SPLITS = {
    "report": {"train": ["a"], "validation": ["b"], "test": ["c"]},
    "full": {"train": ["a", "b"], "test": ["c"]},
}


def source_files(channels: int = 3, sizes: tuple[int, ...] = (1500, 30, 20)) -> list[SourceFile]:
    generator = np.random.default_rng(0)
    return [
        SourceFile(
            name,
            generator.integers(0, 256, (size, 8, 6, channels), np.uint8),
            generator.integers(0, 4, size).astype(np.int64),
        )
        for name, size in zip("abc", sizes, strict=True)
    ]


def make(path: Path, files: list[SourceFile] | None = None) -> ArrayStore:
    write_store(
        path,
        files or source_files(),
        name="tiny",
        classes=["w", "x", "y", "z"],
        splits=SPLITS,
        source={"origin": "a test", "verified": True},
    )
    return ArrayStore(path)


@pytest.fixture
def store(tmp_path: Path) -> ArrayStore:
    return make(tmp_path / "tiny")


def everything(files: list[SourceFile]) -> tuple[NDArray[np.uint8], NDArray[np.int64]]:
    return np.concatenate([f.images for f in files]), np.concatenate([f.labels for f in files])


@pytest.mark.parametrize("channels", [1, 3])
def test_what_is_written_is_read(tmp_path: Path, channels: int) -> None:
    files = source_files(channels)
    store = make(tmp_path / "s", files)
    images, labels = everything(files)
    np.testing.assert_array_equal(store.images, images)
    np.testing.assert_array_equal(store.load(), images)
    np.testing.assert_array_equal(store.labels, labels)
    assert len(store) == 1550
    assert store.image_shape == (8, 6, channels)
    assert store.classes == ("w", "x", "y", "z")
    assert store.verified
    store.verify()


def test_any_numpy_reads_the_files(store: ArrayStore) -> None:
    images = np.load(store.path / "images.npy", mmap_mode="r", allow_pickle=False)
    assert images.shape == (1550, 8, 6, 3)
    np.testing.assert_array_equal(np.load(store.path / "labels.npy", allow_pickle=False), store.labels)


def test_planes_in_any_stride_order_are_written_as_nhwc(tmp_path: Path) -> None:
    planar = np.random.default_rng(1).integers(0, 256, (5, 3, 4, 2), np.uint8)
    file = SourceFile("a", planar.transpose(0, 2, 3, 1), np.zeros(5, np.int64))
    write_store(tmp_path / "s", [file], name="s", classes=["only"], splits={}, source={})
    np.testing.assert_array_equal(ArrayStore(tmp_path / "s").images, planar.transpose(0, 2, 3, 1))
    assert not ArrayStore(tmp_path / "s").verified


def test_the_map_is_read_only(store: ArrayStore) -> None:
    with pytest.raises(ValueError, match="read-only"):
        store.images[0, 0, 0, 0] = 1


def test_equal_content_has_an_equal_digest_wherever_it_came_from(tmp_path: Path) -> None:
    first, second = make(tmp_path / "1"), make(tmp_path / "2")
    assert first.digest == second.digest
    files = source_files()
    files[1].images[3, 2, 1, 0] ^= 1
    assert make(tmp_path / "3", files).digest != first.digest


def test_the_name_is_part_of_the_digest(tmp_path: Path) -> None:
    named = [
        write_store(tmp_path / name, source_files(), name=name, classes=["w", "x", "y", "z"], splits=SPLITS, source={})
        for name in ("one", "other")
    ]
    assert named[0] != named[1]


@pytest.mark.parametrize("kind", ["uint8", "int8", "int16", "uint64", "int64"])
def test_splits_are_indexed_by_any_whole_numbers(store: ArrayStore, kind: str) -> None:
    split = store.split("train")
    labels, images = split[np.array([3, 1], kind)]
    expected = split[[3, 1]]
    assert np.array_equal(labels, expected[0])
    assert np.array_equal(images, expected[1])
    one = split[np.array(3, kind)]
    assert one[0] == labels[0]
    if kind != "uint64":
        assert kind.startswith("u") or np.array_equal(split[np.array([-1], kind)][1], split[[len(split) - 1]][1])
    with pytest.raises(TypeError, match="a split takes an int or a list of ints"):
        split[np.array([[1, 2]], kind)]
    assert len(split[[]][0]) == 0


def test_a_copy_of_a_split_opens_its_store_again(store: ArrayStore) -> None:
    for name, scale in (("report/validation", False), ("holdout/train", True)):
        split = store.split(name, scale=scale)
        content = pickle.dumps(split)
        assert len(content) < 1000
        for again in (pickle.loads(content), copy.deepcopy(split)):
            assert (again.name, again.scale, len(again)) == (split.name, scale, len(split))
            assert isinstance(again._images, np.memmap)
            assert all(np.array_equal(a, b) for a, b in zip(again[[2, 5]], split[[2, 5]], strict=True))


@pytest.mark.parametrize("name", ["train", "test", "report/train", "report/validation", "report/test", "full/train"])
def test_splits_are_the_named_files(store: ArrayStore, name: str) -> None:
    scheme, part = name.split("/") if "/" in name else ("full", name)
    by_name = {file.name: file for file in source_files()}
    images, labels = everything([by_name[f] for f in SPLITS[scheme][part]])
    split = store.split(name)
    assert len(split) == len(images)
    np.testing.assert_array_equal(store.images[np.asarray(split.rows)], images)
    np.testing.assert_array_equal(store.labels[np.asarray(split.rows)], labels)


@pytest.mark.parametrize("scheme", ["report", "full", "holdout"])
def test_statistics_are_the_training_parts_own(store: ArrayStore, scheme: str) -> None:
    train = store.split(f"{scheme}/train")
    pixels = store.images[np.asarray(train.rows)].reshape(-1, 3).astype(np.float64)
    for part in ("train", "test"):
        split = store.split(f"{scheme}/{part}")
        np.testing.assert_allclose(split.mean, pixels.mean(0), rtol=1e-12)
        np.testing.assert_allclose(split.std, pixels.std(0), rtol=1e-12)


def test_holdout_partitions_the_training_images(store: ArrayStore) -> None:
    train, validation, test = (store.split(f"holdout/{part}") for part in ("train", "validation", "test"))
    assert len(validation) == 153
    rows = np.concatenate([np.asarray(train.rows), np.asarray(validation.rows)])
    np.testing.assert_array_equal(np.sort(rows), np.arange(1530))
    assert test.rows == range(1530, 1550)
    # the draw is for good: results on holdout stay comparable
    np.testing.assert_array_equal(store.split("holdout/validation").rows, validation.rows)
    assert np.asarray(validation.rows)[:4].tolist() == [4, 9, 14, 18]
    assert validation.rows[-1] > 1400  # spread over all files, not a block


def test_holdout_reads_few_images_at_a_time(store: ArrayStore, monkeypatch: pytest.MonkeyPatch) -> None:
    """A tenth of a store that is larger than memory is a lot of it."""
    plain = store.split("holdout/train")
    monkeypatch.setattr(splits, "_AT_A_TIME", 2 * store.images[:1].nbytes)
    taken: list[int] = []

    class Watched:
        shape = store.images.shape

        def __getitem__(self, rows: slice | NDArray[np.int64]) -> NDArray[np.uint8]:
            found = store.images[rows]
            taken.append(len(found))
            return found

    files, schemes = store._segments, store._splits
    others: Any = {"scale": False, "check": lambda rows: None, "again": lambda: plain}
    found = splits.take_split("holdout/train", files, schemes, Watched(), store.labels, **others)  # type: ignore[arg-type]
    assert max(taken) <= 3
    assert sum(taken) >= len(store.split("holdout/validation"))
    assert np.array_equal(found.mean, plain.mean)
    assert np.array_equal(found.std, plain.std)


def test_random_access_is_the_reports(store: ArrayStore) -> None:
    split = store.split("report/validation")
    label, image = split[3]
    assert isinstance(label, int)
    assert image.shape == (3, 8, 6)
    assert image.dtype == np.uint8
    np.testing.assert_array_equal(image, store.images[1503].transpose(2, 0, 1))
    labels, images = split[[3, 0, -1]]
    assert labels.tolist() == [store.labels[1503], store.labels[1500], store.labels[1529]]
    np.testing.assert_array_equal(images, store.images[[1503, 1500, 1529]].transpose(0, 3, 1, 2))
    assert split[-1][0] == store.labels[1529]


def test_scale_maps_pixels_to_minus_one_to_one(store: ArrayStore) -> None:
    raw, scaled = store.split("train")[5][1], store.split("train", scale=True)[5][1]
    assert scaled.dtype == np.float32
    np.testing.assert_allclose(scaled, raw.astype(np.float64) / 127.5 - 1, atol=1e-6)


@pytest.mark.parametrize("index", [30, -31, [0, 30]])
def test_an_index_out_of_range_is_an_index_error(store: ArrayStore, index: int | list[int]) -> None:
    with pytest.raises(IndexError, match="report/validation, which has 30 images"):
        store.split("report/validation")[index]


def test_an_index_of_the_wrong_type_is_a_type_error(store: ArrayStore) -> None:
    with pytest.raises(TypeError, match="takes an int"):
        store.split("train")["a"]  # type: ignore[index]


def test_an_unknown_split_lists_those_there_are(store: ArrayStore) -> None:
    with pytest.raises(ConfigError, match="unknown split 'dev': choose from train, test, report/train"):
        store.split("dev")


@pytest.mark.parametrize(
    ("file", "message"),
    [
        (SourceFile("b", np.zeros((2, 8, 5, 3), np.uint8), np.zeros(2, np.int64)), r"b: images are \[8, 5, 3\]"),
        (SourceFile("b", np.zeros((2, 8, 6, 3), np.float32), np.zeros(2, np.int64)), "b: images must be uint8"),
        (SourceFile("b", np.zeros((2, 8, 6, 3), np.uint8), np.zeros(3, np.int64)), "b: 2 images, but labels"),
        (SourceFile("b", np.zeros((2, 8, 6, 3), np.uint8), np.array([0, 4])), "b: labels run from 0 to 4"),
        (
            SourceFile("d", np.zeros((2, 8, 6, 3), np.uint8), np.zeros(2, np.int64)),
            "needs images of 'b', and there are none",
        ),
    ],
)
def test_bad_files_are_refused_and_leave_nothing(tmp_path: Path, file: SourceFile, message: str) -> None:
    with pytest.raises(DataError, match=message):
        make(tmp_path / "s", [source_files()[0], file])
    assert list(tmp_path.iterdir()) == []


def test_every_flipped_byte_is_found(store: ArrayStore) -> None:
    generator = np.random.default_rng(2)
    for name in ("images.npy", "labels.npy", "manifest.json"):
        path = store.path / name
        good = path.read_bytes()
        places = [0, 5, 127, 128, len(good) - 2, *generator.integers(0, len(good), 60)]
        for place in places:
            bad = bytearray(good)
            bad[place] ^= 1 << int(generator.integers(0, 8))
            if name == "manifest.json" and _same_content(good, bytes(bad)):
                continue
            path.write_bytes(bytes(bad))
            with pytest.raises(DataError):
                ArrayStore(store.path, verify=True)
        path.write_bytes(good)
    ArrayStore(store.path, verify=True)


def _same_content(good: bytes, bad: bytes) -> bool:
    """Whether two manifests differ only in white space or in where the data came from."""
    try:
        a, b = json.loads(good), json.loads(bad)
    except ValueError:
        return False
    a.pop("source"), b.pop("source", None)
    return bool(a == b)


@pytest.mark.parametrize("name", ["images.npy", "labels.npy", "manifest.json"])
def test_every_cut_is_found_before_mapping(store: ArrayStore, name: str) -> None:
    path = store.path / name
    good = path.read_bytes()
    for length in (0, 1, 127, 128, len(good) // 2, len(good) - 1):
        path.write_bytes(good[:length])
        with pytest.raises(DataError, match=name.split(".")[0]):
            ArrayStore(store.path)
    path.unlink()
    with pytest.raises(DataError):
        ArrayStore(store.path)


def test_a_flip_is_found_when_the_bytes_are_first_copied(store: ArrayStore) -> None:
    path = store.path / "images.npy"
    with open(path, "r+b") as handle:
        handle.seek(5000)
        byte = handle.read(1)
        handle.seek(5000)
        handle.write(bytes([byte[0] ^ 4]))
    opened = ArrayStore(store.path)
    with pytest.raises(DataError, match=r"images\.npy: bytes 0 to 4194304 do not have their checksum"):
        opened.load()
    for index in (7, [3, 1]):
        with pytest.raises(DataError, match=r"images\.npy: bytes 0 to 4194304 do not have their checksum"):
            opened.split("report/train")[index]


def test_what_is_no_store_is_said(tmp_path: Path, store: ArrayStore) -> None:
    with pytest.raises(DataError, match="is not a store: there is no manifest"):
        ArrayStore(tmp_path / "nowhere")
    other = tmp_path / "other"
    shutil.copytree(store.path, other)
    (other / "manifest.json").write_text('{"format": "else"}')
    with pytest.raises(DataError, match="not one of fastcifar's"):
        ArrayStore(other)
    (other / "manifest.json").write_text('{"format": "fastcifar-store", "version": 2}')
    with pytest.raises(DataError, match="format version 2, this fastcifar reads 1: update"):
        ArrayStore(other)
    (other / "manifest.json").write_text("[" * 100_000)
    with pytest.raises(DataError, match="is not JSON"):
        ArrayStore(other)


@pytest.mark.parametrize("path", [None, 5, ["a"]])
def test_what_is_no_path_is_said(path: Any, tmp_path: Path) -> None:
    images, labels = np.zeros((1, 8, 8, 3), np.uint8), np.zeros(1, np.int64)
    for use in (
        lambda: ArrayStore(path),
        lambda: convert_arrays(path, images, labels),
        lambda: convert_folder(tmp_path / "s", path),
        lambda: convert_dataset(path, [(images[0], 0)]),
    ):
        with pytest.raises(ConfigError, match=r"(path|folder) must be a path, got "):
            use()
    assert not list(tmp_path.iterdir())


def test_blocks_of_one_name_are_one_file(tmp_path: Path) -> None:
    files = source_files()
    whole = make(tmp_path / "whole", files)
    blocks = [
        SourceFile(file.name, file.images[start : start + 7], file.labels[start : start + 7])
        for file in files
        for start in range(0, len(file.images), 7)
    ]
    assert make(tmp_path / "blocks", blocks).digest == whole.digest
    with pytest.raises(DataError, match="two files have the same name; all are a, b, a"):
        make(tmp_path / "bad", [files[0], files[1], files[0]])


def test_progress_is_told_by_blocks_and_to_the_end(tmp_path: Path) -> None:
    seen: list[tuple[int, int | None]] = []
    write_store(
        tmp_path / "s",
        source_files(),
        name="s",
        classes=None,
        splits=SPLITS,
        source={},
        total=1550,
        progress=lambda done, total: seen.append((done, total)),
    )
    assert seen == [(1024, 1550), (1500, 1550), (1530, 1550), (1550, 1550)]
    assert ArrayStore(tmp_path / "s").classes == ("0", "1", "2", "3")


def test_without_test_images_there_is_no_test_split(tmp_path: Path) -> None:
    files = source_files()[:1]
    write_store(tmp_path / "s", files, name="s", classes=None, splits={"full": {"train": ["a"]}}, source={})
    store = ArrayStore(tmp_path / "s")
    assert store.split_names() == ["train", "full/train", "holdout/train", "holdout/validation"]
    for name in store.split_names():
        assert len(store.split(name))
    with pytest.raises(ConfigError, match="unknown split 'holdout/test'"):
        store.split("holdout/test")


@pytest.mark.parametrize("number", [errno.EMFILE, errno.EACCES, errno.EIO])
@pytest.mark.parametrize("name", ["images.npy", "labels.npy"])
def test_what_cannot_be_read_now_is_not_called_damaged(
    store: ArrayStore, name: str, number: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A damaged store is set aside and made anew; a process with too many open files must not do that."""

    def failing(path: Any, *arguments: Any, **options: Any) -> Any:
        if str(path).endswith(name):
            raise OSError(number, os.strerror(number), str(path))
        return open(path, *arguments, **options)

    monkeypatch.setattr(store_module, "open", failing, raising=False)
    with pytest.raises(DataError, match=f"{name} cannot be read: {os.strerror(number)}$") as caught:
        ArrayStore(store.path, verify=True)
    assert not isinstance(caught.value, DamagedStoreError)


def test_a_store_that_was_replaced_is_not_vouched_for_by_the_new_one(store: ArrayStore, tmp_path: Path) -> None:
    with open(store.path / "images.npy", "r+b") as handle:
        handle.seek(-5, os.SEEK_END)
        handle.write(bytes(5))
    damaged = ArrayStore(store.path)
    os.rename(store.path, tmp_path / "aside")
    make(store.path)
    with pytest.raises(DataError, match="was replaced since it was opened: open it again"):
        damaged.split("report/test")[len(damaged.split("report/test")) - 1]
    ArrayStore(store.path).split("report/test")[0]


def test_the_working_folder_may_change(store: ArrayStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(store.path.parent)
    relative = ArrayStore(store.path.name)
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    relative.verify()
    relative.split("train")[0]


def test_a_copy_opens_it_again(store: ArrayStore) -> None:
    content = pickle.dumps(store)
    assert len(content) < 1000
    assert np.array_equal(pickle.loads(content).images, store.images)
