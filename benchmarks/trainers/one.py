"""One run in a process of its own.

    python -m benchmarks.trainers.one MODULE CORES JOB SETTING      # CORES such as 0,1; JOB and SETTING in JSON

Writes one line of JSON to standard output: the run's `Outcome` with what the process used, or {"error": ..}. Runs in
the contestants' environments: only NumPy is sure to be there.
"""

import ctypes
import dataclasses
import importlib
import json
import os
import signal
import sys
import time
import traceback
from typing import Any

from benchmarks.trainers.common import Job

__all__ = ["run"]

_PR_SET_PDEATHSIG = 1


def run(module: str, cores: list[int], job: Job, setting: dict[str, Any]) -> dict[str, Any]:
    """Pin this process to `cores` (none: as it is) and train; beside the outcome, what the process used."""
    if cores:
        os.sched_setaffinity(0, cores)  # before torch counts them
    trainer = importlib.import_module(module)
    started, used = time.perf_counter(), time.process_time()
    outcome = trainer.train(job, **setting)
    return {
        **dataclasses.asdict(outcome),
        "seconds": time.perf_counter() - started,
        "processor_seconds": time.process_time() - used,
    }


def main(arguments: list[str]) -> None:
    """Run, and answer."""
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)  # whatever libraries print is no answer
    if sys.platform == "linux":  # else it would outlive a race that was killed
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    try:
        module, cores, job, setting = arguments
        pinned = [int(core) for core in cores.split(",") if core]
        found = run(module, pinned, Job.from_json(json.loads(job)), json.loads(setting))
    except Exception as error:
        traceback.print_exc()
        first = next(iter(str(error).strip().splitlines()), "")
        found = {"error": f"{type(error).__name__}: {first}"}
    answers.write(json.dumps(found) + "\n")
    answers.close()


if __name__ == "__main__":
    main(sys.argv[1:])
