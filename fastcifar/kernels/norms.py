"""ReLU or GELU, BatchNorm and max-pooling on the CPU, as one operation with its own gradient.

    pooled = relu_norm(values, norm, pool=True)      # = max_pool2d(norm(relu(values)), 3, 2, 1)
    out = norm_gelu(halve(values), norm)             # = gelu(norm(max_pool2d(values, 2)))

PyTorch reads and writes the activations 18 times for the first, forward and backward; this does 5 times with
pooling and 7 without. In float32 they agree within rounding; under autocast in bfloat16 this rounds less often.
Nothing depends on the number of threads.

The gradient is that of Ioffe & Szegedy 2015: with g = dL/dy, r = relu(x), n values of a channel, and r' the
normalised r, dL/dr = weight / deviation * (g - mean(g) - r' mean(g r')).
"""

from typing import Any, TypeAlias

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from fastcifar.kernels import machine, norm_fields
from fastcifar.kernels.norm_fields import LANES, PART
from fastcifar.kernels.openmp import launch, new_job, set_numbers, takes

__all__ = ["fits", "halve", "halves", "norm_gelu", "pools", "prepare", "relu_norm"]

_KINDS = {torch.float32: "float32", torch.bfloat16: "bfloat16"}
_WINDOWED = ("pool", "unpool", "halve", "spread")


def fits(values: Tensor, norm: nn.Module) -> bool:
    """Whether `relu_norm` or `norm_gelu` can stand for the modules: a BatchNorm2d, see also `_takes` and `_in_use`."""
    return (
        type(norm) is nn.BatchNorm2d
        and _in_use(norm)
        and norm.affine
        and norm.bias is not None
        and norm.momentum is not None
        and norm.track_running_stats
        and norm.weight.dtype == torch.float32
        and _takes(values)
        and values.shape[1] == len(norm.weight)  # else the module says so
        and values.numel() > norm.num_features
    )


def pools(pool: nn.Module) -> bool:
    """Whether it is the pooling that `relu_norm` can do."""
    return _is_pool(pool, 3, 2, 1)


def halves(values: Tensor, pool: nn.Module) -> bool:
    """Whether `halve` can stand for the module: a max-pooling of 2x2 windows, see also `_takes` and `_in_use`."""
    return _is_pool(pool, 2, 2, 0) and _in_use(pool) and _takes(values) and min(values.shape[2:]) > 1


def _is_pool(pool: nn.Module, size: int, stride: int, padding: int) -> bool:
    """Whether it is a max-pooling of that shape, and nothing more."""
    options = ("kernel_size", "stride", "padding", "dilation", "ceil_mode", "return_indices")
    shape = [size, stride, padding, 1, False, False]
    return type(pool) is nn.MaxPool2d and [getattr(pool, name) for name in options] == shape


def _in_use(module: nn.Module) -> bool:
    """Whether it is in training, or evaluated without gradients, which the loops have for training alone."""
    return module.training or not torch.is_grad_enabled()


def _takes(values: Tensor) -> bool:
    """Whether the loops take them: they know their type and number of channels."""
    return takes(values) and values.dtype in _KINDS and values.shape[1] % LANES == 0


def prepare() -> None:
    """Load the loops, or compile them (8 s, once on a machine), so that no step waits for it."""
    machine.load(machine.NORMS)


def relu_norm(values: Tensor, norm: nn.BatchNorm2d, *, pool: bool) -> Tensor:
    """ReLU, then `norm`, and where `pool`, 3x3 max-pooling of stride 2 and padding 1.

    In training it updates the norm's running statistics, as that would.

    Args:
        values: floating [B, C, H, W], see `fits`.
        norm: of C channels.
        pool: whether to pool.

    Returns:
        [B, C, H, W] of the type of `values`, or [B, C, ceil(H / 2), ceil(W / 2)], in channels-last memory.
    """
    found: Tensor = _ReluNorm.apply(values, norm.weight, norm.bias, norm, pool)  # type: ignore[no-untyped-call]
    return found


def norm_gelu(values: Tensor, norm: nn.BatchNorm2d) -> Tensor:
    """`norm`, then GELU. In training it updates the norm's running statistics, as that would.

    Args:
        values: floating [B, C, H, W], see `fits`.
        norm: of C channels.

    Returns:
        [B, C, H, W] of the type of `values`, in channels-last memory.
    """
    found: Tensor = _NormGelu.apply(values, norm.weight, norm.bias, norm)  # type: ignore[no-untyped-call]
    return found


def halve(values: Tensor) -> Tensor:
    """The maxima of 2x2 windows; an odd last row or column is left out.

    Args:
        values: floating [B, C, H, W], see `halves`.

    Returns:
        [B, C, H // 2, W // 2] of the type of `values`, in channels-last memory.
    """
    found: Tensor = _Halve.apply(values)  # type: ignore[no-untyped-call]
    return found


class _ReluNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, values: Tensor, weight: Tensor, bias: Tensor, norm: nn.BatchNorm2d, pool: bool) -> Tensor:
        images, channels, height, width = values.shape
        ctx.moments, factors = _moments("moments", values, weight, bias, norm)
        size = (images, channels, (height + 1) // 2, (width + 1) // 2) if pool else values.shape
        out = torch.empty(size, dtype=values.dtype, device="cpu", memory_format=torch.channels_last)
        if pool:
            peaks = torch.empty_like(out)
            codes = torch.empty(size, dtype=torch.uint8, device="cpu", memory_format=torch.channels_last)
            _run("pool", values, output=out, peaks=peaks, codes=codes, **factors)
            ctx.save_for_backward(values, peaks, codes)
        else:
            _run("apply", values, output=out, **factors)
            ctx.save_for_backward(values)
        return out

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        values, *pooled = _saved(ctx)
        gradient = _like(values, gradient)
        inputs = pooled[0] if pooled else values
        factors, for_weight, for_bias = _slopes("sums", inputs, gradient, ctx.moments, values.numel())
        out = torch.empty_like(values)
        if pooled:
            _run("unpool", values, gradient=gradient, codes=pooled[1], output=out, **factors)
        else:
            _run("back", values, gradient=gradient, output=out, **factors)
        return out, for_weight, for_bias, None, None


class _NormGelu(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, values: Tensor, weight: Tensor, bias: Tensor, norm: nn.BatchNorm2d) -> Tensor:
        ctx.moments, ctx.factors = _moments("plain_moments", values, weight, bias, norm)
        out = torch.empty_like(values)
        _run("apply_gelu", values, output=out, **ctx.factors)
        ctx.save_for_backward(values)
        return out

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        (values,) = _saved(ctx)
        gradient = _like(values, gradient)
        out = torch.empty_like(values)
        factors, for_weight, for_bias = _slopes(
            "sums_gelu", values, gradient, ctx.moments, values.numel(), output=out, **ctx.factors
        )
        _run("plain_back", values, gradient=out, output=out, **factors)
        return out, for_weight, for_bias, None


class _Halve(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, values: Tensor) -> Tensor:
        images, channels, height, width = values.shape
        size = (images, channels, height // 2, width // 2)
        out = torch.empty(size, dtype=values.dtype, device="cpu", memory_format=torch.channels_last)
        codes = torch.empty(size, dtype=torch.uint8, device="cpu", memory_format=torch.channels_last)
        _run("halve", values, output=out, codes=codes)
        ctx.save_for_backward(codes)
        ctx.shape = values.shape
        return out

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        (codes,) = _saved(ctx)
        gradient = gradient.contiguous(memory_format=torch.channels_last)
        out = torch.empty(ctx.shape, dtype=gradient.dtype, device="cpu", memory_format=torch.channels_last)
        _run("spread", out, gradient=gradient, codes=codes, output=out)
        return out


_Moments: TypeAlias = tuple[NDArray[np.float64], NDArray[np.float64], NDArray[np.float64]]
"""Of each channel: mean, 1 / deviation, and what a value is multiplied by."""


def _moments(
    name: str, values: Tensor, weight: Tensor, bias: Tensor, norm: nn.BatchNorm2d
) -> tuple[_Moments, dict[str, NDArray[np.float32]]]:
    """The moments to normalise by, and the factors of scale * value + bias.

    In training they are the batch's, and the running statistics follow; else these.
    """
    if norm.training:
        mean, variance = _batch_moments(name, values, norm)
    else:
        mean, variance = norm.running_mean.double().numpy(), norm.running_var.double().numpy()  # type: ignore[union-attr]
    deviation = 1 / np.sqrt(variance + norm.eps)
    scale = weight.detach().double().numpy() * deviation
    factors = {"scale": _single(scale), "bias": _single(bias.detach().double().numpy() - mean * scale)}
    return (mean, deviation, scale), factors


def _batch_moments(name: str, values: Tensor, norm: nn.BatchNorm2d) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """A batch's mean and variance, which the running statistics follow."""
    channels = values.shape[1]
    count = values.numel() // channels
    sums = np.empty((-(-count // PART), 3, channels), np.float32)
    _run(name, values, sums=sums)
    with np.errstate(all="ignore"):  # what diverges is the trainer's to report
        mean, variance = _merge(sums, count)
    with torch.no_grad():
        for running, found in ((norm.running_mean, mean), (norm.running_var, variance * count / (count - 1))):
            running.lerp_(torch.from_numpy(found.astype(np.float32)), norm.momentum)  # type: ignore[union-attr,arg-type]
        norm.num_batches_tracked.add_(1)  # type: ignore[union-attr]
    return mean, variance


def _slopes(
    name: str, inputs: Tensor, gradient: Tensor, moments: _Moments, size: int, **more: Tensor | NDArray[np.float32]
) -> tuple[dict[str, NDArray[np.float32]], Tensor, Tensor]:
    """The factors of the gradient of each of `size` values, and the gradients of weight and bias.

    Args:
        name: of the loop that sums over `inputs`, which need be no more than those that a gradient comes to.
        inputs: floating [B, C, H, W].
        gradient: of what became of them, of their shape.
        moments: of the values.
        size: how many values there are.
        more: that the loop needs.
    """
    mean, deviation, scale = moments
    channels = inputs.shape[1]
    sums = np.empty((-(-(inputs.numel() // channels) // PART), 2, channels), np.float32)
    _run(name, inputs, gradient=gradient, sums=sums, centre=_single(mean), **more)
    for_bias, centred = sums.sum(0, dtype=np.float64)
    for_weight = centred * deviation
    count = size // channels
    slope = -scale * deviation * for_weight / count
    offset = -scale * for_bias / count - slope * mean
    found = {"scale": _single(scale), "slope": _single(slope), "offset": _single(offset)}
    return found, torch.from_numpy(_single(for_weight)), torch.from_numpy(_single(for_bias))


def _saved(ctx: Any) -> list[Tensor]:
    """Channels-last, as they were saved: hooks may have kept them otherwise."""
    return [tensor.contiguous(memory_format=torch.channels_last) for tensor in ctx.saved_tensors]


def _like(values: Tensor, gradient: Tensor) -> Tensor:
    return gradient.to(values.dtype).contiguous(memory_format=torch.channels_last)


def _single(values: NDArray[Any]) -> NDArray[np.float32]:
    return values.astype(np.float32)


def _merge(sums: NDArray[np.float32], count: int) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Mean and variance of `count` values, of each part's shift k and its sums of r - k and of (r - k)**2.

    As Chan et al. 1979 merge them: no digits are lost as in E[r^2] - E[r]^2.
    """
    sizes = np.full((len(sums), 1), float(PART))
    sizes[-1] -= len(sums) * PART - count
    shift, first, second = (sums[:, i].astype(np.float64) for i in range(3))
    means = shift + first / sizes
    mean = (sizes * means).sum(0) / count
    squares = second - first * first / sizes + sizes * (means - mean) ** 2
    return mean, np.maximum(squares.sum(0) / count, 0)


def _run(name: str, values: Tensor, **more: Tensor | NDArray[Any]) -> None:
    """Call a compiled loop with every thread that PyTorch would use."""
    images, channels, height, width = values.shape
    job = new_job(norm_fields, input=values, **more)
    pixels = images * height * width
    count = images if name in _WINDOWED else -(-pixels // PART)
    set_numbers(job, norm_fields, count=count, pixels=pixels, height=height, width=width, channels=channels)
    function: Any = machine.load(machine.NORMS)[f"{name}_{_KINDS[values.dtype]}"]
    launch(function, job, count)
