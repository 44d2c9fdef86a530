"""How threads come together on a job of the CPU kernel; compiled with `cpu_loops`, without locks.

Example:
    work(0, job, SPINS)         # make the job's batch, with whoever else is at it; see `cpu_fields` for what a job is
    work(box, 0, SPINS)         # serve: do what jobs come
"""

# numba infers the types of what stands here, and not Python's.
# mypy: disable-error-code="no-untyped-def, no-untyped-call, assignment"

from fastcifar.kernels.cpu_fields import AWAKE, END, INSIDE, JOB, MADE, POSTED, TAKING
from fastcifar.kernels.cpu_loops import make
from fastcifar.kernels.cpu_words import fetch_add, get64

__all__ = ["leave", "post", "work"]


def work(box, job, spins):
    """Make a job's batch, together with the other threads that work on it; or with a box, serve.

    Who serves does the jobs that are put into the box, until none came for a while or END did. One function for both:
    what makes images goes into its caller, and would else be compiled twice.

    Args:
        box: address of a box, for who serves; else 0.
        job: address of a job, where there is no box.
        spins: how often to look for the end of the other threads' last chunks, or for the next job.

    Returns:
        How many of the job's images have been made so far; 0 of who serves.
    """
    seen = -1  # a job that is there already counts as new
    if box:
        fetch_add(box + 8 * AWAKE, 1)
    while True:
        if box:
            now = fetch_add(box + 8 * POSTED, 0)
            for _ in range(spins):
                if now != seen:
                    break
                now = fetch_add(box + 8 * POSTED, 0)
            if now == seen:
                fetch_add(box + 8 * AWAKE, -1)
                return 0
            seen = now
            fetch_add(box + 8 * TAKING, 1)  # before the look: who takes the job back after it knows
            job = fetch_add(box + 8 * JOB, 0)
            if job and job != END:
                fetch_add(job + 8 * INSIDE, 1)
            fetch_add(box + 8 * TAKING, -1)
            if job == END:
                fetch_add(box + 8 * AWAKE, -1)
                return 0
        if job:
            make(job)
        if box:
            if job:
                fetch_add(job + 8 * INSIDE, -1)  # from here on the job may be gone
        else:
            for _ in range(spins):
                if fetch_add(job + 8 * MADE, 0) >= get64(job, 4):
                    break
            return fetch_add(job + 8 * MADE, 0)


def post(box, job):
    """Put a job into a box, in the place of any other, and say so; returns how many helpers are awake."""
    fetch_add(box + 8 * JOB, job - fetch_add(box + 8 * JOB, 0))
    fetch_add(box + 8 * POSTED, 1)
    return fetch_add(box + 8 * AWAKE, 0)


def leave(box, job):
    """Take a job out of a box, if it is there; returns how many helpers are just taking one.

    At 0, the helpers that are at the job are those its own state counts, and no other will come.
    """
    if fetch_add(box + 8 * JOB, 0) == job:
        fetch_add(box + 8 * JOB, -job)
    return fetch_add(box + 8 * TAKING, 0)
