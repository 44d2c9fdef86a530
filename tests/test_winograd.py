"""Tests of fastcifar.kernels.winograd: the convolution with fewer products is the layer's, values and gradients."""

import contextlib
import copy
import functools
from collections.abc import Iterator
from typing import Any

import llvmlite.binding as llvm
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from numba import cfunc, types
from torch import Tensor, nn
from torch._subclasses import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils.flop_counter import FlopCounterMode

from fastcifar import build_model
from fastcifar.kernels import lanes, machine, norms, openmp, pair_lanes, products, winograd
from fastcifar.kernels.cpu_words import word
from tests.effort import effort
from tests.threads import on_threads

LAST = torch.channels_last

_NEEDS_UNITS = pytest.mark.skipif(not machine.has_bfloat16(), reason="this processor has no AVX512-BF16")


def _images(shape: tuple[int, ...], seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).contiguous(memory_format=LAST)


def _layer(channels: int, count: int, **options: bool) -> nn.Conv2d:
    torch.manual_seed(channels + count)
    return nn.Conv2d(channels, count, 3, padding=1, **options).to(memory_format=LAST)  # type: ignore[arg-type,call-overload,no-any-return]


def _tiling(tile: int, height: int, width: int, halves: bool = False) -> winograd._Tiling:
    return winograd._Tiling(tile, -(-height // tile), -(-width // tile), halves and tile != 5)


@contextlib.contextmanager
def _precision(halves: bool) -> Iterator[None]:
    """Planes are of float32, or of bfloat16, as they are under autocast where a processor multiplies it."""
    with pytest.MonkeyPatch.context() as patch, torch.autocast("cpu", dtype=torch.bfloat16, enabled=halves):
        patch.setattr(winograd, "halves_here", lambda: True)
        yield


def _close(found: Tensor | None, expected: Tensor | None, tolerance: float = 1e-4) -> None:
    assert found is not None
    assert expected is not None
    wrong = (found.detach().double() - expected.detach().double()).abs().max()
    assert wrong <= tolerance * (expected.detach().abs().max() + 1), wrong


def _like(found: Tensor | None, expected: Tensor | None, halves: bool) -> None:
    """As exact as the precision is: what bfloat16 rounds away is 0.9 to 1.2 per cent, in root mean square."""
    if not halves:
        _close(found, expected)
        return
    assert found is not None
    assert expected is not None
    assert found.dtype == torch.float32
    wrong = (found.detach().double() - expected.detach()).square().mean()
    assert wrong <= 0.03**2 * expected.detach().square().mean(), wrong


@settings(max_examples=effort(80), deadline=None)
@given(
    batch=st.integers(1, 9),
    channels=st.sampled_from((16, 17, 24, 40, 64, 90)),  # 90: six lanes, in room of seven
    count=st.sampled_from((16, 24, 31, 64, 100)),  # 100: rows of two spans
    height=st.integers(1, 17),
    width=st.integers(1, 17),
    bias=st.booleans(),
    plain=st.booleans(),
    chunk=st.sampled_from((1, 1 << 20, 64 << 20)),
    tile=st.sampled_from((None, 3, 4, 5)),
    halves=st.booleans(),
    seed=st.integers(0, 2**31),
)
def test_it_is_the_layers_convolution(
    batch: int,
    channels: int,
    count: int,
    height: int,
    width: int,
    bias: bool,
    plain: bool,
    chunk: int,
    tile: int | None,
    halves: bool,
    seed: int,
) -> None:
    """Beside float64: all shapes, an image at a time and all at once, tiles of each size that hang over the edges.

    Filters may be `plain`: as a layer that was never made channels-last has them.
    """
    if halves:
        channels, count = channels + channels % 2, count + count % 2
    layer = _layer(channels, count, bias=bias)
    if plain:
        layer.to(memory_format=torch.contiguous_format)  # type: ignore[call-overload]
    exact = copy.deepcopy(layer).double()
    images = _images((batch, channels, height, width), seed).requires_grad_()
    reference = images.detach().double().requires_grad_()
    expected = exact(reference)
    gradient = torch.randn(expected.shape, generator=torch.Generator().manual_seed(seed + 1))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(winograd, "_CHUNK", chunk)
        if tile is not None:
            patch.setattr(winograd, "_tiling", functools.partial(_tiling, tile))
        with _precision(halves):
            found = winograd.conv2d(images, layer)
        found.backward(gradient)  # type: ignore[no-untyped-call]
    expected.backward(gradient.double())
    assert found.is_contiguous(memory_format=LAST)
    _like(found, expected, halves)
    _like(images.grad, reference.grad, halves)
    _like(layer.weight.grad, exact.weight.grad, halves)
    if bias:
        assert layer.bias is not None
        assert exact.bias is not None
        _close(layer.bias.grad, exact.bias.grad)


@pytest.mark.parametrize(("channels", "count"), [(17, 31), (90, 100)])
@pytest.mark.parametrize("side", [7, 10, 16])
@pytest.mark.parametrize("halves", [False, True])
def test_nothing_beside_the_planes_is_read_or_written(
    channels: int, count: int, side: int, halves: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if halves:
        channels, count = channels + channels % 2, count + count % 2
    layer, images = _layer(channels, count, bias=False), _images((5, channels, side, side)).requires_grad_()
    gradient = _images((5, count, side, side), 1)

    def gradients() -> tuple[Tensor, ...]:
        with _precision(halves):
            return torch.autograd.grad(winograd.conv2d(images, layer), (images, layer.weight), gradient)

    expected = gradients()
    real, made = products.planes, list[Tensor]()

    def planes(*size: int) -> Tensor:
        """Room full of NaN, between two fences."""
        inside = real(*size)
        made.append(torch.full((inside.untyped_storage().nbytes() // 4 + 128,), 7.0))
        made[-1][64:-64] = torch.nan
        return made[-1][64:].as_strided(inside.shape, inside.stride())

    monkeypatch.setattr(winograd, "planes", planes)
    monkeypatch.setattr(products, "planes", planes)
    found = gradients()
    assert made
    assert all((fence == 7).all() for room in made for fence in (room[:64], room[-64:]))
    assert all(torch.equal(one, other) for one, other in zip(found, expected, strict=True))


@pytest.mark.parametrize("halves", [False, True])
def test_no_gradient_is_made_that_nobody_wants(halves: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    layer, images = _layer(16, 32), _images((3, 16, 8, 8))
    layer.weight.requires_grad_(False)
    run = winograd._run

    def running(name: str, *values: Any, **options: Any) -> None:
        assert name != "scatter_back"  # the images' gradient
        run(name, *values, **options)

    monkeypatch.setattr(winograd, "_run", running)
    monkeypatch.setattr(winograd, "add_products", None)  # the filters' gradient
    with _precision(halves):
        winograd.conv2d(images, layer).sum().backward()  # type: ignore[no-untyped-call]
    assert images.grad is None
    assert layer.weight.grad is None
    assert layer.bias is not None
    _close(layer.bias.grad, torch.full((32,), 3.0 * 64))
    with torch.no_grad():
        assert not winograd.conv2d(images, layer).requires_grad


@pytest.mark.parametrize(
    ("side", "tile", "halves_tile"),
    [(3, 3, 3), (5, 5, 5), (6, 3, 3), (7, 4, 4), (10, 5, 4), (16, 4, 4), (20, 5, 4), (32, 4, 4)],
)
def test_tiles_are_those_of_fewest_products(side: int, tile: int, halves_tile: int) -> None:
    """A product of bfloat16 counts half; tiles of five have none."""
    for halves, expected in ((False, tile), (True, halves_tile)):
        found = winograd._tiling(side, side, halves)
        assert found == _tiling(expected, side, side, halves)
        others = [_tiling(other, side, side, halves) for other in (3, 4, 5)]
        assert min(other.points**2 * other.tiles / (1 + other.halves) for other in others) == found.cost(found.tiles)


@pytest.mark.parametrize("halves", [False, True])
@pytest.mark.parametrize(("height", "width"), [(16, 12), (15, 13), (6, 3)])  # in tiles of 4, 5 (or 4) and 3
def test_threads_change_no_bit(height: int, width: int, halves: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    layer, images, gradient = _layer(48, 40), _images((7, 48, height, width)), _images((7, 40, height, width), 1)

    def run(threads: int) -> list[Tensor]:
        with on_threads(threads):
            layer.zero_grad()
            values = images.clone().requires_grad_()
            with _precision(halves):
                found = winograd.conv2d(values, layer)
            found.backward(gradient)  # type: ignore[no-untyped-call]
            assert values.grad is not None
            return [found, values.grad, *(parameter.grad.clone() for parameter in layer.parameters())]  # type: ignore[union-attr]

    one = run(1)
    for other in (run(2), run(3)):
        assert all(map(torch.equal, one, other))
    monkeypatch.setattr(openmp, "_parallel", lambda: None)
    assert all(map(torch.equal, one, run(2)))


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("halves", [False, True])
def test_what_is_not_finite_stays_so(bad: float, halves: bool) -> None:
    images = _images((2, 16, 8, 8))
    images[1, 3, 2, 2] = bad
    with _precision(halves):
        found = winograd.conv2d(images, _layer(16, 16))
    assert found[0].isfinite().all()
    assert not found[1, :, 1:4, 1:4].isfinite().any()


def test_it_is_for_3x3_convolutions_of_enough_pixels_in_float32(monkeypatch: pytest.MonkeyPatch) -> None:
    layer, images = _layer(16, 16), _images((16, 16, 8, 8))
    assert winograd.fits(images, layer)
    assert not winograd.fits(images.double(), layer)
    assert not winograd.fits(images.bfloat16(), layer)
    assert not winograd.fits(images.contiguous(), layer)
    assert not winograd.fits(_images((64, 16, 2, 2)), layer)  # a tile of 16 for 4 pixels
    assert winograd.fits(_images((64, 16, 3, 3)), layer)
    assert not winograd.fits(_images((2, 16, 8, 8)), layer)  # the filters' own transform would not pay
    monkeypatch.setattr(winograd, "halves_here", lambda: False)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert not winograd.fits(images, layer)
    layer.eval()
    assert not winograd.fits(images, layer)
    with torch.no_grad():
        assert winograd.fits(images, layer)
    for other in (
        nn.Conv2d(16, 16, 1, padding=1),
        nn.Conv2d(16, 16, 3),
        nn.Conv2d(16, 16, 3, padding=1, stride=2),
        nn.Conv2d(16, 16, 3, padding=1, dilation=2),
        nn.Conv2d(16, 16, 3, padding=1, groups=2),
        nn.Conv2d(16, 16, 3, padding=1, padding_mode="reflect"),
        nn.Conv2d(3, 16, 3, padding=1),
        nn.Conv2d(16, 8, 3, padding=1),
        _layer(16, 16).double(),
    ):
        assert not winograd.fits(images, other)


def test_it_is_for_autocast_where_bfloat16_is_multiplied_and_there_are_no_matrix_units(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    layer, images = _layer(16, 16), _images((16, 16, 8, 8))
    for units, matrices in ((True, False), (False, False), (True, True)):
        monkeypatch.setattr(winograd.machine, "has_bfloat16", lambda units=units: units)
        monkeypatch.setattr(winograd, "has_matrix_units", lambda matrices=matrices: matrices)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            assert winograd.fits(images, layer) is (units and not matrices)
            assert winograd.fits(images.bfloat16(), layer) is (units and not matrices)
        with torch.autocast("cpu", dtype=torch.float16):
            assert not winograd.fits(images, layer)
        assert winograd.fits(images, layer)
        assert not winograd.fits(images.bfloat16(), layer)
    with _precision(halves=True):
        assert not winograd.fits(images.double(), layer)
        assert not winograd.fits(_images((16, 17, 8, 8)), _layer(17, 16))  # channels go in pairs
        assert not winograd.fits(_images((16, 16, 8, 8)), _layer(16, 17))
        assert not winograd.fits(_images((64, 16, 2, 2)), layer)
        images.requires_grad_()
        found = winograd.conv2d(images.bfloat16(), layer)
        assert found.dtype == torch.float32
        found.sum().backward()  # type: ignore[no-untyped-call]
        assert images.grad is not None


@pytest.mark.parametrize("units", [False, pytest.param(True, marks=_NEEDS_UNITS)])
def test_pairs_are_multiplied_and_summed_in_float32(units: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """By the processor's instructions and without: what it rounds to is bfloat16, and products are exact."""
    llvm.initialize_native_asmparser()
    for module in (lanes, pair_lanes):
        monkeypatch.setattr(module, "has_bfloat16", lambda: units)

    @word
    def block(low, high, numbers, out):  # type: ignore[no-untyped-def]
        pair_lanes.store_pair(out, 0, lanes.load_float32(low))
        pair_lanes.store_pair(out, 1, lanes.load_float32(high))
        total = pair_lanes.add_dots(numbers, lanes.load_float32(out), lanes.load_float32(low))
        lanes.store_float32(out + 64, total)

    @cfunc(types.int64(types.int64, types.int64, types.int64, types.int64), error_model="numpy")
    def run(low, high, numbers, out):  # type: ignore[no-untyped-def]
        block(low, high, numbers, out)
        return 0

    low, high, out = torch.randn(16), torch.randn(16), torch.full((32,), torch.nan)
    low[3], high[5], low[7], high[7] = torch.nan, torch.inf, 1 + 2**-8, 1 + 3 * 2**-8  # the last two are ties
    numbers = torch.tensor([0.75, -1.5]).bfloat16()
    run.ctypes(*(tensor.data_ptr() for tensor in (low, high, numbers, out)))
    pairs = torch.stack((low.bfloat16(), high.bfloat16()), 1)
    torch.testing.assert_close(out[:16].view(torch.bfloat16).view(16, 2), pairs, rtol=0, atol=0, equal_nan=True)
    expected = low + (pairs.float() * numbers.float()).sum(1)
    torch.testing.assert_close(out[16:], expected, rtol=1e-6, atol=1e-6, equal_nan=True)


def test_what_must_see_operators_sees_them() -> None:
    """torch.func, fake tensors and whoever wants a second derivative in evaluation get the layer itself."""
    net, images = build_model("small", num_classes=4).eval(), _images((64, 3, 20, 20))
    net.to(memory_format=LAST)  # type: ignore[call-overload]
    parameters = dict(net.named_parameters()) | dict(net.named_buffers())

    def logits(image: Tensor) -> Tensor:
        found: Tensor = torch.func.functional_call(net, parameters, image[None])
        return found[0]

    with torch.no_grad():
        expected = net(images)
        _close(torch.func.vmap(logits)(images), expected)
        with FakeTensorMode(allow_non_fake_inputs=True) as mode:
            assert net(mode.from_tensor(images)).shape == (64, 4)
    images.requires_grad_()
    (slope,) = torch.autograd.grad(net(images).square().sum(), images, create_graph=True)
    slope.square().sum().backward()  # type: ignore[no-untyped-call]
    assert images.grad is not None


@pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")
def test_who_counts_traces_or_differentiates_forward_sees_operators() -> None:
    net, images = build_model("small", num_classes=4).eval(), _images((64, 3, 20, 20))
    net.to(memory_format=LAST)  # type: ignore[call-overload]
    plain = copy.deepcopy(net)
    plain.fused = False
    other = _images((64, 3, 20, 20), seed=1)
    with torch.no_grad():
        expected = plain(other)
        _close(torch.jit.trace(net, images, check_trace=False)(other), expected)  # type: ignore[no-untyped-call]
        _close(make_fx(lambda values: net(values))(images)(other), expected)
        flops = []
        for each in (net, plain):
            with FlopCounterMode(display=False) as counter:
                each(images)
            flops.append(counter.get_total_flops())
        assert flops[0] == flops[1] > 0
    with torch.no_grad(), torch.autograd.forward_ad.dual_level():
        dual = torch.autograd.forward_ad.make_dual(images, other)
        slopes = [torch.autograd.forward_ad.unpack_dual(each(dual)).tangent for each in (net, plain)]
        _close(slopes[0], slopes[1])


@pytest.mark.parametrize("arch", ["small", "fast"])
@pytest.mark.parametrize("kind", [nn.Conv2d, nn.ReLU, nn.GELU, nn.BatchNorm2d, nn.MaxPool2d])
def test_hooks_of_a_layer_are_called(arch: str, kind: type[nn.Module]) -> None:
    net, images = build_model(arch, num_classes=4), _images((16, 3, 20, 20))
    net.to(memory_format=LAST)  # type: ignore[call-overload]
    layers = [layer for layer in net.features if isinstance(layer, kind)]  # type: ignore[union-attr]
    called: list[nn.Module] = []
    for layer in layers:
        layer.register_forward_hook(lambda layer, inputs, output: called.append(layer))
    net(images)
    assert called == layers
    with torch.no_grad():
        net.eval()(images)
    assert called == layers * 2


@pytest.mark.parametrize("arch", ["small", "fast"])
def test_hooks_of_all_layers_are_called(arch: str) -> None:
    net, images = build_model(arch, num_classes=4), _images((16, 3, 20, 20))
    net.to(memory_format=LAST)  # type: ignore[call-overload]
    called: list[nn.Module] = []
    note = lambda layer, *values: called.append(layer)  # noqa: E731
    features: nn.Module = net.features  # type: ignore[assignment]
    with features.register_forward_hook(note):
        net(images)
    assert called == [features]
    called.clear()
    with nn.modules.module.register_module_forward_hook(note):
        net(images)
    assert {*features.children()} <= {*called}


def test_layers_that_were_changed_are_themselves(monkeypatch: pytest.MonkeyPatch) -> None:
    class Scaled(nn.Conv2d):
        def forward(self, images: Tensor) -> Tensor:
            return 2 * super().forward(images)

    class Standardised(nn.Conv2d):
        def _conv_forward(self, images: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
            return super()._conv_forward(images, 2 * weight, bias)

    class Wrapped(nn.Module):
        def __init__(self, inner: nn.Module) -> None:
            super().__init__()
            self.inner = inner

        def forward(self, images: Tensor) -> Tensor:
            return 2 * self.inner(images)  # type: ignore[no-any-return]

    def same(net: nn.Module) -> None:
        net.to(memory_format=LAST)  # type: ignore[call-overload]
        plain = copy.deepcopy(net)
        plain.fused = False  # type: ignore[assignment]
        _close(net(images), plain(images), 5e-3)

    images = _images((16, 3, 32, 32))
    small, fast = build_model("small", num_classes=4), build_model("fast", num_classes=4)
    layers: nn.Sequential = small.features  # type: ignore[assignment]
    pool = next(i for i, layer in enumerate(layers) if isinstance(layer, nn.MaxPool2d))
    layers[pool] = nn.MaxPool2d(2)
    same(small)
    later = next(i for i, layer in enumerate(layers) if isinstance(layer, nn.Conv2d) and layer.in_channels >= 16)
    layers[later] = Scaled(layers[later].in_channels, layers[later].out_channels, 3, padding=1)
    same(small)
    layers[later] = Standardised(layers[later].in_channels, layers[later].out_channels, 3, padding=1)
    same(small)
    assert not winograd.fits(_images((64, layers[later].in_channels, 32, 32)), layers[later])
    own = layers[later].forward
    layers[later].forward = lambda images: 3 * own(images)
    same(small)
    layers.append(nn.ReLU())
    same(small)
    small.features = Wrapped(layers)
    same(small)
    for layer in fast.modules():
        if isinstance(layer, nn.GELU):
            layer.approximate = "tanh"
    monkeypatch.setattr(norms, "norm_gelu", None)  # the two differ by little: it is not called
    same(fast)


@pytest.mark.parametrize("arch", ["small", "fast"])
def test_saved_tensors_may_be_kept_in_any_layout(arch: str) -> None:
    net, images = build_model(arch, num_classes=4), _images((16, 3, 20, 20))
    net.to(memory_format=LAST)  # type: ignore[call-overload]
    other = copy.deepcopy(net)
    net(images).square().sum().backward()
    with torch.autograd.graph.saved_tensors_hooks(lambda one: one.contiguous(), lambda one: one):
        other(images).square().sum().backward()
    for one, same in zip(net.parameters(), other.parameters(), strict=True):
        assert (one.grad is None) == (same.grad is None)
        if one.grad is not None:
            _close(same.grad, one.grad, 1e-3)  # PyTorch's own convolution, the first, may round in another order


def test_channels_that_do_not_fit_are_pytorchs_to_say() -> None:
    net = build_model("small", num_classes=10, in_channels=16).to(memory_format=LAST)  # type: ignore[call-overload]
    for channels in (3, 32):
        with pytest.raises(RuntimeError, match=f"to have 16 channels, but got {channels} channels"):
            net(_images((64, channels, 32, 32)))
    layer = _layer(64, 64)
    layer.weight = nn.Parameter(layer.weight[:8].detach())  # pruned
    assert not winograd.fits(_images((64, 64, 32, 32)), layer)
    norm = nn.BatchNorm2d(16).eval()
    with torch.no_grad():
        assert not norms.fits(_images((4, 32, 8, 8)), norm)


def test_a_bias_of_any_kind_is_the_layers() -> None:
    layer, images = _layer(32, 64), _images((8, 32, 16, 16))
    for bias in (torch.randn(1).expand(64), torch.randn(64, 2)[:, 1]):
        layer.bias = None
        layer._parameters["bias"] = bias  # type: ignore[assignment]  # as functional_call sets it
        assert winograd.fits(images, layer)
        _close(winograd.conv2d(images, layer), layer(images))
    layer._parameters["bias"] = torch.randn(64, dtype=torch.float64)  # type: ignore[assignment]
    assert not winograd.fits(images, layer)


def test_a_weight_that_is_computed_is_computed_once() -> None:
    layer = torch.nn.utils.parametrizations.spectral_norm(_layer(32, 64))
    assert not winograd.fits(_images((8, 32, 16, 16)), layer)


def test_a_net_can_be_traced() -> None:
    net, images = build_model("small", num_classes=4).eval(), _images((16, 3, 20, 20))
    with torch.no_grad():
        _close(torch.fx.symbolic_trace(net)(images), net(images))


@pytest.mark.parametrize("default", [torch.float64, torch.bfloat16, "meta"])
@pytest.mark.parametrize("arch", ["small", "fast"])
def test_a_users_defaults_change_nothing(arch: str, default: torch.dtype | str) -> None:
    """The loops write to memory that they make: as much of it, and where, is not for torch's defaults to say."""
    torch.manual_seed(0)
    net, images = build_model(arch, num_classes=10).to(memory_format=LAST), _images((16, 3, 20, 20))  # type: ignore[call-overload]
    same = copy.deepcopy(net)
    net(images).square().sum().backward()
    matrix, sizes = _images((1, 1, 512, 512))[0], torch.ones(1, 1, 1)  # Muon's products, too
    winograd._zeros.cache_clear()
    winograd._evaluation.cache_clear()
    with contextlib.ExitStack() as stack:
        if isinstance(default, str):
            stack.enter_context(torch.device(default))
        else:
            stack.callback(torch.set_default_dtype, torch.get_default_dtype())
            torch.set_default_dtype(default)
        same(images).square().sum().backward()
        found = products.symmetric(products.gram(matrix, sizes), products.gram(matrix, sizes))
    for one, other in zip(net.parameters(), same.parameters(), strict=True):
        assert (one.grad is None) == (other.grad is None)
        assert one.grad is None or torch.equal(one.grad, other.grad)  # type: ignore[arg-type]
    gram = (matrix @ matrix.mT).double()
    _close(found, gram @ gram)


@pytest.mark.parametrize("arch", ["big", "small", "fast"])
@pytest.mark.parametrize("side", [17, 20, 32])
def test_a_net_gives_the_same_with_it(arch: str, side: int, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    net = build_model(arch, num_classes=10).to(memory_format=LAST)  # type: ignore[call-overload]
    plain, images = copy.deepcopy(net), _images((8, 3, side, side))
    taken: list[nn.Conv2d] = []
    convolve = winograd.conv2d

    def counted(images: Tensor, layer: nn.Conv2d) -> Tensor:
        taken.append(layer)
        return convolve(images, layer)

    monkeypatch.setattr(winograd, "conv2d", counted)
    found = net(images)
    convolutions = [layer for layer in net.modules() if isinstance(layer, nn.Conv2d)]
    assert taken
    assert set(taken) <= set(convolutions[1:])
    monkeypatch.setattr(winograd, "fits", lambda images, layer: False)
    count = len(taken)
    _close(found, plain(images), 1e-3)
    assert len(taken) == count


@pytest.mark.parametrize("arch", ["big", "small", "fast"])
@pytest.mark.parametrize("side", [20, 32])
def test_a_net_in_halves_is_as_good_as_in_bfloat16(arch: str, side: int) -> None:
    """Beside float64, five times PyTorch's own error under autocast at most: of gradients in a step, and of logits."""
    torch.manual_seed(0)
    net, images = build_model(arch, num_classes=10).to(memory_format=LAST), _images((64, 3, side, side))  # type: ignore[call-overload]
    for norm in net.modules():
        if isinstance(norm, nn.BatchNorm1d | nn.BatchNorm2d):
            norm.momentum = 1  # for the evaluation, which has these images' statistics
    exact, other = copy.deepcopy(net).double(), copy.deepcopy(net)
    other.fused = False  # type: ignore[assignment]

    def logits(which: nn.Module) -> Tensor:
        return which(images.double()) if which is exact else which(images).float()  # type: ignore[no-any-return]

    def wrong(which: nn.Module) -> tuple[float, float]:
        """How far the direction of the gradients is off, and the logits relative to their deviation."""
        of_both = [
            (one.grad.double().flatten(), right.grad.flatten())
            for one, right in zip(which.parameters(), exact.parameters(), strict=True)
            if one.dim() == 4 and one.grad is not None and right.grad is not None
        ]
        one, right = (torch.cat(grads) for grads in zip(*of_both, strict=True))
        with torch.no_grad(), _precision(halves=True):
            off = logits(which.eval()) - expected
        deviation = expected - expected.mean(0)
        return 1 - float(torch.cosine_similarity(one, right, 0)), float(off.norm() / deviation.norm())

    for which in (exact, net, other):
        with _precision(halves=which is not exact):
            F.cross_entropy(logits(which), torch.arange(64) % 10).backward()
    with torch.no_grad():
        expected = logits(exact.eval())
    ours, theirs = wrong(net), wrong(other)
    assert all(0 < one < min(5 * other, 0.6) for one, other in zip(ours, theirs, strict=True)), (ours, theirs)
    assert ours != theirs
