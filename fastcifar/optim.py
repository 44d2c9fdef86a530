"""Optimisers of the recipes, and what changes with the step: learning rate and resolution, pure functions of it.

Example:
    optimizer = build_optimizer(model, recipe)
    set_learning_rate(optimizer, learning_rate(recipe, step, steps))
    side = resolution(recipe, step, steps)    # pixels; None for the images' own
"""

import itertools
import math
from typing import Any

import torch
from torch import Tensor, nn

from fastcifar.config import Recipe
from fastcifar.muon import Muon

__all__ = ["build_optimizer", "learning_rate", "resolution", "set_learning_rate"]


def build_optimizer(
    model: nn.Module, recipe: Recipe, *, precision: torch.dtype = torch.float32
) -> torch.optim.Optimizer:
    """The recipe's optimiser, over three groups: filters and hidden matrices, the head's matrix, vectors.

    The head is the last `nn.Linear`. A group's `lr_scale` is its learning rate as a multiple of the recipe's, its
    `decay` the weight decay, which each step applies first and decoupled (Loshchilov & Hutter 2019):
    w <- (1 - lr * decay) * w. Where a GradScaler skips a step, it skips that too.

    Args:
        model: the net.
        recipe: which optimiser, and its settings.
        precision: in which the run makes its matrix products; Muon makes its own in it too where that is bfloat16.
            In float16 small singular values would be lost.
    """
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    linear = [module for module in model.modules() if isinstance(module, nn.Linear)]
    head = linear[-1].weight if linear else None
    muon = recipe.optimizer == "muon"
    matrices: dict[str, Any] = {
        "params": [p for p in parameters if p.ndim > 1 and p is not head],
        "lr_scale": 1.0,
        "decay": 0.0 if muon else recipe.weight_decay,  # Muon fixes the norm
    }
    last: dict[str, Any] = {
        "params": [p for p in parameters if p is head],
        "lr_scale": recipe.head_lr,
        "decay": recipe.weight_decay,
    }
    vectors: dict[str, Any] = {
        "params": [p for p in parameters if p.ndim <= 1],
        "lr_scale": recipe.vector_lr,
        "decay": 0.0,
    }
    groups = [matrices, last, vectors]
    optimizer: torch.optim.Optimizer
    # Decay is ours, the same for every optimiser; theirs stays off.
    if muon:
        matrices |= {"orthogonal": True, "momentum": recipe.muon_momentum}
        products = torch.bfloat16 if precision == torch.bfloat16 else torch.float32
        optimizer = Muon(groups, lr=recipe.lr, momentum=recipe.momentum, products=products)
    elif recipe.optimizer == "sgd":
        nesterov = recipe.momentum > 0
        optimizer = torch.optim.SGD(groups, lr=recipe.lr, momentum=recipe.momentum, nesterov=nesterov, foreach=True)
    else:
        optimizer = torch.optim.Adam(groups, lr=recipe.lr, foreach=True)
    optimizer.register_step_pre_hook(_decay_no_sync)
    return optimizer


@torch.no_grad()
def _decay_no_sync(optimizer: torch.optim.Optimizer, *arguments: Any) -> None:
    for group in optimizer.param_groups:
        if group["decay"] and group["params"]:
            torch._foreach_mul_(group["params"], 1 - group["lr"] * group["decay"])


def set_learning_rate(optimizer: torch.optim.Optimizer, rate: float) -> None:
    """Set the learning rate of every group, each scaled by its own `lr_scale`; in place where it is a tensor."""
    for group in optimizer.param_groups:
        own = rate * group["lr_scale"]
        if isinstance(group["lr"], Tensor):
            group["lr"].fill_(own)
        else:
            group["lr"] = own


def learning_rate(recipe: Recipe, step: int, steps: int) -> float:
    """The learning rate of step `step` (from 0) of `steps`.

    `one-cycle` and `cosine` rise linearly to `recipe.lr` in the first `recipe.warmup` of the steps, then fall to
    `recipe.final_lr` of it: linearly (Smith & Topin 2018, in its triangular form), or as half a cosine
    (Loshchilov & Hutter 2017).
    """
    if recipe.schedule == "constant":
        return recipe.lr
    peak = recipe.warmup * steps
    # the first step and the last both move the weights: positions are the steps' middles
    position = step + 0.5
    if position < peak:
        return recipe.lr * (position / peak)
    left = (steps - position) / (steps - peak)
    if recipe.schedule == "cosine":
        left = (1 - math.cos(math.pi * left)) / 2
    return recipe.lr * (recipe.final_lr + (1 - recipe.final_lr) * left)


def resolution(recipe: Recipe, step: int, steps: int) -> int | None:
    """The side in pixels to which step `step` (from 0) of `steps` reduces the images; None for their own.

    A stage ends at the rounded sum of its fraction and those before it, which is where the next one begins.
    """
    ends = itertools.accumulate(fraction for _, fraction in recipe.resolutions)
    for (side, _), end in zip(recipe.resolutions, ends, strict=True):
        if step < round(end * steps):
            return side
    return None
