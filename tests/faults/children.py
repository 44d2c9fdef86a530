"""Forked children: they take no time to start, can be killed at any moment, and can be waited for.

What they compute they compute with one thread, since a fork has none of its parent's.

    child = start(lambda: publish_bytes(path, b"new"))
    os.kill(child, signal.SIGKILL)
    assert end_of(child) == "killed"
"""

import os
import signal
import time
import traceback
from collections.abc import Callable
from typing import Literal

import torch

__all__ = ["end_of", "start"]

_SECONDS = 60.0


def start(work: Callable[[], object]) -> int:
    """Run `work` in a fork; its process id."""
    child = os.fork()
    if child:
        return child
    status = 1
    try:
        signal.signal(signal.SIGALRM, signal.SIG_DFL)
        signal.alarm(round(_SECONDS))  # a test that failed waits for nobody
        torch.set_num_threads(1)
        work()
        status = 0
    except BaseException:
        os.write(2, traceback.format_exc().encode())
    finally:
        os._exit(status)


def end_of(child: int) -> Literal["killed", "done"]:
    """Wait until a child has ended; one that failed, or takes a minute, fails the test."""
    deadline = time.monotonic() + _SECONDS
    while (ended := os.waitpid(child, os.WNOHANG))[0] == 0:
        if time.monotonic() > deadline:
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)
            raise AssertionError(f"a child had not ended after {_SECONDS:.0f} s")
        time.sleep(0.001)
    code = os.waitstatus_to_exitcode(ended[1])
    assert code in (0, -signal.SIGKILL), f"a child ended with {code}: its traceback is above"
    return "done" if code == 0 else "killed"
