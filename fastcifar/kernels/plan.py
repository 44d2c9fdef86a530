"""What a batch depends on beside the stored bytes, the epoch and the position.

All kernels take a `Plan`; two kernels given equal plans, epochs and positions produce equal bits.
Legend: n images in the store, N samples in the split, H x W pixels, C channels, B rows of a batch.

    scale, shift = scale_and_shift("standardize", mean, std)
    plan = Plan(samples=50_000, seed=0, crop=4, flip="alternating", scale=scale, shift=shift)
    check_plan(plan, images.shape, len(labels))
"""

from dataclasses import dataclass
from typing import Any, Literal, get_args

import numpy as np
from numpy.typing import NDArray

from fastcifar.config import Flip, Padding, Scaling
from fastcifar.errors import ConfigError
from fastcifar.kernels.rng import permute, permute_blocks

__all__ = [
    "IGNORE",
    "DType",
    "Order",
    "Plan",
    "check_plan",
    "check_span",
    "rank_part",
    "rows_at",
    "scale_and_shift",
]

Order = Literal["random", "block", "sequential"]
DType = Literal["float32", "bfloat16", "float16"]

IGNORE = -100
"""Label of a padded row: what `torch.nn.functional.cross_entropy` ignores."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Plan:
    """Everything a kernel needs to know about a pipeline.

    Position p in [0, N) of an epoch holds the split's sample `order(p)`, whose row in the store is
    `offset + order(p)`, or `rows[order(p)]` where the split is not one contiguous range. The row is
    the id that the augmentation is drawn from.
    """

    samples: int  # N
    offset: int = 0
    rows: NDArray[np.int64] | None = None  # int64[N]
    seed: int = 0  # 0 <= seed < 2**64
    order: Order = "random"
    block_size: int = 256  # samples in a block, where the order is `block`
    window: int = 64  # blocks that are mixed with each other, likewise
    crop: int = 0  # largest shift in pixels, each way
    padding: Padding = "reflect"  # what a shift brings in: the mirrored image, or pixel value 0
    flip: Flip = "none"
    cutout: int = 0  # side in pixels of the square set to 0 in the output; 0: none
    scale: NDArray[np.float32]  # a: float32[C], 16 significant bits
    shift: NDArray[np.float32]  # b: float32[C]; out = a[c] * pixel + b[c]
    dtype: DType = "float32"
    channels_last: bool = True  # memory layout of the output, whose shape is [B, C, H, W] either way


def check_plan(plan: Plan, shape: tuple[int, ...], label_count: int) -> None:
    """Check a plan against a store, so that no kernel reads outside its bytes.

    Args:
        plan: the plan.
        shape: (n, H, W, C) of the images.
        label_count: length of the labels; must be n.

    Raises:
        ConfigError: an option is not one of those allowed, or does not fit the images.
    """
    if len(shape) != 4 or min(shape) < 1 or label_count != shape[0]:
        raise ConfigError(f"images must be uint8[n, H, W, C] with n labels, got {shape} with {label_count}")
    count, height, width, channels = shape
    for name, value, allowed in (
        ("order", plan.order, get_args(Order)),
        ("padding", plan.padding, get_args(Padding)),
        ("flip", plan.flip, get_args(Flip)),
        ("dtype", plan.dtype, get_args(DType)),
    ):
        if value not in allowed:
            raise ConfigError(f"{name} must be one of {', '.join(allowed)}, got {value!r}")
    side = min(height, width)
    # A shift of 2**15 pixels is far more than any image has, and keeps all products of the draws in 64 bits.
    for name, number, high in (
        ("seed", plan.seed, 2**64 - 1),
        ("crop", plan.crop, side - 1 if plan.padding == "reflect" else 2**15),
        ("cutout", plan.cutout, side),
    ):
        if not 0 <= number <= high:
            raise ConfigError(f"{name} must be from 0 to {high} for images of {height} x {width}, got {number}")
    for name, number in (("block_size", plan.block_size), ("window", plan.window)):
        if not 1 <= number <= 2**31 - 1:
            raise ConfigError(f"{name} must be from 1 to {2**31 - 1}, got {number}")
    if plan.samples < 1:
        raise ConfigError("the split has no images: holdout takes ten training images for each that it holds out")
    if plan.offset < 0:
        raise ConfigError(f"offset must not be negative, got {plan.offset}")
    if plan.rows is None:
        if plan.offset + plan.samples > count:
            raise ConfigError(f"rows {plan.offset} to {plan.offset + plan.samples - 1} reach past {count} images")
    elif plan.rows.shape != (plan.samples,) or plan.rows.min() < 0 or plan.rows.max() >= count:
        raise ConfigError(f"rows must be {plan.samples} integers from 0 to {count - 1}")
    for name, factors in (("scale", plan.scale), ("shift", plan.shift)):
        if factors.shape != (channels,) or factors.dtype != np.float32 or not np.isfinite(factors).all():
            raise ConfigError(f"{name} must be {channels} finite float32 numbers, got {factors!r}")


def rows_at(plan: Plan, positions: NDArray[np.int64], epoch: int) -> NDArray[np.int64]:
    """The store's rows at positions of an epoch, int64[B]; slow and obvious.

    Args:
        plan: the plan.
        positions: int64[B], each in [0, N).
        epoch: 0 to 2**32 - 1.
    """
    samples = positions
    key: Any = {"samples": plan.samples, "seed": plan.seed, "epoch": epoch}
    if plan.order == "random":
        samples = permute(positions, **key)
    elif plan.order == "block":
        samples = permute_blocks(positions, **key, block_size=plan.block_size, window=plan.window)
    return samples + plan.offset if plan.rows is None else plan.rows[samples]


def check_span(plan: Plan, epoch: int, start: int, size: int, capacity: int | None) -> int:
    """Check the arguments of a kernel's call.

    Returns:
        B, the rows of the batch: `capacity`, or `size` where that is None.

    Raises:
        ConfigError: `epoch` is not a uint32.
        ValueError: the positions are not all in [0, N), or `size` exceeds `capacity`.
    """
    rows = size if capacity is None else capacity
    if not 0 <= epoch < 2**32:
        raise ConfigError(f"epoch must be from 0 to {2**32 - 1}, got {epoch}")
    if start < 0 or size < 0 or start + size > plan.samples:
        raise ValueError(f"positions {start} to {start + size} are not within [0, {plan.samples}]")
    if size > rows:
        raise ValueError(f"size must be at most capacity, got {size} and {rows}")
    return rows


def rank_part(count: int, rank: int, world_size: int) -> tuple[int, int]:
    """A rank's first and last + 1 place in a global batch of `count` samples."""
    return count * rank // world_size, count * (rank + 1) // world_size


def scale_and_shift(
    scaling: str, mean: NDArray[np.float64], std: NDArray[np.float64]
) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """The factors of `out = a[c] * pixel + b[c]`.

    `a` is rounded (half to even) to 16 significant bits. With a pixel's 8 bits the product then has at most
    24, so it is exact in float32, and a fused and an unfused multiply-add give the same bits. It moves the
    output by at most 2**-16 of the product: pixel 255 becomes 1.0000153 instead of 1 with `unit`.

    Args:
        scaling: raw (the pixel), unit (pixel / 255), signed (2 pixel / 255 - 1), or
            standardize ((pixel - mean) / std).
        mean: float64[C], in units of pixel values (0..255).
        std: float64[C], in the same units.

    Returns:
        a and b, float32[C] each. For standardize b = -mean * a with the rounded a, so that the mean maps to 0.

    Raises:
        ConfigError: the scaling is unknown, or a deviation is not positive.
    """
    mean, std = np.asarray(mean, dtype=np.float64), np.asarray(std, dtype=np.float64)
    ones = np.ones_like(mean)
    if scaling == "raw":
        a, b = ones, 0 * ones
    elif scaling == "unit":
        a, b = ones / 255, 0 * ones
    elif scaling == "signed":
        a, b = ones * 2 / 255, -ones
    elif scaling == "standardize":
        if np.isfinite(std).all() and (still := np.flatnonzero(std == 0)).size:
            raise ConfigError(
                f"scaling 'standardize': channel {still[0]} is the same in all training images: choose another, such "
                "as unit (scaling=unit)"
            )
        if not (np.isfinite(mean).all() and np.isfinite(std).all() and (std > 0).all()):
            raise ConfigError(f"scaling 'standardize' needs finite means and positive deviations, got {mean}, {std}")
        a = _round16(ones / std)
        b = -mean * a
    else:
        raise ConfigError(f"scaling must be one of {', '.join(get_args(Scaling))}, got {scaling!r}")
    return _round16(a).astype(np.float32), b.astype(np.float32)


def _round16(value: NDArray[np.float64]) -> NDArray[np.float64]:
    """Round to 16 significant bits, half to even."""
    mantissa, exponent = np.frexp(value)  # 0.5 <= |mantissa| < 1
    return np.asarray(np.ldexp(np.rint(np.ldexp(mantissa, 16)), exponent - 16), dtype=np.float64)
