"""Loader: batches of augmented images, each a pure function of (seed, epoch, step).

Each byte is checked against its checksum when it is first copied; one kernel then shuffles, gathers,
augments, scales and lays out each batch. There are no workers and no state but a position.

    for images, labels in Loader("cifar10", split="train", batch_size=512):   # float32[512, 3, 32, 32], int64[512]
        ...
"""

import logging
from collections.abc import Callable, Iterator
from numbers import Integral
from pathlib import Path
from typing import Any, get_args

import torch
from torch import Tensor
from torch.utils.data import IterableDataset

from fastcifar.backends import Backend, choose_backend
from fastcifar.batch_op import Registered, batch_op, check_position, register
from fastcifar.batches import Batch, Batches
from fastcifar.checks import check_choice, check_integer, check_kind
from fastcifar.config import Augment, Scaling
from fastcifar.data.store import ArrayStore
from fastcifar.errors import ConfigError
from fastcifar.kernels.plan import DType, Order, Plan, check_plan, rank_part, scale_and_shift
from fastcifar.pipeline import Pipeline
from fastcifar.placement import Placement, choose_placement
from fastcifar.position import Position
from fastcifar.runtime import find_device

__all__ = ["Augment", "Batch", "Loader"]

_DTYPES: dict[torch.dtype, DType] = {torch.float32: "float32", torch.bfloat16: "bfloat16", torch.float16: "float16"}
_log = logging.getLogger(__name__)


class Loader(Registered):
    """Batches of a split of a store.

    Each pass (`for images, labels in loader`) is one epoch and draws a new order and new augmentation. A pass that was
    broken off is not continued: the next begins the next epoch. To go on within an epoch, restore `state_dict`.

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
        order: random (an exact permutation for each epoch), block (blocks of neighbours are shuffled, and
            mixed within a window: for stores larger than memory), or sequential.
        block_size: samples in a block, for the order block.
        window: blocks that are mixed with each other, likewise.
        drop_last: leave out a last batch that is not full.
        pad_last: fill a last batch that is not full with zeros, labelled -100, so that shapes stay the same.
        placement: device (the whole store is copied to the device), host (it stays in host memory, and
            batches are copied one ahead), stream (it stays on disk and is read ahead), or auto, by what
            fits. Afterwards `loader.placement` is which, and `loader.placement_reason` why.
        backend: cpu (compiled), cuda (Triton), eager (plain torch operations), dali (NVIDIA DALI), reference
            (NumPy, slow and obvious), or auto: cpu on a CPU, cuda on CUDA where triton is installed, eager
            elsewhere. All give the same bits.
        transform: a `torch.nn.Module`, or any callable, of the finished images; with mixup or CutMix, of the
            mixed ones. What it draws from torch's generators is of seed, epoch, position, world_size and device.
        rank: of this process, 0 to world_size - 1: it gets its slice of each global batch; nothing else tells it which.
        world_size: number of processes. Of a batch shorter than that some get no sample: their mean loss is NaN.

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
        block_size: int = 256,
        window: int = 64,
        drop_last: bool = False,
        pad_last: bool = False,
        placement: Placement = "auto",
        backend: Backend = "auto",
        transform: Callable[[Tensor], Tensor] | None = None,
        rank: int = 0,
        world_size: int = 1,
    ) -> None:
        given = {name: value for name, value in locals().items() if name != "self"}
        for name, value, allowed in (
            ("scaling", scaling, get_args(Scaling)),
            ("order", order, get_args(Order)),
            ("placement", placement, get_args(Placement)),
            ("backend", backend, get_args(Backend)),
            ("dtype", dtype, tuple(_DTYPES)),
        ):
            check_choice(name, value, allowed)
        for name, number, low, high in (
            ("batch_size", batch_size, 1, 2**31 - 1),
            ("seed", seed, 0, 2**64 - 1),
            ("world_size", world_size, 1, 2**31 - 1),
            ("block_size", block_size, 1, 2**31 - 1),
            ("window", window, 1, 2**31 - 1),
        ):
            check_integer(name, number, low, high, kind=Integral)
        check_integer("rank", rank, 0, int(world_size) - 1, kind=Integral)
        numbers = (batch_size, seed, rank, world_size, block_size, window)
        batch_size, seed, rank, world_size, block_size, window = map(int, numbers)  # NumPy's too
        for name, flag in (("channels_last", channels_last), ("drop_last", drop_last), ("pad_last", pad_last)):
            check_kind(name, flag, bool, "True or False")
        if drop_last and pad_last:
            raise ConfigError("drop_last and pad_last cannot both be on")
        check_kind("augment", augment, Augment | None, "an Augment or None")
        check_kind("transform", transform, Callable | None, "a module or a callable")
        self.device = find_device(device)
        self.backend = choose_backend(backend, self.device)
        if not isinstance(store, ArrayStore):
            from fastcifar.data.datasets import open_store  # 0.03 s: what fetches and converts comes with it

            store = open_store(store)
        self.store, self._given = store, {**given, "store": store}
        self.dataset = self.store.split(split)  # what a DataLoader calls so
        self.batch_size, self.drop_last, self.pad_last = batch_size, drop_last, pad_last
        self.rank, self.world_size = rank, world_size
        augment = augment or Augment()
        scale, shift = scale_and_shift(scaling, self.dataset.mean, self.dataset.std)
        rows = self.dataset.rows
        self._plan = Plan(
            samples=len(self.dataset),
            offset=rows.start if isinstance(rows, range) else 0,
            rows=None if isinstance(rows, range) else rows,
            seed=seed,
            order=order,
            block_size=block_size,
            window=window,
            crop=augment.crop,
            padding=augment.padding,
            flip=augment.flip,
            cutout=augment.cutout,
            scale=scale,
            shift=shift,
            dtype=_DTYPES[dtype],
            channels_last=channels_last,
        )
        check_plan(self._plan, self.store.images.shape, len(self.store.labels))
        if augment.policy != "none" and self.store.image_shape[2] not in (1, 3):
            raise ConfigError(f"policy {augment.policy!r} needs grey or RGB images, not {self.store.image_shape}")
        identity = {
            "digest": self.store.digest,
            "split": self.dataset.name,
            "batch_size": batch_size,
            "seed": seed,
            "order": order,
            **({"block_size": block_size, "window": window} if order == "block" else {}),
            "drop_last": drop_last,
            "scaling": scaling,
            "augment": {name: value for name, value in vars(augment).items() if name != "policy_epochs" or value},
        }
        self.placement, self.placement_reason = choose_placement(placement, self.store, self.device)
        if (self.backend, self.placement) == ("dali", "device") and self.device.type != "cpu":
            self.placement, self.placement_reason = "host", "host: DALI takes batches from host memory"
        _log.info("%s: placement %s", self.store.name, self.placement_reason)
        self._pipeline = Pipeline(
            self.store,
            self._plan,
            augment,
            placement=self.placement,
            backend=self.backend,
            device=self.device,
            transform=transform,
            alone=world_size == 1,
        )
        self._transform, self._dtype, self._soft = transform, dtype, bool(augment.mixup or augment.cutmix)
        self._capacity = -(-batch_size // world_size)  # rows of this rank's part of a full batch, at most
        self._handle, self._position = register(self), Position(steps=len(self), identity=identity)

    def __len__(self) -> int:
        """Batches in an epoch; the same for every rank and epoch."""
        full, rest = divmod(len(self.dataset), self.batch_size)
        return full + (rest > 0 and not self.drop_last)

    def batch(self, epoch: int, step: int) -> Batch:
        """This rank's part of batch `step` of `epoch`, both from 0. Moves no position.

        Raises:
            ConfigError, IndexError: there is no such epoch (up to 2**32 - 1), or no such step in it.
        """
        if not (isinstance(epoch, Integral) and isinstance(step, Integral)):
            raise ConfigError(f"epoch and step must be whole numbers, got {epoch!r:.100} and {step!r:.100}")
        return Batch(*self._make(epoch, step, self._capacity if self.pad_last else None))

    def batch_at(self, position: Tensor) -> Batch:
        """This rank's part of the batch of a position that the device holds: for compiled steps and CUDA graphs.

        It is one operator, `fastcifar::batch`, without a graph break. With backend cuda and placement device (and no
        mixup or CutMix across ranks) a graph captured once gives batch after batch; elsewhere `position` is read back.

        Args:
            position: int64[2], (epoch, step), on the loader's device.

        Returns:
            A batch of always the same shape; rows that have no sample are padding.

        Raises:
            ConfigError: the loader has a transform: apply it in the step; or `position` is no such tensor.
            ConfigError, IndexError: as `batch` (with backend cuda all rows are padding, and epochs modulo 2**32).
        """
        if self._transform is not None:
            raise ConfigError("batch_at makes batches without transform: apply the module in the step itself")
        return Batch(*batch_op(check_position(position, self.device), self._handle))

    @property
    def counts_on_device(self) -> bool:
        """Whether `batch_at` reads the position on the device, so that a CUDA graph can hold it."""
        return self._pipeline.at is not None

    def make_at(self, position: Tensor) -> tuple[Tensor, Tensor]:
        """What the operator of `batch_at` does."""
        if self._pipeline.at is None:
            epoch, step = position.tolist()
            return self._make(epoch, step, self._capacity)
        ranks = {"rank": self.rank, "world_size": self.world_size, "steps": len(self)}
        return self._pipeline.at(position, batch_size=self.batch_size, **ranks, capacity=self._capacity)

    def like(self, position: Tensor) -> tuple[Tensor, Tensor]:
        """Tensors as `batch_at` gives them, without values."""
        height, width, channels = self.store.image_shape
        memory = torch.channels_last if self._plan.channels_last else torch.contiguous_format
        shape = (self._capacity, channels, height, width)
        images = torch.empty(shape, dtype=self._dtype, device=position.device, memory_format=memory)
        if self._soft:
            return images, images.new_empty((self._capacity, len(self.store.classes)), dtype=torch.float32)
        return images, torch.empty(self._capacity, dtype=torch.int64, device=position.device)

    def _make(self, epoch: int, step: int, capacity: int | None) -> tuple[Tensor, Tensor]:
        if not 0 <= step < len(self):
            raise IndexError(f"step {step} is out of range: an epoch has {len(self)} batches")
        first, count, low, high = self._span(step)
        return self._pipeline(epoch=epoch, first=first, count=count, low=low, high=high, capacity=capacity)

    def _span(self, step: int) -> tuple[int, int, int, int]:
        """Of a global batch its first position and its size, and this rank's first and last + 1 place in it."""
        first = step * self.batch_size
        count = min(self.batch_size, len(self.dataset) - first)
        return first, count, *rank_part(count, self.rank, self.world_size)

    def positions(self) -> Iterator[tuple[int, int]]:
        """The positions (epoch, step) of a pass, for `batch` or `batch_at`; they move the loader's own."""
        return self._position.walk(lambda epoch, step: (epoch, step))

    def __iter__(self) -> Iterator[Batch]:
        return self._position.walk(self._in_turn, self._pipeline.close)

    def _in_turn(self, epoch: int, step: int) -> Batch:
        batch = self.batch(epoch, step)
        if self._pipeline.prepares and step + 1 < len(self):
            first, _, low, high = self._span(step + 1)
            self._pipeline.prepare(epoch=epoch, start=first + low, size=high - low)
        return batch

    def set_epoch(self, epoch: int) -> None:
        """Let the next pass be epoch `epoch`, from its first batch.

        Raises:
            ConfigError: `epoch` is not from 0 to 2**32 - 1.
        """
        self._position.set_epoch(epoch)

    def state_dict(self) -> dict[str, Any]:
        """The next batch's position (epoch, step), and what it is one in. What is read ahead counts as given."""
        return self._position.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on where the loader that gave `state` stood, on any device, rank and world size.

        Raises:
            ConfigError: `state` is of other data or options, which are named.
        """
        self._position.load_state_dict(state)

    def as_iterable_dataset(self) -> "IterableDataset[Batch]":
        """An `IterableDataset` of this loader's batches, for what insists on one.

        `DataLoader(loader.as_iterable_dataset(), batch_size=None)` gives the same batches; it needs no workers
        and refuses them.
        """
        return Batches(self)
