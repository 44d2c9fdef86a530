"""Matrix products by compiled loops, many of one shape at once: those of `winograd`, and half of symmetric ones.

    multiply(planes, filters, columns)    # a product for each plane
    symmetric(left, right)                # left transposed times right, where that is known to be symmetric

Every sum is taken in one order, whatever the number of threads. On AVX2 they take no longer than PyTorch's `bmm`.
"""

import math

import torch
from torch import Tensor

from fastcifar.kernels import machine, product_fields
from fastcifar.kernels.norm_fields import LANES
from fastcifar.kernels.openmp import is_plain, launch, new_job, set_numbers
from fastcifar.kernels.product_fields import SPAN, TALL

__all__ = ["add_products", "combined", "gram", "multiply", "planes", "symmetric", "takes_symmetric", "up"]

_WIDTH = 256
"""Columns that are combined at a time, at most."""

_SMALL = 256
"""Rows of a symmetric product from which half of it takes less time than PyTorch's whole."""


def up(number: int, unit: int) -> int:
    """The next multiple of the unit."""
    return -(-number // unit) * unit


def planes(count: int, rows: int, channels: int) -> Tensor:
    """Room for planes, float32 [count, rows, columns]: what `multiply` may write beside the rows is there, too.

    Rows that are a power of two apart would meet in few sets of the cache.
    """
    lanes = -(-channels // LANES)
    columns = LANES * (lanes if lanes <= 4 else lanes | 1)
    return torch.empty((count, up(rows, TALL) + 1, columns), dtype=torch.float32, device="cpu")[:, :rows]


def multiply(left: Tensor, filters: Tensor, columns: int, *, pairs: bool = False) -> Tensor:
    """Planes [count, rows, columns]: each plane's product with the filters at its points.

    Args:
        left: float32 [count, rows, depth].
        filters: float32 [count, columns / 16, depth, 16].
        columns: of the product.
        pairs: whether each number of these is the bits of two bfloat16, whose products count alone.
    """
    count, rows, depth = left.shape[0], left.shape[1], filters.shape[2]
    out = planes(count, rows, columns)
    name = "multiply_pairs" if pairs else "multiply"
    _run(name, left, filters, out, rows=rows, columns=up(columns, LANES), depth=depth)
    return out


def add_products(
    slopes: Tensor, tiles: Tensor, sums: Tensor, count: int, *, fresh: bool = False, pairs: bool = False
) -> None:
    """Add to sums [N, K, C] the products of slopes [N, rows, K], transposed, and tiles [N, rows, C].

    A fresh sum is of these alone: what is there does not count. For pairs see `multiply`.
    """
    name = "add_products_pairs" if pairs else "add_products"
    _run(name, slopes, tiles, sums, rows=count, columns=sums.shape[2], depth=slopes.shape[1], fresh=fresh)


def combined(factors: Tensor, values: Tensor, *, pairs: bool = False) -> Tensor:
    """float32 [M, N]: factors [depth, M], transposed, times values [depth, N]; M a multiple of 6, N of 16.

    As pairs [M, N / 2], N a multiple of 32: each the bits of two bfloat16, of numbers that are 16 columns apart.
    """
    (depth, count), columns = factors.shape, values.shape[1]
    width = math.gcd(columns, _WIDTH)
    found = width // 2 if pairs else width
    out = torch.empty((count, columns // width, found), dtype=torch.float32, device="cpu")
    strips, sums = values.view(depth, -1, width).transpose(0, 1), out.transpose(0, 1)
    name = "combine_pairs" if pairs else "add_products"
    left = factors.expand(len(strips), -1, -1)
    _run(name, left, strips, sums, rows=count, columns=width, depth=depth, fresh=True)
    return out.flatten(1)


def _run(
    name: str, left: Tensor, right: Tensor, out: Tensor, *, rows: int, columns: int, depth: int, fresh: bool = False
) -> None:
    """Call a loop that makes matrices of as many pairs."""
    parts = len(left) * -(-rows // SPAN)
    job = new_job(product_fields, left=left, right=right, out=out)
    set_numbers(job, product_fields, rows=rows, columns=columns, depth=depth, count=parts, fresh=fresh)
    for side, matrices in (("left", left), ("right", right), ("out", out)):
        step, pitch, *_, unit = matrices.stride()
        if unit != 1 or matrices.dtype != torch.float32:
            raise ValueError(f"{side} must be rows of float32, got {matrices.dtype} with strides {matrices.stride()}")
        set_numbers(job, product_fields, **{f"{side}_step": 4 * step, f"{side}_pitch": 4 * pitch})
    launch(machine.load(machine.WINOGRAD)[name], job, parts)


def takes_symmetric(matrices: Tensor) -> bool:
    """Whether the Gram matrices of float32 [N, R, C] can be computed so, and that pays."""
    return (
        is_plain(matrices)
        and not (matrices.requires_grad and torch.is_grad_enabled())
        and matrices.dtype == torch.float32
        and matrices.shape[1] % LANES == 0
        and matrices.shape[1] >= _SMALL
    )


def gram(matrices: Tensor, sizes: Tensor) -> Tensor:
    """The products X X^T, float32 [N, R, R] in room of `planes`, of X = matrices [N, R, C] / sizes [N, 1, 1].

    See `takes_symmetric`.
    """
    count, side, depth = matrices.shape
    columns = planes(count, depth, side)[:, :, :side]
    torch.div(matrices.mT, sizes, out=columns)
    return symmetric(columns, columns)


def symmetric(left: Tensor, right: Tensor) -> Tensor:
    """The products left^T right, which must be symmetric: what is above the diagonal is computed, and mirrored.

    Args:
        left: float32 [N, D, R], in room of `planes`; R a multiple of 16.
        right: likewise.

    Returns:
        float32 [N, R, R], in room of `planes`.
    """
    count, depth, side = left.shape
    found = planes(count, side, side)[:, :, :side]
    for name in ("add_upper", "mirror"):
        _run(name, left, right, found, rows=side, columns=side, depth=depth, fresh=True)
    return found
