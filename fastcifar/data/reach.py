"""Waits for the network that end: done in threads, since the system may look for a host's name for a minute.

probes = [Probe(url) for url in urls]       # all begin at once
probes[0].reason()                          # None, or why not, within `REACH` seconds
answer = within(30, lambda: opener.open(urls[0], timeout=10))
"""

import socket
import threading
import time
import urllib.request
from collections.abc import Callable
from queue import Empty, SimpleQueue
from typing import TypeVar
from urllib.parse import urlsplit

__all__ = ["REACH", "Probe", "within"]

_Answer = TypeVar("_Answer")

REACH = 5.0
"""Seconds to find a host and connect."""


class Probe:
    """Looks for an address's host and connects once, from now on.

    Where a proxy stands between, that is the proxy's business, and every address counts as reachable.

    Args:
        url: http or https.
    """

    def __init__(self, url: str) -> None:
        parts = urlsplit(url)
        self._host, self._port = parts.hostname or "", parts.port or (443 if parts.scheme == "https" else 80)
        self._reason: object = f"no answer in {REACH:g} s"
        self._end = time.monotonic() + REACH
        proxied = parts.scheme in urllib.request.getproxies() and not urllib.request.proxy_bypass(self._host)
        self._thread = None if proxied else threading.Thread(target=self._connect, daemon=True)
        if self._thread is not None:
            self._thread.start()

    def _connect(self) -> None:
        try:
            socket.create_connection((self._host, self._port), timeout=REACH).close()
            self._reason = None
        except (OSError, ValueError) as error:  # a host name that cannot be is a ValueError
            self._reason = error

    def reason(self) -> object:
        """Why it cannot be reached; None if it can."""
        if self._thread is None:
            return None
        self._thread.join(max(0.0, self._end - time.monotonic()))
        return self._reason


def within(seconds: float, ask: Callable[[], _Answer]) -> _Answer:
    """What `ask` returns or raises, if it does so in time; each byte that drips starts a time-out of its own anew.

    Raises:
        TimeoutError: it doesn't; its thread is left alone.
    """
    answers: SimpleQueue[tuple[_Answer | None, Exception | None]] = SimpleQueue()

    def wait() -> None:
        try:
            answers.put((ask(), None))
        except Exception as error:
            answers.put((None, error))

    threading.Thread(target=wait, daemon=True).start()
    try:
        answer, error = answers.get(timeout=seconds)
    except Empty:
        raise TimeoutError(f"no whole answer in {seconds:g} s") from None
    if error is not None:
        raise error
    return answer  # type: ignore[return-value]
