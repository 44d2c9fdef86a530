"""What the CPU kernel's compiled loops and those who call them agree on; importing it loads no numba."""

from typing import Final

from fastcifar.kernels.rng import ROUNDS

__all__ = ["CHUNK", "FIELDS", "FUNCTIONS", "KEYS", "SLACK"]

_STORE = ("images", "labels", "rows", "offset", "samples", "bytes", "height", "width", "channels")
_ORDERED = ("key0", "key1", "order", "block_size", "window")
_DRAWN = ("crop", "zero", "flip", "cutout")
FIELDS: Final = (*_STORE, *_ORDERED, *_DRAWN, "dtype", "planar", "period", "a", "b")
"""What the parameters hold, int64 each; `images`, `labels`, `rows` (0: a range), `a` and `b` are addresses."""

FUNCTIONS: Final = {"work": 11, "watch": 3, "order_rows": 5, "touch": 4}
"""The functions of `cpu_loops` and how many int64 each takes; each gives one back."""

CHUNK: Final = 8
"""Images a thread takes at a time: 9 us of work, so two threads end within 9 us of each other."""

SLACK: Final = 32
"""Bytes that a run may read or write beyond its end; every staging buffer has as many on both sides."""

KEYS: Final = 2 * (ROUNDS + 2) + 2
"""Words of 64 bits that hold the keys of an epoch's order."""
