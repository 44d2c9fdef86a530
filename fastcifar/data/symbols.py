"""What a batch's pickle may refer to, as symbols: never the objects themselves.

It touches nothing. `opcodes` makes these from a pickle, `pickles` turns them into checked arrays.

    Array(Dtype("u1", "|"), (2, 3), memoryview(b"abcdef")).numpy()       # uint8[2, 3]
"""

import enum
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

__all__ = ["INTEGERS", "NAMES", "ORDERS", "Array", "Dtype", "Name", "shown"]

_MAX_SHOWN = 64

INTEGERS = frozenset(f"{kind}{size}" for kind in "iu" for size in (1, 2, 4, 8))
ORDERS = frozenset("<>|=")


class Name(enum.Enum):
    """What the accepted names stand for; never the objects themselves."""

    RECONSTRUCT = enum.auto()
    FROMBUFFER = enum.auto()
    NDARRAY = enum.auto()
    DTYPE = enum.auto()
    ENCODE = enum.auto()


NAMES = {
    ("numpy.core.multiarray", "_reconstruct"): Name.RECONSTRUCT,
    ("numpy._core.multiarray", "_reconstruct"): Name.RECONSTRUCT,
    ("numpy.core.numeric", "_frombuffer"): Name.FROMBUFFER,
    ("numpy._core.numeric", "_frombuffer"): Name.FROMBUFFER,
    ("numpy", "ndarray"): Name.NDARRAY,
    ("numpy", "dtype"): Name.DTYPE,
    ("_codecs", "encode"): Name.ENCODE,  # protocol 2 writes Python 3's bytes as encode(text, "latin1")
}


@dataclass
class Dtype:
    """An integer type: `code` is one of INTEGERS, `order` one of ORDERS."""

    code: str
    order: str | None = None  # BUILD sets it, after the memo may already refer to this object


@dataclass
class Array:
    """A NumPy array as a pickle describes it: `raw` holds its bytes, in Fortran order if `fortran`."""

    dtype: Dtype | None = None
    shape: tuple[int, ...] = ()
    raw: memoryview | None = None
    fortran: bool = False

    def numpy(self) -> NDArray[Any]:
        """The array, a view into `raw` where that is in C order.

        Raises:
            ValueError: what is wrong with its description, in words.
        """
        if self.dtype is None or self.raw is None:
            raise ValueError("has no content")
        dtype = np.dtype((self.dtype.order or "=") + self.dtype.code)
        count = 1
        for side in self.shape:
            count *= side
        if count * dtype.itemsize != len(self.raw):
            raise ValueError(f"has shape {self.shape} of {self.dtype.code}, but {len(self.raw)} bytes")
        flat = np.frombuffer(self.raw, dtype) if count else np.empty(0, dtype)
        if self.fortran:
            return np.ascontiguousarray(flat.reshape(self.shape[::-1]).T)
        return flat.reshape(self.shape)


def shown(value: object) -> str:
    """Words for a value from a pickle; of bounded length even where its repr is not."""
    if value is None or isinstance(value, bool | int):
        return repr(value)
    if isinstance(value, str):
        return repr(value if len(value) <= _MAX_SHOWN else value[:_MAX_SHOWN] + "...")
    kinds = {bytes: "bytes", memoryview: "bytes", list: "a list", tuple: "a tuple", dict: "a dict", Array: "an array"}
    return kinds.get(type(value), f"a {type(value).__name__.strip('_').lower()}")
