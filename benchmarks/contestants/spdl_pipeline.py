"""SPDL: its pipeline and its threads; the augmentation is NumPy code, much of it without Python's lock."""

import itertools
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from spdl.pipeline import PipelineBuilder

from benchmarks.contestants.common import Opened, Task, Windows, batches_of
from benchmarks.contestants.torch_loader import Standardize


def version() -> str:
    """Of the package."""
    import importlib.metadata

    return f"spdl {importlib.metadata.version('spdl')}"


def open_loader(task: Task, *, threads: int) -> Opened:
    """Batches of rows, made into batches of images in `threads` threads, each without torch's own."""
    torch.set_num_threads(1)
    images, labels = task.images(), task.labels()
    windows, standardize = Windows(images, task.crop), Standardize(task)
    standardize(images[: task.batch_size])  # before there are threads
    generator = np.random.default_rng()

    def make(rows: Any) -> tuple[Any, Any]:
        return standardize(windows.take(rows, np.random.default_rng(int(rows[0])))), labels[rows]

    def endless() -> Iterator[Any]:
        while True:
            yield from batches_of(len(labels), task.batch_size, generator)

    pipeline = PipelineBuilder().add_source(endless()).pipe(make, concurrency=threads).add_sink(2)
    running = pipeline.build(num_threads=threads)
    running.start()
    going = running.get_iterator()
    steps = len(labels) // task.batch_size
    return Opened(epoch=lambda: itertools.islice(going, steps), settle=2 * threads + 3)
