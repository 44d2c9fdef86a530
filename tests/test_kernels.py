"""The kernels agree with the reference bit for bit, and hand-computed cases pin the reference itself."""

import gc
import os
import subprocess
import sys
import threading
from dataclasses import replace

import numba
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fastcifar.errors import ConfigError
from fastcifar.kernels import cpu, reference
from fastcifar.kernels.cpu import CpuKernel, HostOrder
from fastcifar.kernels.cpu_words import bfloat16_bits, float16_bits
from fastcifar.kernels.eager import EagerAugment, EagerKernel
from fastcifar.kernels.plan import IGNORE, Plan, rows_at, scale_and_shift
from fastcifar.kernels.rng import draws, permute
from fastcifar.staging import Staged
from tests.effort import effort
from tests.threads import on_threads

SCALINGS = ("raw", "unit", "signed", "standardize")


def one(channels):
    return np.ones(channels, dtype=np.float32)


def make_plan(samples, channels=3, **options):
    return Plan(**{"samples": samples, "scale": one(channels), "shift": 0 * one(channels), **options})


def make_store(count=40, height=8, width=8, channels=3, seed=0):
    random = np.random.default_rng(seed)
    return random.integers(0, 256, (count, height, width, channels), dtype=np.uint8), random.integers(0, 10, count)


def as_float32(tensor):
    return tensor.float().numpy()


def check_kernels(images, labels, plan, **call):
    """All kernels give the reference's bits, type, shape and memory format."""
    expected, expected_labels = reference.batch(images, labels, plan, **call)
    kernels = (
        CpuKernel(images, labels, plan),
        EagerKernel(torch.from_numpy(images), torch.from_numpy(labels), plan),
    )
    for kernel in kernels:
        out, targets = kernel(**call)
        assert out.dtype == getattr(torch, plan.dtype)
        assert targets.dtype == torch.int64
        assert tuple(out.shape) == expected.shape
        memory = torch.channels_last if plan.channels_last else torch.contiguous_format
        assert out.is_contiguous(memory_format=memory) or out.numel() == 0
        # Compared as bits, so that -0.0 is not 0.0.
        got = np.ascontiguousarray(as_float32(out)).view(np.uint32)
        wanted = np.ascontiguousarray(expected.astype(np.float32)).view(np.uint32)
        assert np.array_equal(got, wanted), type(kernel)
        assert np.array_equal(targets.numpy(), expected_labels), type(kernel)
    epoch, start, size = call["epoch"], call["start"], call["size"]
    rows = rows_at(plan, np.arange(start, start + size), epoch)
    assert np.array_equal(HostOrder(plan).rows(epoch, start, size), rows)
    augment = EagerAugment(images.shape[1:], plan, torch.device("cpu"))
    gathered = [torch.from_numpy(np.asarray(array)) for array in (images[rows], rows, labels[rows].astype(np.int64))]
    out, targets = augment(*gathered, epoch=epoch, capacity=call.get("capacity"))
    assert np.array_equal(np.ascontiguousarray(as_float32(out)).view(np.uint32), wanted)
    assert np.array_equal(targets.numpy(), expected_labels)


@st.composite
def cases(draw):
    count = draw(st.integers(1, 50))
    height, width = draw(st.integers(1, 20)), draw(st.integers(1, 36))
    channels = draw(st.sampled_from([1, 3, 3, 2, 4]))
    side = min(height, width)
    samples = draw(st.integers(1, count))
    seed = draw(st.integers(0, 2**64 - 1))
    random = np.random.default_rng(seed)
    padding = draw(st.sampled_from(["reflect", "zero"]))
    scaling = draw(st.sampled_from(SCALINGS))
    scale, shift = scale_and_shift(scaling, random.uniform(0, 255, channels), random.uniform(0.001, 90, channels))
    rows = random.integers(0, count, samples) if draw(st.booleans()) else None
    start = draw(st.integers(0, samples))
    size = draw(st.integers(0, samples - start))
    plan = Plan(
        samples=samples,
        offset=0 if rows is not None else draw(st.integers(0, count - samples)),
        rows=rows,
        seed=seed,
        order=draw(st.sampled_from(["random", "block", "sequential"])),
        block_size=draw(st.integers(1, 12)),
        window=draw(st.integers(1, 4)),
        crop=draw(st.integers(0, side - 1 if padding == "reflect" else side + 3)),
        padding=padding,
        flip=draw(st.sampled_from(["none", "random", "alternating"])),
        cutout=draw(st.one_of(st.just(0), st.integers(0, side))),
        scale=scale,
        shift=shift,
        dtype=draw(st.sampled_from(["float32", "bfloat16", "float16"])),
        channels_last=draw(st.booleans()),
    )
    call = {
        "epoch": draw(st.one_of(st.integers(0, 3), st.integers(0, 2**32 - 1))),
        "start": start,
        "size": size,
        "capacity": draw(st.one_of(st.none(), st.integers(size, size + 3))),
    }
    images, labels = make_store(count, height, width, channels, seed)
    return images, labels.astype(draw(st.sampled_from([np.uint8, np.int32, np.int64]))), plan, call


@given(cases())
@settings(max_examples=effort(150), deadline=None)
def test_kernels_equal_the_reference(case):
    images, labels, plan, call = case
    check_kernels(images, labels, plan, **call)


@pytest.mark.parametrize("channels", [1, 2, 3])
@pytest.mark.parametrize("flip", ["none", "random"])
@pytest.mark.parametrize("padding", ["reflect", "zero"])
def test_wide_shifts_of_real_sizes(channels, flip, padding):
    images, labels = make_store(30, 32, 32, channels)
    plan = make_plan(30, channels, crop=31, padding=padding, flip=flip, cutout=5)
    check_kernels(images, labels, plan, epoch=1, start=0, size=30)
    check_kernels(images, labels, replace(plan, channels_last=False), epoch=1, start=0, size=30)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("scaling", SCALINGS)
def test_all_pixel_values(scaling, dtype):
    images = np.repeat(np.arange(256, dtype=np.uint8), 3).reshape(1, 16, 16, 3)
    scale, shift = scale_and_shift(scaling, np.array([125.3, 123.0, 113.9]), np.array([63.0, 62.1, 66.7]))
    plan = Plan(samples=1, scale=scale, shift=shift, dtype=dtype)
    check_kernels(images, np.zeros(1, dtype=np.int64), plan, epoch=0, start=0, size=1)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("exponent", [-140, -60, -32, -30, -26, -24, -16, -14, 0, 8, 9, 30, 100])
def test_small_and_large_values_round_once(dtype, exponent):
    """Subnormals, ties and overflow; checked against torch's own conversion too."""
    images = np.arange(256, dtype=np.uint8).reshape(1, 16, 16, 1)
    scale = np.float32([1 + 2**-7 + 2**-11]) * np.float32(2.0**exponent)
    plan = Plan(samples=1, scale=scale, shift=-128 * scale, dtype=dtype)
    check_kernels(images, np.zeros(1, dtype=np.int64), plan, epoch=0, start=0, size=1)
    expected = torch.from_numpy(images.astype(np.float32) * scale + plan.shift).to(getattr(torch, dtype)).float()
    out = CpuKernel(images, np.zeros(1), plan)(epoch=0, start=0, size=1)[0]
    assert torch.equal(out.float().flatten(), expected.flatten())


def test_float16_rounds_as_numpy_does_for_every_float16_and_its_neighbours():
    finite = np.arange(2**16, dtype=np.uint16).view(np.float16)
    finite = finite[np.isfinite(finite)].astype(np.float32)
    between = (finite + np.roll(finite, 1)) / 2  # the ties
    values = np.concatenate([finite, between, np.nextafter(between, np.float32(np.inf)), np.float32([65519.9, 65520])])
    values = np.concatenate([values, np.nextafter(between, np.float32(-np.inf)), np.float32([1e9, -1e9, np.inf])])
    out = np.empty(values.size, dtype=np.uint16)

    @numba.njit
    def convert(values, out, kind):
        for i in range(values.size):
            out[i] = float16_bits(values[i]) if kind == 0 else bfloat16_bits(values[i])

    convert(values, out, 0)
    with np.errstate(over="ignore"):
        assert np.array_equal(out, values.astype(np.float16).view(np.uint16))
    convert(values, out, 1)
    assert np.array_equal(out, torch.from_numpy(values).bfloat16().view(torch.uint16).numpy())


# The reference, by hand -------------------------------------------------------------------------------------


def rows_of(plan, epoch, height, width):
    options = {"height": height, "width": width, "crop": plan.crop, "flip": plan.flip, "cutout": plan.cutout}
    return draws(np.arange(plan.samples), seed=plan.seed, epoch=epoch, **options)


def test_reference_copies_where_nothing_is_asked():
    images, labels = make_store(5, 2, 3)
    out, targets = reference.batch(images, labels, make_plan(5, order="sequential"), epoch=0, start=1, size=3)
    assert out.dtype == np.float32
    assert np.array_equal(out, images[1:4].transpose(0, 3, 1, 2))
    assert np.array_equal(targets, labels[1:4])


def test_reference_flips():
    images = np.array([[1, 2, 3], [4, 5, 6]], dtype=np.uint8).reshape(1, 2, 3, 1).repeat(64, axis=0)
    plan = make_plan(64, 1, order="sequential", flip="random", seed=1)
    out, _ = reference.batch(images, np.zeros(64, dtype=np.int64), plan, epoch=0, start=0, size=64)
    flips = rows_of(plan, 0, 2, 3).flip
    assert 16 < flips.sum() < 48
    for image, flip in zip(out, flips, strict=True):
        assert image[0].tolist() == ([[3, 2, 1], [6, 5, 4]] if flip else [[1, 2, 3], [4, 5, 6]])


SHIFTED = {  # of [[1, 2, 3], [4, 5, 6], [7, 8, 9]]: (padding, dy, dx) -> window
    ("zero", -1, 0): [[0, 0, 0], [1, 2, 3], [4, 5, 6]],
    ("zero", 1, 1): [[5, 6, 0], [8, 9, 0], [0, 0, 0]],
    ("reflect", -1, 0): [[4, 5, 6], [1, 2, 3], [4, 5, 6]],
    ("reflect", 0, 1): [[2, 3, 2], [5, 6, 5], [8, 9, 8]],
    ("reflect", 1, -1): [[5, 4, 5], [8, 7, 8], [5, 4, 5]],
}


@pytest.mark.parametrize("padding", ["zero", "reflect"])
def test_reference_crops(padding):
    images = np.arange(1, 10, dtype=np.uint8).reshape(1, 3, 3, 1).repeat(100, axis=0)
    plan = make_plan(100, 1, order="sequential", crop=1, padding=padding, seed=2)
    out, _ = reference.batch(images, np.zeros(100, dtype=np.int64), plan, epoch=0, start=0, size=100)
    drawn = rows_of(plan, 0, 3, 3)
    seen = set()
    for image, dy, dx in zip(out, drawn.dy.tolist(), drawn.dx.tolist(), strict=True):
        if (padding, dy, dx) in SHIFTED:
            seen.add((padding, dy, dx))
            assert image[0].tolist() == SHIFTED[padding, dy, dx]
    assert seen == {key for key in SHIFTED if key[0] == padding}


def test_reference_flips_before_it_crops():
    images = np.array([1, 2, 3], dtype=np.uint8).reshape(1, 1, 3, 1).repeat(60, axis=0)
    plan = make_plan(60, 1, order="sequential", crop=1, padding="zero", flip="random", seed=3)
    out, _ = reference.batch(images, np.zeros(60, dtype=np.int64), plan, epoch=0, start=0, size=60)
    drawn = rows_of(plan, 0, 1, 3)
    chosen = (drawn.dy == 0) & (drawn.dx == 1) & (drawn.flip == 1)
    assert chosen.any()
    assert (out[chosen, 0, 0] == [2, 1, 0]).all()


def test_reference_brings_in_pixel_value_zero_and_cuts_out_to_zero():
    """A zero-padded pixel is scaled, as by torchvision's RandomCrop before Normalize; a cut-out one is not."""
    images = np.full((80, 4, 4, 1), 10, dtype=np.uint8)
    plan = make_plan(80, 1, order="sequential", crop=1, padding="zero", cutout=2, shift=5 * one(1), seed=4)
    out, _ = reference.batch(images, np.zeros(80, dtype=np.int64), plan, epoch=0, start=0, size=80)
    drawn = rows_of(plan, 0, 4, 4)
    assert len(set(zip(drawn.y0.tolist(), drawn.x0.tolist(), strict=True))) == 9
    for image, dy, dx, _, y0, x0 in zip(out[:, 0], *drawn, strict=True):
        expected = np.full((6, 6), 5.0)  # shifted zeros
        expected[1:5, 1:5] = 15.0
        expected = expected[1 + dy : 5 + dy, 1 + dx : 5 + dx].copy()
        expected[y0 : y0 + 2, x0 : x0 + 2] = 0.0
        assert np.array_equal(image, expected)


def test_alternating_flips_alternate():
    images = np.array([1, 2], dtype=np.uint8).reshape(1, 1, 2, 1).repeat(50, axis=0)
    kernel = CpuKernel(images, np.zeros(50), make_plan(50, 1, order="sequential", flip="alternating", seed=5))
    epochs = [kernel(epoch=e, start=0, size=50)[0][:, 0, 0, 0] for e in range(4)]
    assert len(epochs[0].unique()) == 2
    assert torch.equal(epochs[0], epochs[2])
    assert torch.equal(epochs[1], epochs[3])
    assert torch.equal(epochs[0] + epochs[1], torch.full((50,), 3.0))


def test_order_and_rows():
    images, labels = np.zeros((100, 1, 1, 1), dtype=np.uint8), np.arange(100)
    plan = make_plan(30, 1, offset=50, seed=6)
    order = permute(np.arange(30), samples=30, seed=6, epoch=2)
    assert np.array_equal(reference.batch(images, labels, plan, epoch=2, start=0, size=30)[1], order + 50)
    rows = np.arange(99, 39, -2)
    plan = make_plan(30, 1, rows=rows, offset=7, seed=6)  # rows are absolute: no offset
    offset = reference.batch(images, labels, replace(plan, offset=0), epoch=2, start=0, size=30)[1]
    assert np.array_equal(offset, rows[order])


def test_padded_rows():
    images, labels = make_store(10)
    plan = make_plan(10, shift=one(3))
    out, targets = reference.batch(images, labels, plan, epoch=0, start=8, size=2, capacity=5)
    assert out.shape == (5, 3, 8, 8)
    assert (out[:2] >= 1).all()
    assert not out[2:].any()
    assert targets[2:].tolist() == [IGNORE] * 3


# Arithmetic --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("scaling", SCALINGS)
def test_fused_and_unfused_agree(scaling):
    random = np.random.default_rng(0)
    scale, shift = scale_and_shift(scaling, random.uniform(0, 255, 500), random.uniform(0.5, 120, 500))
    pixel = np.arange(256, dtype=np.float32)[:, None]
    unfused = pixel * scale + shift
    fused = (pixel.astype(np.float64) * scale.astype(np.float64) + shift.astype(np.float64)).astype(np.float32)
    assert np.array_equal(pixel * scale, pixel.astype(np.float64) * scale)  # the product is exact
    assert np.array_equal(unfused, fused)


def test_scale_has_16_bits_rounded_half_to_even():
    mean = np.zeros(3)
    scale, _ = scale_and_shift("standardize", mean, 1 / np.array([1 + 2**-16, 1 + 3 * 2**-16, 1 + 2.1 * 2**-16]))
    assert scale.tolist() == [1.0, 1 + 2**-14, 1 + 2**-15]


def test_scalings():
    mean, std = np.array([100.0, 50.0]), np.array([50.0, 25.0])
    for scaling, low, high in (("raw", 0, 255), ("unit", 0, 1), ("signed", -1, 1)):
        scale, shift = scale_and_shift(scaling, mean, std)
        assert scale.dtype == shift.dtype == np.float32
        assert shift == pytest.approx([low] * 2)
        assert 255 * scale + shift == pytest.approx([high] * 2, abs=4e-5)
    scale, shift = scale_and_shift("standardize", mean, std)
    assert (mean * scale + shift == 0).all()
    assert (mean + std) * scale + shift == pytest.approx([1, 1], abs=4e-5)
    with pytest.raises(ConfigError, match="half"):
        scale_and_shift("half", mean, std)
    with pytest.raises(ConfigError, match="channel 1 is the same in all training images: choose another, such as unit"):
        scale_and_shift("standardize", mean, std * [1, 0])
    with pytest.raises(ConfigError, match="positive deviations"):
        scale_and_shift("standardize", mean, np.nan * std)


# Refusals ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "word"),
    [
        ({"crop": 8}, "crop"),
        ({"crop": -1}, "crop"),
        ({"cutout": 9}, "cutout"),
        ({"samples": 41}, "reach past 40"),
        ({"samples": 0}, "no images"),
        ({"offset": 1}, "reach past 40"),
        ({"offset": -1}, "offset"),
        ({"seed": 2**64}, "seed"),
        ({"flip": "vertical"}, "flip"),
        ({"padding": "wrap"}, "padding"),
        ({"order": "shuffled"}, "order"),
        ({"dtype": "float64"}, "dtype"),
        ({"rows": np.arange(39)}, "rows"),
        ({"rows": np.full(40, 40)}, "rows"),
        ({"rows": np.full(40, -1)}, "rows"),
        ({"scale": one(1)}, "scale"),
        ({"shift": np.full(3, np.nan, dtype=np.float32)}, "shift"),
    ],
)
def test_a_plan_that_does_not_fit_is_refused(options, word):
    images, labels = make_store()
    for make in (CpuKernel, lambda *a: reference.batch(*a, epoch=0, start=0, size=1)):
        with pytest.raises(ConfigError, match=word):
            make(images, labels, make_plan(**{"samples": 40, **options}))
    with pytest.raises(ConfigError, match=word):
        EagerKernel(torch.from_numpy(images), torch.from_numpy(labels), make_plan(**{"samples": 40, **options}))


@pytest.mark.parametrize("side", [32, 31], ids=["whole vectors", "odd ends"])
@pytest.mark.parametrize("channels_last", [True, False])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_a_batch_that_is_written_past_the_cache_is_that_of_small_ones(dtype, channels_last, side, monkeypatch):
    monkeypatch.setattr(cpu, "_cached", lambda: 1 << 20)
    images, labels = make_store(800, side, side)
    scale, shift = scale_and_shift("standardize", np.array([90.0, 120.0, 150.0]), np.array([50.0, 60.0, 70.0]))
    options = {"scale": scale, "shift": shift, "dtype": dtype, "channels_last": channels_last}
    kernel = CpuKernel(images, labels, make_plan(800, crop=2, flip="random", cutout=5, seed=3, **options))
    whole, targets = kernel(epoch=1, start=0, size=800)
    assert whole.nbytes > 1 << 20
    for start in range(0, 800, 40):
        part, part_targets = kernel(epoch=1, start=start, size=40)
        assert part.nbytes < 1 << 20
        bits, of_whole = (
            np.ascontiguousarray(as_float32(x)).view(np.uint32) for x in (part, whole[start : start + 40])
        )
        assert np.array_equal(bits, of_whole)
        assert torch.equal(part_targets, targets[start : start + 40])


@pytest.mark.parametrize(
    "call",
    [
        {"epoch": -1, "start": 0, "size": 1},
        {"epoch": 2**32, "start": 0, "size": 1},
        {"epoch": 0, "start": -1, "size": 1},
        {"epoch": 0, "start": 0, "size": -1},
        {"epoch": 0, "start": 39, "size": 2},
        {"epoch": 0, "start": 0, "size": 4, "capacity": 3},
    ],
)
def test_positions_outside_the_epoch_are_refused(call):
    images, labels = make_store()
    plan = make_plan(40)
    for kernel in (CpuKernel(images, labels, plan), EagerKernel(torch.tensor(images), torch.tensor(labels), plan)):
        with pytest.raises(ValueError, match=r"must be|not within"):
            kernel(**call)


def test_the_cpu_kernel_refuses_other_memory():
    images, labels = make_store()
    for wrong in (images[:, ::-1], images.astype(np.int16)):
        with pytest.raises(ValueError, match="uint8 in C order"):
            CpuKernel(wrong, labels, make_plan(40))
    with pytest.raises(ConfigError, match="with 39"):
        CpuKernel(images, labels[:39], make_plan(40))


# The CPU kernel's buffers and threads ------------------------------------------------------------------------


def test_a_read_only_map(tmp_path):
    images, labels = make_store(33, 7, 5)
    np.save(tmp_path / "images.npy", images)
    plan = make_plan(33, crop=3, flip="random")
    mapped = CpuKernel(np.load(tmp_path / "images.npy", mmap_mode="r"), labels, plan)
    expected, _ = reference.batch(images, labels, plan, epoch=0, start=0, size=33)
    assert np.array_equal(mapped(epoch=0, start=0, size=33)[0].numpy(), expected)


HOLDERS = {
    "tensor": lambda x: x,
    "view": lambda x: x[3:5],
    "one element": lambda x: x[0, 0, 0],
    "numpy": lambda x: x.view(torch.int32 if x.element_size() == 4 else torch.int16).numpy(),
    "detached": lambda x: x.detach(),
    "storage": lambda x: x.untyped_storage(),
}


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
@pytest.mark.parametrize("holder", HOLDERS)
def test_a_batch_is_not_overwritten_while_it_is_held(holder, dtype):
    images, labels = make_store(64)
    kernel = CpuKernel(images, labels, make_plan(64, flip="random", dtype=dtype))
    out = kernel(epoch=0, start=0, size=16)[0]
    address, before = out.data_ptr(), out.clone()
    held = HOLDERS[holder](out)
    del out
    for epoch in range(12):
        assert kernel(epoch=epoch, start=16, size=16)[0].data_ptr() != address
    expected = HOLDERS[holder](before)
    if holder == "storage":
        held, expected = (torch.empty(0, dtype=torch.uint8).set_(storage) for storage in (held, expected))
    assert torch.equal(torch.as_tensor(held), torch.as_tensor(expected))


def test_a_batch_saved_for_backward_is_not_overwritten():
    images, labels = make_store(64)
    kernel = CpuKernel(images, labels, make_plan(64))
    weight = torch.ones(3, 1, 1, requires_grad=True)
    out = kernel(epoch=0, start=0, size=16)[0]
    expected = out.sum(dim=(0, 2, 3))
    loss = (out * weight).sum()
    del out
    for epoch in range(8):
        kernel(epoch=epoch, start=16, size=16)
    loss.backward()
    assert torch.equal(weight.grad.flatten(), expected)


def test_buffers_are_used_again_and_few_are_kept():
    images, labels = make_store(64)
    kernel = CpuKernel(images, labels, make_plan(64))
    addresses = {kernel(epoch=e, start=0, size=32)[0].data_ptr() for e in range(50)}
    assert len(addresses) <= 3  # a helper thread may hold the last one a moment longer
    held = [kernel(epoch=0, start=0, size=32)[0] for _ in range(30)]
    assert len({out.data_ptr() for out in held}) == 30
    assert len(kernel._buffers) <= 4
    for out in held[1:]:
        assert torch.equal(out, held[0])


def run_many(kernel, expected, failures):
    for _ in range(50):
        if not torch.equal(kernel(epoch=1, start=0, size=200)[0], expected):
            failures.append("differs")


def test_calls_from_several_threads():
    images, labels = make_store(200, 16, 16)
    kernel = CpuKernel(images, labels, make_plan(200, crop=4, flip="random"))
    expected = torch.from_numpy(reference.batch(images, labels, kernel._plan, epoch=1, start=0, size=200)[0])
    failures = []
    threads = [threading.Thread(target=run_many, args=(kernel, expected, failures)) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert failures == []


@pytest.mark.parametrize("threads", [1, 2, 5])
def test_the_number_of_threads_changes_nothing(threads):
    images, labels = make_store(300, 16, 16)
    kernel = CpuKernel(images, labels, make_plan(300, crop=4, flip="random"))
    with on_threads(threads):
        outs = [kernel(epoch=1, start=0, size=300)[0] for _ in range(20)]
    expected = torch.from_numpy(reference.batch(images, labels, kernel._plan, epoch=1, start=0, size=300)[0])
    assert all(torch.equal(out, expected) for out in outs)


def kernel_threads():
    return [thread for thread in threading.enumerate() if thread.name == "fastcifar-kernel"]


def test_threads_end_with_the_last_kernel():
    gc.collect()
    images, labels = make_store(300)
    with on_threads(3):
        kernel = CpuKernel(images, labels, make_plan(300))
        kernel(epoch=0, start=0, size=300)
    threads = kernel_threads()
    assert len(threads) >= 2
    del kernel
    gc.collect()
    for thread in threads:
        thread.join(5)
    assert kernel_threads() == []


def test_a_loop_that_is_dropped_ends_while_another_posts():
    """The garbage collector may end it at any moment: while this very thread is in the team's `post` or `retire`."""
    images, labels = make_store(300)
    with on_threads(2):
        kernel, dropped = (CpuKernel(images, labels, make_plan(300)) for _ in range(2))
        expected = kernel(epoch=0, start=0, size=300)[0].clone()
        team = kernel._team
        assert dropped._team is team
        slot = team._slot
        for name in ("post", "leave"):
            called = getattr(slot, name)

            def collecting(*arguments, called=called):
                dropped.forget()
                return called(*arguments)

            dropped.prepare(epoch=0, start=0, size=300)
            setattr(slot, name, collecting)
            assert torch.equal(kernel(epoch=0, start=0, size=300)[0], expected)
            setattr(slot, name, called)
            assert not team._retired
            assert slot.posted is None


def test_a_batch_is_made_where_no_thread_can_be_started(monkeypatch):
    def refuse(thread):
        raise RuntimeError("can't start new thread")

    gc.collect()  # helpers that are there end with the last kernel
    images, labels = make_store(300)
    plan = make_plan(300)
    expected, _ = reference.batch(images, labels, plan, epoch=0, start=0, size=300)
    monkeypatch.setattr(threading.Thread, "start", refuse)
    with on_threads(4):
        kernel = CpuKernel(images, labels, plan)
        assert np.array_equal(kernel(epoch=0, start=0, size=300)[0].numpy(), expected)


@pytest.mark.parametrize("default", ["meta", torch.float64])
def test_a_users_defaults_change_nothing(default):
    images, labels = make_store(300)
    plan = make_plan(300)
    expected, _ = reference.batch(images, labels, plan, epoch=0, start=0, size=300)
    kernel = CpuKernel(images, labels, plan)
    staged = Staged(images, labels, plan, EagerAugment((8, 8, 3), plan, torch.device("cpu")), torch.device("cpu"))
    try:
        torch.set_default_device(default if default == "meta" else None)
        torch.set_default_dtype(torch.float32 if default == "meta" else default)
        found = [each(epoch=0, start=0, size=300) for each in (kernel, staged)]
    finally:
        torch.set_default_device(None)
        torch.set_default_dtype(torch.float32)
    for out, targets in found:
        assert np.array_equal(out.numpy(), expected)
        assert targets.dtype == torch.int64


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_a_forked_child_can_use_the_kernel():
    """In a process of its own: other tests' threads make forking unsafe."""
    code = """
import os, numpy as np, torch
from fastcifar.kernels.cpu import CpuKernel, HostOrder
from fastcifar.kernels.plan import Plan
torch.set_num_threads(2)
images = np.random.default_rng(0).integers(0, 256, (300, 16, 16, 3), dtype=np.uint8)
plan = Plan(samples=300, crop=4, flip="random", scale=np.ones(3, np.float32), shift=np.zeros(3, np.float32))
kernel = CpuKernel(images, np.zeros(300), plan)
expected = kernel(epoch=0, start=0, size=300)[0].numpy().copy()
child = os.fork()
if child == 0:
    same = all((kernel(epoch=0, start=0, size=300)[0].numpy() == expected).all() for _ in range(20))
    os._exit(0 if same else 3)
assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
assert (kernel(epoch=0, start=0, size=300)[0].numpy() == expected).all()
"""
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)
