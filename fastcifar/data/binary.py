"""Reads CIFAR's binary batch files: records of one or two label bytes and 3,072 pixels. Touches nothing else.

CIFAR-10's record is its label and three planes of 32 x 32 (red, green, blue); CIFAR-100's has the coarse label before
the fine one (https://www.cs.toronto.edu/~kriz/cifar.html).

    batch = read_batch(Path("data_batch_1.bin").read_bytes(), source="data_batch_1.bin", labels=(10,))
    batch.data, batch.labels                                 # uint8[10000, 3072], int64[10000]
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from fastcifar.data.pickles import check_names
from fastcifar.errors import DataError

__all__ = ["BinaryBatch", "read_batch", "read_label_names"]

_ROW = 3072  # three planes of 32 x 32


@dataclass(frozen=True)
class BinaryBatch:
    """One batch file.

    Attributes:
        data: uint8[N, 3072], a read-only view into the file's bytes.
        labels: int64[N], the last label of each record.
    """

    data: NDArray[np.uint8]
    labels: NDArray[np.int64]


def read_batch(blob: bytes | memoryview, *, source: str, labels: tuple[int, ...]) -> BinaryBatch:
    """Read one batch file.

    Args:
        blob: its bytes, which `data` refers to afterwards.
        source: its name, for messages.
        labels: for each label byte of a record, the number of its classes: (10,), or CIFAR-100's (20, 100).

    Raises:
        DataError: it is empty or cut short, or a label is out of range.
    """
    size = len(labels) + _ROW
    if not len(blob) or len(blob) % size:
        raise DataError(f"{source}: has {len(blob)} bytes, which is not a number of records of {size} bytes")
    records = np.frombuffer(blob, np.uint8).reshape(-1, size)
    for byte, classes in enumerate(labels):
        column = records[:, byte]
        wrong = np.flatnonzero(column >= classes)
        if len(wrong):
            raise DataError(
                f"{source}: label {byte + 1} of record {wrong[0]} is {column[wrong[0]]}, outside 0 to {classes - 1} "
                f"({len(wrong)} such)"
            )
    return BinaryBatch(records[:, len(labels) :], records[:, len(labels) - 1].astype(np.int64))


def read_label_names(blob: bytes | memoryview, *, source: str, classes: int) -> tuple[str, ...]:
    """Read the names of the classes, one a line; empty lines at the end are passed over, as the published file has one.

    Raises:
        DataError: a name is empty or repeated or no text, or there are too few or many.
    """
    names = tuple(str(blob, "utf-8", "backslashreplace").rstrip("\r\n").split("\n", classes))
    return check_names(tuple(name.rstrip("\r") for name in names), where=f"{source}:", classes=classes)
