"""Which kernel makes the batches: chosen by the device, and made for a store.

Example:
    backend = choose_backend("auto", torch.device("cpu"))  # "cpu"
    source = make_source(store, store.labels, plan, images, backend, torch.device("cpu"))
    images, labels = source(epoch=0, start=512, size=512)
"""

import functools
import importlib.util
from typing import Any, Literal, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fastcifar.data.store import ArrayStore
from fastcifar.errors import ConfigError
from fastcifar.kernels import reference
from fastcifar.kernels.plan import Plan

__all__ = ["Backend", "Source", "choose_backend", "make_source"]

Backend = Literal["auto", "cpu", "cuda", "eager", "dali", "reference"]


class Source(Protocol):
    """A kernel over a store's images."""

    def __call__(self, *, epoch: int, start: int, size: int, capacity: int | None = None) -> tuple[Tensor, Tensor]:
        """The batch of positions `start` to `start + size - 1` of an epoch: `capacity` rows, `size` of them if None."""
        ...


def choose_backend(asked: Backend, device: torch.device) -> Backend:
    """The backend to use: `asked`, or for auto the fastest on the device.

    Raises:
        ConfigError: `asked` cannot be used on the device.
    """
    if asked == "auto":
        if device.type == "cpu":
            return "cpu"
        return "cuda" if device.type == "cuda" and importlib.util.find_spec("triton") is not None else "eager"
    needs = {"cpu": ("cpu",), "reference": ("cpu",), "cuda": ("cuda",), "dali": ("cpu", "cuda")}
    if device.type not in needs.get(asked, (device.type,)):
        allowed = " or ".join(needs[asked])
        raise ConfigError(f"backend {asked!r} needs device {allowed}, got {str(device)!r}: use backend 'auto'")
    return asked


def make_source(
    store: ArrayStore,
    labels: NDArray[np.int64],
    plan: Plan,
    images: Tensor | None,
    backend: str,
    device: torch.device,
) -> Source:
    """The kernel.

    Args:
        store: the images.
        labels: int64[N], what it gives of rows.
        plan: what it does; checked.
        images: uint8[N, H, W, C], those of the store where they were placed; None for the mapped ones.
        backend: as `choose_backend` gives it.
        device: where batches are made.
    """
    if images is not None and images.device == device and backend in ("eager", "cuda"):
        targets = torch.from_numpy(labels).to(device)
        if backend == "cuda":
            from fastcifar.kernels.cuda import CudaKernel

            return CudaKernel(images, targets, plan)
        from fastcifar.kernels.eager import EagerKernel

        return EagerKernel(images, targets, plan)
    host: NDArray[np.uint8] = store.images if images is None else images.numpy()
    if backend == "cpu":
        from fastcifar.kernels.cpu import CpuKernel

        return CpuKernel(host, labels, plan)
    if backend == "dali":
        from fastcifar.kernels.dali import DaliKernel

        return DaliKernel(host, labels, plan, device_id=device.index)
    if backend == "reference":
        return functools.partial(_reference, host, labels, plan)
    augment: Any
    if backend == "cuda":
        from fastcifar.kernels.cuda import CudaAugment

        augment = CudaAugment(store.image_shape, plan, device)
    else:
        from fastcifar.kernels.eager import EagerAugment

        augment = EagerAugment(store.image_shape, plan, device)
    from fastcifar.staging import Staged

    return Staged(host, labels, plan, augment, device)


def _reference(
    images: NDArray[np.uint8], labels: NDArray[np.int64], plan: Plan, **position: Any
) -> tuple[Tensor, Tensor]:
    made, targets = reference.batch(images, labels, plan, **position)
    return torch.from_numpy(made).to(getattr(torch, plan.dtype)), torch.from_numpy(targets)
