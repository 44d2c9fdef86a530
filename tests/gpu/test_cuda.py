"""What needs a CUDA device: run with `pytest -m cuda`. Deselected by `make test`."""

from pathlib import Path
from typing import Any

import pytest
import torch

from fastcifar import Augment, Loader, TrainConfig, fit, open_store

pytestmark = pytest.mark.cuda


@pytest.fixture(autouse=True)
def _home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if not torch.cuda.is_available():
        pytest.fail("no CUDA device: deselect these tests with -m 'not cuda'")
    monkeypatch.setenv("FASTCIFAR_HOME", str(tmp_path / "home"))
    monkeypatch.chdir(tmp_path)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_batches_equal_the_cpus_bit_for_bit(dtype: torch.dtype) -> None:
    store = open_store("digits")
    augment = Augment(crop=4, padding="reflect", flip="random", cutout=8)
    options: Any = {"batch_size": 100, "augment": augment, "dtype": dtype, "seed": 3}
    here, there = Loader(store, device="cpu", **options), Loader(store, device="cuda", **options)
    for step in range(len(here)):
        a, b = here.batch(2, step), there.batch(2, step)
        assert torch.equal(a.images, b.images.cpu())
        assert torch.equal(a.labels, b.labels.cpu())


@pytest.mark.parametrize("amp_dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("compile_", ["off", "on"])
def test_training_runs_and_learns(amp_dtype: Any, compile_: Any) -> None:
    config = TrainConfig(arch="small", dataset="digits", epochs=4, amp=True, amp_dtype=amp_dtype, compile=compile_)
    assert fit(config).test.accuracy > 0.8
