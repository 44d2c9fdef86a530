"""3x3 convolutions of small images on a CPU with matrix units (AMX), many images side by side.

oneDNN fills the units' tiles of 16 rows along an image's width: at 4x4 pixels three quarters of a tile are empty. Laid
side by side in strips, with a column of zeros between them, images fill it, and the convolution is the same: what a
window meets beyond an image's side are zeros, as with padding. What it gives at those columns is dropped.

    conv2d(images, layer)    # what layer(images) gives, but for rounding
"""

import functools

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrize

from fastcifar.kernels.openmp import is_plain

__all__ = ["conv2d", "fits", "has_matrix_units", "is_3x3", "strip_of"]

_SIDE = 8
"""Columns; larger images fill the tiles well enough."""

_PIXELS = 512
"""Of one strip, at most: longer ones leave the cache."""


def strip_of(batch: int, side: int) -> int:
    """The number of images, a divisor of `batch`, that are laid side by side where each has `side` columns.

    1: none are, since they are large, or since the batch has no divisor that is of use.
    """
    if side > _SIDE:
        return 1
    most = min(_PIXELS // side**2, batch)
    return next((count for count in range(most, 0, -1) if batch % count == 0), 1)


def fits(images: Tensor, layer: nn.Conv2d) -> bool:
    """Whether strips pay: in bfloat16 on a CPU with matrix units. Without these they cost up to a tenth more."""
    return (
        is_plain(images)
        and (images.dtype == torch.bfloat16 or torch.is_autocast_enabled("cpu"))
        and has_matrix_units()
        and is_3x3(layer)
    )


def is_3x3(layer: nn.Conv2d) -> bool:
    """Whether it is a 3x3 convolution of all channels that keeps the images' size, with zeros beyond them, and no more.

    A weight that is computed anew each time that it is asked for is more.
    """
    kind = type(layer)
    return (
        kind.forward is nn.Conv2d.forward
        and kind._conv_forward is nn.Conv2d._conv_forward
        and not parametrize.is_parametrized(layer)
        and layer.kernel_size == (3, 3)
        and layer.padding == (1, 1)
        and layer.padding_mode == "zeros"
        and layer.stride == layer.dilation == (1, 1)
        and layer.groups == 1
    )


@functools.cache
def has_matrix_units() -> bool:
    """Whether this CPU multiplies matrices of bfloat16 (AMX)."""
    return bool(torch.cpu._is_amx_tile_supported())  # it has no public name


def conv2d(images: Tensor, layer: nn.Conv2d) -> Tensor:
    """The layer's convolution, in strips where the images are small.

    Args:
        images: floating [B, C, H, W], see `fits`.
        layer: the convolution.

    Returns:
        floating [B, K, H, W], channels-last.
    """
    batch, channels, height, width = images.shape
    count = strip_of(batch, width)
    if count == 1:
        convolved: Tensor = layer(images)
        return convolved
    strips = F.pad(images.permute(0, 2, 3, 1), (0, 0, 0, 1)).reshape(batch // count, count, height, width + 1, channels)
    strips = strips.transpose(1, 2).reshape(batch // count, height, count * (width + 1), channels)
    convolved = layer(strips.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)
    convolved = convolved.reshape(batch // count, height, count, width + 1, -1)[:, :, :, :width].transpose(1, 2)
    return convolved.reshape(batch, height, width, -1).permute(0, 3, 1, 2)
