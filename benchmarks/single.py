"""One loader in a new process, which says when it has come so far: what `first_batch`, `memory` and `safety` start.

    python -m benchmarks.single fastcifar STORE COUNT
    python -m benchmarks.single WORKERS STORE COUNT      # the report's Dataset + DataLoader

Says `{"importing": ..}` when torch is imported, then, at each line of input, goes on: `{"first_batch": ..}` with the
seconds from there to the first batch, and `{"epoch": ..}` at the end of an epoch.
"""

import json
import sys
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from benchmarks.contestants.common import Task

BATCH_SIZE = 512


def main(what: str, store: str, count: int) -> None:
    """Go on from stage to stage."""
    started = time.perf_counter()
    import torch.utils.data  # noqa: F401

    _say(importing=time.perf_counter() - started)
    started = time.perf_counter()
    iterator = iter(_fastcifar(store) if what == "fastcifar" else _data_loader(store, count, int(what)))
    next(iterator)
    _say(first_batch=time.perf_counter() - started)
    for _ in iterator:
        pass
    _say(epoch=time.perf_counter() - started)


def _say(**found: float) -> None:
    print(json.dumps(found), flush=True)
    if not sys.stdin.readline():
        sys.exit()


def _fastcifar(store: str) -> Iterable[Any]:
    from fastcifar import ArrayStore, Augment, Loader

    augment = Augment(crop=4, flip="random")
    return Loader(ArrayStore(store), batch_size=BATCH_SIZE, augment=augment, drop_last=True)


def _data_loader(store: str, count: int, workers: int) -> Iterable[Any]:
    from benchmarks.contestants.report import open_loader

    nothing = (0.0,) * 3  # it scales to [-1, 1]
    task = Task(
        store=Path(store), scratch=Path(), mean=nothing, std=nothing, count=count, batch_size=BATCH_SIZE, crop=0
    )
    return open_loader(task, workers=workers).epoch()


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], int(sys.argv[3]))
