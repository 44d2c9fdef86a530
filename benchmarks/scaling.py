"""How does the loader's speed change with threads, batch size and samples, and what does a batch cost at least?

    python -m benchmarks.scaling [--most 10000000] [--seconds 0.5] [--repeats 5]

Samples: 16x16 pixels for every number, since ten million of 32x32 would need 31 GB; they are in memory, and no
file is written. The least cost: batches of one image of 1x1 pixels, so that next to nothing but Python is left.
"""

import argparse
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from benchmarks.harness import alternate, save
from benchmarks.images import noise
from fastcifar import ArrayStore, Augment, Loader
from fastcifar.data.splits import Segment
from fastcifar.memory import free_memory

AUGMENT = Augment(crop=4, padding="reflect", flip="random")
BATCH_SIZES = (1, 8, 32, 128, 512, 2048, 8192)
SAMPLES = (10_000, 100_000, 1_000_000, 10_000_000)


class MemoryStore(ArrayStore):
    """A store whose bytes are in memory already: nothing is read, checked or copied.

    Args:
        images: uint8[N, H, W, C].
    """

    def __init__(self, images: NDArray[np.uint8]) -> None:
        count = len(images)
        # Zero mean and some deviation: exact sums of ten million images take half a minute, and change no speed.
        square = images[0].size // images.shape[-1] * count * 64**2
        channels = images.shape[-1]
        self.path, self.name, self.digest = Path(), "memory", f"{images.shape} {images.ctypes.data}"
        self.images, self.labels = images, np.arange(count, dtype=np.int64) % 10
        self.classes, self.source = tuple(map(str, range(10))), {}
        self._shape = images.shape
        self._segments = [Segment("all", 0, count, (0,) * channels, (square,) * channels)]
        self._splits = {"full": {"train": ["all"]}}

    def load(self) -> NDArray[np.uint8]:
        """The images."""
        return self.images


def speed(loader: Loader, seconds: float, *, threads: int | None = None) -> Callable[[], float]:
    """A measurement: images a second, epoch after epoch."""

    def measure() -> float:
        usual = torch.get_num_threads()
        torch.set_num_threads(threads or usual)
        try:
            images, started = 0, time.perf_counter()
            while True:
                for _, labels in loader:
                    images += len(labels)
                    if (took := time.perf_counter() - started) >= seconds:
                        return images / took
        finally:
            torch.set_num_threads(usual)

    return measure


def random_bytes(count: int, side: int) -> NDArray[np.uint8]:
    """uint8[count, side, side, 3], quickly."""
    return np.random.default_rng(0).integers(0, 256, (count, side, side, 3), np.uint8)


def main(arguments: list[str]) -> None:
    """Measure, print and save."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--most", type=int, default=SAMPLES[-1], help="samples")
    parser.add_argument("--seconds", type=float, default=0.5)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--out", default="scaling", help="name of the file in benchmarks/results")
    options = parser.parse_args(arguments)

    usual = MemoryStore(noise(50_000, 32))
    cores = torch.get_num_threads()
    tiny = Loader(MemoryStore(random_bytes(100_000, 1)), batch_size=1, augment=Augment(flip="random"))
    counts = [count for count in SAMPLES if count <= options.most]
    if not counts:
        parser.error(f"--most must be at least {SAMPLES[0]:,}")
    most = max(counts)
    series: dict[str, dict[str, Callable[[], float]]] = {
        "threads": {
            str(n): speed(Loader(usual, batch_size=512, augment=AUGMENT), options.seconds, threads=n)
            for n in sorted({1, 2, cores})
            if n <= cores
        },
        "batch size": {
            str(n): speed(Loader(usual, batch_size=n, augment=AUGMENT, drop_last=True), options.seconds)
            for n in BATCH_SIZES
        },
        "batches of one image of 1x1": {"1": speed(tiny, options.seconds)},
    }
    if (needed := most * 3 * 16**2) < 0.8 * (free_memory(torch.device("cpu")) or 0):
        images = random_bytes(most, 16)
        series["samples (16x16 pixels)"] = {
            f"{n:,}": speed(Loader(MemoryStore(images[:n]), batch_size=512, augment=AUGMENT), options.seconds)
            for n in counts
        }
    results: dict[str, dict[str, Any]] = {
        title: alternate(runs, repeats=options.repeats) for title, runs in series.items()
    }
    if len(results) < 4:
        failed = f"{needed / 1e9:.1f} GB of memory are not free here"
        results["samples (16x16 pixels)"] = {f"{n:,}": {"failed": failed} for n in counts}
    for title, rows in results.items():
        for name, result in rows.items():
            said = result.get("failed") or f"{result['median']:12,.0f} +- {result['interval95']:8,.0f} images/s"
            print(f"{title:>28} {name:>12}: {said}")
    print(f"written to {save(options.out, (__doc__ or '').splitlines()[0], results)}")


if __name__ == "__main__":
    main(sys.argv[1:])
