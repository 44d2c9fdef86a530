"""The CPU kernel: permute, gather, augment, scale and lay out a batch in one pass over the bytes, with numba.

It reads the images and labels it is given and writes only tensors it makes; it keeps a few output
buffers and threads, which end with the last kernel.

    kernel = CpuKernel(images, labels, plan)                         # uint8[n, H, W, C], integer[n]
    out, targets = kernel(epoch=0, start=0, size=512)                # float32[512, C, H, W], int64[512]

Legend: n images in the store, N samples in the split, H x W pixels, C channels, B rows of a batch.
"""

import contextlib
import ctypes
import functools
import threading
import time
import weakref
from pathlib import Path
from typing import Any, Final, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fastcifar.kernels import machine
from fastcifar.kernels.cpu_fields import CHUNK, FIELDS, KEYS, SCRATCH, SLACK
from fastcifar.kernels.plan import IGNORE, Plan, check_plan, check_span
from fastcifar.kernels.rng import split_seed
from fastcifar.kernels.threads import Job, shared_team

__all__ = ["CpuKernel", "HostOrder"]

_CPU: Final = torch.device("cpu")  # reading the name takes 1 us
_BUFFERS: Final = {"float32": np.float32, "bfloat16": np.uint16, "float16": np.float16}
_KEPT = 4  # buffers: one being made, one made ahead, one held by the loop, one for a consumer that reads ahead
_PERIOD = 512  # elements that share one pass over the factors: 4 KB of them stay in the L1 cache
_LEAST_CACHED = 4 << 20
_SPINS = 8000  # looks for the other threads' last chunks (20 us) before sleeping


class _Launch(NamedTuple):
    position: tuple[int, int, int, int]  # epoch, start, size, rows
    images: Tensor
    targets: Tensor
    helpers: int
    job: Job


class CpuKernel:
    """Batches of a store in memory, or memory-mapped.

    A call may come from any thread. It uses up to `torch.get_num_threads()` threads. A returned tensor is
    never written again while anything refers to it.

    Args:
        images: uint8[n, H, W, C], C order.
        labels: integer[n].
        plan: see `Plan`; reflect padding needs crop < H and crop < W.

    Raises:
        ConfigError: the plan does not fit the images.
    """

    def __init__(self, images: NDArray[np.uint8], labels: NDArray[Any], plan: Plan) -> None:
        check_plan(plan, images.shape, len(labels))
        if images.dtype != np.uint8 or not images.flags.c_contiguous:
            raise ValueError(f"images must be uint8 in C order, got {images.dtype} with strides {images.strides}")
        _, height, width, channels = self._shape = images.shape
        self._plan = plan
        # The compiled code reads these by address: keep them.
        self._images = images
        self._labels = np.array(labels, dtype=np.int64)
        self._rows = None if plan.rows is None else np.array(plan.rows, dtype=np.int64)
        planar = not plan.channels_last and channels > 1
        row = width if planar else width * channels
        period = row * max(r for r in range(1, height + 1) if height % r == 0 and (r == 1 or r * row <= _PERIOD))
        # The factors of `period` consecutive output elements: [C, period] where planar, else [1, period].
        a, b = (factor[:, None] if planar else factor[None] for factor in (plan.scale, plan.shift))
        self._a, self._b = (np.ascontiguousarray(np.tile(f, period // f.shape[1]), dtype=np.float32) for f in (a, b))
        values = {
            **_order_values(plan, self._rows),
            "images": images.ctypes.data,
            "labels": self._labels.ctypes.data,
            "bytes": images.size,
            "height": height,
            "width": width,
            "channels": channels,
            "crop": plan.crop,
            "zero": plan.padding == "zero",
            "flip": ("none", "random", "alternating").index(plan.flip),
            "cutout": plan.cutout,
            "dtype": tuple(_BUFFERS).index(plan.dtype),
            "planar": planar,
            "period": period,
            "a": self._a.ctypes.data,
            "b": self._b.ctypes.data,
            "cached": _cached(),
        }
        self._parameters = np.array([values[name] for name in FIELDS], dtype=np.int64)
        self._parameters_at = self._parameters.ctypes.data
        elements = height * width * channels
        self._scratch_words = 3 * -(-(elements + 2 * SLACK) // 8) + KEYS + 2 * CHUNK  # as `make` cuts it
        self._buffers: list[tuple[NDArray[Any], weakref.ref[NDArray[Any]]]] = []
        self._lending = threading.Lock()
        self._kept = (self._images, self._labels, self._rows, self._a, self._b, self._parameters)
        functions = machine.load()
        self._work = functions["work"]
        self._team = shared_team(functions)
        # at most one; pop() is a single step, which no other thread comes between
        self._ahead: list[tuple[_Launch, object]] = []
        self._most_ahead = _cached() // (elements * np.dtype(_BUFFERS[plan.dtype]).itemsize)

    def __call__(self, *, epoch: int, start: int, size: int, capacity: int | None = None) -> tuple[Tensor, Tensor]:
        """The samples at positions start to start + size - 1 of an epoch's order, augmented.

        Args:
            epoch: 0 to 2**32 - 1.
            start: first position, in [0, N].
            size: number of positions.
            capacity: B, at least `size`; None: `size`.

        Returns:
            [B, C, H, W] of the plan's type, in channels-last memory if `plan.channels_last`, and int64[B].
            Rows from `size` on are zeros, with label IGNORE.

        Raises:
            ValueError: the positions are not in the epoch.
        """
        rows = check_span(self._plan, epoch, start, size, capacity)
        launch = self._take_ahead((epoch, start, size, rows))
        if launch is None:
            launch = self._stage(epoch, start, size, rows)
            if launch.helpers:
                self._team.post(launch.job, launch.helpers)
        try:
            made = self._work(0, launch.job.address, _SPINS if launch.helpers else 0)
            while made < size:
                time.sleep(20e-6)  # without Python's lock
                made = self._work(0, launch.job.address, 0)
        finally:
            # If Ctrl-C ends the wait, helpers still finish their chunks: the job keeps all they touch.
            if launch.helpers:
                self._team.retire(launch.job)
        return launch.images, launch.targets

    def prepare(self, *, epoch: int, start: int, size: int) -> None:
        """Let helpers begin with the batch that is wanted next, where that gains time.

        Between two batches a loop spends some 20 us in Python: at batch 128 helpers make a seventh of the next in it.
        """
        launch = self._stage(epoch, start, size, size) if size <= self._most_ahead and _helpers(size) else None
        if self._ahead:
            self.forget()
        if launch is not None:
            self._team.post(launch.job, launch.helpers)
            self._ahead.append((launch, self._team.generation))

    def forget(self) -> None:
        """Let go of a batch that was begun."""
        self._take_ahead(None)

    def _take_ahead(self, position: tuple[int, int, int, int] | None) -> _Launch | None:
        """What was begun, if it is the batch at `position`; else it is let go."""
        try:
            launch, generation = self._ahead.pop()
        except IndexError:
            return None
        if generation is not self._team.generation:  # begun by helpers that this process does not have
            return None
        if launch.position == position:
            return launch
        self._team.retire(launch.job)
        return None

    def _stage(self, epoch: int, start: int, size: int, rows: int) -> _Launch:
        buffer = self._take(rows)
        targets = torch.empty(rows, dtype=torch.int64, device=_CPU)
        if size < rows:
            buffer[size:] = 0
            targets[size:] = IGNORE
        images = torch.from_numpy(buffer)
        if self._plan.dtype == "bfloat16":  # NumPy has no such type
            images = images.view(torch.bfloat16)
        helpers = _helpers(size)
        # ctypes gives zeros, and the address in 0.1 us, where an array's takes 1.6
        words = (ctypes.c_int64 * (SCRATCH + (helpers + 1) * self._scratch_words))(
            self._parameters_at, helpers + 1, epoch, start, size, images.data_ptr(), targets.data_ptr()
        )
        job = Job(ctypes.addressof(words), words, (images, targets, self._kept))
        return _Launch((epoch, start, size, rows), images, targets, helpers, job)

    def _take(self, rows: int) -> NDArray[Any]:
        """[rows, C, H, W] in the memory format of the plan, which nobody else refers to.

        Where the allocator takes 6 MB fresh from the system, its page faults cost more than the kernel (measured:
        2.0 against 0.6 ms a batch), so buffers are kept. Each is lent as a view: `torch.from_numpy` holds the view
        for as long as any tensor shares its storage, so the buffer is free when the view is gone.
        """
        if not self._lending.acquire(blocking=False):  # two threads must not be lent the same buffer
            return self._fresh(rows)
        try:
            for i, (buffer, lent) in enumerate(self._buffers):
                if len(buffer) == rows and lent() is None:
                    view = buffer[:]
                    self._buffers[i] = (buffer, weakref.ref(view))
                    return view
            buffer = self._fresh(rows)
            view = buffer[:]
            self._buffers = [(buffer, weakref.ref(view)), *self._buffers[: _KEPT - 1]]
            return view
        finally:
            self._lending.release()

    def _fresh(self, rows: int) -> NDArray[Any]:
        _, height, width, channels = self._shape
        dtype = np.dtype(_BUFFERS[self._plan.dtype])
        size = rows * height * width * channels * dtype.itemsize
        memory = np.empty(size + 63, dtype=np.uint8)
        first = -memory.ctypes.data % 64  # at a cache line
        flat = memory[first : first + size].view(dtype)
        if self._plan.channels_last:
            return flat.reshape(rows, height, width, channels).transpose(0, 3, 1, 2)
        return flat.reshape(rows, channels, height, width)


@functools.cache
def _cached() -> int:
    """Bytes of the largest batch that is written to the cache: a quarter of the last level's, and 4 MiB at least.

    The batch that the loop holds, the one being made and the one before share it. Of larger ones the last few leave it
    before they are written anew, and all that is written would first be read from memory; those are written past it.
    Batch 512 in float32 (6 MiB), of a cache of 32 MiB: 2.98 million images/s in it, 2.43 past it.
    """
    with contextlib.suppress(OSError, ValueError):
        size = Path("/sys/devices/system/cpu/cpu0/cache/index3/size").read_text(encoding="ascii").strip()  # "32768K"
        return max(int(size.removesuffix("K")) * 1024 // 4, _LEAST_CACHED)
    return _LEAST_CACHED


def _helpers(size: int) -> int:
    """Threads that help with a batch. Below two chunks a thread, waking one (12 us) costs more than it saves."""
    return max(min(torch.get_num_threads(), size // (2 * CHUNK)) - 1, 0)


class HostOrder:
    """An epoch's order, on the host: the store's rows at positions.

    Args:
        plan: see `Plan`; checked.
    """

    def __init__(self, plan: Plan) -> None:
        self._rows = None if plan.rows is None else np.array(plan.rows, dtype=np.int64)
        values = _order_values(plan, self._rows)
        self._parameters = np.array([values.get(name, 0) for name in FIELDS], dtype=np.int64)
        self._order_rows = machine.load()["order_rows"]

    def rows(self, epoch: int, start: int, size: int) -> NDArray[np.int64]:
        """int64[size]: the rows at positions start to start + size - 1, which must be in the epoch."""
        out = np.empty(KEYS + size, dtype=np.int64)
        self._order_rows(self._parameters.ctypes.data, epoch, start, size, out.ctypes.data)
        return out[KEYS:]


def _order_values(plan: Plan, rows: NDArray[np.int64] | None) -> dict[str, int]:
    key0, key1 = split_seed(plan.seed)
    return {
        "rows": 0 if rows is None else rows.ctypes.data,
        "offset": plan.offset if rows is None else 0,
        "samples": plan.samples,
        "key0": key0,
        "key1": key1,
        "order": ("sequential", "random", "block").index(plan.order),
        "block_size": plan.block_size,
        "window": plan.window,
    }
