"""Named recipes, as data: `RECIPES["fast"]`, `RECIPES["long"]`, `RECIPES["report"]`.

Example:
    recipe = resolve(TrainConfig(recipe="report", epochs=2))    # the recipe with the options laid over it
"""

import dataclasses
from typing import Any

from fastcifar.changes import apply_changes, changed_fields
from fastcifar.config import Augment, Recipe, TrainConfig
from fastcifar.errors import ConfigError

__all__ = ["RECIPES", "augment_of", "check_steps", "describe", "resolve"]

# Lower resolution first: both nets take 20x20 images with the same weights at 0.39 of the work. Muon comes to an
# accuracy in half the epochs of SGD; its step costs the same for any batch, so batches are not small.
_FAST = Recipe(
    split="full",
    epochs=8,
    batch_size=125,
    optimizer="muon",
    lr=0.12,  # less is better for more steps: of a few hundred, 0.24; of 4,000, 0.06
    momentum=0.85,
    vector_lr=0.15,
    head_lr=0.05,  # at 1, Big's head of 1,024 features drowns its first epochs: 39 % after two, not 67
    schedule="one-cycle",
    label_smoothing=0.1,
    augment=Augment(crop=2, padding="reflect", flip="alternating"),
    resolutions=((20, 0.6),),
    whiten="init",
    norm_momentum=0.3,
    tta="flip",
)

RECIPES = {
    # The original report's: raw pixels, no augmentation, and a last batch that is short: padding would be in its norms.
    "report": Recipe(
        split="report", epochs=20, batch_size=32, optimizer="adam", lr=1e-3, scaling="raw", drop_last=False
    ),
    "fast": _FAST,
    # More epochs than the images alone have something new for, the last ones on the images as they are tested.
    "long": dataclasses.replace(
        _FAST,
        epochs=60,
        batch_size=500,
        lr=0.07,
        muon_momentum=0.85,
        vector_lr=0.21,
        head_lr=0.07,
        augment=Augment(crop=4, padding="reflect", flip="alternating", policy="trivial"),
        policy_fraction=0.8,
        resolutions=((20, 0.66),),
        tta="shift",
    ),
}
# Our own net's first convolution is there for whitening, and lower resolution costs it more accuracy than it saves
# time. Head, vectors, momenta and smoothing follow airbench94 (Jordan 2024), Muon's rate the same author's for Muon.
# Batches of 250 (at 0.07) to 2,000 (at 0.24) come to the same accuracy, with the other rates as the batch's size; fewer
# steps take a GPU less time.
_FAST_NET: dict[str, Any] = {
    "batch_size": 1000,
    "lr": 0.24,
    "vector_lr": 220.0,  # 61 times the head's; of airbench94 it is 64: BatchNorm's biases hardly move otherwise
    "head_lr": 3.6,
    "warmup": 0.0,
    "label_smoothing": 0.2,
    "resolutions": (),
    "whiten": "frozen",
    "norm_momentum": 0.4,
    "tta": "shift",
}
_LONG_FAST_NET = {
    **_FAST_NET,
    "epochs": 40,
    "muon_momentum": 0.6,
    "augment": Augment(crop=4, padding="reflect", flip="alternating", cutout=8),
    "policy_fraction": 1.0,
}
_OF_NETS = {("fast", "fast"): _FAST_NET, ("long", "fast"): _LONG_FAST_NET}
"""(recipe, net) -> what the recipe changes for that net."""


def resolve(config: TrainConfig) -> Recipe:
    """The recipe that `config` names, for its net, with the changes and options that `config` sets laid over it.

    Raises:
        ConfigError: no recipe has that name, a change is wrong, or an option and a change set the same field.
    """
    if config.recipe not in RECIPES:
        raise ConfigError(f"unknown recipe {config.recipe!r}: choose from {', '.join(sorted(RECIPES))}")
    changed = changed_fields(config.change)
    values = {name: getattr(config, name) for name in ("split", "epochs", "batch_size", "lr")}
    options = {name: value for name, value in values.items() if value is not None}
    for name, value in options.items():
        if name in changed:
            change = config.change[changed.index(name)]
            option = f"--{name.replace('_', '-')} {value}"
            raise ConfigError(f"{option} and --change {change} set the same: give one of them")
    recipe = dataclasses.replace(RECIPES[config.recipe], **_OF_NETS.get((config.recipe, config.arch), {}))
    return dataclasses.replace(apply_changes(recipe, config.change), **options)


def augment_of(recipe: Recipe) -> Augment:
    """What is done to the training images, with the number of epochs that have a policy, at least one."""
    augment = recipe.augment
    if recipe.policy_fraction == 1 or augment.policy == "none" or augment.policy_epochs:
        return augment
    return dataclasses.replace(augment, policy_epochs=max(1, round(recipe.policy_fraction * recipe.epochs)))


def check_steps(recipe: Recipe, *, images: int, steps: int, ranks: int) -> None:
    """That the training images make batches, each of which BatchNorm and every rank can work with.

    Args:
        recipe: the recipe.
        images: for training.
        steps: in an epoch.
        ranks: that train one run together.

    Raises:
        ConfigError: they don't, or there are fewer steps than the recipe's averaging needs.
    """
    size = recipe.batch_size
    if images < 2:
        raise ConfigError("there is one training image, and BatchNorm needs two in a step: train on more")
    if steps == 0:
        raise ConfigError(f"batch_size {size} is more than the {images} training images: choose a smaller one")
    if size < ranks:
        raise ConfigError(f"batch_size {size} is less than an image for each of {ranks} ranks")
    left = images % size
    if not recipe.drop_last and 0 < left < max(2, ranks):  # BatchNorm needs two samples, each rank one
        short = f"leaves {left if left > 1 else 'one'} of {images} images over"
        raise ConfigError(f"batch_size {size} {short}: choose another")
    steps *= recipe.epochs
    if recipe.averaging != "none" and recipe.averaging_every > steps:
        raise ConfigError(f"averaging_every {recipe.averaging_every} is more than the run's {steps} steps")


def describe(recipe: Recipe, *, side: int | None = None) -> str:
    """A recipe in one line, such as "sgd, lr 0.05 one-cycle, batch 64, 16 epochs, 67 % of the steps at 20 pixels".

    Args:
        recipe: the recipe.
        side: of the images, in pixels: stages that are no smaller leave them as they are, and are left out.
    """
    parts = [f"{recipe.optimizer}, lr {recipe.lr:g} {recipe.schedule}, batch {recipe.batch_size}"]
    parts.append(f"{recipe.epochs} epoch{'s' * (recipe.epochs != 1)}")
    parts += [
        f"{100 * fraction:g} % of the steps at {size} pixels"
        for size, fraction in recipe.resolutions
        if side is None or size < side
    ]
    if recipe.averaging != "none":
        parts.append(f"{recipe.averaging} every {recipe.averaging_every} steps")
    if recipe.whiten != "none":
        parts.append(f"whitening filters first ({recipe.whiten})")
    if recipe.tta != "none":
        parts.append(f"tested with test-time augmentation ({recipe.tta}) too")
    return ", ".join(parts)
