"""Whitening filters against the covariance written out, and what they do to the images."""

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from fastcifar.data.arrays import convert_arrays
from fastcifar.errors import ConfigError
from fastcifar.loader import Loader
from fastcifar.muon import Muon
from fastcifar.whitening import first_convolution, first_images, whiten_


@pytest.fixture(scope="module")
def images() -> Tensor:
    """float32[60, 3, 9, 8]: neighbours and channels are alike, and the mean isn't 0."""
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(60, 3, 12, 11, generator=generator)
    smooth = nn.functional.avg_pool2d(noise, 4, stride=1)
    return smooth + smooth.mean(1, keepdim=True) + 0.3


def patches(images: Tensor, height: int, width: int) -> Tensor:
    """float64[P, C * height * width], every patch of every image."""
    found = [
        image[:, top : top + height, left : left + width].reshape(-1)
        for image in images.double()
        for top in range(image.shape[1] - height + 1)
        for left in range(image.shape[2] - width + 1)
    ]
    return torch.stack(found)


def test_answers_of_the_filters_are_white(images: Tensor) -> None:
    conv = nn.Conv2d(3, 24, 2, bias=False)
    whiten_(conv, images, eps=0.0)
    answers = patches(images, 2, 2) @ conv.weight.detach().double().reshape(24, 12).T
    moments = answers.T @ answers / len(answers)
    expected = torch.eye(12).kron(torch.tensor([[1.0, -1.0], [-1.0, 1.0]]))  # in pairs of opposite sign
    torch.testing.assert_close(moments, expected.double(), rtol=0, atol=1e-4)


@pytest.mark.parametrize("eps", [5e-4, 1.0])
def test_filters_are_eigenvectors_the_largest_first(images: Tensor, eps: float) -> None:
    conv = nn.Conv2d(3, 36, (2, 3), bias=False)
    whiten_(conv, images, eps=eps)
    every = patches(images, 2, 3)
    moments = every.T @ every / len(every)
    filters = conv.weight.detach().double().reshape(36, 18)[::2]
    values = torch.linalg.eigvalsh(moments).flip(0)
    torch.testing.assert_close(filters.norm(dim=1) ** -2, values + eps, rtol=1e-4, atol=1e-6)
    for one, value in zip(filters, values, strict=True):
        torch.testing.assert_close(moments @ one, value * one, rtol=1e-3, atol=1e-4)
        assert one[one.abs().argmax()] > 0


@pytest.mark.parametrize(("rows", "made"), [(5, 4), (6, 6), (24, 24), (25, 24), (30, 24)])
def test_as_many_filters_as_there_are_in_pairs_and_the_others_stay(images: Tensor, rows: int, made: int) -> None:
    full, conv = nn.Conv2d(3, 24, 2), nn.Conv2d(3, rows, 2)
    weight = conv.weight.detach().clone()
    whiten_(full, images)
    whiten_(conv, images)
    assert torch.equal(conv.weight[:made], full.weight[:made])
    assert torch.equal(conv.weight[made:], weight[made:])
    assert torch.equal(conv.weight[1:made:2], -conv.weight[:made:2])
    assert conv.bias is not None
    assert not conv.bias.any()


def test_what_follows_does_not_depend_on_the_filters_size(images: Tensor) -> None:
    torch.manual_seed(0)
    layers = nn.Sequential(nn.Conv2d(3, 24, 3), nn.ReLU(), nn.BatchNorm2d(24, eps=1e-12))
    whiten_(layers[0], images)  # type: ignore[arg-type]
    before = layers(images)
    optimizer = Muon([{"params": [layers[0].weight], "orthogonal": True}], lr=0.0, momentum=0.6)
    layers[0].weight.grad = torch.zeros_like(layers[0].weight)  # type: ignore[arg-type]
    optimizer.step()  # type: ignore[no-untyped-call]
    assert (layers[0].weight.norm() - 24**0.5).abs() < 1e-4  # type: ignore[operator]
    torch.testing.assert_close(layers(images), before, rtol=1e-3, atol=1e-3)


def test_layout_and_chunks_change_nothing(images: Tensor, monkeypatch: pytest.MonkeyPatch) -> None:
    plain, other = nn.Conv2d(3, 24, 2), nn.Conv2d(3, 24, 2).to(memory_format=torch.channels_last)
    whiten_(plain, images)
    whiten_(other, images.to(memory_format=torch.channels_last))
    assert torch.equal(plain.weight, other.weight)
    monkeypatch.setattr("fastcifar.whitening._CHUNK", 7)
    whiten_(other, images)
    torch.testing.assert_close(plain.weight, other.weight, rtol=1e-3, atol=1e-4)


def test_images_of_one_colour_give_finite_filters() -> None:
    conv = nn.Conv2d(1, 8, 2)
    whiten_(conv, torch.zeros(3, 1, 5, 5))
    assert conv.weight.isfinite().all()


def test_first_images_are_the_first_in_order_and_no_padding(tmp_path: Path) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (10, 20, 20, 3), np.uint8)
    store = convert_arrays(tmp_path / "store", pixels, np.arange(10) % 2)
    loader = Loader(store, split="train", batch_size=4, scaling="raw", order="sequential", pad_last=True)
    expected = torch.from_numpy(pixels).permute(0, 3, 1, 2).float()
    assert torch.equal(first_images(loader), expected)
    assert torch.equal(first_images(loader, 6), expected[:6])


def test_the_first_convolution_is_found() -> None:
    first = nn.Conv2d(1, 2, 3)
    assert first_convolution(nn.Sequential(nn.Sequential(nn.ReLU(), first), nn.Conv2d(2, 2, 3))) is first
    with pytest.raises(ConfigError, match="whiten needs a net with a convolution"):
        first_convolution(nn.Linear(1, 1))
