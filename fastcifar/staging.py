"""Batches from a store that is in host memory, or on disk, for a device that is elsewhere.

The host gathers a batch's bytes into pinned memory and copies them on a side stream, one batch ahead; the
device augments them. It touches only its own buffers.

    staged = Staged(images, labels, plan, EagerAugment((32, 32, 3), plan, device), device)
    staged.prepare(epoch=0, start=512, size=512)       # the copy runs while the device is busy
    out, targets = staged(epoch=0, start=512, size=512)

Legend: n images in the store, H x W pixels, C channels, B rows of a batch.
"""

from typing import Any, NamedTuple, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fastcifar.kernels.cpu import HostOrder
from fastcifar.kernels.plan import Plan, check_span

__all__ = ["Staged"]


class _AugmentKernel(Protocol):
    def __call__(
        self, images: Tensor, rows: Tensor, labels: Tensor, *, epoch: int, capacity: int | None = None
    ) -> tuple[Tensor, Tensor]: ...


class _Copy(NamedTuple):
    """A batch on its way to the device."""

    images: Tensor  # uint8[size, H, W, C]
    rows: Tensor  # int64[size]
    labels: Tensor  # int64[size]
    done: torch.cuda.Event | None


class Staged:
    """A kernel, as `EagerKernel` is one, whose images the host gathers.

    Args:
        images: uint8[n, H, W, C], in memory or mapped.
        labels: int64[n].
        plan: see `Plan`.
        augment: makes a batch of images that are on the device.
        device: the device.
    """

    def __init__(
        self,
        images: NDArray[np.uint8],
        labels: NDArray[np.int64],
        plan: Plan,
        augment: _AugmentKernel,
        device: torch.device,
    ) -> None:
        self._images = images
        self._labels = labels
        self._plan = plan
        self._augment = augment
        self._device = device
        self._order = HostOrder(plan)
        self._stream: Any = None
        if device.type == "cuda":
            self._stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
        self._ahead: dict[tuple[int, int, int], _Copy] = {}

    def __call__(self, *, epoch: int, start: int, size: int, capacity: int | None = None) -> tuple[Tensor, Tensor]:
        """As `EagerKernel`."""
        capacity = check_span(self._plan, epoch, start, size, capacity)
        copy = self._ahead.pop((epoch, start, size), None) or self._begin(epoch, start, size)
        if copy.done is not None:
            current = torch.cuda.current_stream(self._device)
            current.wait_event(copy.done)
            for tensor in copy[:3]:
                tensor.record_stream(current)  # its memory is the side stream's: not to be used again too early
        return self._augment(copy.images, copy.rows, copy.labels, epoch=epoch, capacity=capacity)

    def prepare(self, *, epoch: int, start: int, size: int) -> None:
        """Begin to copy the batch that is wanted next; one that was begun and never taken is forgotten."""
        self._ahead = {(epoch, start, size): self._begin(epoch, start, size)}

    def forget(self) -> None:
        """Let go of a batch that was begun."""
        self._ahead.clear()

    def _begin(self, epoch: int, start: int, size: int) -> _Copy:
        rows = self._order.rows(epoch, start, size)
        pinned = self._stream is not None
        shape = (size, *self._images.shape[1:])
        images = torch.empty(shape, dtype=torch.uint8, device="cpu", pin_memory=pinned)
        np.take(self._images, rows, axis=0, out=images.numpy(), mode="clip")  # "raise" would make a copy first
        on_host = images, torch.from_numpy(rows), torch.from_numpy(self._labels[rows])
        if self._stream is None:
            a, b, c = (tensor.to(self._device) for tensor in on_host)
            return _Copy(a, b, c, None)
        # PyTorch gives pinned memory back to its pool only when the copy from it is done
        with torch.cuda.stream(self._stream):
            a, b, c = (tensor.pin_memory().to(self._device, non_blocking=True) for tensor in on_host)
            return _Copy(a, b, c, self._stream.record_event())
