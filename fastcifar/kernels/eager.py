"""The kernel in plain torch operations, for any device: the same bits as the reference, one operation at a time.

It touches only the tensors it is given, and waits for the device once an epoch, in no batch.

    kernel = EagerKernel(images, labels, plan)             # uint8[n, H, W, C], integer[n], on the device
    out, targets = kernel(epoch=0, start=0, size=512)      # float32[512, C, H, W], int64[512], there too

Legend: n images in the store, N samples in the split, H x W pixels, C channels, B rows of a batch.
"""

from typing import Final

import torch
from torch import Tensor

from fastcifar.kernels.plan import IGNORE, Plan, check_plan, check_span
from fastcifar.kernels.rng import AUGMENT, FIRST_FLIP, split_seed
from fastcifar.kernels.words import epoch_order, row_words

__all__ = ["EagerAugment", "EagerKernel"]

_DTYPES: Final = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


class EagerAugment:
    """Augments images that were gathered already, where a store is not on the device.

    Args:
        shape: (H, W, C) of an image.
        plan: see `Plan`, checked; its order and rows play no part.
        device: of the images.
    """

    def __init__(self, shape: tuple[int, ...], plan: Plan, device: torch.device) -> None:
        self._shape = shape
        self._plan = plan
        self._scale = torch.tensor(plan.scale, device=device)
        self._shift = torch.tensor(plan.shift, device=device)

    def __call__(
        self, images: Tensor, rows: Tensor, labels: Tensor, *, epoch: int | Tensor, capacity: int | None = None
    ) -> tuple[Tensor, Tensor]:
        """The images, augmented.

        Args:
            images: uint8[size, H, W, C].
            rows: int64[size], their rows in the store, from which their augmentation is drawn.
            labels: int64[size].
            epoch: 0 to 2**32 - 1; or an int64 scalar on the device.
            capacity: B, at least `size`; None: `size`.

        Returns:
            As `EagerKernel`.
        """
        index = torch.arange(len(rows), device=rows.device)
        return self.take(images, index, rows, labels, epoch=epoch, capacity=capacity)

    def take(
        self, images: Tensor, index: Tensor, rows: Tensor, labels: Tensor, *, epoch: int | Tensor, capacity: int | None
    ) -> tuple[Tensor, Tensor]:
        """As `__call__`, for the images at int64[size] places `index` of `images`."""
        plan, size = self._plan, len(rows)
        batch = size if capacity is None else capacity
        height, width, channels = self._shape
        memory = (batch, height, width, channels) if plan.channels_last else (batch, channels, height, width)
        out = torch.zeros(memory, dtype=_DTYPES[plan.dtype], device=rows.device)
        out = out.permute(0, 3, 1, 2) if plan.channels_last else out  # [B, C, H, W]
        targets = torch.full((batch,), IGNORE, dtype=torch.int64, device=rows.device)
        if size:
            out[:size] = self._augment(images, index, rows, epoch)
            targets[:size] = labels
        return out, targets

    def _augment(self, images: Tensor, index: Tensor, rows: Tensor, epoch: int | Tensor) -> Tensor:
        """[size, C, H, W]: `rng.draws` and the gather it describes."""
        plan = self._plan
        height, width, _ = self._shape
        device, key = rows.device, split_seed(plan.seed)
        ys = torch.arange(height, device=device)[None]  # [1, H]
        xs = torch.arange(width, device=device)[None]  # [1, W]
        w0, w1, w2, w3 = row_words(rows, epoch, AUGMENT, key)
        span = 2 * plan.crop + 1
        y = ys + ((w0 * span >> 32) - plan.crop)[:, None]  # [size, H], of the padded image
        x = xs + ((w1 * span >> 32) - plan.crop)[:, None]  # [size, W]
        y, outside_y = _pad(y, height)
        x, outside_x = _pad(x, width)
        if plan.flip != "none":
            flip = w2 >> 31
            if plan.flip == "alternating":
                flip = ((row_words(rows, 0, FIRST_FLIP, key)[0] >> 31) + epoch) & 1
            x = torch.where(flip[:, None] == 1, width - 1 - x, x)
        pixels = images[index[:, None, None], y[:, :, None], x[:, None, :]]  # [size, H, W, C]
        if plan.padding == "zero":
            outside = outside_y[:, :, None] | outside_x[:, None, :]
            pixels = pixels.masked_fill(outside[..., None], 0)
        value = pixels.float() * self._scale + self._shift
        if plan.cutout:
            y0 = ((w3 >> 16) * (height - plan.cutout + 1) >> 16)[:, None]  # [size, 1]
            x0 = ((w3 & 0xFFFF) * (width - plan.cutout + 1) >> 16)[:, None]
            in_y, in_x = (ys >= y0) & (ys < y0 + plan.cutout), (xs >= x0) & (xs < x0 + plan.cutout)
            value = value.masked_fill((in_y[:, :, None] & in_x[:, None, :])[..., None], 0.0)
        return value.permute(0, 3, 1, 2)


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
        self._augment = EagerAugment(tuple(images.shape[1:]), plan, device)
        # The order of one epoch: int64[N] beside uint8[n, H, W, C] on the same device, so there is always room.
        self._order: tuple[int | None, Tensor] = (None, torch.empty(0, dtype=torch.int64, device=device))

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
        capacity = check_span(plan, epoch, start, size, capacity)
        if plan.order == "sequential":
            samples = torch.arange(start, start + size, device=self._images.device)
        else:
            of, order = self._order  # once: another thread may be at another epoch
            if of != epoch:
                order = epoch_order(plan, epoch, self._images.device)
                self._order = (epoch, order)
            samples = order[start : start + size]
        rows = samples + plan.offset if self._rows is None else self._rows[samples]
        return self._augment.take(self._images, rows, rows, self._labels[rows], epoch=epoch, capacity=capacity)


def _pad(index: Tensor, length: int) -> tuple[Tensor, Tensor]:
    """Reflect indices into [0, length), and say which were outside; those far outside are only clamped."""
    outside = (index < 0) | (index >= length)
    index = index.abs()
    index = torch.where(index >= length, 2 * (length - 1) - index, index)
    return index.clamp(0, length - 1), outside
