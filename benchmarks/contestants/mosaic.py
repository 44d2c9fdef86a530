"""MosaicML streaming, from local shards, in a DataLoader; the augmentation is NumPy code, one image at a time."""

import importlib.metadata
import shutil
from typing import Any

import numpy as np
import torch
from streaming import MDSWriter, StreamingDataset

from benchmarks.contestants.common import Opened, Task
from benchmarks.contestants.torch_loader import with_data_loader


def version() -> str:
    """Of the package."""
    return f"streaming {importlib.metadata.version('mosaicml-streaming')}"


def prepare(task: Task, **_: Any) -> None:
    """Write the shards."""
    if (task.scratch / "shards" / "index.json").exists():
        return
    shutil.rmtree(task.scratch / "shards", ignore_errors=True)
    images = task.images()
    columns = {"image": f"ndarray:uint8:{','.join(map(str, images.shape[1:]))}", "label": "int64"}
    with MDSWriter(out=str(task.scratch / "shards"), columns=columns) as writer:
        for image, label in zip(images, task.labels(), strict=True):
            writer.write({"image": image, "label": label})


class _Samples(StreamingDataset):
    def __init__(self, task: Task) -> None:
        super().__init__(local=str(task.scratch / "shards"), batch_size=task.batch_size, shuffle=True)
        std = torch.tensor(task.std).view(3, 1, 1)
        self.generator: np.random.Generator | None = None
        self.factor, self.offset = 1 / std, -torch.tensor(task.mean).view(3, 1, 1) / std
        self.crop = task.crop

    def __getitem__(self, index: int) -> tuple[torch.Tensor, Any]:
        sample = super().__getitem__(index)
        crop, image = self.crop, sample["image"]
        height, width, _ = image.shape
        padded = np.pad(image, ((crop, crop), (crop, crop), (0, 0)), mode="reflect")
        self.generator = self.generator or np.random.default_rng()  # in each worker another
        y, x, flip = self.generator.integers(0, (2 * crop + 1, 2 * crop + 1, 2))
        window = padded[y : y + height, x : x + width]
        window = np.ascontiguousarray(window[:, ::-1] if flip else window).transpose(2, 0, 1)
        return torch.addcmul(self.offset, torch.from_numpy(window).float(), self.factor), sample["label"]


def open_loader(task: Task, *, workers: int) -> Opened:
    """In this process, or with workers."""
    return with_data_loader(_Samples(task), task, workers, shuffle=False)
