"""Decodes blocks of images in several processes, in order; each ends with this one, however that ends.

Processes, since threads wait for each other's Python: 32x32 JPEGs came at 6,000 images/s from one thread, 4,600 from
two and 6,900 from two processes, on two cores that others used too. They are plain child processes on a pipe, and not
multiprocessing's: nothing is forked, the caller's script is not run again, and a closed pipe ends them in any case.

    with contextlib.closing(decode_blocks([(["cat/1.jpg"], 0)], how, workers=2)) as blocks:
        for decoded, label in blocks: ...
"""

import contextlib
import dataclasses
import json
import os
import queue
import threading
from collections import deque
from collections.abc import Generator, Iterable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

import numpy as np

from fastcifar import child
from fastcifar.data.images import Decoded, Decoding, Failure, decode_block, keep_freed_memory
from fastcifar.errors import DataError

__all__ = ["available_cores", "decode_blocks"]

T = TypeVar("T")

_CODE = "import json, sys; sys.path[:] = json.loads(sys.argv[1]); from fastcifar.data.images import serve; serve()"


class _DiedError(Exception):
    """The process ended before it answered."""


class _StoppedError(Exception):
    """Nobody waits for the answer any more."""


def available_cores() -> int:
    """The cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def decode_blocks(
    blocks: Iterable[tuple[Sequence[str], T]], how: Decoding, workers: int
) -> Generator[tuple[Decoded, T], None, None]:
    """Decode blocks of paths, and pass on what comes with each; close it to end the processes.

    Args:
        blocks: paths, and anything that belongs to them.
        how: for all of them.
        workers: processes; with 1 it is done in this one.

    Yields:
        The blocks in their order; at most two a worker are held.

    Raises:
        DataError: the system has no process or thread to give.
    """
    if workers == 1:
        keep_freed_memory()
        for paths, tag in blocks:
            yield decode_block(paths, how), tag
        return
    helpers = [_Helper(how) for _ in range(workers)]
    idle: queue.SimpleQueue[_Helper] = queue.SimpleQueue()
    for helper in helpers:
        idle.put(helper)

    def work(paths: Sequence[str]) -> Decoded:
        helper = idle.get()  # never waits: there are as many as threads
        try:
            return helper.decode(paths)
        finally:
            idle.put(helper)

    threads = ThreadPoolExecutor(workers, "fastcifar-decoder")
    try:
        pending: deque[tuple[Future[Decoded], T]] = deque()
        for paths, tag in blocks:
            try:
                pending.append((threads.submit(work, paths), tag))
            except RuntimeError as error:
                raise _none_to_give("thread", error) from None
            if len(pending) == 2 * workers:
                future, first = pending.popleft()
                yield future.result(), first
        while pending:
            future, first = pending.popleft()
            yield future.result(), first
    finally:
        for helper in helpers:
            helper.stop()
        threads.shutdown(cancel_futures=True)


def _none_to_give(what: str, error: Exception) -> DataError:
    """What to say where the system has no more of them."""
    reason = getattr(error, "strerror", None) or error
    return DataError(f"no {what} to decode images could be started ({reason}): choose fewer workers (--workers)")


class _Helper:
    """A process that decodes; started when first needed, and again if a file was its end."""

    def __init__(self, how: Decoding) -> None:
        self._how = how
        self._lock = threading.Lock()  # between starting a process and stopping for good
        self._stopped = False
        self._process: child.Child | None = None

    def decode(self, paths: Sequence[str]) -> Decoded:
        """`decode_block`, there. A file that ends two processes is a failure like any other (one may be killed)."""
        for _ in range(2 if len(paths) == 1 else 1):
            try:
                return self._ask(paths)
            except _DiedError as died:
                reason = str(died)
        if len(paths) == 1:
            nothing = np.empty((0, *self._how.size, self._how.channels), np.uint8)
            return Decoded(nothing, (Failure(0, reason),))
        alone = [self.decode([path]) for path in paths]  # whichever of them it was
        failures = [dataclasses.replace(one, index=index) for index, each in enumerate(alone) for one in each.failures]
        return Decoded(np.concatenate([each.images for each in alone]), tuple(failures))

    def stop(self) -> None:
        """End the process; any thread that waits for its answer goes on."""
        with self._lock:
            self._stopped = True
        self._end()

    def _ask(self, paths: Sequence[str]) -> Decoded:
        process = self._started()
        assert process.stdin is not None and process.stdout is not None  # noqa: S101, PT018 - for the type checker
        request = {"paths": list(paths), "how": dataclasses.asdict(self._how)}
        with contextlib.suppress(OSError):  # a process that has ended: its answer is missing too
            process.stdin.write(json.dumps(request).encode() + b"\n")
            process.stdin.flush()
        line = process.stdout.readline()
        answer = json.loads(line) if line.endswith(b"\n") else None
        if answer is not None:
            images = np.empty((answer["count"], *self._how.size, self._how.channels), np.uint8)
            # none at all are no memory that could be read into
            if not images.size or process.stdout.readinto(images.data.cast("B")) == images.nbytes:  # type: ignore[attr-defined]
                return Decoded(images, tuple(Failure(*one) for one in answer["failures"]))
        self._end()
        raise _DiedError(f"ends the process that decodes it (status {process.returncode})")

    def _started(self) -> child.Child:
        with self._lock:
            if self._stopped:
                raise _StoppedError
            if self._process is None:
                try:
                    self._process = child.start(_CODE, quiet=True)
                except OSError as error:
                    raise _none_to_give("process", error) from None
            return self._process

    def _end(self) -> None:
        process, self._process = self._process, None
        if process is not None:
            child.end(process)
