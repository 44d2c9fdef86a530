"""Several ranks in forks of this process, joined over loopback as torchrun's are.

results = together(3, lambda ranks: {"sum": ranks.sum_no_sync([torch.ones(2)])[0]})     # a dict of each rank's
environment(rank=0, size=2, port=free_port())       # what torchrun would set
"""

import contextlib
import os
import socket
from collections.abc import Callable
from pathlib import Path
from unittest import mock

import safetensors.torch
from torch import Tensor

from fastcifar.ranks import Ranks, joined
from tests.faults import children

__all__ = ["environment", "free_port", "together"]


def free_port() -> int:
    """One that nothing listened on a moment ago."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def environment(*, rank: int, size: int, port: int, **more: str) -> dict[str, str]:
    """The variables that torchrun sets."""
    numbers = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": size, "MASTER_PORT": port}
    return {**{name: str(number) for name, number in numbers.items()}, "MASTER_ADDR": "127.0.0.1", **more}


def together(size: int, work: Callable[[Ranks], dict[str, Tensor]], folder: Path) -> list[dict[str, Tensor]]:
    """What `work` returns on each of `size` ranks.

    Args:
        size: how many.
        work: on one rank, with one thread.
        folder: where the results go through.
    """
    port = free_port()

    def one(rank: int) -> None:
        with mock.patch.dict(os.environ, environment(rank=rank, size=size, port=port)), joined("cpu") as ranks:
            found = {name: tensor.detach().contiguous() for name, tensor in work(ranks).items()}
            safetensors.torch.save_file(found, folder / f"{size}-{rank}.safetensors")

    started = [children.start(lambda rank=rank: one(rank)) for rank in range(size)]
    for child in started:
        assert children.end_of(child) == "done"
    results = []
    for rank in range(size):
        path = folder / f"{size}-{rank}.safetensors"
        results.append(safetensors.torch.load_file(path))
        with contextlib.suppress(OSError):
            path.unlink()
    return results
