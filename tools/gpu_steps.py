"""What `gpu_check` does on a CUDA device, step by step; each returns figures as JSON values or raises.

Example:
    run_guarded(steps("digits"), [path], seconds=300)
"""

import itertools
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import torch
from gpu_parts import (
    OwnTests,
    Step,
    bytes_moved,
    launches_for,
    make_plan,
    no_synchronisation,
    noise,
    option_sets,
    same_bits,
    timed,
    without_failures,
)
from gpu_training import beside_airbench, side_by_side, training
from torch import Tensor

from fastcifar import Augment, Loader, open_store
from fastcifar.kernels.cpu import CpuKernel
from fastcifar.kernels.plan import rows_at

AUGMENT = Augment(crop=4, padding="reflect", flip="alternating")


def pair(shape: tuple[int, int, int], count: int, **options: Any) -> tuple[CpuKernel, Any]:
    """The kernels for the CPU and for the device, of the same plan and images."""
    from fastcifar.kernels.cuda import CudaKernel

    images, labels = noise(count, shape)
    plan = make_plan(shape, count, **options)
    tensors = torch.from_numpy(images).cuda(), torch.from_numpy(labels).cuda()
    return CpuKernel(images, labels, plan), CudaKernel(*tensors, plan)


def equality() -> dict[str, Any]:
    """The CPU kernel's bits over many options, from a resident store and of gathered images."""
    from fastcifar.kernels.cuda import CudaAugment

    wrong, compared = [], 0
    for shape, options in option_sets(24):
        here, there = pair(shape, 200, **options)
        images, labels = noise(200, shape)
        plan = make_plan(shape, 200, **options)
        augment = CudaAugment(shape, plan, torch.device("cuda"))
        for epoch, start, size, capacity in ((0, 0, 195, None), (2**32 - 1, 90, 33, 40), (7, 195, 0, 2)):
            call: dict[str, Any] = {"epoch": epoch, "start": start, "size": size, "capacity": capacity}
            expected = here(**call)
            rows = rows_at(plan, np.arange(start, start + size), epoch)
            gathered = [torch.from_numpy(array).cuda() for array in (images[rows], rows, labels[rows])]
            made = {"resident": there(**call), "gathered": augment(*gathered, epoch=epoch, capacity=capacity)}
            compared += len(made)
            wrong += [{"way": way, "shape": shape, **options, **call} for way, batch in made.items()
                      if not same_bits(batch, expected)]  # fmt: skip
    if wrong:
        raise AssertionError(f"{len(wrong)} of {compared} batches differ, such as {wrong[0]}")
    return {"batches_compared": compared, "batches_that_differ": 0}


def one_launch() -> dict[str, Any]:
    """Everything the device does for a batch, counted by the profiler."""
    from torch.profiler import ProfilerActivity, profile

    _, kernel = pair((32, 32, 3), 5000, crop=4, flip="random")
    kernel(epoch=0, start=0, size=512)
    torch.cuda.synchronize()
    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as profiler:
        for step in range(5):
            kernel(epoch=step, start=512 * step, size=512)
        torch.cuda.synchronize()
    done = Counter(event.name for event in profiler.events() if event.device_type == torch.autograd.DeviceType.CUDA)
    if sum(done.values()) != 5:
        raise AssertionError(f"5 batches took {dict(done)}")
    return {"batches": 5, "launches": dict(done)}


def one_compilation() -> dict[str, Any]:
    """No epoch, position or size compiles the kernel again; and what the compiled ones need."""
    from fastcifar.kernels.cuda_loops import make_batch

    def compiled() -> list[Any]:
        caches = make_batch.device_caches[torch.cuda.current_device()]
        return list(caches[0].values())

    _, kernel = pair((32, 32, 3), 5000, crop=3, flip="random")
    kernel(epoch=0, start=0, size=512)
    before = len(compiled())
    for epoch, start, size in itertools.product((0, 1, 16, 2**32 - 1), (0, 1, 16, 4000), (1, 16, 33)):
        kernel(epoch=epoch, start=start, size=size, capacity=64)
    if len(compiled()) != before:
        raise AssertionError(f"{len(compiled()) - before} compilations within an epoch")
    return {"registers": [kernel.n_regs for kernel in compiled()], "spills": [kernel.n_spills for kernel in compiled()]}


def no_sync(store: str) -> dict[str, Any]:
    """Epochs in which nothing waits for the device, from each placement."""
    done = {}
    for placement in ("device", "host"):
        loader = Loader(open_store(store), device="cuda", batch_size=64, augment=AUGMENT, placement=placement)
        for _ in loader:
            pass
        with no_synchronisation():
            done[placement] = sum(1 for _ in loader)
        torch.cuda.synchronize()
    return {"batches": done}


def graph() -> dict[str, Any]:
    """A captured batch whose position counts on the device, replayed, equals the CPU's, step by step."""
    here, there = pair((32, 32, 3), 1005, crop=4, flip="alternating", cutout=8, order="random")
    part = {"batch_size": 128, "rank": 1, "world_size": 2, "capacity": 64}
    position = torch.tensor([0, 0], device="cuda")
    one = torch.tensor([0, 1], device="cuda")
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        there.at(position, **part)  # Triton compiles before the capture
    torch.cuda.current_stream().wait_stream(side)
    captured = torch.cuda.CUDAGraph()
    with torch.cuda.graph(captured):
        batch = there.at(position, **part)
        position += one
    replays = 0
    for epoch in (3, 2**32 - 1):
        position.copy_(torch.tensor([epoch, 0]))
        for step in range(9):  # 8 are the epoch's, the last of them short; the ninth is all padding
            captured.replay()
            replays += 1
            count = max(min(128, 1000 - 128 * step), 0)
            low = min(128 * step, 1000) + count // 2
            expected = here(epoch=epoch, start=low, size=count - count // 2, capacity=64)
            if not same_bits(batch, expected):
                raise AssertionError(f"epoch {epoch}, step {step} differs")
    return {"replays_equal_to_the_cpu": replays}


def compiled_step(store: str) -> dict[str, Any]:
    """`Loader.batch_at` in a compiled function, without a break."""
    options: dict[str, Any] = {"batch_size": 64, "augment": AUGMENT, "pad_last": True}
    here, there = Loader(open_store(store), **options), Loader(open_store(store), device="cuda", **options)

    def step(position: Tensor) -> tuple[Tensor, Tensor]:
        images, labels = there.batch_at(position)
        return images * 2, labels

    compiled = torch.compile(step, fullgraph=True)
    for number in range(len(there)):
        images, labels = compiled(torch.tensor([1, number], device="cuda"))
        expected = here.batch(1, number)
        if not (torch.equal(images.cpu(), expected.images * 2) and torch.equal(labels.cpu(), expected.labels)):
            raise AssertionError(f"step {number} differs")
    return {"steps_equal_to_the_cpu": len(there)}


def bandwidth() -> dict[str, Any]:
    """Bytes a second of the kernel, beside a copy on the device that moves as many, in turn; and with other warps."""
    from benchmarks.harness import alternate
    from fastcifar.kernels import cuda

    shape, count = (32, 32, 3), 50_000
    images, labels = (torch.from_numpy(array).cuda() for array in noise(count, shape))
    rows = {}
    for batch, dtype in itertools.product((512, 2048, 16384), ("float32", "bfloat16")):
        moved = bytes_moved(shape, batch, dtype)
        launches = launches_for(moved)
        plan = replace(make_plan(shape, count, crop=4, flip="alternating"), dtype=dtype)
        contestants = {}
        for warps, per_warp in {"as chosen": 0, "1 warp": 4096, "2 warps": 2048, "4 warps": 1024}.items():
            with mock.patch.object(cuda, "_PER_WARP", {dtype: per_warp} if per_warp else cuda._PER_WARP):
                kernel = cuda.CudaKernel(images, labels, plan)
            contestants[warps] = timed(lambda kernel=kernel, b=batch: kernel(epoch=1, start=0, size=b), launches)
        source = torch.empty(moved // 2, dtype=torch.uint8, device="cuda")
        target = torch.empty_like(source)
        contestants["copy_"] = timed(lambda a=target, b=source: a.copy_(b), launches)
        raced = without_failures(alternate(contestants, repeats=9, warm_up=2))
        copied = raced["copy_"]["median"]
        rows[f"batch {batch}, {dtype}"] = {
            "bytes": moved,
            "seconds": {name: measured.get("median") for name, measured in raced.items()},
            "interval95": {name: measured.get("interval95") for name, measured in raced.items()},
            "bytes_per_second": moved / raced["as chosen"]["median"],
            "part_of_copy": copied / raced["as chosen"]["median"],
        }
    return rows


def host_time() -> dict[str, Any]:
    """Seconds that the host is busy with one batch of 512."""
    _, kernel = pair((32, 32, 3), 50_005, crop=4, flip="alternating")
    seconds = []
    for _ in range(20):
        torch.cuda.synchronize()
        started = time.perf_counter()
        for step in range(50):
            kernel(epoch=0, start=512 * step, size=512)
        seconds.append((time.perf_counter() - started) / 50)
    return {"seconds_a_batch": float(np.median(seconds))}


def loader_speed() -> dict[str, Any]:
    """Images a second of the loop that users write, over 50,000 random images."""
    from benchmarks.harness import race
    from benchmarks.images import random_store

    with tempfile.TemporaryDirectory() as folder:
        store = random_store(Path(folder))

        def drain(loader: Loader) -> Callable[[], int]:
            def run() -> int:
                count = sum(len(labels) for _, labels in loader)
                torch.cuda.synchronize()
                return count

            return run

        contestants = {
            f"{placement}, {dtype}, batch {batch}": drain(
                Loader(
                    store,
                    device="cuda",
                    batch_size=batch,
                    augment=AUGMENT,
                    dtype=dtype,
                    placement=placement,
                )
            )
            for placement in ("device", "host")
            for dtype in (torch.float32, torch.bfloat16)
            for batch in (512, 2048)
        }
        return without_failures(race(contestants, repeats=7))


def device() -> dict[str, Any]:
    """The device, its driver's and the libraries' versions."""
    import triton

    from benchmarks.harness import receipt

    properties = torch.cuda.get_device_properties(0)
    return {
        **receipt(),
        "device": properties.name,
        "capability": f"sm_{properties.major}{properties.minor}",
        "processors": properties.multi_processor_count,
        "memory_bytes": properties.total_memory,
        "triton": triton.__version__,
        "cudnn": torch.backends.cudnn.version(),
    }


def steps(dataset: str) -> dict[str, Step]:
    """All steps: what takes no times, beside the tests, then the most telling first."""
    tests = OwnTests()
    return {
        "equality": tests.begin(equality),
        "one launch": one_launch,
        "one compilation": one_compilation,
        "no synchronisation": lambda: no_sync("digits"),
        "graph": graph,
        "compiled step": lambda: compiled_step("digits"),
        "tests": tests.end,
        "bandwidth": bandwidth,
        "host time": host_time,
        "loader speed": loader_speed,
        "training, fast": lambda: training("fast", dataset),
        "training, small": lambda: training("small", dataset),
        "training, big": lambda: training("big", dataset),
        "training beside airbench94": lambda: beside_airbench(dataset),
        "seeds side by side, small": lambda: side_by_side("small", dataset),
        "seeds side by side, fast": lambda: side_by_side("fast", dataset),
        "training, small, TrivialAugment": lambda: training("small", dataset, change=("policy=trivial",)),
        "training, fast, operation by operation": lambda: training("fast", dataset, cuda_graphs=False),
        "training, big, compiled": lambda: training("big", dataset, compile="on"),
    }
