"""The random words of the CPU kernel: `rng`, one position or counter at a time, as numba compiles it.

    w0, w1, w2, w3 = philox(c0, c1, c2, c3, k0, k1)
    fill_keys(keys, order, samples, block_size, day, key0, key1)        # once an epoch and thread
    row = permute(position, samples, keys)

All give what `rng` gives; `keys` is the address of the words that an epoch's order needs.
"""

# numba infers the types of its words, and not Python's.
# mypy: disable-error-code="no-untyped-def, no-untyped-call"

import numpy as np

from fastcifar.kernels.cpu_fields import KEYS
from fastcifar.kernels.cpu_words import get_word, put_word, word
from fastcifar.kernels.rng import MIN_BITS, MIX, ORDER, PHILOX, ROUNDS, WINDOW

__all__ = ["fill_keys", "permute", "permute_blocks", "philox"]

_M0, _M1, _W0, _W1 = (np.uint64(word) for word in PHILOX)
_MIX0, _MIX1 = np.uint64(MIX[0]), np.uint64(MIX[1])
_LOW, _32, _16, _13, _2, _1, _0 = (np.uint64(word) for word in (0xFFFFFFFF, 32, 16, 13, 2, 1, 0))
_ORDER, _WINDOW, _MIN_BITS = np.uint64(ORDER), np.uint64(WINDOW), MIN_BITS

_EACH = KEYS // 2 - 1  # round keys and widths of one permutation


@word
def philox(c0, c1, c2, c3, k0, k1):
    """`rng.philox` of one counter, in uint64."""
    for _ in range(10):
        p0, p1 = c0 * _M0, c2 * _M1
        c0, c1, c2, c3 = (p1 >> _32) ^ c1 ^ k0, p1 & _LOW, (p0 >> _32) ^ c3 ^ k1, p0 & _LOW
        k0, k1 = (k0 + _W0) & _LOW, (k1 + _W1) & _LOW
    return c0, c1, c2, c3


@word
def _mix(h):
    h ^= h >> _16
    h = (h * _MIX0) & _LOW
    h ^= h >> _13
    h = (h * _MIX1) & _LOW
    return h ^ (h >> _16)


@word
def _widths(samples):
    """`rng.widths`, the right one first."""
    bits = _MIN_BITS
    while bits < 63 and (samples - 1) >> bits:
        bits += 1
    return bits - bits // 2, bits // 2


@word
def permute(position, samples, keys):
    """`rng.permute` of one position, with the round keys and, behind them, the widths."""
    right_bits, left_bits = get_word(keys, ROUNDS), get_word(keys, ROUNDS + 1)
    left_mask, right_mask = (_1 << left_bits) - _1, (_1 << right_bits) - _1
    value, limit = np.uint64(position), np.uint64(samples)
    while True:
        left, right = value >> right_bits, value & right_mask
        for i in range(0, ROUNDS, 2):
            right ^= _mix(left ^ get_word(keys, i)) & right_mask
            left ^= _mix(right ^ get_word(keys, i + 1)) & left_mask
        value = (left << right_bits) | right
        if value < limit:
            break
    return np.int64(value)


@word
def _fill(keys, samples, second, day, purpose, key0, key1):
    for i in range(0, ROUNDS, 4):
        w0, w1, w2, w3 = philox(np.uint64(i // 4), second, day, purpose, key0, key1)
        put_word(keys, i, w0)
        put_word(keys, i + 1, w1)
        put_word(keys, i + 2, w2)
        put_word(keys, i + 3, w3)
    right_bits, left_bits = _widths(samples)
    put_word(keys, ROUNDS, np.uint64(right_bits))
    put_word(keys, ROUNDS + 1, np.uint64(left_bits))


@word
def fill_keys(keys, order, samples, block_size, day, key0, key1):
    """Write what an epoch's order needs to the uint64[KEYS] at `keys`: see `permute_blocks`."""
    _fill(keys, samples if order == 1 else max(samples // block_size, 1), _0, day, _ORDER, key0, key1)
    if order == 2:
        w0, w1, _, _ = philox(_2, _0, day, _ORDER, key0, key1)
        put_word(keys, 2 * _EACH, ((w1 << _32) | w0) % np.uint64(samples))
        put_word(keys, 2 * _EACH + 1, ~_0)  # no window yet


@word
def permute_blocks(position, samples, block_size, window, day, key0, key1, keys):
    """`rng.permute_blocks` of one position.

    At `keys` are the epoch's round keys and widths, those of the window of the last position asked for,
    the epoch's shift, and which window that was.
    """
    span = block_size * window
    q = position // span
    first = q * span
    length = min(span, samples - first)
    own = keys + 8 * _EACH
    if get_word(keys, 2 * _EACH + 1) != np.uint64(q):
        _fill(own, length, np.uint64(q), day, _WINDOW, key0, key1)
        put_word(keys, 2 * _EACH + 1, np.uint64(q))
    place = first + permute(position - first, length, own)
    slot, full = place // block_size, samples // block_size
    if slot < full:
        slot = permute(slot, full, keys)
    return np.int64(
        (np.uint64(slot * block_size + place % block_size) + get_word(keys, 2 * _EACH)) % np.uint64(samples)
    )
