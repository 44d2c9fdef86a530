"""Loader: batches of augmented images, each a pure function of (seed, epoch, step).

The bytes are copied to the device once, each checked against its checksum on the way; one kernel then
shuffles, gathers, augments, scales and lays out each batch. There are no workers and no state but a
position.

    for images, labels in Loader("cifar10", split="train", batch_size=512):   # float32[512, 3, 32, 32], int64[512]
        ...
"""

import dataclasses
import functools
import weakref
from collections.abc import Iterator
from numbers import Integral
from pathlib import Path
from typing import Any, Literal, NamedTuple, Protocol, get_args

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fastcifar.config import Augment, Scaling
from fastcifar.data.datasets import open_store
from fastcifar.data.store import ArrayStore
from fastcifar.errors import ConfigError
from fastcifar.kernels import reference
from fastcifar.kernels.plan import DType, Order, Plan, check_plan, scale_and_shift
from fastcifar.runtime import find_device

__all__ = ["Augment", "Batch", "Loader"]

Placement = Literal["auto", "device"]
Backend = Literal["auto", "cpu", "eager", "reference"]

_DTYPES: dict[torch.dtype, DType] = {torch.float32: "float32", torch.bfloat16: "bfloat16", torch.float16: "float16"}

# One copy of a store's bytes on a device, for as long as a loader uses it.
_placed: "weakref.WeakValueDictionary[tuple[str, torch.device], Tensor]" = weakref.WeakValueDictionary()


class Batch(NamedTuple):
    """One batch; unpacks as `images, labels`."""

    images: Tensor
    """floating [B, C, H, W]."""
    labels: Tensor
    """int64[B]; -100, which `cross_entropy` ignores, where a row is padding."""

    @property
    def mask(self) -> Tensor:
        """bool[B]: True where a row is a sample, False where it is padding."""
        return self.labels >= 0


class _Kernel(Protocol):
    def __call__(self, *, epoch: int, start: int, size: int, capacity: int | None = None) -> tuple[Tensor, Tensor]: ...


class Loader:
    """Batches of a split of a store.

    Each pass (`for images, labels in loader`) is one epoch and draws a new order and new augmentation.
    A pass that was broken off is not continued: the next begins the next epoch. To go on within an
    epoch, restore `state_dict`.

    Args:
        store: an open store, or what `open_store` takes.
        split: "train", "test", or SCHEME/PART, such as "report/validation".
        batch_size: samples in a global batch (of all ranks together).
        seed: of order and augmentation, 0 to 2**64 - 1.
        augment: None for none.
        scaling: raw (0..255), unit [0, 1], signed [-1, 1], or standardize (by the mean and standard
            deviation of the split's training part). The factor has 16 significant bits, so that all
            backends agree exactly: with unit, 255 becomes 1.0000153.
        dtype: torch.float32, bfloat16 or float16; rounded once, from float32.
        device: where batches are made and given.
        channels_last: memory format of the images; their shape is [B, C, H, W] either way.
        order: random (an exact permutation for each epoch), or sequential.
        drop_last: leave out a last batch that is not full.
        pad_last: fill a last batch that is not full with zeros, labelled -100, so that shapes stay the same.
        placement: device (the whole store is copied to the device), or auto.
        backend: cpu (numba), eager (plain torch operations), reference (NumPy, slow and obvious), or auto: cpu
            on a CPU, eager elsewhere. All give the same bits.
        rank: of this process, 0 to world_size - 1: it gets its slice of each global batch.
        world_size: number of processes.

    Raises:
        ConfigError: an argument is not one of those allowed; raised before any work starts.
        DataError: the store's bytes do not have their checksums.
    """

    def __init__(
        self,
        store: ArrayStore | str | Path,
        *,
        split: str = "train",
        batch_size: int = 128,
        seed: int = 0,
        augment: Augment | None = None,
        scaling: Scaling = "standardize",
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
        channels_last: bool = True,
        order: Order = "random",
        drop_last: bool = False,
        pad_last: bool = False,
        placement: Placement = "auto",
        backend: Backend = "auto",
        rank: int = 0,
        world_size: int = 1,
    ) -> None:
        for name, value, allowed in (
            ("scaling", scaling, get_args(Scaling)),
            ("order", order, get_args(Order)),
            ("placement", placement, get_args(Placement)),
            ("backend", backend, get_args(Backend)),
            ("dtype", dtype, tuple(_DTYPES)),
        ):
            if value not in allowed:
                raise ConfigError(f"{name} must be one of {', '.join(map(str, allowed))}, got {value!r}")
        for name, number, low, high in (
            ("batch_size", batch_size, 1, 2**31 - 1),
            ("seed", seed, 0, 2**64 - 1),
            ("world_size", world_size, 1, 2**31 - 1),
            ("rank", rank, 0, world_size - 1),
        ):
            if not isinstance(number, Integral) or isinstance(number, bool) or not low <= number <= high:
                raise ConfigError(f"{name} must be a whole number from {low} to {high}, got {number!r}")
        batch_size, seed, rank, world_size = int(batch_size), int(seed), int(rank), int(world_size)  # NumPy's too
        if drop_last and pad_last:
            raise ConfigError("drop_last and pad_last cannot both be on")
        if augment is not None and not isinstance(augment, Augment):
            raise ConfigError(f"augment must be an Augment or None, got {augment!r}")
        self.device = find_device(device)
        if backend in ("cpu", "reference") and self.device.type != "cpu":
            raise ConfigError(f"backend {backend!r} needs device 'cpu', got {str(self.device)!r}: use backend 'eager'")

        self.store = store if isinstance(store, ArrayStore) else open_store(store)
        self.dataset = self.store.split(split)  # what a DataLoader calls so
        self.batch_size = batch_size
        self.drop_last = drop_last
        self.pad_last = pad_last
        self.rank = rank
        self.world_size = world_size
        self.backend = ("cpu" if self.device.type == "cpu" else "eager") if backend == "auto" else backend
        augment = augment or Augment()
        scale, shift = scale_and_shift(scaling, self.dataset.mean, self.dataset.std)
        rows = self.dataset.rows
        plan = Plan(
            samples=len(self.dataset),
            offset=rows.start if isinstance(rows, range) else 0,
            rows=None if isinstance(rows, range) else rows,
            seed=seed,
            order=order,
            crop=augment.crop,
            padding=augment.padding,
            flip=augment.flip,
            cutout=augment.cutout,
            scale=scale,
            shift=shift,
            dtype=_DTYPES[dtype],
            channels_last=channels_last,
        )
        check_plan(plan, self.store.images.shape, len(self.store.labels))
        self._identity = {
            "digest": self.store.digest,
            "split": self.dataset.name,
            "batch_size": batch_size,
            "seed": seed,
            "order": order,
            "drop_last": drop_last,
            "scaling": scaling,
            "augment": dataclasses.asdict(augment),
        }
        self._kernel = self._make_kernel(plan)
        self._epoch, self._step = 0, 0
        self._broken_off = False

    def _make_kernel(self, plan: Plan) -> _Kernel:
        self._images = images = _place(self.store, self.device)
        if self.backend == "cpu":
            from fastcifar.kernels.cpu import CpuKernel  # llvmlite takes a moment to import

            return CpuKernel(images.numpy(), self.store.labels, plan)
        if self.backend == "reference":
            return functools.partial(_reference, images.numpy(), self.store.labels, plan)
        from fastcifar.kernels.eager import EagerKernel

        return EagerKernel(images, torch.from_numpy(self.store.labels).to(self.device), plan)

    def __len__(self) -> int:
        """Batches in an epoch; the same for every rank and epoch."""
        full, rest = divmod(len(self.dataset), self.batch_size)
        return full + (rest > 0 and not self.drop_last)

    def batch(self, epoch: int, step: int) -> Batch:
        """This rank's part of batch `step` of `epoch`, both from 0. Moves no position.

        Raises:
            IndexError: the epoch has no such step.
        """
        if not 0 <= step < len(self):
            raise IndexError(f"step {step} is out of range: an epoch has {len(self)} batches")
        first = step * self.batch_size
        count = min(self.batch_size, len(self.dataset) - first)
        low, high = (count * self.rank // self.world_size, count * (self.rank + 1) // self.world_size)
        capacity = -(-self.batch_size // self.world_size) if self.pad_last else None
        return Batch(*self._kernel(epoch=epoch, start=first + low, size=high - low, capacity=capacity))

    def __iter__(self) -> Iterator[Batch]:
        if self._broken_off:
            self.set_epoch(self._epoch + 1)
        epoch = self._epoch
        for step in range(self._step, len(self)):
            batch = self.batch(epoch, step)
            self._step, self._broken_off = step + 1, True
            yield batch
        self.set_epoch(epoch + 1)

    def set_epoch(self, epoch: int) -> None:
        """Let the next pass be epoch `epoch`, from its first batch.

        Raises:
            ConfigError: `epoch` is not from 0 to 2**32 - 1.
        """
        if not isinstance(epoch, int) or not 0 <= epoch < 2**32:
            raise ConfigError(f"epoch must be a whole number from 0 to {2**32 - 1}, got {epoch!r}")
        self._epoch, self._step, self._broken_off = epoch, 0, False

    def state_dict(self) -> dict[str, Any]:
        """The position (epoch, and the step of the next batch) and what it is a position in."""
        return {"version": 1, "epoch": self._epoch, "step": self._step, **self._identity}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on where the loader that gave `state` stood, on any device, rank and world size.

        Raises:
            ConfigError: `state` is of other data or options, which are named.
        """
        if state.get("version") != 1:
            raise ConfigError(f"loader state has version {state.get('version')!r}, this fastcifar reads 1")
        for name, own in self._identity.items():
            if state.get(name) != own:
                raise ConfigError(f"loader state is of other data: its {name} is {state.get(name)!r}, here {own!r}")
        epoch, step = state.get("epoch"), state.get("step")
        self.set_epoch(epoch)  # type: ignore[arg-type]  # which checks it
        if not isinstance(step, int) or not 0 <= step <= len(self):
            raise ConfigError(f"loader state has step {step!r}, an epoch has {len(self)}")
        self._step = step


def _reference(
    images: NDArray[np.uint8], labels: NDArray[np.int64], plan: Plan, **position: Any
) -> tuple[Tensor, Tensor]:
    made, targets = reference.batch(images, labels, plan, **position)
    return torch.from_numpy(made).to(getattr(torch, plan.dtype)), torch.from_numpy(targets)


def _place(store: ArrayStore, device: torch.device) -> Tensor:
    """The store's images on `device`, uint8[N, H, W, C]; copied and checked the first time."""
    images = _placed.get((store.digest, device))
    if images is None:
        images = torch.from_numpy(store.load()).to(device)
        _placed[store.digest, device] = images
    return images
