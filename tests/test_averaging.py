"""The averages of a net against sums written out."""

import dataclasses
from typing import Any

import pytest
import torch
from torch import nn

from fastcifar.averaging import Averaging, averaging_decay
from fastcifar.config import Recipe
from fastcifar.recipes import RECIPES


def recipe(averaging: str, **options: Any) -> Recipe:
    return dataclasses.replace(RECIPES["fast"], **{"averaging": averaging, "averaging_every": 2, **options})


def net() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2)).to(memory_format=torch.channels_last)


def move(model: nn.Module, step: int) -> None:
    """What a step does to it, buffers included."""
    with torch.no_grad():
        for tensor in model.state_dict().values():
            tensor.add_(step)


def state(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def test_ema_is_the_weighted_sum_of_the_nets_it_saw() -> None:
    model = net()
    averaging = Averaging(model, recipe("ema", averaging_decay=0.9), steps=100)
    expected = {name: tensor.double() for name, tensor in state(model).items() if tensor.is_floating_point()}
    for step in range(1, 8):
        move(model, step)
        averaging.update_no_sync(step)
        if step % 2 == 0:
            expected = {name: 0.81 * old + 0.19 * state(model)[name] for name, old in expected.items()}
    assert averaging.averages().keys() == expected.keys()
    assert "1.running_var" in expected
    assert "1.num_batches_tracked" not in expected
    for name, tensor in averaging.averages().items():
        torch.testing.assert_close(tensor.double(), expected[name])
        assert torch.equal(averaging.tensors()[f"net.{name}"], model.state_dict()[name])


def test_lookahead_sets_the_net_back_to_its_average() -> None:
    model = net()
    averaging = Averaging(model, recipe("lookahead", averaging_decay=0.9), steps=7)
    slow = model[0].weight.detach().double()
    for step in range(1, 8):
        move(model, step)
        fast = model[0].weight.detach().double()
        averaging.update_no_sync(step)
        if step % 2 == 0:
            kept = 0.81 * (step / 7) ** 3
            slow = kept * slow + (1 - kept) * fast
            torch.testing.assert_close(model[0].weight.detach().double(), slow)
        torch.testing.assert_close(averaging.averages()["0.weight"].double(), slow)
    assert not torch.equal(model[0].weight, averaging.averages()["0.weight"])  # step 7


def test_decay_of_lookahead_grows_to_that_of_ema() -> None:
    decays = [averaging_decay(recipe("lookahead"), step, 50) for step in range(1, 51)]
    assert decays == sorted(decays)
    assert decays[0] < 1e-5
    assert decays[-1] == averaging_decay(recipe("ema"), 1, 50) == 0.95**2


def test_a_net_that_stands_still_is_its_own_average() -> None:
    model = net()
    averaging = Averaging(model, recipe("ema"), steps=10)
    averaging.update_no_sync(2)
    assert all(torch.equal(tensor, model.state_dict()[name]) for name, tensor in averaging.averages().items())


def test_swapping_is_exact_in_place_and_undone_after_an_error() -> None:
    model = net()
    averaging = Averaging(model, recipe("ema"), steps=10)
    move(model, 1)
    averaging.update_no_sync(2)
    own, average = state(model), {name: tensor.clone() for name, tensor in averaging.averages().items()}
    where = [parameter.data_ptr() for parameter in model.parameters()]
    with pytest.raises(KeyError), averaging.swapped():
        assert all(torch.equal(model.state_dict()[name], tensor) for name, tensor in average.items())
        raise KeyError
    assert all(torch.equal(tensor, own[name]) for name, tensor in model.state_dict().items())
    assert all(torch.equal(tensor, average[name]) for name, tensor in averaging.averages().items())
    assert [parameter.data_ptr() for parameter in model.parameters()] == where
    assert averaging.averages()["0.weight"].is_contiguous(memory_format=torch.channels_last)


def test_both_nets_are_restored() -> None:
    model, other = net(), net()
    averaging = Averaging(model, recipe("ema"), steps=10)
    move(model, 1)
    averaging.update_no_sync(2)
    saved = {name: tensor.clone() for name, tensor in averaging.tensors().items()}
    again = Averaging(other, recipe("ema"), steps=10)
    other.load_state_dict({**model.state_dict(), **averaging.averages()})
    again.restore(saved)
    assert all(torch.equal(tensor, model.state_dict()[name]) for name, tensor in other.state_dict().items())
    assert all(torch.equal(tensor, averaging.averages()[name]) for name, tensor in again.averages().items())


def test_no_averaging_holds_and_does_nothing() -> None:
    model = net()
    averaging = Averaging(model, recipe("none"), steps=10)
    before = state(model)
    averaging.update_no_sync(2)
    with averaging.swapped():
        assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert averaging.averages() == averaging.tensors() == {}
