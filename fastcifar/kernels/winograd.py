"""3x3 convolutions on the CPU in float32 with a quarter of the multiplications: Winograd's minimal filtering.

    conv2d(images, layer)    # what layer(images) gives, but for rounding

A tile of 6x6 pixels gives 4x4 outputs by 36 products for each pair of channels, where sums of 3x3 products take 144:
tile and filter are taken as polynomials, and multiplied at six points a side (Lavin & Gray 2016, F(4x4, 3x3)). What
all tiles have at one point is a matrix, and its product with that of the filters is one matrix product. The gradients
go the same way back, transposed.

Images are taken a few at a time, so that what is made of them stays near.
"""

import ctypes
import functools
from typing import Any

import torch
from torch import Tensor, nn

from fastcifar.kernels import machine, winograd_fields
from fastcifar.kernels.openmp import launch
from fastcifar.kernels.winograd_fields import LANES, WORDS

__all__ = ["conv2d", "fits", "prepare"]

_POINTS = 36
_TILE = 4
_CHUNK = 64 << 20
"""Bytes of the tiles, before and after the products, that are made at a time."""

_LEAST = 1.5
"""How many times fewer products there must be: the less an image fills its tiles, the more are for nothing."""


def fits(images: Tensor, layer: nn.Conv2d) -> bool:
    """Whether it can be computed so, and that pays: a 3x3 convolution in float32 on a CPU with Intel's MKL.

    In evaluation it is for those who want no gradient: there the operation has none of second order, as the layer has.
    """
    height, width = images.shape[2:]
    return (
        images.device.type == "cpu"
        and images.dtype == layer.weight.dtype == torch.float32
        and not torch.is_autocast_enabled("cpu")
        and _has_mkl()
        and layer.kernel_size == (3, 3)
        and layer.padding == (1, 1)
        and layer.padding_mode == "zeros"
        and layer.stride == layer.dilation == (1, 1)
        and layer.groups == 1
        and min(layer.in_channels, layer.out_channels) >= LANES
        and 9 * height * width >= _LEAST * _POINTS * _tiles(height, width)
        and images.is_contiguous(memory_format=torch.channels_last)
        and (layer.training or not torch.is_grad_enabled())
        and not torch.compiler.is_compiling()
    )


@functools.cache
def _has_mkl() -> bool:
    """Its batched matrix products are what makes this fast."""
    return bool(torch.backends.mkl.is_available())  # type: ignore[no-untyped-call]


def prepare() -> None:
    """Load the loops, or compile them (seconds, once on a machine), so that no step waits for it."""
    machine.load(machine.WINOGRAD)


def conv2d(images: Tensor, layer: nn.Conv2d) -> Tensor:
    """The layer's convolution.

    Args:
        images: float32 [B, C, H, W], channels-last, see `fits`.
        layer: the convolution, to K channels.

    Returns:
        float32 [B, K, H, W], channels-last.
    """
    found: Tensor = _Convolution.apply(images, layer.weight, layer.bias)  # type: ignore[no-untyped-call]
    return found


class _Convolution(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, images: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(images, weight)
        ctx.has_bias = bias is not None
        batch, _, height, width = images.shape
        count = weight.shape[0]
        out = torch.empty((batch, count, height, width), memory_format=torch.channels_last)
        filters = _filters(weight).transpose(1, 2)
        offsets = torch.zeros(count) if bias is None else bias.detach()
        for part in _parts(images, count):
            tiles = _run("gather", images[part])
            _run("scatter", out[part], torch.bmm(tiles, filters), offsets)
        return out

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        images, weight = ctx.saved_tensors
        gradient = gradient.contiguous(memory_format=torch.channels_last)
        for_images, for_weight, for_bias = ctx.needs_input_grad
        filters = _filters(weight)
        count, channels = weight.shape[:2]
        found = torch.empty_like(images) if for_images else None
        sums = torch.zeros((count, _POINTS, channels)) if for_weight else None
        biases = torch.zeros(count) if for_bias else None
        for part in _parts(images, count):
            slopes = _run("gather_back", gradient[part])
            if sums is not None:
                tiles = _run("gather", images[part])
                sums.transpose(0, 1).baddbmm_(slopes.transpose(1, 2), tiles)
            if biases is not None:
                biases += slopes[_SUM].sum(0)
            if found is not None:
                _run("scatter_back", found[part], torch.bmm(slopes, filters))
        filter_gradient = None if sums is None else _filter_gradient(sums)
        return found, filter_gradient, biases


_SUM = 7
"""The point (1, 1): a polynomial's value there is the sum of its coefficients."""


@functools.cache
def _at_points() -> Tensor:
    """float32 [36, 9]: what a filter's nine numbers are multiplied by for its values at the points."""
    sixth, part = 1 / 6, 1 / 24
    side = torch.tensor(
        [
            [1 / 4, 0, 0],
            [-sixth, -sixth, -sixth],
            [-sixth, sixth, -sixth],
            [part, 2 * part, 4 * part],
            [part, -2 * part, 4 * part],
            [0, 0, 1],
        ],
        dtype=torch.float64,
    )
    return torch.kron(side, side).float()


def _filters(weight: Tensor) -> Tensor:
    """float32 [36, K, C] of [K, C, 3, 3]."""
    count, channels = weight.shape[:2]
    return torch.matmul(_at_points(), weight.permute(0, 2, 3, 1).reshape(count, 9, channels)).transpose(0, 1)


def _filter_gradient(sums: Tensor) -> Tensor:
    """float32 [K, C, 3, 3], channels-last, of the gradient [K, 36, C] of the filters at the points."""
    count, _, channels = sums.shape
    return torch.matmul(_at_points().t(), sums).view(count, 3, 3, channels).permute(0, 3, 1, 2)


def _tiles(height: int, width: int) -> int:
    return -(-height // _TILE) * -(-width // _TILE)


def _parts(images: Tensor, count: int) -> list[slice]:
    """The images that are taken together, as slices of the batch."""
    batch, channels, height, width = images.shape
    size = 4 * _POINTS * _tiles(height, width) * (channels + count)
    step = max(1, min(batch, _CHUNK // size))
    return [slice(first, first + step) for first in range(0, batch, step)]


def _run(name: str, images: Tensor, planes: Tensor | None = None, bias: Tensor | None = None) -> Tensor:
    """Call a compiled loop, which makes planes [36, T, C] of the images, or these of given ones.

    Args:
        name: of the loop.
        images: float32 [B, C, H, W], channels-last.
        planes: float32 [36, T, C], T being B times the tiles of an image; None: they are made.
        bias: float32 [C], which is added.
    """
    batch, channels, height, width = images.shape
    if planes is None:
        # one row more, so that the planes of a tile don't meet in one set of the cache
        rows = batch * _tiles(height, width)
        planes = torch.empty((_POINTS, rows + 1, channels))[:, :rows]
    job = (ctypes.c_int64 * WORDS)()
    addresses = {"images": images, "planes": planes, "bias": bias, "zeros": _zeros()}
    numbers = {"count": batch, "height": height, "width": width, "channels": channels}
    for field, tensor in addresses.items():
        job[getattr(winograd_fields, field.upper())] = 0 if tensor is None else tensor.data_ptr()
    for field, number in (numbers | {"stride": planes.stride(0) // channels}).items():
        job[getattr(winograd_fields, field.upper())] = number
    launch(machine.load(machine.WINOGRAD)[name], job, batch)
    return planes


@functools.cache
def _zeros() -> Tensor:
    return torch.zeros(LANES)
