"""How much a sweep tries: a sample in `make test`, thirty times as much in `make test-long`."""

import os

__all__ = ["effort"]


def effort(count: int) -> int:
    """`count` tries, or 30 times as many in a long run."""
    return count * 30 if os.environ.get("FASTCIFAR_LONG_TESTS") else count
