"""Muon: momentum whose step is orthogonalised, for filters and hidden matrices (Jordan et al. 2024).

A gradient matrix is mostly a few large singular values; its orthogonalised form moves every direction alike. Filters
[out, in, kh, kw] count as matrices [out, in * kh * kw]. Groups not marked `orthogonal` get plain SGD in Nesterov's
form, so that one optimiser holds the whole net.

    groups = [{"params": matrices, "orthogonal": True}, {"params": vectors, "momentum": 0.9}]
    optimizer = Muon(groups, lr=0.1, momentum=0.6)
    optimizer.step()
"""

import math
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor

from fastcifar.kernels import products as loops

__all__ = ["Muon", "orthogonalize"]

_COEFFICIENTS = (3.4445, -4.7750, 2.0315)  # Jordan et al. 2024: tuned for the slope at 0, not for convergence to 1
_STEPS = 3  # of 5 in the article: airbench found 3 to be enough for these nets
_TINY = 1e-7  # keeps a gradient or a weight of zeros finite


class Muon(torch.optim.Optimizer):
    """Orthogonalised momentum for groups with `orthogonal=True`, Nesterov's SGD for the others.

    An orthogonal group's weights are first set to the Frobenius norm sqrt(rows), one for each filter: a normalisation
    follows each of them, so their scale changes little but how far a step turns them (nothing where there is no bias).
    The update has singular values near 1, so a norm near sqrt(min(rows, columns)): `lr` is the length of a step
    relative to the weights, for a layer of more rows than columns sqrt(columns / rows) of it, and stays that all
    through the run. Weight decay would do nothing here.

    Args:
        groups: parameter groups; each may set `lr`, `momentum` and `orthogonal`. Parameters of an orthogonal group
            are floating [rows, ...], with at least two dimensions.
        lr: learning rate; a group's own may be a tensor on its device, floating [], as a CUDA graph needs it.
        momentum: from 0 to 1; the gradient used is grad + momentum * buffer, of a buffer that has it already.
        products: type of the matrix products that orthogonalise; weights and momentum stay as they are.
    """

    def __init__(
        self, groups: Iterable[dict[str, Any]], *, lr: float, momentum: float, products: torch.dtype = torch.float32
    ) -> None:
        super().__init__(groups, {"lr": lr, "momentum": momentum, "orthogonal": False})
        self._products = products

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """Move every parameter that has a gradient; nothing waits for the device."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            parameters = [parameter for parameter in group["params"] if parameter.grad is not None]
            if not parameters:
                continue
            updates = self._momentum(parameters, group["momentum"])
            if group["orthogonal"]:
                _rescale(parameters)
                updates = _orthogonalize_each(updates, self._products)
            if isinstance(group["lr"], Tensor):
                torch._foreach_mul_(updates, group["lr"])
                torch._foreach_sub_(parameters, updates)
            else:
                torch._foreach_add_(parameters, updates, alpha=-group["lr"])
        return loss

    def _momentum(self, parameters: list[Tensor], momentum: float) -> list[Tensor]:
        """Nesterov's form, as in `torch.optim.SGD`: buffer <- momentum * buffer + grad; grad + momentum * buffer."""
        for parameter in parameters:
            if not self.state[parameter]:
                self.state[parameter]["momentum_buffer"] = torch.zeros_like(parameter)
        buffers = [self.state[parameter]["momentum_buffer"] for parameter in parameters]
        gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
        torch._foreach_mul_(buffers, momentum)
        torch._foreach_add_(buffers, gradients)
        return list(torch._foreach_add(gradients, buffers, alpha=momentum))


def _rescale(parameters: list[Tensor]) -> None:
    """Give each the Frobenius norm sqrt(rows)."""
    norms = list(torch._foreach_norm(parameters))
    torch._foreach_clamp_min_(norms, _TINY)
    torch._foreach_div_(norms, [math.sqrt(len(parameter)) for parameter in parameters])
    torch._foreach_div_(parameters, norms)


def _orthogonalize_each(updates: list[Tensor], products: torch.dtype) -> list[Tensor]:
    """Orthogonalise each, those of one shape in one batch: a GPU's time here is launches."""
    wide = [_matrix(update) for update in updates]
    wide = [matrix if matrix.shape[0] <= matrix.shape[1] else matrix.T for matrix in wide]
    places: dict[torch.Size, list[int]] = {}
    for index, matrix in enumerate(wide):
        places.setdefault(matrix.shape, []).append(index)
    found = list(updates)
    for indices in places.values():
        same = [wide[index] for index in indices]
        batch = orthogonalize(torch.stack(same) if len(same) > 1 else same[0][None], products)
        for index, matrix in zip(indices, batch.unbind(), strict=True):
            like = updates[index]
            found[index] = _filters(matrix if matrix.shape[0] == len(like) else matrix.T.contiguous(), like)
    return found


def _matrix(filters: Tensor) -> Tensor:
    """As [out, the rest], in the order that they have in memory: which one changes nothing, and no copy is made."""
    return (filters if filters.is_contiguous() else filters.movedim(1, -1)).flatten(1)


def _filters(matrix: Tensor, like: Tensor) -> Tensor:
    """What `_matrix` makes of filters like these, as filters again."""
    if like.is_contiguous():
        return matrix.view(like.shape)
    return matrix.view(like.movedim(1, -1).shape).movedim(-1, 1)


def orthogonalize(matrices: Tensor, products: torch.dtype = torch.float32) -> Tensor:
    """Singular values moved towards 1, singular vectors kept: the quintic Newton-Schulz iteration.

    The iteration is X <- (a + b A + c A A) X with A = X X^T, three times (Jordan et al. 2024). Each factor is a
    polynomial in the first A, so all three are multiplied together as small rows x rows matrices and X is touched
    twice, not six times: 2.4 times fewer operations for 512 filters of 4,608 values, the same result but for
    rounding. All these matrices but X are symmetric: in float32 on a CPU, half of each is computed.

    Args:
        matrices: float32[N, R, C] with R <= C.
        products: type of the matrix products. In bfloat16 the result is off by up to 5 % of its norm (measured on
            matrices of singular values from 1 to 1e-3), much less than the iteration itself is from 1; a step of
            Big's optimiser takes a third of the time on a CPU with bfloat16 units.

    Returns:
        float32[N, R, C].
    """
    sizes = matrices.norm(dim=(1, 2), keepdim=True).clamp_min(_TINY)
    halved = products == torch.float32 and loops.takes_symmetric(matrices)
    multiply = loops.symmetric if halved else torch.bmm  # all these commute, so that their products are symmetric
    x = matrices if halved else (matrices / sizes).to(products)
    gram = loops.gram(matrices, sizes) if halved else torch.bmm(x, x.mT)
    product = factor = _factor(gram, multiply)
    for _ in range(_STEPS - 1):
        gram = multiply(factor, multiply(factor, gram))  # of the new X: the two commute
        factor = _factor(gram, multiply)
        product = multiply(factor, product)
    if halved:
        product.div_(sizes)  # the smaller one
    return torch.bmm(product, x).to(matrices.dtype)


def _factor(gram: Tensor, multiply: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
    """The polynomial a I + b A + c A A of each of a batch of square matrices."""
    a, b, c = _COEFFICIENTS
    if multiply is torch.bmm:
        factor = torch.baddbmm(gram, gram, gram, beta=b, alpha=c)
    else:
        factor = multiply(gram, gram).mul_(c).add_(gram, alpha=b)
    factor.diagonal(dim1=1, dim2=2).add_(a)
    return factor
