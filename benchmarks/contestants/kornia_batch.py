"""kornia's augmentations on batches, drawn for each image."""

from collections.abc import Iterator

import kornia
import kornia.augmentation as augmentation
import numpy as np
import torch

from benchmarks.contestants.common import Opened, Task


def version() -> str:
    """Of the package."""
    return f"kornia {kornia.__version__}"


def open_loader(task: Task, *, mode: str) -> Opened:
    """A gather, then the augmentations; crops by slicing or by resampling."""
    images = torch.from_numpy(np.ascontiguousarray(task.images().transpose(0, 3, 1, 2)))
    labels = torch.from_numpy(task.labels())
    mean, std = (torch.tensor(x) / 255 for x in (task.mean, task.std))
    height, width = images.shape[2:]
    augment = torch.nn.Sequential(
        augmentation.RandomCrop((height, width), padding=task.crop, padding_mode="reflect", cropping_mode=mode),
        augmentation.RandomHorizontalFlip(),
        augmentation.Normalize(mean, std),
    )

    def epoch() -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        for rows in torch.randperm(len(images)).split(task.batch_size):
            with torch.inference_mode():
                made = augment(images[rows].float() / 255)
            yield made, labels[rows]

    return Opened(epoch=epoch)
