import dataclasses
import math
from collections import Counter
from itertools import pairwise
from typing import Any

import pytest
import torch

from fastcifar import muon
from fastcifar.muon import Muon
from fastcifar.nets import build_model
from fastcifar.optim import build_optimizer, learning_rate, resolution, set_learning_rate
from fastcifar.recipes import RECIPES


def test_constant_schedule() -> None:
    assert {learning_rate(RECIPES["report"], step, 10) for step in range(10)} == {1e-3}


@pytest.mark.parametrize("schedule", ["one-cycle", "cosine"])
def test_schedules_rise_to_their_peak_and_fall_to_nothing(schedule: Any) -> None:
    recipe = dataclasses.replace(RECIPES["fast"], lr=1.0, warmup=0.25, schedule=schedule)
    rates = [learning_rate(recipe, step, 100) for step in range(100)]
    assert all(a < b for a, b in pairwise(rates[:25]))
    assert all(a > b for a, b in pairwise(rates[25:]))
    assert max(rates) == pytest.approx(1.0, abs=0.03)
    assert 0 < rates[0] < 0.05
    assert 0 < rates[-1] < 0.01


@pytest.mark.parametrize("final", [0.0, 0.25])
def test_shapes_of_the_schedules(final: float) -> None:
    recipe = dataclasses.replace(RECIPES["fast"], lr=2.0, warmup=0.2, final_lr=final)
    cosine = dataclasses.replace(recipe, schedule="cosine")
    for step in range(1000):
        position = (step + 0.5) / 1000
        fallen = (position - 0.2) / 0.8
        line = position / 0.2 if position < 0.2 else 1 - fallen
        wave = position / 0.2 if position < 0.2 else 0.5 * (1 + math.cos(math.pi * fallen))
        floor = 0.0 if position < 0.2 else final
        assert learning_rate(recipe, step, 1000) == pytest.approx(2 * (floor + (1 - floor) * line))
        assert learning_rate(cosine, step, 1000) == pytest.approx(2 * (floor + (1 - floor) * wave))
    assert learning_rate(cosine, 999, 1000) == pytest.approx(2 * final, abs=1e-4)


@pytest.mark.parametrize("schedule", ["one-cycle", "cosine"])
@pytest.mark.parametrize("warmup", [0.0, 1.0])
def test_schedules_without_one_of_their_sides(schedule: Any, warmup: float) -> None:
    recipe = dataclasses.replace(RECIPES["fast"], warmup=warmup, schedule=schedule)
    rates = [learning_rate(recipe, step, 7) for step in range(7)]
    assert rates == sorted(rates, reverse=warmup == 0)
    assert all(0 < rate <= recipe.lr for rate in rates)


@pytest.mark.parametrize("steps", [1, 2, 3, 7, 10, 391, 12500])
@pytest.mark.parametrize("fractions", [(), (0.67,), (0.5, 0.2), (0.1, 0.2, 0.7), (1 / 3, 1 / 3, 1 / 3), (0.001, 0.5)])
def test_stages_follow_one_another_without_overlap(steps: int, fractions: tuple[float, ...]) -> None:
    stages = tuple((20 + index, fraction) for index, fraction in enumerate(fractions))
    recipe = dataclasses.replace(RECIPES["fast"], resolutions=stages)
    sizes = [resolution(recipe, step, steps) for step in range(steps)]
    order = [side for side, _ in stages] + [None]
    assert [order.index(size) for size in sizes] == sorted(order.index(size) for size in sizes)
    counts = Counter(sizes)
    for side, fraction in stages:
        assert abs(counts[side] - fraction * steps) <= 1  # each border is rounded
    assert sum(counts.values()) == steps
    if math.isclose(sum(fractions), 1):
        assert counts[None] == 0


def test_groups_are_matrices_head_and_vectors() -> None:
    model = build_model("small", num_classes=10)
    names = {parameter: name for name, parameter in model.named_parameters()}
    recipe = dataclasses.replace(RECIPES["fast"], lr=0.5, head_lr=0.25, vector_lr=8.0, weight_decay=0.01)
    for optimizer in ("sgd", "adam", "muon"):
        built = build_optimizer(model, dataclasses.replace(recipe, optimizer=optimizer))
        matrices, head, vectors = ([names[p] for p in group["params"]] for group in built.param_groups)
        convolutions = [f"features.{index}.weight" for index in (0, 4, 8, 12)]
        assert matrices == [*convolutions, "classifier.1.weight"]
        assert head == ["classifier.4.weight"]
        assert set(vectors) == set(names.values()) - {*matrices, *head}
        set_learning_rate(built, 0.1)
        assert [group["lr"] for group in built.param_groups] == [0.1, 0.1 * 0.25, 0.1 * 8.0]
        decay = [group["decay"] for group in built.param_groups]
        assert decay == ([0.0, 0.01, 0.0] if optimizer == "muon" else [0.01, 0.01, 0.0])


def test_muon_turns_matrices_and_leaves_the_rest_to_sgd() -> None:
    model = build_model("small", num_classes=10)
    built = build_optimizer(
        model, dataclasses.replace(RECIPES["fast"], optimizer="muon", momentum=0.8, muon_momentum=0.7)
    )
    assert isinstance(built, Muon)
    assert [group["orthogonal"] for group in built.param_groups] == [True, False, False]
    assert [group["momentum"] for group in built.param_groups] == [0.7, 0.8, 0.8]


@pytest.mark.parametrize("precision", [torch.float32, torch.bfloat16, torch.float16])
def test_muon_multiplies_in_the_runs_bfloat16(precision: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    model = build_model("small", num_classes=10)
    seen = []
    found = muon.orthogonalize
    monkeypatch.setattr(muon, "orthogonalize", lambda x, products: (seen.append(products), found(x, products))[1])
    optimizer = build_optimizer(model, RECIPES["fast"], precision=precision)
    for parameter in model.parameters():
        parameter.grad = torch.randn_like(parameter)
    optimizer.step()
    assert set(seen) == {torch.bfloat16 if precision == torch.bfloat16 else torch.float32}
    assert all(p.dtype == torch.float32 and p.isfinite().all() for p in model.parameters())


def test_a_frozen_weight_is_in_no_group() -> None:
    model = build_model("small", num_classes=10)
    model.features[0].weight.requires_grad_(False)
    built = build_optimizer(model, RECIPES["fast"])
    found = {id(p) for group in built.param_groups for p in group["params"]}
    assert found == {id(p) for p in model.parameters()} - {id(model.features[0].weight)}


@pytest.mark.parametrize("optimizer", ["adam", "sgd"])
def test_decay_is_decoupled_and_spares_vectors(optimizer: Any) -> None:
    model = build_model("small", num_classes=10)
    recipe = dataclasses.replace(RECIPES["fast"], optimizer=optimizer, weight_decay=0.5, head_lr=0.5)
    built = build_optimizer(model, recipe)
    set_learning_rate(built, 0.1)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    for p in model.parameters():
        p.grad = torch.zeros_like(p)  # then decay is all a step does
    built.step()
    for name, p in model.named_parameters():
        factor = 1.0 if p.ndim == 1 else 0.975 if name == "classifier.4.weight" else 0.95
        torch.testing.assert_close(p.detach(), before[name] * factor)


def test_adam_with_weight_decay_is_adamw() -> None:
    torch.manual_seed(0)
    model, other = torch.nn.Linear(5, 4), torch.nn.Linear(5, 4)
    other.load_state_dict(model.state_dict())
    ours = build_optimizer(model, dataclasses.replace(RECIPES["fast"], optimizer="adam", lr=0.01, weight_decay=0.2))
    groups = [{"params": [other.weight], "weight_decay": 0.2}, {"params": [other.bias], "weight_decay": 0.0}]
    theirs = torch.optim.AdamW(groups, lr=0.01)
    for _ in range(5):
        for a, b in zip(model.parameters(), other.parameters(), strict=True):
            a.grad = torch.randn_like(a)
            b.grad = a.grad.clone()
        ours.step()
        theirs.step()
    torch.testing.assert_close(model.state_dict(), other.state_dict())


@pytest.mark.parametrize("optimizer", ["adam", "sgd", "muon"])
def test_a_skipped_step_moves_nothing_not_even_by_decay(optimizer: Any) -> None:
    model = torch.nn.Sequential(torch.nn.Linear(3, 3), torch.nn.Linear(3, 2))
    built = build_optimizer(model, dataclasses.replace(RECIPES["fast"], optimizer=optimizer, weight_decay=0.5))
    scaler = torch.amp.GradScaler("cpu")
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    for factor, moves in ((math.inf, False), (1.0, True)):
        scaler.scale(factor * model(torch.ones(4, 3)).sum()).backward()
        scaler.step(built)
        scaler.update()
        built.zero_grad()
        moved = [not torch.equal(before[name], tensor) for name, tensor in model.state_dict().items()]
        assert moved == [moves] * 4


def test_sgd_step_is_nesterovs() -> None:
    recipe = dataclasses.replace(RECIPES["fast"], momentum=0.5, weight_decay=0.0, head_lr=1.0)
    model = torch.nn.Linear(1, 1)
    optimizer = build_optimizer(model, recipe)
    set_learning_rate(optimizer, 0.1)
    start = model.weight.item()
    for expected in (1.5, 1.75):  # v = m v + g; w -= lr (g + m v) with g = 1
        model.weight.grad, model.bias.grad = torch.ones(1, 1), torch.ones(1)
        optimizer.step()
        start -= 0.1 * expected
        assert model.weight.item() == pytest.approx(start, abs=1e-6)
