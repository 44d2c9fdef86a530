"""Where a loader stands: an epoch, and the step that comes next in it.

Example:
    position = Position(steps=98, identity={"seed": 0})
    for batch in position.walk(loader.batch): ...
    position.load_state_dict(saved)
"""

from collections.abc import Callable, Iterator
from numbers import Integral
from typing import Any, TypeVar

from fastcifar.checks import check_integer, check_kind
from fastcifar.errors import ConfigError

__all__ = ["Position"]

T = TypeVar("T")

_VERSION = 1


class Position:
    """The position of a loader whose epochs have `steps` batches each.

    Args:
        steps: batches in an epoch.
        identity: what the position is one in, as JSON values: a state of anything else is refused.
    """

    def __init__(self, *, steps: int, identity: dict[str, Any]) -> None:
        self._steps, self._identity = steps, identity
        self._epoch, self._step = 0, 0
        self._broken_off = False

    def walk(self, make: Callable[[int, int], T]) -> Iterator[T]:
        """What `make` gives for each (epoch, step) of a pass.

        Where it fails, the position stays at that step. A pass that was broken off is not continued: the next is the
        next epoch's.
        """
        if self._broken_off:
            self.set_epoch(self._epoch + 1)
        epoch = self._epoch
        for step in range(self._step, self._steps):
            made = make(epoch, step)
            self._step, self._broken_off = step + 1, True
            yield made
            del made  # a batch's memory is used again as soon as nobody else has it
        self.set_epoch(epoch + 1)

    def set_epoch(self, epoch: int) -> None:
        """Stand before the first batch of `epoch`.

        Raises:
            ConfigError: `epoch` is not from 0 to 2**32 - 1.
        """
        check_integer("epoch", epoch, 0, 2**32 - 1, kind=Integral)
        self._epoch, self._step, self._broken_off = int(epoch), 0, False

    def state_dict(self) -> dict[str, Any]:
        """The epoch, the step of the next batch, and what it is a position in."""
        return {"version": _VERSION, "epoch": self._epoch, "step": self._step, **self._identity}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Stand where `state_dict` was called.

        Raises:
            ConfigError: `state` is of another identity; the first field that differs is named.
        """
        check_kind("loader state", state, dict, "what state_dict gave")
        if state.get("version") != _VERSION:
            version = state.get("version")
            raise ConfigError(f"loader state has version {version!r}, this fastcifar reads {_VERSION}")
        for name, own in self._identity.items():
            if state.get(name) != own:
                raise ConfigError(f"loader state is of other data: its {name} is {state.get(name)!r}, here {own!r}")
        epoch, step = state.get("epoch"), state.get("step")
        if not isinstance(step, int) or not 0 <= step <= self._steps:
            raise ConfigError(f"loader state has step {step!r}, an epoch has {self._steps}")
        self.set_epoch(epoch)  # type: ignore[arg-type]  # which checks it
        self._step = step
