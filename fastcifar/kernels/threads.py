"""A few threads that wait to help with one launch: what the CPU kernel uses instead of numba's `parallel=True`.

It touches nothing but threads. They sleep from 45 us after a launch until the next, hold nothing between
launches, and end with the last user of the team.

    team = shared_team(watch)              # watch(address, seen, spins): waits without the lock
    if team.begin((function, arguments, kept), 1):       # False: busy with another thread's launch
        try: ...                                         # call function(*arguments) here as well
        finally: team.end()

Why not numba's layers: OpenMP kills a forked child that launches, the work queue aborts when two threads
launch at once, and neither is on every platform. Measured in millions of images/s, batch 128 / 512, two
cores: 1.3 / 1.6 here on an idle machine (1.5 / 1.7 in the best percent of OpenMP's batches); while another
process kept one core busy, 0.5 / 0.7 here and 0.02 / 0.06 with OpenMP, which waits for its threads. Here a
late helper only finds less to do.
"""

import contextlib
import os
import threading
import weakref
from collections.abc import Callable
from typing import Any

import numpy as np

__all__ = ["Job", "Team", "shared_team"]

Job = tuple[Callable[..., Any], tuple[Any, ...], Any]
"""A function to call without the lock, its arguments, and what must stay alive until it returns."""


class _Slot:
    """What the helpers see: the job, if any, whether to stop, and the signal. Holds no reference to the team."""

    job: Job | None = None
    stopped = False

    def __init__(self, watch: Callable[[int, int, int], int]) -> None:
        self.watch = watch
        self.signal = np.zeros(1, dtype=np.int64)
        self.address = self.signal.ctypes.data


class Team:
    """Helper threads, started when first needed."""

    def __init__(self, watch: Callable[[int, int, int], int]) -> None:
        self._watch = watch
        self._forget()

    @property
    def signal(self) -> int:
        """Address of an int64; a launch that adds 1 to it is seen by helpers that are still awake."""
        return self._slot.address

    def _forget(self) -> None:
        """Have no helpers; those there were are not told."""
        self._busy = threading.Lock()
        self._slot = _Slot(self._watch)
        self._bells: list[threading.Lock] = []  # a helper sleeps on its bell, which is locked until rung
        self._end = weakref.finalize(self, _stop, self._slot, self._bells)

    def begin(self, job: Job, helpers: int) -> bool:
        """Let `helpers` threads run a job.

        The caller runs it too and must not rely on any helper: one that wakes after `end` does nothing.

        Returns:
            Whether the team was free. If so, `end` must be called.
        """
        if not self._busy.acquire(blocking=False):
            return False
        while len(self._bells) < helpers:
            bell = threading.Lock()
            bell.acquire()
            threading.Thread(target=_help, args=(self._slot, bell), name="fastcifar-kernel", daemon=True).start()
            self._bells.append(bell)
        self._slot.job = job
        for bell in self._bells[:helpers]:
            _ring(bell)
        return True

    def end(self) -> None:
        """Take the job back, from helpers that are not awake yet."""
        self._slot.job = None
        self._busy.release()


def shared_team(watch: Callable[[int, int, int], int]) -> Team:
    """The process's team; it lives as long as someone holds it.

    Args:
        watch: (address, seen, spins) -> int; look `spins` times whether the int64 at `address` is still
            `seen`, without holding Python's lock, and return what it is.
    """
    global _team
    with _lock:
        team = _team() if _team is not None else None
        if team is None:
            team = Team(watch)
            _team = weakref.ref(team)
        return team


_WATCH = 20_000  # looks (45 us) for the next launch before a helper goes to sleep
_team: "weakref.ref[Team] | None" = None
_lock = threading.Lock()


def _help(slot: _Slot, bell: threading.Lock) -> None:
    while True:
        bell.acquire()
        if slot.stopped:
            return
        job = slot.job
        if job is not None:
            # Read before the job is done: when it is, the next launch may be under way already, and must not be missed.
            seen = int(slot.signal[0])
            function, arguments, _ = job
            function(*arguments)
            del function, arguments, _
            del job  # hold no batch while waiting
            # Waking takes 12 us; batch 128 ran 1.2 times as fast with helpers that stay awake between launches.
            while (now := slot.watch(slot.address, seen, _WATCH)) != seen:
                seen = now
                job = slot.job
                if job is not None:
                    job[0](*job[1])
                del job


def _ring(bell: threading.Lock) -> None:
    with contextlib.suppress(RuntimeError):  # rung before and not heard yet: the helper will see the new job
        bell.release()


def _stop(slot: _Slot, bells: list[threading.Lock]) -> None:
    slot.stopped = True
    for bell in bells:
        _ring(bell)


def _after_fork() -> None:
    """A forked child has none of its parent's threads, and locks as they were."""
    global _lock
    _lock = threading.Lock()
    team = _team() if _team is not None else None
    if team is not None:
        team._end.detach()
        team._forget()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork)
