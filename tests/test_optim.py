import dataclasses
from itertools import pairwise

import pytest
import torch

from fastcifar.nets import build_model
from fastcifar.optim import build_optimizer, decay_no_sync, learning_rate, set_learning_rate
from fastcifar.recipes import RECIPES


def test_constant_schedule() -> None:
    assert {learning_rate(RECIPES["report"], step, 10) for step in range(10)} == {1e-3}


def test_one_cycle_rises_to_its_peak_and_falls_to_nothing() -> None:
    recipe = dataclasses.replace(RECIPES["fast"], lr=1.0, warmup=0.25)
    rates = [learning_rate(recipe, step, 100) for step in range(100)]
    assert all(a < b for a, b in pairwise(rates[:25]))
    assert all(a > b for a, b in pairwise(rates[25:]))
    assert max(rates) == pytest.approx(1.0, abs=0.03)
    assert 0 < rates[0] < 0.05
    assert 0 < rates[-1] < 0.01


@pytest.mark.parametrize("warmup", [0.0, 1.0])
def test_one_cycle_without_one_of_its_sides(warmup: float) -> None:
    recipe = dataclasses.replace(RECIPES["fast"], warmup=warmup)
    rates = [learning_rate(recipe, step, 7) for step in range(7)]
    assert rates == sorted(rates, reverse=warmup == 0)
    assert all(0 < rate <= recipe.lr for rate in rates)


@pytest.mark.parametrize("name", ["report", "fast"])
def test_decay_is_decoupled_and_spares_vectors(name: str) -> None:
    model = build_model("small", num_classes=10)
    optimizer = build_optimizer(model, RECIPES[name])
    before = [p.clone() for p in model.parameters()]
    decay_no_sync(optimizer, rate=0.1, weight_decay=0.5)
    for old, new in zip(before, model.parameters(), strict=True):
        torch.testing.assert_close(new, old * 0.95 if old.ndim > 1 else old)


def test_sgd_step_is_nesterovs() -> None:
    recipe = dataclasses.replace(RECIPES["fast"], momentum=0.5)
    model = torch.nn.Linear(1, 1)
    optimizer = build_optimizer(model, recipe)
    set_learning_rate(optimizer, 0.1)
    start = model.weight.item()
    for expected in (1.5, 1.75):  # v = m v + g; w -= lr (g + m v) with g = 1
        model.weight.grad, model.bias.grad = torch.ones(1, 1), torch.ones(1)
        optimizer.step()
        start -= 0.1 * expected
        assert model.weight.item() == pytest.approx(start, abs=1e-6)
