"""The variants of a recipe that an ablation trains: what they are called, and what they change.

plan = plan_variants(config, without=("cutout",), variants=("optimizer=adam lr=0.001",))
plan["without cutout"]                       # ("augment.cutout=0",)
vary(config, plan["without cutout"])         # the options of its runs
"""

import dataclasses
from collections.abc import Sequence
from typing import Any

from fastcifar.changes import changed_fields, ingredients, leave_out, merge_changes
from fastcifar.config import TrainConfig
from fastcifar.errors import ConfigError
from fastcifar.recipes import resolve

__all__ = ["plan_variants", "vary"]

_BASE = "base"


def plan_variants(config: TrainConfig, without: Sequence[str], variants: Sequence[str]) -> dict[str, tuple[str, ...]]:
    """Name the variants, the base first.

    Args:
        config: the base's options.
        without: fields that a variant each puts back to their default.
        variants: changes that a variant each makes, such as "optimizer=adam lr=0.001".

    Returns:
        Name -> changes to the base.

    Raises:
        ConfigError: a field or change is wrong, a variant stands there twice or is the base, it has another split, or
            none is named and the recipe has nothing to leave out.
    """
    base = resolve(config)
    if not without and not variants:
        without = ingredients(base)
        if not without:
            raise ConfigError(f"recipe {config.recipe!r} has no ingredient to leave out: give --variant")
    found: list[tuple[str, tuple[str, ...]]] = [(_BASE, ())]
    for field in without:
        change = leave_out(base, field)
        found.append((f"without {change.partition('=')[0].removeprefix('augment.')}", (change,)))
    found += [(" ".join(text.split()), tuple(text.split())) for text in variants]
    plan: dict[str, tuple[str, ...]] = {}
    for name, changes in found:
        if name in plan:
            raise ConfigError(f"variant {name!r} is given twice")
        recipe = resolve(vary(config, changes))
        if name != _BASE and recipe == base:
            raise ConfigError(f"variant {name!r} is the base itself: it changes nothing")
        if recipe.split != base.split:
            raise ConfigError(f"variant {name!r} has another split than the base, {base.split}: give --split for all")
        plan[name] = changes
    return plan


def vary(config: TrainConfig, changes: tuple[str, ...]) -> TrainConfig:
    """The base's options with a variant's changes, which have the last word.

    Raises:
        ConfigError: a change names no field, or one that another names too.
    """
    fields = changed_fields(changes)
    ceded: dict[str, Any] = {name: None for name in ("split", "epochs", "batch_size", "lr") if name in fields}
    return dataclasses.replace(config, change=merge_changes(config.change, changes), **ceded)
