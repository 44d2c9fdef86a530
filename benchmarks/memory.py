"""How much memory does an epoch take at its peak, beyond what importing torch takes?

    python -m benchmarks.memory [STORE]

Summed over all processes: the proportional share of each (PSS), so that what they share is counted once.
"""

import json
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

from benchmarks.harness import alternate, save
from benchmarks.images import given_or_random
from benchmarks.processes import memory

ROOT = Path(__file__).parent.parent
REPEATS = 3
INTERVAL = 0.02


class Sampler(threading.Thread):
    """The most memory that a session uses while this runs.

    Args:
        leader: of the session.
    """

    def __init__(self, leader: int) -> None:
        super().__init__(daemon=True)
        self.most = 0
        self._leader, self._over = leader, threading.Event()

    def run(self) -> None:
        """Look again and again."""
        while not self._over.is_set():
            self.most = max(self.most, memory(self._leader))
            time.sleep(INTERVAL)

    def stop(self) -> int:
        """The most that was seen."""
        self._over.set()
        self.join()
        return self.most


def measure(arguments: list[str]) -> float:
    """Bytes, in one new process and its workers."""
    pipe = subprocess.PIPE
    command = [sys.executable, "-m", "benchmarks.single", *arguments]
    with subprocess.Popen(command, cwd=ROOT, stdin=pipe, stdout=pipe, text=True, start_new_session=True) as process:
        _stage(process)
        before = memory(process.pid)
        sampler = Sampler(process.pid)
        sampler.start()
        try:
            for _ in range(2):
                process.stdin.write("\n")
                process.stdin.flush()
                _stage(process)
        finally:
            most = sampler.stop()
            process.stdin.close()
        return float(most - before)


def _stage(process: "subprocess.Popen[str]") -> dict[str, Any]:
    line = process.stdout.readline()
    if not line:
        raise RuntimeError(f"it ended with status {process.wait()}")
    return json.loads(line)


def main(arguments: list[str]) -> None:
    """Measure, print and save."""
    with given_or_random(arguments) as store:
        split = store.split("train")
        data = [str(store.path.resolve()), str(len(split))]
        runs = {
            "fastcifar": lambda: measure(["fastcifar", *data]),
            "the report's Dataset + DataLoader, in process": lambda: measure(["0", *data]),
            "the report's Dataset + DataLoader, 4 workers": lambda: measure(["4", *data]),
        }
        results = alternate(runs, repeats=REPEATS, warm_up=0)
        height, width, channels = store.image_shape
        more = {"images": len(split), "image_bytes": len(split) * height * width * channels}
    for name, result in results.items():
        print(result.get("failed") or f"{result['median'] / 2**20:8,.0f} MiB  {name}")
    print(f"written to {save('memory', (__doc__ or '').splitlines()[0], results, **more)}")


if __name__ == "__main__":
    main(sys.argv[1:])
