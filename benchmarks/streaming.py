"""What does a store cost that is larger than memory, beside the same store in memory?

    python -m benchmarks.streaming [IMAGES] [LIMIT_MIB]

Needs root and a cgroup (version 1 or 2) with a memory controller: the streaming process is put under a limit smaller
than the store. Before each measurement the store's pages are dropped from the system's cache, so that they are read
from disk, and count for the process that reads them.
"""

import json
import os
import re
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from benchmarks.harness import alternate, save
from benchmarks.images import random_store
from fastcifar import ArrayStore, Augment, Loader

AUGMENT = Augment(crop=4, flip="random")
SECONDS = 5.0
CONTESTANTS: dict[str, dict[str, Any]] = {
    "device, no limit": {"placement": "device", "order": "random"},
    "stream, order block, no limit": {"placement": "stream", "order": "block"},
    "stream, order block, limited": {"placement": "stream", "order": "block", "limited": True},
    "stream, order random, limited": {"placement": "stream", "order": "random", "limited": True},
}


def measure(path: str, placement: Any, order: Any) -> dict[str, float]:
    """In this process: images a second in the first epoch, in which the bytes are checked, and after it."""
    loader = Loader(ArrayStore(path), batch_size=512, augment=AUGMENT, placement=placement, order=order)
    first, images, seconds = None, 0, 0.0
    while first is None or seconds < SECONDS:
        started = time.perf_counter()
        count = sum(len(labels) for _, labels in loader)
        took = time.perf_counter() - started
        if first is None:
            first = count / took
        else:
            images, seconds = images + count, seconds + took
    # not `getrusage`, which counts what the parent had before this program was started
    peak = re.search(r"VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text(encoding="utf-8"))
    resident = int(peak[1]) / 1024 if peak else 0.0
    return {"first": first, "images_a_second": images / seconds, "resident_mib": resident}


@contextmanager
def cgroup(limit: int) -> Iterator[Path]:
    """A cgroup whose memory, with the files' pages its processes read, is limited to `limit` bytes.

    Raises:
        OSError: none can be made here.
    """
    first = Path("/sys/fs/cgroup")
    unified = (first / "cgroup.controllers").exists()
    folder = (first if unified else first / "memory") / f"fastcifar-{os.getpid()}"
    folder.mkdir()
    try:
        (folder / ("memory.max" if unified else "memory.limit_in_bytes")).write_text(str(limit))
        yield folder
    finally:
        folder.rmdir()


def drop(path: Path) -> None:
    """Drop a file's pages from the system's cache."""
    with open(path, "rb") as handle:
        os.fsync(handle.fileno())
        os.posix_fadvise(handle.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def contestant(
    store: ArrayStore, found: list[dict[str, float]], group: Path | None, **options: Any
) -> Callable[[], float]:
    """One measurement in a new process."""

    def run() -> float:
        drop(store.path / "images.npy")
        enter = [] if group is None else ["sh", "-c", f'echo $$ > {group}/cgroup.procs && exec "$@"', "sh"]
        command = [*enter, sys.executable, "-m", "benchmarks.streaming", "--measure", str(store.path)]
        done = subprocess.run([*command, *options.values()], capture_output=True, text=True, check=False)
        if done.returncode:
            raise RuntimeError(f"exit status {done.returncode}: {done.stderr.strip().splitlines()[-1:]}")
        found.append(json.loads(done.stdout))
        return found[-1]["images_a_second"]

    return run


def main(count: int, limit: int) -> None:
    """Race, print and save."""
    with tempfile.TemporaryDirectory(prefix="fastcifar-bench-") as folder, cgroup(limit) as group:
        store = random_store(Path(folder), count=count)
        found: dict[str, list[dict[str, float]]] = {name: [] for name in CONTESTANTS}
        runs = {
            name: contestant(
                store,
                found[name],
                group if options.get("limited") else None,
                placement=options["placement"],
                order=options["order"],
            )
            for name, options in CONTESTANTS.items()
        }
        results = alternate(runs, repeats=3, warm_up=0)
        size = store.images.nbytes
    for name, result in results.items():
        if "failed" in result:
            print(f"{name}: {result['failed']}")
            continue
        result["resident_mib"] = max(run["resident_mib"] for run in found[name])
        result["first_epoch"] = statistics.median(run["first"] for run in found[name])
        speed = f"{result['median']:>12,.0f} +- {result['interval95']:>8,.0f} images/s"
        print(f"{speed} ({result['first_epoch']:,.0f} at first)  {result['resident_mib']:,.0f} MiB resident  {name}")
    more = {"store_mib": size / 2**20, "limit_mib": limit / 2**20, "images": count}
    print(f"written to {save('streaming', (__doc__ or '').splitlines()[0], results, **more)}")


if __name__ == "__main__":
    if sys.argv[1:2] == ["--measure"]:
        print(json.dumps(measure(*sys.argv[2:])))
    else:
        sizes = [int(value) for value in sys.argv[1:]]
        main(*(sizes[:1] or [500_000]), *([sizes[1] * 2**20] if sizes[1:] else [768 * 2**20]))
