"""A few threads that wait to help with jobs: what the CPU kernel uses instead of numba's `parallel=True`.

It touches nothing but threads. They serve without Python's lock, sleep from 45 us after a job until the next,
hold nothing then, and end with the last user of the team.

    team = shared_team(functions)          # the compiled functions `work`, `post` and `leave`
    team.post(job, 1)                      # one helper begins, unless it is busy
    ...                                    # work on the job here as well: no helper is to be relied on
    team.retire(job)

Why not numba's layers: OpenMP kills a forked child that launches, the work queue aborts when two threads
launch at once, and neither is on every platform. Measured in millions of images/s, batch 128 / 512, two
cores: 1.3 / 1.6 here on an idle machine (1.5 / 1.7 in the best percent of OpenMP's batches); while another
process kept one core busy, 0.5 / 0.7 here and 0.02 / 0.06 with OpenMP, which waits for its threads. Here a
late helper only finds less to do.
"""

import collections
import contextlib
import ctypes
import os
import threading
import weakref
from typing import Any, NamedTuple

from fastcifar.kernels.cpu_fields import BOX_WORDS, END, INSIDE
from fastcifar.kernels.machine import Functions

__all__ = ["Job", "Team", "shared_team"]


class Job(NamedTuple):
    """A job's address, its words (see `cpu_fields`), and what must stay alive as long as they do."""

    address: int
    words: Any
    kept: Any


class _Slot:
    """What helpers and team share. Holds no reference to the team."""

    stopped = False

    def __init__(self, functions: Functions) -> None:
        self.work, self.post, self.leave = (functions[name] for name in ("work", "post", "leave"))
        self.box = (ctypes.c_int64 * BOX_WORDS)()
        self.address = ctypes.addressof(self.box)
        self.posted: Job | None = None
        self.lingering: list[Job] = []  # a helper may still be in them


class Team:
    """Helper threads, started when first needed."""

    def __init__(self, functions: Functions) -> None:
        self._functions = functions
        self._forget()

    def _forget(self) -> None:
        """Have no helpers; those there were are not told."""
        self._lock = threading.Lock()
        self._slot = _Slot(self._functions)
        self._retired: collections.deque[Job] = collections.deque()  # not taken back yet
        self._bells: list[threading.Lock] = []  # a helper sleeps on its bell, which is locked until rung
        self._threads: list[threading.Thread] = []
        self._end = weakref.finalize(self, _stop, self._slot, self._bells, self._threads)

    @property
    def generation(self) -> object:
        """Another object in a forked child: what helpers had begun is not finished there."""
        return self._slot

    def post(self, job: Job, helpers: int) -> None:
        """Let `helpers` threads work on a job, in the place of the one that was posted before.

        The caller must not rely on any helper: one that is busy, or wakes too late, does nothing. `retire` must follow.
        """
        slot = self._slot
        with self._lock:
            while len(self._bells) < helpers and self._start_helper():
                pass
            if slot.posted is not None:
                slot.lingering.append(slot.posted)
            slot.posted = job
            # Waking takes 12 us; batch 128 ran 1.2 times as fast with helpers that stay awake between jobs.
            if slot.post(slot.address, job.address) < helpers:
                for bell in self._bells[:helpers]:
                    _ring(bell)
        self._take_back()

    def retire(self, job: Job) -> None:
        """Take a job back, from helpers that have not come to it yet; what one of them may still use is kept for it.

        Never waits: the garbage collector, which ends a loop that was dropped, may call it from within `post`.
        """
        self._retired.append(job)
        self._take_back()

    def _take_back(self) -> None:
        """Take back all that are retired; whoever has the lock does it, for those who come meanwhile too."""
        while self._retired and self._lock.acquire(blocking=False):
            try:
                slot = self._slot
                while self._retired:
                    job = self._retired.popleft()
                    if slot.posted is job:
                        slot.posted = None
                    slot.lingering.append(job)
                    if not slot.leave(slot.address, job.address):
                        slot.lingering = [one for one in slot.lingering if one.words[INSIDE]]
            finally:
                self._lock.release()

    def _start_helper(self) -> bool:
        """Whether another one could be started: a system may have no more threads to give."""
        bell = threading.Lock()
        bell.acquire()
        thread = threading.Thread(target=_help, args=(self._slot, bell), name="fastcifar-kernel", daemon=True)
        try:
            thread.start()
        except RuntimeError:
            return False
        self._threads.append(thread)
        self._bells.append(bell)
        return True


def shared_team(functions: Functions) -> Team:
    """The process's team; it lives as long as someone holds it."""
    global _team
    with _lock:
        team = _team() if _team is not None else None
        if team is None:
            team = Team(functions)
            _team = weakref.ref(team)
        return team


_WATCH = 20_000  # looks (45 us) for the next job before a helper goes to sleep
_PATIENCE = 10.0  # seconds to wait for a helper's end: it is done with its batch in far less
_team: "weakref.ref[Team] | None" = None
_lock = threading.Lock()


def _help(slot: _Slot, bell: threading.Lock) -> None:
    while True:
        bell.acquire()
        if slot.stopped:
            return
        slot.work(slot.address, 0, _WATCH)


def _ring(bell: threading.Lock) -> None:
    with contextlib.suppress(RuntimeError):  # rung before and not heard yet: the helper will see the new job
        bell.release()


def _stop(slot: _Slot, bells: list[threading.Lock], threads: list[threading.Thread]) -> None:
    """End the helpers. At the process's end this comes before Python's: one that came back later would abort it."""
    slot.stopped = True
    slot.post(slot.address, END)
    for bell in bells:
        _ring(bell)
    for thread in threads:
        if thread is not threading.current_thread():  # the garbage collector may call this from anywhere
            thread.join(_PATIENCE)


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
