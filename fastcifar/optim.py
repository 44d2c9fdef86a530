"""Optimisers and learning-rate schedules of the recipes; a schedule is a pure function of the step.

Example:
    optimizer = build_optimizer(model, recipe)
    set_learning_rate(optimizer, learning_rate(recipe, step, steps))
"""

import torch
from torch import Tensor, nn

from fastcifar.config import Recipe

__all__ = ["build_optimizer", "decay_no_sync", "learning_rate", "set_learning_rate"]


def build_optimizer(model: nn.Module, recipe: Recipe) -> torch.optim.Optimizer:
    """The recipe's optimiser, over two groups: what is decayed (matrices and filters), and what is not."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    groups = [{"params": [p for p in parameters if p.ndim > 1]}, {"params": [p for p in parameters if p.ndim <= 1]}]
    # Decay is ours (`decay_no_sync`), the same for every optimiser; theirs stays off.
    if recipe.optimizer == "sgd":
        nesterov = recipe.momentum > 0
        return torch.optim.SGD(groups, lr=recipe.lr, momentum=recipe.momentum, nesterov=nesterov, foreach=True)
    return torch.optim.Adam(groups, lr=recipe.lr, foreach=True)


def set_learning_rate(optimizer: torch.optim.Optimizer, rate: float) -> None:
    """Set the learning rate of every group."""
    for group in optimizer.param_groups:
        group["lr"] = rate


@torch.no_grad()
def decay_no_sync(optimizer: torch.optim.Optimizer, rate: float, weight_decay: float) -> None:
    """Decoupled weight decay (Loshchilov & Hutter 2019): w <- (1 - rate * weight_decay) * w."""
    if weight_decay:
        weights: list[Tensor] = optimizer.param_groups[0]["params"]
        torch._foreach_mul_(weights, 1 - rate * weight_decay)


def learning_rate(recipe: Recipe, step: int, steps: int) -> float:
    """The learning rate of step `step` (from 0) of `steps`.

    `one-cycle` rises linearly to `recipe.lr` in the first `recipe.warmup` of the steps, then falls
    linearly to 0 (Smith & Topin 2018, in its triangular form).
    """
    if recipe.schedule == "constant":
        return recipe.lr
    peak = recipe.warmup * steps
    # the first step and the last both move the weights: positions are the steps' middles
    position = step + 0.5
    return recipe.lr * (position / peak if position < peak else (steps - position) / (steps - peak))
