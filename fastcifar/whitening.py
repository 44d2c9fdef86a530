"""Whitening filters for the first convolution: the training images' own principal directions, at unit size.

Neighbouring pixels are much alike, so nearly all of an image's variance is in a few directions of its patches. Filters
along the eigenvectors of the patches' second moments, each divided by the root of its eigenvalue, answer alike to all
of them (Coates & Ng 2012; as a fixed first layer: airbench, Jordan 2024).

    conv = first_convolution(model)
    whiten_(conv, first_images(loader))
    conv.weight.requires_grad_(False)
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastcifar.errors import ConfigError
from fastcifar.loader import Loader

__all__ = ["first_convolution", "first_images", "whiten_"]

_IMAGES = 5_000  # some 4.5 million patches: the second moments of more differ by less than 1 %
_CHUNK = 50  # images unfolded at once, 5 MB of 3x3x3 patches: 250 at once took four times as long


def first_convolution(model: nn.Module) -> nn.Conv2d:
    """The net's first convolution.

    Raises:
        ConfigError: it has none.
    """
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            return module
    raise ConfigError("whiten needs a net with a convolution: this one has none")


def first_images(loader: Loader, count: int = _IMAGES) -> Tensor:
    """The first images of a loader's epoch 0; in random order they are a sample of all.

    Args:
        loader: without augmentation; its last batch may be padded.
        count: how many, or all where it has fewer.

    Returns:
        floating [N, C, H, W], scaled as the loader scales.
    """
    found: list[Tensor] = []
    for step in range(len(loader)):
        images, labels = loader.batch(0, step)
        found.append(images[labels >= 0])
        if sum(map(len, found)) >= count:
            break
    return torch.cat(found)[:count]


@torch.no_grad()
def whiten_(conv: nn.Conv2d, images: Tensor, eps: float = 5e-4) -> None:
    """Make whitening filters of a convolution's first filters, in place, and no bias.

    Filters 2 i and 2 i + 1 become plus and minus the i-th eigenvector of the patches' second moments (not centred),
    the largest eigenvalue first, divided by sqrt(eigenvalue + eps). There are C * kh * kw of them; filters beyond the
    last pair keep their values. An eigenvector's sign is the one that makes its largest component positive.

    Args:
        conv: with C input channels and one group; its bias becomes 0.
        images: floating [N, C, H, W], on any device.
        eps: what keeps directions in which the images hardly vary from being blown up.
    """
    rows, *shape = conv.weight.shape
    size = conv.weight[0].numel()
    moments = torch.zeros(size, size, dtype=torch.float64)
    patches = 0
    for start in range(0, len(images), _CHUNK):
        chunk = F.unfold(images[start : start + _CHUNK].cpu().float(), conv.kernel_size)  # [n, C * kh * kw, L]
        moments += torch.bmm(chunk, chunk.mT).sum(0, dtype=torch.float64)
        patches += len(chunk) * chunk.shape[2]
    values, vectors = torch.linalg.eigh(moments / patches)  # ascending; vectors are columns
    largest = vectors.gather(0, vectors.abs().argmax(0, keepdim=True))
    filters = (vectors * largest.sign() / (values.clamp_min(0) + eps).sqrt()).T.flip(0)
    pairs = torch.stack([filters, -filters], dim=1).reshape(-1, *shape)[: rows - rows % 2]
    conv.weight[: len(pairs)] = pairs.to(conv.weight)
    if conv.bias is not None:  # what follows would depend on the filters' size otherwise, which Muon sets anew
        conv.bias.zero_()
