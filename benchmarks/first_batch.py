"""How long does it take from a new process that has imported torch to the first batch?

    python -m benchmarks.first_batch [STORE]

The data is converted before, and in the page cache. Cold is the very first time on a machine: the kernel is compiled.
"""

import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path

from benchmarks.harness import alternate, save
from benchmarks.images import given_or_random

ROOT = Path(__file__).parent.parent
REPEATS = 5


def cold_copy(folder: Path) -> dict[str, str]:
    """The project in `folder`, as before its first use. Returns the variables that hide what is kept elsewhere."""
    for name in ("fastcifar", "benchmarks"):
        shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("*.bin", "*.nbi", "*.nbc", "results"))
    empty = folder / "cache"
    empty.mkdir()
    return {"XDG_CACHE_HOME": str(empty), "NUMBA_CACHE_DIR": str(empty)}


def seconds(arguments: list[str], *, folder: Path = ROOT, hidden: Mapping[str, str] | None = None) -> float:
    """Of one new process, started in `folder`."""
    command = [sys.executable, "-m", "benchmarks.single", *arguments]
    done = subprocess.run(
        command,
        cwd=folder,
        env={**os.environ, **(hidden or {})},
        input="\n",
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode:
        raise RuntimeError((done.stderr.strip().splitlines() or ["it failed"])[-1])
    found = json.loads(done.stdout.splitlines()[1])
    return float(found["first_batch"])


def cold(arguments: list[str]) -> float:
    """The same, with nothing kept from before."""
    with tempfile.TemporaryDirectory(prefix="fastcifar-cold-") as folder:
        return seconds(arguments, folder=Path(folder), hidden=cold_copy(Path(folder)))


def main(arguments: list[str]) -> None:
    """Measure, print and save."""
    with given_or_random(arguments) as store:
        data = [str(store.path.resolve()), str(len(store.split("train")))]
        runs: dict[str, Callable[[], float]] = {
            "fastcifar": lambda: seconds(["fastcifar", *data]),
            "fastcifar, the very first time (it compiles its kernel)": lambda: cold(["fastcifar", *data]),
            "the report's Dataset + DataLoader, in process": lambda: seconds(["0", *data]),
            "the report's Dataset + DataLoader, 2 workers": lambda: seconds(["2", *data]),
        }
        results = alternate(runs, repeats=REPEATS)
        count = int(data[1])
    for name, result in results.items():
        print(result.get("failed") or f"{result['median']:8.2f} +- {result['interval95']:.2f} s  {name}")
    print(f"written to {save('first_batch', (__doc__ or '').splitlines()[0], results, images=count)}")


if __name__ == "__main__":
    main(sys.argv[1:])
