"""ReLU, BatchNorm and max-pooling of a training step on the CPU, as one operation with its own gradient.

    pooled = relu_norm(values, norm, pool=True)      # = max_pool2d(norm(relu(values)), 3, 2, 1), norm in training

PyTorch reads and writes the activations 18 times for these three, forward and backward; this does 5 times with
pooling and 7 without. In float32 they agree within rounding; under autocast in bfloat16 this rounds less often.
Nothing depends on the number of threads.

The gradient is that of Ioffe & Szegedy 2015: with g = dL/dy, r = relu(x), n values of a channel, and r' the
normalised r, dL/dr = weight / deviation * (g - mean(g) - r' mean(g r')).
"""

import ctypes
import functools
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from fastcifar.kernels import machine, norm_fields
from fastcifar.kernels.norm_fields import LANES, PART, WORDS

__all__ = ["fits", "prepare", "relu_norm"]

_KINDS = {torch.float32: "float32", torch.bfloat16: "bfloat16"}
_WINDOWED = ("pool", "unpool")


def fits(values: Tensor, norm: nn.Module) -> bool:
    """Whether `relu_norm` can take the place of the modules: a BatchNorm2d in training, on channels-last CPU values."""
    return (
        type(norm) is nn.BatchNorm2d
        and norm.training
        and norm.affine
        and norm.momentum is not None
        and norm.track_running_stats
        and values.device.type == "cpu"
        and values.dtype in _KINDS
        and norm.weight.dtype == torch.float32
        and norm.num_features % LANES == 0
        and values.numel() > norm.num_features
        and values.is_contiguous(memory_format=torch.channels_last)
        and not torch.compiler.is_compiling()
    )


def prepare() -> None:
    """Load the loops, or compile them (4 s, once on a machine), so that no step waits for it."""
    machine.load(machine.NORMS)


def relu_norm(values: Tensor, norm: nn.BatchNorm2d, *, pool: bool) -> Tensor:
    """ReLU, then `norm` in training, and where `pool`, 3x3 max-pooling of stride 2 and padding 1.

    Updates the norm's running statistics, as it would.

    Args:
        values: floating [B, C, H, W], see `fits`.
        norm: of C channels.
        pool: whether to pool.

    Returns:
        [B, C, H, W] of the type of `values`, or [B, C, ceil(H / 2), ceil(W / 2)], in channels-last memory.
    """
    found: Tensor = _ReluNorm.apply(values, norm.weight, norm.bias, norm, pool)  # type: ignore[no-untyped-call]
    return found


class _ReluNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, values: Tensor, weight: Tensor, bias: Tensor, norm: nn.BatchNorm2d, pool: bool) -> Tensor:
        images, channels, height, width = values.shape
        count = images * height * width
        sums = np.empty((-(-count // PART), 3, channels), np.float32)
        _run("moments", values, sums=sums)
        with np.errstate(all="ignore"):  # what diverges is the trainer's to report
            mean, variance = _merge(sums, count)
        with torch.no_grad():
            for running, found in ((norm.running_mean, mean), (norm.running_var, variance * count / (count - 1))):
                running.lerp_(torch.from_numpy(found.astype(np.float32)), norm.momentum)  # type: ignore[union-attr,arg-type]
            norm.num_batches_tracked.add_(1)  # type: ignore[union-attr]
        deviation = 1 / np.sqrt(variance + norm.eps)
        scale = weight.detach().double().numpy() * deviation
        factors = {"scale": _single(scale), "bias": _single(bias.detach().double().numpy() - mean * scale)}
        size = (images, channels, (height + 1) // 2, (width + 1) // 2) if pool else values.shape
        out = torch.empty(size, dtype=values.dtype, memory_format=torch.channels_last)
        if pool:
            peaks = torch.empty_like(out)
            codes = torch.empty(size, dtype=torch.uint8, memory_format=torch.channels_last)
            _run("pool", values, output=out, peaks=peaks, codes=codes, **factors)
            ctx.save_for_backward(values, peaks, codes)
        else:
            _run("apply", values, output=out, **factors)
            ctx.save_for_backward(values)
        ctx.moments = mean, deviation, scale
        return out

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        values, *pooled = ctx.saved_tensors
        mean, deviation, scale = ctx.moments
        gradient = gradient.to(values.dtype).contiguous(memory_format=torch.channels_last)
        images, channels, height, width = values.shape
        inputs = pooled[0] if pooled else values
        sums = np.empty((-(-(inputs.numel() // channels) // PART), 2, channels), np.float32)
        _run("sums", inputs, gradient=gradient, sums=sums, centre=_single(mean))
        for_bias, centred = sums.sum(0, dtype=np.float64)
        for_weight = centred * deviation
        count = images * height * width
        slope = -scale * deviation * for_weight / count
        offset = -scale * for_bias / count - slope * mean
        factors = {"scale": _single(scale), "slope": _single(slope), "offset": _single(offset)}
        out = torch.empty_like(values)
        if pooled:
            _run("unpool", values, gradient=gradient, codes=pooled[1], output=out, **factors)
        else:
            _run("back", values, gradient=gradient, output=out, **factors)
        return out, torch.from_numpy(_single(for_weight)), torch.from_numpy(_single(for_bias)), None, None


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
    job = (ctypes.c_int64 * WORDS)()
    job[norm_fields.INPUT] = values.data_ptr()
    for field, value in more.items():
        address = value.data_ptr() if isinstance(value, Tensor) else value.ctypes.data
        job[getattr(norm_fields, field.upper())] = address
    pixels = images * height * width
    count = images if name in _WINDOWED else -(-pixels // PART)
    job[norm_fields.COUNT], job[norm_fields.PIXELS], job[norm_fields.CHANNELS] = count, pixels, channels
    job[norm_fields.HEIGHT], job[norm_fields.WIDTH] = height, width
    function: Any = machine.load(machine.NORMS)[f"{name}_{_KINDS[values.dtype]}"]
    threads = min(torch.get_num_threads(), count)
    parallel = _openmp()
    if threads > 1 and parallel is not None:
        parallel(ctypes.cast(function, ctypes.c_void_p), ctypes.addressof(job), threads, 0)
    else:
        function(ctypes.addressof(job))


@functools.cache
def _openmp() -> Any:
    """`GOMP_parallel` of the OpenMP that PyTorch runs on: its threads are awake, and others would contend with them.

    None where PyTorch has another.
    """
    try:
        parallel = ctypes.CDLL(str(Path(torch.__file__).parent / "lib" / "libtorch_cpu.so")).GOMP_parallel
    except (OSError, AttributeError):
        return None
    parallel.argtypes = (ctypes.c_void_p, ctypes.c_void_p, ctypes.c_uint, ctypes.c_uint)
    parallel.restype = None
    return parallel
