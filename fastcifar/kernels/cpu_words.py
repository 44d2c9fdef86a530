"""Words for the CPU kernel: the random ones, and the few instructions numba has no word for, as LLVM writes them.

    reverse15(target, source)            # five RGB pixels, last first, in one byte shuffle
    first = fetch_add(counter, 8)        # atomically, between threads

    w0, w1, w2, w3 = philox(c0, c1, c2, c3, k0, k1)

All but the random words take addresses (int64) and touch only what these point at. LLVM lowers them on
any processor. numba's cache looks only at the file of the function it keeps: after a change here, touch
`cpu_loops.py` as well.
"""

from collections.abc import Callable
from typing import Any, TypeVar

import numpy as np
from llvmlite import ir
from numba import njit, types
from numba.core import cgutils
from numba.extending import intrinsic

from fastcifar.kernels.rng import MIN_BITS, MIX, ORDER, PHILOX, ROUNDS, WINDOW

__all__ = [
    "KEYS",
    "compiled",
    "copy32",
    "fetch_add",
    "fill_keys",
    "float16_bits",
    "permute",
    "permute_blocks",
    "philox",
    "pointer",
    "prefetch",
    "reverse15",
    "reverse16",
    "watch",
]

_Function = TypeVar("_Function", bound=Callable[..., Any])

_M0, _M1, _W0, _W1 = (np.uint64(word) for word in PHILOX)
_MIX0, _MIX1 = np.uint64(MIX[0]), np.uint64(MIX[1])
_LOW, _32, _16, _13, _2, _1, _0 = (np.uint64(word) for word in (0xFFFFFFFF, 32, 16, 13, 2, 1, 0))
_ORDER, _WINDOW, _MIN_BITS = np.uint64(ORDER), np.uint64(WINDOW), MIN_BITS

_EACH = ROUNDS + 2
KEYS = 2 * _EACH + 2
"""Words that `fill_keys` writes."""


def compiled(function: _Function) -> _Function:
    """`njit` with the machine code kept on disk where a folder for it can be written."""
    try:
        return njit(nogil=True, cache=True)(function)  # type: ignore[no-any-return]
    except RuntimeError:  # "cannot cache function: no locator available": a read-only installation and home
        return njit(nogil=True)(function)  # type: ignore[no-any-return]


def _mover(order: tuple[int, ...]) -> Any:
    """An intrinsic (destination, source) that moves as many bytes as `order` has, in that order."""
    vector = ir.VectorType(ir.IntType(8), len(order))

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        target, source = (builder.inttoptr(address, vector.as_pointer()) for address in arguments)
        value = builder.load(source, align=1)
        mask = ir.Constant(ir.VectorType(ir.IntType(32), len(order)), list(order))
        builder.store(builder.shuffle_vector(value, value, mask), target, align=1)
        return context.get_dummy_value()

    def move(typingctx: Any, target: Any, source: Any) -> Any:
        return types.void(types.int64, types.int64), generate

    return intrinsic(move)


copy32 = _mover(tuple(range(32)))
reverse16 = _mover(tuple(range(15, -1, -1)))  # sixteen pixels of one channel
reverse15 = _mover((12, 13, 14, 9, 10, 11, 6, 7, 8, 3, 4, 5, 0, 1, 2, 15))  # five pixels of three channels


@intrinsic  # type: ignore[untyped-decorator]
def pointer(typingctx: Any, address: Any) -> Any:
    """An address as a pointer that `carray` takes."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return builder.inttoptr(arguments[0], context.get_value_type(types.voidptr))

    return types.voidptr(types.int64), generate


@intrinsic  # type: ignore[untyped-decorator]
def float16_bits(typingctx: Any, bits: Any, small: Any) -> Any:
    """See `_to_float16`. In LLVM's words because numba computes in 64 bits, which cost 0.9 us an image."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        x, subnormal = arguments
        word = ir.IntType(32)
        size = builder.and_(x, word(0x7FFFFFFF))
        odd = builder.and_(builder.lshr(size, word(13)), word(1))
        normal = builder.lshr(builder.add(builder.add(size, word(0xC8000FFF)), odd), word(13))
        half = builder.select(
            builder.icmp_signed("<", size, word(0x38800000)), builder.sub(subnormal, word(0x3F000000)), normal
        )
        half = builder.select(builder.icmp_signed("<", size, word(0x47800000)), half, word(0x7C00))
        sign = builder.and_(builder.lshr(x, word(16)), word(0x8000))
        return builder.trunc(builder.or_(half, sign), ir.IntType(16))

    return types.uint16(types.uint32, types.uint32), generate


@intrinsic  # type: ignore[untyped-decorator]
def prefetch(typingctx: Any, address: Any) -> Any:
    """Ask for the cache line of an address; harmless at any address."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        byte, flag = ir.IntType(8).as_pointer(), ir.IntType(32)
        kind = ir.FunctionType(ir.VoidType(), [byte, flag, flag, flag])
        function = cgutils.get_or_insert_function(builder.module, kind, "llvm.prefetch.p0")
        builder.call(function, [builder.inttoptr(arguments[0], byte), flag(0), flag(3), flag(1)])
        return context.get_dummy_value()

    return types.void(types.int64), generate


@intrinsic  # type: ignore[untyped-decorator]
def fetch_add(typingctx: Any, address: Any, amount: Any) -> Any:
    """Add to the int64 at an address, atomically; returns what it held."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        pointer = builder.inttoptr(arguments[0], ir.IntType(64).as_pointer())
        return builder.atomic_rmw("add", pointer, arguments[1], "seq_cst")

    return types.int64(types.int64, types.int64), generate


@njit(nogil=True)
def philox(c0, c1, c2, c3, k0, k1):  # type: ignore[no-untyped-def]
    """`rng.philox` of one counter, in uint64."""
    for _ in range(10):
        p0, p1 = c0 * _M0, c2 * _M1
        c0, c1, c2, c3 = (p1 >> _32) ^ c1 ^ k0, p1 & _LOW, (p0 >> _32) ^ c3 ^ k1, p0 & _LOW
        k0, k1 = (k0 + _W0) & _LOW, (k1 + _W1) & _LOW
    return c0, c1, c2, c3


@njit(nogil=True)
def _mix(h):  # type: ignore[no-untyped-def]
    h ^= h >> _16
    h = (h * _MIX0) & _LOW
    h ^= h >> _13
    h = (h * _MIX1) & _LOW
    return h ^ (h >> _16)


@njit(nogil=True)
def _widths(samples):  # type: ignore[no-untyped-def]
    """`rng.widths`, the right one first (it is never smaller)."""
    bits = _MIN_BITS
    while bits < 63 and (samples - 1) >> bits:
        bits += 1
    return bits - bits // 2, bits // 2


@njit(nogil=True)
def permute(position, samples, keys):  # type: ignore[no-untyped-def]
    """`rng.permute` of one position, with the round keys and, behind them, the widths."""
    right_bits, left_bits = keys[ROUNDS], keys[ROUNDS + 1]
    left_mask, right_mask = (_1 << left_bits) - _1, (_1 << right_bits) - _1
    value, limit = np.uint64(position), np.uint64(samples)
    while True:
        left, right = value >> right_bits, value & right_mask
        for i in range(0, ROUNDS, 2):
            right ^= _mix(left ^ keys[i]) & right_mask
            left ^= _mix(right ^ keys[i + 1]) & left_mask
        value = (left << right_bits) | right
        if value < limit:
            return np.int64(value)


@njit(nogil=True)
def _fill(keys, samples, second, day, purpose, key0, key1):  # type: ignore[no-untyped-def]
    for i in range(ROUNDS // 4):
        keys[4 * i : 4 * i + 4] = philox(np.uint64(i), second, day, purpose, key0, key1)
    right_bits, left_bits = _widths(samples)
    keys[ROUNDS], keys[ROUNDS + 1] = np.uint64(right_bits), np.uint64(left_bits)


@njit(nogil=True)
def fill_keys(keys, order, samples, block_size, day, key0, key1):  # type: ignore[no-untyped-def]
    """Write what an epoch's order needs to `keys`, uint64[KEYS]: see `permute_blocks`."""
    _fill(keys, samples if order == 1 else max(samples // block_size, 1), _0, day, _ORDER, key0, key1)
    if order == 2:
        w0, w1, _, _ = philox(_2, _0, day, _ORDER, key0, key1)
        keys[2 * _EACH] = ((w1 << _32) | w0) % np.uint64(samples)
        keys[2 * _EACH + 1] = ~_0  # no window yet


@njit(nogil=True)
def permute_blocks(position, samples, block_size, window, day, key0, key1, keys):  # type: ignore[no-untyped-def]
    """`rng.permute_blocks` of one position.

    `keys` holds the epoch's round keys and widths, those of the window of the last position asked for,
    the epoch's shift, and which window that was.
    """
    span = block_size * window
    q = position // span
    first = q * span
    length = min(span, samples - first)
    own = keys[_EACH : 2 * _EACH]
    if keys[2 * _EACH + 1] != np.uint64(q):
        _fill(own, length, np.uint64(q), day, _WINDOW, key0, key1)
        keys[2 * _EACH + 1] = np.uint64(q)
    place = first + permute(position - first, length, own)
    slot, full = place // block_size, samples // block_size
    if slot < full:
        slot = permute(slot, full, keys)
    return np.int64((np.uint64(slot * block_size + place % block_size) + keys[2 * _EACH]) % np.uint64(samples))


@compiled
def watch(signal, seen, spins):  # type: ignore[no-untyped-def]
    """Look `spins` times whether the int64 at an address is still `seen`; returns what it is."""
    for _ in range(spins):
        if fetch_add(signal, 0) != seen:
            break
    return fetch_add(signal, 0)
