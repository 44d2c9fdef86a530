"""A run in a process of its own: what the parent holds, and what the process does.

The process reads the run's config from its standard input, trains, and says a line of JSON for each epoch and one
for the end. When that input closes, whether the parent closed it or is gone, the run saves a checkpoint and stops.

    worker = Worker("seed 3", config, threads=1, queue=queue)
    name, line = queue.get()            # {"say": "epoch 1/16: ..."}, at the end {"status": 0, "error": None}
    worker.stop()
"""

import contextlib
import json
import sys
import threading
from collections.abc import Callable, Sequence
from queue import SimpleQueue
from typing import Any, TypeAlias

from fastcifar import child, runtime, signals
from fastcifar.config import TrainConfig
from fastcifar.engine import fit
from fastcifar.errors import FastcifarError, StoppedError
from fastcifar.formats import epoch_line
from fastcifar.metrics import EpochStats
from fastcifar.reporter import NullReporter, RunSummary

__all__ = ["LineReporter", "Lines", "Worker", "run_and_tell", "serve"]

Lines: TypeAlias = SimpleQueue[tuple[str, dict[str, Any]]]
"""(name of a run, line) for each that it says: {"say": ..}; the last is {"status": .., "error": .., "stopped": ..}."""

_CODE = "import json, sys; sys.path[:] = json.loads(sys.argv[1]); from fastcifar.worker import serve; serve()"


class LineReporter(NullReporter):
    """Says a run in lines: its notices, epochs and messages. Not its test.

    Args:
        say: takes a line.
    """

    def __init__(self, say: Callable[[str], object]) -> None:
        self._say = say

    def start(self, summary: RunSummary, history: Sequence[EpochStats]) -> None:
        """Say the notices."""
        for notice in summary.notices:
            self._say(f"note: {notice}")

    def epoch_end(self, stats: EpochStats) -> None:
        """Say the epoch."""
        self._say(epoch_line(stats))

    def message(self, text: str) -> None:
        """Say it."""
        self._say(text)


class Worker:
    """The parent's side of a run's process, which starts at once.

    Args:
        name: goes into the queue with each line.
        config: of the run.
        threads: that it may compute with.
        queue: gets its lines.
    """

    def __init__(self, name: str, config: TrainConfig, *, threads: int, queue: Lines) -> None:
        self._process = child.start(_CODE)
        self.stop_asked = False
        order = json.dumps({"config": config.to_json(), "threads": threads}).encode() + b"\n"
        with contextlib.suppress(OSError):  # it has ended already: so does its output
            self._input.write(order)
            self._input.flush()
        threading.Thread(target=self._listen, args=(name, queue), daemon=True).start()

    def stop(self) -> None:
        """Ask it to save a checkpoint and end."""
        self.stop_asked = True
        with contextlib.suppress(OSError):
            self._input.close()

    def kill(self) -> None:
        """End it at once. What it saved before is sound."""
        self._process.kill()

    def wait(self) -> None:
        """Return when it has ended."""
        self._process.wait()

    @property
    def _input(self) -> Any:
        return self._process.stdin

    def _listen(self, name: str, queue: Lines) -> None:
        output: Any = self._process.stdout
        end = None
        try:
            with output:
                for line in output:
                    message = json.loads(line)
                    if "status" in message:
                        end = message
                    else:
                        queue.put((name, message))
        finally:  # or the parent would wait for ever
            status = self._process.wait()
            # a signal before the run could catch it, or a fault, whose traceback is on standard error
            died = {"status": 2, "error": f"its process ended with status {status}", "stopped": self.stop_asked}
            queue.put((name, end or died))


def serve() -> None:
    """The process's side: one run, as standard input says."""
    output = child.take_output()
    order = json.loads(sys.stdin.readline())

    def tell(**message: Any) -> None:
        with contextlib.suppress(OSError, ValueError):  # the parent is gone, which stops the run
            output.write(json.dumps(message) + "\n")
            output.flush()

    def watch() -> None:
        sys.stdin.read()
        signals.request_stop()

    runtime.limit_threads(order["threads"])
    threading.Thread(target=watch, daemon=True).start()
    tell(**run_and_tell(TrainConfig.from_json(order["config"]), LineReporter(lambda text: tell(say=text))))


def run_and_tell(config: TrainConfig, reporter: LineReporter) -> dict[str, Any]:
    """Train, and say how it ended: {"status": .., "error": .., "stopped": ..}."""
    try:
        fit(config, reporter=reporter, complete=True)
    except FastcifarError as failure:
        stopped = isinstance(failure, StoppedError)
        return {"status": failure.exit_status, "error": str(failure), "stopped": stopped}
    return {"status": 0, "error": None, "stopped": False}
