"""The kernel in plain torch operations, for any device: the same bits as the reference, one operation at a time.

It touches only the tensors it is given, and waits for the device once an epoch, in no batch.

    kernel = EagerKernel(images, labels, plan)             # uint8[n, H, W, C], integer[n], on the device
    out, targets = kernel(epoch=0, start=0, size=512)      # float32[512, C, H, W], int64[512], there too

Legend: n images in the store, N samples in the split, H x W pixels, C channels, B rows of a batch.

Words of 32 bits are kept in int64, and products taken in halves of 16 bits, so that nothing overflows
on any device.
"""

from typing import Final

import torch
from torch import Tensor

from fastcifar.kernels.plan import IGNORE, Plan, check_plan, check_span
from fastcifar.kernels.rng import AUGMENT, FIRST_FLIP, MIX, PHILOX, round_keys, split_seed, widths

__all__ = ["EagerKernel"]

_DTYPES: Final = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
_LOW = 0xFFFFFFFF


class EagerKernel:
    """Batches of a store on a device.

    Args:
        images: uint8[n, H, W, C].
        labels: integer[n], on the same device.
        plan: see `Plan`; reflect padding needs crop < H and crop < W.

    Raises:
        ConfigError: the plan does not fit the images.
        ValueError: the images are not uint8, or the labels are on another device.
    """

    def __init__(self, images: Tensor, labels: Tensor, plan: Plan) -> None:
        check_plan(plan, tuple(images.shape), len(labels))
        if images.dtype != torch.uint8 or images.device != labels.device:
            raise ValueError(
                f"images must be uint8 and labels on their device, got {images.dtype} on {images.device}, labels on "
                f"{labels.device}"
            )
        self._plan = plan
        self._images = images
        self._labels = labels.long()
        device = images.device
        self._rows = None if plan.rows is None else torch.tensor(plan.rows, dtype=torch.int64, device=device)
        self._scale = torch.tensor(plan.scale, device=device)
        self._shift = torch.tensor(plan.shift, device=device)
        # The order of one epoch: int64[N] beside uint8[n, H, W, C] on the same device, so there is always room.
        self._epoch: int | None = None
        self._order = torch.empty(0, dtype=torch.int64, device=device)

    def __call__(self, *, epoch: int, start: int, size: int, capacity: int | None = None) -> tuple[Tensor, Tensor]:
        """The samples at positions start to start + size - 1 of an epoch's order, augmented.

        Args:
            epoch: 0 to 2**32 - 1.
            start: first position, in [0, N].
            size: number of positions.
            capacity: B, at least `size`; None: `size`.

        Returns:
            [B, C, H, W] of the plan's type, in channels-last memory if `plan.channels_last`, and int64[B].
            Rows from `size` on are zeros, with label IGNORE.

        Raises:
            ValueError: the positions are not in the epoch.
        """
        plan = self._plan
        batch = check_span(plan, epoch, start, size, capacity)
        rows = self._rows_of(epoch, start, size)
        _, height, width, channels = self._images.shape
        memory = (batch, height, width, channels) if plan.channels_last else (batch, channels, height, width)
        out = torch.zeros(memory, dtype=_DTYPES[plan.dtype], device=rows.device)
        out = out.permute(0, 3, 1, 2) if plan.channels_last else out  # [B, C, H, W]
        targets = torch.full((batch,), IGNORE, dtype=torch.int64, device=rows.device)
        if size:
            out[:size] = self._augment(rows, epoch)
            targets[:size] = self._labels[rows]
        return out, targets

    def _rows_of(self, epoch: int, start: int, size: int) -> Tensor:
        """int64[size]: the store's rows at the positions."""
        plan = self._plan
        if plan.order == "random":
            if self._epoch != epoch:
                self._order = _order(plan.samples, plan.seed, epoch, self._images.device)
                self._epoch = epoch
            samples = self._order[start : start + size]
        else:
            samples = torch.arange(start, start + size, device=self._images.device)
        return samples + plan.offset if self._rows is None else self._rows[samples]

    def _augment(self, rows: Tensor, epoch: int) -> Tensor:
        """The output images of the rows, [B, C, H, W]: `rng.draws` and the gather it describes."""
        plan = self._plan
        _, height, width, _ = self._images.shape
        device, key = rows.device, split_seed(plan.seed)
        ys = torch.arange(height, device=device)[None]  # [1, H]
        xs = torch.arange(width, device=device)[None]  # [1, W]
        low, high = rows & _LOW, rows >> 32
        w0, w1, w2, w3 = _philox((low, high, epoch, AUGMENT), key)
        span = 2 * plan.crop + 1
        y = ys + ((w0 * span >> 32) - plan.crop)[:, None]  # [B, H], of the padded image
        x = xs + ((w1 * span >> 32) - plan.crop)[:, None]  # [B, W]
        y, outside_y = _pad(y, height)
        x, outside_x = _pad(x, width)
        if plan.flip != "none":
            if plan.flip == "random":
                flip = w2 >> 31
            else:
                flip = ((_philox((low, high, 0, FIRST_FLIP), key)[0] >> 31) + epoch) & 1
            x = torch.where(flip[:, None] == 1, width - 1 - x, x)
        pixels = self._images[rows[:, None, None], y[:, :, None], x[:, None, :]]  # [B, H, W, C]
        if plan.padding == "zero":
            outside = outside_y[:, :, None] | outside_x[:, None, :]
            pixels = pixels.masked_fill(outside[..., None], 0)
        value = pixels.float() * self._scale + self._shift
        if plan.cutout:
            y0 = ((w3 >> 16) * (height - plan.cutout + 1) >> 16)[:, None]  # [B, 1]
            x0 = ((w3 & 0xFFFF) * (width - plan.cutout + 1) >> 16)[:, None]
            in_y, in_x = (ys >= y0) & (ys < y0 + plan.cutout), (xs >= x0) & (xs < x0 + plan.cutout)
            value = value.masked_fill((in_y[:, :, None] & in_x[:, None, :])[..., None], 0.0)
        return value.permute(0, 3, 1, 2)


def _pad(index: Tensor, length: int) -> tuple[Tensor, Tensor]:
    """Reflect indices into [0, length), and say which were outside; those far outside are only clamped."""
    outside = (index < 0) | (index >= length)
    index = index.abs()
    index = torch.where(index >= length, 2 * (length - 1) - index, index)
    return index.clamp(0, length - 1), outside


def _multiply(value: Tensor, constant: int) -> tuple[Tensor, Tensor]:
    """The high and the low 32 bits of a product of two 32-bit words."""
    low, high = value * (constant & 0xFFFF), value * (constant >> 16)  # below 2**48
    middle = high + (low >> 16)
    return middle >> 16, ((middle & 0xFFFF) << 16) | (low & 0xFFFF)


def _philox(counter: tuple[Tensor, Tensor, int, int], key: tuple[int, int]) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """`rng.philox` for int64[B] of the first two words."""
    c0, c1 = counter[:2]
    c2, c3 = torch.full_like(c0, counter[2]), torch.full_like(c0, counter[3])
    k0, k1 = key
    for _ in range(10):
        (high0, low0), (high1, low1) = _multiply(c0, PHILOX[0]), _multiply(c2, PHILOX[1])
        c0, c1, c2, c3 = high1 ^ c1 ^ k0, low1, high0 ^ c3 ^ k1, low0
        k0, k1 = (k0 + PHILOX[2]) & _LOW, (k1 + PHILOX[3]) & _LOW
    return c0, c1, c2, c3


def _mix(h: Tensor) -> Tensor:
    """MurmurHash3's fmix32."""
    h = h ^ (h >> 16)
    h = _multiply(h, MIX[0])[1]
    h = h ^ (h >> 13)
    h = _multiply(h, MIX[1])[1]
    return h ^ (h >> 16)


def _order(samples: int, seed: int, epoch: int, device: torch.device) -> Tensor:
    """int64[N]: `rng.permute` of all positions.

    Cycle walking has no bound that is both safe and small, so each round of it asks the device how many
    values are left: some 20 waits for 50,000 samples, once an epoch.
    """
    left_bits, right_bits = widths(samples)
    left_mask, right_mask = (1 << left_bits) - 1, (1 << right_bits) - 1
    keys = round_keys(seed, epoch)
    order = torch.arange(samples, device=device)
    walking = order.clone()
    while walking.numel():
        value = order[walking]
        left, right = value >> right_bits, value & right_mask
        for i, key in enumerate(keys):
            if i % 2 == 0:
                right = right ^ (_mix(left ^ key) & right_mask)
            else:
                left = left ^ (_mix(right ^ key) & left_mask)
        value = (left << right_bits) | right
        order[walking] = value
        walking = walking[value >= samples]
    return order
