"""The definition of a batch, in plain NumPy loops: slow and obvious. Every test compares with it.

It touches nothing but its arguments.

    out, targets = batch(images, labels, plan, epoch=3, start=0, size=4)   # float32[4, C, H, W], int64[4]
    torch.equal(CpuKernel(images, labels, plan)(epoch=3, start=0, size=4)[0], torch.from_numpy(out))

Legend: n images in the store, N samples in the split, H x W pixels, C channels, B rows of a batch.
"""

from typing import Any

import numpy as np
from numpy.typing import NDArray

from fastcifar.kernels.plan import IGNORE, Plan, check_plan, check_span, rows_at
from fastcifar.kernels.rng import draws

__all__ = ["batch", "round_bfloat16"]


def batch(
    images: NDArray[np.uint8],
    labels: NDArray[Any],
    plan: Plan,
    *,
    epoch: int,
    start: int,
    size: int,
    capacity: int | None = None,
) -> tuple[NDArray[Any], NDArray[np.int64]]:
    """The samples at positions start to start + size - 1 of an epoch's order, augmented.

    Args:
        images: uint8[n, H, W, C], memory-mapped or not.
        labels: integer[n].
        plan: see `Plan`.
        epoch: 0 to 2**32 - 1.
        start: first position, in [0, N].
        size: number of positions.
        capacity: B, at least `size`; None: `size`.

    Returns:
        float[B, C, H, W] and int64[B]. float16 as such; float32 else, for bfloat16 with values rounded to
        bfloat16. With `plan.channels_last` a view of NHWC memory. Rows from `size` on are zeros, with
        label IGNORE.

    Raises:
        ConfigError: the plan does not fit the images.
        ValueError: the positions are not in the epoch.
    """
    check_plan(plan, images.shape, len(labels))
    rows = check_span(plan, epoch, start, size, capacity)
    _, height, width, channels = images.shape
    out = np.zeros((rows, height, width, channels), dtype=np.float16 if plan.dtype == "float16" else np.float32)
    targets = np.full(rows, IGNORE, dtype=np.int64)
    for i, row in enumerate(rows_at(plan, np.arange(start, start + size), epoch).tolist()):
        targets[i] = labels[row]
        out[i] = _augment(images[row], row, plan, epoch)
    result = out.transpose(0, 3, 1, 2)
    return (result if plan.channels_last else np.ascontiguousarray(result)), targets


def _augment(image: NDArray[np.uint8], row: int, plan: Plan, epoch: int) -> NDArray[Any]:
    """One output image, [H, W, C]: flip, pad, shift, scale, cut out, round."""
    height, width, _ = image.shape
    drawn = draws(
        row,
        seed=plan.seed,
        epoch=epoch,
        height=height,
        width=width,
        crop=plan.crop,
        flip=plan.flip,
        cutout=plan.cutout,
    )
    if drawn.flip:
        image = image[:, ::-1]
    around = ((plan.crop, plan.crop), (plan.crop, plan.crop), (0, 0))
    padded = np.pad(image, around, mode="reflect") if plan.padding == "reflect" else np.pad(image, around)
    top, left = plan.crop + int(drawn.dy), plan.crop + int(drawn.dx)
    window = padded[top : top + height, left : left + width]
    value = window.astype(np.float32) * plan.scale + plan.shift
    y0, x0 = int(drawn.y0), int(drawn.x0)
    value[y0 : y0 + plan.cutout, x0 : x0 + plan.cutout] = 0.0
    if plan.dtype == "bfloat16":
        return round_bfloat16(value)
    if plan.dtype == "float16":
        with np.errstate(over="ignore"):  # a raw-scaled pixel with a large factor is infinite in float16
            return value.astype(np.float16)
    return value


def round_bfloat16(value: NDArray[np.float32]) -> NDArray[np.float32]:
    """Round finite float32 values to bfloat16 (nearest, ties to even), kept as float32."""
    bits = np.ascontiguousarray(value).view(np.uint32)
    bits = bits + np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1))
    return (bits & np.uint32(0xFFFF0000)).view(np.float32)
