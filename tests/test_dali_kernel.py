"""The DALI kernel gives the reference's bits, in any order of calls, and leaves nothing behind."""

import gc
import os
import subprocess
import sys
import threading
import time
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fastcifar.errors import ConfigError
from fastcifar.kernels import reference
from fastcifar.kernels.plan import IGNORE, scale_and_shift
from tests.effort import effort
from tests.test_kernels import SCALINGS, cases, make_plan, make_store

try:
    from fastcifar.kernels import dali
    from fastcifar.kernels.dali import DaliKernel
except ConfigError as error:
    ABSENT = str(error)
else:
    ABSENT = ""

needs_dali = pytest.mark.skipif(bool(ABSENT), reason=ABSENT)
FULL = {"crop": 4, "flip": "random", "cutout": 3}


def as_bits(values):
    return np.ascontiguousarray(values, dtype=np.float32).view(np.uint32)  # so that -0.0 is not 0.0


def check(kernel, images, labels, plan, **call):
    expected, expected_labels = reference.batch(images, labels, plan, **call)
    out, targets = kernel(**call)
    assert out.dtype == getattr(torch, plan.dtype)
    assert targets.dtype == torch.int64
    assert tuple(out.shape) == expected.shape
    memory = torch.channels_last if plan.channels_last else torch.contiguous_format
    assert out.is_contiguous(memory_format=memory) or out.numel() == 0
    assert np.array_equal(as_bits(out.float().cpu().numpy()), as_bits(expected))
    assert np.array_equal(targets.cpu().numpy(), expected_labels)


def check_plan_of(images, labels, plan, **call):
    check(DaliKernel(images, labels, plan), images, labels, plan, **call)


def dali_threads():
    names = []
    for task in Path("/proc/self/task").iterdir():
        with suppress(OSError):  # it has just ended
            names.append((task / "comm").read_text())
    return sum(name.startswith("[DALI]") for name in names)


def settles(condition):
    """Whether it comes true soon: a thread takes a moment to name itself, and to end."""
    deadline = time.monotonic() + 10
    while not condition() and time.monotonic() < deadline:
        time.sleep(0.01)
    return condition()


def run_python(code):
    """Standard output and error of a new process."""
    done = subprocess.run([sys.executable, "-W", "always", "-c", code], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    return done.stdout, done.stderr


# The reference's bits ----------------------------------------------------------------------------------------


@needs_dali
@given(cases())
@settings(max_examples=effort(150), deadline=None)
def test_equals_the_reference(case):
    images, labels, plan, call = case
    check_plan_of(images, labels, plan, **call)


@needs_dali
@pytest.mark.parametrize("channels", [1, 2, 3, 4])
@pytest.mark.parametrize("crop", [4, 10, 11, 31])  # in one filter up to 10, in two from 11
@pytest.mark.parametrize("padding", ["reflect", "zero"])
def test_shifts_of_real_sizes(channels, crop, padding):
    images, labels = make_store(64, 32, 32, channels)
    plan = make_plan(64, channels, **{**FULL, "crop": crop, "padding": padding})
    check_plan_of(images, labels, plan, epoch=1, start=0, size=64)
    check_plan_of(images, labels, replace(plan, channels_last=False), epoch=1, start=0, size=64)


@needs_dali
@pytest.mark.parametrize("crop", [8, 9, 40, 300])
@pytest.mark.parametrize(("height", "width"), [(8, 8), (5, 17), (1, 1)])
def test_zeros_shifted_in_past_the_whole_image(crop, height, width):
    images, labels = make_store(60, height, width, 3)
    plan = make_plan(60, crop=crop, padding="zero", flip="random", shift=np.float32([1, 2, 3]))
    check_plan_of(images, labels, plan, epoch=0, start=0, size=60)


@needs_dali
def test_reflected_past_the_taps_that_opencv_adds_one_by_one():
    images, labels = make_store(40, 150, 140, 1)
    check_plan_of(images, labels, make_plan(40, 1, crop=139, flip="random"), epoch=0, start=0, size=40)


@needs_dali
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("scaling", SCALINGS)
def test_all_pixel_values(scaling, dtype):
    images = np.repeat(np.arange(256, dtype=np.uint8), 3).reshape(1, 16, 16, 3)
    scale, shift = scale_and_shift(scaling, np.array([125.3, 123.0, 113.9]), np.array([63.0, 62.1, 66.7]))
    plan = make_plan(1, scale=scale, shift=shift, dtype=dtype)
    check_plan_of(images, np.zeros(1, dtype=np.int64), plan, epoch=0, start=0, size=1)


@needs_dali
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("exponent", [-140, -60, -32, -30, -26, -24, -16, -14, 0, 8, 9, 30, 100])
def test_small_and_large_values_round_once(dtype, exponent):
    images = np.arange(256, dtype=np.uint8).reshape(1, 16, 16, 1)
    scale = np.float32([1 + 2**-7 + 2**-11]) * np.float32(2.0**exponent)
    plan = make_plan(1, 1, scale=scale, shift=-128 * scale, dtype=dtype)
    check_plan_of(images, np.zeros(1, dtype=np.int64), plan, epoch=0, start=0, size=1)


@needs_dali
@pytest.mark.parametrize("order", ["random", "block", "sequential"])
@settings(max_examples=effort(8), deadline=None)
@given(
    calls=st.lists(
        st.tuples(st.integers(0, 3), st.integers(0, 200), st.integers(0, 200), st.integers(0, 9)),
        min_size=2,
        max_size=8,
    )
)
def test_one_kernel_gives_any_batch_in_any_order(order, calls):
    images, labels = make_store(200, 6, 7)
    plan = make_plan(200, order=order, block_size=16, window=3, **FULL)
    kernel = DaliKernel(images, labels, plan)
    for epoch, a, b, extra in calls:
        start, stop = sorted((a, b))
        capacity = stop - start + extra if extra else None
        check(kernel, images, labels, plan, epoch=epoch, start=start, size=stop - start, capacity=capacity)


@needs_dali
def test_growing_sizes_make_few_pipelines(monkeypatch):
    made = []
    build = dali.DaliKernel._build
    monkeypatch.setattr(dali.DaliKernel, "_build", lambda self, size: made.append(size) or build(self, size))
    images, labels = make_store(100, 4, 4)
    kernel = DaliKernel(images, labels, make_plan(100))
    for size in (*range(1, 101), *range(100, 0, -1)):
        kernel(epoch=0, start=0, size=size)
    assert made == [1, 2, 3, 5, 9, 17, 33, 65]


@needs_dali
def test_padded_rows():
    images, labels = make_store(10)
    plan = make_plan(10, shift=np.ones(3, dtype=np.float32))
    kernel = DaliKernel(images, labels, plan)
    out, targets = kernel(epoch=0, start=8, size=2, capacity=5)
    assert (out[:2] >= 1).all()
    assert not out[2:].any()
    assert targets[2:].tolist() == [IGNORE] * 3
    out, targets = kernel(epoch=0, start=10, size=0, capacity=2)
    assert not out.any()
    assert targets.tolist() == [IGNORE] * 2


@needs_dali
def test_maps_and_views(tmp_path):
    images, labels = make_store(33, 7, 5)
    np.save(tmp_path / "images.npy", images)
    plan = make_plan(33, crop=3, flip="random")
    mapped = np.load(tmp_path / "images.npy", mmap_mode="r")
    for other in (mapped, images[:, ::-1], images.transpose(0, 2, 1, 3)):
        check_plan_of(other, labels, plan, epoch=0, start=0, size=33)


@needs_dali
def test_a_batch_is_not_overwritten():
    images, labels = make_store(64)
    kernel = DaliKernel(images, labels, make_plan(64, **FULL))
    out, _ = kernel(epoch=0, start=0, size=16)
    before = out.clone()
    for epoch in range(6):
        kernel(epoch=epoch, start=16, size=16)
    assert torch.equal(out, before)


# Refusals ----------------------------------------------------------------------------------------------------


@needs_dali
@pytest.mark.parametrize(
    ("call", "message"),
    [
        ({"epoch": -1, "start": 0, "size": 1}, "epoch must be"),
        ({"epoch": 0, "start": 39, "size": 2}, "not within"),
        ({"epoch": 0, "start": 0, "size": 4, "capacity": 3}, "size must be"),
    ],
)
def test_positions_outside_the_epoch_are_refused(call, message):
    images, labels = make_store()
    with pytest.raises(ValueError, match=message):
        DaliKernel(images, labels, make_plan(40))(**call)


@needs_dali
def test_what_does_not_fit_is_refused():
    images, labels = make_store()
    with pytest.raises(ConfigError, match="crop"):
        DaliKernel(images, labels, make_plan(40, crop=8))
    with pytest.raises(ValueError, match="must be uint8"):
        DaliKernel(images.astype(np.int16), labels, make_plan(40))
    for device_id in (torch.cuda.device_count(), -1):
        with pytest.raises(ConfigError, match="device_id must be None or"):
            DaliKernel(images, labels, make_plan(40), device_id=device_id)


def test_without_dali_one_line_says_what_to_install():
    out, _ = run_python("""
import sys
sys.modules["nvidia.dali"] = None
from fastcifar.errors import ConfigError
try:
    import fastcifar.kernels.dali
except ConfigError as error:
    print(error)
""")
    assert out == "backend 'dali' needs NVIDIA DALI, on Linux: pip install 'fastcifar[dali]'\n"


@needs_dali
@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_a_forked_child_is_told_to_make_its_own():
    """In a process of its own: other tests' threads make forking unsafe."""
    out, _ = run_python("""
import os
from tests.test_dali_kernel import DaliKernel, make_plan, make_store
images, labels = make_store(8, 4, 4)
kernel = DaliKernel(images, labels, make_plan(8))
kernel(epoch=0, start=0, size=8)
if os.fork() == 0:
    try:
        kernel(epoch=0, start=0, size=8)
    except RuntimeError as error:
        print(error, flush=True)
    assert DaliKernel(images, labels, make_plan(8))(epoch=0, start=0, size=8)[0].shape == (8, 3, 4, 4)
    os._exit(0)
assert os.wait()[1] == 0
""")
    assert out == "this DaliKernel was made before a fork: make one in the child\n"


# Nothing behind ----------------------------------------------------------------------------------------------


@needs_dali
@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without CUDA")
def test_says_nothing_where_there_is_no_gpu():
    out, err = run_python("""
import os, random, numpy, torch
before = random.getstate(), numpy.random.get_state()[1].tolist(), torch.get_rng_state().tolist(), dict(os.environ)
from fastcifar.kernels.dali import DaliKernel
from tests.test_kernels import make_plan, make_store
images, labels = make_store(8, 8, 8)
DaliKernel(images, labels, make_plan(8, crop=4, flip="random", cutout=3))(epoch=0, start=0, size=8)
after = random.getstate(), numpy.random.get_state()[1].tolist(), torch.get_rng_state().tolist(), dict(os.environ)
assert before == after
""")
    assert out + err == ""


@needs_dali
@pytest.mark.parametrize("failing", ["feed_input", "run"])
def test_an_interrupted_call_leaves_no_input_behind(failing, monkeypatch):
    images, labels = make_store(64)
    plan = make_plan(64, **FULL)
    gc.collect()
    before = dali_threads()
    kernel = DaliKernel(images, labels, plan)
    check(kernel, images, labels, plan, epoch=0, start=0, size=16)
    real = getattr(dali.Pipeline, failing)
    calls = []

    def interrupted(self, *values):
        calls.append(values)
        if len(calls) == (3 if failing == "feed_input" else 1):
            raise KeyboardInterrupt
        return real(self, *values)

    monkeypatch.setattr(dali.Pipeline, failing, interrupted)
    with pytest.raises(KeyboardInterrupt):
        kernel(epoch=0, start=16, size=16)
    monkeypatch.undo()
    gc.collect()
    assert settles(lambda: dali_threads() == before)  # the pipeline is gone with what it held
    check(kernel, images, labels, plan, epoch=0, start=32, size=16)


@needs_dali
def test_threads_end_with_the_kernel():
    images, labels = make_store(300)
    plan = make_plan(300, **FULL)
    gc.collect()
    before = dali_threads()
    kernel = DaliKernel(images, labels, plan)
    batches = (kernel(epoch=0, start=start, size=10) for start in range(0, 300, 10))
    for _ in batches:
        break
    assert settles(lambda: dali_threads() > before)
    del kernel, batches
    assert settles(lambda: dali_threads() == before)


def resident():
    with open("/proc/self/statm", encoding="ascii") as pages:
        return int(pages.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")


@needs_dali
def test_memory_ends_with_the_kernel():
    images, labels = make_store(512, 32, 32)
    plan = make_plan(512, **FULL)
    for i in range(30):
        DaliKernel(images, labels, plan)(epoch=0, start=0, size=512)
        if i == 5:
            before = resident()
    # one pipeline has some 20 MB, 24 of them 480; the allocator keeps some tens of what ends
    assert resident() - before < 160e6


def run_many(kernel, expected, failures):
    for _ in range(20):
        if not torch.equal(kernel(epoch=1, start=0, size=100)[0], expected):
            failures.append("differs")


@needs_dali
def test_calls_from_several_threads():
    images, labels = make_store(100)
    kernel = DaliKernel(images, labels, make_plan(100, **FULL))
    expected = torch.from_numpy(reference.batch(images, labels, kernel._plan, epoch=1, start=0, size=100)[0])
    failures = []
    callers = [threading.Thread(target=run_many, args=(kernel, expected, failures)) for _ in range(4)]
    for caller in callers:
        caller.start()
    for caller in callers:
        caller.join()
    assert failures == []
    assert len(kernel._idle) <= 4


# A GPU -------------------------------------------------------------------------------------------------------


@needs_dali
@pytest.mark.parametrize("channels_last", [True, False])
def test_the_pipeline_of_a_gpu_can_be_put_together(channels_last, monkeypatch):
    """DALI checks the arguments and where they lie as it puts a pipeline together; building it needs the device."""
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(dali.Pipeline, "build", lambda self: None)
    images, labels = make_store()
    plan = make_plan(40, crop=3, flip="random", cutout=2, channels_last=channels_last)
    pipeline = DaliKernel(images, labels, plan, device_id=0)._build(40)
    assert pipeline.device_id == 0


@needs_dali
@pytest.mark.cuda
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("crop", [0, 4, 31])
def test_a_gpu_gives_the_same_bits(crop, dtype):
    images, labels = make_store(300, 32, 32)
    for channels_last in (True, False):
        plan = make_plan(300, **{**FULL, "crop": crop, "dtype": dtype, "channels_last": channels_last})
        kernel = DaliKernel(images, labels, plan, device_id=0)
        for size in (300, 17):
            check(kernel, images, labels, plan, epoch=1, start=0, size=size, capacity=300)
