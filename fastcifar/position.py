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
_LAST = 2**32 - 1


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
        self._pass: object = None  # the newest; none where the position was set since it began

    def walk(self, make: Callable[[int, int], T], end: Callable[[], None] = lambda: None) -> Iterator[T]:
        """What `make` gives for each (epoch, step) of a pass.

        Where it fails, the position stays at that step. A pass that was broken off is not continued: the next is the
        next epoch's. One in which another was begun, or the position set, goes on and moves it no more.

        Args:
            make: gives what is at an epoch and a step.
            end: called when the pass ends, however it does, unless another was begun in it.
        """
        if self._broken_off:
            self.set_epoch(self._epoch + 1)
        epoch, first, mine = self._epoch, self._step, object()
        self._pass = mine
        try:
            for step in range(first, self._steps):
                made = make(epoch, step)
                if self._pass is mine:
                    self._step, self._broken_off = step + 1, True
                yield made
                del made  # a batch's memory is used again as soon as nobody else has it
            if self._pass is mine:
                self.set_epoch(epoch + 1)
        finally:
            if self._pass is mine or self._pass is None:
                end()

    def set_epoch(self, epoch: int) -> None:
        """Stand before the first batch of `epoch`.

        Raises:
            ConfigError: `epoch` is not from 0 to 2**32 - 1.
        """
        check_integer("epoch", epoch, 0, _LAST, kind=Integral)
        self._epoch, self._step, self._broken_off = int(epoch), 0, False
        self._pass = None

    def state_dict(self) -> dict[str, Any]:
        """The epoch and the step of the next batch, and what it is a position in."""
        epoch, step = self._next(self._epoch, self._step)
        return {"version": _VERSION, "epoch": epoch, "step": step, **self._identity}

    def _next(self, epoch: int, step: int) -> tuple[int, int]:
        """After an epoch's last step comes the next one's first."""
        return (epoch + 1, 0) if 0 < step == self._steps and epoch < _LAST else (epoch, step)

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
                raise ConfigError(f"loader state does not fit: its {name} is {state.get(name)!r}, here {own!r}")
        epoch, step = state.get("epoch"), state.get("step")
        if not isinstance(step, int) or not 0 <= step <= self._steps:
            raise ConfigError(f"loader state has step {step!r}, an epoch has {self._steps}")
        self.set_epoch(epoch)  # type: ignore[arg-type]  # which checks it
        self._epoch, self._step = self._next(self._epoch, step)
