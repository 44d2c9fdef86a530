"""torchvision's transforms on PIL images, one at a time: what most tutorials show."""

import numpy as np
import torch
import torchvision
from PIL import Image
from torch.utils.data import Dataset
from torchvision import transforms

from benchmarks.contestants.common import Opened, Task
from benchmarks.contestants.torch_loader import with_data_loader


class _Images(Dataset[tuple[torch.Tensor, int]]):
    """As `torchvision.datasets.CIFAR10`: arrays, made into PIL images when asked for."""

    def __init__(self, task: Task) -> None:
        self.images, self.labels = task.images(), task.labels().tolist()
        mean, std = (tuple(np.asarray(x) / 255) for x in (task.mean, task.std))
        self.transform = transforms.Compose(
            [
                transforms.RandomCrop(self.images.shape[1:3], padding=task.crop, padding_mode="reflect"),
                transforms.RandomHorizontalFlip(),
                transforms.ToTensor(),
                transforms.Normalize(mean, std, inplace=True),
            ]
        )

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> tuple[torch.Tensor, int]:
        return self.transform(Image.fromarray(self.images[index])), self.labels[index]


def version() -> str:
    """Of the package."""
    return f"torchvision {torchvision.__version__}"


def open_loader(task: Task, *, workers: int) -> Opened:
    """In this process, or with workers."""
    return with_data_loader(_Images(task), task, workers)
