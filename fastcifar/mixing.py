"""mixup and CutMix on a batch, on its device, with soft labels.

Everything is drawn from (seed, epoch, row), as `kernels.rng` draws: word purpose `MIX`. It touches only the
tensors it is given, and never waits for the device.

    mixer = Mixer(mixup=0.2, cutmix=1.0, classes=10, shape=(32, 32), seed=0, device=torch.device("cpu"))
    images, targets = mixer(images, labels, rows, epoch=3)      # float32[B, 10] are the soft labels

Legend: B rows of a batch, H x W pixels, C channels, K classes.

With w0..w3 the words of (row low, row high, epoch, MIX): entry w0 >> 20 of 4,096 equally likely quantiles of
Beta(alpha, alpha) is lambda; where both kinds are on, w1 >> 31 chooses CutMix; ((w2 * H) >> 32, (w3 * W) >> 32) is
the middle of CutMix's box. Sample i of a global batch is mixed with sample i ^ 1, its neighbour in the epoch's
order, so with the order `random` with any other; the last of an odd number stays as it is.
"""

from typing import Final

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from fastcifar.kernels.rng import split_seed
from fastcifar.kernels.words import row_words

__all__ = ["MIX", "Mixer"]

MIX: Final = 4
"""Purpose: the fourth word of the counter; see `kernels.rng`."""

_QUANTILES = 4096


class Mixer:
    """mixup (Zhang et al. 2018, "mixup: beyond empirical risk minimization") and CutMix (Yun et al. 2019).

    Args:
        mixup: alpha of lambda's Beta distribution for mixup; 0 for none.
        cutmix: likewise for CutMix. With both, each sample has one of them, with equal chance.
        classes: K.
        shape: (H, W).
        seed: 0 to 2**64 - 1.
        device: of the batches.
    """

    def __init__(
        self, *, mixup: float, cutmix: float, classes: int, shape: tuple[int, int], seed: int, device: torch.device
    ) -> None:
        self._kinds = (mixup > 0, cutmix > 0)
        self.classes = classes
        self._key = split_seed(seed)
        self._shares = torch.tensor(_beta(mixup or 1), device=device)  # lambda of mixup
        # CutMix's box has sqrt(1 - lambda) of the height and of the width (equation 2 of the paper)
        sides = np.sqrt(1 - _beta(cutmix or 1).astype(np.float64))
        self._heights, self._widths = (torch.tensor(np.rint(sides * s).astype(np.int64), device=device) for s in shape)

    def __call__(
        self, images: Tensor, labels: Tensor, rows: Tensor, *, epoch: int | Tensor, present: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """Mix a batch.

        Args:
            images: floating [B, C, H, W]; the first is at an even place of its global batch.
            labels: int64[B].
            rows: int64[B], the samples' rows in the store.
            epoch: 0 to 2**32 - 1; or an int64 scalar on the device.
            present: int64 scalar there: how many are samples, the rest being padding that nothing is mixed with; None
                for all.

        Returns:
            The mixed images, of the same type and memory format, and float32[B, K], which sum to 1.
        """
        count, height, width = len(rows), images.shape[2], images.shape[3]
        index = torch.arange(count, device=rows.device)
        partner = index ^ 1
        partner = torch.where(partner < (count if present is None else present), partner, index)
        w0, w1, w2, w3 = row_words(rows, epoch, MIX, self._key)
        quantile = w0 >> 20
        other = images[partner]
        mixup, cutmix = self._kinds
        share = torch.ones(count, dtype=torch.float32, device=rows.device)
        mixed = images
        if mixup:
            share = self._shares[quantile]
            weight = share[:, None, None, None]
            # two products and a sum, each rounded: the same bits on every device
            mixed = (images.float() * weight + other.float() * (1 - weight)).to(images.dtype)
        if cutmix:
            y0, y1 = _span((w2 * height) >> 32, self._heights[quantile], height)
            x0, x1 = _span((w3 * width) >> 32, self._widths[quantile], width)
            ys, xs = torch.arange(height, device=rows.device), torch.arange(width, device=rows.device)
            inside = ((ys >= y0[:, None]) & (ys < y1[:, None]))[:, None, :, None]
            inside = inside & ((xs >= x0[:, None]) & (xs < x1[:, None]))[:, None, None, :]
            cut = torch.where(inside, other, images)
            # the box may have been cut off at the edges: what counts is the part that was replaced
            area = ((y1 - y0) * (x1 - x0)).float()
            kept = 1 - area / torch.full_like(area, height * width)  # by a number, CUDA multiplies by its reciprocal
            chosen = (w1 >> 31) == 1 if mixup else torch.ones_like(w1, dtype=torch.bool)
            mixed = torch.where(chosen[:, None, None, None], cut, mixed)
            share = torch.where(chosen, kept, share)
        alone = partner == index
        share = torch.where(alone, torch.ones_like(share), share)[:, None]
        mixed = torch.where(alone[:, None, None, None], images, mixed)
        targets = F.one_hot(labels, self.classes).float()
        return mixed, targets * share + targets[partner] * (1 - share)


def _span(middle: Tensor, side: Tensor, length: int) -> tuple[Tensor, Tensor]:
    """First and last + 1 place of a box's side, cut off at the image's edges."""
    first = middle - side // 2
    return first.clamp(min=0), (first + side).clamp(max=length)


def _beta(alpha: float) -> np.ndarray[tuple[int], np.dtype[np.float32]]:
    """Quantiles of Beta(alpha, alpha) in the middle of 4,096 equal parts, in 16 bits: no library's last bit shows."""
    from scipy.special import betaincinv  # 0.1 s to import: only where something is mixed

    middles = (np.arange(_QUANTILES) + 0.5) / _QUANTILES
    found: np.ndarray[tuple[int], np.dtype[np.float32]] = np.rint(betaincinv(alpha, alpha, middles) * 65536) / 65536
    return found.astype(np.float32)
