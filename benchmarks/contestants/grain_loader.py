"""Google's grain: its order, its randomness and its threads or processes; the augmentation is NumPy code."""

import functools
import importlib.metadata
from typing import Any

import grain
import numpy as np
import torch

from benchmarks.contestants.common import Opened, Task, Windows, batches_of
from benchmarks.contestants.torch_loader import Standardize


def version() -> str:
    """Of the package."""
    return f"grain {importlib.metadata.version('grain')}"


_EPOCHS = 1_000_000


class _Make:
    """Rows -> a batch; or one row -> one image. Each process makes its own windows, when it needs them."""

    def __init__(self, task: Task) -> None:
        self.task, self.labels, self.standardize = task, task.labels(), Standardize(task)
        self.steps = len(self.labels) // task.batch_size
        self.orders: dict[int, list[Any]] = {}

    @functools.cached_property
    def windows(self) -> Windows:
        return Windows(self.task.images(), self.task.crop)

    def batch(self, rows: Any, generator: np.random.Generator) -> tuple[Any, Any]:
        return self.standardize(self.windows.take(rows, generator)), self.labels[rows]

    def step(self, step: int, generator: np.random.Generator) -> tuple[Any, Any]:
        epoch, place = divmod(step, self.steps)
        orders = self.orders  # of this epoch, and of that which other threads may still be in
        if epoch not in orders:
            drawn = batches_of(len(self.labels), self.task.batch_size, np.random.default_rng(epoch))
            self.orders = orders = {epoch: drawn} | {n: o for n, o in orders.items() if n >= epoch - 1}
        return self.batch(orders[epoch][place], generator)

    def image(self, row: int, generator: np.random.Generator) -> tuple[Any, Any]:
        images, labels = self.batch(np.array([row]), generator)
        return images[0], labels[0]


def open_loader(task: Task, *, unit: str, threads: int = 0, workers: int = 0) -> Opened:
    """Of images augmented one by one or in batches, or of batches also drawn by NumPy; in threads or processes."""
    torch.set_num_threads(1)
    make = _Make(task)
    rows = grain.MapDataset.range(len(make.labels)).seed(0).shuffle()
    if unit == "image":
        one_epoch = rows.random_map(make.image).batch(task.batch_size, drop_remainder=True)
    elif unit == "step":
        one_epoch = grain.MapDataset.range(make.steps * _EPOCHS).seed(0).random_map(make.step)
    else:
        one_epoch = rows.batch(task.batch_size, drop_remainder=True).random_map(make.batch)
    ahead = 2 * max(threads, 1)
    endless = one_epoch.repeat().to_iter_dataset(grain.ReadOptions(num_threads=threads, prefetch_buffer_size=ahead))
    if workers:
        endless = endless.mp_prefetch(grain.MultiprocessingOptions(num_workers=workers, per_worker_buffer_size=2))
    going = iter(endless)
    return Opened(epoch=lambda: (next(going) for _ in range(make.steps)), settle=ahead + 4 * workers + 1)
