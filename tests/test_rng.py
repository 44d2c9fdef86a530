"""The random numbers: known answers, exact bijections, and statistics that a wrong constant would break."""

import itertools
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fastcifar.kernels import rng
from tests.effort import effort

# Random123's kat_vectors for philox4x32-10: counter, key, result.
KNOWN = [
    ((0, 0, 0, 0), (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
    ((0xFFFFFFFF,) * 4, (0xFFFFFFFF,) * 2, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
    (
        (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
        (0xA4093822, 0x299F31D0),
        (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
    ),
]
PINNED_ORDER = [25871, 28613, 26318, 22788, 47348, 10515, 5373, 31810]
PINNED_DRAWS = [[-2, -2, -3], [4, 1, 4], [0, 0, 0], [13, 23, 18], [2, 9, 16]]
seeds = st.integers(0, 2**64 - 1)
epochs = st.integers(0, 2**32 - 1)


@pytest.mark.parametrize(("counter", "key", "result"), KNOWN)
def test_philox_gives_the_published_answers(counter, key, result):
    assert tuple(int(word) for word in rng.philox(counter, key)) == result


def test_philox_of_arrays_is_philox_of_each():
    counters = np.array([counter for counter, _, _ in KNOWN], dtype=np.uint64)
    key = KNOWN[2][1]
    together = rng.philox(tuple(counters.T), key)
    for i, counter in enumerate(counters):
        assert (together[:, i] == rng.philox(tuple(counter), key)).all()


def test_the_contract_is_pinned():
    """Anything that changes these changes every run of every user."""
    assert rng.permute(np.arange(8), samples=50_000, seed=1, epoch=2).tolist() == PINNED_ORDER
    drawn = rng.draws([0, 1, 2**33], seed=2**63 + 5, epoch=7, height=32, width=40, crop=4, flip="alternating", cutout=8)
    assert [column.tolist() for column in drawn] == PINNED_DRAWS


def test_draws_follow_their_formulas():
    """Written out again with Python's integers, from the words of `philox`."""
    seed, epoch, crop, height, width, cutout = 0xDEADBEEF_12345678, 4_000_000_001, 3, 28, 40, 9
    key = (0x12345678, 0xDEADBEEF)
    for row in (0, 1, 77, 2**32, 2**40 + 3):
        words = [int(word) for word in rng.philox((row % 2**32, row // 2**32, epoch, 0), key)]
        first = int(rng.philox((row % 2**32, row // 2**32, 0, 1), key)[0])
        for flip, value in (("none", 0), ("random", words[2] // 2**31), ("alternating", (first // 2**31 + epoch) % 2)):
            drawn = rng.draws(
                row, seed=seed, epoch=epoch, height=height, width=width, crop=crop, flip=flip, cutout=cutout
            )
            assert drawn.dy == words[0] * 7 // 2**32 - 3
            assert drawn.dx == words[1] * 7 // 2**32 - 3
            assert drawn.flip == value
            assert drawn.y0 == (words[3] // 2**16) * 20 // 2**16
            assert drawn.x0 == (words[3] % 2**16) * 32 // 2**16


def chi_square_is_plausible(observed, expected, freedom):
    """Within five standard deviations of its mean, either way: a fixed seed makes this a constant, not a gamble."""
    statistic = ((observed - expected) ** 2 / expected).sum()
    return abs(statistic - freedom) < 5 * math.sqrt(2 * freedom)


def test_draws_are_uniform_and_independent():
    count = 200_000
    drawn = rng.draws(
        np.arange(count), seed=3, epoch=1, height=32, width=32, crop=4, flip="random", cutout=30
    )  # 9 shifts each way, 2 flips, 3 x 3 corners
    joint = np.stack([drawn.dy + 4, drawn.dx + 4, drawn.flip, drawn.y0, drawn.x0])
    shape = (9, 9, 2, 3, 3)
    cells = np.bincount(np.ravel_multi_index(joint, shape), minlength=math.prod(shape))
    assert cells.size == math.prod(shape)  # nothing outside its range
    assert chi_square_is_plausible(cells, count / cells.size, cells.size - 1)


@pytest.mark.parametrize("change", [{"seed": 4}, {"epoch": 2}, {"seed": 3 + 2**32}])
def test_draws_of_another_key_are_independent(change):
    count = 100_000
    common = {"height": 32, "width": 32, "crop": 2, "flip": "random", "cutout": 0}
    one = rng.draws(np.arange(count), **{"seed": 3, "epoch": 1, **common})
    other = rng.draws(np.arange(count), **{"seed": 3, "epoch": 1, **common, **change})
    for a, b, values in ((one.dy + 2, other.dy + 2, 5), (one.dx + 2, other.dx + 2, 5), (one.flip, other.flip, 2)):
        cells = np.bincount(a * values + b, minlength=values**2)
        assert chi_square_is_plausible(cells, count / cells.size, cells.size - 1)


def test_flips_of_consecutive_rows_and_epochs():
    rows = np.arange(20_000)
    flips = [
        rng.draws(rows, seed=9, epoch=e, height=8, width=8, crop=0, flip="alternating", cutout=0).flip for e in range(4)
    ]
    assert 0.48 < flips[0].mean() < 0.52
    for before, after in itertools.pairwise(flips):
        assert (before + after == 1).all()
    agree = (flips[0][1:] == flips[0][:-1]).mean()
    assert 0.48 < agree < 0.52


@pytest.mark.parametrize("samples", [*range(1, 70), 127, 128, 129, 1000, 4096, 4097, 50_000])
def test_permute_is_a_bijection(samples):
    order = rng.permute(np.arange(samples), samples=samples, seed=samples, epoch=1)
    assert (np.sort(order) == np.arange(samples)).all()


@given(samples=st.integers(1, 300), seed=seeds, epoch=epochs)
@settings(max_examples=effort(60), deadline=None)
def test_permute_is_a_bijection_for_every_key(samples, seed, epoch):
    order = rng.permute(np.arange(samples), samples=samples, seed=seed, epoch=epoch)
    assert (np.sort(order) == np.arange(samples)).all()


@pytest.mark.parametrize("samples", [2**33 + 1, 10**10, 2**40, 2**40 + 1, 2**62 + 7])
def test_permute_of_huge_stores(samples):
    positions = np.concatenate([np.arange(2000), samples - 1 - np.arange(2000), samples // 2 + np.arange(2000)])
    order = rng.permute(positions, samples=samples, seed=5, epoch=0)
    assert order.min() >= 0
    assert order.max() < samples
    assert np.unique(order).size == positions.size
    eighths = np.bincount(order // -(-samples // 8), minlength=8)
    assert chi_square_is_plausible(eighths, positions.size / 8, 7)


def test_permute_positions_alone_are_positions_together():
    whole = rng.permute(np.arange(1000), samples=1000, seed=1, epoch=3)
    assert int(rng.permute(17, samples=1000, seed=1, epoch=3)) == whole[17]
    assert (rng.permute(np.arange(100, 200), samples=1000, seed=1, epoch=3) == whole[100:200]).all()


@pytest.mark.parametrize(("samples", "keys"), [(2, 150), (3, 200), (4, 300), (5, 700)])
def test_tiny_orders_are_all_equally_likely(samples, keys):
    orders = [rng.permute(np.arange(samples), samples=samples, seed=7, epoch=e) for e in range(keys)]
    codes = np.stack(orders) @ samples ** np.arange(samples)
    _, counts = np.unique(codes, return_counts=True)
    possible = math.factorial(samples)
    counts = np.pad(counts, (0, possible - counts.size))  # an order that never came counts too
    assert chi_square_is_plausible(counts, keys / possible, possible - 1)


@pytest.mark.parametrize("samples", [10, 33, 64])
def test_samples_are_uniform_over_positions_and_neighbours(samples):
    keys = 1000
    orders = np.stack([rng.permute(np.arange(samples), samples=samples, seed=e, epoch=0) for e in range(keys)])
    places = np.bincount((np.arange(samples) * samples + orders).ravel(), minlength=samples**2)
    assert chi_square_is_plausible(places, keys / samples, (samples - 1) ** 2)
    steps = (orders[:, 1:] - orders[:, :-1]) % samples  # of neighbours: uniform over 1..N-1
    counts = np.bincount(steps.ravel(), minlength=samples)[1:]
    # Steps within one order are dependent, but only slightly (they make a permutation).
    assert chi_square_is_plausible(counts, steps.size / (samples - 1), samples - 2)


def test_orders_are_uncorrelated_with_position_and_each_other():
    samples = 4096
    limit = 5 / math.sqrt(samples)
    orders = [rng.permute(np.arange(samples), samples=samples, seed=s, epoch=e) for s in range(5) for e in range(4)]
    for i, order in enumerate(orders):
        assert abs(np.corrcoef(order, np.arange(samples))[0, 1]) < limit
        for other in orders[i + 1 :]:
            assert abs(np.corrcoef(order, other)[0, 1]) < limit
            assert (order == other).sum() < 12  # Poisson with mean 1


@given(
    samples=st.integers(1, 150),
    block_size=st.integers(1, 50),
    window=st.integers(1, 8),
    seed=seeds,
    epoch=epochs,
)
@settings(max_examples=effort(25), deadline=None)
def test_block_order_is_a_bijection_that_reads_a_window_as_whole_blocks(samples, block_size, window, seed, epoch):
    options = {"samples": samples, "seed": seed, "epoch": epoch, "block_size": block_size, "window": window}
    order = rng.permute_blocks(np.arange(samples), **options)
    assert (np.sort(order) == np.arange(samples)).all()
    assert (rng.permute_blocks(np.arange(samples)[::-1], **options)[::-1] == order).all()
    shift = rng.order_shift(samples, seed, epoch)
    span, last = block_size * window, samples // block_size
    for first in range(0, samples, span):
        members = (order[first : first + span] - shift) % samples
        blocks, counts = np.unique(members // block_size, return_counts=True)
        assert len(blocks) <= window
        sizes = np.where(blocks == last, samples - last * block_size, block_size)
        assert (counts == sizes).all()


def test_block_order_puts_each_sample_everywhere():
    samples, keys = 40, 600
    orders = np.stack(
        [
            rng.permute_blocks(np.arange(samples), samples=samples, seed=e, epoch=1, block_size=7, window=3)
            for e in range(keys)
        ]
    )
    places = np.bincount((np.arange(samples) * samples + orders).ravel(), minlength=samples**2)
    assert chi_square_is_plausible(places, keys / samples, (samples - 1) ** 2)


def test_block_orders_of_epochs_and_windows_differ():
    options = {"samples": 10_000, "seed": 1, "block_size": 100, "window": 10}
    first, second = (rng.permute_blocks(np.arange(10_000), epoch=e, **options) for e in (0, 1))
    assert (first == second).mean() < 0.001
    inside = np.stack([np.argsort(np.argsort(first[q * 1000 : (q + 1) * 1000])) for q in range(10)])
    for q in range(9):
        assert abs(np.corrcoef(inside[q], inside[q + 1])[0, 1]) < 0.15
    assert rng.round_keys(3, 4, 0) != rng.round_keys(3, 4, 1) != rng.round_keys(3, 4)


def test_block_order_of_a_huge_store():
    options = {"samples": 10**12 + 7, "seed": 1, "epoch": 0, "block_size": 256, "window": 64}
    positions = 10**11 + np.arange(5000)
    order = rng.permute_blocks(positions, **options)
    assert np.unique(order).size == 5000
    shift = rng.order_shift(10**12 + 7, 1, 0)
    assert len(np.unique((order - shift) % (10**12 + 7) // 256)) <= 128
