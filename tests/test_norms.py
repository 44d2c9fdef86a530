"""ReLU or GELU, BatchNorm and max-pooling as one: beside PyTorch's modules in float64, and within the nets."""

import copy
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from fastcifar import build_model
from fastcifar.kernels import norms, openmp, winograd
from tests.effort import effort
from tests.threads import on_threads

LAST = torch.channels_last


def values_of(shape: tuple[int, ...], dtype: torch.dtype, seed: int) -> Tensor:
    """Multiples of an eighth, so that values are equal or far apart: one maximum in all arithmetics."""
    generator = torch.Generator().manual_seed(seed)
    return (torch.randint(-20, 20, shape, generator=generator) / 8).to(dtype).contiguous(memory_format=LAST)


def norm_of(channels: int, seed: int) -> nn.BatchNorm2d:
    generator = torch.Generator().manual_seed(seed)
    norm = nn.BatchNorm2d(channels, momentum=0.3, eps=1e-3)
    with torch.no_grad():
        norm.weight.copy_(torch.randint(-4, 5, (channels,), generator=generator) / 2 + 0.25)
        norm.bias.normal_(generator=generator)
    return norm


def modules(values: Tensor, norm: nn.BatchNorm2d, *, pool: bool) -> Tensor:
    out: Tensor = norm(F.relu(values))
    return F.max_pool2d(out, 3, stride=2, padding=1) if pool else out


def close(found: Tensor | None, expected: Tensor | None, tolerance: float) -> None:
    assert found is not None
    assert expected is not None
    wrong = (found.double() - expected.double()).abs().max()
    assert wrong <= tolerance * (expected.double().abs().max() + 1), wrong


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("pool", [True, False])
@settings(max_examples=effort(30), deadline=None)
@given(
    images=st.integers(1, 5),
    channels=st.sampled_from((16, 32, 48, 128)),
    height=st.integers(2, 33),
    width=st.integers(1, 33),
    seed=st.integers(0, 2**31),
)
def test_equals_the_modules(
    images: int, channels: int, height: int, width: int, seed: int, pool: bool, dtype: torch.dtype
) -> None:
    """Output, every gradient and the running statistics; bfloat16 is rounded once, by 2**-9."""
    tolerance = 1e-4 if dtype == torch.float32 else 5e-3
    values = values_of((images, channels, height, width), dtype, seed).requires_grad_()
    exact = values.detach().double().requires_grad_()
    norm = norm_of(channels, seed)
    reference = copy.deepcopy(norm).double()
    assert norms.fits(values, norm)
    found, expected = norms.relu_norm(values, norm, pool=pool), modules(exact, reference, pool=pool)
    assert found.dtype == dtype
    assert found.is_contiguous(memory_format=LAST)
    close(found, expected, tolerance)
    gradient = values_of(tuple(found.shape), dtype, seed + 1)
    found.backward(gradient)
    expected.backward(gradient.double())
    close(values.grad, exact.grad, tolerance)
    close(norm.weight.grad, reference.weight.grad, 1e-4)
    close(norm.bias.grad, reference.bias.grad, 1e-4)
    close(norm.running_mean, reference.running_mean, 1e-5)
    close(norm.running_var, reference.running_var, 1e-5)
    assert norm.num_batches_tracked == 1


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@settings(max_examples=effort(30), deadline=None)
@given(
    images=st.integers(1, 5),
    channels=st.sampled_from((16, 64, 144)),
    height=st.integers(2, 33),
    width=st.integers(2, 33),
    seed=st.integers(0, 2**31),
)
def test_halved_and_normalised_with_gelu_as_by_the_modules(
    images: int, channels: int, height: int, width: int, seed: int, dtype: torch.dtype
) -> None:
    """The other order: 2x2 maxima, the first of equals, then the norm, then GELU; every gradient."""
    tolerance = 1e-4 if dtype == torch.float32 else 8e-3
    pool = nn.MaxPool2d(2)
    values = values_of((images, channels, height, width), dtype, seed).requires_grad_()
    exact = values.detach().double().requires_grad_()
    norm = norm_of(channels, seed)
    reference = copy.deepcopy(norm).double()
    assert norms.halves(values, pool)
    halved, expected_halved = norms.halve(values), pool(exact)
    assert torch.equal(halved.double(), expected_halved)
    if halved.numel() == channels:
        return  # a norm of one value
    assert norms.fits(halved, norm)
    found, expected = norms.norm_gelu(halved, norm), F.gelu(reference(expected_halved))
    assert found.dtype == dtype
    assert found.is_contiguous(memory_format=LAST)
    close(found, expected, tolerance)
    gradient = values_of(tuple(found.shape), dtype, seed + 1)
    found.backward(gradient)
    expected.backward(gradient.double())
    # in bfloat16 GELU's gradient is rounded, as PyTorch's is, and few values' may cancel
    deviation = (expected_halved.transpose(0, 1).flatten(1).var(1, correction=0) + reference.eps).sqrt()
    terms = gradient.double().abs().max() * (reference.weight.abs() / deviation).max()
    close(values.grad, exact.grad, tolerance * (1 if dtype == torch.float32 else 1 + float(terms.detach())))
    close(norm.weight.grad, reference.weight.grad, 1e-4)
    close(norm.bias.grad, reference.bias.grad, 1e-4)


def test_running_statistics_follow_with_gelu_behind_the_norm() -> None:
    values, norm = values_of((3, 32, 9, 7), torch.float32, 0), norm_of(32, 0)
    reference = copy.deepcopy(norm)
    norms.norm_gelu(values, norm)
    reference(values)
    close(norm.running_mean, reference.running_mean, 1e-5)
    close(norm.running_var, reference.running_var, 1e-5)
    assert norm.num_batches_tracked == 1


def test_gelu_far_from_zero_and_of_nan() -> None:
    """Zero or the value itself beyond what float32 tells apart; NaN where a value is NaN, and its gradient."""
    far = [-1e4, -40.0, -14.0, -6.0, -1e-3, 0.0, 1e-3, 6.0, 14.0, 40.0, 1e4]
    norm = nn.BatchNorm2d(16).train()
    with torch.no_grad():
        norm.bias.copy_(torch.tensor([*far, *far])[:16])
    values = torch.tensor([-1e-6, 1e-6]).repeat(16, 1).T.reshape(2, 16, 1, 1).contiguous(memory_format=LAST)
    values.requires_grad_()
    out = norms.norm_gelu(values, norm)
    out.sum().backward()
    middle = out.detach().mean((0, 2, 3))
    close(middle, F.gelu(norm.bias.detach().double()), 1e-6)
    assert middle[0].abs() < 1e-30
    assert middle[10] == 1e4
    assert norm.bias.grad is not None
    exact = norm.bias.detach().double().requires_grad_()
    F.gelu(exact).sum().backward()
    close(norm.bias.grad / 2, exact.grad, 1e-6)
    values = values_of((2, 16, 9, 9), torch.float32, 0)
    values[1, 3, 4, 4] = float("nan")
    values.requires_grad_()
    out = norms.norm_gelu(values, norm)
    out.sum().backward()
    assert values.grad is not None
    assert out[:, 3].isnan().all()
    assert out[:, :3].isfinite().all()
    assert values.grad[:, 3].isnan().all()


def test_nan_stays_the_maximum_of_its_window() -> None:
    for place in range(4):
        values = values_of((1, 16, 2, 2), torch.float32, 0)
        values[0, 5, place // 2, place % 2] = float("nan")
        values.requires_grad_()
        halved = norms.halve(values)
        assert halved[0, 5].isnan().all()
        assert halved.isnan().sum() == 1
        halved.sum().backward()
        assert values.grad is not None
        assert values.grad[0, 5, place // 2, place % 2] == 1


@pytest.mark.parametrize(
    "change",
    [
        lambda values, pool: (values.half(), pool),
        lambda values, pool: (values.contiguous(), pool),
        lambda values, pool: (values[:, :8].contiguous(memory_format=LAST), pool),
        lambda values, pool: (values[:, :, :1].contiguous(memory_format=LAST), pool),
        lambda values, pool: (values, pool.eval()),
        lambda values, pool: (values, nn.MaxPool2d(2, ceil_mode=True)),
        lambda values, pool: (values, nn.MaxPool2d(2, stride=1)),
        lambda values, pool: (values, nn.MaxPool2d(3)),
        lambda values, pool: (values, nn.AvgPool2d(2)),
    ],
)
def test_pools_that_do_not_fit_are_left_to_the_modules(change: object) -> None:
    values, pool = values_of((3, 16, 8, 8), torch.float32, 0), nn.MaxPool2d(2)
    assert norms.halves(values, pool)
    assert not norms.halves(*change(values, pool))  # type: ignore[operator]


def test_a_large_mean_costs_no_digits() -> None:
    """As E[x^2] - E[x]^2 would: here by 2**-24 of 1e8, where the variance is 1."""
    values = (torch.randn(8, 16, 16, 16, dtype=torch.float64) + 1e4).float().contiguous(memory_format=LAST)
    norm = nn.BatchNorm2d(16, momentum=1.0)
    norms.relu_norm(values, norm, pool=False)
    close(norm.running_var, values.double().transpose(0, 1).flatten(1).var(1), 1e-3)


@pytest.mark.parametrize(
    "through",
    [
        lambda values, norm: norms.relu_norm(values, norm, pool=True),
        lambda values, norm: norms.relu_norm(values, norm, pool=False),
        norms.norm_gelu,
    ],
)
def test_threads_change_no_bit(
    through: Callable[[Tensor, nn.BatchNorm2d], Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    def run(threads: int) -> list[Tensor]:
        with on_threads(threads):
            values, norm = values_of((7, 64, 20, 20), torch.bfloat16, 0).requires_grad_(), norm_of(64, 0)
            out = through(values, norm)
            out.backward(values_of(tuple(out.shape), torch.bfloat16, 1))
            return [out, values.grad, norm.weight.grad, norm.bias.grad, norm.running_var]  # type: ignore[list-item]

    one = run(1)
    for other in (run(2), run(3)):
        assert all(map(torch.equal, one, other))
    monkeypatch.setattr(openmp, "_parallel", lambda: None)
    assert all(map(torch.equal, one, run(2)))


@pytest.mark.parametrize("pool", [True, False])
def test_nan_and_infinity_are_seen(pool: bool) -> None:
    for bad in (float("nan"), float("inf")):
        values = values_of((2, 16, 9, 9), torch.float32, 0)
        values[1, 3, 4, 4] = bad
        values.requires_grad_()
        norm = norm_of(16, 0)
        out = norms.relu_norm(values, norm, pool=pool)
        out.sum().backward()
        assert norm.running_mean is not None
        assert not torch.isfinite(norm.running_mean[3])
        assert out[:, 3].isnan().any()
        assert out[:, :3].isfinite().all()
        assert values.grad is not None
        assert values.grad[:, 3].isnan().any()


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("place", [(0, 0), (1, 1), (2, 5), (8, 8)])
def test_nan_and_infinity_are_pooled_as_pytorch_does(place: tuple[int, int], bad: float) -> None:
    values = values_of((2, 16, 9, 9), torch.float32, 0)
    values[1, 3, place[0], place[1]] = bad
    norm = norm_of(16, 0).eval()
    with torch.no_grad():
        out = norms.relu_norm(values, norm, pool=True)
        expected = torch.nn.functional.max_pool2d(norm(values.relu()), 3, 2, 1)
    torch.testing.assert_close(out, expected, equal_nan=True)


def without_bias(norm: nn.BatchNorm2d) -> nn.BatchNorm2d:
    """As bias=False of newer PyTorch makes it."""
    norm.register_parameter("bias", None)
    return norm


@pytest.mark.parametrize(
    "change",
    [
        lambda values, norm: (values.double(), norm),
        lambda values, norm: (values.half(), norm),
        lambda values, norm: (values.contiguous(), norm),
        lambda values, norm: (values, norm.eval()),
        lambda values, norm: (values, nn.BatchNorm2d(16, affine=False)),
        lambda values, norm: (values, nn.BatchNorm2d(16, momentum=None)),
        lambda values, norm: (values, without_bias(norm)),
        lambda values, norm: (values, nn.BatchNorm2d(16, track_running_stats=False)),
        lambda values, norm: (values[:, :8].contiguous(memory_format=LAST), nn.BatchNorm2d(8)),
        lambda values, norm: (values.to("meta"), norm),
        lambda values, norm: (values, nn.Identity()),
        lambda values, norm: (values, nn.SyncBatchNorm(16)),
    ],
)
def test_what_does_not_fit_is_left_to_the_modules(change: object) -> None:
    values, norm = values_of((3, 16, 8, 8), torch.float32, 0), norm_of(16, 0)
    assert norms.fits(values, norm)
    assert not norms.fits(*change(values, norm))  # type: ignore[operator]


@pytest.mark.parametrize("arch", ["small", "big", "fast"])
@pytest.mark.parametrize("side", [32, 17])
def test_the_nets_train_as_they_would_with_their_modules(arch: str, side: int) -> None:
    torch.manual_seed(0)
    net = build_model(arch, num_classes=10).to(memory_format=LAST)  # type: ignore[call-overload]
    other, plain = copy.deepcopy(net).double(), copy.deepcopy(net)
    other.fused = plain.fused = False
    images = torch.randn(8, 3, side, side).contiguous(memory_format=LAST)
    labels = torch.arange(8)
    used = []
    original = norms._run

    def run(name: str, *given: object, **more: object) -> None:
        used.append(name)
        original(name, *given, **more)  # type: ignore[arg-type]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(norms, "_run", run)
        patch.setattr(winograd, "fits", lambda images, layer: False)  # its rounding would decide between equal maxima
        loss = F.cross_entropy(net(images), labels)
        loss.backward()
    expected = F.cross_entropy(other(images.double()), labels)
    expected.backward()
    close(loss, expected, 1e-4)
    if arch == "fast":
        assert used.count("plain_moments") == used.count("plain_back") == 6
        assert used.count("halve") == used.count("spread") == 3
    else:
        assert used.count("moments") == (4 if arch == "small" else 8)
        assert used.count("unpool") == 4
    F.cross_entropy(plain(images), labels).backward()
    # Eight samples' BatchNorms magnify each rounding, layer by layer: no more than in PyTorch's own float32.
    for (name, mine), modules_, exact in zip(
        net.named_parameters(), plain.parameters(), other.parameters(), strict=True
    ):
        if not mine.requires_grad:  # the norms of net fast do not scale
            assert mine.grad is None
            continue
        assert mine.grad is not None, name
        assert modules_.grad is not None, name
        assert exact.grad is not None, name
        allowed = 10 * (modules_.grad - exact.grad).norm() + 1e-4 * exact.grad.norm() + 1e-6
        assert (mine.grad - exact.grad).norm() <= allowed, name
    net.eval()
    other.eval()
    close(net(images), other(images.double()), 1e-3)
    used.clear()
    with pytest.MonkeyPatch.context() as patch, torch.no_grad():
        patch.setattr(norms, "_run", run)
        close(net(images), other(images.double()), 1e-3)
    counts = {"apply_gelu": 6, "halve": 3} if arch == "fast" else {"pool": 4, "apply": {"small": 0, "big": 4}[arch]}
    assert {name: used.count(name) for name in counts} == counts
    assert len(used) == sum(counts.values())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("without", [torch.no_grad, torch.inference_mode])
@settings(max_examples=effort(10), deadline=None)
@given(height=st.integers(2, 33), width=st.integers(2, 33), seed=st.integers(0, 2**31))
def test_evaluation_is_by_the_running_statistics(
    height: int, width: int, seed: int, without: Callable[[], Any], dtype: torch.dtype
) -> None:
    tolerance = 1e-5 if dtype == torch.float32 else 5e-3
    values, norm, pool = values_of((3, 32, height, width), dtype, seed), norm_of(32, seed), nn.MaxPool2d(2)
    norm.running_mean = torch.linspace(-1, 2, 32)
    norm.running_var = torch.linspace(0.01, 4, 32)
    reference = copy.deepcopy(norm).double().eval()
    before = copy.deepcopy(norm.state_dict())
    norm.eval()
    pool.eval()
    assert not norms.fits(values, norm)  # a gradient may be wanted
    assert not norms.halves(values, pool)
    with without():
        assert norms.fits(values, norm)
        assert norms.halves(values, pool)
        for pooled in (True, False):
            found = norms.relu_norm(values, norm, pool=pooled)
            close(found, modules(values.double(), reference, pool=pooled), tolerance)
        close(norms.norm_gelu(values, norm), F.gelu(reference(values.double())), tolerance)
        assert torch.equal(norms.halve(values), pool(values))
    for name, tensor in norm.state_dict().items():
        assert torch.equal(tensor, before[name]), name


def test_statistics_are_kept_without_gradients() -> None:
    values, norm = values_of((3, 16, 8, 8), torch.float32, 0), norm_of(16, 0)
    with torch.no_grad():
        out = norms.relu_norm(values, norm, pool=True)
    assert not out.requires_grad
    assert norm.running_mean is not None
    assert np.all(norm.running_mean.numpy() != 0)
