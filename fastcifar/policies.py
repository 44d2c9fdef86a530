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

from dataclasses import dataclass
from typing import Final, Literal, get_args

import torch
from torch import Tensor

from fastcifar.checks import check_choice, check_integer
from fastcifar.errors import ConfigError
from fastcifar.kernels.rng import split_seed
from fastcifar.kernels.words import row_words
from fastcifar.policy_stages import BINS, LEVELS, OPERATIONS, spread, stages

__all__ = ["BINS", "OPERATIONS", "POLICY", "Policy", "PolicyAugment"]

POLICY: Final = 5
"""Purpose: the fourth word of the counter; see `kernels.rng`."""

_MAX_SIDES = 16384  # of H + W: keeps coordinates of 16.16 bits within int32 for every matrix

Kind = Literal["trivial", "rand"]


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
        check_choice("kind", self.kind, get_args(Kind))
        check_integer("num_ops", self.num_ops, 1, 2**24)
        check_integer("magnitude", self.magnitude, 0, BINS - 1)


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
        self._stages = [
            (OPERATIONS.index(first), OPERATIONS.index(last), stage, torch.tensor(table, device=device))
            for first, last, stage, table in stages(shape, wide=policy.kind == "trivial")
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
        w0, w1, w2, _ = row_words(rows, epoch, POLICY + (k << 8), self._key)
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
        # On a CPU nothing waits and no graph is captured, so each stage can take its own samples alone: 7 ms instead of
        # 110 for 512 images of 32 x 32 x 3. Elsewhere it takes all of them, and its own are kept: the same bits.
        pick = images.device.type == "cpu" and not torch.compiler.is_compiling()
        planes = images.contiguous()  # reductions and gathers are fast plane by plane
        places, parts = [], []
        for first, last, stage, table in self._stages:
            chosen = (operation >= first) & (operation <= last)
            entry = (operation - first) * len(LEVELS) + level
            if pick:
                places.append(chosen.nonzero()[:, 0])
                parts.append(stage(planes.index_select(0, places[-1]), table[entry[places[-1]]]))
            else:
                argument = table[entry.clamp(0, len(table) - 1)]
                planes = torch.where(spread(chosen), stage(planes, argument), planes)
        if pick:
            planes = torch.cat(parts).index_select(0, torch.cat(places).argsort())
        return torch.empty_like(images).copy_(planes)
