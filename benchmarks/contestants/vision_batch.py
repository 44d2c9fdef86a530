"""torchvision's transforms v2 on whole batches: fast, but every image of a batch is cropped and flipped alike."""

from collections.abc import Iterator

import numpy as np
import torch
import torchvision
from torchvision.transforms import v2

from benchmarks.contestants.common import Opened, Task


def version() -> str:
    """Of the package."""
    return f"torchvision {torchvision.__version__}"


def open_loader(task: Task) -> Opened:
    """A gather, then the transforms."""
    images = torch.from_numpy(np.ascontiguousarray(task.images().transpose(0, 3, 1, 2)))
    labels = torch.from_numpy(task.labels())
    mean, std = ((np.asarray(x) / 255).tolist() for x in (task.mean, task.std))
    transform = v2.Compose(
        [
            v2.RandomCrop(images.shape[2:], padding=task.crop, padding_mode="reflect"),
            v2.RandomHorizontalFlip(),
            v2.ToDtype(torch.float32, scale=True),
            v2.Normalize(mean, std, inplace=True),
        ]
    )

    def epoch() -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        for rows in torch.randperm(len(images)).split(task.batch_size):
            yield transform(images[rows]), labels[rows]

    return Opened(epoch=epoch)
