"""What the CPU kernel's compiled loops and those who call them agree on; importing it loads no numba."""

from typing import Final

from fastcifar.kernels.rng import ROUNDS

__all__ = [
    "AWAKE",
    "BOX_WORDS",
    "CAME",
    "CHUNK",
    "END",
    "FIELDS",
    "FUNCTIONS",
    "INSIDE",
    "JOB",
    "KEYS",
    "MADE",
    "NEXT",
    "POSTED",
    "SCRATCH",
    "SLACK",
    "TAKING",
]

_STORE = ("images", "labels", "rows", "offset", "samples", "bytes", "height", "width", "channels")
_ORDERED = ("key0", "key1", "order", "block_size", "window")
_DRAWN = ("crop", "zero", "flip", "cutout")
FIELDS: Final = (*_STORE, *_ORDERED, *_DRAWN, "dtype", "planar", "period", "a", "b", "cached")
"""What the parameters hold, int64 each; `images`, `labels`, `rows` (0: a range), `a` and `b` are addresses. A batch of
more than `cached` bytes is written past the cache."""

FUNCTIONS: Final = {"work": 3, "post": 2, "leave": 2, "order_rows": 5, "touch": 4}
"""The functions of `cpu_jobs` and `cpu_loops`, and how many int64 each takes; each gives one back."""

NEXT, MADE, CAME, INSIDE, SCRATCH = 16, 17, 18, 19, 32
"""Words of a job, which is memory of int64.

Its first are the address of the parameters, the threads there is scratch for (one that comes too late for any
does nothing), the epoch, the first position, the number of images, and the addresses of the images and of the
labels (int64). Then, a cache line apart and zeros at first, what threads share: the next image to take, images
made, threads that came, helpers that are at it; and from SCRATCH on their scratch.
"""

POSTED, JOB, TAKING, AWAKE, BOX_WORDS = 0, 1, 2, 3, 16
"""Words of a box, through which helpers get jobs: jobs there have been, the address of the one to do (0: none),
helpers that are just looking at it, and helpers that serve. Zeros at first."""

END: Final = -1
"""In the place of a job's address: whoever serves is to return."""

CHUNK: Final = 8
"""Images a thread takes at a time: 9 us of work, so two threads end within 9 us of each other."""

SLACK: Final = 32
"""Bytes that a run may read or write beyond its end; every staging buffer has as many on both sides."""

KEYS: Final = 2 * (ROUNDS + 2) + 2
"""Words of 64 bits that hold the keys of an epoch's order."""
