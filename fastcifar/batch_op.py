"""`fastcifar::batch`, the operator that lets a compiled step or a CUDA graph contain the making of a batch.

It keeps no loader alive, and touches nothing else.

    handle = register(loader)
    images, labels = batch_op(position, handle)        # position: int64[2], (epoch, step), on the loader's device
"""

import inspect
import itertools
import weakref
from collections.abc import Callable
from typing import Any, Protocol

import torch
from torch import Tensor

from fastcifar.errors import ConfigError

__all__ = ["Maker", "Registered", "batch_op", "check_position", "register"]


class Maker(Protocol):
    """What makes batches of one shape."""

    def make_at(self, position: Tensor) -> tuple[Tensor, Tensor]:
        """The batch of int64[2] (epoch, step)."""

    def like(self, position: Tensor) -> tuple[Tensor, Tensor]:
        """Tensors as `make_at` gives them, without values, of the kind that `position` is (fake, on a device)."""


_makers: "weakref.WeakValueDictionary[int, Maker]" = weakref.WeakValueDictionary()
_handles = itertools.count()


def register(maker: Maker) -> int:
    """The number by which the operator finds `maker`."""
    handle = next(_handles)
    _makers[handle] = maker
    return handle


class Registered:
    """A maker with a number for the operator; a copy is made anew of what it was `_given`, and stands where it does."""

    _given: dict[str, Any]

    def __repr__(self) -> str:
        usual = {name: option.default for name, option in inspect.signature(type(self)).parameters.items()}
        given = vars(self).get("_given", {})  # there is none where it could not be made
        options = (f"{name}={value!r}" for name, value in given.items() if value != usual[name])
        return f"{type(self).__name__}({', '.join(options)})"

    def __reduce__(self) -> tuple[Any, ...]:
        return _made, (type(self), self._given), {"_position": vars(self)["_position"]}


def _made(kind: Callable[..., Registered], given: dict[str, Any]) -> Registered:
    return kind(**given)


def check_position(position: object, device: torch.device) -> Tensor:
    """The position, if it may be one of a loader on the device.

    Raises:
        ConfigError: it is no tensor of two whole numbers, or is elsewhere.
    """
    if not isinstance(position, Tensor) or position.shape != (2,) or position.dtype != torch.int64:
        what = f"{position.dtype}{list(position.shape)}" if isinstance(position, Tensor) else repr(position)
        raise ConfigError(f"position must be a tensor int64[2], (epoch, step), got {what:.100}")
    if position.device.type != device.type:
        raise ConfigError(f"position must be on the loader's device, {device}, and is on {position.device}")
    return position


@torch.library.custom_op("fastcifar::batch", mutates_args=())
def batch_op(position: Tensor, handle: int) -> tuple[Tensor, Tensor]:
    """The batch of a position, int64[2] on the device, by the maker of that number."""
    return _makers[handle].make_at(position)


@batch_op.register_fake
def _fake(position: Tensor, handle: int) -> tuple[Tensor, Tensor]:
    return _makers[handle].like(position)
