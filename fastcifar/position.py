"""Where a loader stands: an epoch, and the step that comes next in it.

position = Position(steps=98, identity={"seed": 0})
for epoch, step in position.walk(): ...
position.load_state_dict(saved)
"""

from collections.abc import Iterator
from typing import Any

from fastcifar.checks import check_integer
from fastcifar.errors import ConfigError

__all__ = ["Position"]

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

    def walk(self) -> Iterator[tuple[int, int]]:
        """The (epoch, step) of a pass; one that was broken off is not continued, the next is the next epoch's."""
        if self._broken_off:
            self.set_epoch(self._epoch + 1)
        epoch = self._epoch
        for step in range(self._step, self._steps):
            self._step, self._broken_off = step + 1, True
            yield epoch, step
        self.set_epoch(epoch + 1)

    def set_epoch(self, epoch: int) -> None:
        """Stand before the first batch of `epoch`.

        Raises:
            ConfigError: `epoch` is not from 0 to 2**32 - 1.
        """
        check_integer("epoch", epoch, 0, 2**32 - 1)
        self._epoch, self._step, self._broken_off = epoch, 0, False

    def state_dict(self) -> dict[str, Any]:
        """The epoch, the step of the next batch, and what it is a position in."""
        return {"version": _VERSION, "epoch": self._epoch, "step": self._step, **self._identity}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Stand where `state_dict` was called.

        Raises:
            ConfigError: `state` is of another identity; the first field that differs is named.
        """
        if state.get("version") != _VERSION:
            version = state.get("version")
            raise ConfigError(f"loader state has version {version!r}, this fastcifar reads {_VERSION}")
        for name, own in self._identity.items():
            if state.get(name) != own:
                raise ConfigError(f"loader state is of other data: its {name} is {state.get(name)!r}, here {own!r}")
        epoch, step = state.get("epoch"), state.get("step")
        self.set_epoch(epoch)  # type: ignore[arg-type]  # which checks it
        if not isinstance(step, int) or not 0 <= step <= self._steps:
            raise ConfigError(f"loader state has step {step!r}, an epoch has {self._steps}")
        self._step = step
