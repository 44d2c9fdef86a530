"""Options from a config dataclass: tyro makes the parser and the help; errors come as one line.

Example:
    config = parse(TrainConfig, ["--epochs", "3"], prog="fastcifar train", description="...")
"""

import contextlib
import dataclasses
import io
import os
import re
import sys
from collections.abc import Iterator, Sequence
from typing import Any, TypeVar, get_origin

import tyro

from fastcifar import runs
from fastcifar.config import TrainConfig
from fastcifar.errors import ConfigError

__all__ = ["parse", "parse_run", "parse_seeds"]

T = TypeVar("T")
R = TypeVar("R", bound=TrainConfig)

_MOST_SEEDS = 1000
_NUMBERS = {"INT": "a whole number", "FLOAT": "a number"}
_CHOICES = (
    r"Error parsing (?P<option>\S+): .*\{(?P<allowed>.*)\}.*\['(?P<got>.*)'\]",
    r"invalid choice '(?P<got>.*)' for \w+ '(?P<option>\S+)'.*\((?P<allowed>.*)\)",
)
"""What tyro says of a value that is none of an option's."""


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
    _check_several(kind, arguments)

    def cli() -> T:
        return tyro.cli(
            kind,
            args=list(arguments),
            prog=prog,
            description=description,
            default=tyro.MISSING_NONPROP if default is None else default,
            config=(tyro.conf.DisallowNone,),
        )

    try:
        with _caught():
            return cli()
    except SystemExit as end:
        if end.code in (0, None):
            raise
    # once more, so that its box, as wide as a terminal, cuts no path in two
    with _caught(columns=100_000) as errors, contextlib.suppress(SystemExit):
        cli()
    raise ConfigError(f"{_one_line(errors.getvalue())} (see {prog} --help)")


@contextlib.contextmanager
def _caught(columns: int | None = None) -> Iterator[io.StringIO]:
    """For a block in which tyro parses: what it writes of errors, as for a terminal of so many columns."""
    errors, before = io.StringIO(), os.environ.get("COLUMNS")
    with contextlib.ExitStack() as held:
        held.enter_context(contextlib.redirect_stderr(errors))
        if sys.stdout is None:  # it was closed; tyro looks at it
            held.enter_context(contextlib.redirect_stdout(io.StringIO()))
        try:
            if columns is not None:
                os.environ["COLUMNS"] = str(columns)
            yield errors
        finally:
            if before is not None:
                os.environ["COLUMNS"] = before
            elif columns is not None:
                del os.environ["COLUMNS"]


def parse_run(kind: type[R], arguments: Sequence[str], *, prog: str, description: str) -> tuple[TrainConfig, R]:
    """Make the config of a run, and what a command has beside, from options; a resumed run's are its own.

    Args:
        kind: a dataclass that adds to those of `TrainConfig`.
        arguments: the options.
        prog: shown in the help.
        description: likewise, above the options.

    Raises:
        ConfigError: an option is unknown, its value is not allowed, or it differs from the resumed run's.
        CheckpointError: the folder to resume is not a run's.
        SystemExit: with status 0, after --help.
    """
    options = parse(kind, arguments, prog=prog, description=description)
    if options.resume is None:
        return _config(options), options
    # once more, over the run's own options: one that is given, even at its default, must be the run's
    own = dataclasses.replace(runs.reopen(options.resume).config, resume=options.resume, out=None)
    default = kind(**{field.name: getattr(own, field.name) for field in dataclasses.fields(own)})
    given = _config(parse(kind, arguments, prog=prog, description=description, default=default))
    return dataclasses.replace(runs.reopen(options.resume, given, complete=True).config, resume=options.resume), options


def _config(options: TrainConfig) -> TrainConfig:
    return TrainConfig(**{field.name: getattr(options, field.name) for field in dataclasses.fields(TrainConfig)})


def parse_seeds(text: str) -> tuple[int, ...]:
    """Read seeds: "0..4", "0,3,7", or both, as in "0..2,7".

    Raises:
        ConfigError: it is not that, or more than a thousand.
    """
    seeds: list[int] = []
    for part in text.split(","):
        match = re.fullmatch(r"\s*([0-9]{1,20})(?:\.\.([0-9]{1,20}))?\s*", part)
        first, last = (int(match[1]), int(match[2] or match[1])) if match else (1, 0)
        if last < first:
            raise ConfigError(f"seeds must be whole numbers such as 0..4 or 0,3,7, got {text!r}")
        if last - first + len(seeds) >= _MOST_SEEDS:
            raise ConfigError(f"seeds {text!r} are more than {_MOST_SEEDS}")
        seeds += range(first, last + 1)
    return tuple(seeds)


def _check_several(kind: Any, arguments: Sequence[str]) -> None:
    """Of an option that takes several values tyro would take none, and forget the first ones if it stands there twice.

    Raises:
        ConfigError: it is so.
    """
    given = [argument.partition("=")[0] for argument in arguments]
    for field in dataclasses.fields(kind):
        option = f"--{field.name.replace('_', '-')}"
        if get_origin(field.type) is not tuple or option not in given:
            continue
        if given.count(option) > 1:
            raise ConfigError(f"{option} is given twice: write all its values after one")
        place = given.index(option)
        if arguments[place] == option and (place + 1 == len(arguments) or arguments[place + 1].startswith("--")):
            raise ConfigError(f"{option} needs a value")


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
    sections = [section for section in sections if section] or [[]]  # where stdout is no UTF-8 it begins with a rule
    message = " ".join(sections[0])
    message = re.sub(r"^Error parsing [A-Z]\w*: ", "", message)  # our own, from __post_init__
    message = message.partition(" Got errors:")[0].rstrip(".")
    message = message[:1].lower() + message[1:] if message.startswith(("Unrecognized", "Missing")) else message
    wrong_type = re.match(r"Error parsing (\S+): .*?(?:matching|type) \S*?([A-Z]+)\b.*\['(.*)'\]", message)
    if wrong_type:
        option, wanted, got = wrong_type.groups()
        message = f"{option} takes {_NUMBERS.get(wanted, wanted)}, got {got!r}"
    elif wrong := next(filter(None, (re.match(pattern, message) for pattern in _CHOICES)), None):
        choices = sorted({choice.strip("' ") for choice in wrong["allowed"].split(",")} - {"None"})
        message = f"{wrong['option']} must be one of {', '.join(choices)}, got {wrong['got']!r}"
    elif wrong := re.match(r"Error parsing (--\S+): .*'(.*)'$", message):
        message = f"{wrong.group(1)} cannot be {wrong.group(2)!r}"
    guesses = [row for section in sections[1:] if section[:1] == ["Perhaps you meant:"] for row in section[1:]]
    similar = [row.split()[0].rstrip(",") for row in guesses if row.startswith("--")]
    return f"{message}: perhaps you meant {' or '.join(dict.fromkeys(similar))}" if similar else message
