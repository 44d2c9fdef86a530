"""No package: what one would write with NumPy and torch, given a day. One gather, one conversion in place."""

from collections.abc import Iterator

import numpy as np
import torch

from benchmarks.contestants.common import Opened, Task, Windows, batches_of
from benchmarks.contestants.torch_loader import Standardize


def version() -> str:
    """Of what it is made of."""
    return f"NumPy {np.__version__}, torch {torch.__version__}"


def open_loader(task: Task, *, reuse: bool, threads: int) -> Opened:
    """Batches in new memory, or each in that of the one before; with torch's threads, or with one."""
    torch.set_num_threads(threads)
    images, labels = task.images(), task.labels()
    windows, standardize = Windows(images, task.crop), Standardize(task, reuse=reuse)
    generator = np.random.default_rng()

    def epoch() -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        for rows in batches_of(len(images), task.batch_size, generator):
            yield standardize(windows.take(rows, generator)), torch.from_numpy(labels[rows])

    return Opened(epoch=epoch)
