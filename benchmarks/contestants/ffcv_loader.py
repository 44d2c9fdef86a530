"""FFCV, from a .beton file of raw images that the page cache holds."""

from pathlib import Path
from typing import Any

import numpy as np
import torch
import torchvision
from ffcv.fields import IntField, RGBImageField
from ffcv.fields.decoders import IntDecoder, SimpleRGBImageDecoder
from ffcv.loader import Loader, OrderOption
from ffcv.transforms import (
    Convert,
    NormalizeImage,
    RandomHorizontalFlip,
    RandomTranslate,
    Squeeze,
    ToTensor,
    ToTorchImage,
)
from ffcv.writer import DatasetWriter

from benchmarks.contestants.common import Opened, Task


def version() -> str:
    """Of the package."""
    import importlib.metadata

    return f"ffcv {importlib.metadata.version('ffcv')}"


class _Samples:
    def __init__(self, task: Task) -> None:
        self.images, self.labels = task.images(), task.labels()

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> tuple[Any, int]:
        return self.images[index], int(self.labels[index])


def prepare(task: Task, **_: Any) -> None:
    """Write the file."""
    path = _file(task)
    if path.exists():
        return
    made = path.with_suffix(".part")
    writer = DatasetWriter(str(made), {"image": RGBImageField(write_mode="raw"), "label": IntField()}, num_workers=1)
    writer.from_indexed_dataset(_Samples(task))
    made.rename(path)


def open_loader(task: Task, *, table: bool) -> Opened:
    """Scaled by its own table look-up, or as in its CIFAR example: converted, then torchvision's Normalize."""
    mean, std = np.asarray(task.mean), np.asarray(task.std)
    augment = [SimpleRGBImageDecoder(), RandomTranslate(padding=task.crop), RandomHorizontalFlip()]
    if table:
        scale = [NormalizeImage(mean, std, np.float32), ToTensor(), ToTorchImage()]
    else:
        normalize = torchvision.transforms.Normalize(mean, std)
        scale = [ToTensor(), ToTorchImage(), Convert(torch.float32), normalize]
    loader = Loader(
        str(_file(task)),
        batch_size=task.batch_size,
        num_workers=2,
        os_cache=True,
        order=OrderOption.RANDOM,
        drop_last=True,
        pipelines={"image": [*augment, *scale], "label": [IntDecoder(), ToTensor(), Squeeze()]},
    )
    return Opened(epoch=lambda: loader, whole_epochs=True)  # an epoch that is broken off leaves its threads


def _file(task: Task) -> Path:
    return task.scratch / "images.beton"
