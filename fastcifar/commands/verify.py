"""`fastcifar verify PATH ...`: check stores, runs and archives, byte by byte."""

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import tyro

from fastcifar.commands.options import parse
from fastcifar.data.home import find_home
from fastcifar.errors import FastcifarError
from fastcifar.verification import verify

__all__ = ["VerifyOptions", "run"]

_DESCRIPTION = """Check every byte of stores, runs, checkpoints and CIFAR archives; a line for each, and for each thing
that is wrong. The exit status is 0 if nothing is, 2 if something is.

Examples:
  fastcifar verify                                  all downloads and stores of FASTCIFAR_HOME
  fastcifar verify runs/*                           every run
  fastcifar verify pets-32 cifar-10-python.tar.gz   a store and an archive"""


@dataclass(frozen=True, kw_only=True)
class VerifyOptions:
    """Options of `fastcifar verify`."""

    paths: tyro.conf.Positional[tuple[Path, ...]] = ()
    """Stores, runs and checkpoints (or folders of several), and CIFAR's archives or unpacked folders; by default the
    folder of downloads and stores."""


def run(arguments: Sequence[str]) -> int:
    """Verify as the options say."""
    options = parse(VerifyOptions, arguments, prog="fastcifar verify", description=_DESCRIPTION)
    home, status = find_home(make=False), 0
    if not options.paths and not any((home / name).is_dir() for name in ("stores", "downloads")):
        _say(f"{home}: holds no downloads and no stores yet")
        return 0
    for path in options.paths or (home,):
        try:
            for found in verify(path):
                if not found.problems:
                    _say(f"{found.path}: sound: {found.what}")
                for problem in found.problems:
                    status = 2
                    _say(f"{found.path}: WRONG: {problem}")
        except FastcifarError as error:
            status = 2
            _say(str(error))
    return status


def _say(line: str) -> None:
    if sys.stdout is not None:  # it may be closed
        # names of files are part of it, and may hold anything
        shown = "".join(letter if letter.isprintable() else "?" for letter in line)
        sys.stdout.write(shown.encode(sys.stdout.encoding or "utf-8", "replace").decode(sys.stdout.encoding or "utf-8"))
        sys.stdout.write("\n")
