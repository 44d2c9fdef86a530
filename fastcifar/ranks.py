"""Ranks: the processes that train one run together, as torchrun starts them.

The only module that makes process groups and reads torchrun's variables. Without those there is one rank, `ALONE`, and
nothing here does anything. Every rank does the same steps, so every method of `Ranks` is called by all of them at the
same place, or none goes on; one that has ended makes the others raise `RankLostError` once its connections close.

Gradients are summed as one flat buffer after the backward pass, and not with DistributedDataParallel, whose buckets are
others in the first step after a start than in the later ones: with three ranks or more the sums would be too, in their
last bits, and a resumed run would not go on bit for bit.

    with joined("cpu", StopRequest()) as ranks:
        loss, share = ranks.share_loss_no_sync(loss, len(labels))
        share.backward()
        ranks.sum_gradients_no_sync(model.parameters())
"""

import contextlib
import os
import re
import signal
import threading
import time
import uuid
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future, wait
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from fastcifar.errors import ConfigError, RankLostError, one_line
from fastcifar.signals import StopRequest

__all__ = ["ALONE", "Ranks", "asked_for", "joined"]

_NEEDED = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
_GLANCE = 0.02  # seconds between two looks at who has come


@dataclass(frozen=True, kw_only=True)
class Ranks:
    """Which of the processes of a run this is, and what they do together.

    Attributes:
        rank: of this one, 0 to size - 1. Only the first, 0, writes and reports.
        size: how many there are.
        local: its number on its machine, which is its GPU's.
        restarted: whether torchrun started them again, after one was lost.
        may_restart: whether torchrun would.
    """

    rank: int = 0
    size: int = 1
    local: int = 0
    restarted: bool = False
    may_restart: bool = False

    @property
    def first(self) -> bool:
        """Whether it is the one that writes and reports."""
        return self.rank == 0

    def asked(self, stop: StopRequest | None) -> signal.Signals | None:
        """The signal that asked any of them to stop: all hear of it at the same place, so that all stop there."""
        own = stop.signum if stop is not None else None
        if self.size == 1:
            return own
        heard = torch.tensor(own or 0)
        with _together():
            dist.all_reduce(heard, dist.ReduceOp.MAX)
        return signal.Signals(int(heard)) if heard else None

    def tell(self, text: str) -> str:
        """What the first says; what the others pass is not looked at."""
        if self.size == 1:
            return text
        words = torch.tensor(list(text.encode("utf-8", "surrogateescape")), dtype=torch.uint8)
        length = torch.tensor(len(words))
        with _together():
            dist.broadcast(length, 0)
            heard = words if self.first else torch.empty(int(length), dtype=torch.uint8)
            if len(heard):
                dist.broadcast(heard, 0)
        return bytes(heard.tolist()).decode("utf-8", "surrogateescape")

    def copy_first_no_sync(self, tensors: Iterable[Tensor]) -> None:
        """Take over the first's tensors, in place."""
        if self.size == 1:
            return
        with _together(), torch.no_grad():
            for tensor in tensors:
                dist.broadcast(tensor, 0)

    def share_loss_no_sync(self, loss: Tensor, samples: int) -> tuple[Tensor, Tensor]:
        """The mean loss of the global batch, and this rank's share of it, whose gradients sum to that mean's.

        Args:
            loss: floating [], the mean over this rank's part of the batch.
            samples: how many that has.

        Returns:
            floating [] without a gradient, equal on all ranks; floating [].
        """
        if self.size == 1:
            return loss, loss
        sums = torch.stack([loss.detach() * samples, torch.full_like(loss, samples, requires_grad=False)])
        with _together():
            dist.all_reduce(sums)
        total, count = sums.unbind()
        return total / count, loss * (samples / count)

    def sum_gradients_no_sync(self, parameters: Iterable[Tensor]) -> None:
        """Replace each parameter's gradient by the sum of all ranks'."""
        if self.size == 1:
            return
        gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
        for own, sums in zip(gradients, self.sum_no_sync(gradients), strict=True):
            own.copy_(sums)

    def sum_no_sync(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        """The sums over all ranks of tensors of one type, shaped like these."""
        if self.size == 1:
            return list(tensors)
        flat = torch.cat([tensor.detach().reshape(-1) for tensor in tensors])
        with _together():
            dist.all_reduce(flat)
        parts = torch.split(flat, [tensor.numel() for tensor in tensors])
        return [part.reshape(tensor.shape) for part, tensor in zip(parts, tensors, strict=True)]

    def gather_no_sync(self, tensor: Tensor) -> Tensor:
        """Every rank's tensor, [size, ...], each of this one's shape [...]."""
        if self.size == 1:
            return tensor[None]
        gathered = [torch.empty_like(tensor) for _ in range(self.size)]
        with _together():
            dist.all_gather(gathered, tensor.contiguous())
        return torch.stack(gathered)


ALONE = Ranks()
"""The one rank of a process that torchrun didn't start."""


def asked_for() -> int:
    """How many ranks this process was started as one of.

    Raises:
        ConfigError: torchrun's variables are not all there, or hold no numbers.
    """
    if dist.is_available() and dist.is_initialized():
        return dist.get_world_size()
    size = _number("WORLD_SIZE", 1)
    missing = [name for name in _NEEDED if name not in os.environ]
    if size > 1 and missing:
        raise ConfigError(f"WORLD_SIZE is {size}, but {', '.join(missing)} not set: start the ranks with torchrun")
    return size


@contextlib.contextmanager
def joined(device: str, stop: StopRequest) -> Iterator[Ranks]:
    """Join the other ranks that torchrun started, for a block; a process group that is there already is used as it is.

    Args:
        device: what they compute on, as in `TrainConfig`: NCCL joins GPUs, gloo CPUs.
        stop: looked at while the others have not come.

    Raises:
        ConfigError: torchrun's variables are wrong, or the ranks cannot find each other.
        StoppedError: a signal came before all had met.
    """
    size = asked_for()
    restarted = _number("TORCHELASTIC_RESTART_COUNT", 0) > 0
    may_restart = _number("TORCHELASTIC_MAX_RESTARTS", 0) > 0
    if size == 1:
        yield Ranks(restarted=restarted, may_restart=may_restart)
        return
    ours = not dist.is_initialized()
    if ours:
        on_gpus = torch.cuda.is_available() and device.startswith(("auto", "cuda"))
        try:
            store, rank, _ = next(dist.rendezvous("env://"))  # type: ignore[attr-defined]
            store = dist.PrefixStore(_meeting(store, rank, size, stop), store)  # type: ignore[attr-defined]
            _connect("cpu:gloo,cuda:nccl" if on_gpus else "gloo", store, rank, size, stop)
        except (RuntimeError, ValueError) as error:
            raise ConfigError(f"the {size} ranks cannot find each other ({one_line(error)})") from None
    elif "cpu:" not in dist.get_backend_config():
        raise ConfigError('the process group has no backend for CPUs: init_process_group("cpu:gloo,cuda:nccl") has')
    try:
        flags = torch.tensor([restarted, may_restart], dtype=torch.int64)
        with _together():  # each machine's torchrun counts for itself
            dist.all_reduce(flags, dist.ReduceOp.MAX)
        restarted, may_restart = map(bool, flags.tolist())
        local = _number("LOCAL_RANK", 0)
        yield Ranks(rank=dist.get_rank(), size=size, local=local, restarted=restarted, may_restart=may_restart)
    finally:
        if ours:
            dist.destroy_process_group()


def _meeting(store: Any, rank: int, size: int, stop: StopRequest) -> str:
    """A name that the ranks of this start have in common, and those of no other.

    torchrun's store is the same for all its restarts, and ranks would look for each other where those before them were
    (seen with torch 2.13). So each leaves a number that is new; once all know the first's, the first lets them go.
    """
    own, others = uuid.uuid4().hex, range(1, size)
    deadline = time.monotonic() + dist.default_pg_timeout.total_seconds()
    store.set(f"came {rank}", own)

    def pause() -> None:
        time.sleep(_GLANCE)
        if time.monotonic() > deadline:
            raise RuntimeError(f"waited for {dist.default_pg_timeout}")
        _stop_if_asked(stop)

    if rank == 0:
        while not store.check([f"{own} {other}" for other in others]):
            if store.check([f"came {other}" for other in others]):  # at first perhaps in an earlier start
                store.set("seen", " ".join([own, *(store.get(f"came {other}").decode() for other in others)]))
            pause()
        store.set(f"{own} go", "")
        return own
    seen = [""] * size
    while seen[rank] != own:
        pause()
        if store.check(["seen"]):
            seen = store.get("seen").decode().split()
    store.set(f"{seen[0]} {rank}", "knows")
    while not store.check([f"{seen[0]} go"]):
        pause()
    return seen[0]


def _connect(backend: str, store: Any, rank: int, size: int, stop: StopRequest) -> None:
    """Make the process group; in a thread, as it waits for the others in C++, where Python hears no signal."""
    made: Future[None] = Future()

    def make() -> None:
        try:
            dist.init_process_group(backend, store=store, rank=rank, world_size=size)
            made.set_result(None)
        except BaseException as error:
            made.set_exception(error)

    threading.Thread(target=make, name="fastcifar-ranks", daemon=True).start()  # a stopped process doesn't wait for it
    while not wait([made], timeout=_GLANCE).done:
        _stop_if_asked(stop)
    made.result()


def _stop_if_asked(stop: StopRequest) -> None:
    if stop.signum is not None:
        with stop.at_once("before training began; nothing was saved"):
            pass


def _number(name: str, default: int) -> int:
    value = os.environ.get(name, str(default))
    if not (value.isascii() and value.isdigit()):
        raise ConfigError(f"{name} must be a whole number, as torchrun sets it, got {value!r}")
    return int(value)


@contextlib.contextmanager
def _together() -> Iterator[None]:
    try:
        yield
    except RuntimeError as error:
        reason = re.sub(r"^\[\S*\] ", "", str(error).split(". ")[0])  # without the place in gloo's sources
        raise RankLostError(f"another rank has ended, whose own message says why ({one_line(reason)})") from None
