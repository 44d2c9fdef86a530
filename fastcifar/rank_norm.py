"""BatchNorm over the global batch of several ranks: with any number of them the net is the same function.

On any device, where `torch.nn.SyncBatchNorm` wants a GPU. The ranks' statistics are merged as by Chan et al. 1979, so
no digits are lost as in E[x^2] - E[x]^2; one collective forward, one backward.

    share_norms(model, ranks)       # before the optimiser is made
"""

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from fastcifar.ranks import Ranks

__all__ = ["share_norms"]


def share_norms(model: nn.Module, ranks: Ranks) -> None:
    """Let each BatchNorm of a net take its statistics over all ranks, in place; parameters and names stay."""
    if ranks.size == 1:
        return
    for parent in list(model.modules()):
        for name, module in parent.named_children():
            if isinstance(module, nn.BatchNorm1d | nn.BatchNorm2d):
                setattr(parent, name, _RankNorm(module, ranks))


class _RankNorm(_BatchNorm):
    """A BatchNorm's parameters and statistics; in training it normalises over all ranks' samples."""

    def __init__(self, norm: _BatchNorm, ranks: Ranks) -> None:
        super().__init__(norm.num_features, norm.eps, norm.momentum)
        self.weight, self.bias = norm.weight, norm.bias
        self._buffers.update(norm._buffers)
        self._ranks = ranks

    def _check_input_dim(self, values: Tensor) -> None:
        if values.dim() not in (2, 4):
            raise ValueError(f"expected [B, C] or [B, C, H, W], got {list(values.shape)}")

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def forward(self, values: Tensor) -> Tensor:
        """Normalise floating [B, C] or [B, C, H, W]."""
        if not self.training:
            return super().forward(values)
        self._check_input_dim(values)
        normalise = _Normalise.apply(values, self.weight, self.bias, self.eps, self._ranks)  # type: ignore[no-untyped-call]
        found: Tensor = normalise[0]
        with torch.no_grad():
            for running, batch in zip((self.running_mean, self.running_var), normalise[1:], strict=True):
                if running is not None and self.momentum is not None:
                    running.lerp_(batch, self.momentum)
            if self.num_batches_tracked is not None:
                self.num_batches_tracked += 1
        return found


class _Normalise(torch.autograd.Function):
    """(values, weight, bias, eps, ranks) -> normalised values, the global batch's means and unbiased variances."""

    @staticmethod
    def forward(
        ctx: Any, values: Tensor, weight: Tensor, bias: Tensor, eps: float, ranks: Ranks
    ) -> tuple[Tensor, Tensor, Tensor]:
        kind, values = values.dtype, _precise(values)
        axes, shape = _layout(values)
        variance, mean = torch.var_mean(values, axes, correction=0)
        count = mean.new_full((1,), values.numel() / values.shape[1])
        merged = ranks.gather_no_sync(torch.cat([mean, variance, count]))
        means, variances, counts = torch.split(merged, [len(mean), len(mean), 1], 1)  # [ranks, C] and [ranks, 1]
        total = counts.sum()
        parts = counts / total
        mean = (parts * means).sum(0)
        variance = (parts * (variances + (means - mean) ** 2)).sum(0)
        scale = (variance + eps).rsqrt()
        normal = (values - mean.view(shape)) * scale.view(shape)
        ctx.save_for_backward(normal, scale, weight, total)
        ctx.ranks = ranks
        unbiased = variance * (total / (total - 1))
        ctx.mark_non_differentiable(mean, unbiased)
        return (normal * weight.view(shape) + bias.view(shape)).to(kind), mean, unbiased

    @staticmethod
    def backward(ctx: Any, gradient: Tensor, *statistics: Tensor) -> tuple[Tensor | None, ...]:
        normal, scale, weight, total = ctx.saved_tensors
        kind, gradient = gradient.dtype, _precise(gradient)
        axes, shape = _layout(normal)
        own = torch.stack([gradient.sum(axes), (gradient * normal).sum(axes)])  # of the bias and of the weight
        shift, slope = (ctx.ranks.sum_no_sync([own])[0] / total).unbind()
        moved = gradient - shift.view(shape) - normal * slope.view(shape)
        return ((weight * scale).view(shape) * moved).to(kind), own[1], own[0], None, None


def _precise(values: Tensor) -> Tensor:
    """In float32, or float64 if they have it."""
    return values.to(torch.promote_types(values.dtype, torch.float32))


def _layout(values: Tensor) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """All axes but the channels', and the shape in which a value for each channel meets the others."""
    return tuple(axis for axis in range(values.dim()) if axis != 1), (1, -1, *(1,) * (values.dim() - 2))
