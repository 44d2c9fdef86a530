"""What a loader gives: a batch, and a data set of its batches for what insists on one.

Example:
    images, labels = Batch(images, labels)
    DataLoader(Batches(loader), batch_size=None)
"""

from collections.abc import Iterator
from typing import NamedTuple, NoReturn, Protocol

from torch import Tensor
from torch.utils.data import IterableDataset, get_worker_info

from fastcifar.errors import ConfigError

__all__ = ["Batch", "Batches"]


_NO_WORKERS = "num_workers must be 0 for the batches of a Loader: each worker would make them all"


class Batch(NamedTuple):
    """One batch; unpacks as `images, labels`."""

    images: Tensor
    """floating [B, C, H, W]."""
    labels: Tensor
    """int64[B]; -100, which `cross_entropy` ignores, where a row is padding. With mixup or CutMix float32[B, K],
    whose rows sum to 1, or to 0 where a row is padding."""

    @property
    def mask(self) -> Tensor:
        """bool[B]: True where a row is a sample, False where it is padding."""
        return self.labels >= 0 if self.labels.dim() == 1 else self.labels.sum(1) > 0


class _Source(Protocol):
    def __iter__(self) -> Iterator[Batch]: ...

    def __len__(self) -> int: ...

    def set_epoch(self, epoch: int) -> None: ...


class Batches(IterableDataset[Batch]):
    """A loader's batches, as a data set."""

    def __init__(self, loader: _Source) -> None:
        self.loader = loader

    def __iter__(self) -> Iterator[Batch]:
        if get_worker_info() is not None:
            raise ConfigError(_NO_WORKERS)
        return iter(self.loader)

    def __reduce__(self) -> NoReturn:
        """Refuse what is sent to workers that are spawned."""
        raise ConfigError(_NO_WORKERS)

    def __len__(self) -> int:
        return len(self.loader)

    def set_epoch(self, epoch: int) -> None:
        """Let the next pass be that epoch."""
        self.loader.set_epoch(epoch)
