"""The compiled loops of `norms`: ReLU, BatchNorm and max-pooling, forward and backward, each pass over the bytes once.

    moments_bfloat16(job)       # makes what is left of the job's parts; any number of threads may call it at once

A job is int64 words, see `norm_fields`; images are channels-last, [H, W, C], and C is a multiple of 16. Threads take a
part at a time, an image where windows count and else PART pixels, and sums are kept for each part, so that they do not
depend on the number of threads.

Legend: r is relu(x); an output's code is the place of its maximum in the 3x3 window, row by row.
"""

# numba infers the types of what stands here, and not Python's.
# mypy: disable-error-code="no-untyped-def, no-untyped-call, assignment"

import numpy as np

from fastcifar.kernels.cpu_words import fetch_add, get64, word
from fastcifar.kernels.lanes import (
    add,
    equal,
    fma,
    load_bfloat16,
    load_codes,
    load_float32,
    more,
    pick,
    pick_code,
    relu,
    splat,
    splat_code,
    store_bfloat16,
    store_codes,
    store_float32,
    subtract,
)
from fastcifar.kernels.norm_fields import (
    BIAS,
    CENTRE,
    CHANNELS,
    CODES,
    COUNT,
    GRADIENT,
    HEIGHT,
    INPUT,
    LANES,
    NEXT,
    OFFSET,
    OUTPUT,
    PART,
    PEAKS,
    PIXELS,
    SCALE,
    SLOPE,
    SUMS,
    WIDTH,
)

ZERO = np.float32(0)


@word
def sums_of(job, part, load, item, before):
    """Write float32[3, C]: the part's first r, k, and the sums of r - k and of its square over its pixels."""
    first, channels = part * PART, get64(job, CHANNELS)
    pixels, step = min(PART, get64(job, PIXELS) - first), channels * item
    x, sums = get64(job, INPUT) + first * step, get64(job, SUMS) + part * 12 * channels
    for c in range(0, channels, LANES):
        at = x + c * item
        k = before(load(at))
        s0 = s1 = s2 = s3 = q0 = q1 = q2 = q3 = splat(ZERO)
        whole = pixels // 4 * 4
        for _ in range(0, whole, 4):  # four sums of each: one would wait for itself
            d0, d1 = subtract(before(load(at)), k), subtract(before(load(at + step)), k)
            d2, d3 = subtract(before(load(at + 2 * step)), k), subtract(before(load(at + 3 * step)), k)
            s0, s1, s2, s3 = add(s0, d0), add(s1, d1), add(s2, d2), add(s3, d3)
            q0, q1, q2, q3 = fma(d0, d0, q0), fma(d1, d1, q1), fma(d2, d2, q2), fma(d3, d3, q3)
            at += 4 * step
        for _ in range(whole, pixels):
            d0 = subtract(before(load(at)), k)
            s0, q0 = add(s0, d0), fma(d0, d0, q0)
            at += step
        store_float32(sums + 4 * c, k)
        store_float32(sums + 4 * (channels + c), add(add(s0, s1), add(s2, s3)))
        store_float32(sums + 4 * (2 * channels + c), add(add(q0, q1), add(q2, q3)))


@word
def _moments(job, part, load, store, item):
    """The sums that mean and variance of r are made of."""
    sums_of(job, part, load, item, relu)


@word
def as_it_is(value):
    """The value."""
    return value


@word
def apply_of(job, part, load, store, item, before, after):
    """Write y = after(scale * before(x) + bias)."""
    first, channels = part * PART, get64(job, CHANNELS)
    pixels, step = min(PART, get64(job, PIXELS) - first), channels * item
    x, y = get64(job, INPUT) + first * step, get64(job, OUTPUT) + first * step
    scale, bias = get64(job, SCALE), get64(job, BIAS)
    for _ in range(pixels):
        for c in range(0, channels, LANES):
            value = fma(load_float32(scale + 4 * c), before(load(x + c * item)), load_float32(bias + 4 * c))
            store(y + c * item, after(value))
        x += step
        y += step


@word
def _apply(job, part, load, store, item):
    """Write y = scale * r + bias."""
    apply_of(job, part, load, store, item, relu, as_it_is)


@word
def _pool(job, image, load, store, item):
    """The largest y = scale * r + bias of each 3x3 window, every second pixel; beside it its r and its code."""
    height, width, channels = get64(job, HEIGHT), get64(job, WIDTH), get64(job, CHANNELS)
    rows, columns = (height + 1) // 2, (width + 1) // 2
    x = get64(job, INPUT) + image * height * width * channels * item
    first = image * rows * columns * channels
    y, peaks, codes = get64(job, OUTPUT) + first * item, get64(job, PEAKS) + first * item, get64(job, CODES) + first
    scale, bias = get64(job, SCALE), get64(job, BIAS)
    for i in range(rows):
        top, bottom = max(2 * i - 1, 0), min(2 * i + 1, height - 1)
        for j in range(columns):
            left, right = max(2 * j - 1, 0), min(2 * j + 1, width - 1)
            for c in range(0, channels, LANES):
                a, b = load_float32(scale + 4 * c), load_float32(bias + 4 * c)
                peak = relu(load(x + ((top * width + left) * channels + c) * item))
                best, code = fma(a, peak, b), splat_code(np.uint8(3 * (top - 2 * i + 1) + left - 2 * j + 1))
                total = best
                for u in range(top, bottom + 1):
                    for v in range(left, right + 1):
                        r = relu(load(x + ((u * width + v) * channels + c) * item))
                        value = fma(a, r, b)
                        better = more(value, best)
                        total = add(total, value)
                        best, peak = pick(better, value, best), pick(better, r, peak)
                        here = splat_code(np.uint8(3 * (u - 2 * i + 1) + v - 2 * j + 1))
                        code = pick_code(better, here, code)
                place = (i * columns + j) * channels + c
                store(y + place * item, pick(more(total, total), total, best))  # only a NaN is more than itself
                store(peaks + place * item, peak)
                store_codes(codes + place, code)


@word
def _sums(job, part, load, store, item):
    """Sums of g and of g * (r - centre) over a part's pixels, to float32[2, C]; g: the output's gradient."""
    first, channels = part * PART, get64(job, CHANNELS)
    pixels, step = min(PART, get64(job, PIXELS) - first), channels * item
    x, gradient = get64(job, INPUT) + first * step, get64(job, GRADIENT) + first * step
    sums, centre = get64(job, SUMS) + part * 8 * channels, get64(job, CENTRE)
    for c in range(0, channels, LANES):
        m = load_float32(centre + 4 * c)
        s0 = s1 = s2 = s3 = t0 = t1 = t2 = t3 = splat(ZERO)
        at, whole = c * item, pixels // 4 * 4
        for _ in range(0, whole, 4):
            g0, g1 = load(gradient + at), load(gradient + at + step)
            g2, g3 = load(gradient + at + 2 * step), load(gradient + at + 3 * step)
            s0, s1, s2, s3 = add(s0, g0), add(s1, g1), add(s2, g2), add(s3, g3)
            t0 = fma(g0, subtract(relu(load(x + at)), m), t0)
            t1 = fma(g1, subtract(relu(load(x + at + step)), m), t1)
            t2 = fma(g2, subtract(relu(load(x + at + 2 * step)), m), t2)
            t3 = fma(g3, subtract(relu(load(x + at + 3 * step)), m), t3)
            at += 4 * step
        for _ in range(whole, pixels):
            g0 = load(gradient + at)
            s0, t0 = add(s0, g0), fma(g0, subtract(relu(load(x + at)), m), t0)
            at += step
        store_float32(sums + 4 * c, add(add(s0, s1), add(s2, s3)))
        store_float32(sums + 4 * (channels + c), add(add(t0, t1), add(t2, t3)))


@word
def _finish(x, g, a, slope, offset):
    """The gradient of x: a * g + slope * r + offset where x is positive."""
    value = fma(a, g, fma(slope, relu(x), offset))
    zero = splat(ZERO)
    return pick(more(x, zero), value, zero)


@word
def back_of(job, part, load, store, item, finish):
    """The gradient of x, of that of the norm's output and of what `finish` makes of both."""
    first, channels = part * PART, get64(job, CHANNELS)
    pixels, step = min(PART, get64(job, PIXELS) - first), channels * item
    x, gradient = get64(job, INPUT) + first * step, get64(job, GRADIENT) + first * step
    out = get64(job, OUTPUT) + first * step
    scale, slope, offset = get64(job, SCALE), get64(job, SLOPE), get64(job, OFFSET)
    for _ in range(pixels):
        for c in range(0, channels, LANES):
            a, p, q = load_float32(scale + 4 * c), load_float32(slope + 4 * c), load_float32(offset + 4 * c)
            store(out + c * item, finish(load(x + c * item), load(gradient + c * item), a, p, q))
        x += step
        gradient += step
        out += step


@word
def _back(job, part, load, store, item):
    """The gradient of x, of the gradient of y."""
    back_of(job, part, load, store, item, _finish)


@word
def share(gradient, codes, code, load):
    """What of a window's gradient goes to the pixel at `code` of it."""
    return pick(equal(load_codes(codes), splat_code(code)), load(gradient), splat(ZERO))


@word
def _unpool(job, image, load, store, item):
    """The gradient of x, of the gradient of the pooled y.

    A pixel's row is the middle of one window, or the last of one and the first of the next; so is its column.
    """
    height, width, channels = get64(job, HEIGHT), get64(job, WIDTH), get64(job, CHANNELS)
    rows, columns = (height + 1) // 2, (width + 1) // 2
    x, out = get64(job, INPUT), get64(job, OUTPUT)
    x += image * height * width * channels * item
    out += image * height * width * channels * item
    first = image * rows * columns * channels
    gradient, codes = get64(job, GRADIENT) + first * item, get64(job, CODES) + first
    scale, slope, offset = get64(job, SCALE), get64(job, SLOPE), get64(job, OFFSET)
    below = columns * channels
    for u in range(height):
        i, row_code = u // 2, 3 * (1 + u % 2)
        two_rows = u % 2 == 1 and i + 1 < rows
        for v in range(width):
            j, code = v // 2, row_code + 1 + v % 2
            two_columns = v % 2 == 1 and j + 1 < columns
            here = (i * columns + j) * channels
            for c in range(0, channels, LANES):
                at = here + c
                g = share(gradient + at * item, codes + at, np.uint8(code), load)
                if two_columns:
                    at = here + channels + c
                    g = add(g, share(gradient + at * item, codes + at, np.uint8(code - 2), load))
                if two_rows:
                    at = here + below + c
                    g = add(g, share(gradient + at * item, codes + at, np.uint8(code - 6), load))
                if two_rows and two_columns:
                    at = here + below + channels + c
                    g = add(g, share(gradient + at * item, codes + at, np.uint8(code - 8), load))
                a, p, q = load_float32(scale + 4 * c), load_float32(slope + 4 * c), load_float32(offset + 4 * c)
                store(out + c * item, _finish(load(x + c * item), g, a, p, q))
            x += channels * item
            out += channels * item


def whole(body, load, store, item):
    """The function of a job that does `body` for the parts that are left; `item`: bytes of a value."""

    def function(job):
        part = fetch_add(job + 8 * NEXT, 1)
        while part < get64(job, COUNT):
            body(job, part, load, store, item)
            part = fetch_add(job + 8 * NEXT, 1)
        return 0

    return function


FLOAT32, BFLOAT16 = (load_float32, store_float32, 4), (load_bfloat16, store_bfloat16, 2)

moments_float32, moments_bfloat16 = whole(_moments, *FLOAT32), whole(_moments, *BFLOAT16)
apply_float32, apply_bfloat16 = whole(_apply, *FLOAT32), whole(_apply, *BFLOAT16)
pool_float32, pool_bfloat16 = whole(_pool, *FLOAT32), whole(_pool, *BFLOAT16)
sums_float32, sums_bfloat16 = whole(_sums, *FLOAT32), whole(_sums, *BFLOAT16)
back_float32, back_bfloat16 = whole(_back, *FLOAT32), whole(_back, *BFLOAT16)
unpool_float32, unpool_bfloat16 = whole(_unpool, *FLOAT32), whole(_unpool, *BFLOAT16)
