"""3x3 convolutions on the CPU with a quarter of the multiplications: Winograd's minimal filtering.

    conv2d(images, layer)    # what layer(images) gives, but for rounding

A tile of 6x6 pixels gives 4x4 outputs by 36 products for each pair of channels, where sums of 3x3 products take 144:
tile and filter are taken as polynomials, and multiplied at six points a side (Lavin & Gray 2016, F(4x4, 3x3)). What
all tiles have at one pair of points is a matrix, a plane, and its product with that of the filters is one matrix
product. The gradients go the same way back, transposed. Nothing depends on the number of threads.

Tiles of 3x3 and 5x5 outputs are for images that those of 4x4 would hang over: at 5x5 pixels one takes 49 products for
the 144 of four.

Under autocast in bfloat16, on a processor that multiplies it (AVX512-BF16), planes and filters are rounded to it, and
the products' sums, the images and all gradients stay float32: half the time for the products, and an error of one per
cent. Tiles of 5x5, where it would be four, are computed in float32 all the same, and cost what they do there.

Images are taken a few at a time, so that what is made of them stays in the cache.
"""

import functools
import math
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastcifar.kernels import machine, winograd_fields
from fastcifar.kernels.norm_fields import LANES
from fastcifar.kernels.openmp import launch, new_job, set_numbers, takes
from fastcifar.kernels.product_fields import TALL
from fastcifar.kernels.products import add_products, combined, multiply, planes, up
from fastcifar.kernels.strips import has_matrix_units, is_3x3
from fastcifar.kernels.winograd_fields import PAIR_TILES, POINTS, TILES

__all__ = ["conv2d", "fits", "halves_here", "prepare"]

_FLOATS: dict[str, Any] = {"dtype": torch.float32, "device": "cpu"}
"""Of whatever the loops write to: what a user's defaults are must not matter."""

_CHUNK = 32 << 20
"""Bytes of the planes, before and after the products, that are made at a time."""

_LEAST = 1.5
"""How many times fewer products there must be: the less an image fills its tiles, the more are for nothing."""

_FILTERS = 32
"""Tiles that take as long as the filters: a few small images don't pay for these."""

_HALF = 1 / 2
"""A product of bfloat16, for one of float32."""


def fits(images: Tensor, layer: nn.Conv2d) -> bool:
    """Whether it can be computed so, and that pays: a 3x3 convolution on a CPU, in float32 or under autocast (above).

    In evaluation it is for those who want no gradient: there the operation has none of second order, as the layer has.
    """
    if not takes(images):
        return False
    halves = _in_halves()
    batch, _, height, width = images.shape
    tiling = _tiling(height, width, halves)
    plain = 9 * batch * height * width * (_HALF if halves else 1)
    return (
        (halves or not torch.is_autocast_enabled("cpu"))
        and (images.dtype == torch.float32 or (halves and images.dtype == torch.bfloat16))
        and layer.weight.dtype == torch.float32
        and is_3x3(layer)
        and _is_plain_bias(layer.bias)
        and min(layer.weight.shape[:2]) >= LANES
        and (not tiling.halves or layer.weight.shape[0] % 2 == layer.weight.shape[1] % 2 == 0)
        and images.shape[1] == layer.weight.shape[1]  # else the layer says so
        and plain >= _LEAST * tiling.cost(batch * tiling.tiles + _FILTERS)
        and (layer.training or not torch.is_grad_enabled())
    )


def halves_here() -> bool:
    """Whether autocast in bfloat16 is done so on this machine: it multiplies pairs, and has no units for matrices."""
    return machine.has_bfloat16() and not has_matrix_units()


def _in_halves() -> bool:
    return torch.is_autocast_enabled("cpu") and torch.get_autocast_dtype("cpu") == torch.bfloat16 and halves_here()


def _is_plain_bias(bias: Tensor | None) -> bool:
    return bias is None or (type(bias) in (Tensor, nn.Parameter) and bias.dtype == torch.float32 and bias.is_cpu)


def prepare() -> None:
    """Load the loops, or compile them (seconds, once on a machine), so that no step waits for it."""
    machine.load(machine.WINOGRAD)


def conv2d(images: Tensor, layer: nn.Conv2d) -> Tensor:
    """The layer's convolution.

    Args:
        images: float32, or under autocast bfloat16 too, [B, C, H, W], channels-last, see `fits`.
        layer: the convolution, to K channels.

    Returns:
        float32 [B, K, H, W], channels-last.
    """
    images = images.float()
    found: Tensor = _Convolution.apply(images, layer.weight, layer.bias, _in_halves())  # type: ignore[no-untyped-call]
    return found


class _Convolution(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, images: Tensor, weight: Tensor, bias: Tensor | None, halves: bool) -> Tensor:
        ctx.save_for_backward(images, weight)
        batch, _, height, width = images.shape
        count = weight.shape[0]
        ctx.tiling = tiling = _tiling(height, width, halves)
        out = torch.empty((batch, count, height, width), memory_format=torch.channels_last, **_FLOATS)
        filters = _at_points(weight, tiling)
        offsets = torch.zeros(count, **_FLOATS) if bias is None else bias.detach().contiguous()
        for part in _parts(images, count, tiling):
            tiles, _ = _gathered("gather", images[part], tiling)
            products = multiply(tiles, filters, count, pairs=tiling.halves)
            _run("scatter", out[part], tiling, products, bias=offsets)
        return out

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        images, weight = ctx.saved_tensors
        images = images.contiguous(memory_format=torch.channels_last)  # hooks may have kept them otherwise
        gradient = gradient.contiguous(memory_format=torch.channels_last)
        count, channels = weight.shape[:2]
        tiling = ctx.tiling
        for_images, for_weight, for_bias, _ = ctx.needs_input_grad
        found = torch.empty_like(images) if for_images else None
        filters = _at_points(weight.transpose(0, 1), tiling) if for_images else None
        size = (tiling.points**2, up(count, TALL), up(channels, LANES))
        sums = torch.empty(size, **_FLOATS) if for_weight else None
        for part in _parts(images, count, tiling) if for_images or for_weight else ():
            rows, summed = _gathered("gather_back", gradient[part], tiling, rows=for_images, summed=for_weight)
            if sums is not None:
                _, tiles = _gathered("gather", images[part], tiling, rows=False, summed=True)
                add_products(summed, tiles, sums, count, fresh=part.start == 0, pairs=tiling.halves)
            if found is not None and filters is not None:
                products = multiply(rows, filters, channels, pairs=tiling.halves)
                _run("scatter_back", found[part], tiling, products)
        biases = gradient.sum((0, 2, 3)) if for_bias else None
        return found, None if sums is None else _from_points(sums, weight, tiling), biases, None


class _Tiling(NamedTuple):
    """How an image is cut: `rows` x `columns` tiles of `side` x `side` outputs; and whether in planes of bfloat16."""

    side: int
    rows: int
    columns: int
    halves: bool = False

    @property
    def points(self) -> int:
        """Along a side."""
        return self.side + 2

    @property
    def tiles(self) -> int:
        return self.rows * self.columns

    def cost(self, tiles: int) -> float:
        """Products in float32 that take as long as so many tiles, for each pair of channels."""
        return self.points**2 * tiles * (_HALF if self.halves else 1)


@functools.cache
def _tiling(height: int, width: int, halves: bool = False) -> _Tiling:
    """That of least cost, in bfloat16 where `halves` lets it."""
    found = [_Tiling(side, -(-height // side), -(-width // side), halves and side in PAIR_TILES) for side in TILES]
    return min(found, key=lambda tiling: tiling.cost(tiling.tiles))


def _filters_at(side: int) -> list[list[float]]:
    """A row for each point p: what a filter's three numbers are multiplied by, for its value there.

    It is 1, p and p ** 2, over the product of p's distances from the other points; at infinity the value is the last
    number alone. The last of seven points has a sixteenth of that: `after7` takes it sixteen times.
    """
    points = POINTS[side]
    rows = []
    for p in points:
        distance = math.prod(p - other for other in points if other not in (p, math.inf))
        rows.append([0.0, 0.0, 1.0] if p == math.inf else [p**power / distance for power in range(3)])
    if side == 5:
        rows[-1] = [number / 16 for number in rows[-1]]
    return rows


@functools.cache
def _evaluation(side: int) -> tuple[Tensor, Tensor]:
    """float32 [points ** 2, 9], and transposed: what a filter's nine numbers are multiplied by for its values there.

    Both have columns of zeros more, up to a multiple of `TALL`.
    """
    along = torch.tensor(_filters_at(side), dtype=torch.float64, device="cpu")
    both = torch.kron(along, along).float()
    return _whole_blocks(both), _whole_blocks(both.t())


def _whole_blocks(matrix: Tensor) -> Tensor:
    return F.pad(matrix, (0, up(matrix.shape[1], TALL) - matrix.shape[1])).contiguous()


def _at_points(weight: Tensor, tiling: _Tiling) -> Tensor:
    """float32 [points ** 2, columns / 16, depth, 16], as `multiply` takes them, of filters [columns, depth, 3, 3].

    The last columns are zeros, up to a multiple of 16. In halves two of the depth are a pair, and make half as many.
    """
    columns, depth = weight.shape[:2]
    nine = F.pad(weight.permute(2, 3, 1, 0).reshape(9, depth, columns), (0, up(columns, LANES) - columns))
    # contiguous: with 16 columns nothing was copied yet, and the filters' own order may be another
    nine = nine.view(9, depth, -1, LANES).transpose(1, 2).reshape(9, -1).contiguous()
    found = combined(_evaluation(tiling.side)[1], nine, pairs=tiling.halves)
    return found.view(len(found), up(columns, LANES) // LANES, -1, LANES)


def _from_points(sums: Tensor, weight: Tensor, tiling: _Tiling) -> Tensor:
    """The gradient of filters [K, C, 3, 3], channels-last, of that of their values [points ** 2, K, C]."""
    count, channels = weight.shape[:2]
    nine = combined(_evaluation(tiling.side)[0], sums.flatten(1))[:9].view(3, 3, *sums.shape[1:])
    return nine[:, :, :count, :channels].permute(2, 0, 1, 3).contiguous().permute(0, 3, 1, 2)


def _parts(images: Tensor, count: int, tiling: _Tiling) -> list[slice]:
    """The images that are taken together, as slices of the batch."""
    batch, channels, _, _ = images.shape
    size = 4 * tiling.points**2 * tiling.tiles * (channels + count)
    step = max(1, _CHUNK // size)
    if tiling.halves:
        step += step % 2  # two images make a pair
    return [slice(first, first + step) for first in range(0, batch, step)]


def _gathered(
    name: str, images: Tensor, tiling: _Tiling, *, rows: bool = True, summed: bool = False
) -> tuple[Tensor, Tensor]:
    """The planes that a loop makes of images [B, C, H, W]: a row of C channels for each tile.

    They are given twice: as `multiply` takes them, where its `rows` are asked for, and as `add_products` does, where
    what is `summed` is. In halves these are two kinds; what nobody asks for is then empty.
    """
    batch, channels, _, _ = images.shape
    if not tiling.halves:
        found = planes(tiling.points**2, batch * tiling.tiles, channels)
        _run(name, images, tiling, found)
        return found, found
    halves = planes(tiling.points**2 if rows else 0, batch * tiling.tiles, channels // 2)
    pairs = planes(tiling.points**2 if summed else 0, -(-batch // 2) * tiling.tiles, channels)
    _run(f"{name}_pairs", images, tiling, halves, pairs=pairs)
    return halves, pairs


def _run(
    name: str,
    images: Tensor,
    tiling: _Tiling,
    at_points: Tensor,
    *,
    bias: Tensor | None = None,
    pairs: Tensor | None = None,
) -> None:
    """Call a loop that makes planes of the images, or these of planes, with the bias [C] added."""
    batch, channels, height, width = images.shape
    job = new_job(winograd_fields, images=images, planes=at_points, bias=bias, pairs=pairs, zeros=_zeros())
    set_numbers(job, winograd_fields, count=batch, height=height, width=width, channels=channels)
    set_numbers(job, winograd_fields, pitch=4 * at_points.stride(1), step=4 * at_points.stride(0))
    if pairs is not None:
        set_numbers(job, winograd_fields, pair_pitch=4 * pairs.stride(1), pair_step=4 * pairs.stride(0))
    launch(machine.load(machine.WINOGRAD)[f"{name}{tiling.side}"], job, batch)


@functools.cache
def _zeros() -> Tensor:
    return torch.zeros(LANES, **_FLOATS)
