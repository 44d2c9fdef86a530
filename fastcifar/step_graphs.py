"""StepGraphs: whole training steps as CUDA graphs, from making the batch to the epoch's sums.

A step of these nets is hundreds of short launches, and Python cannot queue them as fast as a GPU does them: captured
once, they are one. The position and the learning rate are on the device, where the graph reads them.

    graphs = StepGraphs(trainer, loader)
    graphs.step_no_sync(epoch=0, step=0)
"""

from collections.abc import Callable, Iterator
from typing import TypeAlias

import torch
from torch import Tensor

from fastcifar.loader import Loader
from fastcifar.muon import Muon
from fastcifar.trainer import Trainer

__all__ = ["StepGraphs", "why_not"]

_WARM_UP = 3  # steps before a capture, as torch's documentation has it
_Work: TypeAlias = Callable[[], Tensor]


def why_not(trainer: Trainer, loader: Loader) -> str | None:
    """What keeps a step from being captured; None where nothing does."""
    if trainer.runtime.device.type != "cuda":
        return "CUDA graphs are CUDA's"
    if trainer.ranks.size > 1:
        return "several ranks wait for each other"
    if trainer.runtime.scale_gradients:
        return "gradient scaling looks at each step's gradients"
    if not isinstance(trainer.optimizer, Muon):
        return "the optimiser takes its learning rate from the host"
    if not loader.counts_on_device:
        return f"{loader.backend} batches are prepared on the host"
    if not loader.drop_last and len(loader.dataset) % loader.batch_size:
        return "the last batch is short"
    return None


class StepGraphs:
    """A trainer's steps on a loader's batches, one graph for each resolution to come; they share their memory.

    The trainer, its net and the sums are afterwards as they were.

    Args:
        trainer: restored, where the run is resumed: what is captured are its tensors.
        loader: of the training data, and such that `why_not` has nothing against it.
    """

    def __init__(self, trainer: Trainer, loader: Loader) -> None:
        self._trainer, self._loader = trainer, loader
        device = trainer.runtime.device
        self._position = torch.zeros(2, dtype=torch.int64, device=device)
        self._one = torch.tensor([0, 1], device=device)
        self._next: tuple[int, int] | None = None  # where `_position` stands
        for group in trainer.optimizer.param_groups:
            group["lr"] = torch.zeros((), device=device)
        sizes = dict.fromkeys(trainer.resolution(step) for step in range(trainer.step, trainer.steps))
        with trainer.unmoved():
            self._replay = self._captured(sizes)

    def step_no_sync(self, epoch: int, step: int) -> None:
        """The optimiser step on the batch of that position."""
        if self._next != (epoch, step):
            self._position[0].fill_(epoch)
            self._position[1].fill_(step)
        self._next = (epoch, step + 1)
        trainer = self._trainer
        trainer.begin_step_no_sync()
        loss = self._replay[trainer.resolution(trainer.step)]()
        trainer.watch.add_no_sync(trainer.step + 1, loss.clone())  # the next replay writes to the same place
        trainer.end_step_no_sync()

    def take_steps(self) -> Iterator[None]:
        """The steps from the loader's position to the end of its epoch, each taken when it is asked for."""
        for epoch, step in self._loader.positions():
            self.step_no_sync(epoch, step)
            yield

    def _captured(self, sizes: dict[int | None, None]) -> dict[int | None, _Work]:
        works = {size: self._work(size) for size in sizes}
        device = self._trainer.runtime.device
        # Of its own: cuBLAS's workspaces go by stream, and graphs of runs side by side are replayed at the same time.
        # Of high priority, of which nobody else takes one: streams come from pools of 32, and round again.
        side = torch.cuda.Stream(device, priority=-1)  # type: ignore[no-untyped-call]
        side.wait_stream(torch.cuda.current_stream(device))
        with torch.cuda.stream(side):
            for work in works.values():
                for _ in range(_WARM_UP):
                    work()
        torch.cuda.current_stream(device).wait_stream(side)
        pool = None
        replays: dict[int | None, _Work] = {}
        for size, work in works.items():
            graph = torch.cuda.CUDAGraph()
            # other threads' runs go on
            with torch.cuda.graph(graph, pool=pool, stream=side, capture_error_mode="thread_local"):
                loss = work()
            pool = graph.pool()
            replays[size] = _replayed(graph, loss)
        return replays

    def _work(self, size: int | None) -> _Work:
        def work() -> Tensor:
            images, labels = self._loader.make_at(self._position)
            self._position.add_(self._one)
            return self._trainer.move_no_sync(images, labels, size)

        return work


def _replayed(graph: torch.cuda.CUDAGraph, loss: Tensor) -> _Work:
    def replay() -> Tensor:
        graph.replay()
        return loss

    return replay
