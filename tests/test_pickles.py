import pickle
import time
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from fastcifar.data.pickles import read_batch, read_label_names
from fastcifar.errors import DataError
from tests.cifar_files import CLASSES, batch_pickle, meta_pickle, py2_pickle

ROWS = 12
IMAGES: NDArray[np.uint8] = np.random.default_rng(1).integers(0, 256, (ROWS, 3072), np.uint8)
LABELS = [i % 10 for i in range(ROWS)]


def fields(**changes: Any) -> dict[str, Any]:
    """A batch's content as Python 3 has it, with changes; None takes a key out."""
    content = {
        "batch_label": "testing batch 1 of 1",
        "labels": LABELS,
        "data": IMAGES,
        "filenames": [f"{i}.png" for i in range(ROWS)],
    }
    return {key: value for key, value in (content | changes).items() if value is not None}


def refuse(content: object, message: str, protocol: int = 2, **options: Any) -> None:
    with pytest.raises(DataError, match=message) as caught:
        read_batch(pickle.dumps(content, protocol), source="data_batch_1", **options)
    assert str(caught.value).startswith("data_batch_1: ")
    assert "\n" not in str(caught.value)


def test_the_published_form() -> None:
    blob = batch_pickle(IMAGES, LABELS)
    batch = read_batch(blob, source="x")
    np.testing.assert_array_equal(batch.data, IMAGES)
    assert batch.data.dtype == np.uint8
    np.testing.assert_array_equal(batch.labels, LABELS)
    assert batch.labels.dtype == np.int64
    assert batch.batch_label == "training batch 1 of 5"
    assert batch.filenames == tuple(f"image_s_{i:06d}.png" for i in range(ROWS))


def test_the_hand_written_form_is_what_python_reads() -> None:
    read = pickle.loads(batch_pickle(IMAGES, LABELS), encoding="bytes")
    np.testing.assert_array_equal(read[b"data"], IMAGES)
    assert read[b"labels"] == LABELS
    assert pickle.loads(meta_pickle(), encoding="latin1")["label_names"] == list(CLASSES)


def test_the_images_are_a_view_of_the_file() -> None:
    blob = batch_pickle(IMAGES, LABELS)
    for given in (blob, memoryview(bytearray(blob))):
        data = read_batch(given, source="x").data
        assert np.shares_memory(data, np.frombuffer(given, np.uint8))
        assert not data.flags.writeable


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
@pytest.mark.parametrize("numpy_1", [False, True], ids=["numpy 2", "numpy 1"])
@pytest.mark.parametrize("keys", [str, bytes])
@pytest.mark.parametrize("labels", [LABELS, np.array(LABELS), np.array(LABELS, ">u2"), np.array(LABELS, np.int8)])
@pytest.mark.parametrize("order", ["C", "F"])
def test_pickles_written_again(protocol: int, numpy_1: bool, keys: type, labels: Any, order: Any) -> None:
    content = fields(labels=labels, data=np.array(IMAGES, order=order))
    if keys is bytes:
        content = {key.encode(): value for key, value in content.items()}
    blob = pickle.dumps(content, protocol)
    if numpy_1:
        # NumPy 1's modules have no underscore; a frame's length, which is then wrong, is only a hint
        for new, old in ((b"numpy._core.multiarray", b"numpy.core.multiarray"), (b"numpy._core.n", b"numpy.core.n")):
            blob = blob.replace(b"c" + new, b"c" + old)
            for name in (b"numpy._core.multiarray", b"numpy._core.numeric"):
                older = name.replace(b"_core", b"core")
                blob = blob.replace(bytes([len(name)]) + name, bytes([len(older)]) + older)
        assert b"numpy._core" not in blob
    batch = read_batch(blob, source="x")
    np.testing.assert_array_equal(batch.data, IMAGES)
    assert batch.data.flags.c_contiguous
    np.testing.assert_array_equal(batch.labels, LABELS)
    assert batch.labels.dtype == np.int64
    assert batch.batch_label == "testing batch 1 of 1"
    assert len(batch.filenames) == ROWS


def test_cifar100_has_two_kinds_of_labels() -> None:
    coarse = [label % 3 for label in LABELS]
    content = fields(labels=None, fine_labels=LABELS, coarse_labels=coarse)
    blob = pickle.dumps(content, 4)
    assert read_batch(blob, source="x", label_key="fine_labels", classes=100).labels.tolist() == LABELS
    assert read_batch(blob, source="x", label_key="coarse_labels", classes=20).labels.tolist() == coarse
    meta = py2_pickle({"fine_label_names": [b"apple", b"bear"], "coarse_label_names": [b"fish"]})
    assert read_label_names(meta, source="x", key="fine_label_names", classes=2) == ("apple", "bear")
    assert read_label_names(meta, source="x", key="coarse_label_names", classes=1) == ("fish",)


def test_titles_and_file_names_may_be_missing_and_odd() -> None:
    batch = read_batch(pickle.dumps(fields(batch_label=None, filenames=None), 2), source="x")
    assert (batch.batch_label, batch.filenames) == ("", ())
    names = [b"caf\xc3\xa9.png", b"caf\xe9.png", b"n" * 300, *[b"x"] * (ROWS - 3)]
    blob = py2_pickle({"data": IMAGES, "labels": LABELS, "filenames": names})
    assert read_batch(blob, source="x").filenames[:3] == ("café.png", "caf\\xe9.png", "n" * 300)


def test_labels_shared_through_the_memo_and_long_integers() -> None:
    shared = pickle.dumps({"labels": LABELS, "fine_labels": LABELS, "data": IMAGES}, 2)
    assert read_batch(shared, source="x", label_key="fine_labels").labels.tolist() == LABELS
    long = batch_pickle(np.zeros_like(IMAGES), LABELS).replace(b"K\x09", b"\x8a\x01\x09")
    assert read_batch(long, source="x").labels.tolist() == LABELS


@pytest.mark.parametrize("key", ["data", "labels"])
def test_a_missing_key_is_named(key: str) -> None:
    refuse(fields(**{key: None}), f"key '{key}' is missing; its keys are ")


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (IMAGES.tolist(), "'data' is a list, expected a uint8 array"),
        (b"bytes", "'data' is bytes, expected a uint8 array"),
        (IMAGES.astype(np.int8), "'data' has dtype int8, expected uint8"),
        (IMAGES.astype(np.float32), "dtype 'f4' is not one of the integer types"),
        (IMAGES.astype(object), "dtype 'O8' is not one of the integer types"),
        (IMAGES.reshape(ROWS, 3, 32, 32), "shape is a tuple, not one or two lengths"),
        (IMAGES.reshape(-1), r"'data' has shape \(36864,\), expected \(N, 3072\)"),
        (IMAGES[:, :3071].copy(), r"'data' has shape \(12, 3071\), expected \(N, 3072\)"),
        (IMAGES[:0], r"'data' has shape \(0, 3072\), expected \(N, 3072\)"),
        (IMAGES[:-1], "'labels' holds 12 entries, 'data' 11 rows"),
    ],
)
def test_wrong_images_are_refused(data: Any, message: str) -> None:
    refuse(fields(data=data), message, protocol=4)


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        (LABELS[:-1], "'labels' holds 11 entries, 'data' 12 rows"),
        (np.array(LABELS[:-1]), "'labels' holds 11 entries, 'data' 12 rows"),
        ([*LABELS[:-1], 10], r"'labels' entry 11 is 10, outside 0 to 9 \(1 such\)"),
        ([-1, *LABELS[1:-1], -3], r"'labels' entry 0 is -1, outside 0 to 9 \(2 such\)"),
        (np.array([-1, *LABELS[1:]]), "'labels' entry 0 is -1, outside 0 to 9"),
        (np.array([*LABELS[:-1], 2**64 - 1], np.uint64), "'labels' entry 11 is 18446744073709551615, outside"),
        ([*LABELS[:-1], True], "'labels' entry 11 is True, expected an integer"),
        ([*LABELS[:-1], None], "'labels' entry 11 is None, expected an integer"),
        ([*LABELS[:-1], "9"], "'labels' entry 11 is '9', expected an integer"),
        ([*LABELS[:-1], [9]], "'labels' entry 11 is a list, expected an integer"),
        ([*LABELS[:-1], 2**80], "an integer has 11 bytes, more than the 8 allowed"),
        (tuple(LABELS), "'labels' is a tuple, expected a list"),
        ({}, "'labels' is a dict, expected a list"),
        (np.array([LABELS]), r"'labels' has shape \(1, 12\), expected one dimension"),
        (np.array(LABELS, np.float64), "dtype 'f8' is not one of the integer types"),
    ],
)
def test_wrong_labels_are_refused(labels: Any, message: str) -> None:
    refuse(fields(labels=labels), message)


def test_labels_are_checked_against_the_number_of_classes() -> None:
    refuse(fields(), "'labels' entry 5 is 5, outside 0 to 4", classes=5)


def test_wrong_names_are_refused() -> None:
    refuse(fields(filenames=["a"]), "'filenames' holds 1 entries, 'data' 12 rows")
    refuse(fields(filenames="abc"), "'filenames' is 'abc', expected a list")
    refuse(fields(filenames=[1] * ROWS), "'filenames' holds 1, expected text")
    refuse(fields(batch_label=[1]), "'batch_label' holds a list, expected text")


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (CLASSES[:-1], "m: 'label_names' holds 9 names, expected 10"),
        ([*CLASSES, "train"], "m: 'label_names' holds 11 names, expected 10"),
        ([*CLASSES[:-1], "ship"], "m: 'label_names' holds a name twice"),
        ([*CLASSES[:-1], " "], "m: 'label_names' entry 9 is not a name: ' '"),
        ([*CLASSES[:-1], "a\x1b[2J"], r"m: 'label_names' entry 9 is not a name: 'a\\x1b\[2J'"),
    ],
)
def test_wrong_class_names_are_refused(names: Any, message: str) -> None:
    with pytest.raises(DataError, match=message):
        read_label_names(meta_pickle(names), source="m")


def test_class_names_must_be_there() -> None:
    with pytest.raises(DataError, match="m: key 'label_names' is missing; its keys are 'batch_label', 'data'"):
        read_label_names(batch_pickle(IMAGES, LABELS), source="m")
    assert read_label_names(meta_pickle(), source="m") == CLASSES


def test_a_full_batch_is_read_quickly() -> None:
    images = np.zeros((10_000, 3072), np.uint8)
    blob = batch_pickle(images, [0] * 10_000)
    taken = []
    for _ in range(3):
        start = time.perf_counter()
        read_batch(blob, source="x")
        taken.append(time.perf_counter() - start)
    assert min(taken) < 0.4  # measured: 0.04 s; ten times that, for a busy machine
