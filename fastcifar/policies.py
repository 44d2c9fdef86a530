"""TrivialAugment and RandAugment on a batch, on its device: each sample has operations of its own.

Everything is drawn from (seed, epoch, row), as `kernels.rng` draws: word purpose `POLICY`. It touches only the
tensors it is given, never waits for an accelerator, and has no shape that depends on what was drawn there.

    augment = PolicyAugment(Policy(kind="rand"), shape=(32, 32), seed=0, device=torch.device("cuda"))
    images = augment(images, rows, epoch=3)      # uint8[B, C, 32, 32], in the memory format given

Legend: B rows of a batch, C channels (1 or 3), H x W pixels.

**Draws.** With w0, w1, w2 the words of counter (row low, row high, epoch, POLICY + (k << 8)), for a sample's k-th
operation, from 0 (w3 is not used; products are exact):

    operation = OPERATIONS[(w0 * 14) >> 32]
    bin       = (w1 * 31) >> 32                  # of `trivial`; that of `rand` is Policy.magnitude
    sign      = -1 if w2 >> 31 else 1            # of the magnitudes marked with a sign below

**Magnitudes.** Bin i of 0 to 30 stands for i/30 of the way, as in torchvision.transforms.TrivialAugmentWide
(`trivial`) and RandAugment (`rand`); these are exact, where torchvision's torch.linspace has last bits that depend
on the CPU's vector width (on AVX2 it moves an image by 15 pixels, not 16, in bin 15 of `trivial`).

| operation | trivial | rand | what it does |
| --- | --- | --- | --- |
| Identity | | | nothing |
| ShearX, ShearY | ±0.99 | ±0.3 | pixel (y, x) is (y, x + m y), or (y + m x, x) |
| TranslateX, TranslateY | ±32 | ±W 150/331, ±H 150/331 | by whole pixels, rounded towards 0; right, down |
| Rotate | ±135 | ±30 | degrees, counterclockwise about the middle |
| Brightness, Color, Contrast, Sharpness | ±0.99 | ±0.9 | blend of black, the greys, the mean grey or the \
smoothed image, and 1 + m of the image |
| Posterize | 8 to 2 | 8 to 4 | bits kept, i/5 or i/7.5 taken off, rounded |
| Solarize | 255 to 0 | 255 to 0 | inverts the pixels from there on |
| AutoContrast, Equalize | | | channel by channel |

**Arithmetic.** That of Pillow, which torchvision applies to PIL images, with nearest neighbours and 0 outside: 16.16
fixed point for coordinates, integers for grey, mean, smoothing and histograms, one product and one sum in float32 for
blends. AutoContrast alone differs: floor((v - low) * 255 / (high - low)) is exact here, where Pillow's float64 may come
out one less if the quotient is whole. It is integers, or float32 that rounds alike on every device, fused or not.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Final, Literal, get_args

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from fastcifar.errors import ConfigError
from fastcifar.kernels.rng import split_seed
from fastcifar.kernels.words import philox

__all__ = ["BINS", "OPERATIONS", "POLICY", "Policy", "PolicyAugment", "apply_policy"]

POLICY: Final = 5
"""Purpose: the fourth word of the counter; see `kernels.rng`."""

OPERATIONS: Final = (
    *("Identity", "ShearX", "ShearY", "TranslateX", "TranslateY", "Rotate", "Brightness", "Color", "Contrast"),
    *("Sharpness", "Posterize", "Solarize", "AutoContrast", "Equalize"),
)
"""In torchvision's order."""

BINS: Final = 31
"""Magnitudes of an operation."""

_LOW = 0xFFFFFFFF
_LEVELS = [(i, sign) for i in range(BINS) for sign in (1, -1)]  # level 2 * bin + (w2 >> 31)
_MAX_SIDES = 16384  # of H + W: keeps coordinates of 16.16 bits within int32 for every matrix

Kind = Literal["trivial", "rand"]
_Stage = Callable[[Tensor, Tensor], Tensor]


@dataclass(frozen=True, kw_only=True)
class Policy:
    """Which operations are drawn, and how strong."""

    kind: Kind = "trivial"
    """trivial: TrivialAugment (Mueller & Hutter 2021, arXiv 2103.10158), wide: one operation of any magnitude.
    rand: RandAugment (Cubuk et al. 2020, arXiv 1909.13719): `num_ops` operations of one magnitude."""
    num_ops: int = 2
    """Operations of `rand`, one after another."""
    magnitude: int = 9
    """Bin of the magnitude of `rand`, 0 to 30."""

    def __post_init__(self) -> None:
        if self.kind not in get_args(Kind):
            raise ConfigError(f"kind must be one of {', '.join(get_args(Kind))}, got {self.kind!r}")
        for name, value, low, high in (("num_ops", self.num_ops, 1, 2**24), ("magnitude", self.magnitude, 0, BINS - 1)):
            if not isinstance(value, int) or isinstance(value, bool) or not low <= value <= high:
                raise ConfigError(f"{name} must be a whole number from {low} to {high}, got {value!r}")


def apply_policy(images: Tensor, rows: Tensor, *, policy: Policy, seed: int, epoch: int | Tensor) -> Tensor:
    """`PolicyAugment` for one batch. It builds the tables anew, which waits for an accelerator."""
    height, width = images.shape[2:]
    augment = PolicyAugment(policy, shape=(height, width), seed=seed, device=images.device)
    return augment(images, rows, epoch=epoch)


class PolicyAugment:
    """Applies a policy to batches of images.

    Args:
        policy: see `Policy`.
        shape: (H, W).
        seed: 0 to 2**64 - 1.
        device: of the batches.

    Raises:
        ConfigError: H + W is too large for the arithmetic.
    """

    def __init__(self, policy: Policy, *, shape: tuple[int, int], seed: int, device: torch.device) -> None:
        if sum(shape) > _MAX_SIDES:
            raise ConfigError(f"height + width must be at most {_MAX_SIDES} for a policy, got {shape[0]} x {shape[1]}")
        self._policy = policy
        self._shape = shape
        self._key = split_seed(seed)
        wide = policy.kind == "trivial"
        factors = _factors(0.99 if wide else 0.9)
        none = np.zeros(len(_LEVELS), dtype=np.uint8)
        # first and last operation -> what does them, and its argument for each (operation and) level
        stages: tuple[tuple[str, str, _Stage, NDArray[Any]], ...] = (
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
        self._stages = [
            (OPERATIONS.index(first), OPERATIONS.index(last), stage, torch.tensor(table, device=device))
            for first, last, stage, table in stages
        ]

    def __call__(self, images: Tensor, rows: Tensor, *, epoch: int | Tensor) -> Tensor:
        """Apply what is drawn for each row in an epoch.

        Args:
            images: uint8[B, C, H, W] in any memory format, C 1 or 3.
            rows: int64[B], the samples' rows in the store.
            epoch: 0 to 2**32 - 1; an int64 scalar on the device in a step that is captured or compiled once.

        Returns:
            uint8[B, C, H, W] in the same memory format; the argument is left as it was.
        """
        for k in range(1 if self._policy.kind == "trivial" else self._policy.num_ops):
            images = self.transform(images, *self.draw(rows, epoch, k))
        return images

    def draw(self, rows: Tensor, epoch: int | Tensor, k: int) -> tuple[Tensor, Tensor]:
        """The k-th operation of each row.

        Returns:
            int64[B], places in OPERATIONS, and int64[B], levels: 2 * bin, plus 1 for a negative sign.
        """
        w0, w1, w2, _ = philox((rows & _LOW, rows >> 32, epoch, POLICY + (k << 8)), self._key)
        if self._policy.kind == "trivial":
            level = ((w1 * BINS) >> 32) * 2
        else:
            level = torch.full_like(w1, self._policy.magnitude * 2)
        return (w0 * len(OPERATIONS)) >> 32, level + (w2 >> 31)

    def transform(self, images: Tensor, operation: Tensor, level: Tensor) -> Tensor:
        """Apply one operation to each image.

        Args:
            images: as for a call.
            operation: int64[B], places in OPERATIONS.
            level: int64[B], 2 * bin, plus 1 for a negative sign.

        Returns:
            As a call.

        Raises:
            ValueError: the images are not of the type and shape that was promised.
        """
        if images.dtype != torch.uint8 or images.shape[1] not in (1, 3) or tuple(images.shape[2:]) != self._shape:
            raise ValueError(
                f"images must be uint8[B, 1 or 3, {self._shape[0]}, {self._shape[1]}], got {images.dtype} "
                f"{list(images.shape)}"
            )
        # On a CPU nothing waits and no graph is captured, so each stage can take its own samples alone, in a TODO-th of
        # the time. Elsewhere it takes all of them, and its own are kept: the same bits.
        pick = images.device.type == "cpu" and not torch.compiler.is_compiling()
        planes = images.contiguous()  # reductions and gathers are fast plane by plane
        places, parts = [], []
        for first, last, stage, table in self._stages:
            chosen = (operation >= first) & (operation <= last)
            entry = (operation - first) * len(_LEVELS) + level
            if pick:
                places.append(chosen.nonzero()[:, 0])
                parts.append(stage(planes.index_select(0, places[-1]), table[entry[places[-1]]]))
            else:
                argument = table[entry.clamp(0, len(table) - 1)]
                planes = torch.where(_spread(chosen), stage(planes, argument), planes)
        if pick:
            planes = torch.cat(parts).index_select(0, torch.cat(places).argsort())
        return torch.empty_like(images).copy_(planes)


def _spread(value: Tensor) -> Tensor:
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
    change = (_spread(factor) * (images - degenerate)).clamp(-1024, 1024)
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
    return _blend(_spread(mean.float()), images.float(), factor)


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
    return images & _spread(mask)


def _solarize(images: Tensor, threshold: Tensor) -> Tensor:
    return images ^ ((images >= _spread(threshold)).to(torch.uint8) * 255)  # 255 - v where it is; 6 times as fast


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
    return np.array([1 + sign * most * i / (BINS - 1) for i, sign in _LEVELS], dtype=np.float32)


def _masks(most: int) -> NDArray[np.uint8]:
    """uint8[62] of Posterize, which takes off up to `most` bits."""
    return np.array([256 - (1 << round(i * most / (BINS - 1))) for i, _ in _LEVELS], dtype=np.uint8)


def _thresholds() -> NDArray[np.uint8]:
    """uint8[62] of Solarize: the least value that is inverted."""
    return np.array([math.ceil(255 - 255 * i / (BINS - 1)) for i, _ in _LEVELS], dtype=np.uint8)


def _matrices(height: int, width: int, *, wide: bool) -> NDArray[np.int32]:
    """int32[5 * 62, 6]: a, b, c, d, e, f of ShearX to Rotate; pixel (y, x) is (d x + e y + f, a x + b y + c) >> 16."""
    shear, degrees = (0.99, 135) if wide else (0.3, 30)
    # numerators of the largest shift, over 331
    right, down = (32 * 331, 32 * 331) if wide else (150 * width, 150 * height)
    found = [(1.0, sign * shear * i / 30, 0.0, 0.0, 1.0, 0.0) for i, sign in _LEVELS]
    found += [(1.0, 0.0, 0.0, sign * shear * i / 30, 1.0, 0.0) for i, sign in _LEVELS]
    found += [(1.0, 0.0, -sign * (right * i // (331 * 30)), 0.0, 1.0, 0.0) for i, sign in _LEVELS]
    found += [(1.0, 0.0, 0.0, 0.0, 1.0, -sign * (down * i // (331 * 30))) for i, sign in _LEVELS]
    x, y = width / 2, height / 2
    for i, sign in _LEVELS:
        angle = -math.radians(sign * degrees * i / 30)
        # 15 digits, as Pillow: a right angle is exact
        cos, sin = round(math.cos(angle), 15), round(math.sin(angle), 15)
        found.append((cos, sin, x - cos * x - sin * y, -sin, cos, y + sin * x - cos * y))
    entries = np.array(found, dtype=np.float64)
    entries[:, 2] += (entries[:, 0] + entries[:, 1]) / 2  # from the corner to the middle of a pixel
    entries[:, 5] += (entries[:, 3] + entries[:, 4]) / 2
    return np.floor(entries * 65536 + 0.5).astype(np.int32)
