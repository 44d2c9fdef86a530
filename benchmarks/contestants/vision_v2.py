"""torchvision's transforms v2 on uint8 tensors, one image at a time."""

import numpy as np
import torch
import torchvision
from torch.utils.data import Dataset
from torchvision.transforms import v2

from benchmarks.contestants.common import Opened, Task
from benchmarks.contestants.torch_loader import with_data_loader


class _Images(Dataset[tuple[torch.Tensor, int]]):
    def __init__(self, task: Task) -> None:
        self.images = torch.from_numpy(np.ascontiguousarray(task.images().transpose(0, 3, 1, 2)))
        self.labels = task.labels().tolist()
        mean, std = ((np.asarray(x) / 255).tolist() for x in (task.mean, task.std))
        self.transform = v2.Compose(
            [
                v2.RandomCrop(self.images.shape[2:], padding=task.crop, padding_mode="reflect"),
                v2.RandomHorizontalFlip(),
                v2.ToDtype(torch.float32, scale=True),
                v2.Normalize(mean, std, inplace=True),
            ]
        )

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> tuple[torch.Tensor, int]:
        return self.transform(self.images[index]), self.labels[index]


def version() -> str:
    """Of the package."""
    return f"torchvision {torchvision.__version__}"


def open_loader(task: Task, *, workers: int) -> Opened:
    """In this process, or with workers."""
    return with_data_loader(_Images(task), task, workers)
