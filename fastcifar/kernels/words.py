"""The random words of `rng` in plain torch operations, for any device.

They touch only the tensors they are given. Words of 32 bits are kept in int64, and products taken in halves
of 16 bits, so that nothing overflows on any device.

    w0, w1, w2, w3 = row_words(rows, epoch, AUGMENT, split_seed(seed))

Legend: N samples in the split, B rows of a batch.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fastcifar.kernels.plan import Plan
from fastcifar.kernels.rng import MIX, PHILOX, order_shift, round_keys, widths

__all__ = ["epoch_order", "row_words"]

_LOW = 0xFFFFFFFF


def _multiply(value: Tensor, constant: int) -> tuple[Tensor, Tensor]:
    """The high and the low 32 bits of a product of two 32-bit words."""
    low, high = value * (constant & 0xFFFF), value * (constant >> 16)  # below 2**48
    middle = high + (low >> 16)
    return middle >> 16, ((middle & 0xFFFF) << 16) | (low & 0xFFFF)


def row_words(
    rows: Tensor, epoch: int | Tensor, purpose: int, key: tuple[int, int]
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """`rng.philox` of (row low, row high, epoch, purpose): four words for each of int64[B] rows."""
    c0, c1 = rows & _LOW, rows >> 32
    c2, c3 = torch.zeros_like(c0) + epoch, torch.full_like(c0, purpose)
    k0, k1 = key
    for _ in range(10):
        (high0, low0), (high1, low1) = _multiply(c0, PHILOX[0]), _multiply(c2, PHILOX[1])
        c0, c1, c2, c3 = high1 ^ c1 ^ k0, low1, high0 ^ c3 ^ k1, low0
        k0, k1 = (k0 + PHILOX[2]) & _LOW, (k1 + PHILOX[3]) & _LOW
    return c0, c1, c2, c3


def epoch_order(plan: Plan, epoch: int, device: torch.device) -> Tensor:
    """int64[N]: the split's samples in an epoch's order.

    Cycle walking has no bound that is both safe and small, so each round of it asks the device how many
    values are left: some 20 waits for 50,000 samples, once an epoch.
    """
    count, seed = plan.samples, plan.seed
    order = torch.arange(count, device=device)
    if plan.order == "random":
        _walk(order, count, round_keys(seed, epoch))
    elif plan.order == "block":
        span = plan.block_size * plan.window
        windows = count // span
        if windows:
            # [8, windows], then a key for each position: [8, windows, span]
            table = torch.tensor(np.array([round_keys(seed, epoch, q) for q in range(windows)]).T, device=device)
            keys = table[:, :, None].expand(-1, -1, span).reshape(len(table), -1)
            places = order[: windows * span] % span
            _walk(places, span, list(keys))
            order[: windows * span] += places - order[: windows * span] % span
        rest = count - windows * span
        if rest:
            last = torch.arange(rest, device=device)
            _walk(last, rest, round_keys(seed, epoch, windows))
            order[windows * span :] = last + windows * span
        slots, full = order // plan.block_size, count // plan.block_size
        blocks = torch.arange(full + 1, device=device)
        if full:
            _walk(blocks[:full], full, round_keys(seed, epoch))
        order = (blocks[slots] * plan.block_size + order % plan.block_size + order_shift(count, seed, epoch)) % count
    return order


def _walk(value: Tensor, samples: int, keys: Sequence[int | Tensor]) -> None:
    """`rng.permute` in place, of int64[n] in [0, samples); a key is one for all, or int64[n]."""
    left_bits, right_bits = widths(samples)
    left_mask, right_mask = (1 << left_bits) - 1, (1 << right_bits) - 1
    walking = torch.arange(len(value), device=value.device)
    while walking.numel():
        walked = value[walking]
        left, right = walked >> right_bits, walked & right_mask
        for i, key in enumerate(keys):
            k: Any = key[walking] if isinstance(key, Tensor) else key
            if i % 2 == 0:
                right = right ^ (_mix(left ^ k) & right_mask)
            else:
                left = left ^ (_mix(right ^ k) & left_mask)
        walked = (left << right_bits) | right
        value[walking] = walked
        walking = walking[walked >= samples]


def _mix(h: Tensor) -> Tensor:
    """MurmurHash3's fmix32."""
    h = h ^ (h >> 16)
    h = _multiply(h, MIX[0])[1]
    h = h ^ (h >> 13)
    h = _multiply(h, MIX[1])[1]
    return h ^ (h >> 16)
