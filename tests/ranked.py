"""Several ranks in forks of this process, joined over loopback as torchrun's are.

results = together(3, lambda ranks: {"tell": torch.ones(ranks.rank)}, tmp_path)     # a dict of each rank's
environment(rank=0, size=2, port=meeting_place())       # what torchrun would set
"""

import os
import signal
from collections.abc import Callable
from pathlib import Path
from unittest import mock

import safetensors.torch
import torch.distributed as dist
from torch import Tensor

from fastcifar.ranks import Ranks, joined
from fastcifar.signals import StopRequest
from tests.faults import children

__all__ = ["environment", "meeting_place", "together"]

_SECONDS = 300  # after which a meeting place closes


def meeting_place() -> int:
    """The port where ranks find each other, in a process of its own like torchrun, which keeps it for all restarts."""
    reading, writing = os.pipe()
    if os.fork() == 0:
        try:
            signal.signal(signal.SIGALRM, signal.SIG_DFL)
            signal.alarm(_SECONDS)
            store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
            os.write(writing, str(store.port).encode())
            signal.pause()
        finally:
            os._exit(0)
    os.close(writing)
    port = int(os.read(reading, 16))
    os.close(reading)
    return port


def environment(*, rank: int, size: int, port: int, **more: str) -> dict[str, str]:
    """The variables that torchrun sets."""
    numbers = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": size, "MASTER_PORT": port}
    place = {"MASTER_ADDR": "127.0.0.1", "TORCHELASTIC_USE_AGENT_STORE": "True"}
    return {**{name: str(number) for name, number in numbers.items()}, **place, **more}


def together(size: int, work: Callable[[Ranks], dict[str, Tensor]], folder: Path) -> list[dict[str, Tensor]]:
    """What `work` returns on each of `size` ranks.

    Args:
        size: how many.
        work: on one rank, with one thread.
        folder: where the results go through.
    """
    port = meeting_place()

    def one(rank: int) -> None:
        with (
            mock.patch.dict(os.environ, environment(rank=rank, size=size, port=port)),
            joined("cpu", StopRequest()) as ranks,
        ):
            found = {name: tensor.detach().contiguous() for name, tensor in work(ranks).items()}
            safetensors.torch.save_file(found, folder / f"{size}-{rank}.safetensors")

    started = [children.start(lambda rank=rank: one(rank)) for rank in range(size)]
    for child in started:
        assert children.end_of(child) == "done"
    return [safetensors.torch.load_file(folder / f"{size}-{rank}.safetensors") for rank in range(size)]
