"""Checks of what a user may set: each raises a `ConfigError` that names the option, what it may be, and what it was.

Example:
    check_integer("epochs", epochs, 1)      # "epochs must be a whole number at least 1, got 0"
"""

import dataclasses
import math
import os
import sys
from collections.abc import Mapping, Sequence
from numbers import Integral, Real
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fastcifar.errors import ConfigError

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

__all__ = ["check_choice", "check_integer", "check_kind", "check_names", "check_number", "check_path", "plain_numbers"]


def check_choice(name: str, value: object, allowed: Sequence[object]) -> None:
    """That `value` is one of those allowed.

    Raises:
        ConfigError: it is none of them.
    """
    if value not in allowed:
        raise ConfigError(f"{name} must be one of {', '.join(map(str, allowed))}, got {value!r}")


def check_integer(name: str, value: object, low: int, high: int | None = None, *, kind: type = int) -> None:
    """That `value` is a whole number, and no truth value.

    Args:
        name: of the option.
        value: what it was set to.
        low: the least allowed.
        high: the most allowed; None for what 64 bits hold.
        kind: what counts as a whole number; `numbers.Integral` for NumPy's too.

    Raises:
        ConfigError: it is none, or out of range.
    """
    most = 2**63 - 1 if high is None else high  # beyond, arithmetic overflows
    if not isinstance(value, kind) or isinstance(value, bool) or not low <= value <= most:  # type: ignore[operator]
        span = f"at least {low}" if high is None else f"from {low} to {high}"
        raise ConfigError(f"{name} must be a whole number {span}, got {value!r:.100}")


def check_number(name: str, value: object, low: float, high: float = math.inf, *, above: bool = False) -> None:
    """That `value` is a finite number from `low`, or `above` it, to `high`.

    Raises:
        ConfigError: it is none, or out of range.
    """
    most = min(high, sys.float_info.max)  # an int may be larger
    fits = isinstance(value, int | float) and not isinstance(value, bool) and low <= value <= most
    if not fits or (above and value == low):
        span = f"above {low:g}" if above else f"at least {low:g}"
        raise ConfigError(
            f"{name} must be a number {span}{f' and at most {high:g}' if high < math.inf else ''}, got {value!r}"
        )


def check_names(name: str, value: object) -> None:
    """That `value` is texts in an order, none of them empty.

    Raises:
        ConfigError: it is not.
    """
    ordered = hasattr(value, "__getitem__") and not isinstance(value, str | Mapping)
    if not ordered or not all(isinstance(one, str) and one for one in value):  # type: ignore[attr-defined]
        raise ConfigError(f"{name} must be a list of names, got {value!r:.100}")


def check_kind(name: str, value: object, kind: Any, words: str) -> None:
    """That `value` is a `kind`, which `words` tell.

    Raises:
        ConfigError: it is not.
    """
    if not isinstance(value, kind):
        raise ConfigError(f"{name} must be {words}, got {value!r}")


def check_path(name: str, value: object) -> Path:
    """`value` as a path.

    Raises:
        ConfigError: it is none.
    """
    check_kind(name, value, str | os.PathLike, "a path")
    return Path(value)  # type: ignore[arg-type]


def plain_numbers(options: "DataclassInstance") -> None:
    """Make NumPy's numbers in the fields of a frozen dataclass Python's, of the same value: JSON knows no others."""
    for field in dataclasses.fields(options):
        value = getattr(options, field.name)
        if type(value) in (int, float, bool):
            continue
        if isinstance(value, Integral):
            object.__setattr__(options, field.name, int(value))
        elif isinstance(value, Real):
            object.__setattr__(options, field.name, float(value))
