"""A run in a thread of this process, on a CUDA stream of its own: small runs side by side fill what one leaves idle.

Processes would take turns on the GPU; streams of one process run at the same time. It is held as a `Worker` is.

    with stream_threads("cuda", 4) as threads:
        worker = StreamWorker("seed 3", config, threads=threads, queue=queue)
        name, line = queue.get()        # {"say": "epoch 1/16: ..."}, at the end {"status": 0, "error": None}
        worker.stop()
"""

import contextlib
import os
import sys
import traceback
from collections.abc import Iterator
from concurrent.futures import BrokenExecutor, Future, ThreadPoolExecutor, wait
from typing import Any

from fastcifar import page_worker, runtime, signals
from fastcifar.config import TrainConfig
from fastcifar.worker import LineReporter, Lines, run_and_tell

__all__ = ["StreamWorker", "stream_threads", "suits"]

_DRAWERS = 4
"""Processes that draw, at most."""
_SWITCH = 1e-4
"""Seconds of Python code after which a thread has to let another go on, where Python's own are 5 ms: a run that
captures its steps asks for its turn after each of thousands of operations. What it gains was not measured apart."""


def suits(config: TrainConfig) -> bool:
    """Whether such runs can share this process: on CUDA, with nothing that only one run in a process can have.

    Raises:
        ConfigError: the device is not there.
    """
    alone = config.compile == "on" or config.profile  # torch's compiler and profiler are not for several threads
    return not alone and runtime.find_device(config.device).type == "cuda"


@contextlib.contextmanager
def stream_threads(device: str, count: int) -> Iterator[ThreadPoolExecutor]:
    """For a block that has so many runs at a time: their threads, and processes that draw their pages.

    Raises:
        ConfigError: the device is not there.
    """
    found = runtime.find_device(device)
    interval = sys.getswitchinterval()
    longer = interval > _SWITCH

    def begin() -> None:
        runtime.use_own_stream(found)
        page_worker.draw_with(drawers)

    with page_worker.Drawers(min(count, _DRAWERS, max(1, (os.cpu_count() or 1) // 2))) as drawers:
        try:
            if longer:
                sys.setswitchinterval(_SWITCH)
            yield ThreadPoolExecutor(count, "run", initializer=begin)
        finally:
            if longer:  # else another series has set it, and sets it back
                sys.setswitchinterval(interval)


class StreamWorker:
    """A run, which starts as soon as a thread is free.

    Args:
        name: goes into the queue with each line.
        config: of the run.
        threads: one of which it takes.
        queue: gets its lines.
    """

    def __init__(self, name: str, config: TrainConfig, *, threads: ThreadPoolExecutor, queue: Lines) -> None:
        self._request = signals.StopRequest()
        self._abandoned = False
        try:
            self._running = threads.submit(self._run, name, config, queue)
        except BrokenExecutor as error:  # no thread could begin
            self._running = Future()
            self._running.set_exception(error)

        def ended(run: Future[None]) -> None:
            if (error := run.exception()) is not None:  # its thread could not begin
                queue.put((name, {"status": 2, "stopped": False, "error": f"its thread ended with {error!r}"}))

        self._running.add_done_callback(ended)

    def stop(self) -> None:
        """Ask it to save a checkpoint and end."""
        self._request.ask()

    def kill(self) -> None:
        """Wait for it no longer: it ends with the process. What it saved before is sound."""
        self._abandoned = True

    def wait(self) -> None:
        """Return when it has ended."""
        if not self._abandoned:
            wait([self._running])

    def _run(self, name: str, config: TrainConfig, queue: Lines) -> None:
        signals.hear_of(self._request)
        end: dict[str, Any] = {"status": 2, "stopped": False}
        try:
            end = run_and_tell(config, LineReporter(lambda text: queue.put((name, {"say": text}))))
        except BaseException as error:  # a fault, as a process of its own would die of
            traceback.print_exc()
            end["error"] = f"its thread ended with {error!r}"
        queue.put((name, end))
