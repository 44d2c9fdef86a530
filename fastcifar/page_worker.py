"""A run's pages, drawn here or, where runs are side by side in threads, by processes of their own.

They take a second or two of Python code, for which all other runs of the process would wait.

    with Drawers(2) as drawers:
        draw_with(drawers)          # in each of the threads
        write_pages(pages)
"""

import base64
import contextlib
import dataclasses
import itertools
import json
import sys
import threading
from collections.abc import Mapping
from pathlib import Path
from queue import SimpleQueue
from typing import Any

import numpy as np

from fastcifar import child
from fastcifar.config import Recipe, TrainConfig
from fastcifar.errors import OutputError
from fastcifar.metrics import EpochStats, Mistakes, TestStats
from fastcifar.outcome import Pages
from fastcifar.reporter import RunResult
from fastcifar.runs import Run
from fastcifar.runtime import ALONE_IN_PROCESS

__all__ = ["Drawers", "draw_with", "serve", "write_pages"]

_CODE = "import json, sys; sys.path[:] = json.loads(sys.argv[1]); from fastcifar.page_worker import serve; serve()"
_OF_THREAD = threading.local()


class Drawers:
    """Processes that draw, each one run's pages at a time; they end with the block, whatever they do.

    Args:
        count: of processes, which start at once; fewer where the system gives no more.
    """

    def __init__(self, count: int) -> None:
        self._processes: list[Any] = []
        with contextlib.suppress(OSError, TypeError):  # TypeError: embedded, without an executable of its own
            for _ in range(count):
                self._processes.append(child.start(_CODE))
        self._numbers = itertools.count()
        self._idle: SimpleQueue[Any] = SimpleQueue()
        for process in self._processes or [None]:
            self._idle.put(process)

    def __enter__(self) -> "Drawers":
        return self

    def __exit__(self, *_: object) -> None:
        for process in self._processes:  # who asked has its answer, or has been given up
            child.end(process)

    def ask(self, order: Mapping[str, Any]) -> dict[str, Any] | None:
        """Have the next that is idle obey.

        Returns:
            Its answer, {"drawn": whether it could, "error": None or a line}; None where it is gone, or none is left.
        """
        process, number = self._idle.get(), next(self._numbers)
        if process is None:
            self._idle.put(None)
            return None
        with contextlib.suppress(OSError, ValueError, TypeError, KeyError):
            process.stdin.write(json.dumps({"number": number, **order}).encode() + b"\n")
            process.stdin.flush()
            answer: dict[str, Any] = json.loads(process.stdout.readline())
            if answer["number"] == number:  # else a library said something before
                self._idle.put(process)
                return answer
        process.kill()
        process.wait()
        if all(each.poll() is not None for each in self._processes):
            self._idle.put(None)  # for all who wait, one after another
        return None


def draw_with(drawers: Drawers | None) -> None:
    """Have `write_pages`, when this thread calls it, leave its work to `drawers`; to itself again with None."""
    _OF_THREAD.drawers = drawers


def write_pages(pages: Pages) -> None:
    """Write them, and return when they are there. Drawn elsewhere they have matplotlib's own style.

    Raises:
        OutputError: they cannot be written.
    """
    drawers: Drawers | None = getattr(_OF_THREAD, "drawers", None)
    answer = drawers.ask(_order(pages)) if drawers is not None else None
    if answer is None or not answer["drawn"]:
        with ALONE_IN_PROCESS:
            pages.write()
    elif answer["error"] is not None:
        raise OutputError(answer["error"])


def serve() -> None:
    """The process's side: orders, each a line of JSON on standard input, until that ends."""
    output = child.take_output()
    from fastcifar import figures  # noqa: F401  # before it is asked for, since matplotlib takes a second to import

    for line in sys.stdin:
        order = json.loads(line)
        answer: dict[str, Any] = {"number": order["number"], "drawn": True, "error": None}
        try:
            _pages(order).write()
        except OutputError as failure:
            answer["error"] = str(failure)
        except Exception:  # a fault of ours: it is met, and told, where they are drawn instead
            answer["drawn"] = False
        with contextlib.suppress(OSError):  # the parent is gone
            output.write(json.dumps(answer) + "\n")
            output.flush()


def _order(pages: Pages) -> dict[str, Any]:
    """Pages as JSON values."""
    mistakes = pages.mistakes and vars(pages.mistakes)
    if mistakes:
        images = mistakes["images"]
        packed = {"shape": images.shape, "bytes": base64.b64encode(images.tobytes()).decode("ascii")}
        mistakes = {**mistakes, "images": packed}
    return {
        "run": {"path": str(pages.run.path.absolute()), **pages.run.config_json()},
        "history": [dataclasses.asdict(stats) for stats in pages.history],
        "result": dataclasses.asdict(pages.result),
        "environment": dict(pages.environment),
        "choices": list(pages.choices),
        "mistakes": mistakes,
    }


def _pages(order: Mapping[str, Any]) -> Pages:
    """What `_order` made JSON values of."""
    run, result, mistakes = order["run"], order["result"], order["mistakes"]
    if mistakes is not None:
        packed = mistakes["images"]
        images = np.frombuffer(base64.b64decode(packed["bytes"]), np.uint8).reshape(packed["shape"])
        mistakes = Mistakes(**{**mistakes, "images": images})
    return Pages(
        run=Run(
            path=Path(run["path"]),
            config=TrainConfig.from_json(run["config"]),
            recipe=Recipe.from_json(run["recipe"]),
        ),
        history=[EpochStats(**stats) for stats in order["history"]],
        result=RunResult(**{**result, "test": TestStats(**result["test"])}),
        environment=order["environment"],
        choices=[(what, choice) for what, choice in order["choices"]],
        mistakes=mistakes,
    )
