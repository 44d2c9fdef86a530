"""The Triton kernel without a GPU: its interpreter gives the reference's bits, its compiler gives code for GPUs.

The interpreter is chosen where a kernel is declared. So the modules are imported a second time under it, beside those
that all else in this process uses, and nothing of it stays.
"""

import importlib
import inspect
import re
import subprocess
import sys
from collections import Counter
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings

import fastcifar.kernels
from fastcifar import Augment, Loader, convert_arrays
from fastcifar.errors import ConfigError
from fastcifar.kernels import reference
from fastcifar.kernels.eager import EagerAugment
from fastcifar.kernels.plan import IGNORE, Plan, rows_at, scale_and_shift
from fastcifar.kernels.rng import permute, permute_blocks, split_seed, widths
from fastcifar.pipeline import Pipeline
from tests.effort import effort
from tests.test_kernels import SCALINGS, cases, make_plan, make_store, one

triton = pytest.importorskip("triton", minversion="3.9")  # older interpreters leave their changes to the language

from triton import language as tl  # noqa: E402
from triton.backends.compiler import GPUTarget  # noqa: E402
from triton.compiler import ASTSource  # noqa: E402
from triton.runtime import interpreter  # noqa: E402

from fastcifar.kernels import cuda, cuda_loops  # noqa: E402

MODULES = {module.__name__: module for module in (cuda, cuda_loops)}
ONE = {"epoch": 1, "start": 0, "size": 1}


def round_to_bfloat16(values, source, target, rounding_mode):
    """In place of the interpreter's own, which rounds towards 0. What a GPU does is looked at further down."""
    assert (source.name, target.name) == ("fp32", "bf16")
    return torch.from_numpy(np.ascontiguousarray(values)).bfloat16().view(torch.int16).numpy().view(np.uint16)


@pytest.fixture(scope="module")
def again():
    """`cuda` and `cuda_loops`, as they are with TRITON_INTERPRET=1."""
    with pytest.MonkeyPatch.context() as patch:
        for name in MODULES:
            patch.delitem(sys.modules, name)
            patch.delattr(fastcifar.kernels, name.rpartition(".")[2])
        patch.setenv("TRITON_INTERPRET", "1")
        modules = [importlib.import_module(name) for name in MODULES]
    assert [sys.modules[name] for name in MODULES] == list(MODULES.values())
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(interpreter, "_convert_float", round_to_bfloat16)
        # checks of each sum and product, which take half the time
        builder = interpreter.interpreter_builder
        patch.setattr(builder, "options", replace(builder.options, sanitize_overflow=False))
        yield modules


@pytest.fixture(scope="module")
def interpreted(again):
    return again[0]


def on_cpu(*arrays):
    return [torch.from_numpy(np.asarray(array)) for array in arrays]


def as_bits(values):
    return np.ascontiguousarray(values, dtype=np.float32).view(np.uint32)  # so that -0.0 is not 0.0


def same(made, wanted):
    return torch.equal(made[0], wanted[0]) and torch.equal(made[1], wanted[1])


def check_batch(made, images, labels, plan, **call):
    expected, expected_labels = reference.batch(images, labels, plan, **call)
    out, targets = made
    assert out.dtype == getattr(torch, plan.dtype)
    assert targets.dtype == torch.int64
    assert tuple(out.shape) == expected.shape
    memory = torch.channels_last if plan.channels_last else torch.contiguous_format
    assert out.is_contiguous(memory_format=memory) or out.numel() == 0
    assert np.array_equal(as_bits(out.float().numpy()), as_bits(expected))
    assert np.array_equal(targets.numpy(), expected_labels)


def check_resident(module, images, labels, plan, **call):
    check_batch(module.CudaKernel(*on_cpu(images, labels), plan)(**call), images, labels, plan, **call)


def check_staged(module, images, labels, plan, **call):
    rows = rows_at(plan, np.arange(call["start"], call["start"] + call["size"]), call["epoch"])
    augment = module.CudaAugment(images.shape[1:], plan, torch.device("cpu"))
    gathered = on_cpu(images[rows], rows, labels[rows].astype(np.int64))
    made = augment(*gathered, epoch=call["epoch"], capacity=call.get("capacity"))
    check_batch(made, images, labels, plan, **call)


# The reference's bits ----------------------------------------------------------------------------------------


@given(cases())
@settings(max_examples=effort(40), deadline=None)
def test_batches_equal_the_reference(interpreted, case):
    images, labels, plan, call = case
    call["size"] = min(call["size"], 4)  # the interpreter takes 30 ms an image
    check_resident(interpreted, images, labels, plan, **call)
    check_staged(interpreted, images, labels, plan, **call)


@pytest.mark.parametrize("channels_last", [True, False])
@pytest.mark.parametrize("padding", ["reflect", "zero"])
def test_wide_shifts_of_real_sizes(interpreted, padding, channels_last):
    images, labels = make_store(8, 32, 32)
    options = {"crop": 31, "padding": padding, "flip": "random", "cutout": 9, "channels_last": channels_last}
    check_resident(interpreted, images, labels, make_plan(8, **options), epoch=1, start=0, size=4, capacity=5)


@pytest.mark.parametrize(("height", "width", "channels"), [(70, 90, 3), (20, 31, 7), (9, 300, 1), (300, 2, 2)])
@pytest.mark.parametrize("channels_last", [True, False])
def test_images_of_many_tiles_and_channels(interpreted, monkeypatch, height, width, channels, channels_last):
    monkeypatch.setattr(interpreted, "_TILE", 2048)  # as if they were larger
    images, labels = make_store(3, height, width, channels)
    plan = make_plan(3, channels, crop=1, flip="alternating", channels_last=channels_last, shift=one(channels))
    plan = replace(plan, scale=np.arange(1, channels + 1, dtype=np.float32))
    check_resident(interpreted, images, labels, plan, epoch=0, start=1, size=2, capacity=3)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("scaling", SCALINGS)
def test_all_pixel_values(interpreted, scaling, dtype):
    images = np.repeat(np.arange(256, dtype=np.uint8), 3).reshape(1, 16, 16, 3)
    scale, shift = scale_and_shift(scaling, np.array([125.3, 123.0, 113.9]), np.array([63.0, 62.1, 66.7]))
    plan = Plan(samples=1, scale=scale, shift=shift, dtype=dtype)
    check_resident(interpreted, images, np.zeros(1, dtype=np.int64), plan, **ONE)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("exponent", [-140, -32, -24, -14, 9, 100])
@pytest.mark.filterwarnings("ignore:overflow encountered in cast:RuntimeWarning")
def test_small_and_large_values_round_once(interpreted, dtype, exponent):
    images = np.arange(256, dtype=np.uint8).reshape(1, 16, 16, 1)
    scale = np.float32([1 + 2**-7 + 2**-11]) * np.float32(2.0**exponent)
    plan = Plan(samples=1, scale=scale, shift=-128 * scale, dtype=dtype)
    check_resident(interpreted, images, np.zeros(1, dtype=np.int64), plan, **ONE)


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64])
def test_labels_of_any_integer_type(interpreted, dtype):
    images, labels = make_store(5, 2, 2)
    kernel = interpreted.CudaKernel(torch.from_numpy(images), torch.from_numpy(labels).to(dtype), make_plan(5))
    check_batch(kernel(**ONE), images, labels, make_plan(5), **ONE)


def test_batches_of_nothing(interpreted):
    images, labels = make_store(5, 2, 2)
    for capacity in (None, 0, 2):
        check_resident(interpreted, images, labels, make_plan(5), epoch=0, start=5, size=0, capacity=capacity)
        check_staged(interpreted, images, labels, make_plan(5), epoch=0, start=5, size=0, capacity=capacity)


def test_rows_beyond_32_bits(interpreted):
    images, labels = make_store(4, 8, 8)
    plan = make_plan(4, crop=4, flip="alternating", cutout=3, seed=2**63 + 5)
    gathered = on_cpu(images, np.int64([2**31, 2**32 + 1, 2**40 + 3, 2**63 - 1]), labels)
    made, wanted = (
        augment(images.shape[1:], plan, torch.device("cpu"))(*gathered, epoch=2**32 - 1, capacity=5)
        for augment in (interpreted.CudaAugment, EagerAugment)
    )
    assert same(made, wanted)


def order_kernel(
    positions,
    out,
    samples,
    bits,
    blocks_bits,
    window_bits,
    last_bits,
    epoch,
    key0,
    key1,
    permute,
    permute_blocks,
    order,
):
    at = tl.load(positions + tl.program_id(0))
    out += 2 * tl.program_id(0)
    samples, epoch = samples.to(tl.int64), epoch.to(tl.uint32)
    key0, key1 = key0.to(tl.uint32), key1.to(tl.uint32)
    zero = tl.full((), 0, tl.uint32)
    tl.store(out, permute(at, samples, bits, zero, epoch, order, key0, key1))
    sizes = blocks_bits, window_bits, last_bits
    tl.store(out + 1, permute_blocks(at, samples, *sizes, epoch, key0, key1, tl.constexpr(100), tl.constexpr(700)))


@pytest.mark.parametrize("samples", [1, 65, 2**31 + 11, 2**32, 2**40 + 5, 2**62 + 1])
def test_orders_of_any_size(again, samples):
    """Of stores larger than this machine's memory."""
    block, span, key = 100, 700, {"samples": samples, "seed": 2**64 - 3, "epoch": 2**32 - 1}
    positions = np.unique([0, min(samples, 700 * 2**32) // 3, min(samples, 700 * 2**32) - 1])
    out = torch.empty(len(positions), 2, dtype=torch.int64)
    bits = (sum(widths(max(size, 1))) for size in (samples, samples // block, span, samples % span or span))
    numbers = (samples, *bits, key["epoch"], *split_seed(key["seed"]))
    functions = again[1]._permute, again[1]._permute_blocks, again[1]._ORDER
    kernel = interpreter.InterpretedFunction(order_kernel)
    kernel[(len(positions),)](torch.from_numpy(positions), out, *numbers, *functions)
    assert out[:, 0].tolist() == permute(positions, **key).tolist()
    assert out[:, 1].tolist() == permute_blocks(positions, **key, block_size=block, window=span // block).tolist()


# A position on the device ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("order", "batch_size", "world_size"), [("random", 4, 3), ("sequential", 2, 5), ("block", 20, 1)]
)
def test_positions_on_the_device(interpreted, order, batch_size, world_size):
    images, labels = make_store(13, 4, 4)
    plan = make_plan(11, offset=2, order=order, block_size=2, window=2, crop=2, flip="random", seed=2**63)
    kernel = interpreted.CudaKernel(*on_cpu(images, labels), plan)
    capacity, epoch = -(-min(batch_size, 11) // world_size), 2**32 - 1
    every = []
    for step in range(-(-11 // batch_size)):
        first, count = batch_size * step, min(batch_size, 11 - batch_size * step)
        for rank in range(world_size):
            low, high = count * rank // world_size, count * (rank + 1) // world_size
            part = {"batch_size": batch_size, "rank": rank, "world_size": world_size, "capacity": capacity}
            made = kernel.at(torch.tensor([epoch, step]), **part)
            call = {"epoch": epoch, "start": first + low, "size": high - low, "capacity": capacity}
            check_batch(made, images, labels, plan, **call)
            every += made[1][made[1] != IGNORE].tolist()
    assert sorted(every) == sorted(labels[2:].tolist())


@pytest.mark.parametrize("step", [-1, 3, 2**62, -(2**63)])
def test_a_step_that_no_epoch_has_is_all_padding(interpreted, step):
    images, labels = make_store(11, 4, 4)
    kernel = interpreted.CudaKernel(*on_cpu(images, labels), make_plan(11, shift=one(3)))
    out, targets = kernel.at(torch.tensor([0, step]), batch_size=4, rank=0, world_size=1, capacity=4)
    assert not out.any()
    assert targets.tolist() == [IGNORE] * 4


@pytest.mark.parametrize(
    "options",
    [
        {"policy": "trivial", "cutout": 3},
        {"policy": "trivial", "policy_epochs": 1},
        {"policy": "rand", "mixup": 0.4, "cutmix": 1.0},
    ],
)
def test_policies_and_mixing_at_positions_on_the_device(interpreted, monkeypatch, tmp_path, options):
    """The kernel tells the rows, all else is drawn of them: the CPU's batches, short and missing ones too."""
    images, labels = make_store(11, 8, 10)
    store = convert_arrays(tmp_path / "store", images, labels.astype(np.int64) % 4)
    augment = Augment(crop=2, flip="alternating", **options)
    loader = Loader(store, batch_size=3, augment=augment, seed=5, pad_last=True)
    monkeypatch.setitem(sys.modules, "fastcifar.kernels.cuda", interpreted)
    cpu = torch.device("cpu")
    pipeline = Pipeline(store, loader._plan, augment, placement="device", backend="cuda", device=cpu)
    samples = len(loader.dataset)
    for epoch, step in ((0, 0), (1, 1), (2**32 - 1, len(loader) - 1)):
        wanted = loader.batch(epoch, step)
        position = torch.tensor([epoch, step])
        made = pipeline.at(position, batch_size=3, rank=0, world_size=1, capacity=3)
        assert same(made, wanted)
        assert made[0].stride() == wanted[0].stride()
        count = min(3, samples - 3 * step)
        assert same(pipeline(epoch=epoch, first=3 * step, count=count, low=0, high=count, capacity=3), wanted)
    made, targets = pipeline.at(torch.tensor([0, len(loader)]), batch_size=3, rank=0, world_size=1, capacity=3)
    assert not made.any()
    assert torch.equal(targets, torch.zeros(3, 4) if "mixup" in options else torch.full((3,), IGNORE))
    part = Pipeline(store, loader._plan, augment, placement="device", backend="cuda", device=cpu, alone=False)
    assert (part.at is None) == ("mixup" in options)  # samples are mixed across ranks


# Refusals ----------------------------------------------------------------------------------------------------


def test_what_does_not_fit_is_refused():
    images, labels = on_cpu(*make_store(6, 4, 4))
    for wrong in (images[:, ::2], images.to(torch.int16)):
        with pytest.raises(ValueError, match="uint8 in C order"):
            cuda.CudaKernel(wrong, labels, make_plan(6))
    with pytest.raises(ValueError, match="labels on meta"):
        cuda.CudaKernel(images, labels.to("meta"), make_plan(6))
    with pytest.raises(ConfigError, match="reach past 6"):
        cuda.CudaKernel(images, labels, make_plan(7))
    with pytest.raises(ConfigError, match="fewer than 2\\*\\*31 bytes"):
        cuda.CudaAugment((2**15, 2**15, 2), make_plan(1, 2), torch.device("cpu"))


@pytest.mark.parametrize("call", [{"epoch": 2**32}, {"start": 6}, {"size": 4, "capacity": 3}])
def test_positions_outside_the_epoch_are_refused(call):
    images, labels = on_cpu(*make_store(6, 4, 4))
    with pytest.raises(ValueError, match=r"must be|not within"):
        cuda.CudaKernel(images, labels, make_plan(6))(**{**ONE, **call})


@pytest.mark.parametrize(
    ("change", "word"),
    [
        ({"position": torch.zeros(2)}, "position"),
        ({"position": torch.zeros(3, dtype=torch.int64)}, "position"),
        ({"position": torch.zeros(2, dtype=torch.int64, device="meta")}, "position"),
        ({"batch_size": 0}, "batch_size"),
        ({"rank": 2}, "rank"),
        ({"capacity": 1}, "capacity"),
    ],
)
def test_other_positions_are_refused(change, word):
    kernel = cuda.CudaKernel(*on_cpu(*make_store(6, 4, 4)), make_plan(6))
    part = {"position": torch.zeros(2, dtype=torch.int64), "batch_size": 4, "rank": 0, "world_size": 2, "capacity": 2}
    with pytest.raises(ValueError, match=word):
        kernel.at(**{**part, **change})


def test_gathered_images_of_another_shape_are_refused():
    images, labels = on_cpu(*make_store(6, 4, 4))
    augment, rows = cuda.CudaAugment((4, 4, 3), make_plan(6), torch.device("cpu")), torch.arange(6)
    for wrong in ((images[:5], rows, labels), (images, rows.int(), labels), (images, rows, labels[:5])):
        with pytest.raises(ValueError, match="must be uint8"):
            augment(*wrong, epoch=0)


def test_where_there_is_no_triton_one_line_says_so():
    code = "import sys; sys.modules['triton'] = None; import fastcifar.kernels.cuda"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    expected = "fastcifar.errors.ConfigError: backend 'cuda' needs Triton, on Linux: pip install 'fastcifar[triton]'"
    assert done.stderr.splitlines()[-1] == expected


# Compiled without a GPU --------------------------------------------------------------------------------------


def arguments_of(monkeypatch, call):
    """What `call` would have launched `make_batch` with."""
    launches = []

    class Recorder:
        def __getitem__(self, grid):
            return lambda **arguments: launches.append(arguments)

    monkeypatch.setattr(cuda, "make_batch", Recorder())
    call()
    (arguments,) = launches
    return arguments


def compile_for(arch, arguments):
    """As a launch with `arguments` would."""
    function = cuda_loops.make_batch
    signature, constants, attributes = {}, {}, {}
    for i, parameter in enumerate(function.params):
        value = arguments[parameter.name]
        if parameter.is_constexpr or value is None:
            signature[parameter.name] = "constexpr"
            constants[i,] = value
        elif isinstance(value, torch.Tensor):
            signature[parameter.name] = triton.runtime.jit.mangle_type(value)
            attributes[i,] = [["tt.divisibility", 16]]  # as torch aligns
        else:
            signature[parameter.name] = parameter.annotation_type
    options = {name: arguments[name] for name in arguments.keys() - signature.keys()}
    source = ASTSource(function, signature, constants, attributes)
    return triton.compile(source, target=GPUTarget("cuda", arch, 32), options=options)


def resources_of(compiled, folder):
    """Registers and bytes of local memory of a thread, and bytes of shared memory."""
    (folder / "kernel.cubin").write_bytes(compiled.asm["cubin"])
    command = [triton.knobs.nvidia.cuobjdump.path, "-res-usage", str(folder / "kernel.cubin")]
    usage = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    return {name: int(number) for name, number in re.findall(r"(REG|STACK|LOCAL|SHARED):(\d+)", usage)}


FLAT = {"crop": 4, "flip": "alternating", "dtype": "float32"}
COMPILED = {
    "flagship": (90, FLAT, "resident"),
    "flagship, older": (80, {**FLAT, "dtype": "bfloat16"}, "resident"),
    "bfloat16": (90, {**FLAT, "dtype": "bfloat16", "cutout": 8}, "at"),
    "float16": (80, {**FLAT, "dtype": "float16", "channels_last": False, "padding": "zero"}, "resident"),
    "blocks": (90, {**FLAT, "order": "block"}, "at"),
    "staged": (80, FLAT, "staged"),
}


@pytest.mark.parametrize(("arch", "options", "way"), COMPILED.values(), ids=list(COMPILED))
def test_it_compiles_for_gpus(monkeypatch, tmp_path, arch, options, way):
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path / "cache"))
    images, labels = on_cpu(*make_store(8, 32, 32))
    plan = make_plan(8, **options)

    def call():
        if way == "staged":
            cuda.CudaAugment((32, 32, 3), plan, torch.device("cpu"))(images, torch.arange(8), labels, epoch=0)
        elif way == "at":
            position = torch.zeros(2, dtype=torch.int64)
            cuda.CudaKernel(images, labels, plan).at(position, batch_size=8, rank=0, world_size=1, capacity=8)
        else:
            cuda.CudaKernel(images, labels, plan)(epoch=0, start=0, size=8)

    compiled = compile_for(arch, arguments_of(monkeypatch, call))
    ptx = compiled.asm["ptx"]
    assert f".target sm_{arch}" in ptx
    resources = resources_of(compiled, tmp_path)
    assert resources["STACK"] == resources["LOCAL"] == resources["SHARED"] == 0
    # 8 programs of 64 threads on a processor, or 10 of 32
    assert resources["REG"] <= (128 if plan.dtype == "float32" else 200)
    # labels in one store each, images in 16 bytes a thread
    stores = Counter(re.findall(r"st\.global[\w.:]*", ptx))
    assert stores.keys() == {"st.global.b64", "st.global.v4.b32"}
    # rounded once, to the nearest, and without a flush of what is subnormal
    assert ".ftz" not in ptx
    conversion = {"bfloat16": "cvt.rn.bf16x2.f32", "float16": "cvt.rn.f16x2.f32"}.get(plan.dtype)
    assert conversion is None or conversion in ptx


def test_nothing_compiles_again_within_an_epoch():
    for parameter in cuda_loops.make_batch.params:
        if parameter.annotation_type:
            assert parameter.do_not_specialize, parameter.name
    names = {name for name, kind in inspect.get_annotations(cuda_loops.make_batch.fn).items() if kind != tl.constexpr}
    assert names == set(cuda_loops._PLAIN)
