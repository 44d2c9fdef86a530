"""Hugging Face datasets: its Arrow table and its formats; the augmentation is NumPy code, as its transform."""

from collections.abc import Iterator
from typing import Any

import datasets
import numpy as np
import pyarrow
import torch

from benchmarks.contestants.common import Opened, Task, batches_of, crop_each, pad_and_flip
from benchmarks.contestants.torch_loader import Standardize


def version() -> str:
    """Of the package."""
    return f"datasets {datasets.__version__}"


def open_loader(task: Task, *, format: str, threads: int = 1) -> Opened:  # noqa: A002
    """Images as its Array3D, given as NumPy or torch arrays; or as bytes, given as Arrow. Padded and flipped before."""
    torch.set_num_threads(threads)
    labels = task.labels()
    both, targets = pad_and_flip(task.images(), task.crop), np.tile(labels, 2)
    shape, size = both.shape[1:], both[0].size
    if format == "arrow":
        cells = pyarrow.FixedSizeBinaryArray.from_buffers(
            pyarrow.binary(size), len(both), [None, pyarrow.py_buffer(both)]
        )
        table = pyarrow.table({"image": cells, "label": targets})
        dataset = datasets.Dataset(datasets.table.InMemoryTable(table)).with_format("arrow")
    else:
        features = datasets.Features({"image": datasets.Array3D(shape, "uint8"), "label": datasets.Value("int64")})
        content = {"image": both, "label": targets}
        dataset = datasets.Dataset.from_dict(content, features=features).with_format(format)
    standardize, generator = Standardize(task), np.random.default_rng()

    def batch(rows: Any) -> tuple[Any, Any]:
        cells = dataset[rows + len(labels) * generator.integers(0, 2, len(rows))]
        if format == "arrow":
            column = cells["image"].combine_chunks()
            padded = np.frombuffer(column.buffers()[1], np.uint8, len(rows) * size, column.offset * size)
            targets = cells["label"].to_numpy()
        else:
            padded, targets = np.asarray(cells["image"]), np.asarray(cells["label"])
        every = np.arange(len(rows))
        return standardize(crop_each(padded.reshape(-1, *shape), every, task.crop, generator)), targets

    def epoch() -> Iterator[tuple[Any, Any]]:
        for rows in batches_of(len(labels), task.batch_size, generator):
            yield batch(rows)

    return Opened(epoch=epoch)
