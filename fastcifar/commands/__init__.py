"""The command line: one module a command, options in, exit status out.

Exit statuses: 0 done; 2 something the user can mend, said in one line; 3 the training diverged;
4 another process of the run has ended; 130, 143 or 129 stopped by Ctrl-C, SIGTERM or a closed terminal; 141 what
reads the output has gone.
Only this package parses arguments.
"""

import contextlib
import errno
import importlib
import logging
import os
import sys
from collections.abc import Sequence
from typing import NoReturn, TextIO

import fastcifar
from fastcifar import signals
from fastcifar.errors import ConfigError, FastcifarError, one_line

__all__ = ["COMMANDS", "entry", "forgive_output", "main"]

_LONGEST = 200  # letters of a path that is too long

COMMANDS = {
    "train": "train a net on CIFAR-10, CIFAR-100, the bundled digits or your own store",
    "convert": "make a store of your own images: class folders, arrays, or CIFAR in any form",
    "evaluate": "print a run's test table again, from its newest checkpoint",
    "verify": "check stores, checkpoints and archives byte by byte, and runs",
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


def entry(*first: str) -> NoReturn:
    """Run the command of this process, and end it with the exit status.

    Args:
        first: arguments ahead of the process's own.
    """
    # until the command has something to clear away, and does it itself
    signals.leave_on_stop(lambda why: _complain(why, sys.__stderr__))
    status, why = _outcome([*first, *sys.argv[1:]])
    signals.end_with(status, lambda: _complain(why))
    if status > 128:  # stopped: no thread is waited for
        for stream in (sys.stdout, sys.stderr):
            with contextlib.suppress(OSError, ValueError, AttributeError):  # it is closed
                stream.flush()
        os._exit(status)
    sys.exit(status)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command.

    Args:
        arguments: the command's name and its options; those of the process if None.

    Returns:
        The exit status.
    """
    status, why = _outcome(list(sys.argv[1:] if arguments is None else arguments))
    _complain(why)
    return status


def _outcome(arguments: list[str]) -> tuple[int, str]:
    """Run one command: its exit status, and what is wrong, "" if nothing is or nobody is there to be told."""
    logging.basicConfig(format="%(levelname)s: %(message)s", level=logging.WARNING)
    try:
        status = _dispatch(arguments)
        if sys.stdout is not None:
            sys.stdout.flush()  # a closed pipe shows itself here, not at exit
    except FastcifarError as error:
        return error.exit_status, str(error)
    except KeyboardInterrupt:
        return 130, "interrupted"
    except BrokenPipeError:
        # whoever read our output has gone
        _drop_output()
        return 141, ""
    except OSError as error:
        if error.errno in (errno.ENAMETOOLONG, errno.EACCES):  # of any path that was given
            return 2, f"{str(error.filename)[:_LONGEST]}...: {error.strerror}"
        if error.errno not in (errno.ENOSPC, errno.EIO) or error.filename is not None:
            raise
        _drop_output()
        return 2, f"standard output cannot be written: {error.strerror}"
    return status, ""


def forgive_output() -> None:
    """For a command whose result is in files: that standard output is full or gone was said, and doesn't matter."""
    try:
        if sys.stdout is not None:
            sys.stdout.flush()
    except OSError:
        _drop_output()


def _drop_output() -> None:
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # nothing more may be written, not even at exit


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


def _complain(text: str, stream: TextIO | None = None) -> None:
    if not text:
        return
    # file names are part of it, and may hold anything, such as a terminal's commands
    try:
        (stream or sys.stderr).write(f"fastcifar: {one_line(text, longest=len(text))}\n")
    except (
        OSError,
        ValueError,
        AttributeError,
        RuntimeError,
    ):  # stderr is closed, or in use: the exit status has to do
        return
