"""The random numbers all kernels share: Philox4x32-10 and a keyed permutation, in NumPy.

There is no generator state: a draw is a pure function of (seed, epoch, row), a place in the order one
of (seed, epoch, position). What this page defines, every backend follows bit for bit. It touches
nothing but its arguments.

    rows = permute(np.arange(512), samples=50_000, seed=0, epoch=3)
    dy, dx, flip, y0, x0 = draws(rows, seed=0, epoch=3, height=32, width=32, crop=4, flip="random", cutout=8)

Legend: N samples, B rows of a batch, H x W pixels.

**Words.** `philox(counter, key)` with key = (seed & 0xffffffff, seed >> 32) and counter = (c0, c1, epoch,
purpose) gives four words w0..w3 of 32 bits. Products below are exact (64 bits).

| purpose | counter | use |
| --- | --- | --- |
| `AUGMENT` | (row low, row high, epoch, 0) | w0: dy, w1: dx, w2: random flip, w3: cut-out corner |
| `FIRST_FLIP` | (row low, row high, 0, 1) | w0: the flip that alternates |
| `ORDER` | (i, 0, epoch, 2) | i = 0, 1: the eight round keys of the permutation; i = 2: the shift of `block` |
| `WINDOW` | (i, window, epoch, 3) | i = 0, 1: the round keys within a window of `block` |
| 4 | | of `fastcifar.mixing` |
| 5 | | of `fastcifar.policies` |
| 6 | (position low, position high, epoch, 6) | w0, w1: the seed of a loader's `transform` |

**Crop.** dy = ((w0 * (2 crop + 1)) >> 32) - crop, and dx alike from w1. The image is flipped first, then
padded, then shifted: output pixel (y, x) is pixel (y + dy, x + dx) of the flipped image, which reaches
past its edges by NumPy's mode="reflect" (crop < H and crop < W) or by pixel value 0 (before scaling).

**Flip.** `random`: w2 >> 31. `alternating`: ((w0 of FIRST_FLIP >> 31) + epoch) & 1.

**Cut-out.** The square's corner is uniform over those that keep it inside the output:
y0 = ((w3 >> 16) * (H - cutout + 1)) >> 16 and x0 = ((w3 & 0xffff) * (W - cutout + 1)) >> 16.
Its pixels are 0.0 in the output, after scaling.

**Order.** See `permute` for `random`, `permute_blocks` for `block`.
"""

from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

__all__ = [
    "AUGMENT",
    "FIRST_FLIP",
    "MIN_BITS",
    "MIX",
    "ORDER",
    "PHILOX",
    "ROUNDS",
    "WINDOW",
    "Draws",
    "draws",
    "order_shift",
    "permute",
    "permute_blocks",
    "philox",
    "round_keys",
    "split_seed",
    "widths",
]

AUGMENT = 0
FIRST_FLIP = 1
ORDER = 2
WINDOW = 3
"""Purposes: the fourth word of the counter."""

PHILOX = (0xD2511F53, 0xCD9E8D57, 0x9E3779B9, 0xBB67AE85)
"""Multipliers M0, M1 and key increments W0, W1 (Salmon et al. 2011, section 3.3 and table 2; Random123)."""

MIX = (0x85EBCA6B, 0xC2B2AE35)
"""Multipliers of MurmurHash3's 32-bit finaliser (Appleby, fmix32)."""

ROUNDS = 8
"""Feistel rounds of the permutation."""

MIN_BITS = 6
"""Least width of the permutation's domain."""

_LOW = np.uint64(0xFFFFFFFF)
_32 = np.uint64(32)


class Draws(NamedTuple):
    """What is drawn for each row; int64[B] each."""

    dy: NDArray[np.int64]
    dx: NDArray[np.int64]
    flip: NDArray[np.int64]  # 0 or 1
    y0: NDArray[np.int64]
    x0: NDArray[np.int64]


def split_seed(seed: int) -> tuple[int, int]:
    """Philox's key: the low and the high 32 bits of a seed."""
    return seed & 0xFFFFFFFF, seed >> 32


def philox(counter: tuple[ArrayLike, ArrayLike, ArrayLike, ArrayLike], key: tuple[int, int]) -> NDArray[np.uint64]:
    """Philox4x32-10, from J. Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011, section 3.3.

    Args:
        counter: four words of 32 bits, each an integer or an integer array; they broadcast.
        key: two words of 32 bits.

    Returns:
        uint64[4, ...]: four words of 32 bits.
    """
    c0, c1, c2, c3 = np.broadcast_arrays(*(np.asarray(word, dtype=np.uint64) for word in counter))
    m0, m1 = np.uint64(PHILOX[0]), np.uint64(PHILOX[1])
    k0, k1 = key
    for _ in range(10):
        p0, p1 = c0 * m0, c2 * m1
        c0, c1, c2, c3 = (
            (p1 >> _32) ^ c1 ^ np.uint64(k0),
            p1 & _LOW,
            (p0 >> _32) ^ c3 ^ np.uint64(k1),
            p0 & _LOW,
        )
        k0, k1 = (k0 + PHILOX[2]) & 0xFFFFFFFF, (k1 + PHILOX[3]) & 0xFFFFFFFF
    return np.stack([c0, c1, c2, c3])


def draws(
    rows: ArrayLike, *, seed: int, epoch: int, height: int, width: int, crop: int, flip: str, cutout: int
) -> Draws:
    """The augmentation of each row in an epoch.

    Args:
        rows: integer[B], rows of the store, 0 to 2**63 - 1.
        seed: 0 to 2**64 - 1.
        epoch: 0 to 2**32 - 1.
        height: H.
        width: W.
        crop: largest shift in pixels.
        flip: none, random or alternating.
        cutout: side of the square in pixels, at most H and W.

    Returns:
        dy, dx in [-crop, crop]; flip in {0, 1}; y0 in [0, H - cutout], x0 in [0, W - cutout].
    """
    ids = np.asarray(rows, dtype=np.int64).astype(np.uint64)
    key = split_seed(seed)
    w0, w1, w2, w3 = philox((ids & _LOW, ids >> _32, epoch, AUGMENT), key)
    if flip == "random":
        flipped = w2 >> np.uint64(31)
    elif flip == "alternating":
        first = philox((ids & _LOW, ids >> _32, 0, FIRST_FLIP), key)[0] >> np.uint64(31)
        flipped = (first + np.uint64(epoch)) & np.uint64(1)
    else:
        flipped = np.zeros_like(ids)
    span = np.uint64(2 * crop + 1)
    return Draws(
        dy=((w0 * span) >> _32).astype(np.int64) - crop,
        dx=((w1 * span) >> _32).astype(np.int64) - crop,
        flip=flipped.astype(np.int64),
        y0=(((w3 >> np.uint64(16)) * np.uint64(height - cutout + 1)) >> np.uint64(16)).astype(np.int64),
        x0=(((w3 & np.uint64(0xFFFF)) * np.uint64(width - cutout + 1)) >> np.uint64(16)).astype(np.int64),
    )


def widths(samples: int) -> tuple[int, int]:
    """Bits of the left (upper) and the right (lower) half of the permutation's domain for `samples`."""
    bits = max((samples - 1).bit_length(), MIN_BITS)
    return bits // 2, bits - bits // 2


def round_keys(seed: int, epoch: int, window: int | None = None) -> tuple[int, ...]:
    """The eight round keys of a permutation: w0..w3 of counter 0, then of counter 1.

    Args:
        seed: 0 to 2**64 - 1.
        epoch: 0 to 2**32 - 1.
        window: whose order it is, 0 to 2**32 - 1; None: the epoch's (of samples, or of blocks).
    """
    second, purpose = (0, ORDER) if window is None else (window, WINDOW)
    words = philox((np.arange(ROUNDS // 4), second, epoch, purpose), split_seed(seed))
    return tuple(int(word) for word in words.T.ravel())


def order_shift(samples: int, seed: int, epoch: int) -> int:
    """How far the blocks of an epoch are shifted, in [0, N): (w1 2**32 + w0) mod N."""
    w0, w1, _, _ = philox((2, 0, epoch, ORDER), split_seed(seed))
    return ((int(w1) << 32) | int(w0)) % samples


def permute(positions: ArrayLike, *, samples: int, seed: int, epoch: int) -> NDArray[np.int64]:
    """The samples at `positions` of an epoch's random order: a bijection on [0, N).

    An alternating unbalanced Feistel network on the domain of the next power of two (at least 2**MIN_BITS),
    with cycle walking: the network is applied until the value is below N. A value is (left, right); with
    `mix` MurmurHash3's 32-bit finaliser, an even round i does right ^= mix(left ^ key[i]), an odd one
    left ^= mix(right ^ key[i]), each cut to the half's width.

    Args:
        positions: integer[B], each in [0, N).
        samples: N, 1 to 2**63.
        seed: 0 to 2**64 - 1.
        epoch: 0 to 2**32 - 1.

    Returns:
        int64[B], each in [0, N).
    """
    return _walk(positions, samples, round_keys(seed, epoch))


def permute_blocks(
    positions: ArrayLike, *, samples: int, seed: int, epoch: int, block_size: int, window: int
) -> NDArray[np.int64]:
    """The samples at `positions` of an epoch's `block` order: a bijection on [0, N) that reads neighbours together.

    Blocks of `block_size` neighbours are shuffled; `window` of them at a time are mixed sample by sample.
    So an epoch reads the store one window after another, and each window as whole blocks.

    1. Position p is r = p mod (block_size * window) of its window q; r is permuted within the window
       (the last may be short) by the keys of (seed, epoch, q).
    2. The place found is place o of slot k, of block_size places each. Slots that are full hold the blocks
       in the order of the epoch's permutation; a last slot that isn't, the last block.
    3. Place o of block b is sample (b * block_size + o + order_shift) mod N: which samples share a block,
       and which come last in the epoch, changes with the epoch.

    Args:
        positions: integer[B], each in [0, N).
        samples: N, 1 to 2**63; at most 2**32 windows.
        seed: 0 to 2**64 - 1.
        epoch: 0 to 2**32 - 1.
        block_size: samples in a block.
        window: blocks in a window.

    Returns:
        int64[B], each in [0, N).
    """
    at = np.array(positions, dtype=np.int64)
    span = block_size * window
    places = at // span
    mixed = np.empty_like(at)
    for q in np.unique(places):
        inside = places == q
        first = int(q) * span
        keys = round_keys(seed, epoch, int(q))
        mixed[inside] = first + _walk(at[inside] - first, min(span, samples - first), keys)
    slots, offsets = mixed // block_size, mixed % block_size
    full = slots < samples // block_size
    slots[full] = permute(slots[full], samples=max(samples // block_size, 1), seed=seed, epoch=epoch)
    return (slots * block_size + offsets + order_shift(samples, seed, epoch)) % samples


def _walk(positions: ArrayLike, samples: int, round_keys: tuple[int, ...]) -> NDArray[np.int64]:
    """`permute` with the round keys given."""
    left_bits, right_bits = widths(samples)
    left_mask, right_mask = np.uint64((1 << left_bits) - 1), np.uint64((1 << right_bits) - 1)
    keys = [np.uint64(key) for key in round_keys]
    value = np.array(positions, dtype=np.int64).astype(np.uint64)
    walking = np.ones(value.shape, dtype=bool)
    while walking.any():
        left, right = value[walking] >> np.uint64(right_bits), value[walking] & right_mask
        for i, key in enumerate(keys):
            if i % 2 == 0:
                right = right ^ (_mix(left ^ key) & right_mask)
            else:
                left = left ^ (_mix(right ^ key) & left_mask)
        value[walking] = (left << np.uint64(right_bits)) | right
        walking = value >= np.uint64(samples)
    return value.astype(np.int64)


def _mix(h: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """MurmurHash3's fmix32 of 32-bit words held in uint64."""
    h = h ^ (h >> np.uint64(16))
    h = (h * np.uint64(MIX[0])) & _LOW
    h = h ^ (h >> np.uint64(13))
    h = (h * np.uint64(MIX[1])) & _LOW
    return h ^ (h >> np.uint64(16))
