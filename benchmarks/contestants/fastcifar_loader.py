"""fastcifar itself."""

import importlib.metadata

import torch

from benchmarks.contestants.common import Opened, Task
from fastcifar import ArrayStore, Augment, Loader


def version() -> str:
    """Of the package."""
    return importlib.metadata.version("fastcifar")


def open_loader(task: Task, *, dtype: str = "float32") -> Opened:
    """With its defaults."""
    augment = Augment(crop=task.crop, padding="reflect", flip="random")
    loader = Loader(
        ArrayStore(task.store), batch_size=task.batch_size, augment=augment, dtype=getattr(torch, dtype), drop_last=True
    )
    return Opened(epoch=lambda: loader)
