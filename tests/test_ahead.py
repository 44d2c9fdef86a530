"""Batches that helper threads begin before they are asked for: the same bits, nothing overwritten, nothing left."""

import gc
import os
import subprocess
import sys
import threading
import weakref

import numpy as np
import pytest
import torch

from fastcifar import Augment, Loader
from fastcifar.data.arrays import convert_arrays
from fastcifar.kernels import cpu, reference
from fastcifar.kernels.cpu import CpuKernel
from tests.test_kernels import make_plan, make_store
from tests.threads import on_threads


@pytest.fixture(autouse=True)
def _three_threads():
    with on_threads(3):
        yield


def make_kernel(count=200, **options):
    images, labels = make_store(count, 16, 16)
    plan = make_plan(count, crop=4, flip="random", **options)

    def expected(epoch, start, size):
        return torch.from_numpy(reference.batch(images, labels, plan, epoch=epoch, start=start, size=size)[0])

    return CpuKernel(images, labels, plan), expected


def test_a_batch_begun_is_the_batch():
    kernel, expected = make_kernel()
    held = []
    for epoch in range(5):
        for start in range(0, 200, 50):
            out, targets = kernel(epoch=epoch, start=start, size=50)
            if start < 150:
                kernel.prepare(epoch=epoch, start=start + 50, size=50)
            held.append((out, epoch, start))
            assert len(targets) == 50
    for out, epoch, start in held:  # none was written again
        assert torch.equal(out, expected(epoch, start, 50))


def test_a_batch_begun_and_not_wanted():
    kernel, expected = make_kernel()
    for number in range(50):
        kernel.prepare(epoch=0, start=number % 4 * 50, size=50)
        if number % 3 == 0:
            kernel.forget()
        assert torch.equal(kernel(epoch=1, start=100, size=60)[0], expected(1, 100, 60))
    assert torch.equal(kernel(epoch=1, start=0, size=60, capacity=70)[0][:60], expected(1, 0, 60))


def test_kernels_take_each_others_helpers():
    pairs = [make_kernel(seed=seed) for seed in (1, 2, 3)]
    for start in range(0, 150, 50):
        for kernel, expected in pairs:
            assert torch.equal(kernel(epoch=0, start=start, size=50)[0], expected(0, start, 50))
            kernel.prepare(epoch=0, start=start + 50, size=50)


def test_several_threads_take_what_one_of_them_began():
    kernel, expected = make_kernel()
    wanted = expected(0, 0, 200)
    kept, failures = [], []

    def run():
        for _ in range(50):
            kernel.prepare(epoch=0, start=0, size=200)
            out = kernel(epoch=0, start=0, size=200)[0]
            kept.append(out)
            if not torch.equal(out, wanted):
                failures.append("differs")
            kernel.forget()

    threads = [threading.Thread(target=run) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert failures == []
    assert len({out.data_ptr() for out in kept}) == len(kept) == 200  # no batch was given twice


def test_no_job_is_kept_when_it_is_over():
    kernel, _ = make_kernel()
    slot = kernel._team._slot
    for _ in range(100):
        kernel.prepare(epoch=0, start=0, size=200)
        kernel(epoch=0, start=0, size=200)
    kernel.prepare(epoch=0, start=0, size=200)
    kernel.forget()
    assert slot.posted is None
    assert len(slot.lingering) <= 2  # one for each helper
    for _ in range(3):
        kernel(epoch=0, start=0, size=40)
    assert all(job.words[4] == 40 for job in slot.lingering)


def test_a_large_batch_is_not_begun(monkeypatch):
    monkeypatch.setattr(cpu, "_cached", lambda: 50 * 16 * 16 * 3 * 4)
    kernel, _ = make_kernel()
    kernel.prepare(epoch=0, start=0, size=51)
    assert kernel._ahead == []
    kernel.prepare(epoch=0, start=0, size=50)
    assert len(kernel._ahead) == 1


def test_a_loader_begins_the_next_batch_and_lets_go_of_it(tmp_path):
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (200, 16, 16, 3), dtype=np.uint8)
    store = convert_arrays(tmp_path / "store", images, rng.integers(0, 3, 200), splits={"train": slice(0, 200)})
    loader = Loader(store, split="train", batch_size=50, augment=Augment(crop=2, flip="random"))
    kernel = loader._pipeline._source
    expected = [loader.batch(0, step).images for step in range(4)]
    for step, (images, _) in enumerate(loader):
        assert len(kernel._ahead) == (step < 3)
        assert torch.equal(images, expected[step])
    for _ in loader:
        break
    gc.collect()
    assert kernel._ahead == []


def test_a_kernel_that_goes_takes_its_batch_along():
    kernel, _ = make_kernel()
    kernel.prepare(epoch=0, start=0, size=200)
    buffer = weakref.ref(kernel._buffers[0][0])
    del kernel
    other, expected = make_kernel(seed=4)
    assert torch.equal(other(epoch=0, start=0, size=200)[0], expected(0, 0, 200))
    other(epoch=0, start=0, size=200)
    gc.collect()
    assert buffer() is None


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_a_forked_child_makes_its_own():
    """In a process of its own: other tests' threads make forking unsafe."""
    code = """
import os, signal, time, numpy as np, torch
from fastcifar.kernels.cpu import CpuKernel
from fastcifar.kernels.cpu_fields import CAME, MADE
from fastcifar.kernels.plan import Plan
torch.set_num_threads(2)
images = np.random.default_rng(0).integers(0, 256, (60_000, 16, 16, 3), dtype=np.uint8)
plan = Plan(samples=60_000, crop=4, flip="random", scale=np.ones(3, np.float32), shift=np.zeros(3, np.float32),
            dtype="bfloat16")
kernel = CpuKernel(images, np.zeros(60_000), plan)
kernel._most_ahead = 60_000
expected = kernel(epoch=0, start=0, size=60_000)[0].view(torch.int16).numpy().copy()
in_time = 0
for _ in range(100):
    kernel.prepare(epoch=0, start=0, size=60_000)
    words = kernel._ahead[0][0].job.words
    while words[CAME] == 0:
        pass
    child = os.fork()  # a helper is at it
    if child == 0:
        unfinished = words[MADE] < 60_000  # else the machine was busy elsewhere meanwhile
        signal.alarm(60)
        right = (kernel(epoch=0, start=0, size=60_000)[0].view(torch.int16).numpy() == expected).all()
        os._exit((3 if unfinished else 4) if right else 1)
    status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    assert status in (3, 4), status
    in_time += status == 3
    assert (kernel(epoch=0, start=0, size=60_000)[0].view(torch.int16).numpy() == expected).all()
    if in_time == 5:
        break
assert in_time
"""
    subprocess.run([sys.executable, "-c", code], check=True, timeout=100)


def test_helpers_end_before_python_does():
    """One that comes back from native code while Python ends aborts the process."""
    code = """
import atexit, threading
atexit.register(lambda: print([thread.name for thread in threading.enumerate()]))  # the first one runs last
import numpy as np, torch
from fastcifar.kernels import threads
from fastcifar.kernels.cpu import CpuKernel
from fastcifar.kernels.plan import Plan
threads._WATCH = 10**10  # half a minute in native code after a batch, but for being told to end
torch.set_num_threads(3)
images = np.zeros((500, 16, 16, 3), dtype=np.uint8)
plan = Plan(samples=500, scale=np.ones(3, np.float32), shift=np.zeros(3, np.float32))
kernel = CpuKernel(images, np.zeros(500), plan)
kernel(epoch=0, start=0, size=500)
assert sum(thread.name == "fastcifar-kernel" for thread in threading.enumerate()) == 2
"""
    out = subprocess.run(
        [sys.executable, "-c", code], check=True, timeout=100, stdout=subprocess.PIPE, text=True
    ).stdout
    assert out.strip() == "['MainThread']"
