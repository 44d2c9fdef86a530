"""What needs a CUDA device: run with `pytest -m cuda`. Deselected by `make test`."""

import json
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from fastcifar import Augment, Loader, TrainConfig, build_model, convert_arrays, fit, open_store
from fastcifar.kernels.cpu import CpuKernel
from fastcifar.kernels.plan import Plan, rows_at, scale_and_shift
from fastcifar.recipes import resolve
from fastcifar.runtime import choose
from fastcifar.step_graphs import StepGraphs
from fastcifar.trainer import Trainer

pytestmark = pytest.mark.cuda

AUGMENT = Augment(crop=4, padding="reflect", flip="alternating", cutout=8)
PART = {"batch_size": 64, "rank": 1, "world_size": 3, "capacity": 22}


@pytest.fixture(autouse=True)
def _home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if not torch.cuda.is_available():
        pytest.fail("no CUDA device: deselect these tests with -m 'not cuda'")
    monkeypatch.setenv("FASTCIFAR_HOME", str(tmp_path / "home"))
    monkeypatch.chdir(tmp_path)


@contextmanager
def no_synchronisation() -> Iterator[None]:
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


def kernels(**options: Any) -> tuple[CpuKernel, Any, Any, Plan]:
    """Of 300 images: the CPU's kernel, the device's, and the device's for gathered images, as a function of a call."""
    from fastcifar.kernels.cuda import CudaAugment, CudaKernel

    random = np.random.default_rng(0)
    images, labels = random.integers(0, 256, (300, 32, 32, 3), np.uint8), random.integers(0, 10, 300)
    scale, shift = scale_and_shift("standardize", np.full(3, 120.0), np.array([60.0, 61.0, 62.0]))
    plan = Plan(**{"samples": 300, "crop": 4, "flip": "random", "scale": scale, "shift": shift, **options})
    augment = CudaAugment((32, 32, 3), plan, torch.device("cuda"))

    def staged(*, epoch: int, start: int, size: int, capacity: int | None = None) -> tuple[Tensor, Tensor]:
        rows = rows_at(plan, np.arange(start, start + size), epoch)
        gathered = [torch.from_numpy(array).cuda() for array in (images[rows], rows, labels[rows])]
        return augment(*gathered, epoch=epoch, capacity=capacity)

    resident = CudaKernel(torch.from_numpy(images).cuda(), torch.from_numpy(labels).cuda(), plan)
    return CpuKernel(images, labels, plan), resident, staged, plan


def assert_same_bits(made: tuple[Tensor, Tensor], expected: tuple[Tensor, Tensor]) -> None:
    assert made[0].dtype == expected[0].dtype
    assert made[0].stride() == expected[0].stride()
    whole = torch.int32 if expected[0].element_size() == 4 else torch.int16
    assert torch.equal(made[0].cpu().view(whole), expected[0].view(whole))
    assert torch.equal(made[1].cpu(), expected[1])


@pytest.mark.parametrize("backend", ["eager", "cuda"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_batches_equal_the_cpus_bit_for_bit(dtype: torch.dtype, backend: Any) -> None:
    store = open_store("digits")
    augment = Augment(crop=4, padding="reflect", flip="random", cutout=8)
    options: Any = {"batch_size": 100, "augment": augment, "dtype": dtype, "seed": 3}
    here, there = Loader(store, device="cpu", **options), Loader(store, device="cuda", backend=backend, **options)
    for step in range(len(here)):
        a, b = here.batch(2, step), there.batch(2, step)
        assert torch.equal(a.images, b.images.cpu())
        assert torch.equal(a.labels, b.labels.cpu())


@pytest.mark.parametrize("order", ["random", "block", "sequential"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("channels_last", [True, False])
def test_the_kernel_equals_the_cpus(order: str, dtype: str, channels_last: bool) -> None:
    options = {"order": order, "dtype": dtype, "channels_last": channels_last, "block_size": 16, "window": 4}
    here, resident, staged, _ = kernels(**options, padding="zero", flip="alternating", cutout=9, seed=2**64 - 1)
    for epoch, start, size in ((0, 0, 300), (2**32 - 1, 290, 10), (5, 300, 0)):
        call = {"epoch": epoch, "start": start, "size": size, "capacity": size + 3}
        assert_same_bits(resident(**call), here(**call))
        assert_same_bits(staged(**call), here(**call))


def test_a_batch_is_one_launch() -> None:
    from torch.profiler import ProfilerActivity, profile

    _, kernel, _, _ = kernels()
    kernel(epoch=0, start=0, size=64)
    torch.cuda.synchronize()
    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as profiler:
        for step in range(4):
            kernel(epoch=step, start=64 * step, size=64)
        torch.cuda.synchronize()
    done = Counter(event.name for event in profiler.events() if event.device_type == torch.autograd.DeviceType.CUDA)
    assert done == {"make_batch": 4}


@pytest.mark.parametrize("placement", ["device", "host"])
def test_an_epoch_never_waits_for_the_device(placement: Any) -> None:
    loader = Loader(open_store("digits"), device="cuda", batch_size=64, augment=AUGMENT, placement=placement)
    assert sum(1 for _ in loader) == len(loader)  # it compiles
    with no_synchronisation():
        assert sum(1 for _ in loader) == len(loader)


def test_a_graph_counts_through_epochs() -> None:
    here, kernel, _, _ = kernels()
    position, one = torch.tensor([0, 0], device="cuda"), torch.tensor([0, 1], device="cuda")
    kernel.at(position, **PART)  # Triton compiles before the capture
    torch.cuda.synchronize()
    captured = torch.cuda.CUDAGraph()
    with torch.cuda.graph(captured):
        batch = kernel.at(position, **PART)
        position += one
    for epoch in (0, 2**32 - 1):
        position.copy_(torch.tensor([epoch, 0]))
        for step in range(6):  # 5 are the epoch's, the last of them short; the sixth is all padding
            with no_synchronisation():
                captured.replay()
            count = max(min(64, 300 - 64 * step), 0)
            low, high = count // 3, count * 2 // 3
            call = {"start": min(64 * step, 300) + low, "size": high - low, "capacity": 22}
            assert_same_bits(batch, here(epoch=epoch, **call))


@pytest.mark.parametrize(
    "options",
    [{"policy": "trivial"}, {"policy": "trivial", "policy_epochs": 2}, {"policy": "rand", "mixup": 0.4, "cutmix": 1.0}],
)
def test_a_graph_makes_batches_with_policies_and_mixing(options: dict[str, Any]) -> None:
    common: Any = {
        "batch_size": 100,
        "augment": Augment(crop=4, flip="alternating", cutout=8, **options),
        "pad_last": True,
    }
    here, there = Loader(open_store("digits"), **common), Loader(open_store("digits"), device="cuda", **common)
    assert there.counts_on_device
    position = torch.tensor([0, 0], device="cuda")
    there.make_at(position)
    torch.cuda.synchronize()
    captured = torch.cuda.CUDAGraph()
    with torch.cuda.graph(captured):
        images, labels = there.make_at(position)
    for epoch, step in ((0, 0), (3, 1), (2**32 - 1, len(here) - 1)):
        position.copy_(torch.tensor([epoch, step]))
        with no_synchronisation():
            captured.replay()
        expected = here.batch(epoch, step)
        assert images.stride() == expected.images.stride()
        assert torch.equal(images.cpu(), expected.images)
        assert torch.equal(labels.cpu(), expected.labels)


def test_a_compiled_step_makes_its_batch() -> None:
    options: Any = {"batch_size": 64, "augment": AUGMENT, "pad_last": True}
    here, there = Loader(open_store("digits"), **options), Loader(open_store("digits"), device="cuda", **options)

    @torch.compile(fullgraph=True)
    def step(position: Tensor) -> tuple[Tensor, Tensor]:
        images, labels = there.batch_at(position)
        return images * 2, labels

    for number in (0, len(here) - 1):
        images, labels = step(torch.tensor([1, number], device="cuda"))
        expected = here.batch(1, number)
        assert torch.equal(images.cpu(), expected.images * 2)
        assert torch.equal(labels.cpu(), expected.labels)


def test_nothing_compiles_again_within_an_epoch() -> None:
    from fastcifar.kernels.cuda_loops import make_batch

    _, kernel, _, _ = kernels(crop=3)
    kernel(epoch=0, start=0, size=64)
    cache = make_batch.device_caches[torch.cuda.current_device()][0]
    before = len(cache)
    for epoch in (0, 1, 16, 2**32 - 1):
        for start, size in ((0, 1), (1, 16), (16, 33), (299, 1)):
            kernel(epoch=epoch, start=start, size=size, capacity=64)
    assert len(cache) == before


@pytest.mark.parametrize("amp_dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("compile_", ["off", "on"])
def test_training_runs_and_learns(amp_dtype: Any, compile_: Any) -> None:
    config = TrainConfig(arch="small", dataset="digits", epochs=4, amp=True, amp_dtype=amp_dtype, compile=compile_)
    assert fit(config).test.accuracy > 0.8


@pytest.mark.parametrize("change", [(), ("policy=trivial",), ("policy=rand", "mixup=0.2", "cutmix=1")])
def test_steps_as_graphs_are_those_of_the_loop(change: tuple[str, ...]) -> None:
    losses = {}
    for cuda_graphs in (True, False):
        where: Any = {"arch": "small", "dataset": "digits", "device": "cuda", "change": change}
        config = TrainConfig(epochs=2, batch_size=200, cuda_graphs=cuda_graphs, **where)
        result = fit(config)
        losses[cuda_graphs] = [stats.train_loss for stats in result.history]
        said = json.loads((result.path / "metrics.jsonl").read_text().splitlines()[0])
        assert (["steps", "CUDA graphs"] in said["choices"]) == cuda_graphs
    assert losses[True] == pytest.approx(losses[False], rel=0.05)


@pytest.mark.parametrize("options", [{"policy": "trivial"}, {"policy": "rand"}, {"mixup": 0.4, "cutmix": 1.0}])
@pytest.mark.parametrize("placement", ["device", "host", "stream"])
def test_what_works_on_whole_batches_equals_the_cpus(placement: Any, options: dict[str, Any]) -> None:
    store = open_store("digits")
    common: Any = {"batch_size": 100, "augment": Augment(crop=4, flip="random", cutout=8, **options), "seed": 3}
    here, there = Loader(store, device="cpu", **common), Loader(store, device="cuda", placement=placement, **common)
    for a, b in zip(here, there, strict=True):
        assert torch.equal(a.images, b.images.cpu())
        assert torch.equal(a.labels, b.labels.cpu())


def test_mixed_labels_equal_the_cpus_for_any_size_of_images(tmp_path: Path) -> None:
    images = np.random.default_rng(0).integers(0, 256, (400, 28, 28, 3), np.uint8)
    store = convert_arrays(tmp_path / "s", images, np.arange(400) % 10)
    common: Any = {"batch_size": 100, "augment": Augment(mixup=0.4, cutmix=1.0), "seed": 3}
    here, there = Loader(store, **common), Loader(store, device="cuda", **common)
    for a, b in zip(here, there, strict=True):
        assert torch.equal(a.images, b.images.cpu())
        assert torch.equal(a.labels, b.labels.cpu())


def test_a_runs_graphs_outlive_anothers() -> None:
    def make(seed: int) -> tuple[Trainer, Loader]:
        torch.manual_seed(seed)
        config = TrainConfig(arch="small", device="cuda", amp=True, amp_dtype="bfloat16", epochs=4, batch_size=200)
        loader = Loader(store, split="train", batch_size=200, seed=seed, device="cuda", drop_last=True)
        return Trainer(build_model("small", num_classes=10), resolve(config), choose(config), steps=100), loader

    store = open_store("digits")
    first, second = (StepGraphs(*made) for made in (make(0), make(1)))
    for step in range(4):
        first.step_no_sync(0, step)
    del first
    torch.cuda.synchronize()
    torch.cuda.empty_cache()
    other = StepGraphs(*make(2))  # takes what is free now
    for step in range(6):
        other.step_no_sync(0, step)
        second.step_no_sync(0, step)
    trainer, loader = make(1)
    trainer.model.train()
    for step in range(6):
        trainer.step_no_sync(*loader.batch(0, step))
    loss, plain = second._trainer.totals.read()[0], trainer.totals.read()[0]
    assert loss == pytest.approx(plain, rel=0.05)
