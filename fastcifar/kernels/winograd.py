"""3x3 convolutions on the CPU in float32 with a quarter of the multiplications: Winograd's minimal filtering.

    conv2d(images, layer)    # what layer(images) gives, but for rounding

A tile of 6x6 pixels gives 4x4 outputs by 36 products for each pair of channels, where sums of 3x3 products take 144:
tile and filter are taken as polynomials, and multiplied at six points a side (Lavin & Gray 2016, F(4x4, 3x3)). What
all tiles have at one pair of points is a matrix, a plane, and its product with that of the filters is one matrix
product. The gradients go the same way back, transposed. Nothing depends on the number of threads.

Tiles of 3x3 and 5x5 outputs are for images that those of 4x4 would hang over: at 5x5 pixels one takes 49 products for
the 144 of four.

Images are taken a few at a time, so that what is made of them stays in the cache.
"""

import functools
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastcifar.kernels import machine, winograd_fields
from fastcifar.kernels.norm_fields import LANES
from fastcifar.kernels.openmp import launch, new_job, set_numbers, takes
from fastcifar.kernels.product_fields import TALL
from fastcifar.kernels.products import add_products, combined, multiply, planes, up
from fastcifar.kernels.strips import is_3x3
from fastcifar.kernels.winograd_fields import TILES

__all__ = ["conv2d", "fits", "prepare"]

_FLOATS: dict[str, Any] = {"dtype": torch.float32, "device": "cpu"}
"""Of whatever the loops write to: what a user's defaults are must not matter."""

_CHUNK = 32 << 20
"""Bytes of the planes, before and after the products, that are made at a time."""

_LEAST = 1.5
"""How many times fewer products there must be: the less an image fills its tiles, the more are for nothing."""

_FILTERS = 32
"""Tiles that take as long as the filters: a few small images don't pay for these."""


def fits(images: Tensor, layer: nn.Conv2d) -> bool:
    """Whether it can be computed so, and that pays: a 3x3 convolution in float32 on a CPU.

    In evaluation it is for those who want no gradient: there the operation has none of second order, as the layer has.
    """
    if not takes(images):
        return False
    batch, _, height, width = images.shape
    tiling = _tiling(height, width)
    return (
        images.dtype == layer.weight.dtype == torch.float32
        and not torch.is_autocast_enabled("cpu")
        and is_3x3(layer)
        and _is_plain_bias(layer.bias)
        and min(layer.weight.shape[:2]) >= LANES
        and images.shape[1] == layer.weight.shape[1]  # else the layer says so
        and 9 * batch * height * width >= _LEAST * tiling.points**2 * (batch * tiling.tiles + _FILTERS)
        and (layer.training or not torch.is_grad_enabled())
    )


def _is_plain_bias(bias: Tensor | None) -> bool:
    return bias is None or (type(bias) in (Tensor, nn.Parameter) and bias.dtype == torch.float32 and bias.is_cpu)


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
        batch, _, height, width = images.shape
        count = weight.shape[0]
        out = torch.empty((batch, count, height, width), memory_format=torch.channels_last, **_FLOATS)
        tiling = _tiling(height, width)
        filters = _at_points(weight, tiling.side)
        offsets = torch.zeros(count, **_FLOATS) if bias is None else bias.detach().contiguous()
        for part in _parts(images, count):
            products = multiply(_planes_of("gather", images[part]), filters, count)
            _run("scatter", out[part], products, offsets)
        return out

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        images, weight = ctx.saved_tensors
        images = images.contiguous(memory_format=torch.channels_last)  # hooks may have kept them otherwise
        gradient = gradient.contiguous(memory_format=torch.channels_last)
        count, channels = weight.shape[:2]
        tiling = _tiling(*images.shape[2:])
        for_images, for_weight, for_bias = ctx.needs_input_grad
        found = torch.empty_like(images) if for_images else None
        filters = _at_points(weight.transpose(0, 1), tiling.side) if for_images else None
        ones = tiling.points + 1  # the plane of points 1 and 1, where a polynomial is the sum of its numbers
        size = (tiling.points**2, up(count, TALL), up(channels, LANES))
        sums = torch.empty(size, **_FLOATS) if for_weight else None
        biases = torch.zeros(count, **_FLOATS) if for_bias else None
        for part in _parts(images, count):
            slopes = _planes_of("gather_back", gradient[part])
            if sums is not None:
                add_products(slopes, _planes_of("gather", images[part]), sums, count, fresh=part.start == 0)
            if biases is not None:
                biases += slopes[ones, :, :count].sum(0)
            if found is not None and filters is not None:
                _run("scatter_back", found[part], multiply(slopes, filters, channels))
        return found, None if sums is None else _from_points(sums, weight, tiling.side), biases


class _Tiling(NamedTuple):
    """How an image is cut: tiles of `side` x `side` outputs, `rows` x `columns` of them."""

    side: int
    rows: int
    columns: int

    @property
    def points(self) -> int:
        """Along a side."""
        return self.side + 2

    @property
    def tiles(self) -> int:
        return self.rows * self.columns


@functools.cache
def _tiling(height: int, width: int) -> _Tiling:
    """That of fewest products."""
    found = [_Tiling(side, -(-height // side), -(-width // side)) for side in TILES]
    return min(found, key=lambda tiling: tiling.points**2 * tiling.tiles)


# A row for each point p, in the order of `winograd_loops`: what a filter's three numbers are multiplied by. It is 1, p
# and p ** 2, over the product of p's distances from the other points; at infinity the value is the last number alone.
_FILTERS_AT = {
    3: ((1 / 2, 0, 0), (-1 / 2,) * 3, (-1 / 6, 1 / 6, -1 / 6), (0, 0, 1), (1 / 6, 2 / 6, 4 / 6)),
    4: (
        *((1 / 4, 0, 0), (-1 / 6,) * 3, (-1 / 6, 1 / 6, -1 / 6)),
        *((1 / 24, 2 / 24, 4 / 24), (1 / 24, -2 / 24, 4 / 24), (0, 0, 1)),
    ),
    5: (
        *((-1 / 2, 0, 0), (-1 / 3,) * 3, (1 / 9, -1 / 9, 1 / 9)),
        *((1 / 36, 2 / 36, 4 / 36), (-1 / 60, 2 / 60, -4 / 60), (0, 0, 1)),
        (2 / 45, 1 / 45, 1 / 90),
    ),
}


@functools.cache
def _evaluation(side: int) -> tuple[Tensor, Tensor]:
    """float32 [points ** 2, 9], and transposed: what a filter's nine numbers are multiplied by for its values there.

    Both have columns of zeros more, up to a multiple of `TALL`.
    """
    along = torch.tensor(_FILTERS_AT[side], dtype=torch.float64, device="cpu")
    both = torch.kron(along, along).float()
    return _whole_blocks(both), _whole_blocks(both.t())


def _whole_blocks(matrix: Tensor) -> Tensor:
    return F.pad(matrix, (0, up(matrix.shape[1], TALL) - matrix.shape[1])).contiguous()


def _at_points(weight: Tensor, side: int) -> Tensor:
    """float32 [points ** 2, columns / 16, depth, 16], as `multiply` takes them, of filters [columns, depth, 3, 3].

    The last columns are zeros, up to a multiple of 16.
    """
    columns, depth = weight.shape[:2]
    nine = F.pad(weight.permute(2, 3, 1, 0).reshape(9, depth, columns), (0, up(columns, LANES) - columns))
    # contiguous: with 16 columns nothing was copied yet, and the filters' own order may be another
    nine = nine.view(9, depth, -1, LANES).transpose(1, 2).reshape(9, -1).contiguous()
    return combined(_evaluation(side)[1], nine).view(-1, up(columns, LANES) // LANES, depth, LANES)


def _from_points(sums: Tensor, weight: Tensor, side: int) -> Tensor:
    """The gradient of filters [K, C, 3, 3], channels-last, of that of their values [points ** 2, K, C]."""
    count, channels = weight.shape[:2]
    nine = combined(_evaluation(side)[0], sums.flatten(1))[:9].view(3, 3, *sums.shape[1:])
    return nine[:, :, :count, :channels].permute(2, 0, 1, 3).contiguous().permute(0, 3, 1, 2)


def _parts(images: Tensor, count: int) -> list[slice]:
    """The images that are taken together, as slices of the batch."""
    batch, channels, height, width = images.shape
    tiling = _tiling(height, width)
    size = 4 * tiling.points**2 * tiling.tiles * (channels + count)
    step = max(1, min(batch, _CHUNK // size))
    return [slice(first, first + step) for first in range(0, batch, step)]


def _planes_of(name: str, images: Tensor) -> Tensor:
    """The planes that a loop makes of images [B, C, H, W]: a row of C channels for each tile."""
    batch, channels, height, width = images.shape
    tiling = _tiling(height, width)
    found = planes(tiling.points**2, batch * tiling.tiles, channels)
    _run(name, images, found)
    return found


def _run(name: str, images: Tensor, at_points: Tensor, bias: Tensor | None = None) -> None:
    """Call a loop that makes planes of the images, or these of planes, with the bias [C] added."""
    batch, channels, height, width = images.shape
    job = new_job(winograd_fields, images=images, planes=at_points, bias=bias, zeros=_zeros())
    set_numbers(job, winograd_fields, count=batch, height=height, width=width, channels=channels)
    set_numbers(job, winograd_fields, pitch=4 * at_points.stride(1), step=4 * at_points.stride(0))
    launch(machine.load(machine.WINOGRAD)[f"{name}{_tiling(height, width).side}"], job, batch)


@functools.cache
def _zeros() -> Tensor:
    return torch.zeros(LANES, **_FLOATS)
