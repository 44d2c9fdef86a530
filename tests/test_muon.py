"""Muon against the plain iteration, and against its own promises."""

import copy
import math
from typing import Any

import pytest
import torch
from torch import Tensor

from fastcifar.kernels import products
from fastcifar.muon import Muon, orthogonalize


def slowly(matrix: Tensor) -> Tensor:
    """X <- a X + b (X X^T) X + c (X X^T)^2 X, three times, in float64."""
    x = matrix.double() / matrix.double().norm()
    for _ in range(3):
        gram = x @ x.T
        x = 3.4445 * x - 4.7750 * gram @ x + 2.0315 * gram @ gram @ x
    return x.float()


@pytest.mark.parametrize("shape", [(1, 1), (4, 4), (3, 50), (27, 64), (256, 300)])
@pytest.mark.parametrize("rank", [1, None])
def test_the_gram_form_is_the_published_iteration(shape: tuple[int, int], rank: int | None) -> None:
    torch.manual_seed(0)
    matrices = torch.randn(3, *shape)
    if rank is not None:
        matrices = matrices[:, :, :1] * matrices[:, :1] + 1e-3 * matrices  # one large singular value, many small
    found = orthogonalize(matrices)
    for matrix, one in zip(matrices, found, strict=True):
        torch.testing.assert_close(one, slowly(matrix), rtol=1e-4, atol=1e-5)


def test_singular_values_come_near_one_and_vectors_stay() -> None:
    torch.manual_seed(0)
    matrix = torch.randn(6, 40)
    left, before, right = torch.linalg.svd(matrix, full_matrices=False)
    after = left.T @ orthogonalize(matrix[None])[0] @ right.T
    torch.testing.assert_close(after, after.diagonal().diag(), rtol=0, atol=1e-4)
    assert after.diagonal().min() > 0.6
    assert after.diagonal().max() < 1.3
    assert before.max() / before.min() > after.diagonal().max() / after.diagonal().min()


@pytest.mark.parametrize(("rows", "columns", "rank"), [(64, 576, 64), (256, 1152, 20)])
def test_products_in_bfloat16_are_near(rows: int, columns: int, rank: int) -> None:
    torch.manual_seed(0)
    steep = torch.randn(rows, rank) * torch.logspace(0, -3, rank)  # singular values over three decades, and noise
    matrix = steep @ torch.randn(rank, columns) + 1e-4 * torch.randn(rows, columns)
    found, exact = orthogonalize(matrix[None], torch.bfloat16)[0], slowly(matrix)
    assert found.dtype == torch.float32
    assert 1e-4 < (found - exact).norm() / exact.norm() < 0.08  # it really is computed in bfloat16
    assert torch.linalg.matrix_norm(found, 2) < 1.25


@pytest.mark.parametrize("shape", [(2, 3, 4), (1, 256, 300)])
def test_zeros_stay_zeros(shape: tuple[int, int, int]) -> None:
    assert torch.equal(orthogonalize(torch.zeros(shape)), torch.zeros(shape))


def test_large_matrices_take_half_of_symmetric_products(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    matrices, seen = torch.randn(2, 256, 300), []
    multiply = products.symmetric
    monkeypatch.setattr(products, "symmetric", lambda left, right: seen.append(left.shape) or multiply(left, right))
    found = orthogonalize(matrices)
    assert len(seen) == 10  # the Gram matrices, and nine small ones
    monkeypatch.setattr(products, "takes_symmetric", lambda matrices: False)
    torch.testing.assert_close(found, orthogonalize(matrices), rtol=1e-4, atol=1e-5)
    assert len(seen) == 10


SHAPES = [(8, 4, 3, 3), (8, 4, 3, 3), (64, 3, 3, 3), (36, 8), (5, 7)]  # tall ones too, and three of one shape when wide


def make(channels_last: bool = False) -> list[Tensor]:
    torch.manual_seed(0)
    tensors = [torch.randn(shape) for shape in SHAPES]
    return [
        (t.to(memory_format=torch.channels_last) if channels_last and t.ndim == 4 else t).requires_grad_()
        for t in tensors
    ]


@pytest.mark.parametrize("channels_last", [False, True])
def test_steps_are_those_of_each_matrix_alone(channels_last: bool) -> None:
    parameters = make(channels_last)
    expected = [p.detach().clone() for p in parameters]
    buffers = [torch.zeros_like(p) for p in expected]
    optimizer = Muon([{"params": parameters, "orthogonal": True}], lr=0.1, momentum=0.6)
    for _ in range(3):
        gradients = [torch.randn_like(p) for p in parameters]
        for parameter, gradient in zip(parameters, gradients, strict=True):
            parameter.grad = gradient.clone()
        optimizer.step()
        for index, gradient in enumerate(gradients):
            buffers[index] = 0.6 * buffers[index] + gradient
            update = (gradient + 0.6 * buffers[index]).reshape(len(gradient), -1)
            tall = update.shape[0] > update.shape[1]
            update = slowly(update.T).T if tall else slowly(update)
            weight = expected[index]
            weight = weight * math.sqrt(len(weight)) / weight.norm()
            expected[index] = weight - 0.1 * update.reshape(weight.shape)
        torch.testing.assert_close([p.detach() for p in parameters], expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("rows", "columns", "share"), [(16, 100, 1.0), (100, 16, 0.4)])
def test_a_step_is_as_long_as_the_learning_rate_says(rows: int, columns: int, share: float) -> None:
    weight = torch.randn(rows, columns).requires_grad_()
    weight.grad = torch.randn(rows, columns) * 1e4  # its scale is of no matter
    Muon([{"params": [weight], "orthogonal": True}], lr=0.0, momentum=0.6).step()
    assert weight.norm().item() == pytest.approx(math.sqrt(rows))
    before = weight.detach().clone()
    Muon([{"params": [weight], "orthogonal": True}], lr=0.25, momentum=0.6).step()
    assert ((weight - before).norm() / before.norm()).item() == pytest.approx(0.25 * share, rel=0.15)


def test_a_weight_of_zeros_stays_finite() -> None:
    weight = torch.zeros(3, 4).requires_grad_()
    weight.grad = torch.ones(3, 4)
    Muon([{"params": [weight], "orthogonal": True}], lr=0.1, momentum=0.6).step()
    assert weight.isfinite().all()


def test_other_groups_get_nesterovs_sgd() -> None:
    ours = make()
    theirs = copy.deepcopy(ours)
    muon = Muon([{"params": ours[:2]}, {"params": ours[2:], "momentum": 0.3}], lr=0.1, momentum=0.9)
    options: dict[str, Any] = {"nesterov": True, "lr": 0.1}
    sgd = torch.optim.SGD([{"params": theirs[:2]}, {"params": theirs[2:], "momentum": 0.3}], momentum=0.9, **options)
    for _ in range(4):
        for a, b in zip(ours, theirs, strict=True):
            a.grad = torch.randn_like(a)
            b.grad = a.grad.clone()
        muon.step()
        sgd.step()
    torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-7)


def test_parameters_without_a_gradient_are_left_alone() -> None:
    parameters = make()
    before = [p.detach().clone() for p in parameters]
    optimizer = Muon([{"params": parameters[:3], "orthogonal": True}, {"params": parameters[3:]}], lr=0.1, momentum=0.6)
    parameters[1].grad = torch.ones_like(parameters[1])
    optimizer.step()
    moved = [not torch.equal(a, b) for a, b in zip(before, parameters, strict=True)]
    assert moved == [False, True, False, False, False]


def test_state_survives_a_state_dict_bit_for_bit() -> None:
    def run(steps: int, parameters: list[Tensor], state: dict[str, Any] | None) -> dict[str, Any]:
        optimizer = Muon([{"params": parameters, "orthogonal": True}], lr=0.1, momentum=0.6)
        if state is not None:
            optimizer.load_state_dict(state)
        for _ in range(steps):
            for index, parameter in enumerate(parameters):
                parameter.grad = (parameter.detach() + index).sin()
            optimizer.step()
        return optimizer.state_dict()

    through, stopped = make(), make()
    run(4, through, None)
    state = run(2, stopped, None)
    assert {key for values in state["state"].values() for key in values} == {"momentum_buffer"}
    run(2, stopped, state)
    assert all(torch.equal(a, b) for a, b in zip(through, stopped, strict=True))


def test_a_closure_is_called_with_gradients() -> None:
    weight = torch.ones(2, 3).requires_grad_()
    optimizer = Muon([{"params": [weight], "orthogonal": True}], lr=0.1, momentum=0.6)

    def closure() -> float:
        loss = (weight**2).sum()
        loss.backward()
        return float(loss.detach())

    assert optimizer.step(closure) == 6.0
    assert weight.grad is not None
