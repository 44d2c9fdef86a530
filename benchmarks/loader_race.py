"""How many images a second do the loaders that people use give, all making the same batches, one after another?

    python -m benchmarks.loader_race [--store STORE] [--only WORD] [--repeats 7] [--seconds 1] [--out NAME]

Each contestant runs in a process of its own, in the environment that it needs (`make bench-peers`). First all its
settings are tried, and its batches are looked at: every image is traced to the one it was cut from. Then the
fastest settings race: in each round each contestant runs once, for a second or more, while all others stand still.
"""

import argparse
import contextlib
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.checks import CheckError, differences, examine
from benchmarks.contestants import BASE, CONTESTANTS, Contestant, Setting
from benchmarks.contestants.common import Task
from benchmarks.harness import alternate, reason, save
from benchmarks.images import given_or_random
from benchmarks.peers import python_of
from benchmarks.remote import Remote, WorkerError

CROP = 4


@dataclass(frozen=True, kw_only=True)
class Race:
    """What all contestants of a race share.

    Attributes:
        task: what they are to make.
        seconds: that a round lasts at least.
        repeats: rounds that count.
    """

    task: Task
    seconds: float
    repeats: int

    def run(self, contestants: tuple[Contestant, ...]) -> dict[str, dict[str, Any]]:
        """Try the settings, look at the batches, race. Failures are results, too."""
        results: dict[str, dict[str, Any]] = {}
        with contextlib.ExitStack() as stack:
            remotes: dict[str, Remote] = {}
            for entry in contestants:
                said = {"file": entry.file, "remark": entry.remark, "batch_size": entry.batch_size}
                try:
                    tried = [self._try(entry, setting) for setting in entry.settings]
                    best = max(tried, key=lambda one: one.get("images_per_second", -1))
                    if "failed" in best:
                        raise WorkerError(best["failed"])
                    with contextlib.ExitStack() as own:  # one that fails is ended, and not left to run beside others
                        remote = own.enter_context(self._start(entry, best["setting"]))
                        said |= {"setting": best["setting"], "tried": tried} | self._look(remote, entry)
                        stack.push(own.pop_all())
                    remotes[entry.name] = remote
                except (WorkerError, CheckError, RuntimeError, OSError) as error:
                    said["failed"] = reason(error)
                results[entry.name] = said
                print(_line(entry.name, said), flush=True)
            measured = alternate(
                {name: self._measure(remote, results[name]) for name, remote in remotes.items()}, repeats=self.repeats
            )
        return {name: said | measured.get(name, {}) for name, said in results.items()}

    def _start(self, entry: Contestant, setting: Setting) -> Remote:
        scratch = self.task.scratch / entry.file
        scratch.mkdir(exist_ok=True)
        task = Task(**{**self.task.__dict__, "scratch": scratch, "batch_size": entry.batch_size})
        return Remote(python_of(entry.environment), entry.file, task, setting)

    def _try(self, entry: Contestant, setting: Setting) -> dict[str, Any]:
        """One setting, in a process that ends after it."""
        try:
            with self._start(entry, setting) as remote:
                prepared = remote.ask("prepare")["seconds"]
                remote.ask("open")
                remote.ask("run", seconds=self.seconds / 4)
                return {
                    "setting": setting,
                    "images_per_second": _rate(remote, self.seconds / 2),
                    "prepare_seconds": prepared,
                }
        except (WorkerError, RuntimeError) as error:
            return {"setting": setting, "failed": reason(error)}

    def _look(self, remote: Remote, entry: Contestant) -> dict[str, Any]:
        """Open the loader, and look at two first batches."""
        opened = remote.ask("open")
        scaling = opened["scaling"]
        mean, std = scaling or (self.task.mean, self.task.std)
        found = []
        for _ in range(2):
            path = self.task.scratch / "sample.npz"
            kinds = remote.ask("sample", path=str(path))
            height, width = self._images.shape[1:3]
            if kinds["shape"] != [entry.batch_size, 3, height, width]:
                raise CheckError(f"a batch has shape {kinds['shape']}")
            dtype = entry.settings[0].get("dtype", "float32")
            if kinds["dtypes"] != [dtype, "int64"]:
                raise CheckError(f"a batch has types {kinds['dtypes']}")
            with np.load(path) as sample:
                batch, labels = sample["images"], sample["labels"]
            found.append(
                examine(
                    batch, labels, self._images, self._labels, mean=mean, std=std, crop=CROP, exact=dtype == "float32"
                )
            )
        remote.freeze()
        return {
            "first_batch_seconds": opened["first_batch_seconds"],
            "version": opened["version"],
            "differences": differences(*found, scaled=scaling is not None),
        }

    @property
    def _images(self) -> Any:
        return np.load(self.task.store / "images.npy", mmap_mode="r")[: self.task.count]

    @property
    def _labels(self) -> Any:
        return self.task.labels()

    def _measure(self, remote: Remote, said: dict[str, Any]) -> Callable[[], float]:
        """A round; `said` counts those after which the contestant would not come to rest, and was stopped at work."""
        said["restless_rounds"] = 0

        def measure() -> float:
            try:
                return _rate(remote, self.seconds)
            finally:
                said["restless_rounds"] += not remote.freeze()

        return measure


def _rate(remote: Remote, seconds: float) -> float:
    answer = remote.ask("run", seconds=seconds)
    rate: float = answer["images"] / answer["seconds"]
    return rate


def _line(name: str, said: dict[str, Any]) -> str:
    """For the console, while it runs."""
    if "failed" in said:
        return f"  {name}: failed: {said['failed']}"
    speeds = (
        f"{one['setting']} {one['images_per_second']:,.0f}" if "failed" not in one else f"{one['setting']} failed"
        for one in said["tried"]
    )
    return f"  {name}: {'; '.join(speeds)}; {', '.join(said['differences']) or 'as asked'}"


def show(results: dict[str, dict[str, Any]]) -> None:
    """A table on the console."""
    base = results.get(BASE, {}).get("median")
    for name, result in sorted(results.items(), key=lambda item: -item[1].get("median", -1)):
        if "failed" in result:
            print(f"{'failed':>27}  {name}: {result['failed']}")
            continue
        times = f"{base / result['median']:8.1f}" if base else ""
        print(f"{result['median']:12,.0f} +- {result['interval95']:8,.0f} {times}  {name} {result['setting'] or ''}")


def main(arguments: list[str]) -> None:
    """Race, print and save."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--store", help="path of a store whose split train is its first images")
    parser.add_argument("--only", default="", help="contestants whose name or file has this in it, and the base")
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--seconds", type=float, default=1.0)
    parser.add_argument("--count", type=int, default=50_000, help="random images, where no store is given")
    parser.add_argument("--out", default="race", help="name of the file in benchmarks/results")
    options = parser.parse_args(arguments)
    word = options.only.lower()
    entries = tuple(e for e in CONTESTANTS if e.name == BASE or word in e.name.lower() or word in e.file)
    if word and len(entries) == 1:
        parser.error(f"--only {options.only}: no other contestant has this word in its name or file")
    if word and options.out == parser.get_default("out"):
        parser.error(f"--only needs --out NAME: {options.out}.json keeps all of them")
    started = time.perf_counter()
    with (
        given_or_random([options.store] if options.store else [], count=options.count) as store,
        tempfile.TemporaryDirectory(prefix="fastcifar-race-") as scratch,
    ):
        split = store.split("train")
        if split.rows != range(len(split)):
            sys.exit(f"{store.path}: its split train is not its first images")
        task = Task(
            store=store.path.resolve(),
            scratch=Path(scratch),
            mean=tuple(split.mean.tolist()),
            std=tuple(split.std.tolist()),
            count=len(split),
            batch_size=0,  # each contestant's own
            crop=CROP,
        )
        results = Race(task=task, seconds=options.seconds, repeats=options.repeats).run(entries)
        images = f"{store.name}, {len(split):,}"
    show(results)
    path = save(
        options.out,
        (__doc__ or "").splitlines()[0],
        results,
        base=BASE,
        images=images,
        repeats=options.repeats,
        seconds=options.seconds,
    )
    print(f"{time.perf_counter() - started:,.0f} s; written to {path}")


if __name__ == "__main__":
    main(sys.argv[1:])
