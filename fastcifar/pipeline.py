"""From positions of an epoch to a batch: the kernel, where the bytes are placed, then what works on whole batches.

    pipeline = Pipeline(store, plan, augment, placement="device", backend="cpu", device=torch.device("cpu"))
    images, labels = pipeline(epoch=0, first=512, count=512, low=0, high=512)

In this order: crop, flip (the kernel); a policy; scaling, conversion, cut-out (the kernel, or after a policy its
plain form); mixup and CutMix; the user's module.
"""

import contextlib
from collections.abc import Callable
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from fastcifar.backends import make_source
from fastcifar.config import Augment
from fastcifar.data.store import ArrayStore
from fastcifar.errors import DataError
from fastcifar.kernels.plan import IGNORE, Plan
from fastcifar.kernels.rng import philox, split_seed
from fastcifar.mixing import Mixer
from fastcifar.placement import place
from fastcifar.runtime import local_seed

if TYPE_CHECKING:  # llvmlite takes a moment to import
    from fastcifar.streaming import Reader

__all__ = ["Pipeline", "Transform"]

Transform = Callable[[Tensor], Tensor]

_HOST = torch.device("cpu")
_TRANSFORM = 6
"""Purpose: the fourth word of the counter; see `kernels.rng`."""


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
        self._source = make_source(store, labels, kernel_plan, self.images, backend, device)
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
        if (of_epoch := self._of(epoch)) is not self:
            return of_epoch(epoch=epoch, first=first, count=count, low=low, high=high, capacity=capacity)
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
        pipeline = self._of(epoch)
        with contextlib.suppress(DataError):  # the batch itself raises it, once it is wanted
            if pipeline._reader is not None:  # what it has not read and checked nobody else may touch
                pipeline._reader.prepare(epoch=epoch, start=start, size=size)
            pipeline._source.prepare(epoch=epoch, start=start, size=size)  # type: ignore[attr-defined]

    def _of(self, epoch: int) -> "Pipeline":
        """What makes the batches of an epoch: this one, or the one for the epochs after those with a policy."""
        return self if self._after is None or epoch < self._policy_epochs else self._after

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
