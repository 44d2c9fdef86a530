"""Options from a config dataclass: tyro makes the parser and the help; errors come as one line.

Example:
    config = parse(TrainConfig, ["--epochs", "3"], prog="fastcifar train", description="...")
"""

import contextlib
import io
import re
from collections.abc import Sequence
from typing import TypeVar

import tyro

from fastcifar.errors import ConfigError

__all__ = ["parse"]

T = TypeVar("T")


def parse(kind: type[T], arguments: Sequence[str], *, prog: str, description: str, default: T | None = None) -> T:
    """Make a `kind` from options.

    Args:
        kind: a dataclass; each field is an option, its docstring the help.
        arguments: the options.
        prog: shown in the help.
        description: likewise, above the options.
        default: what options that are not given are taken from; the dataclass's own defaults if None.

    Raises:
        ConfigError: an option is unknown or its value is not allowed.
        SystemExit: with status 0, after --help.
    """
    errors = io.StringIO()
    try:
        with contextlib.redirect_stderr(errors):
            return tyro.cli(
                kind,
                args=list(arguments),
                prog=prog,
                description=description,
                default=tyro.MISSING_NONPROP if default is None else default,
                config=(tyro.conf.DisallowNone,),
            )
    except SystemExit as end:
        if end.code in (0, None):
            raise
        raise ConfigError(f"{_one_line(errors.getvalue())} (see {prog} --help)") from None


def _one_line(box: str) -> str:
    """The message in tyro's box, without the frame, in one line."""
    plain = re.sub(r"\x1b\[[0-9;]*m", "", box)
    rows = [line.strip("│| ").strip() for line in plain.splitlines()]
    sections: list[list[str]] = [[]]
    for row in rows[1:]:
        if re.fullmatch(r"[─━╰╯+-]{3,}", row):
            sections.append([])
        elif row:
            sections[-1].append(row)
    message = " ".join(sections[0])
    message = re.sub(r"^Error parsing [A-Z]\w*: ", "", message)  # our own, from __post_init__
    message = message.partition(" Got errors:")[0].rstrip(".")
    message = message[:1].lower() + message[1:] if message.startswith(("Unrecognized", "Missing")) else message
    wrong_type = re.match(r"Error parsing (\S+): .*?(?:matching|type) \S*?([A-Z]+)\b.*\['(.*)'\]", message)
    if wrong_type:
        option, wanted, got = wrong_type.groups()
        message = f"{option} takes {wanted}, got {got!r}"
    elif wrong := re.match(r"Error parsing (--\S+): .*'(.*)'$", message):
        message = f"{wrong.group(1)} cannot be {wrong.group(2)!r}"
    guesses = [row for section in sections[1:] if section[:1] == ["Perhaps you meant:"] for row in section[1:]]
    similar = [row.split()[0].rstrip(",") for row in guesses if row.startswith("--")]
    return f"{message}: perhaps you meant {' or '.join(dict.fromkeys(similar))}" if similar else message
