"""The policies do what Pillow does to each image, and depend on nothing but the seed, the epoch and the row."""

import math
from fractions import Fraction

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageEnhance, ImageOps

from fastcifar.errors import ConfigError
from fastcifar.kernels.rng import philox
from fastcifar.policies import BINS, OPERATIONS, POLICY, Policy, PolicyAugment
from tests.effort import effort
from tests.threads import on_threads

CPU = torch.device("cpu")
KINDS = ("trivial", "rand")
SIGNED = OPERATIONS[1:10]
# every operation with every bin and both signs
ALL = [(operation, i, negative) for operation in range(14) for i in range(BINS) for negative in (0, 1)]


def apply_policy(images, rows, *, policy, seed, epoch):
    augment = PolicyAugment(policy, shape=images.shape[2:], seed=seed, device=images.device)
    return augment(images, rows, epoch=epoch)


@pytest.fixture(autouse=True)
def one_thread():
    """On a busy machine, threads that wait for each other in operations this small take half of the time."""
    with on_threads(1):
        yield


def magnitude_of(kind, name, i, negative, height, width):
    """The tables of torchvision's classes, exact instead of by torch.linspace."""
    wide, part = kind == "trivial", Fraction(i, BINS - 1)
    if name in ("ShearX", "ShearY"):
        value = (0.99 if wide else 0.3) * float(part)
    elif name == "TranslateX":
        value = int((32 if wide else Fraction(150 * width, 331)) * part)
    elif name == "TranslateY":
        value = int((32 if wide else Fraction(150 * height, 331)) * part)
    elif name == "Rotate":
        value = float((135 if wide else 30) * part)
    elif name == "Posterize":
        value = 8 - round(part * (6 if wide else 4))
    elif name == "Solarize":
        value = float(255 - 255 * part)
    else:
        value = (0.99 if wide else 0.9) * float(part)
    return -value if negative and name in SIGNED else value


def pillow(image, name, magnitude):
    """uint8[H, W, C] -> uint8[H, W, C], as torchvision's `_apply_op` treats a PIL image."""
    picture = Image.fromarray(image[..., 0] if image.shape[2] == 1 else image)
    matrices = {
        "ShearX": (1.0, magnitude, 0.0, 0.0, 1.0, 0.0),  # its centre is the corner: center=[0, 0]
        "ShearY": (1.0, 0.0, 0.0, magnitude, 1.0, 0.0),
        "TranslateX": (1.0, 0.0, -magnitude, 0.0, 1.0, 0.0),
        "TranslateY": (1.0, 0.0, 0.0, 0.0, 1.0, -magnitude),
    }
    enhancers = ("Brightness", "Color", "Contrast", "Sharpness")
    if name in matrices:
        transform = Image.Transform.AFFINE
        done = picture.transform(picture.size, transform, matrices[name], Image.Resampling.NEAREST, fillcolor=0)
    elif name == "Rotate":
        done = picture.rotate(magnitude, Image.Resampling.NEAREST, fillcolor=0)
    elif name in enhancers:
        done = getattr(ImageEnhance, name)(picture).enhance(1.0 + magnitude)
    elif name in ("Posterize", "Solarize"):
        done = getattr(ImageOps, name.lower())(picture, magnitude)
    elif name in ("AutoContrast", "Equalize"):
        done = getattr(ImageOps, name.lower())(picture)
    else:
        done = picture
    return np.asarray(done).reshape(image.shape)


def check(image, result, name, magnitude, context):
    """`result` is Pillow's, bit for bit; AutoContrast may be 1 more where its quotient is whole."""
    expected = pillow(image, name, magnitude)
    if name == "AutoContrast":
        value, low, high = image.astype(np.int64), image.min((0, 1)), image.max((0, 1))
        product, span = (value - low) * 255, np.maximum(high.astype(np.int64) - low, 1)
        exact = np.where(high > low, product // span, value)
        assert np.array_equal(result, exact), context
        less = exact - expected
        assert ((less == 0) | ((less == 1) & (product % span == 0))).all(), context
    else:
        assert np.array_equal(result, expected), context


def make_images(look, count, height, width, channels, seed=0):
    """uint8[count, H, W, C]."""
    random = np.random.default_rng(seed)
    shape = (count, height, width, channels)
    if look == "noise":
        return random.integers(0, 256, shape, dtype=np.uint8)
    if look == "constant":
        return np.broadcast_to(random.integers(0, 256, (count, 1, 1, channels), dtype=np.uint8), shape).copy()
    if look == "ramp":  # every value there is, in an order of its own for each image
        values = np.resize(np.arange(256, dtype=np.uint8), (count, height * width * channels))
        return random.permuted(values, axis=1).reshape(shape)
    # smooth: waves of some contrast about some level, clipped in places
    y, x = np.mgrid[:height, :width, :channels][:2] / max(height, width)
    fy, fx, phase, level, contrast = (random.uniform(size=(count, 1, 1, 1)) for _ in range(5))
    waves = np.sin(9 * fy * y + 4 * np.arange(channels)) + np.cos(9 * fx * x + 6 * phase)
    return np.clip(255 * level + 100 * contrast * waves, 0, 255).astype(np.uint8)


def to_tensor(images):
    return torch.from_numpy(images).permute(0, 3, 1, 2)  # channels-last memory


def to_array(images):
    return images.permute(0, 2, 3, 1).numpy()


def draw_by_hand(row, policy, seed, epoch, k):
    """Operation, bin and sign bit, with Python's integers."""
    counter = (row % 2**32, row // 2**32, epoch, 5 + 256 * k)
    w0, w1, w2, _ = (int(word) for word in philox(counter, (seed % 2**32, seed // 2**32)))
    return w0 * 14 // 2**32, w1 * 31 // 2**32 if policy.kind == "trivial" else policy.magnitude, w2 // 2**31


def operations_tensors():
    chosen = torch.tensor(ALL)
    return chosen[:, 0], 2 * chosen[:, 1] + chosen[:, 2]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("look", ["noise", "smooth", "constant", "ramp"])
@pytest.mark.parametrize("shape", [(32, 32, 3), (32, 32, 1), (17, 31, 3), (5, 2, 3), (1, 1, 1)])
def test_every_operation_is_pillows(kind, look, shape):
    height, width, _ = shape
    images = make_images(look, len(ALL), *shape)
    augment = PolicyAugment(Policy(kind=kind), shape=(height, width), seed=0, device=CPU)
    results = to_array(augment.transform(to_tensor(images), *operations_tensors()))
    for image, result, (operation, i, negative) in zip(images, results, ALL, strict=True):
        name = OPERATIONS[operation]
        check(image, result, name, magnitude_of(kind, name, i, negative, height, width), (name, i, negative))


def test_translations_of_images_that_331_divides():
    """Where 150 / 331 of the width is whole, torch.linspace would be off by its last bit, and by a pixel."""
    images = make_images("noise", len(ALL), 3, 331, 1)
    augment = PolicyAugment(Policy(kind="rand"), shape=(3, 331), seed=0, device=CPU)
    results = to_array(augment.transform(to_tensor(images), *operations_tensors()))
    for image, result, (operation, i, negative) in zip(images, results, ALL, strict=True):
        if OPERATIONS[operation] == "TranslateX":
            moved = np.roll(image, -5 * i if negative else 5 * i, axis=1)
            moved[:, slice(331 - 5 * i, None) if negative else slice(0, 5 * i)] = 0
            assert np.array_equal(result, moved)


@pytest.mark.parametrize("kind", KINDS)
def test_magnitudes_are_torchvisions(kind):
    """But for the last bits of torch.linspace, which its result on a CPU shows to depend on the vector width."""
    ends = {"ShearX": 0.99, "TranslateX": 32.0, "Rotate": 135.0, "Color": 0.99, "Posterize": 6}
    if kind == "rand":
        ends = {"ShearX": 0.3, "TranslateX": 150.0 / 331.0 * 40, "Rotate": 30.0, "Color": 0.9, "Posterize": 4}
    for name, end in ends.items():
        table = torch.linspace(0.0, end, BINS)
        for i, value in enumerate(table.tolist()):
            ours = magnitude_of(kind, name, i, 0, 24, 40)
            if name == "Posterize":
                bits = 8 - (torch.arange(BINS) / ((BINS - 1) / end)).round().int()
                assert ours == bits[i]
            elif name == "TranslateX":
                assert ours == int(value) or math.isclose(ours, value, rel_tol=1e-6)
            else:
                assert math.isclose(ours, value, rel_tol=1e-6, abs_tol=1e-9)
    assert [magnitude_of(kind, "Solarize", i, 0, 1, 1) for i in range(BINS)] == torch.linspace(255, 0, BINS).tolist()


def test_rotation_is_counterclockwise_and_translation_right_and_down():
    image = torch.arange(16, dtype=torch.uint8).reshape(1, 1, 4, 4)
    augment = PolicyAugment(Policy(), shape=(4, 4), seed=0, device=CPU)

    def apply(name, i, negative):
        level = torch.tensor([2 * i + negative])
        return augment.transform(image, torch.tensor([OPERATIONS.index(name)]), level)

    assert torch.equal(apply("Rotate", 20, 0), image.rot90(1, (2, 3)))
    assert torch.equal(apply("Rotate", 20, 1), image.rot90(-1, (2, 3)))
    assert apply("TranslateX", 1, 0)[0, 0, 0].tolist() == [0, 0, 1, 2]
    assert apply("TranslateY", 1, 1)[0, 0, :, 0].tolist() == [4, 8, 12, 0]


@pytest.mark.parametrize("policy", [Policy(), Policy(kind="rand", num_ops=3, magnitude=17)])
def test_draws_follow_their_formulas(policy):
    rows = [0, 1, 77, 2**32, 2**40 + 3, *range(100, 200)]
    seed, epoch = 0xDEADBEEF_12345678, 4_000_000_001
    augment = PolicyAugment(policy, shape=(4, 4), seed=seed, device=CPU)
    for k in range(3):
        operation, level = augment.draw(torch.tensor(rows), epoch, k)
        by_hand = [draw_by_hand(row, policy, seed, epoch, k) for row in rows]
        assert list(zip(operation.tolist(), (level // 2).tolist(), (level % 2).tolist(), strict=True)) == by_hand


def test_the_contract_is_pinned():
    """Anything that changes these changes every run of every user."""
    assert POLICY == 5
    operation, level = PolicyAugment(Policy(), shape=(4, 4), seed=3, device=CPU).draw(torch.arange(8), 2, 0)
    assert operation.tolist() == PINNED_OPERATIONS
    assert level.tolist() == PINNED_LEVELS


def chi_square(codes, cells):
    """Pearson's statistic against equally likely cells, as standard deviations from its mean."""
    counts = torch.bincount(codes, minlength=cells).double()
    expected = len(codes) / cells
    statistic = float(((counts - expected) ** 2 / expected).sum())
    return (statistic - (cells - 1)) / math.sqrt(2 * (cells - 1))


@pytest.mark.parametrize("seed", range(effort(3)))
def test_draws_are_uniform_and_independent(seed):
    rows = torch.arange(100_000)
    augment = PolicyAugment(Policy(kind="trivial"), shape=(4, 4), seed=seed, device=CPU)
    operation, level = augment.draw(rows, 0, 0)
    later, _ = augment.draw(rows, 1, 0)
    second, second_level = augment.draw(rows, 0, 1)
    for codes, cells in (
        (operation, 14),
        (level, 62),
        (operation * 62 + level, 14 * 62),
        (operation * 14 + later, 196),
        (operation * 14 + second, 196),
        (operation[1:] * 14 + operation[:-1], 196),
        (level * 62 + second_level, 62 * 62),
    ):
        assert abs(chi_square(codes, cells)) < 5


@settings(max_examples=effort(40), deadline=None)
@given(
    count=st.integers(0, 9),
    height=st.integers(1, 40),
    width=st.integers(1, 40),
    channels=st.sampled_from([1, 3]),
    look=st.sampled_from(["noise", "smooth", "constant", "ramp"]),
    seed=st.integers(0, 2**64 - 1),
    epoch=st.integers(0, 2**32 - 1),
    policy=st.builds(Policy, kind=st.sampled_from(KINDS), num_ops=st.integers(1, 3), magnitude=st.integers(0, 30)),
)
def test_a_batch_is_pillows(count, height, width, channels, look, seed, epoch, policy):
    images = make_images(look, count, height, width, channels, seed % 2**32)
    rows = torch.from_numpy(np.random.default_rng(seed).integers(0, 2**63, count))
    results = to_array(apply_policy(to_tensor(images), rows, policy=policy, seed=seed, epoch=epoch))
    steps = policy.num_ops if policy.kind == "rand" else 1
    for image, row, result in zip(images, rows.tolist(), results, strict=True):
        expected = image
        for k in range(steps):
            operation, i, negative = draw_by_hand(row, policy, seed, epoch, k)
            name = OPERATIONS[operation]
            if name == "AutoContrast":  # Pillow's own may be 1 less; see `check`
                low, high = expected.min((0, 1)), expected.max((0, 1)).astype(np.int64)
                stretched = (expected - low.astype(np.int64)) * 255 // np.maximum(high - low, 1)
                expected = np.where(high > low, stretched, expected).astype(np.uint8)
            else:
                expected = pillow(expected, name, magnitude_of(policy.kind, name, i, negative, height, width))
        assert np.array_equal(result, expected)


POLICIES = [Policy(), Policy(kind="rand")]


@pytest.mark.parametrize("policy", POLICIES)
def test_a_sample_does_not_depend_on_its_batch(policy):
    images = to_tensor(make_images("smooth", 64, 12, 10, 3))
    rows = torch.arange(64) * 1001
    options = {"policy": policy, "seed": 1, "epoch": 5}
    together = apply_policy(images, rows, **options)
    order = torch.randperm(64, generator=torch.Generator().manual_seed(0))
    assert torch.equal(apply_policy(images[order], rows[order], **options), together[order])
    for i in range(64):
        assert torch.equal(apply_policy(images[i : i + 1], rows[i : i + 1], **options), together[i : i + 1])
    assert torch.equal(apply_policy(images, rows, **options), together)
    assert torch.equal(apply_policy(images, rows, **{**options, "epoch": torch.tensor(5)}), together)
    assert not torch.equal(apply_policy(images, rows, **{**options, "epoch": 6}), together)
    assert not torch.equal(apply_policy(images, rows, **{**options, "seed": 2}), together)


@pytest.mark.parametrize("policy", POLICIES)
def test_nothing_else_is_touched(policy):
    images = to_tensor(make_images("noise", 32, 8, 8, 3))
    before, numpy_before, kept = torch.get_rng_state(), np.random.get_state()[1].copy(), images.clone()  # noqa: NPY002
    apply_policy(images, torch.arange(32), policy=policy, seed=0, epoch=0)
    assert torch.equal(torch.get_rng_state(), before)
    assert np.array_equal(np.random.get_state()[1], numpy_before)  # noqa: NPY002
    assert torch.equal(images, kept)


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("channels", [1, 3])
def test_the_memory_format_is_kept(policy, channels):
    plain = to_tensor(make_images("noise", 24, 9, 8, channels)).contiguous()
    wider = torch.zeros(24, channels, 18, 20, dtype=torch.uint8)
    sliced = wider[:, :, ::2, 3:11]
    sliced.copy_(plain)
    options = {"policy": policy, "seed": 0, "epoch": 1}
    expected = apply_policy(plain, torch.arange(24), **options)
    assert expected.stride() == plain.stride()
    for images in (plain.contiguous(memory_format=torch.channels_last), sliced, plain.transpose(2, 3).contiguous().mT):
        result = apply_policy(images, torch.arange(24), **options)
        assert torch.equal(result, expected)
        assert result.stride() == torch.empty_like(images).stride()


class Step(torch.nn.Module):
    def __init__(self, augment):
        super().__init__()
        self.augment = augment

    def forward(self, images, rows, epoch):
        return self.augment(images, rows, epoch=epoch)


def make_step(policy):
    shape = (6, 7)
    images, rows = to_tensor(make_images("smooth", 400, *shape, 3)), torch.arange(400)
    return Step(PolicyAugment(policy, shape=shape, seed=9, device=CPU)), images, rows


# Both take the path of accelerators, on fake tensors, and give the same bits as the other.


def test_it_is_compiled_without_a_break():
    step, images, rows = make_step(Policy(kind="rand", num_ops=1))
    with torch._dynamo.config.patch(capture_dynamic_output_shape_ops=False):
        compiled = torch.compile(step, fullgraph=True, backend="eager", dynamic=False)
        for epoch in (0, 1):
            args = (images, rows, torch.tensor(epoch))
            assert torch.equal(compiled(*args), step(*args))


def test_it_is_exported_with_static_shapes():
    step, images, rows = make_step(Policy())
    exported = torch.export.export(step, (images, rows, torch.tensor(0)))
    assert not exported.range_constraints  # no size that is known only from the data
    assert torch.equal(exported.module()(images, rows, torch.tensor(3)), step(images, rows, torch.tensor(3)))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("channels", [1, 3])
def test_accelerators_path_gives_the_same_bits(kind, channels, monkeypatch):
    """Of every operation, bin and sign: the path that takes all samples in every stage."""
    images = to_tensor(make_images("smooth", len(ALL), 9, 14, channels))
    augment = PolicyAugment(Policy(kind=kind), shape=(9, 14), seed=0, device=CPU)
    picked = augment.transform(images, *operations_tensors())
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    assert torch.equal(augment.transform(images, *operations_tensors()), picked)


def test_what_does_not_fit_is_refused():
    for bad in ({"kind": "auto"}, {"num_ops": 0}, {"magnitude": 31}, {"magnitude": -1}, {"magnitude": 9.0}):
        with pytest.raises(ConfigError, match=next(iter(bad))):
            Policy(**bad)
    with pytest.raises(ConfigError, match="height"):
        PolicyAugment(Policy(), shape=(16000, 400), seed=0, device=CPU)
    augment = PolicyAugment(Policy(), shape=(4, 4), seed=0, device=CPU)
    rows = torch.arange(2)
    for images in (torch.zeros(2, 3, 4, 4), torch.zeros(2, 3, 4, 5).byte(), torch.zeros(2, 2, 4, 4).byte()):
        with pytest.raises(ValueError, match="images must be uint8"):
            augment(images, rows, epoch=0)


def test_large_images_keep_their_arithmetic():
    """The widest that is allowed, near the limits of 16.16 bits, and more pixels than float32 counts."""
    shape = (2, 16382)
    images = make_images("noise", 6, *shape, 1)
    names = ["ShearX", "Rotate", "Contrast", "Equalize", "ShearY", "Rotate"]
    augment = PolicyAugment(Policy(), shape=shape, seed=0, device=CPU)
    operation = torch.tensor([OPERATIONS.index(name) for name in names])
    results = to_array(augment.transform(to_tensor(images), operation, torch.tensor([60, 61, 60, 0, 60, 30])))
    for image, result, name, (i, negative) in zip(
        images, results, names, [(30, 0), (30, 1), (30, 0), (0, 0), (30, 0), (15, 0)], strict=True
    ):
        check(image, result, name, magnitude_of("trivial", name, i, negative, *shape), name)


PINNED_OPERATIONS = [7, 2, 11, 8, 0, 1, 9, 5]
PINNED_LEVELS = [35, 20, 36, 56, 16, 46, 8, 27]
