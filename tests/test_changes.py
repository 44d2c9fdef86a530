"""Changes to a recipe as text: every field can be changed, and what is wrong is said in one line."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest

from fastcifar import changes, runs
from fastcifar.changes import apply_changes, changed_fields, ingredients, leave_out, merge_changes
from fastcifar.commands import main
from fastcifar.commands.options import parse
from fastcifar.config import Augment, Recipe, TrainConfig
from fastcifar.errors import ConfigError
from fastcifar.recipes import RECIPES, describe, resolve

FAST = Recipe(
    split="full",
    epochs=16,
    batch_size=64,
    optimizer="sgd",
    lr=0.05,
    weight_decay=0.005,
    schedule="one-cycle",
    label_smoothing=0.1,
    augment=Augment(crop=4, flip="alternating"),
    resolutions=((20, 0.67),),
)


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ("optimizer=adam", {"optimizer": "adam"}),
        ("epochs=3", {"epochs": 3}),
        ("lr=1e-3", {"lr": 1e-3}),
        ("lr=1", {"lr": 1.0}),
        (" warmup = 0.5 ", {"warmup": 0.5}),
        ("drop_last=no", {"drop_last": False}),
        ("drop_last=False", {"drop_last": False}),
        ("drop_last=yes", {"drop_last": True}),
        ("drop_last=TRUE", {"drop_last": True}),
        ("split=holdout", {"split": "holdout"}),
        ("cutout=8", {"augment": dataclasses.replace(FAST.augment, cutout=8)}),
        ("augment.flip=none", {"augment": dataclasses.replace(FAST.augment, flip="none")}),
        ("mixup=0.2", {"augment": dataclasses.replace(FAST.augment, mixup=0.2)}),
    ],
)
def test_a_change_is_read_in_the_fields_type(change: str, expected: dict[str, Any]) -> None:
    changed = apply_changes(FAST, (change,))
    assert changed == dataclasses.replace(FAST, **expected)
    (name,) = expected
    assert type(getattr(changed, name)) is type(getattr(FAST, name))


def test_several_changes_are_laid_over_at_once() -> None:
    changed = apply_changes(FAST, ("cutout=8", "flip=none", "optimizer=adam"))
    augment = Augment(crop=4, padding="reflect", flip="none", cutout=8)
    assert changed == dataclasses.replace(FAST, optimizer="adam", augment=augment)
    assert apply_changes(FAST, ()) == FAST


@dataclasses.dataclass(frozen=True, kw_only=True)
class Staged(Recipe):
    stages: tuple[tuple[int, float], ...] = ((9, 0.5),)


def test_pairs_are_read_and_written(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(changes._FIELDS, "stages", dataclasses.fields(Staged)[-1])
    staged = Staged(split="full", epochs=1, batch_size=2, optimizer="sgd", lr=1.0, stages=((9, 0.5), (12, 0.25)))
    for text, value in (("20:0.5,26:0.2", ((20, 0.5), (26, 0.2))), ("none", ()), ("", ()), ("8:1", ((8, 1.0),))):
        changed = apply_changes(staged, (f"stages={text}",))
        assert isinstance(changed, Staged)
        assert changed.stages == value
    assert leave_out(staged, "stages") == "stages=9:0.5"
    for text in ("20", "20:0.5:1", "a:0.5", "20:", ",", "20.5:0.5"):
        with pytest.raises(ConfigError, match=r"stages takes none or pairs such as 20:0.5,26:0.2, got"):
            apply_changes(staged, (f"stages={text}",))


@pytest.mark.parametrize("name", changes._FIELDS)
def test_every_field_reads_what_it_writes(name: str) -> None:
    """So `leave_out` can put every default back as a change."""
    recipe = FAST
    value = changes._value(recipe, name)
    text = changes._write(value)
    assert changes._value(apply_changes(RECIPES["report"], (f"{name}={text}",)), name) == value


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("lr", "change 'lr' must be FIELD=VALUE, such as lr=0.1"),
        ("cutuot=8", "a recipe has no field 'cutuot': perhaps you meant augment.cutout"),
        ("augment.cutuot=8", "perhaps you meant augment.cutout"),
        ("weight_deacy=1", "perhaps you meant weight_decay"),
        ("zzz=1", "a recipe has no field 'zzz': choose from split, epochs, "),
        ("=1", "a recipe has no field ''"),
        ("augment=none", "augment is a group of fields: name one, such as augment.cutout"),
        ("augment.lr=1", "a recipe has no field 'augment.lr'"),
        ("epochs=1.5", "change epochs=1.5: epochs takes a whole number, got '1.5'"),
        ("cutout=big", "change augment.cutout=big: augment.cutout takes a whole number, got 'big'"),
        ("lr=fast", "lr takes a number, got 'fast'"),
        ("lr=nan", "lr must be a number above 0, got nan"),
        ("lr=-1", "lr must be a number above 0, got -1.0"),
        ("drop_last=1", "drop_last takes yes or no, got '1'"),
        ("optimizer=rmsprop", "optimizer must be one of adam, sgd"),
        ("augment.flip=both", "flip must be one of none, random, alternating, got 'both'"),
    ],
)
def test_a_wrong_change_is_one_line(change: str, message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        apply_changes(FAST, (change,))
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_field_is_changed_once() -> None:
    with pytest.raises(ConfigError, match=r"change 'augment.cutout=4' names augment.cutout a second time"):
        apply_changes(FAST, ("cutout=8", "augment.cutout=4"))


def test_resolve_lays_changes_over_the_recipe_and_refuses_two_answers() -> None:
    config = TrainConfig(recipe="report", change=("lr=0.5", "cutout=2"), epochs=3)
    assert resolve(config) == dataclasses.replace(
        RECIPES["report"], lr=0.5, epochs=3, augment=dataclasses.replace(RECIPES["report"].augment, cutout=2)
    )
    for options, message in (
        ({"epochs": 3, "change": ("cutout=1", "epochs=4")}, "--epochs 3 and --change epochs=4 set the same"),
        ({"batch_size": 8, "change": ("batch_size=8",)}, "--batch-size 8 and --change batch_size=8 set the same"),
        ({"lr": 0.1, "change": ("lr=1",)}, "--lr 0.1 and --change lr=1"),
        ({"split": "full", "change": ("split=holdout",)}, "--split full and --change split=holdout"),
    ):
        with pytest.raises(ConfigError, match=message):
            resolve(TrainConfig(**options))  # type: ignore[arg-type]


def test_merging_keeps_the_later_answer() -> None:
    assert merge_changes(("cutout=8", "lr=1"), ("augment.cutout=0", "warmup=0")) == (
        "lr=1",
        "augment.cutout=0",
        "warmup=0",
    )
    assert changed_fields(("flip=none", "lr=1")) == ("augment.flip", "lr")


def test_leaving_out_goes_back_to_the_default() -> None:
    cut = apply_changes(FAST, ("cutout=8", "optimizer=adam", "drop_last=no", "weight_decay=0.1"))
    assert leave_out(cut, "cutout") == "augment.cutout=0"
    assert leave_out(cut, "augment.flip") == "augment.flip=none"
    assert leave_out(cut, "drop_last") == "drop_last=yes"
    assert leave_out(cut, "weight_decay") == "weight_decay=0.0"
    assert leave_out(cut, "optimizer") == "optimizer=sgd"
    for name in ("lr", "epochs", "batch_size", "split"):
        with pytest.raises(ConfigError, match=f"without '{name}': {name} has no default to go back to"):
            leave_out(cut, name)
    with pytest.raises(ConfigError, match=r"the recipe has the default, augment\.mixup=0\.0, already"):
        leave_out(cut, "mixup")
    with pytest.raises(ConfigError, match="a recipe has no field 'cutuot'"):
        leave_out(cut, "cutuot")


def test_ingredients_are_what_differs_from_the_defaults() -> None:
    plain = Recipe(split="full", epochs=1, batch_size=2, optimizer="adam", lr=1.0)
    assert ingredients(plain) == ()
    assert ingredients(apply_changes(plain, ("cutout=8", "drop_last=no", "schedule=one-cycle"))) == (
        "drop_last",
        "schedule",
        "augment.cutout",
    )
    for name in ingredients(FAST):
        left = apply_changes(FAST, (leave_out(FAST, name),))
        assert set(ingredients(left)) == set(ingredients(FAST)) - {name}


def test_changes_survive_json_and_must_be_a_tuple_of_texts() -> None:
    config = TrainConfig(change=["lr=0.1", "flip=none"])  # type: ignore[arg-type]
    assert config.change == ("lr=0.1", "flip=none")
    assert TrainConfig.from_json(json.loads(json.dumps(config.to_json()))) == config
    for wrong in ("lr=0.1", (1,)):
        with pytest.raises(ConfigError, match="change must be a tuple of texts"):
            TrainConfig(change=wrong)  # type: ignore[arg-type]


def test_a_changed_run_says_so_and_keeps_its_changes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("time.strftime", lambda form: "20260101-000000")
    config = TrainConfig(change=("lr=0.1", "flip=none"))
    run = runs.create(config, resolve(config))
    assert run.path.name == "cifar10-big-fast-changed-20260101-000000"
    assert run.recipe_title == "fast, changed: lr=0.1 flip=none"
    run.write({}, resumed=False)
    again = runs.reopen(run.path, TrainConfig(resume=run.path))
    assert (again.config.change, again.recipe) == (config.change, run.recipe)
    assert again.config_hash() == run.config_hash()
    with pytest.raises(ConfigError, match="a resumed run keeps its options"):
        runs.reopen(run.path, TrainConfig(change=("lr=0.2",)))
    assert runs.create(TrainConfig(), FAST).recipe_title == "fast"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--change", "lr=0"], "lr must be a number above 0, got 0.0"),
        (["--change", "lr=1", "cutuot=8"], "perhaps you meant augment.cutout"),
        (["--change", "lr=1", "--change", "cutout=8"], "--change is given twice: write all its values after one"),
        (["--change=lr=1", "--change", "cutout=8"], "--change is given twice"),
        (["--change", "epochs=1", "--epochs", "2"], "--epochs 2 and --change epochs=1 set the same"),
    ],
)
def test_a_wrong_change_on_the_command_line_is_one_line_and_status_2(
    arguments: list[str], message: str, capfd: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: Any
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["train", *arguments]) == 2
    out, err = capfd.readouterr()
    assert (out, err.count("\n")) == ("", 1)
    assert message in err
    assert not list(tmp_path.iterdir())


def test_the_option_takes_several_changes() -> None:
    config = parse(TrainConfig, ["--change", "lr=1", "flip=none", "--seed", "3"], prog="p", description="d")
    assert (config.change, config.seed) == (("lr=1", "flip=none"), 3)


def test_a_description_leaves_out_stages_that_do_nothing() -> None:
    stage = "60 % of the steps at 20 pixels"
    assert stage in describe(RECIPES["fast"])
    assert stage in describe(RECIPES["fast"], side=32)
    assert stage not in describe(RECIPES["fast"], side=20)
