import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fastcifar.config import Augment, Recipe, TrainConfig
from fastcifar.errors import ConfigError
from fastcifar.recipes import RECIPES, augment_of, resolve


@pytest.mark.parametrize(
    ("make", "options", "message"),
    [
        (Augment, {"crop": -1}, "crop must be a whole number at least 0, got -1"),
        (Augment, {"crop": True}, "crop must be a whole number"),
        (Augment, {"padding": "edge"}, "padding must be one of reflect, zero, got 'edge'"),
        (Augment, {"flip": "both"}, "flip must be one of none, random, alternating"),
        (TrainConfig, {"epochs": 0}, "epochs must be a whole number at least 1, got 0"),
        (TrainConfig, {"batch_size": 1}, "batch_size must be a whole number at least 2"),
        (TrainConfig, {"lr": 0.0}, "lr must be a number above 0"),
        (TrainConfig, {"lr": float("nan")}, "lr must be a number above 0"),
        (TrainConfig, {"eval_every": 0}, "eval_every must be a whole number at least 1, got 0"),
        (TrainConfig, {"seed": 2**64}, "seed must be a whole number from 0"),
        (TrainConfig, {"split": "all"}, "split must be one of report, full, holdout, got 'all'"),
        (TrainConfig, {"compile": "yes"}, "compile must be one of auto, on, off"),
        (TrainConfig, {"amp_dtype": "bfloat16"}, "needs amp"),
        (TrainConfig, {"device": None}, "device must be a name, such as 'cuda:1', or a torch.device, got None"),
        (TrainConfig, {"epochs": np.float64(2)}, r"epochs must be a whole number at least 1, got 2\.0"),
        (TrainConfig, {"out": Path("a"), "resume": Path("b")}, "cannot be given with resume"),
    ],
)
def test_a_wrong_option_names_itself_and_its_value(make: Any, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message) as caught:
        make(**options)
    assert "\n" not in str(caught.value)


def test_numbers_may_be_numpys() -> None:
    config = TrainConfig(epochs=np.int64(3), lr=np.float32(0.5), seed=np.uint64(2**64 - 1))  # type: ignore[arg-type]
    assert config == TrainConfig(epochs=3, lr=0.5, seed=2**64 - 1)
    assert TrainConfig.from_json(json.loads(json.dumps(config.to_json()))) == config
    augment = Augment(crop=np.int8(4), mixup=np.float64(0.2))  # type: ignore[arg-type]
    recipe = dataclasses.replace(RECIPES["fast"], augment=augment, epochs=np.int32(2))
    stored = json.loads(json.dumps(dataclasses.asdict(recipe)))
    assert Recipe.from_json(stored) == dataclasses.replace(
        RECIPES["fast"], augment=Augment(crop=4, mixup=0.2), epochs=2
    )


def test_recipe_fields_are_checked() -> None:
    good = RECIPES["fast"]
    for change in (
        {"optimizer": "rmsprop"},
        {"schedule": "step"},
        {"final_lr": 1.5},
        {"muon_momentum": -1},
        {"vector_lr": -0.1},
        {"head_lr": float("inf")},
        {"averaging": "swa"},
        {"averaging_every": 0},
        {"averaging_decay": 1.01},
        {"whiten": True},
        {"norm_momentum": 0},
        {"tta": "crop"},
        {"label_smoothing": 1.5},
        {"warmup": -0.1},
        {"momentum": "high"},
        {"resolutions": 20},
        {"resolutions": (20, 0.5)},
        {"resolutions": ((20.5, 0.5),)},
        {"resolutions": ((20, 0.0),)},
        {"resolutions": ((20, 0.7), (24, 0.31))},
        {"policy_fraction": 0},
        {"policy_fraction": 1.1},
    ):
        (name,) = change
        with pytest.raises(ConfigError, match=name):
            dataclasses.replace(good, **change)


def test_configs_survive_json() -> None:
    config = TrainConfig(arch="small", data="a b/ü", lr=0.1, seed=2**63, amp=True)  # type: ignore[arg-type]
    assert config.data == Path("a b/ü")
    assert TrainConfig.from_json(json.loads(json.dumps(config.to_json()))) == config
    staged = dataclasses.replace(RECIPES["report"], resolutions=((20, 0.5), (26, 0.5)))
    for recipe in (*RECIPES.values(), staged):
        assert Recipe.from_json(json.loads(json.dumps(dataclasses.asdict(recipe)))) == recipe


def test_resolve_lays_options_over_the_recipe() -> None:
    recipe = resolve(TrainConfig(recipe="report", epochs=3, lr=0.5))
    assert recipe == dataclasses.replace(RECIPES["report"], epochs=3, lr=0.5)
    with pytest.raises(ConfigError, match="unknown recipe 'slow': choose from fast, long, report"):
        resolve(TrainConfig(recipe="slow"))


@pytest.mark.parametrize(
    ("augment", "fraction", "epochs", "expected"),
    [
        (Augment(policy="trivial"), 0.8, 60, 48),
        (Augment(policy="trivial"), 0.75, 5, 4),
        (Augment(policy="rand"), 0.01, 5, 1),
        (Augment(policy="trivial"), 1, 60, 0),  # all
        (Augment(policy="trivial", policy_epochs=7), 0.8, 60, 7),
        (Augment(), 0.8, 60, 0),
    ],
)
def test_a_fraction_of_the_epochs_has_the_policy(augment: Augment, fraction: float, epochs: int, expected: int) -> None:
    recipe = dataclasses.replace(RECIPES["fast"], augment=augment, policy_fraction=fraction, epochs=epochs)
    assert augment_of(recipe) == dataclasses.replace(augment, policy_epochs=expected)


def test_the_report_recipe_is_the_reports() -> None:
    recipe = resolve(TrainConfig(recipe="report"))
    assert (recipe.optimizer, recipe.lr, recipe.batch_size, recipe.epochs) == ("adam", 1e-3, 32, 20)
    assert (recipe.scaling, recipe.augment, recipe.split, recipe.schedule) == ("raw", Augment(), "report", "constant")
    assert not recipe.drop_last
    assert recipe.label_smoothing == recipe.weight_decay == recipe.final_lr == 0
    assert recipe.averaging == recipe.whiten == recipe.tta == "none"
    assert (recipe.resolutions, recipe.head_lr, recipe.vector_lr, recipe.norm_momentum) == ((), 1.0, 1.0, 0.1)


def test_a_recipe_is_its_own_for_some_nets() -> None:
    cut_out: dict[str, Any] = {"policy": "none", "cutout": 8}
    for name in ("fast", "long"):
        recipe, own = (resolve(TrainConfig(recipe=name, arch=arch)) for arch in ("small", "fast"))
        assert recipe == RECIPES[name] == resolve(TrainConfig(recipe=name, arch="big"))
        assert (recipe.whiten, own.whiten) == ("init", "frozen")
        assert own.augment == {"fast": recipe.augment, "long": dataclasses.replace(recipe.augment, **cut_out)}[name]
    assert resolve(TrainConfig(arch="fast", change=("whiten=none",), batch_size=64)) == dataclasses.replace(
        resolve(TrainConfig(arch="fast")), whiten="none", batch_size=64
    )
    assert resolve(TrainConfig(recipe="report", arch="fast")) == RECIPES["report"]
