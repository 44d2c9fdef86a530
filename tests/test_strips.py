"""Tests of fastcifar.kernels.strips: the convolution of many small images side by side is each image's own."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from fastcifar.kernels import strips, winograd
from fastcifar.nets import build_model


def _gradients(layer: nn.Conv2d, images: Tensor, values: Tensor) -> list[Tensor]:
    weight = torch.randn(values.shape, generator=torch.Generator().manual_seed(1), dtype=values.dtype)
    wanted = [images, *layer.parameters()]
    return list(torch.autograd.grad((values * weight).sum(), wanted))


@settings(deadline=None)
@given(
    batch=st.integers(1, 40),
    height=st.integers(1, 9),
    width=st.integers(1, 9),
    bias=st.booleans(),
    channels_last=st.booleans(),
)
def test_strips_give_the_layers_values_and_gradients(
    batch: int, height: int, width: int, bias: bool, channels_last: bool
) -> None:
    torch.manual_seed(0)
    layer = nn.Conv2d(3, 5, 3, padding=1, bias=bias).double()
    images = torch.randn(batch, 3, height, width, dtype=torch.float64)
    if channels_last:
        images = images.contiguous(memory_format=torch.channels_last)
    images.requires_grad_()
    expected, found = layer(images), strips.conv2d(images, layer)
    torch.testing.assert_close(found, expected)
    torch.testing.assert_close(_gradients(layer, images, found), _gradients(layer, images, expected))


@pytest.mark.parametrize(
    ("batch", "side", "expected"), [(250, 4, 25), (250, 8, 5), (250, 9, 1), (250, 32, 1), (7, 4, 7), (64, 3, 32)]
)
def test_a_strip_is_as_many_images_as_divide_the_batch_and_fit(batch: int, side: int, expected: int) -> None:
    assert strips.strip_of(batch, side) == expected


def test_strips_are_for_bfloat16_with_matrix_units(monkeypatch: pytest.MonkeyPatch) -> None:
    layer, images = nn.Conv2d(4, 4, 3, padding=1), torch.zeros(2, 4, 4, 4)
    monkeypatch.setattr(strips, "has_matrix_units", lambda: True)
    assert not strips.fits(images, layer)
    assert strips.fits(images.bfloat16(), layer)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert strips.fits(images, layer)
    for other in (nn.Conv2d(4, 4, 2), nn.Conv2d(4, 4, 3, padding=1, stride=2), nn.Conv2d(4, 4, 3, padding=1, groups=2)):
        assert not strips.fits(images.bfloat16(), other)
    monkeypatch.setattr(strips, "has_matrix_units", lambda: False)
    assert not strips.fits(images.bfloat16(), layer)


@pytest.mark.parametrize("arch", ["big", "small", "fast"])
def test_a_net_gives_the_same_with_strips(arch: str, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    net = build_model(arch, num_classes=10).to(memory_format=torch.channels_last)
    images = torch.randn(12, 3, 20, 20).contiguous(memory_format=torch.channels_last)
    monkeypatch.setattr(winograd, "fits", lambda images, layer: False)
    expected = net(images)
    taken = []
    convolve = strips.conv2d
    monkeypatch.setattr(strips, "fits", lambda images, layer: images.shape[1] > 3)
    monkeypatch.setattr(strips, "conv2d", lambda images, layer: taken.append(layer) or convolve(images, layer))
    torch.testing.assert_close(net(images), expected, rtol=1e-3, atol=1e-4)
    assert taken
