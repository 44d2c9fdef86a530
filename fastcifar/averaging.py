"""Averages of a net over its steps: an exponential moving average, or Lookahead (Zhang et al. 2019).

Where a recipe asks for either, the average is the net that is evaluated, saved and handed over; the net that takes the
steps goes on beside it. Both hold the floating state: parameters and the statistics of BatchNorm.

    averaging = Averaging(model, recipe, steps=100)
    averaging.update_no_sync(step=5)      # after step 5: every `recipe.averaging_every` steps it does something
    with averaging.swapped():             # the model is the average
        evaluate(model, ...)
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from fastcifar.config import Recipe

__all__ = ["Averaging", "averaging_decay"]


def averaging_decay(recipe: Recipe, step: int, steps: int) -> float:
    """The part of the average that its update after `step` of `steps` (from 1) keeps.

    `ema` keeps decay**every. `lookahead` keeps decay**every * (step / steps)**3, as airbench does: nearly nothing at
    first, so that the average follows the net closely while it moves far.
    """
    kept = recipe.averaging_decay**recipe.averaging_every
    return kept * (step / steps) ** 3 if recipe.averaging == "lookahead" else kept


class Averaging:
    """The average of a net, as the recipe says; with `averaging="none"` there is none, and nothing is done.

    Lookahead sets the net back to the average at each of its updates. The steps since the last update are in the net
    alone; at the end of the run they are left out, since the average is what is handed over (airbench's last update,
    with decay 1).

    Args:
        model: the net, on its device. The average starts as a copy of it.
        recipe: `averaging`, `averaging_every` and `averaging_decay`.
        steps: in the whole run.
    """

    def __init__(self, model: nn.Module, recipe: Recipe, *, steps: int) -> None:
        self._recipe = recipe
        self._steps = steps
        state = model.state_dict() if recipe.averaging != "none" else {}
        # these share the net's memory: what is done to them in place is done to the net
        self._net = {name: tensor for name, tensor in state.items() if tensor.is_floating_point()}
        self._average = {name: tensor.clone() for name, tensor in self._net.items()}

    @torch.no_grad()
    def update_no_sync(self, step: int) -> None:
        """Move the average, if it's time to.

        Args:
            step: how many steps are done, from 1.
        """
        if not self._net or step % self._recipe.averaging_every:
            return
        net, average = list(self._net.values()), list(self._average.values())
        torch._foreach_lerp_(average, net, 1 - averaging_decay(self._recipe, step, self._steps))
        if self._recipe.averaging == "lookahead":
            torch._foreach_copy_(net, average)

    @contextmanager
    def swapped(self) -> Iterator[None]:
        """Within the block the model is the average; its tensors stay where they are, so what is compiled stays too."""
        self._swap()
        try:
            yield
        finally:
            self._swap()

    @torch.no_grad()
    def _swap(self) -> None:
        for name, tensor in self._net.items():
            own = tensor.clone()
            tensor.copy_(self._average[name])
            self._average[name].copy_(own)

    def averages(self) -> dict[str, Tensor]:
        """The average's tensors, under the names they have in the net."""
        return self._average

    def tensors(self) -> dict[str, Tensor]:
        """The net's own tensors, as `net.NAME`, where `averages` stand in their place in a checkpoint."""
        return {f"net.{name}": tensor for name, tensor in self._net.items()}

    @torch.no_grad()
    def restore(self, training: Mapping[str, Tensor]) -> None:
        """Take the average from the model, which has just loaded it, and the net from what `tensors` gave."""
        for name, tensor in self._net.items():
            self._average[name].copy_(tensor)
            tensor.copy_(training[f"net.{name}"])
