"""The operations of TrivialAugment and RandAugment, on whole batches, and the tables of their magnitudes.

They touch only their arguments. What they compute stands in `policies`.

    for first, last, stage, table in stages((32, 32), wide=True):
        images = stage(images, table[levels])        # uint8[B, C, 32, 32]

Legend: B images, C channels (1 or 3), H x W pixels.
"""

import math
from collections.abc import Callable
from typing import Any, Final

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

__all__ = ["BINS", "LEVELS", "OPERATIONS", "Stage", "spread", "stages"]

OPERATIONS: Final = (
    *("Identity", "ShearX", "ShearY", "TranslateX", "TranslateY", "Rotate", "Brightness", "Color", "Contrast"),
    *("Sharpness", "Posterize", "Solarize", "AutoContrast", "Equalize"),
)
"""In torchvision's order."""

BINS: Final = 31
"""Magnitudes of an operation."""

LEVELS: Final = [(i, sign) for i in range(BINS) for sign in (1, -1)]
"""Level 2 * bin, plus 1 for a negative sign: the bin and the sign."""

Stage = Callable[[Tensor, Tensor], Tensor]


def stages(shape: tuple[int, int], *, wide: bool) -> tuple[tuple[str, str, Stage, NDArray[Any]], ...]:
    """What does the operations, in the order in which it is done.

    Args:
        shape: (H, W).
        wide: whether the magnitudes are TrivialAugment's, not RandAugment's.

    Returns:
        The first and the last operation that a stage does, the stage, and its argument for each operation and level.
    """
    factors = _factors(0.99 if wide else 0.9)
    none = np.zeros(len(LEVELS), dtype=np.uint8)
    return (
        ("Identity", "Identity", lambda images, _: images, none),
        ("ShearX", "Rotate", _move, _matrices(*shape, wide=wide)),
        ("Brightness", "Brightness", _brightness, factors),
        ("Color", "Color", _color, factors),
        ("Contrast", "Contrast", _contrast, factors),
        ("Sharpness", "Sharpness", _sharpness, factors),
        ("Posterize", "Posterize", _posterize, _masks(6 if wide else 4)),
        ("Solarize", "Solarize", _solarize, _thresholds()),
        ("AutoContrast", "AutoContrast", _autocontrast, none),
        ("Equalize", "Equalize", _equalize, none),
    )


def spread(value: Tensor) -> Tensor:
    """[B, 1, 1, 1] of [B]."""
    return value[:, None, None, None]


# The stages: uint8[B, C, H, W] and their arguments [B, ...] -> uint8[B, C, H, W].


def _move(images: Tensor, matrix: Tensor) -> Tensor:
    """The geometric operations: int32[B, 6] of 16.16 bits give each pixel's source (Pillow's affine_fixed)."""
    count, channels, height, width = images.shape
    ys = torch.arange(height, dtype=torch.int32, device=images.device)[:, None]
    xs = torch.arange(width, dtype=torch.int32, device=images.device)
    a, b, c, d, e, f = (entry[:, None, None] for entry in matrix.unbind(1))
    x, y = (a * xs + (b * ys + c)) >> 16, (d * xs + (e * ys + f)) >> 16  # [B, H, W]
    x, y = x.clamp(-1, width) + 1, y.clamp(-1, height) + 1  # with a frame of zeros around, and no mask: half the time
    source = (y * (width + 2) + x).flatten(1).long()
    framed = F.pad(images, (1, 1, 1, 1)).flatten(2)
    return framed.gather(2, source[:, None].expand(-1, channels, -1)).view(count, channels, height, width)


def _blend(degenerate: Tensor | float, images: Tensor, factor: Tensor) -> Tensor:
    """Extrapolate: degenerate + factor * (images - degenerate), clipped and cut off to uint8 (Pillow's Blend.c).

    Args:
        degenerate: float32 that broadcasts to the images.
        images: float32[B, C, h, w], whole numbers.
        factor: float32[B].
    """
    # The clamp changes no value: it keeps a compiler from fusing product and sum, which would round once, not twice.
    change = (spread(factor) * (images - degenerate)).clamp(-1024, 1024)
    return (degenerate + change).clamp(0, 255).to(torch.uint8)


def _grey(images: Tensor) -> Tensor:
    """float32[B, 1, H, W], whole: ITU-R 601-2 luma in 16 bits, as Pillow's Convert.c; no sum exceeds 2**24."""
    if images.shape[1] == 1:
        return images.float()
    red, green, blue = (images[:, i : i + 1].float() for i in range(3))
    return ((red * 19595 + green * 38470 + blue * 7471 + 32768) * 2.0**-16).floor()


def _brightness(images: Tensor, factor: Tensor) -> Tensor:
    return _blend(0.0, images.float(), factor)


def _color(images: Tensor, factor: Tensor) -> Tensor:
    return _blend(_grey(images), images.float(), factor)


def _contrast(images: Tensor, factor: Tensor) -> Tensor:
    pixels = images.shape[2] * images.shape[3]
    total = _grey(images).int().sum((1, 2, 3))  # int64[B]
    mean = (2 * total + pixels) // (2 * pixels)  # rounded, half up
    return _blend(spread(mean.float()), images.float(), factor)


def _sharpness(images: Tensor, factor: Tensor) -> Tensor:
    """Blends with a smoothed image: 3 x 3 weights 1, in the middle 5, over 13; the outermost pixels stay."""
    if min(images.shape[2:]) < 3:
        return images
    value = images.float()
    middle = value[:, :, 1:-1, 1:-1]
    columns = value[..., :-2] + value[..., 1:-1] + value[..., 2:]  # [B, C, H, W - 2]
    total = columns[:, :, :-2] + columns[:, :, 1:-1] + columns[:, :, 2:] + 4 * middle
    # total / 13 rounded: a sum of whole numbers is never nearer than 1/26 to where the rounding changes
    smooth = ((total + 6.5) * (1 / 13)).floor()
    result = images.clone()
    result[:, :, 1:-1, 1:-1] = _blend(smooth, middle, factor)
    return result


def _posterize(images: Tensor, mask: Tensor) -> Tensor:
    return images & spread(mask)


def _solarize(images: Tensor, threshold: Tensor) -> Tensor:
    return images ^ ((images >= spread(threshold)).to(torch.uint8) * 255)  # 255 - v where it is; 6 times as fast


def _autocontrast(images: Tensor, _: Tensor) -> Tensor:
    value = images.float()  # compiled for a CPU, torch 2.13's amin of uint8 is wrong
    low, high = value.amin((2, 3), keepdim=True), value.amax((2, 3), keepdim=True)
    flat = high == low  # it stays: stretched from 0..255
    low, span = low.masked_fill(flat, 0), (high - low).masked_fill(flat, 255)
    # Half of the least step, 1 / span, is added, so that no error of a division moves a quotient past a whole number.
    return (((value - low) * 255 + 0.5) / span).to(torch.uint8)


def _equalize(images: Tensor, _: Tensor) -> Tensor:
    values = images.flatten(2).long()  # [B, C, H * W]
    counts = torch.zeros(*values.shape[:2], 256, dtype=torch.int32, device=images.device)
    counts.scatter_add_(2, values, counts.new_ones(()).expand_as(values))  # integers: the order does not matter
    brightest = counts.gather(2, values.amax(2, keepdim=True))
    step = (values.shape[2] - brightest) // 255  # [B, C, 1]
    below = counts.cumsum(2, dtype=torch.int32) - counts
    spread = ((step // 2 + below) // step.clamp(min=1)).clamp(max=255)
    same = torch.arange(256, dtype=torch.int32, device=images.device)
    table = torch.where(step > 0, spread, same).to(torch.uint8)
    return table.gather(2, values).view_as(images)


# The tables: an argument for each of the levels, computed on the host.


def _factors(most: float) -> NDArray[np.float32]:
    """float32[62] of Brightness, Color, Contrast and Sharpness."""
    return np.array([1 + sign * most * i / (BINS - 1) for i, sign in LEVELS], dtype=np.float32)


def _masks(most: int) -> NDArray[np.uint8]:
    """uint8[62] of Posterize, which takes off up to `most` bits."""
    return np.array([256 - (1 << round(i * most / (BINS - 1))) for i, _ in LEVELS], dtype=np.uint8)


def _thresholds() -> NDArray[np.uint8]:
    """uint8[62] of Solarize: the least value that is inverted."""
    return np.array([math.ceil(255 - 255 * i / (BINS - 1)) for i, _ in LEVELS], dtype=np.uint8)


def _matrices(height: int, width: int, *, wide: bool) -> NDArray[np.int32]:
    """int32[5 * 62, 6]: a, b, c, d, e, f of ShearX to Rotate; pixel (y, x) is (d x + e y + f, a x + b y + c) >> 16."""
    shear, degrees = (0.99, 135) if wide else (0.3, 30)
    # numerators of the largest shift, over 331
    right, down = (32 * 331, 32 * 331) if wide else (150 * width, 150 * height)
    found = [(1.0, sign * shear * i / 30, 0.0, 0.0, 1.0, 0.0) for i, sign in LEVELS]
    found += [(1.0, 0.0, 0.0, sign * shear * i / 30, 1.0, 0.0) for i, sign in LEVELS]
    found += [(1.0, 0.0, -sign * (right * i // (331 * 30)), 0.0, 1.0, 0.0) for i, sign in LEVELS]
    found += [(1.0, 0.0, 0.0, 0.0, 1.0, -sign * (down * i // (331 * 30))) for i, sign in LEVELS]
    x, y = width / 2, height / 2
    for i, sign in LEVELS:
        angle = -math.radians(sign * degrees * i / 30)
        # 15 digits, as Pillow: a right angle is exact
        cos, sin = round(math.cos(angle), 15), round(math.sin(angle), 15)
        found.append((cos, sin, x - cos * x - sin * y, -sin, cos, y + sin * x - cos * y))
    entries = np.array(found, dtype=np.float64)
    entries[:, 2] += (entries[:, 0] + entries[:, 1]) / 2  # from the corner to the middle of a pixel
    entries[:, 5] += (entries[:, 3] + entries[:, 4]) / 2
    return np.floor(entries * 65536 + 0.5).astype(np.int32)
