"""NVIDIA DALI on the CPU: a batch of padded images from an external source, then one fused operation."""

from collections.abc import Iterator
from typing import Any

import numpy as np
import nvidia.dali
import torch
from nvidia.dali import fn, pipeline_def, types

from benchmarks.contestants.common import Opened, Task, batches_of, pad


def version() -> str:
    """Of the package."""
    return f"DALI {nvidia.dali.__version__}"


def open_loader(task: Task, *, layout: str, threads: int) -> Opened:
    """Written as planes, or as pixels (which the shape hides)."""
    images, labels = task.images(), task.labels()
    padded = pad(images, task.crop)
    count, height, width, _ = images.shape
    generator = np.random.default_rng()

    def source() -> Iterator[tuple[Any, Any]]:
        while True:
            for rows in batches_of(count, task.batch_size, generator):
                yield padded[rows], labels[rows]

    @pipeline_def(batch_size=task.batch_size, num_threads=threads, device_id=None)
    def pipeline() -> Any:
        pixels, targets = fn.external_source(source, num_outputs=2, batch=True, no_copy=True, layout=["HWC", ""])
        made = fn.crop_mirror_normalize(
            pixels,
            crop=(height, width),
            crop_pos_x=fn.random.uniform(range=(0.0, 1.0)),
            crop_pos_y=fn.random.uniform(range=(0.0, 1.0)),
            mirror=fn.random.coin_flip(),
            mean=list(task.mean),
            std=list(task.std),
            dtype=types.FLOAT,
            output_layout=layout,
        )
        return made, targets

    running = pipeline()
    running.build()

    def epoch() -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        for _ in range(count // task.batch_size):
            made, targets = running.run()
            tensor = torch.from_dlpack(made.as_tensor())
            yield (tensor.permute(0, 3, 1, 2) if layout == "HWC" else tensor), torch.from_dlpack(targets.as_tensor())

    return Opened(epoch=epoch, settle=4)
