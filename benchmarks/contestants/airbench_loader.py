"""airbench's CifarLoader, on the CPU: it augments a whole epoch, then gathers batches of it."""

import importlib.metadata
from typing import Any

import airbench
import torch
from torchvision import transforms

from benchmarks.contestants.common import Opened, Task


def version() -> str:
    """Of the package."""
    return f"airbench {importlib.metadata.version('airbench')}"


def prepare(task: Task, **_: Any) -> None:
    """The file it would make of the published data."""
    content = {"images": torch.from_numpy(task.images()), "labels": torch.from_numpy(task.labels()), "classes": []}
    torch.save(content, task.scratch / "train.pt")


def open_loader(task: Task, *, images: str) -> Opened:
    """Its images as float16, as it keeps them, and each batch made float32; or as float32 throughout."""
    aug = {"flip": True, "translate": task.crop}
    loader = airbench.CifarLoader(task.scratch, train=True, batch_size=task.batch_size, aug=aug, gpu="cpu")
    mean, std = (torch.tensor(x) / 255 for x in (task.mean, task.std))
    loader.normalize = transforms.Normalize(mean, std)  # its own are the published data's
    if images == "float32":
        loader.images = loader.images.float()
        return Opened(epoch=lambda: loader, whole_epochs=True)
    return Opened(epoch=lambda: ((made.float(), labels) for made, labels in loader), whole_epochs=True)
