"""Python processes of our own, spoken to in lines.

Example:
    process = start(CODE)       # here
    output = take_output()      # in that code
    end(process)
"""

import contextlib
import json
import os
import subprocess
import sys
from typing import TextIO, TypeAlias

__all__ = ["Child", "end", "start", "take_output"]

Child: TypeAlias = "subprocess.Popen[bytes]"


def start(code: str, *, quiet: bool = False) -> Child:
    """Start a process that runs `code`, whose first argument is our `sys.path` in JSON, with pipes to and from it.

    Args:
        code: what it runs.
        quiet: whether what it writes to standard error is dropped.
    """
    return subprocess.Popen(
        # -P: no json.py of the folder we are in; entries that are no text Python passes over
        [sys.executable, "-P", "-c", code, json.dumps([entry for entry in sys.path if isinstance(entry, str)])],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL if quiet else None,
        start_new_session=True,  # Ctrl-C is for the parent, which tells the others
    )


def end(process: Child) -> None:
    """End a process, whatever it does; who waits for its answer, or writes to it, goes on."""
    process.kill()
    process.wait()
    for pipe in (process.stdin, process.stdout):
        with contextlib.suppress(OSError):  # what it was not told in time
            pipe.close()  # type: ignore[union-attr]


def take_output() -> TextIO:
    """Standard output, for lines to the parent alone: what C libraries print goes to standard error from now on."""
    output = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    return output
