"""Runs the contestants of the race of recipes in processes of their own, two side by side or one after another.

Example:
    pool = Pool(store, "beside")
    planned = pool.plan(Entry(contestant=CONTESTANTS["fast"], arch="small", split="full", epochs=4, seed=0))
    for run in pool.run([planned]): ...
"""

import contextlib
import dataclasses
import json
import math
import os
import queue
import signal
import subprocess
import tempfile
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np

from benchmarks.harness import reason, receipt
from benchmarks.peers import LISTS, python_of
from benchmarks.trainers import Contestant
from benchmarks.trainers.common import Job
from benchmarks.trainers.fastcifar_fit import config_of
from benchmarks.trainers.records import Run, digest
from fastcifar import ArrayStore
from fastcifar.errors import ConfigError
from fastcifar.nets import find_arch
from fastcifar.recipes import resolve

__all__ = ["THREADS", "Entry", "Mode", "Planned", "Pool"]

Mode = Literal["beside", "turn"]
THREADS: dict[Mode, int] = {"beside": 1, "turn": 2}
_PARTS = ("train", "test")
_ROOT = Path(__file__).parent.parent.parent


@dataclass(frozen=True, kw_only=True)
class Entry:
    """A run that is wanted; `change` are changes to the recipe of a contestant of ours.

    Raises:
        ConfigError: the contestant cannot train for that many epochs.
    """

    contestant: Contestant
    arch: str
    split: str
    epochs: float
    seed: int
    change: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        step = self.contestant.step
        steps = self.epochs / step
        if self.epochs < step or abs(steps - round(steps)) > 1e-6:
            raise ConfigError(
                f"contestants: {self.contestant.name} trains for multiples of {step:g} epochs, got {self.epochs:g}"
            )

    def job(self, store: Path, scratch: Path) -> Job:
        """What its process is told."""
        return Job(
            store=store,
            scratch=scratch,
            split=self.split,
            arch=self.arch,
            epochs=self.epochs,
            seed=self.seed,
            change=self.change,
        )


@dataclass(frozen=True, kw_only=True)
class Planned:
    """An entry, and what is known of its run before it starts."""

    entry: Entry
    known: Run


class Pool:
    """The places in which runs run.

    Args:
        store: the images.
        mode: "beside": two at a time, each with one thread and pinned to one core; "turn": one at a time with two.

    Raises:
        ConfigError: there are no two cores to run side by side on.
    """

    def __init__(self, store: ArrayStore, mode: Mode) -> None:
        self._store, self._mode = store, mode
        allowed = sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else []
        if mode == "beside" and len(allowed) < 2:
            raise ConfigError("mode beside needs two cores that it can pin processes to: use --mode turn")
        self._slots = [[allowed[0]], [allowed[1]]] if mode == "beside" else [[]]
        here = receipt()
        self._cpu = " ".join(filter(None, (here["cpu"], here["cpu_model"])))
        self._processes: set[subprocess.Popen[bytes]] = set()
        self._ended = False
        self._spans: list[list[float]] = []  # when each run began and ended

    def plan(self, entry: Entry) -> Planned:
        """What identifies the run: nothing of it depends on when it runs.

        Raises:
            ConfigError: an option has a value that is not allowed, or the data has no such split.
        """
        contestant = entry.contestant
        for part in _PARTS:
            self._store.split(f"{entry.split}/{part}")
        recipe = _recipe(entry, self._store)
        known: Run = {
            "contestant": contestant.name,
            "arch": contestant.net or entry.arch,
            "split": entry.split,
            "epochs": entry.epochs,
            "seed": entry.seed,
            "change": list(entry.change),
            "mode": self._mode,
            "threads": THREADS[self._mode],
            "cpu": self._cpu,
            "data": self._store.digest,
            "verified": self._store.verified,
            "recipe_digest": digest(recipe),
        }
        return Planned(entry=entry, known={**known, "digest": digest(known)})

    def run(self, planned: Sequence[Planned]) -> Iterator[Run]:
        """Run them in order, and give each when it is done; one that fails is a run, too.

        Whoever leaves early ends all processes.
        """
        self._ended = False
        slots: queue.SimpleQueue[list[int]] = queue.SimpleQueue()
        for cores in self._slots:
            slots.put(cores)

        def one(wanted: Planned) -> Run:
            cores = slots.get()
            try:
                return self._one(wanted, cores)
            finally:
                slots.put(cores)

        threads = ThreadPoolExecutor(len(self._slots))
        try:
            for future in as_completed([threads.submit(one, wanted) for wanted in planned]):
                yield future.result()
        finally:
            threads.shutdown(wait=False, cancel_futures=True)
            self._end()
            threads.shutdown()

    def _one(self, planned: Planned, cores: list[int]) -> Run:
        here, load = receipt(), os.getloadavg()[0]
        kept = ("date", "commit", "uncommitted", "system", "python", "cores")
        run = planned.known | {name: here[name] for name in kept} | {"pinned": cores}
        span = [time.perf_counter(), math.inf]
        self._spans.append(span)
        try:
            with tempfile.TemporaryDirectory(prefix="fastcifar-recipe-") as scratch:
                run |= self._train(planned.entry, cores, Path(scratch))
        except (RuntimeError, OSError) as error:
            run["failed"] = reason(error)
        span[1] = time.perf_counter()
        # beside none it has the memory to itself
        run["alone_seconds"] = (
            span[1] - span[0] - sum(_common(span, other) for other in self._spans if other is not span)
        )
        return run | {"load_average": [load, os.getloadavg()[0]]}

    def _train(self, entry: Entry, cores: list[int], scratch: Path) -> Run:
        """In a process, leader of a session of its own, so that what it starts is ended with it.

        Raises:
            RuntimeError: its environment is not there, or it failed; the message is the reason.
        """
        contestant = entry.contestant
        for part in _PARTS:
            np.save(scratch / f"{part}.npy", np.asarray(self._store.split(f"{entry.split}/{part}").rows))
        file = contestant.file if "." in contestant.file else f"benchmarks.trainers.{contestant.file}"
        job = json.dumps(entry.job(self._store.path.resolve(), scratch).to_json())
        python = str(python_of(contestant.environment))
        pinned = ",".join(map(str, cores))
        command = [python, "-m", "benchmarks.trainers.one", file, pinned, job, json.dumps(contestant.setting)]
        count = str(THREADS[self._mode])
        variables = os.environ | {"OMP_NUM_THREADS": count, "MKL_NUM_THREADS": count, "NUMBA_NUM_THREADS": count}
        with open(scratch / "log", "w+b") as log:
            process = subprocess.Popen(
                command, cwd=_ROOT, env=variables, stdout=subprocess.PIPE, stderr=log, start_new_session=True
            )
            self._processes.add(process)
            if self._ended:  # while it started
                self._end()
            try:
                answer, _ = process.communicate()
            finally:
                self._processes.discard(process)
            log.seek(0)
            words = log.read().decode(errors="replace").split("\n")
        if not answer.strip():
            last = next((line.strip() for line in reversed(words) if line.strip()), "")
            raise RuntimeError(f"ended with status {process.returncode}{': ' * bool(last)}{last}")
        found: Run = json.loads(answer)
        if "error" in found:
            raise RuntimeError(found["error"])
        return found

    def _end(self) -> None:
        self._ended = True
        for process in tuple(self._processes):
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)


def _recipe(entry: Entry, store: ArrayStore) -> dict[str, Any]:
    """How the entry trains, but for its epochs: as fastcifar resolves it, or the package and what it is given."""
    contestant = entry.contestant
    if contestant.package:
        lines = (LISTS / f"{contestant.environment}.txt").read_text(encoding="utf-8").splitlines()
        package = next(line for line in lines if line.startswith(f"{contestant.package}=="))
        return {"package": package, **contestant.setting}
    find_arch(entry.arch)
    config = config_of(entry.job(store.path, Path()), **contestant.setting)
    recipe = resolve(config)
    chosen = {**_chosen(recipe), "augment": _chosen(recipe.augment), **({"amp": True} if config.amp else {})}
    return {name: value for name, value in chosen.items() if name != "epochs"}


def _chosen(options: Any) -> dict[str, Any]:
    """The fields that have not their defaults: an option that is added, and left alone, makes no other recipe."""
    fields = dataclasses.fields(options)
    return {field.name: value for field in fields if (value := getattr(options, field.name)) != field.default}


def _common(first: list[float], second: list[float]) -> float:
    """Seconds that two spans have in common."""
    return max(0.0, min(first[1], second[1]) - max(first[0], second[0]))
