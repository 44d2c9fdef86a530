"""The compiled loops of the CPU kernel: one numba function makes a batch, on any number of threads.

`work` is called once by each thread of a launch; threads share `state` and take chunks of images from
it until none is left. It holds no Python lock, allocates before it takes work and cannot fail after,
and reads and writes only the addresses it is given.

    state = np.zeros(2, dtype=np.int64)               # next image, images made
    work(parameters, factors, state, epoch, start, size, out.ctypes.data, targets.ctypes.data, SPINS)

Addresses rather than arrays: one compiled version (2 s) serves read-only maps, float32 and 16-bit
outputs, and a call costs 1 us instead of 5. Each image is staged once (flipped, padded and shifted, as
uint8 in the output's order), then converted in one loop that LLVM vectorises.

Legend: H x W pixels, C channels.
"""

from collections.abc import Callable
from typing import Any, TypeVar

import numpy as np
from llvmlite import ir
from numba import carray, njit, types
from numba.extending import intrinsic

from fastcifar.kernels.rng import AUGMENT, FIRST_FLIP, MIX, ORDER, PHILOX, ROUNDS

__all__ = ["CHUNK", "FIELDS", "SLACK", "work"]

FIELDS = (
    *("images", "labels", "rows", "offset", "samples", "bytes", "height", "width", "channels"),
    *("key0", "key1", "random", "left_bits", "right_bits", "crop", "zero", "flip", "cutout", "dtype", "planar", "period"),
)
"""What `parameters` holds, int64 each; `images`, `labels` and `rows` are addresses (rows: 0 for a range)."""

CHUNK = 8
"""Images a thread takes at a time: 6 us of work, so two threads end within 6 us of each other."""

SLACK = 32
"""Bytes that a run may read or write beyond its end; every staging buffer has as many on both sides."""

_Function = TypeVar("_Function", bound=Callable[..., Any])

_M0, _M1, _W0, _W1 = (np.uint64(word) for word in PHILOX)
_MIX0, _MIX1 = np.uint64(MIX[0]), np.uint64(MIX[1])
_LOW, _32, _31, _16, _13, _1 = (np.uint64(word) for word in (0xFFFFFFFF, 32, 31, 16, 13, 1))
_HALF = np.uint64(0xFFFF)
_AUGMENT, _FIRST_FLIP, _ORDER, _0 = np.uint64(AUGMENT), np.uint64(FIRST_FLIP), np.uint64(ORDER), np.uint64(0)
_ROUNDS = ROUNDS


def _compiled(function: _Function) -> _Function:
    """`njit` with the machine code kept on disk where a folder for it can be written."""
    try:
        return njit(nogil=True, cache=True)(function)  # type: ignore[no-any-return]
    except RuntimeError:  # "cannot cache function: no locator available": a read-only installation and home
        return njit(nogil=True)(function)  # type: ignore[no-any-return]


def _bytes16(order: tuple[int, ...] | None, *, load: bool = True) -> Any:
    """An intrinsic (destination, source) that moves 16 bytes, in the given order."""
    vector = ir.VectorType(ir.IntType(8), 16)

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        target, source = (builder.inttoptr(address, vector.as_pointer()) for address in arguments)
        value = builder.load(source, align=1) if load else ir.Constant(vector, None)
        if order is not None:
            mask = ir.Constant(ir.VectorType(ir.IntType(32), 16), list(order))
            value = builder.shuffle_vector(value, value, mask)
        builder.store(value, target, align=1)
        return context.get_dummy_value()

    def move(typingctx: Any, target: Any, source: Any) -> Any:
        return types.void(types.int64, types.int64), generate

    return intrinsic(move)


_copy16 = _bytes16(None)
_zero16 = _bytes16(None, load=False)
_reverse16 = _bytes16(tuple(range(15, -1, -1)))  # sixteen pixels of one channel
_reverse15 = _bytes16((12, 13, 14, 9, 10, 11, 6, 7, 8, 3, 4, 5, 0, 1, 2, 15))  # five pixels of three channels


@intrinsic
def _pointer(typingctx: Any, address: Any) -> Any:
    """An address as a pointer that `carray` takes."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return builder.inttoptr(arguments[0], context.get_value_type(types.voidptr))

    return types.voidptr(types.int64), generate


@intrinsic
def _fetch_add(typingctx: Any, address: Any, amount: Any) -> Any:
    """Add to the int64 at an address, atomically; returns what it held."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        pointer = builder.inttoptr(arguments[0], ir.IntType(64).as_pointer())
        return builder.atomic_rmw("add", pointer, arguments[1], "seq_cst")

    return types.int64(types.int64, types.int64), generate


@njit(nogil=True)
def _philox(c0, c1, c2, c3, k0, k1):  # type: ignore[no-untyped-def]
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
def _permute(position, samples, keys, left_bits, right_bits):  # type: ignore[no-untyped-def]
    """`rng.permute` of one position, in uint64."""
    left_mask, right_mask = (_1 << left_bits) - _1, (_1 << right_bits) - _1
    value = position
    while True:
        left, right = value >> right_bits, value & right_mask
        for i in range(0, _ROUNDS, 2):
            right ^= _mix(left ^ keys[i]) & right_mask
            left ^= _mix(right ^ keys[i + 1]) & left_mask
        value = (left << right_bits) | right
        if value < samples:
            return value


@njit(nogil=True)
def _run(target, source, pixels, channels, backwards):  # type: ignore[no-untyped-def]
    """Copy a run of pixels, forwards or backwards; touches up to 15 bytes beyond either end."""
    count = pixels * channels
    if not backwards:
        for i in range(0, count, 16):
            _copy16(target + i, source + i)
    elif channels == 3:  # 7 byte shuffles for 32 pixels, where moving single bytes cost half of the kernel's time
        last = source + count - 15
        for i in range(0, count, 15):
            _reverse15(target + i, last - i)
    elif channels == 1:
        last = source + count - 16
        for i in range(0, count, 16):
            _reverse16(target + i, last - i)
    else:
        to, of = carray(_pointer(target), (count,), np.uint8), carray(_pointer(source), (count,), np.uint8)
        for i in range(pixels):
            for c in range(channels):
                to[i * channels + c] = of[(pixels - 1 - i) * channels + c]


@njit(nogil=True)
def _stage(stage, image, height, width, channels, dy, dx, flip, zero):  # type: ignore[no-untyped-def]
    """The flipped, padded and shifted image, as uint8[H, W, C] at address `stage`.

    A row is three runs: what the shift brings in at the left (k = -dx pixels), the row itself, and what it
    brings in at the right (k = dx pixels). Each run's excess is overwritten by the next.
    """
    row = width * channels
    if dy == 0 and dx == 0 and not flip:
        _run(stage, image, height * width, channels, False)
        return
    edge = min(abs(dx), width)
    for y in range(height):
        source_y = y + dy
        target = stage + y * row
        if source_y < 0 or source_y >= height:
            if zero:
                for i in range(0, row, 16):
                    _zero16(target + i, target)
                continue
            source_y = -source_y if source_y < 0 else 2 * (height - 1) - source_y
        source = image + source_y * row
        # Mirrored at the source's left edge: pixels 1..k; at its right edge: W-1-k..W-2. A flip swaps them.
        side = source + channels if (dx < 0) != flip else source + row - (edge + 1) * channels
        if dx < 0:
            if zero:
                for i in range(0, edge * channels, 16):
                    _zero16(target + i, target)
            else:
                _run(target, side, edge, channels, not flip)
            target += edge * channels
        skipped = edge if (dx > 0) != flip else 0  # the end of the source row that the shift pushes out
        _run(target, source + skipped * channels, width - edge, channels, flip)
        if dx > 0:
            target += (width - edge) * channels
            if zero:
                for i in range(0, edge * channels, 16):
                    _zero16(target + i, target)
            else:
                _run(target, side, edge, channels, not flip)


@njit(nogil=True)
def _to_bfloat16(value, out):  # type: ignore[no-untyped-def]
    """Round float32 to bfloat16, nearest and ties to even, as uint16 (no NaN)."""
    bits = value.view(np.uint32)
    for i in range(out.size):
        x = bits[i]
        out[i] = np.uint16(np.uint32(x + np.uint32(0x7FFF) + ((x >> np.uint32(16)) & np.uint32(1))) >> np.uint32(16))


@njit(nogil=True)
def _to_float16(value, small, out):  # type: ignore[no-untyped-def]
    """Round float32 to float16, nearest and ties to even, as uint16 (no NaN).

    Subnormal results come from adding 0.5, whose last bit is float16's least subnormal: the hardware's rounding
    does the work. Normal ones by adding half a unit in the last place and re-biasing the exponent by 112.
    """
    for i in range(out.size):
        small[i] = abs(value[i]) + np.float32(0.5)
    bits, small_bits = value.view(np.uint32), small.view(np.uint32)
    for i in range(out.size):
        x = bits[i] & np.uint32(0x7FFFFFFF)
        normal = np.uint32(x + np.uint32(0xC8000FFF) + ((x >> np.uint32(13)) & np.uint32(1))) >> np.uint32(13)
        subnormal = small_bits[i] - np.uint32(0x3F000000)
        half = subnormal if x < np.uint32(0x38800000) else normal
        half = np.uint32(0x7C00) if x >= np.uint32(0x47800000) else half
        out[i] = np.uint16(half | ((bits[i] >> np.uint32(16)) & np.uint32(0x8000)))


@njit(nogil=True)
def _planes(source, out, channels):  # type: ignore[no-untyped-def]
    """[H, W, C] -> [C, H, W], uint8."""
    count = out.size // channels
    if channels == 3:  # a constant stride, which LLVM turns into shuffles
        red, green, blue = out[:count], out[count : 2 * count], out[2 * count :]
        for i in range(count):
            red[i], green[i], blue[i] = source[3 * i], source[3 * i + 1], source[3 * i + 2]
    else:
        for c in range(channels):
            for i in range(count):
                out[c * count + i] = source[i * channels + c]


@njit(nogil=True)
def _scale(pixels, a, b, out):  # type: ignore[no-untyped-def]
    """`out = a * pixels + b` in float32; numba would make uint8 * float32 a float64, hence the cast."""
    for i in range(out.size):
        out[i] = a[i] * np.float32(pixels[i]) + b[i]


@njit(nogil=True)
def _cut(out, height, width, channels, y0, x0, side, planar):  # type: ignore[no-untyped-def]
    """Zero a square of an output image."""
    for y in range(y0, y0 + side):
        if planar:
            for c in range(channels):
                first = (c * height + y) * width + x0
                out[first : first + side] = 0
        else:
            first = (y * width + x0) * channels
            out[first : first + side * channels] = 0


@_compiled
def work(parameters, a, b, state, epoch, start, size, out, targets, spins):  # type: ignore[no-untyped-def]
    """Make a batch, together with the other threads that were given the same `state`.

    Args:
        parameters: int64[len(FIELDS)].
        a: float32[T, period], the factors of consecutive output elements; T = C where planar, else 1.
        b: float32[T, period].
        state: int64[2], zeros at first: the next image to take, and the number of images made.
        epoch: of the order and the draws.
        start: first position.
        size: images to make.
        out: address of the images.
        targets: address of the labels, int64.
        spins: how often to look for the end of the other threads' last chunks; 0: don't wait.

    Returns:
        Whether all `size` images were seen to be made.
    """
    images, labels, rows, offset = parameters[0], parameters[1], parameters[2], parameters[3]
    samples, total, height, width, channels = parameters[4], parameters[5], parameters[6], parameters[7], parameters[8]
    key0, key1, shuffled = np.uint64(parameters[9]), np.uint64(parameters[10]), parameters[11]
    left_bits, right_bits, crop = np.uint64(parameters[12]), np.uint64(parameters[13]), parameters[14]
    zero, flipping, cutout = parameters[15] != 0, parameters[16], parameters[17]
    dtype, planar, period = parameters[18], parameters[19] != 0, parameters[20]
    elements = height * width * channels
    span, day = np.uint64(2 * crop + 1), np.uint64(epoch)
    label_of = carray(_pointer(labels), (total // elements,), np.int64)
    target_of = carray(_pointer(targets), (size,), np.int64)
    bounce, stage = np.empty(elements + 2 * SLACK, np.uint8), np.empty(elements + 2 * SLACK, np.uint8)
    planes = np.empty(elements if planar else 0, np.uint8)
    value, small = np.empty(period, np.float32), np.empty(period, np.float32)
    keys, taken = np.empty(_ROUNDS, np.uint64), np.empty(CHUNK, np.int64)
    for i in range(_ROUNDS // 4):
        keys[4 * i : 4 * i + 4] = _philox(np.uint64(i), _0, day, _ORDER, key0, key1)
    steps_per_factor = elements // period // a.shape[0]

    while True:
        first = _fetch_add(state.ctypes.data, CHUNK)
        if first >= size:
            break
        count = min(CHUNK, size - first)
        for i in range(count):
            sample = start + first + i
            if shuffled:
                sample = np.int64(_permute(np.uint64(sample), np.uint64(samples), keys, left_bits, right_bits))
            if rows:
                sample = carray(_pointer(rows), (samples,), np.int64)[sample]
            taken[i] = sample + offset
        for i in range(count):
            row = taken[i]
            low, high = np.uint64(row) & _LOW, np.uint64(row) >> _32
            target_of[first + i] = label_of[row]
            w0, w1, w2, w3 = _philox(low, high, day, _AUGMENT, key0, key1)
            dy, dx = np.int64((w0 * span) >> _32) - crop, np.int64((w1 * span) >> _32) - crop
            flip = False
            if flipping == 1:
                flip = (w2 >> _31) != _0
            elif flipping == 2:
                flip = (((_philox(low, high, _0, _FIRST_FLIP, key0, key1)[0] >> _31) + day) & _1) != _0

            source = images + row * elements
            if row * elements < SLACK or (row + 1) * elements + SLACK > total:  # runs would leave the array
                bounce[SLACK : SLACK + elements] = carray(_pointer(source), (elements,), np.uint8)
                source = bounce.ctypes.data + SLACK
            _stage(stage.ctypes.data + SLACK, source, height, width, channels, dy, dx, flip, zero)
            pixels = stage[SLACK : SLACK + elements]
            if planar:
                _planes(pixels, planes, channels)
                pixels = planes

            place = (first + i) * elements
            wide = carray(_pointer(out + 4 * place), (elements,), np.float32)
            narrow = carray(_pointer(out + 2 * place), (elements,), np.uint16)
            for step in range(elements // period):
                factor, begin, end = step // steps_per_factor, step * period, (step + 1) * period
                if dtype == 0:
                    _scale(pixels[begin:end], a[factor], b[factor], wide[begin:end])
                else:
                    _scale(pixels[begin:end], a[factor], b[factor], value)
                    if dtype == 1:
                        _to_bfloat16(value, narrow[begin:end])
                    else:
                        _to_float16(value, small, narrow[begin:end])
            if cutout:
                y0 = np.int64(((w3 >> _16) * np.uint64(height - cutout + 1)) >> _16)
                x0 = np.int64(((w3 & _HALF) * np.uint64(width - cutout + 1)) >> _16)
                if dtype == 0:
                    _cut(wide, height, width, channels, y0, x0, cutout, planar)
                else:
                    _cut(narrow, height, width, channels, y0, x0, cutout, planar)
        _fetch_add(state.ctypes.data + 8, count)

    for _ in range(spins):
        if _fetch_add(state.ctypes.data + 8, 0) >= size:
            return True
    return _fetch_add(state.ctypes.data + 8, 0) >= size
