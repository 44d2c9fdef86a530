"""Training runs of a tenth of a second, for faults: a tiny net on tiny images, two epochs, undrawn pictures."""

import json
from collections.abc import Mapping
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from fastcifar import checkpoint
from fastcifar.config import TrainConfig
from fastcifar.data.writer import SourceFile, write_store
from fastcifar.nets import ARCHS, Arch
from tests.threads import on_threads

__all__ = ["config", "equal", "lines", "one_thread", "prepare", "weights"]


def prepare(monkeypatch: pytest.MonkeyPatch, folder: Path) -> None:
    """Make the data in `folder`, the working folder of the test, and what `config` names."""
    generator = np.random.default_rng(0)
    files = []
    for name, count in (("a", 48), ("b", 16), ("c", 16)):
        labels = generator.integers(0, 3, count)
        noise = generator.integers(0, 60, (count, 20, 20, 3)) + 70 * labels[:, None, None, None]
        files.append(SourceFile(name, noise.astype(np.uint8), labels))
    splits = {"report": {"train": ["a"], "validation": ["b"], "test": ["c"]}}
    write_store(folder / "data", files, name="data", classes=list("xyz"), splits=splits, source={"verified": True})
    monkeypatch.chdir(folder)
    monkeypatch.setitem(ARCHS, "tiny", Arch(blocks=((4,), (4,), (4,), (4,)), hidden=(8,)))
    monkeypatch.setattr("matplotlib.figure.Figure.savefig", lambda self, file, **options: file.write(b"a picture"))


def one_thread() -> AbstractContextManager[None]:
    """As in the children that are forked: sums are the same then, bit for bit."""
    return on_threads(1)


def config(out: str = "run", **options: Any) -> TrainConfig:
    """Three steps an epoch."""
    given: dict[str, Any] = {"arch": "tiny", "recipe": "fast", "split": "report", "epochs": 2, "batch_size": 16}
    return TrainConfig(**given | {"dataset": "data", "device": "cpu", "out": Path(out)} | options)


def weights(run: Path) -> dict[str, torch.Tensor]:
    """All that the newest checkpoint holds in tensors."""
    found = checkpoint.load_newest(run / "checkpoints")
    return {**found.model, **found.training}


def lines(run: Path) -> list[dict[str, Any]]:
    """What metrics.jsonl says."""
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def equal(a: Mapping[str, torch.Tensor], b: Mapping[str, torch.Tensor]) -> bool:
    """Whether they have the same names and bits."""
    return a.keys() == b.keys() and all(torch.equal(tensor, b[name]) for name, tensor in a.items())
