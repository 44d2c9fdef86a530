"""Changes to a recipe, written as text: `optimizer=muon`, `augment.cutout=8`, `resolutions=20:0.5`.

A change names a field of `Recipe` or of its `Augment` and says its new value in the field's own type. What the
field allows is checked where the recipe checks it.

    recipe = apply_changes(RECIPES["fast"], ("cutout=8", "weight_decay=1e-3"))
    leave_out(recipe, "cutout")                   # "augment.cutout=0"
"""

import dataclasses
import difflib
from collections.abc import Sequence
from typing import Any, get_origin

from fastcifar.config import Augment, Recipe
from fastcifar.errors import ConfigError

__all__ = ["apply_changes", "changed_fields", "ingredients", "leave_out", "merge_changes"]

_GROUP = "augment."
_YES_NO = {"yes": True, "true": True, "no": False, "false": False}
# Fields without a default of which one value is the plain one.
_PLAIN = {"optimizer": "sgd"}
# Not of the training: what is compared is the accuracy without it.
_AFTERWARDS = ("tta",)

_OWN = {field.name: field for field in dataclasses.fields(Recipe) if field.name != "augment"}
_FIELDS = {**_OWN, **{f"{_GROUP}{field.name}": field for field in dataclasses.fields(Augment)}}


def apply_changes(recipe: Recipe, changes: Sequence[str]) -> Recipe:
    """The recipe with `changes` laid over it.

    Args:
        recipe: what the others of its fields are taken from.
        changes: such as "lr=0.1", "augment.flip=none" or "resolutions=20:0.5,26:0.2".

    Raises:
        ConfigError: a change is not FIELD=VALUE, names no field or one that another names too, or its value is
            not of the field's type or not allowed.
    """
    values: dict[str, Any] = {}
    for name, text in _split(changes).items():
        values[name] = _read(name, text)
    inner = {name.removeprefix(_GROUP): value for name, value in values.items() if name.startswith(_GROUP)}
    own = {name: value for name, value in values.items() if not name.startswith(_GROUP)}
    return dataclasses.replace(recipe, augment=dataclasses.replace(recipe.augment, **inner), **own)


def changed_fields(changes: Sequence[str]) -> tuple[str, ...]:
    """The fields that `changes` name, in full: "augment.cutout" for "cutout=8".

    Raises:
        ConfigError: as `apply_changes`, but values are not looked at.
    """
    return tuple(_split(changes))


def merge_changes(changes: Sequence[str], more: Sequence[str]) -> tuple[str, ...]:
    """Both, without those of `changes` whose field `more` changes too.

    Raises:
        ConfigError: as `changed_fields`.
    """
    again = _split(more)
    kept = (change for name, change in zip(_split(changes), changes, strict=True) if name not in again)
    return (*kept, *more)


def leave_out(recipe: Recipe, name: str) -> str:
    """The change that leaves an ingredient out: its field gets the value that every recipe has by default.

    Args:
        recipe: that uses the ingredient.
        name: the field.

    Raises:
        ConfigError: there is no such field, it has no default, or the recipe has the default.
    """
    field = _find(name)
    if (default := _default(field)) is dataclasses.MISSING:
        raise ConfigError(f"without {name!r}: {field} has no default to go back to: give a value with --variant")
    if _value(recipe, field) == default:
        raise ConfigError(f"without {name!r}: the recipe has the default, {field}={_write(default)}, already")
    return f"{field}={_write(default)}"


def ingredients(recipe: Recipe) -> tuple[str, ...]:
    """The fields that `recipe` sets to something else than their default; an optimiser has none, its lr is its own."""
    return tuple(
        name
        for name, field in _FIELDS.items()
        if field.default is not dataclasses.MISSING
        and name not in _AFTERWARDS
        and _value(recipe, name) != field.default
    )


def _split(changes: Sequence[str]) -> dict[str, str]:
    """Field -> its new value, as text."""
    found: dict[str, str] = {}
    for change in changes:
        name, equals, text = change.partition("=")
        if not equals:
            raise ConfigError(f"change {change!r} must be FIELD=VALUE, such as lr=0.1")
        field = _find(name.strip())
        if field in found:
            raise ConfigError(f"change {change!r} names {field} a second time: give one value")
        found[field] = text.strip()
    return found


def _find(name: str) -> str:
    if name in _FIELDS:
        return name
    if f"{_GROUP}{name}" in _FIELDS:
        return f"{_GROUP}{name}"
    if name == "augment":
        raise ConfigError("augment is a group of fields: name one, such as augment.cutout")
    bare = {field.removeprefix(_GROUP): field for field in _FIELDS}
    similar = difflib.get_close_matches(name.removeprefix(_GROUP), bare, n=3)
    meant = " or ".join(bare[match] for match in similar)
    hint = f"perhaps you meant {meant}" if meant else f"choose from {', '.join(_FIELDS)}"
    raise ConfigError(f"a recipe has no field {name!r}: {hint}")


def _default(name: str) -> Any:
    return _PLAIN.get(name, _FIELDS[name].default)


def _value(recipe: Recipe, name: str) -> Any:
    owner = recipe.augment if name.startswith(_GROUP) else recipe
    return getattr(owner, name.removeprefix(_GROUP))


def _read(name: str, text: str) -> Any:
    kind = _FIELDS[name].type
    wanted = ""
    try:
        if kind is bool:
            wanted = "yes or no"
            return _YES_NO[text.lower()]
        if kind is int:
            wanted = "a whole number"
            return int(text)
        if kind is float:
            wanted = "a number"
            return float(text)
        if get_origin(kind) is tuple:
            wanted = "none or pairs such as 20:0.5,26:0.2"
            pairs = [] if text in ("", "none") else [pair.split(":") for pair in text.split(",")]
            return tuple((int(first), float(second)) for first, second in pairs)
    except (KeyError, ValueError):
        raise ConfigError(f"change {name}={text}: {name} takes {wanted}, got {text!r}") from None
    return text  # one of several words: the recipe knows which


def _write(value: Any) -> str:
    """`value` as `_read` reads it."""
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, tuple):
        return ",".join(f"{first}:{second}" for first, second in value) or "none"
    return str(value)
