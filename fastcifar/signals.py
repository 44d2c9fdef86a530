"""Signals that ask a process to stop: Ctrl-C, SIGTERM, and SIGHUP, which a closed terminal sends.

The only module that sets handlers; it is light, so that a command is ready before its slow imports. What ignores SIGHUP
(nohup) keeps doing so. A signal that comes between two `catch_stop` in an outer one is found by the second.

    with catch_stop() as stop:
        with stop.at_once("before training began"):
            ...                                 # the first signal raises StoppedError here
        while stop.signum is None:
            ...                                 # and is only remembered here; a second one raises KeyboardInterrupt
"""

import atexit
import contextlib
import os
import signal
import threading
from collections.abc import Callable, Iterator
from types import FrameType

from fastcifar.errors import StoppedError

__all__ = ["StopRequest", "catch_stop", "end_with", "hear_of", "leave_on_stop", "request_stop", "stop_at_once"]

_NAMES = ("SIGINT", "SIGTERM", "SIGHUP")  # Windows lacks the last


class StopRequest:
    """The signal that asked to stop, or None."""

    def __init__(self, signum: signal.Signals | None = None) -> None:
        self.signum = signum
        self.ended: StoppedError | None = None
        """What the first signal made of a block that it ends, and a second one unmade."""
        self._outcome: str | None = None  # of the block that the first signal ends, within one

    def ask(self) -> None:
        """Ask as SIGTERM does, from another thread than that which looks; a second time changes nothing."""
        self.signum = self.signum or signal.SIGTERM

    def hear(self, number: int) -> None:
        """Take a signal.

        Raises:
            KeyboardInterrupt: it is the second, or came within `at_once`, which makes something else of it; or, where
                it came in the instant in which that begins or ends, `catch_stop` does.
        """
        is_first = self.signum is None
        self.signum = self.signum or signal.Signals(number)
        outcome = self._outcome
        self.ended = _stopped(self.signum, outcome) if is_first and outcome is not None else None
        if outcome is not None or not is_first:
            raise KeyboardInterrupt

    @contextlib.contextmanager
    def at_once(self, outcome: str) -> Iterator[None]:
        """For a block that the first signal ends, clearing away what is half made.

        Args:
            outcome: how the message goes on, such as "before training began; nothing was saved".

        Raises:
            StoppedError: the signal came, now or before.
        """
        self._outcome = outcome
        try:
            if self.signum is None:
                yield
        except GeneratorExit:  # the block never began
            raise
        except BaseException:
            if self.signum is None:
                raise
        finally:
            self._outcome = None
        if self.signum is not None:  # also where a callback, from which nothing can be raised, met the signal
            raise _stopped(self.signum, outcome)


def _stopped(signum: signal.Signals, outcome: str) -> StoppedError:
    return StoppedError(f"stopped by {signum.name} {outcome}", 128 + signum)


_open_requests: list[StopRequest] = []
_of_thread = threading.local()
_worked = False  # whether the command's `catch_stop` has ended


@contextlib.contextmanager
def catch_stop() -> Iterator[StopRequest]:
    """Turn the first signal into a request that the loop looks at; a second one stops at once.

    Outside the main thread, where Python allows no handlers, nothing is caught: the request is `hear_of`'s, if any.
    """
    if threading.current_thread() is not threading.main_thread():
        yield getattr(_of_thread, "request", None) or StopRequest()
        return
    outer = _open_requests[-1] if _open_requests else StopRequest()
    request = StopRequest(outer.signum)
    _open_requests.append(request)
    before = {number: signal.signal(number, lambda heard, frame: request.hear(heard)) for number in _numbers()}
    try:
        yield request
    except KeyboardInterrupt:
        if request.ended is None:
            raise
        raise request.ended from None
    finally:
        global _worked
        outer.signum = outer.signum or request.signum
        _open_requests.pop()
        _worked = not _open_requests
        for number, handler in before.items():
            signal.signal(number, handler)


def hear_of(request: StopRequest) -> None:
    """Make `request` what `catch_stop` gives in this thread, not the main one, from now on: others may ask by it."""
    _of_thread.request = request


@contextlib.contextmanager
def stop_at_once(outcome: str) -> Iterator[None]:
    """For a block that the first signal ends, clearing away what is half made.

    Args:
        outcome: as in `StopRequest.at_once`.

    Raises:
        StoppedError: the signal came.
    """
    with catch_stop() as stop, stop.at_once(outcome):
        yield


def request_stop() -> None:
    """Stop this process's run as SIGTERM does, from any thread, unless it is stopping already."""
    if all(request.signum is None for request in _open_requests):
        signal.raise_signal(signal.SIGTERM)


def leave_on_stop(say: Callable[[str], object]) -> None:
    """Let a signal end the process where it stands, wherever there is nothing to clear away.

    An exception may be lost on its way out of an import; so this raises none.

    Args:
        say: told why, in a line.
    """
    global _worked
    _worked = False

    def handle(number: int, frame: FrameType | None) -> None:
        outcome = " at its end; what it wrote is whole" if _worked else "; nothing was changed"
        say(f"stopped by {signal.Signals(number).name}{outcome}")
        os._exit(128 + number)

    _set(handle)
    # what is registered first runs last; then Python takes its handlers away, and a signal would change the status
    atexit.register(_set, signal.SIG_IGN)


def end_with(status: int, say: Callable[[], object]) -> None:
    """Let a signal only hasten an end that has come: the exit status stays, and what is to `say` is said before."""
    _set(lambda number, frame: None)
    say()
    _set(lambda number, frame: os._exit(status))


def _set(handler: Callable[[int, FrameType | None], object] | signal.Handlers) -> None:
    for number in _numbers():
        signal.signal(number, handler)


def _numbers() -> list[signal.Signals]:
    numbers = [getattr(signal, name) for name in _NAMES if hasattr(signal, name)]
    return [n for n in numbers if n != getattr(signal, "SIGHUP", None) or signal.getsignal(n) != signal.SIG_IGN]
