"""Reads a mapped store ahead of a loader, checks what it reads, and lets go of what was used.

One thread, from the first `prepare` to `close`, reads the bytes of the span of positions after the current one.
Each 4 MiB chunk is checked against its checksum before the first of its images is used.

    reader = Reader(store, plan)
    reader.prepare(epoch=0, start=0, size=512)     # these are in memory and checked; the next are being read
    reader.close()

How much is resident: two spans (of 64 MiB, or a window of the order `block`), and what the system maps around what
is read. The order `random` reads a page or two for each image, so it is for stores on fast disks; `block` reads
neighbours together.
"""

import contextlib
import mmap
import os
import threading
import time
import weakref
from concurrent.futures import CancelledError, Future, InvalidStateError
from queue import SimpleQueue
from typing import Any

import numpy as np

from fastcifar.data.layout import HEADER
from fastcifar.data.store import ArrayStore
from fastcifar.kernels import machine
from fastcifar.kernels.cpu import HostOrder
from fastcifar.kernels.plan import Plan

__all__ = ["Reader"]

_SPAN = 64 * 1024 * 1024  # bytes that are read ahead together, unless a window of blocks is
_PATIENCE = 10.0  # seconds that an end waits for what is being read, at most
_ALONE = 256 * 1024  # bytes that are worth a read of their own


class Reader:
    """The bytes of a store, in the order of a plan.

    A failed checksum is raised by the `prepare` that needs the bytes.

    Args:
        store: the store.
        plan: see `Plan`.
    """

    def __init__(self, store: ArrayStore, plan: Plan) -> None:
        self._store = store
        self._plan = plan
        self._order = HostOrder(plan)
        self._touch = machine.load()["touch"]
        self._buffer = memoryview(bytearray(1024 * 1024))
        self._bytes = int(np.prod(store.image_shape))
        self._span = plan.block_size * plan.window if plan.order == "block" else max(_SPAN // self._bytes, 1)
        self._process = os.getpid()
        if hasattr(mmap, "MADV_RANDOM"):
            self._advise(mmap.MADV_RANDOM)  # or each page that is missing is read with 31 that nobody wants
        self._thread: _Thread | None = None
        self._starting = threading.Lock()  # not for `close`
        self._spans: dict[tuple[int, int], Future[None]] = {}

    def prepare(self, *, epoch: int, start: int, size: int) -> None:
        """Wait until the images at these positions are in memory and checked; begin to read those after them.

        Raises:
            DataError: they do not have their checksum.
        """
        while True:
            try:
                self._prepare(epoch, start, size)
            except CancelledError:  # another thread's pass ended, and closed this
                self._spans = {}
                continue
            return

    def _prepare(self, epoch: int, start: int, size: int) -> None:
        first, last = start // self._span, (start + max(size, 1) - 1) // self._span
        wanted = [(epoch, span) for span in range(first, last + 1)]
        following = (epoch, last + 1) if (last + 1) * self._span < self._plan.samples else ((epoch + 1) % 2**32, 0)
        if self._process != os.getpid():  # a fork has no threads
            self._process, self._thread, self._spans = os.getpid(), None, {}
            self._starting = threading.Lock()
        spans = self._spans  # another thread may set others
        if spans.keys() != {*wanted, following}:
            self._let_go()
            self._spans = spans = {key: self._begin(*key) for key in (*wanted, following)}
        for key in wanted:
            spans[key].result()

    def close(self) -> None:
        """End the thread, once it has read what it is reading; `prepare` starts another.

        The garbage collector may call it at any instant: it takes no lock.
        """
        thread, self._thread, self._spans = self._thread, None, {}
        if thread is not None:
            thread.end()
        self._let_go()

    def __del__(self) -> None:
        if (thread := getattr(self, "_thread", None)) is not None:
            thread.end()

    def __reduce__(self) -> tuple[Any, ...]:
        return Reader, (self._store, self._plan)

    def _begin(self, epoch: int, span: int) -> "Future[None]":
        if (begun := self._spans.get((epoch, span))) is not None:
            return begun
        with self._starting:
            if (thread := self._thread) is None:
                self._thread = thread = _Thread(self)
        return thread.submit(epoch, span)

    def _read(self, epoch: int, span: int) -> None:
        start = span * self._span
        rows = np.sort(self._order.rows(epoch, start, min(self._span, self._plan.samples - start)))
        self._store.check_rows(rows)
        with open(self._store.path / "images.npy", "rb", buffering=0) as handle:
            for run in np.split(rows, np.flatnonzero(np.diff(rows) > 1) + 1):
                self._read_run(handle.fileno(), HEADER + int(run[0]) * self._bytes, len(run) * self._bytes)
        # waits for what was only asked for; without Python's lock
        self._touch(self._store.images.ctypes.data, rows.ctypes.data, len(rows), self._bytes)

    def _read_run(self, file: int, start: int, size: int) -> None:
        """Read neighbours at once, and ask for few of them: so that many are on their way together."""
        if not hasattr(os, "posix_fadvise"):
            return
        if size < _ALONE:
            os.posix_fadvise(file, start, size, os.POSIX_FADV_WILLNEED)
            return
        for at in range(start, start + size, len(self._buffer)):
            os.preadv(file, [self._buffer[: start + size - at]], at)

    def _let_go(self) -> None:
        """Unmap the pages that were read. What is still wanted is in the system's cache, and mapped again."""
        if hasattr(mmap, "MADV_DONTNEED"):
            self._advise(mmap.MADV_DONTNEED)

    def _advise(self, advice: int) -> None:
        mapped = getattr(self._store.images, "_mmap", None)
        if mapped is not None:
            mapped.madvise(advice)


class _Thread:
    """Lets a reader, which it keeps not alive, read spans one after another in a thread; or in the caller's."""

    def __init__(self, reader: Reader) -> None:
        self._reader = weakref.ref(reader)
        self._queue: SimpleQueue[tuple[Future[None], int, int] | None] = SimpleQueue()  # its `put` may be interrupted
        self._ended = self._alone = False
        self._calling: int | None = None  # the thread that is in a call
        try:
            threading.Thread(target=self._run, name="fastcifar-reader", daemon=True).start()
        except RuntimeError:  # the system has none to give
            self._alone = True

    def submit(self, epoch: int, span: int) -> "Future[None]":
        """The call as a future, which is cancelled where `end` comes first."""
        future: Future[None] = Future()
        if self._alone:
            self._call(future, epoch, span)
        else:
            self._queue.put((future, epoch, span))
            if self._ended:  # it may be behind the end
                future.cancel()
        return future

    def end(self) -> None:
        """Call nothing more, and let the thread end; a call that is under way ends first, or `_PATIENCE` runs out.

        It takes no lock, which whom it interrupts may hold.
        """
        self._ended = True
        self._queue.put(None)
        until = time.monotonic() + _PATIENCE
        while self._calling not in (None, threading.get_ident()) and time.monotonic() < until:
            time.sleep(1e-3)

    def _run(self) -> None:
        while (call := self._queue.get()) is not None:
            self._call(*call)
            del call  # a future that failed holds what it failed in

    def _call(self, future: "Future[None]", epoch: int, span: int) -> None:
        self._calling, error = threading.get_ident(), None  # before `_ended` is looked at
        try:
            reader = self._reader()
            if self._ended or reader is None:
                raise CancelledError
            reader._read(epoch, span)
        except BaseException as raised:
            error = raised
        finally:
            reader = None
            self._calling = None  # before the future's lock is taken
        with contextlib.suppress(InvalidStateError):  # it was cancelled
            future.set_result(None) if error is None else future.set_exception(error)
        del error
