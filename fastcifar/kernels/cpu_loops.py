"""The compiled loops of the CPU kernel: numba turns them into machine code, which `machine` keeps.

Threads that make the same job share its state and take chunks of images from it until none is left (see `cpu_jobs`). No
function here holds a Python lock, allocates or can fail; each reads and writes only the addresses it is given.

    make(job)    # make the job's batch; see `cpu_fields` for what a job is

Addresses rather than arrays: one version serves read-only maps, float32 and 16-bit outputs, is called
in 1 us, and needs nothing of numba's when it is loaded. Each image is staged once (flipped, padded and
shifted, as uint8 in the output's order), then converted in one loop that LLVM vectorises.

Legend: H x W pixels, C channels.
"""

# numba infers the types of what stands here, and not Python's.
# mypy: disable-error-code="no-untyped-def, no-untyped-call, assignment"

import numpy as np

from fastcifar.kernels.cpu_fields import CAME, CHUNK, KEYS, MADE, NEXT, SCRATCH, SLACK
from fastcifar.kernels.cpu_random import fill_keys, permute, permute_blocks, philox
from fastcifar.kernels.cpu_words import (
    bfloat16_bits,
    copy32,
    fetch_add,
    float16_bits,
    get8,
    get64,
    get_float,
    prefetch,
    put8,
    put16,
    put64,
    put_float,
    reverse15,
    reverse16,
    scaled,
    stream8,
    stream16_bfloat16,
    stream16_float16,
    word,
)
from fastcifar.kernels.rng import AUGMENT, FIRST_FLIP

__all__ = ["make", "order_rows", "touch"]

_LOW, _32, _31, _16, _1, _0 = (np.uint64(x) for x in (0xFFFFFFFF, 32, 31, 16, 1, 0))
_HALF = np.uint64(0xFFFF)
_AUGMENT, _FIRST_FLIP = np.uint64(AUGMENT), np.uint64(FIRST_FLIP)
# Images whose lines are asked for before their turn. With 1 an image of 16x16 took 1.7 times as long among a million as
# among 10,000; with 2, about as long.
_AHEAD = 2


@word
def _run(target, source, pixels, channels, backwards):
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
        for i in range(pixels):
            for c in range(channels):
                put8(target, i * channels + c, get8(source, (pixels - 1 - i) * channels + c))


@word
def _zero(target, count):
    for i in range(count):
        put8(target, i, np.uint8(0))


@word
def _stage(stage, image, height, width, channels, dy, dx, flip, zero):
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


@word
def _planes(source, out, pixels, channels):
    """[H, W, C] -> [C, H, W], uint8."""
    if channels == 3:  # a constant stride, which LLVM turns into shuffles
        for i in range(pixels):
            put8(out, i, get8(source, 3 * i))
            put8(out + pixels, i, get8(source, 3 * i + 1))
            put8(out + 2 * pixels, i, get8(source, 3 * i + 2))
    else:
        for c in range(channels):
            for i in range(pixels):
                put8(out, c * pixels + i, get8(source, i * channels + c))


@word
def _scale(pixels, a, b, out, count, dtype, past_cache):
    """`out = a * pixels + b` in float32, rounded once."""
    if past_cache:
        if dtype == 0:
            for i in range(0, count, 8):
                stream8(out + 4 * i, a + 4 * i, pixels + i, b + 4 * i)
        elif dtype == 1:
            for i in range(0, count, 16):
                stream16_bfloat16(out + 2 * i, a + 4 * i, pixels + i, b + 4 * i)
        else:
            for i in range(0, count, 16):
                stream16_float16(out + 2 * i, a + 4 * i, pixels + i, b + 4 * i)
    elif dtype == 0:
        for i in range(count):
            put_float(out, i, scaled(get_float(a, i), get8(pixels, i), get_float(b, i)))
    elif dtype == 1:
        for i in range(count):
            put16(out, i, bfloat16_bits(scaled(get_float(a, i), get8(pixels, i), get_float(b, i))))
    else:
        for i in range(count):
            put16(out, i, float16_bits(scaled(get_float(a, i), get8(pixels, i), get_float(b, i))))


@word
def _cut(out, height, width, channels, y0, x0, side, planar, item):
    """Zero a square of an output image, whose elements have `item` bytes."""
    planes, pixel = (channels, 1) if planar else (1, channels)
    for plane in range(planes):
        for y in range(y0, y0 + side):
            first = ((plane * height + y) * width + x0) * pixel
            _zero(out + first * item, side * pixel * item)


@word
def _row(p, position, day, keys):
    """The store's row at a position of an epoch's order; `p`: the parameters' address."""
    rows, offset, samples, order = get64(p, 2), get64(p, 3), get64(p, 4), get64(p, 11)
    if order == 1:
        position = permute(position, samples, keys)
    elif order == 2:
        key0, key1 = np.uint64(get64(p, 9)), np.uint64(get64(p, 10))
        position = permute_blocks(position, samples, get64(p, 12), get64(p, 13), day, key0, key1, keys)
    if rows:
        position = get64(rows, position)
    return position + offset


@word
def _take(p, position, count, day, keys, images, labels, elements, taken):
    """Write the rows at `count` positions to `taken` and ask for their labels and for the images' first and last lines.

    An image's page is seldom among those whose places in memory the processor knows, and it waits where such a page is
    asked for. Asked for one after another with nothing between, they share the wait: ten million images of 16x16 then
    cost 1.2 times what 10,000 do, and 1.45 times where each is asked for when its row is known.
    """
    for i in range(count):
        put64(taken, i, _row(p, position + i, day, keys))
    for i in range(count):
        image = images + get64(taken, i) * elements
        prefetch(image)
        prefetch(image + elements - 1)
    for i in range(count):
        prefetch(labels + 8 * get64(taken, i))


@word
def make(job):
    """Take chunks of a job's batch and make them until none is left; each is taken while the last is being made."""
    slot = fetch_add(job + 8 * CAME, 1)
    p, slots, epoch, start, size = get64(job, 0), get64(job, 1), get64(job, 2), get64(job, 3), get64(job, 4)
    out, targets, scratch = get64(job, 5), get64(job, 6), job + 8 * SCRATCH
    if slot >= slots:
        return
    images, labels, samples, total = get64(p, 0), get64(p, 1), get64(p, 4), get64(p, 5)
    height, width, channels = get64(p, 6), get64(p, 7), get64(p, 8)
    key0, key1, crop, zero = np.uint64(get64(p, 9)), np.uint64(get64(p, 10)), get64(p, 14), get64(p, 15) != 0
    flipping, cutout, dtype, planar = get64(p, 16), get64(p, 17), get64(p, 18), get64(p, 19) != 0
    period, a, b, cached = get64(p, 20), get64(p, 21), get64(p, 22), get64(p, 23)
    elements = height * width * channels
    span, day = np.uint64(2 * crop + 1), np.uint64(epoch)
    padded_size = (elements + 2 * SLACK + 7) // 8 * 8
    keys = scratch + slot * (3 * padded_size + 8 * (KEYS + 2 * CHUNK))
    taken = keys + 8 * KEYS
    bounce = taken + 16 * CHUNK + SLACK
    stage, planes = bounce + padded_size, bounce + 2 * padded_size
    item = 4 if dtype == 0 else 2
    fill_keys(keys, get64(p, 11), samples, get64(p, 12), day, key0, key1)
    past_cache = size * elements * item > cached and period * item % 32 == 0 and out % 32 == 0
    steps_per_factor = elements // period // (channels if planar else 1)

    first = fetch_add(job + 8 * NEXT, CHUNK)
    count = max(min(CHUNK, size - first), 0)
    _take(p, start + first, count, day, keys, images, labels, elements, taken)
    for i in range(min(_AHEAD, count)):
        for line in range(64, elements, 64):
            prefetch(images + get64(taken, i) * elements + line)
    while count > 0:
        second, more = first, 0
        for i in range(count):
            if i == max(count - _AHEAD, 0):
                second = fetch_add(job + 8 * NEXT, CHUNK)
                more = max(min(CHUNK, size - second), 0)
                _take(p, start + second, more, day, keys, images, labels, elements, taken + 8 * count)
            row = get64(taken, i)
            following = images + get64(taken, min(i + _AHEAD, count + more - 1)) * elements
            low, high = np.uint64(row) & _LOW, np.uint64(row) >> _32
            put64(targets, first + i, get64(labels, row))
            w0, w1, w2, w3 = philox(low, high, day, _AUGMENT, key0, key1)
            dy, dx = np.int64((w0 * span) >> _32) - crop, np.int64((w1 * span) >> _32) - crop
            flip = False
            if flipping == 1:
                flip = (w2 >> _31) != _0
            elif flipping == 2:
                flip = (((philox(low, high, _0, _FIRST_FLIP, key0, key1)[0] >> _31) + day) & _1) != _0

            source = images + row * elements
            if row * elements < SLACK or (row + 1) * elements + SLACK > total:  # runs would leave the array
                for k in range(elements):
                    put8(bounce, k, get8(source, k))
                source = bounce
            _stage(stage, source, height, width, channels, dy, dx, flip, zero)
            pixels = stage
            if planar:
                _planes(stage, planes, height * width, channels)
                pixels = planes
            place = out + (first + i) * elements * item
            for step in range(elements // period):
                for line in range(step * period, (step + 1) * period, 64):
                    prefetch(following + line)
                factor, to = step // steps_per_factor * period * 4, place + step * period * item
                _scale(pixels + step * period, a + factor, b + factor, to, period, dtype, past_cache)
            if cutout:
                y0 = np.int64(((w3 >> _16) * np.uint64(height - cutout + 1)) >> _16)
                x0 = np.int64(((w3 & _HALF) * np.uint64(width - cutout + 1)) >> _16)
                _cut(place, height, width, channels, y0, x0, cutout, planar, item)
        fetch_add(job + 8 * MADE, count)
        for i in range(more):
            put64(taken, i, get64(taken, count + i))
        first, count = second, more


def order_rows(parameters, epoch, start, size, out):
    """Write the store's rows at positions start to start + size - 1 of an epoch to int64[KEYS + size] at `out`.

    Its first KEYS words are for the keys. Returns 0.
    """
    p, day = parameters, np.uint64(epoch)
    fill_keys(out, get64(p, 11), get64(p, 4), get64(p, 12), day, np.uint64(get64(p, 9)), np.uint64(get64(p, 10)))
    for i in range(size):
        put64(out, KEYS + i, _row(p, start + i, day, out))
    return 0


def touch(images, rows, count, elements):
    """Read one byte of each page of the images at int64[count] `rows` (an address), so that they are in memory.

    Returns a sum of what it read.
    """
    seen = 0
    for i in range(count):
        image = images + get64(rows, i) * elements
        for k in range(0, elements, 4096):
            seen += np.int64(get8(image, k))
        seen += np.int64(get8(image, elements - 1))
    return seen
