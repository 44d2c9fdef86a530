"""The command line: one module a command, options in, exit status out.

Exit statuses: 0 done; 2 something the user can mend, said in one line; 3 the training diverged;
130 or 143 stopped by Ctrl-C or SIGTERM. Only this package parses arguments.
"""

import importlib
import logging
import os
import sys
from collections.abc import Sequence

import fastcifar
from fastcifar.errors import ConfigError, FastcifarError

__all__ = ["COMMANDS", "main"]

COMMANDS = {
    "train": "train a net on CIFAR-10, CIFAR-100, the bundled digits or your own store",
    "convert": "make a store of your own images: class folders, arrays, or CIFAR in any form",
    "evaluate": "print a finished run's test table again, from its checkpoint",
    "verify": "check stores, runs and archives, byte by byte",
    "ablate": "compare a recipe with variants of it, seed by seed",
}


def _usage() -> str:
    width = max(map(len, COMMANDS))
    lines = [f"  {name:{width}}  {summary}" for name, summary in COMMANDS.items()]
    return "\n".join(
        [
            "usage: fastcifar COMMAND [OPTIONS]",
            "",
            *lines,
            "",
            "fastcifar COMMAND --help shows a command's options; fastcifar --version the version.",
            "",
        ]
    )


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command.

    Args:
        arguments: the command's name and its options; those of the process if None.

    Returns:
        The exit status.
    """
    logging.basicConfig(format="%(levelname)s: %(message)s", level=logging.WARNING)
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    try:
        status = _dispatch(arguments)
        if sys.stdout is not None:
            sys.stdout.flush()  # a closed pipe shows itself here, not at exit
    except FastcifarError as error:
        _complain(str(error))
        return error.exit_status
    except KeyboardInterrupt:
        _complain("interrupted")
        return 130
    except BrokenPipeError:
        # whoever read our output has gone; nothing more may be written, not even at exit
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        return 141
    return status


def _dispatch(arguments: list[str]) -> int:
    if not arguments or arguments[0] in ("-h", "--help", "help"):
        _say(_usage())
        return 0 if arguments else 2
    if arguments[0] == "--version":
        _say(f"fastcifar {fastcifar.__version__}\n")
        return 0
    name, *options = arguments
    if name not in COMMANDS:
        raise ConfigError(f"unknown command {name!r}: choose from {', '.join(COMMANDS)}")
    module = importlib.import_module(f"fastcifar.commands.{name}")
    return int(module.run(options))


def _say(text: str) -> None:
    if sys.stdout is not None:  # it may be closed
        sys.stdout.write(text)


def _complain(text: str) -> None:
    # file names are part of it, and may hold anything, such as a terminal's commands
    one_line = "".join(letter if letter.isprintable() else "?" for letter in " ".join(text.split()))
    try:
        sys.stderr.write(f"fastcifar: {one_line}\n")
    except (OSError, ValueError, AttributeError):  # stderr is closed: the exit status has to do
        return
