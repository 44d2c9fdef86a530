"""airbench94, its own published code, on a CPU: what it asks of CUDA is made to mean the CPU, and half to mean float32.

With `amp` its net computes under bfloat16 autocast, the half precision that CPUs have units for.

Its code, net and recipe are the installed package's, changed from outside and for the call only. It is given the
race's images in the files that its loader makes of the published data; normalisation, order and augmentation are its
own. Its clock leaves out its evaluations, as it does on a GPU.

    train(job, batch_size=1024, amp=True).accuracy
"""

import contextlib
import functools
import importlib.metadata
import os
import time
from collections.abc import Callable, Iterator
from typing import Any
from unittest import mock

import airbench
import airbench.lib_airbench94 as published
import torch
from airbench import utils

from benchmarks.trainers.common import Job, Outcome

__all__ = ["Event", "on_cpu", "train"]

_FOLDER = "cifar10"
"""Where its code looks for the test images."""


class Event:
    """A `torch.cuda.Event` that a CPU passes when it is recorded."""

    def __init__(self, *, enable_timing: bool = False) -> None:
        self._time = 0.0

    def record(self) -> None:
        """Take the time."""
        self._time = time.perf_counter()

    def elapsed_time(self, end: "Event") -> float:
        """Milliseconds from here to `end`."""
        return 1000 * (end._time - self._time)


@contextlib.contextmanager
def on_cpu() -> Iterator[None]:
    """Let `.cuda()` leave a module where it is, `.half()` give float32, and CUDA's events and synchronisation work."""
    with (
        mock.patch.object(torch.nn.Module, "cuda", lambda module, device=None: module),
        mock.patch.object(torch.nn.Module, "half", torch.nn.Module.float),
        mock.patch.object(torch.Tensor, "half", torch.Tensor.float),
        mock.patch.object(torch.cuda, "Event", Event),
        mock.patch.object(torch.cuda, "synchronize"),
    ):
        yield


def in_bfloat16(make_net: Callable[[], torch.nn.Module]) -> torch.nn.Module:
    """The net that `make_net` gives; its weights stay float32, and it computes in bfloat16 where that is enough."""
    net = make_net()
    forward = net.forward

    def autocast_forward(images: torch.Tensor) -> torch.Tensor:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            logits: torch.Tensor = forward(images)
        return logits.float()

    net.forward = autocast_forward  # type: ignore[method-assign]
    return net


def train(job: Job, *, batch_size: int, amp: bool = False) -> Outcome:
    """One run of `train94`, which may end within an epoch."""
    folder = job.scratch / _FOLDER
    folder.mkdir()
    for name in ("train", "test"):
        images, labels = (torch.from_numpy(values) for values in job.part(name))
        torch.save({"images": images, "labels": labels, "classes": []}, folder / f"{name}.pt")
    os.chdir(job.scratch)
    loader = functools.partial(airbench.CifarLoader, gpu="cpu")
    said: list[dict[str, Any]] = []
    with (
        on_cpu(),
        mock.patch.object(utils, "CifarLoader", loader),
        mock.patch.object(utils, "print_training_details", lambda found, is_final_entry: said.append(_figures(found))),
    ):
        torch.manual_seed(job.seed)
        started = time.perf_counter()
        train_loader = loader(_FOLDER, train=True, batch_size=batch_size, aug=published.hyp["aug"], altflip=True)
        loading = time.perf_counter() - started
        make_net = functools.partial(in_bfloat16, published.make_net94) if amp else published.make_net94
        airbench.train94(train_loader, epochs=job.epochs, make_net=make_net)
        took = time.perf_counter() - started - loading
    *epochs, last = said
    seconds = epochs[-1]["total_time_seconds"]  # in `last` the time of its last evaluation is added
    versions = {name: importlib.metadata.version(name) for name in ("airbench", "torch", "torchvision")}
    return Outcome(
        accuracy=epochs[-1]["val_acc"],
        tta="flip and shift",
        tta_accuracy=last["tta_val_acc"],
        train_seconds=seconds,
        eval_seconds=took - seconds,
        curve=tuple((epoch["total_time_seconds"], epoch["val_acc"]) for epoch in epochs),
        curve_of="test",
        batch_size=batch_size,
        threads=torch.get_num_threads(),
        precision="bfloat16" if amp else "float32",
        recipe=published.hyp | {"epochs": job.epochs, "batch_size": batch_size},
        versions=versions,
    )


def _figures(found: dict[str, Any]) -> dict[str, float]:
    """Of its training function's variables those wanted here; the others are the net and the images."""
    return {name: found[name] for name in ("val_acc", "tta_val_acc", "total_time_seconds") if name in found}
