"""How many threads PyTorch computes with, for a while."""

import contextlib
from collections.abc import Iterator

import torch

__all__ = ["on_threads"]


@contextlib.contextmanager
def on_threads(count: int) -> Iterator[None]:
    """So many in the block, and as many as before after it."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)
