"""Python processes of our own, spoken to in lines.

Example:
    process = start(CODE)       # here
    output = take_output()      # in that code
"""

import json
import os
import subprocess
import sys
from typing import TextIO

__all__ = ["start", "take_output"]


def start(code: str) -> "subprocess.Popen[bytes]":
    """Start a process that runs `code`, whose first argument is our `sys.path` in JSON, with pipes to and from it."""
    return subprocess.Popen(
        # -P: no json.py of the folder we are in; entries that are no text Python passes over
        [sys.executable, "-P", "-c", code, json.dumps([entry for entry in sys.path if isinstance(entry, str)])],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        start_new_session=True,  # Ctrl-C is for the parent, which tells the others
    )


def take_output() -> TextIO:
    """Standard output, for lines to the parent alone: what C libraries print goes to standard error from now on."""
    output = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    return output
