"""Named recipes, as data: `RECIPES["fast"]`, `RECIPES["report"]`.

Example:
    recipe = resolve(TrainConfig(recipe="report", epochs=2))    # the recipe with the options laid over it
"""

import dataclasses

from fastcifar.config import Augment, Recipe, TrainConfig
from fastcifar.errors import ConfigError

__all__ = ["RECIPES", "resolve"]

RECIPES = {
    # The original report's: raw pixels, no augmentation.
    "report": Recipe(
        split="report", epochs=20, batch_size=32, optimizer="adam", lr=1e-3, scaling="raw", drop_last=False
    ),
    # Lower resolution first: both nets take 20x20 images with the same weights at 0.39 of the work.
    "fast": Recipe(
        split="full",
        epochs=16,
        batch_size=64,
        optimizer="sgd",
        lr=0.05,
        momentum=0.9,
        weight_decay=5e-3,
        schedule="one-cycle",
        label_smoothing=0.1,
        augment=Augment(crop=4, padding="reflect", flip="alternating"),
        low_resolution=20,
        low_resolution_part=0.67,
    ),
}


def resolve(config: TrainConfig) -> Recipe:
    """The recipe that `config` names, with the options that `config` sets laid over it.

    Raises:
        ConfigError: no recipe has that name.
    """
    if config.recipe not in RECIPES:
        raise ConfigError(f"unknown recipe {config.recipe!r}: choose from {', '.join(sorted(RECIPES))}")
    options = {name: getattr(config, name) for name in ("split", "epochs", "batch_size", "lr")}
    return dataclasses.replace(RECIPES[config.recipe], **{k: v for k, v in options.items() if v is not None})
