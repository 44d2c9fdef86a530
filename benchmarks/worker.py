"""One contestant in a process of its own, told what to do line by line.

    python -m benchmarks.worker FILE TASK SETTING        # both JSON

Reads one JSON object a line from standard input, and answers each with one:

    {"do": "prepare"}                  {"seconds": ..}
    {"do": "open"}                     {"first_batch_seconds": .., "version": .., "scaling": ..}
    {"do": "sample", "path": ..}       {"shape": .., "dtypes": ..}  the first batch of a new epoch, in an .npz file
    {"do": "run", "seconds": ..}       {"images": .., "seconds": ..}
    {"do": "stop"}                     (ends)

What fails is answered with {"error": ..}. Runs in the contestants' environments: only NumPy is sure to be there.
"""

import ctypes
import importlib
import json
import os
import signal
import sys
import time
import traceback
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.contestants.common import Opened, Task

_PR_SET_PDEATHSIG = 1


class Worker:
    """One contestant.

    Args:
        file: name of its module in `contestants`, or of any other.
        task: what it is to make.
        setting: its keyword arguments.
    """

    def __init__(self, file: str, task: Task, setting: dict[str, Any]) -> None:
        self._module = importlib.import_module(file if "." in file else f"benchmarks.contestants.{file}")
        self._task, self._setting = task, setting
        self._opened: Opened | None = None

    def prepare(self) -> dict[str, Any]:
        """Convert the images to the contestant's format, if it has one."""
        started = time.perf_counter()
        if hasattr(self._module, "prepare"):
            self._module.prepare(self._task, **self._setting)
        return {"seconds": time.perf_counter() - started}

    def open(self) -> dict[str, Any]:
        """Make the loader and its first batch. Libraries are imported, and images converted, before."""
        started = time.perf_counter()
        self._opened = self._module.open_loader(self._task, **self._setting)
        next(iter(self._opened.epoch()))
        took = time.perf_counter() - started
        return {"first_batch_seconds": took, "version": self._module.version(), "scaling": self._opened.scaling}

    def sample(self, path: str) -> dict[str, Any]:
        """Keep the first batch of a new epoch, as float32, for the race to look at."""
        images, labels = next(iter(self._loader.epoch()))
        dtypes = [str(x.dtype).removeprefix("torch.") for x in (images, labels)]
        if dtypes[0] == "bfloat16":  # NumPy has no such type
            images = images.float()
        np.savez(path, images=np.asarray(images), labels=np.asarray(labels))
        return {"shape": list(images.shape), "dtypes": dtypes}

    def run(self, seconds: float) -> dict[str, Any]:
        """Take batches for at least `seconds`, from a new epoch on.

        After the batches that the loader may have had ready, so that in steady state as much work is
        done for later batches when the clock stops as was done for counted ones before it started.
        """
        loader, images, settle = self._loader, 0, self._loader.settle
        started = time.perf_counter()
        while True:
            for _, labels in loader.epoch():
                if settle:
                    settle -= 1
                    started = time.perf_counter()
                    continue
                images += len(labels)
                if not loader.whole_epochs and time.perf_counter() - started >= seconds:
                    break
            took = time.perf_counter() - started
            if took >= seconds:
                return {"images": images, "seconds": took}

    @property
    def _loader(self) -> Opened:
        if self._opened is None:
            raise RuntimeError("the loader is not open")
        return self._opened


def main() -> None:
    """Answer until told to stop, or nobody asks any more."""
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8", buffering=1)
    os.dup2(2, 1)  # whatever libraries print is no answer
    if sys.platform == "linux":  # a worker that stands still would outlive a race that was killed
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    try:
        task, setting = json.loads(sys.argv[2]), json.loads(sys.argv[3])
        task |= {name: Path(task[name]) for name in ("store", "scratch")}
        worker = Worker(sys.argv[1], Task(**task), setting)
    except Exception as error:
        answers.write(_failure(error))
        return
    for line in sys.stdin:
        request = json.loads(line)
        wanted = request.pop("do")
        if wanted == "stop":
            break
        try:
            answers.write(json.dumps(getattr(worker, wanted)(**request)) + "\n")
        except Exception as error:
            answers.write(_failure(error))


def _failure(error: Exception) -> str:
    traceback.print_exc()
    first = next(iter(str(error).strip().splitlines()), "")
    return json.dumps({"error": f"{type(error).__name__}: {first}"}) + "\n"


if __name__ == "__main__":
    main()
    sys.stdout.flush()
    os._exit(0)  # at exit, some libraries wait for threads of theirs
