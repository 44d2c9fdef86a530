"""The original report's data set (one image at a time, scaled to [-1, 1], no augmentation) in a DataLoader."""

import dataclasses

import numpy as np
import torch
from torch.utils.data import Dataset

from benchmarks.contestants.common import Opened, Task
from benchmarks.contestants.torch_loader import torch_version as version
from benchmarks.contestants.torch_loader import with_data_loader

__all__ = ["ReportDataset", "open_loader", "version"]

_HALF = (127.5,) * 3


class ReportDataset(Dataset[tuple[torch.Tensor, int]]):
    """The report's, with its switch `scale` on.

    Args:
        task: where the images are.
    """

    def __init__(self, task: Task) -> None:
        self.images = torch.from_numpy(np.ascontiguousarray(task.images().transpose(0, 3, 1, 2)))
        self.labels = task.labels().tolist()

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> tuple[torch.Tensor, int]:
        return self.images[index].float() / 127.5 - 1, self.labels[index]


def open_loader(task: Task, *, workers: int) -> Opened:
    """With a batch size that is not the report's 32, but everybody's."""
    return dataclasses.replace(with_data_loader(ReportDataset(task), task, workers), scaling=(_HALF, _HALF))
