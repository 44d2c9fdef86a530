"""The compiled loops of the CPU kernel: one numba function makes a batch, on any number of threads.

`work` is called once by each thread of a launch; threads share `state` and take chunks of images from
it until none is left. It holds no Python lock, allocates before it takes work and cannot fail after,
and reads and writes only the addresses it is given.

    state = np.zeros(2, dtype=np.int64)               # next image, images made
    work(parameters, a, b, state, epoch, start, size, out.ctypes.data, targets.ctypes.data, SPINS, 0)

Addresses rather than arrays: one compiled version (6.5 s, once) serves read-only maps, float32 and
16-bit outputs, and a call costs 1 us. Each image is staged once (flipped, padded and shifted, as
uint8 in the output's order), then converted in one loop that LLVM vectorises.

Legend: H x W pixels, C channels.
"""

import numpy as np
from numba import carray, njit

from fastcifar.kernels.cpu_words import (
    KEYS,
    compiled,
    copy32,
    fetch_add,
    fill_keys,
    float16_bits,
    permute,
    permute_blocks,
    philox,
    pointer,
    prefetch,
    reverse15,
    reverse16,
)
from fastcifar.kernels.rng import AUGMENT, FIRST_FLIP

__all__ = ["CHUNK", "FIELDS", "SLACK", "work"]

_STORE = ("images", "labels", "rows", "offset", "samples", "bytes", "height", "width", "channels")
_ORDERED = ("key0", "key1", "order", "block_size", "window")
_DRAWN = ("crop", "zero", "flip", "cutout")
FIELDS = (*_STORE, *_ORDERED, *_DRAWN, "dtype", "planar", "period")
"""What `parameters` holds, int64 each; `images`, `labels` and `rows` are addresses (rows: 0 for a range)."""

CHUNK = 8
"""Images a thread takes at a time: 9 us of work, so two threads end within 9 us of each other."""

SLACK = 32
"""Bytes that a run may read or write beyond its end; every staging buffer has as many on both sides."""

_LOW, _32, _31, _16, _1, _0 = (np.uint64(word) for word in (0xFFFFFFFF, 32, 31, 16, 1, 0))
_HALF = np.uint64(0xFFFF)
_AUGMENT, _FIRST_FLIP = np.uint64(AUGMENT), np.uint64(FIRST_FLIP)


@njit(nogil=True)
def _run(target, source, pixels, channels, backwards):  # type: ignore[no-untyped-def]
    """Copy a run of pixels, forwards or backwards; touches up to 31 bytes beyond either end."""
    count = pixels * channels
    if not backwards:
        for i in range(0, count, 32):
            copy32(target + i, source + i)
    elif channels == 3:  # 7 byte shuffles for 32 pixels, where a prototype spent half its time moving bytes
        last = source + count - 15
        for i in range(0, count, 15):
            reverse15(target + i, last - i)
    elif channels == 1:
        last = source + count - 16
        for i in range(0, count, 16):
            reverse16(target + i, last - i)
    else:
        to, of = carray(pointer(target), (count,), np.uint8), carray(pointer(source), (count,), np.uint8)
        for i in range(pixels):
            for c in range(channels):
                to[i * channels + c] = of[(pixels - 1 - i) * channels + c]


@njit(nogil=True)
def _zero(target, count):  # type: ignore[no-untyped-def]
    carray(pointer(target), (count,), np.uint8)[:] = 0


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
                _zero(target, row)
                continue
            source_y = -source_y if source_y < 0 else 2 * (height - 1) - source_y
        source = image + source_y * row
        # Mirrored at the source's left edge: pixels 1..k; at its right edge: W-1-k..W-2. A flip swaps them.
        side = source + channels if (dx < 0) != flip else source + row - (edge + 1) * channels
        if dx < 0:
            if zero:
                _zero(target, edge * channels)
            else:
                _run(target, side, edge, channels, not flip)
            target += edge * channels
        skipped = edge if (dx > 0) != flip else 0  # the end of the source row that the shift pushes out
        _run(target, source + skipped * channels, width - edge, channels, flip)
        if dx > 0:
            target += (width - edge) * channels
            if zero:
                _zero(target, edge * channels)
            else:
                _run(target, side, edge, channels, not flip)


# Below, arrays are made from addresses: a slice of an array that numba counts references to costs two atomic
# operations, and a fifth of the time of an image went there.


@njit(nogil=True)
def _to_bfloat16(value, out, count):  # type: ignore[no-untyped-def]
    """Round float32 to bfloat16, nearest and ties to even (no NaN)."""
    bits, to = carray(pointer(value), (count,), np.uint32), carray(pointer(out), (count,), np.uint16)
    for i in range(count):
        x = bits[i]
        to[i] = np.uint16(np.uint32(x + np.uint32(0x7FFF) + ((x >> np.uint32(16)) & np.uint32(1))) >> np.uint32(16))


@njit(nogil=True)
def _to_float16(value, small, out, count):  # type: ignore[no-untyped-def]
    """Round float32 to float16, nearest and ties to even (no NaN).

    Subnormal results come from adding 0.5, whose last bit is float16's least subnormal: the hardware's rounding
    does the work. Normal ones by adding half a unit in the last place and re-biasing the exponent by 112.
    """
    of, half_more = carray(pointer(value), (count,), np.float32), carray(pointer(small), (count,), np.float32)
    for i in range(count):
        half_more[i] = abs(of[i]) + np.float32(0.5)
    bits, small_bits = carray(pointer(value), (count,), np.uint32), carray(pointer(small), (count,), np.uint32)
    to = carray(pointer(out), (count,), np.uint16)
    for i in range(count):
        to[i] = float16_bits(bits[i], small_bits[i])


@njit(nogil=True)
def _planes(source, out, pixels, channels):  # type: ignore[no-untyped-def]
    """[H, W, C] -> [C, H, W], uint8."""
    of, to = (
        carray(pointer(source), (pixels * channels,), np.uint8),
        carray(pointer(out), (pixels * channels,), np.uint8),
    )
    if channels == 3:  # a constant stride, which LLVM turns into shuffles
        green, blue = (
            carray(pointer(out + pixels), (pixels,), np.uint8),
            carray(pointer(out + 2 * pixels), (pixels,), np.uint8),
        )
        for i in range(pixels):
            to[i], green[i], blue[i] = of[3 * i], of[3 * i + 1], of[3 * i + 2]
    else:
        for c in range(channels):
            for i in range(pixels):
                to[c * pixels + i] = of[i * channels + c]


@njit(nogil=True)
def _scale(pixels, a, b, out, count):  # type: ignore[no-untyped-def]
    """`out = a * pixels + b` in float32; numba would make uint8 * float32 a float64, hence the cast."""
    of, to = carray(pointer(pixels), (count,), np.uint8), carray(pointer(out), (count,), np.float32)
    scale, shift = carray(pointer(a), (count,), np.float32), carray(pointer(b), (count,), np.float32)
    for i in range(count):
        to[i] = scale[i] * np.float32(of[i]) + shift[i]


@njit(nogil=True)
def _cut(out, height, width, channels, y0, x0, side, planar, dtype):  # type: ignore[no-untyped-def]
    """Zero a square of an output image."""
    planes, pixel = (channels, 1) if planar else (1, channels)
    item = 4 if dtype == 0 else 2
    for plane in range(planes):
        for y in range(y0, y0 + side):
            first = ((plane * height + y) * width + x0) * pixel
            carray(pointer(out + first * item), (side * pixel * item,), np.uint8)[:] = 0


@compiled
def work(parameters, a, b, state, epoch, start, size, out, targets, spins, signal):  # type: ignore[no-untyped-def]
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
        signal: address of an int64 to add 1 to at once: what awake helpers `watch`; 0: none.

    Returns:
        Whether all `size` images were seen to be made.
    """
    if signal:
        fetch_add(signal, 1)
    images, labels, rows, offset = parameters[0], parameters[1], parameters[2], parameters[3]
    samples, total, height, width, channels = parameters[4], parameters[5], parameters[6], parameters[7], parameters[8]
    key0, key1, order = np.uint64(parameters[9]), np.uint64(parameters[10]), parameters[11]
    block_size, window, crop = parameters[12], parameters[13], parameters[14]
    zero, flipping, cutout = parameters[15] != 0, parameters[16], parameters[17]
    dtype, planar, period = parameters[18], parameters[19] != 0, parameters[20]
    elements = height * width * channels
    span, day = np.uint64(2 * crop + 1), np.uint64(epoch)
    label_of = carray(pointer(labels), (total // elements,), np.int64)
    target_of = carray(pointer(targets), (size,), np.int64)
    # One array for all that a thread stages in; it must be used at the end, see there.
    padded_size = elements + 2 * SLACK
    scratch = np.empty(8 * period + 3 * padded_size, np.uint8)
    value_at = scratch.ctypes.data
    small_at = value_at + 4 * period
    bounce_at = small_at + 4 * period + SLACK
    stage_at, planes_at = bounce_at + padded_size, bounce_at + 2 * padded_size
    a_at, b_at = a.ctypes.data, b.ctypes.data
    next_at, made_at = state.ctypes.data, state.ctypes.data + 8
    item = 4 if dtype == 0 else 2
    keys, taken = np.empty(KEYS, np.uint64), np.empty(CHUNK, np.int64)
    fill_keys(keys, order, samples, block_size, day, key0, key1)
    steps_per_factor = elements // period // a.shape[0]

    while True:
        first = fetch_add(next_at, CHUNK)
        if first >= size:
            break
        count = min(CHUNK, size - first)
        for i in range(count):
            sample = start + first + i
            if order == 1:
                sample = permute(sample, samples, keys)
            elif order == 2:
                sample = permute_blocks(sample, samples, block_size, window, day, key0, key1, keys)
            if rows:
                sample = carray(pointer(rows), (samples,), np.int64)[sample]
            taken[i] = sample + offset
        for i in range(count):
            row = taken[i]
            following = images + taken[min(i + 1, count - 1)] * elements
            low, high = np.uint64(row) & _LOW, np.uint64(row) >> _32
            target_of[first + i] = label_of[row]
            w0, w1, w2, w3 = philox(low, high, day, _AUGMENT, key0, key1)
            dy, dx = np.int64((w0 * span) >> _32) - crop, np.int64((w1 * span) >> _32) - crop
            flip = False
            if flipping == 1:
                flip = (w2 >> _31) != _0
            elif flipping == 2:
                flip = (((philox(low, high, _0, _FIRST_FLIP, key0, key1)[0] >> _31) + day) & _1) != _0

            source = images + row * elements
            if row * elements < SLACK or (row + 1) * elements + SLACK > total:  # runs would leave the array
                whole = carray(pointer(bounce_at), (elements,), np.uint8)
                whole[:] = carray(pointer(source), (elements,), np.uint8)
                source = bounce_at
            _stage(stage_at, source, height, width, channels, dy, dx, flip, zero)
            pixels = stage_at
            if planar:
                _planes(stage_at, planes_at, height * width, channels)
                pixels = planes_at
            place = out + (first + i) * elements * item
            for step in range(elements // period):
                for line in range(step * period, (step + 1) * period, 64):
                    prefetch(following + line)
                factor, to = step // steps_per_factor * period * 4, place + step * period * item
                _scale(pixels + step * period, a_at + factor, b_at + factor, to if dtype == 0 else value_at, period)
                if dtype == 1:
                    _to_bfloat16(value_at, to, period)
                elif dtype == 2:
                    _to_float16(value_at, small_at, to, period)
            if cutout:
                y0 = np.int64(((w3 >> _16) * np.uint64(height - cutout + 1)) >> _16)
                x0 = np.int64(((w3 & _HALF) * np.uint64(width - cutout + 1)) >> _16)
                _cut(place, height, width, channels, y0, x0, cutout, planar, dtype)
        fetch_add(made_at, count)

    for _ in range(spins):
        if fetch_add(made_at, 0) >= size:
            break
    # numba frees an array after its last mention, addresses not counted: hence the mention of `scratch` here.
    return fetch_add(made_at, 0) >= size and scratch.size > 0
