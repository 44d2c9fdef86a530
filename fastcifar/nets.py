"""The nets, as data: `ARCHS["big"]` and `ARCHS["small"]` of the original report, `ARCHS["fast"]` of our own.

In the report's, each 3x3 convolution (padding 1) and each hidden fully connected layer is followed by ReLU, then by a
BatchNorm of its own; each block ends in a 3x3 max-pool of stride 2. The last layer gives raw logits. On a CPU
loops of `kernels`, which this module imports for that, compute the layers.

    build_model("big", num_classes=10)(images)    # [B, 3, 32, 32] -> [B, 10]
"""

from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor, nn

from fastcifar.errors import ConfigError
from fastcifar.kernels import norms, strips, winograd

__all__ = [
    "ARCHS",
    "Arch",
    "ConvNet",
    "FastArch",
    "FastNet",
    "build_model",
    "check_image_size",
    "count_parameters",
    "find_arch",
    "prepare",
]


@dataclass(frozen=True, kw_only=True)
class Arch:
    """A net's shape: channels of each convolution, block by block, and widths of the hidden layers."""

    blocks: tuple[tuple[int, ...], ...]
    hidden: tuple[int, ...]


@dataclass(frozen=True, kw_only=True)
class FastArch:
    """The shape of a `FastNet`: filters of the first convolution, and the width of each block."""

    patterns: int
    widths: tuple[int, ...]


ARCHS: dict[str, Arch | FastArch] = {
    "big": Arch(blocks=((64, 64), (128, 128), (256, 256), (512, 512)), hidden=(128, 256, 512, 1024)),
    "small": Arch(blocks=((64,), (128,), (256,), (512,)), hidden=(128,)),
    "fast": FastArch(patterns=24, widths=(64, 256, 256)),
}

# Four pools take every side from 17 to 32 pixels to 2, so the same weights run at any of them.
_SMALLEST, _LARGEST = 17, 32
_POOLED = 2

# Of `FastNet`: keeps the first steps' softmax, over 256 maxima, from being sure of itself.
_LOGIT_SCALE = 1 / 9


class ConvNet(nn.Module):
    """A net described by an `Arch`.

    On a CPU, channels-last, in training and where no gradient is wanted, its ReLUs, BatchNorms and pools run as one
    operation (see `norms`), but for those that have hooks; their modules hold the parameters. Convolutions take a
    quarter of the multiplications there in float32, and under autocast on processors with AVX512-BF16 (see
    `winograd`); on those with AMX they take small images side by side (see `strips`). Gradients of gradients need
    `fused` off.

    Args:
        arch: the shape.
        num_classes: number of logits, K.
        in_channels: channels of the images, C.

    Attributes:
        fused: whether they may; False runs each module, as PyTorch does.
    """

    fused = True

    def __init__(self, arch: Arch, *, num_classes: int, in_channels: int = 3) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        channels = in_channels
        for block in arch.blocks:
            for width in block:
                layers += [nn.Conv2d(channels, width, 3, padding=1), nn.ReLU(), nn.BatchNorm2d(width)]
                channels = width
            layers.append(nn.MaxPool2d(3, stride=2, padding=1))
        self.features = nn.Sequential(*layers)
        widths = (channels * _POOLED**2, *arch.hidden)
        hidden: list[nn.Module] = []
        for before, after in pairwise(widths):
            hidden += [nn.Linear(before, after), nn.ReLU(), nn.BatchNorm1d(after)]
        self.classifier = nn.Sequential(nn.Flatten(), *hidden, nn.Linear(widths[-1], num_classes))

    def forward(self, images: Tensor) -> Tensor:
        """Logits.

        Args:
            images: floating [B, C, H, W], H and W from 17 to 32.

        Returns:
            floating [B, K].
        """
        logits: Tensor = self.classifier(self._fused(images) if _may_fuse(self, images) else self.features(images))
        return logits

    def _fused(self, values: Tensor) -> Tensor:
        layers = list(self.features)
        while layers:
            layer, *layers = layers
            if layers and type(layer) is nn.ReLU and norms.fits(values, layers[0]) and not _hooked(layer, layers[0]):
                pool = len(layers) > 1 and norms.pools(layers[1]) and not _hooked(layers[1])
                values = norms.relu_norm(values, layers[0], pool=pool)  # type: ignore[arg-type]  # `fits` looked
                layers = layers[1 + pool :]
            elif isinstance(layer, nn.Conv2d):
                values = _convolve(values, layer)
            else:
                values = layer(values)
        return values


class FastNet(nn.Module):
    """A net with nothing to keep to but its cost: most accuracy for a second of training.

    A 2x2 convolution, to be made of whitening filters (see `whitening`), then blocks of two 3x3 convolutions, each
    followed by BatchNorm and GELU; a block's first is pooled to half the side before these. What is left is reduced to
    each channel's maximum. BatchNorm shifts but does not scale, and no layer but the first has a bias. 3x3
    convolutions begin as the identity, as far as they have inputs. Shape, widths, the whitening layer, that beginning,
    GELU and the scale of the logits are airbench94's (Jordan 2024).

    On a CPU pools run by loops of our own, and each BatchNorm with its GELU, as `ConvNet`'s do with ReLU; so do
    convolutions.

    Args:
        arch: the shape.
        num_classes: number of logits, K.
        in_channels: channels of the images, C.

    Attributes:
        fused: whether they may; False runs each module, as PyTorch does.
    """

    fused = True

    def __init__(self, arch: FastArch, *, num_classes: int, in_channels: int = 3) -> None:
        super().__init__()
        layers: list[nn.Module] = [nn.Conv2d(in_channels, arch.patterns, 2), nn.GELU()]
        nn.init.zeros_(layers[0].bias)  # type: ignore[arg-type]
        channels = arch.patterns
        for width in arch.widths:
            layers += [_identity_conv(channels, width), nn.MaxPool2d(2), _shift_norm(width), nn.GELU()]
            layers += [_identity_conv(width, width), _shift_norm(width), nn.GELU()]
            channels = width
        self.features = nn.Sequential(*layers, nn.AdaptiveMaxPool2d(1), nn.Flatten())
        self.classifier = nn.Linear(channels, num_classes, bias=False)

    def forward(self, images: Tensor) -> Tensor:
        """Logits.

        Args:
            images: floating [B, C, H, W], H and W from 17 to 32.

        Returns:
            floating [B, K].
        """
        features = self._fused(images) if _may_fuse(self, images) else self.features(images)
        logits: Tensor = self.classifier(features) * _LOGIT_SCALE
        return logits

    def _fused(self, values: Tensor) -> Tensor:
        layers = list(self.features)
        while layers:
            layer, *layers = layers
            if isinstance(layer, nn.MaxPool2d) and norms.halves(values, layer) and not _hooked(layer):
                values = norms.halve(values)
            elif (
                layers
                and type(layers[0]) is nn.GELU
                and layers[0].approximate == "none"
                and norms.fits(values, layer)
                and not _hooked(layer, layers[0])
            ):
                values = norms.norm_gelu(values, layer)  # type: ignore[arg-type]  # `fits` looked
                layers = layers[1:]
            elif isinstance(layer, nn.Conv2d):
                values = _convolve(values, layer)
            else:
                values = layer(values)
        return values


def _convolve(values: Tensor, layer: nn.Conv2d) -> Tensor:
    """The layer's convolution, in the way that is fastest here; its own where it has hooks."""
    if not _hooked(layer):
        if winograd.fits(values, layer):
            return winograd.conv2d(values, layer)
        if strips.fits(values, layer):
            return strips.conv2d(values, layer)
    convolved: Tensor = layer(values)
    return convolved


def _may_fuse(net: ConvNet | FastNet, images: Tensor) -> bool:
    """Whether its layers may run together: not where what is asked for is all of them, as hooks and tracers do."""
    return net.fused and type(images) is Tensor and type(net.features) is nn.Sequential and not _hooked(net.features)


def _hooked(*layers: nn.Module) -> bool:
    """Whether any has hooks, which must be called, or a forward of its own, or all have."""
    everywhere: bool = nn.modules.module._has_any_global_hook()  # type: ignore[no-untyped-call]  # it has no public name
    return everywhere or any(
        layer._forward_hooks
        or layer._forward_pre_hooks
        or layer._backward_hooks
        or layer._backward_pre_hooks
        or "forward" in vars(layer)
        for layer in layers
    )


def _identity_conv(before: int, after: int) -> nn.Conv2d:
    conv = nn.Conv2d(before, after, 3, padding=1, bias=False)
    with torch.no_grad():
        nn.init.dirac_(conv.weight[: min(before, after)])
    return conv


def _shift_norm(width: int) -> nn.BatchNorm2d:
    norm = nn.BatchNorm2d(width)
    norm.weight.requires_grad_(False)
    return norm


def find_arch(name: str) -> Arch | FastArch:
    """The architecture of that name.

    Raises:
        ConfigError: there is none; the message lists those there are.
    """
    if name not in ARCHS:
        raise ConfigError(f"unknown arch {name!r}: choose from {', '.join(sorted(ARCHS))}")
    return ARCHS[name]


def build_model(name: str, *, num_classes: int, in_channels: int = 3) -> nn.Module:
    """A freshly initialised net (PyTorch's default initialisation, from the global generator).

    Raises:
        ConfigError: no architecture has that name, or a count is not positive.
    """
    arch = find_arch(name)
    if num_classes < 1 or in_channels < 1:
        raise ConfigError(f"num_classes and in_channels must be positive, got {num_classes} and {in_channels}")
    if isinstance(arch, FastArch):
        return FastNet(arch, num_classes=num_classes, in_channels=in_channels)
    return ConvNet(arch, num_classes=num_classes, in_channels=in_channels)


def prepare(model: nn.Module, device: torch.device, precision: torch.dtype) -> None:
    """Load or compile what a net runs on a device in a precision, so that no step waits for it."""
    if device.type == "cpu" and isinstance(model, ConvNet | FastNet) and model.fused:
        norms.prepare()
        if precision == torch.float32 or (precision == torch.bfloat16 and winograd.halves_here()):
            winograd.prepare()


def check_image_size(height: int, width: int) -> None:
    """Refuse images that the nets cannot take.

    Raises:
        ConfigError: a side is not from 17 to 32 pixels.
    """
    if not (_SMALLEST <= height <= _LARGEST and _SMALLEST <= width <= _LARGEST):
        raise ConfigError(f"these nets take images of {_SMALLEST} to {_LARGEST} pixels a side, got {height} x {width}")


def count_parameters(model: nn.Module) -> int:
    """Number of trainable parameters."""
    return sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
