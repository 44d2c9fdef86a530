"""Reads CIFAR's batch files: from the bytes of a pickle to checked arrays, without running the pickle.

`opcodes` reads the structure; here every field is checked, and an error names the file and the field. Other keys than
those of the published files are passed over: nothing reads them. It touches nothing but the bytes it is given.

    batch = read_batch(Path("data_batch_1").read_bytes(), source="data_batch_1")
    batch.data, batch.labels                                 # uint8[10000, 3072], int64[10000]
"""

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fastcifar.data.opcodes import Reader
from fastcifar.data.symbols import Array, shown
from fastcifar.errors import DataError

__all__ = ["PickledBatch", "check_names", "read_batch", "read_label_names"]

_ROW = 3072  # three planes of 32 x 32: red, green, blue
_MAX_TEXT = 4096  # bytes in one text: the memo can refer to the same one again and again, and each time it is decoded


@dataclass(frozen=True)
class PickledBatch:
    """One batch file.

    Attributes:
        data: uint8[N, 3072], a read-only view into the file's bytes where they hold it as it is.
        labels: int64[N], each in [0, classes).
        batch_label: the file's own title; empty if it has none.
        filenames: N names, or none.
    """

    data: NDArray[np.uint8]
    labels: NDArray[np.int64]
    batch_label: str
    filenames: tuple[str, ...]


def read_batch(blob: bytes | memoryview, *, source: str, label_key: str = "labels", classes: int = 10) -> PickledBatch:
    """Read one batch file.

    Args:
        blob: its bytes, which `data` refers to afterwards.
        source: its name, for messages.
        label_key: "labels", or CIFAR-100's "fine_labels" or "coarse_labels".
        classes: each label must be in [0, classes).

    Raises:
        DataError: it is not a batch file, or a field is missing or wrong; the message names it.
    """
    fields = Reader(blob, source=source).read()
    data = _data(_field(fields, "data", source), source)
    labels = _labels(_field(fields, label_key, source), label_key, len(data), classes, source)
    # names are for people: an odd byte in one must not keep the images from being read
    listed = _list(fields.get("filenames", []), "filenames", source)
    if listed:
        _check_count(len(listed), "filenames", len(data), source)
    names = tuple(_text(name, "filenames", source) for name in listed)
    return PickledBatch(data, labels, _text(fields.get("batch_label", ""), "batch_label", source), names)


def read_label_names(
    blob: bytes | memoryview, *, source: str, key: str = "label_names", classes: int = 10
) -> tuple[str, ...]:
    """Read the names of the classes from a meta file (`batches.meta`, or CIFAR-100's `meta`).

    Args:
        blob: its bytes.
        source: its name, for messages.
        key: "label_names", or CIFAR-100's "fine_label_names" or "coarse_label_names".
        classes: how many names there must be.

    Raises:
        DataError: it is not a meta file, or its names are missing, empty, repeated, or too few or many.
    """
    found = _list(_field(Reader(blob, source=source).read(), key, source), key, source)
    where = f"{source}: {key!r}"
    _check_names_count(len(found), where, classes)
    return check_names(tuple(_text(name, key, source) for name in found), where=where, classes=classes)


def check_names(names: tuple[str, ...], *, where: str, classes: int) -> tuple[str, ...]:
    """The names of the classes, if that is what they are.

    Args:
        names: as they were read.
        where: the file and field, for messages.
        classes: how many there must be.

    Raises:
        DataError: one is empty or cannot be printed or comes twice, or there are too few or many.
    """
    _check_names_count(len(names), where, classes)
    for index, name in enumerate(names):
        if not name.isprintable() or not name.strip():
            raise DataError(f"{where} entry {index} is not a name: {shown(name)}")
    if len(set(names)) != classes:
        raise DataError(f"{where} holds a name twice")
    return names


def _check_names_count(count: int, where: str, classes: int) -> None:
    if count != classes:
        raise DataError(f"{where} holds {count} names, expected {classes}")


def _field(fields: dict[str, Any], key: str, source: str) -> Any:
    if key not in fields:
        keys = ", ".join(shown(name) for name in sorted(fields)[:8]) or "none"
        raise DataError(f"{source}: key {key!r} is missing; its keys are {keys}")
    return fields[key]


def _array(value: Array, key: str, source: str) -> NDArray[Any]:
    try:
        return value.numpy()
    except ValueError as error:
        raise DataError(f"{source}: {key!r} {error}") from None


def _data(value: object, source: str) -> NDArray[np.uint8]:
    if not isinstance(value, Array):
        raise DataError(f"{source}: 'data' is {shown(value)}, expected a uint8 array")
    array = _array(value, "data", source)
    if array.dtype != np.uint8:
        raise DataError(f"{source}: 'data' has dtype {array.dtype}, expected uint8")
    if array.ndim != 2 or array.shape[1] != _ROW or not len(array):
        raise DataError(f"{source}: 'data' has shape {array.shape}, expected (N, {_ROW})")
    return array


def _labels(value: object, key: str, rows: int, classes: int, source: str) -> NDArray[np.int64]:
    if isinstance(value, Array):
        array = _array(value, key, source)
        if array.ndim != 1:
            raise DataError(f"{source}: {key!r} has shape {array.shape}, expected one dimension")
        _check_count(len(array), key, rows, source)  # first: int64 takes up to eight times the file's bytes
    else:
        _check_count(len(_list(value, key, source)), key, rows, source)
        for index, label in enumerate(_list(value, key, source)):
            if type(label) is not int:
                raise DataError(f"{source}: {key!r} entry {index} is {shown(label)}, expected an integer")
        array = np.array(value, np.int64)  # the reader has no integer of more than 64 bits
    wrong = np.flatnonzero((array < 0) | (array >= classes))
    if len(wrong):
        raise DataError(
            f"{source}: {key!r} entry {wrong[0]} is {array[wrong[0]]}, outside 0 to {classes - 1} ({len(wrong)} such)"
        )
    return array.astype(np.int64)


def _check_count(count: int, key: str, rows: int, source: str) -> None:
    if count != rows:
        raise DataError(f"{source}: {key!r} holds {count} entries, 'data' {rows} rows")


def _list(value: object, key: str, source: str) -> list[Any]:
    if not isinstance(value, list):
        raise DataError(f"{source}: {key!r} is {shown(value)}, expected a list")
    return value


def _text(value: object, key: str, source: str) -> str:
    if isinstance(value, bytes | memoryview | str) and len(value) > _MAX_TEXT:
        raise DataError(f"{source}: {key!r} holds a text of {len(value)} bytes, more than the {_MAX_TEXT} allowed")
    if isinstance(value, bytes | memoryview):
        return str(value, "utf-8", "backslashreplace")
    if not isinstance(value, str):
        raise DataError(f"{source}: {key!r} holds {shown(value)}, expected text")
    return value
