"""What `gpu_check` trains on a CUDA device: figures as JSON values.

Example:
    training("small", "digits")["train_seconds"]
"""

import contextlib
import tempfile
import time
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import torch

from fastcifar import TrainConfig, fit, open_store
from fastcifar.job import Job
from fastcifar.seeds import fit_seeds

__all__ = ["beside_airbench", "side_by_side", "training"]

_SEEDS = 8
_EPOCHS = 8  # of net fast beside airbench94


def training(arch: str, dataset: str, *, epochs: int = 3, **options: Any) -> dict[str, Any]:
    """A few epochs with mixed precision; seconds of making whitening filters are in the warm-up's too."""
    jobs: list[Job] = []
    end = Job._finish

    def finish(self: Job, *arguments: Any) -> Any:
        jobs.append(self)
        return end(self, *arguments)

    with tempfile.TemporaryDirectory() as folder, mock.patch.object(Job, "_finish", finish):
        where = {"dataset": dataset, "device": "cuda", "out": Path(folder) / "run"}
        result = fit(TrainConfig(arch=arch, epochs=epochs, amp=True, **where, **options))
    return {
        "train_seconds": sum(stats.train_seconds for stats in result.history),
        "epoch_seconds": [stats.train_seconds for stats in result.history],
        "images_per_second": [stats.images_per_second for stats in result.history],
        "whiten_seconds": jobs[0].whiten_seconds,
        "warmup_seconds": result.run.warmup_seconds,
        "accuracy": result.test.accuracy,
        "tta_accuracy": result.test.tta_accuracy,
    }


def beside_airbench(dataset: str) -> dict[str, Any]:
    """Net fast and airbench94's own script and net, in turn: seconds of training and accuracies."""
    before = torch.backends.cudnn.benchmark
    import airbench
    from airbench import utils

    theirs = torch.backends.cudnn.benchmark  # it asks cuDNN to search for its algorithms, for all the process
    torch.backends.cudnn.benchmark = before
    store = open_store(dataset)
    said: list[dict[str, float]] = []
    keys = ("val_acc", "tta_val_acc", "total_time_seconds")
    runs: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as folder, contextlib.chdir(folder):
        for part in ("train", "test"):
            rows = np.asarray(store.split(f"full/{part}").rows)
            images, labels = torch.from_numpy(store.images[rows]), torch.from_numpy(store.labels[rows].astype(np.int64))
            Path("cifar10").mkdir(exist_ok=True)
            torch.save({"images": images, "labels": labels, "classes": []}, f"cifar10/{part}.pt")
        tell = mock.patch.object(
            utils,
            "print_training_details",
            lambda found, is_final_entry: said.append({key: found[key] for key in keys if key in found}),
        )
        for number in range(4):  # in the first, airbench's cuDNN chooses its algorithms
            with tell, torch.backends.cudnn.flags(enabled=True, benchmark=theirs, allow_tf32=True):
                airbench.train94()
            *_, epoch, last = said
            runs.append({"first": number == 0, "airbench94": [epoch["total_time_seconds"], last["tta_val_acc"]]})
            ours = training("fast", str(store.path), epochs=_EPOCHS, seed=number)
            runs[-1]["fastcifar"] = [ours["whiten_seconds"] + ours["train_seconds"], ours["tta_accuracy"]]
    each = ["seconds of whitening filters and training", "accuracy with test-time augmentation"]
    return {"epochs": _EPOCHS, "runs": runs, "of each": each}


def side_by_side(arch: str, dataset: str, *, epochs: int = 4) -> dict[str, Any]:
    """Seconds that the same runs take one after another, and on streams of one process, in turn."""
    ways = {"first": 1, "one after another": 1, "4 streams": 4, "8 streams": 8}  # in the first, libraries are loaded
    found: dict[str, Any] = {}
    for way, parallel in ways.items():
        with tempfile.TemporaryDirectory() as folder:
            config = TrainConfig(
                arch=arch, dataset=dataset, epochs=epochs, amp=True, device="cuda", out=Path(folder) / "runs"
            )
            started = time.perf_counter()
            result = fit_seeds(config, range(1 if way == "first" else _SEEDS), parallel=parallel)
            seconds = time.perf_counter() - started
        if result.exit_status or result.test_accuracy is None or result.train_seconds is None:
            raise AssertionError(f"{way}: {[outcome.error for outcome in result.runs.values()]}")
        accuracy, each = result.test_accuracy, result.train_seconds
        found[way] = {"seconds": seconds, "train_seconds_of_each": each.mean, "accuracy": accuracy.mean}
    del found["first"]
    first = found["one after another"]["seconds"]
    return {"runs": _SEEDS, "epochs": epochs, **{
        way: figures | {"times_as_fast": first / figures["seconds"]} for way, figures in found.items()
    }}  # fmt: skip
