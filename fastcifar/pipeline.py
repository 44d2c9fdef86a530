"""From positions of an epoch to a batch: the kernel, where the bytes are placed, then what works on whole batches.

    pipeline = Pipeline(store, plan, augment, placement="device", backend="cpu", device=torch.device("cpu"))
    images, labels = pipeline(epoch=0, first=512, count=512, low=0, high=512)

In this order: crop, flip (the kernel); a policy; scaling, conversion, cut-out (the kernel, or after a policy its
plain form); mixup and CutMix; the user's module.
"""

import functools
import importlib.util
from collections.abc import Callable
from dataclasses import replace
from typing import TYPE_CHECKING, Any, Literal, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fastcifar.config import Augment
from fastcifar.data.store import ArrayStore
from fastcifar.errors import ConfigError
from fastcifar.kernels import reference
from fastcifar.kernels.plan import IGNORE, Plan
from fastcifar.kernels.rng import philox, split_seed
from fastcifar.mixing import Mixer
from fastcifar.placement import place
from fastcifar.runtime import local_seed

if TYPE_CHECKING:  # llvmlite takes a moment to import
    from fastcifar.streaming import Reader

__all__ = ["Backend", "Pipeline", "Transform", "choose_backend"]

Backend = Literal["auto", "cpu", "cuda", "eager", "dali", "reference"]
Transform = Callable[[Tensor], Tensor]

_HOST = torch.device("cpu")
_TRANSFORM = 6
"""Purpose: the fourth word of the counter; see `kernels.rng`."""


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


class _Source(Protocol):
    def __call__(self, *, epoch: int, start: int, size: int, capacity: int | None = None) -> tuple[Tensor, Tensor]: ...


class Pipeline:
    """Makes batches.

    Args:
        store: the images.
        plan: what the kernel does; checked.
        augment: what is done beside that.
        placement: device, host or stream.
        backend: cpu, cuda, eager, dali or reference.
        device: where batches are made.
        transform: the user's module, of the finished images.
        alone: whether a batch is this rank's as a whole.
    """

    def __init__(
        self,
        store: ArrayStore,
        plan: Plan,
        augment: Augment,
        *,
        placement: str,
        backend: str,
        device: torch.device,
        transform: Transform | None = None,
        alone: bool = True,
    ) -> None:
        self._plan, self._device, self._transform = plan, device, transform
        self._policy: Callable[..., Tensor] | None = None
        self._policy_epochs = augment.policy_epochs
        self._after: Pipeline | None = None  # for the epochs after these
        kernel_plan = plan
        if augment.policy != "none":
            from fastcifar.kernels.eager import EagerAugment
            from fastcifar.policies import Policy, PolicyAugment

            policy = Policy(kind=augment.policy, num_ops=augment.num_ops, magnitude=augment.magnitude)
            self._policy = PolicyAugment(policy, shape=store.image_shape[:2], seed=plan.seed, device=device)
            if augment.policy_epochs:  # without a policy the kernel finishes batches itself
                where: Any = {"placement": placement, "backend": backend, "device": device}
                plain = replace(augment, policy="none")
                self._after = Pipeline(store, plan, plain, transform=transform, alone=alone, **where)
            # float16 holds 0..255 exactly, in half the bytes
            one = np.ones_like(plan.scale)
            kernel_plan = replace(plan, scale=one, shift=0 * one, dtype="float16", cutout=0)
            self._finish = EagerAugment(store.image_shape, replace(plan, crop=0, flip="none"), device)
        self._mixer = None
        if augment.mixup or augment.cutmix:
            self._mixer = Mixer(
                mixup=augment.mixup,
                cutmix=augment.cutmix,
                classes=len(store.classes),
                shape=store.image_shape[:2],
                seed=plan.seed,
                device=device,
            )
        self._reader = _reader(store, kernel_plan) if placement == "stream" else None
        # held here, so that other loaders of the same store share them
        self.images = None if placement == "stream" else place(store, device if placement == "device" else _HOST)
        self._labels: Tensor | None = None
        labels = store.labels
        if self._policy is not None or self._mixer is not None:
            # they are drawn of the samples' rows, which the kernel gives in place of labels
            self._labels = torch.from_numpy(labels).to(device)
            labels = np.arange(len(labels))
        self._source = _source(store, labels, kernel_plan, self.images, backend, device)
        self._alone = alone
        self._plain = self._reader is None and self._labels is None and transform is None
        # what a reader has not read yet the CPU kernel would wait for
        ahead = hasattr(self._source, "prepare") and (self._reader is None or backend != "cpu")
        self.prepares = self._mixer is None and ahead

    def __call__(
        self, *, epoch: int, first: int, count: int, low: int, high: int, capacity: int | None = None
    ) -> tuple[Tensor, Tensor]:
        """Places `low` to `high` - 1 of the global batch at positions `first` to `first + count - 1`.

        Args:
            epoch: 0 to 2**32 - 1.
            first: position of the global batch's first sample.
            count: samples in it.
            low: this rank's first place.
            high: this rank's last place + 1.
            capacity: B, rows of the result, at least high - low, which it is if None.

        Returns:
            floating [B, C, H, W] and int64[B], or with mixup or CutMix float32[B, K]. Rows from high - low on
            are zeros, with label IGNORE, or with zeros for all classes.
        """
        if self._plain:  # the usual case, in as little Python as can be
            return self._source(epoch=epoch, start=first + low, size=high - low, capacity=capacity)
        if self._after is not None and epoch >= self._policy_epochs:
            return self._after(epoch=epoch, first=first, count=count, low=low, high=high, capacity=capacity)
        if self._labels is None:
            images, labels = self._read(epoch, first + low, high - low, capacity)
        elif self._mixer is None:
            images, rows = self._read(epoch, first + low, high - low, None)
            images, labels = self._with_policy(images, rows, epoch, capacity)
        else:
            # samples are mixed in pairs, of which a rank may have one
            begin, end = low - low % 2, min(high + high % 2, count)
            images, rows = self._read(epoch, first + begin, end - begin, None)
            images, labels = self._with_policy(images, rows, epoch, None)
            if end > begin:
                images, labels = self._mixer(images, labels, rows, epoch=epoch)
            else:
                labels = torch.zeros((0, self._mixer.classes), dtype=torch.float32, device=labels.device)
            own = slice(low - begin, high - begin)
            images, labels = self._padded(images[own], capacity), self._padded(labels[own], capacity)
        if self._transform is not None:
            # drawn from (seed, epoch, position), whatever generator the module uses
            where = (first + low) & 0xFFFFFFFF, (first + low) >> 32
            w0, w1, _, _ = philox((*where, epoch, _TRANSFORM), split_seed(self._plan.seed))
            with local_seed((int(w1) << 32) | int(w0), self._device):
                images = self._transform(images)
        return images, labels

    @property
    def at(self) -> Callable[..., tuple[Tensor, Tensor]] | None:
        """Makes the batch of a position that the device holds, where nothing else is needed for it."""
        if self._transform is not None or (self._mixer is not None and not self._alone):
            return None
        made: Callable[..., tuple[Tensor, Tensor]] | None = getattr(self._source, "at", None)
        return made if made is None or self._labels is None else self._at

    def _at(self, position: Tensor, **part: int) -> tuple[Tensor, Tensor]:
        """As the kernel's: a policy, mixup and CutMix of the rows that it gives, and padding as it was."""
        images, rows = self._source.at(position, **part)  # type: ignore[attr-defined]
        padding = rows < 0
        rows = rows.clamp(min=0)
        epoch = position[0]
        images, labels = self._with_policy(images, rows, epoch, None)
        if self._mixer is None:
            labels = labels.masked_fill(padding, IGNORE)
        else:
            images, labels = self._mixer(images, labels, rows, epoch=epoch, present=(~padding).sum())
            labels = labels.masked_fill(padding[:, None], 0)
        return images.masked_fill_(padding[:, None, None, None], 0), labels  # in place, or the layout would be lost

    def prepare(self, *, epoch: int, start: int, size: int) -> None:
        """Begin with what takes time for a batch that is wanted soon, where the pipeline `prepares`."""
        source = self._source if self._after is None or epoch < self._policy_epochs else self._after
        source.prepare(epoch=epoch, start=start, size=size)  # type: ignore[union-attr]

    def close(self) -> None:
        """End threads and forget what was begun; the next call starts anew."""
        for part in (self._after, self._reader):
            if part is not None:
                part.close()
        if hasattr(self._source, "forget"):
            self._source.forget()

    def _read(self, epoch: int, start: int, size: int, capacity: int | None) -> tuple[Tensor, Tensor]:
        """What the kernel gives: images and labels, or rows in place of these."""
        if self._reader is not None:
            self._reader.prepare(epoch=epoch, start=start, size=size)
        return self._source(epoch=epoch, start=start, size=size, capacity=capacity)

    def _with_policy(
        self, images: Tensor, rows: Tensor, epoch: int | Tensor, capacity: int | None
    ) -> tuple[Tensor, Tensor]:
        """Images and labels of the rows, after the policy where there is one."""
        labels = self._labels[rows]  # type: ignore[index]  # there, where rows are
        if self._policy is None:
            return images, labels
        plain = images.to(torch.uint8)
        pixels = self._policy(plain, rows, epoch=epoch)
        if self._after is not None and isinstance(epoch, Tensor):  # a CUDA graph does the same in all epochs
            pixels = torch.where(epoch < self._policy_epochs, pixels, plain)
        return self._finish(pixels.permute(0, 2, 3, 1), rows, labels, epoch=epoch, capacity=capacity)

    def _padded(self, values: Tensor, capacity: int | None) -> Tensor:
        """`values` with rows of zeros up to `capacity`, in the plan's memory format."""
        if capacity is None or capacity == len(values):
            return values
        padded = values.new_zeros((capacity, *values.shape[1:]))
        if values.dim() == 4 and self._plan.channels_last:
            padded = padded.contiguous(memory_format=torch.channels_last)
        padded[: len(values)] = values
        return padded


def _reader(store: ArrayStore, plan: Plan) -> "Reader":
    from fastcifar.streaming import Reader

    return Reader(store, plan)


def _source(
    store: ArrayStore,
    labels: NDArray[np.int64],
    plan: Plan,
    images: Tensor | None,
    backend: str,
    device: torch.device,
) -> _Source:
    """The kernel, over `images`, or over the mapped store where that is None; it gives the `labels` of rows."""
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
