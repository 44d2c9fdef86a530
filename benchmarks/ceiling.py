"""How near does the loader come to what memory allows: the same reads and writes, without any arithmetic?

    python -m benchmarks.ceiling [--seconds 0.7] [--repeats 9]

Three ways to fill a float32 batch of 512 images, in turn in one process, with the same number of threads, which work
without Python's lock and without waiting for each other:

- the loader: random order, crops, flips, standardised;
- gather and write: the same random images are read, and each written four times, which are as many bytes;
- copy: as many bytes are written from a batch that is there already (memcpy).
"""

import argparse
import sys
import threading
import time
from collections.abc import Callable

import numpy as np
import torch
from numba import njit
from numpy.typing import NDArray

from benchmarks.harness import alternate, save
from benchmarks.images import noise
from benchmarks.scaling import AUGMENT, MemoryStore, speed
from fastcifar import Loader

BATCH = 512
WIDTH = 4
"""Bytes of a float32."""


@njit(nogil=True, cache=True)
def gather(images: NDArray[np.uint64], order: NDArray[np.int64], out: NDArray[np.uint64]) -> None:
    """Write images[order[i]], uint64[N, words], four times to each out[i], uint64[B, 4 * words]."""
    words = images.shape[1]
    for i in range(len(order)):
        row, target = images[order[i]], out[i]
        for w in range(words):
            target[w] = row[w]
        for w in range(words):
            target[words + w] = row[w]
        for w in range(words):
            target[2 * words + w] = row[w]
        for w in range(words):
            target[3 * words + w] = row[w]


def in_threads(work: Callable[[int, int, float], int], threads: int, seconds: float) -> Callable[[], float]:
    """A measurement: images a second of `work(first row, last row + 1, end)` -> rows done, in each thread."""

    def measure() -> float:
        done = [0] * threads
        started = time.perf_counter()

        def one(i: int) -> None:
            rows = (BATCH * i // threads, BATCH * (i + 1) // threads)
            done[i] = work(*rows, started + seconds)

        team = [threading.Thread(target=one, args=(i,)) for i in range(threads)]
        for thread in team:
            thread.start()
        for thread in team:
            thread.join()
        return sum(done) / (time.perf_counter() - started)

    return measure


def main(arguments: list[str]) -> None:
    """Measure, print and save."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--seconds", type=float, default=0.7)
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--out", default="ceiling", help="name of the file in benchmarks/results")
    options = parser.parse_args(arguments)
    threads = torch.get_num_threads()
    images = noise(50_000, 32)
    words = images.reshape(len(images), -1).view(np.uint64)
    made = np.empty((BATCH, WIDTH * words.shape[1]), np.uint64)
    there = np.ones_like(made)
    order = np.random.default_rng(0).permutation(len(images))
    steps = len(order) // BATCH

    def gathering(low: int, high: int, end: float) -> int:
        done = 0
        while True:
            for step in range(steps):
                gather(words, order[step * BATCH + low : step * BATCH + high], made[low:high])
                done += high - low
                if time.perf_counter() >= end:
                    return done

    def copying(low: int, high: int, end: float) -> int:
        done = 0
        while time.perf_counter() < end:
            np.copyto(made[low:high], there[low:high])
            done += high - low
        return done

    loader = Loader(MemoryStore(images), batch_size=BATCH, augment=AUGMENT, drop_last=True)
    results = alternate(
        {
            "fastcifar": speed(loader, options.seconds),
            "gather and write": in_threads(gathering, threads, options.seconds),
            "copy": in_threads(copying, threads, options.seconds),
        },
        repeats=options.repeats,
    )
    for name, result in results.items():
        share = results["fastcifar"]["median"] / result["median"]
        print(f"{result['median']:12,.0f} +- {result['interval95']:8,.0f} images/s  {share:6.1%}  {name}")
    more = {"bytes_written": made.nbytes // BATCH, "bytes_read": images[0].nbytes}
    print(f"written to {save(options.out, (__doc__ or '').splitlines()[0], results, **more)}")


if __name__ == "__main__":
    main(sys.argv[1:])
