"""What does safety cost: a checkpoint, the training thread's time; checksums, the time to the first batch?

    python -m benchmarks.safety [STORE]

A checkpoint is searched for what is not finite and copied in the training thread; another thread serialises it,
computes its digests and writes it. Beside it, all of that in one thread. The store's bytes are read with each checked
and with none, in turn in one process; the first batch is that of `benchmarks.first_batch`, from a new process.
"""

import contextlib
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace

import torch

from benchmarks.first_batch import seconds
from benchmarks.harness import alternate, save
from benchmarks.images import given_or_random
from fastcifar import ArrayStore, TrainConfig, build_model, checkpoint, memory, runtime
from fastcifar.data import store as store_module
from fastcifar.metrics import not_finite
from fastcifar.recipes import RECIPES
from fastcifar.trainer import Trainer

QUESTION = (__doc__ or "").splitlines()[0]
REPEATS = 9


def trained(arch: str, recipe: str) -> Trainer:
    """A net after one step on noise: its optimiser has all its tensors."""
    rt = runtime.choose(TrainConfig(device="cpu"))
    trainer = Trainer(build_model(arch, num_classes=10), RECIPES[recipe], rt, steps=10)
    images = torch.randn(16, 3, 20, 20).contiguous(memory_format=rt.memory_format)
    trainer.step_no_sync(images, torch.arange(16) % 10)
    return trainer


def in_background(trainer: Trainer, folder: Path) -> Callable[[], float]:
    """Seconds of the training thread, as `Job` saves."""
    saver = checkpoint.Saver(folder)

    def measure() -> float:
        trainer.step += 1
        started = time.perf_counter()
        weights, training = trainer.weights(), trainer.tensors()
        if not_finite({**weights, **training}):
            raise RuntimeError("the net diverged")
        saver.save(step=trainer.step, model=weights, training=training, state={})
        took = time.perf_counter() - started
        saver.wait()
        return took

    return measure


def at_once(trainer: Trainer, folder: Path) -> Callable[[], float]:
    """Seconds until it is all on the disk."""

    def measure() -> float:
        trainer.step += 1
        started = time.perf_counter()
        checkpoint.save(folder, step=trainer.step, model=trainer.weights(), training=trainer.tensors(), state={})
        return time.perf_counter() - started

    return measure


def reading(store: ArrayStore, *, checked: bool) -> Callable[[], float]:
    """Seconds to read all images of a store."""

    def measure() -> float:
        with contextlib.nullcontext() if checked else unchecked():
            started = time.perf_counter()
            store.load()
            return time.perf_counter() - started

    return measure


class _Anything(str):
    """Equals every checksum."""

    __hash__ = str.__hash__

    def __ne__(self, other: object) -> bool:
        return False


@contextlib.contextmanager
def unchecked() -> Iterator[None]:
    """Let every checksum be right without computing it."""
    real = store_module.xxhash
    store_module.xxhash = SimpleNamespace(xxh3_64_hexdigest=lambda content: _Anything())
    try:
        yield
    finally:
        store_module.xxhash = real


def main(arguments: list[str]) -> None:
    """Measure, print and save."""
    memory.keep_freed()  # as `fit` does
    runs: dict[str, Callable[[], float]] = {}
    with tempfile.TemporaryDirectory(prefix="fastcifar-safety-") as scratch, given_or_random(arguments) as store:
        for arch, recipe in (("big", "fast"), ("big", "report"), ("small", "fast")):
            trainer = trained(arch, recipe)
            title = f"checkpoint of {arch}, recipe {recipe}"
            runs[f"{title}: the training thread"] = in_background(trainer, Path(scratch) / f"{arch}-{recipe}-a")
            runs[f"{title}: all of it at once"] = at_once(trainer, Path(scratch) / f"{arch}-{recipe}-b")
        results = alternate(runs, repeats=REPEATS)
        results |= alternate(
            {
                "the store's bytes, each checked": reading(store, checked=True),
                "the store's bytes, none checked": reading(store, checked=False),
            },
            repeats=5 * REPEATS,
        )
        data = [str(store.path.resolve()), str(len(store.split("train")))]
        results |= alternate({"first batch": lambda: seconds(["fastcifar", *data])}, repeats=REPEATS)
    for name, result in results.items():
        print(result.get("failed") or f"{1000 * result['median']:8.1f} +- {1000 * result['interval95']:.1f} ms  {name}")
    print(f"written to {save('safety', QUESTION, results, images=int(data[1]))}")


if __name__ == "__main__":
    main(sys.argv[1:])
