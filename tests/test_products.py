"""Tests of fastcifar.kernels.products: half of a symmetric product is the whole of it."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from fastcifar.kernels import openmp, products
from tests.effort import effort
from tests.threads import on_threads


def _made(count: int, depth: int, side: int, seed: int = 0) -> Tensor:
    torch.manual_seed(seed)
    room = products.planes(count, depth, side)[:, :, :side]
    return room.copy_(torch.randn(count, depth, side))


@settings(max_examples=effort(30), deadline=None)
@given(
    count=st.integers(1, 3),
    depth=st.integers(1, 300),
    side=st.sampled_from((16, 32, 48, 96, 112, 208)),
    seed=st.integers(0, 2**31),
)
def test_gram_matrices_and_their_products(count: int, depth: int, side: int, seed: int) -> None:
    """Beside float64; what is not beside the matrices in their room is never in the result."""
    values = _made(count, depth, side, seed)
    exact = values.double()
    found = products.symmetric(values, values)
    expected = exact.mT @ exact
    torch.testing.assert_close(found, expected.float(), rtol=1e-4, atol=1e-3)
    assert torch.equal(found, found.mT)
    sizes = 1 + torch.rand(count, 1, 1)
    torch.testing.assert_close(products.gram(values.mT, sizes), found / sizes**2, rtol=1e-4, atol=1e-3)
    cube = products.symmetric(found, products.symmetric(found, found))
    wrong = (cube - expected @ expected @ expected).abs().max()
    assert wrong <= 1e-4 * cube.abs().max()


def test_fresh_sums_forget_what_was_there() -> None:
    slopes, tiles = _made(2, 150, 48), _made(2, 150, 32, seed=1)
    expected = slopes.mT.double() @ tiles.double()
    sums = torch.full((2, products.up(48, products.TALL), 32), torch.nan)
    products.add_products(slopes, tiles, sums, 48, fresh=True)
    torch.testing.assert_close(sums, expected.float(), rtol=1e-4, atol=1e-4)
    products.add_products(slopes, tiles, sums, 48)
    torch.testing.assert_close(sums, 2 * expected.float(), rtol=1e-4, atol=1e-4)


def test_threads_change_no_bit(monkeypatch: pytest.MonkeyPatch) -> None:
    values = _made(2, 150, 208)

    def run(threads: int) -> Tensor:
        with on_threads(threads):
            return products.symmetric(values, values)

    one = run(1)
    assert all(torch.equal(one, run(threads)) for threads in (2, 3))
    monkeypatch.setattr(openmp, "_parallel", lambda: None)
    assert torch.equal(one, run(2))


def test_they_are_for_large_matrices_in_float32() -> None:
    matrices = torch.zeros(1, 256, 300)
    assert products.takes_symmetric(matrices)
    assert not products.takes_symmetric(matrices.bfloat16())
    assert not products.takes_symmetric(matrices.double())
    assert not products.takes_symmetric(torch.zeros(1, 264, 300))
    assert not products.takes_symmetric(torch.zeros(1, 64, 300))
    assert not products.takes_symmetric(matrices.to("meta"))
