"""The compiled loops of `norms` for a net whose ReLUs follow its norms, and for its 2x2 pools; see `norm_loops`.

halve_bfloat16(job)     # makes what is left of the job's parts; any number of threads may call it at once
"""

# numba infers the types of what stands here, and not Python's.
# mypy: disable-error-code="no-untyped-def, no-untyped-call, assignment"

import numpy as np

from fastcifar.kernels.cpu_words import get64, word
from fastcifar.kernels.lanes import (
    add,
    fma,
    load_float32,
    more,
    pick,
    pick_code,
    relu,
    splat,
    splat_code,
    store_codes,
    store_float32,
    subtract,
)
from fastcifar.kernels.norm_fields import (
    BIAS,
    CENTRE,
    CHANNELS,
    CODES,
    GRADIENT,
    HEIGHT,
    INPUT,
    LANES,
    OFFSET,
    OUTPUT,
    PART,
    PIXELS,
    SCALE,
    SLOPE,
    SUMS,
    WIDTH,
)
from fastcifar.kernels.norm_loops import BFLOAT16, FLOAT32, ZERO, share, sums_of, whole


@word
def _as_it_is(value):
    return value


@word
def _plain_moments(job, part, load, store, item):
    """Those of x itself, where the ReLU comes after the norm."""
    sums_of(job, part, load, item, _as_it_is)


@word
def _apply_relu(job, part, load, store, item):
    """Write relu(scale * x + bias)."""
    first, channels = part * PART, get64(job, CHANNELS)
    pixels, step = min(PART, get64(job, PIXELS) - first), channels * item
    x, y = get64(job, INPUT) + first * step, get64(job, OUTPUT) + first * step
    scale, bias = get64(job, SCALE), get64(job, BIAS)
    for _ in range(pixels):
        for c in range(0, channels, LANES):
            store(y + c * item, relu(fma(load_float32(scale + 4 * c), load(x + c * item), load_float32(bias + 4 * c))))
        x += step
        y += step


@word
def _passed(x, g, a, b):
    """The gradient g where relu(a * x + b) lets it pass."""
    zero = splat(ZERO)
    return pick(more(fma(a, x, b), zero), g, zero)


@word
def _sums_relu(job, part, load, store, item):
    """Sums of g and of g * (x - centre) over a part's pixels, to float32[2, C]; g: what passes of y's gradient."""
    first, channels = part * PART, get64(job, CHANNELS)
    pixels, step = min(PART, get64(job, PIXELS) - first), channels * item
    x, gradient = get64(job, INPUT) + first * step, get64(job, GRADIENT) + first * step
    sums, centre = get64(job, SUMS) + part * 8 * channels, get64(job, CENTRE)
    scale, bias = get64(job, SCALE), get64(job, BIAS)
    for c in range(0, channels, LANES):
        m, a, b = load_float32(centre + 4 * c), load_float32(scale + 4 * c), load_float32(bias + 4 * c)
        s0 = s1 = t0 = t1 = splat(ZERO)
        at, whole = c * item, pixels // 2 * 2
        for _ in range(0, whole, 2):
            x0, x1 = load(x + at), load(x + at + step)
            g0, g1 = _passed(x0, load(gradient + at), a, b), _passed(x1, load(gradient + at + step), a, b)
            s0, s1 = add(s0, g0), add(s1, g1)
            t0, t1 = fma(g0, subtract(x0, m), t0), fma(g1, subtract(x1, m), t1)
            at += 2 * step
        for _ in range(whole, pixels):
            x0 = load(x + at)
            g0 = _passed(x0, load(gradient + at), a, b)
            s0, t0 = add(s0, g0), fma(g0, subtract(x0, m), t0)
        store_float32(sums + 4 * c, add(s0, s1))
        store_float32(sums + 4 * (channels + c), add(t0, t1))


@word
def _back_relu(job, part, load, store, item):
    """The gradient of x: scale * g + slope * x + offset, g being what passes of y's gradient."""
    first, channels = part * PART, get64(job, CHANNELS)
    pixels, step = min(PART, get64(job, PIXELS) - first), channels * item
    x, gradient = get64(job, INPUT) + first * step, get64(job, GRADIENT) + first * step
    out = get64(job, OUTPUT) + first * step
    scale, bias = get64(job, SCALE), get64(job, BIAS)
    slope, offset = get64(job, SLOPE), get64(job, OFFSET)
    for _ in range(pixels):
        for c in range(0, channels, LANES):
            a, b, value = load_float32(scale + 4 * c), load_float32(bias + 4 * c), load(x + c * item)
            g = _passed(value, load(gradient + c * item), a, b)
            rest = fma(load_float32(slope + 4 * c), value, load_float32(offset + 4 * c))
            store(out + c * item, fma(a, g, rest))
        x += step
        gradient += step
        out += step


@word
def _better(best, code, x, here, load):
    """The larger of `best` and the value at `x`, with its code; the first of equals; NaN where either is."""
    value = load(x)
    larger, lost = more(value, best), more(best, best)  # only a NaN is more than itself
    found, place = pick(larger, value, best), pick_code(larger, splat_code(np.uint8(here)), code)
    return pick(lost, best, found), pick_code(lost, code, place)


@word
def _halve(job, image, load, store, item):
    """The largest x of each 2x2 window, and its code, 0 to 3. An odd last row or column is in no window."""
    height, width, channels = get64(job, HEIGHT), get64(job, WIDTH), get64(job, CHANNELS)
    rows, columns = height // 2, width // 2
    x = get64(job, INPUT) + image * height * width * channels * item
    first = image * rows * columns * channels
    y, codes = get64(job, OUTPUT) + first * item, get64(job, CODES) + first
    right, below = channels * item, width * channels * item
    for i in range(rows):
        for j in range(columns):
            at = x + (2 * i * width + 2 * j) * right
            place = (i * columns + j) * channels
            for c in range(0, channels, LANES):
                here = at + c * item
                best, code = load(here), splat_code(np.uint8(0))
                best, code = _better(best, code, here + right, 1, load)
                best, code = _better(best, code, here + below, 2, load)
                best, code = _better(best, code, here + below + right, 3, load)
                store(y + (place + c) * item, best)
                store_codes(codes + place + c, code)


@word
def _spread(job, image, load, store, item):
    """The gradient of x, of the gradient of the halved: each value's to the place of its code, zero elsewhere."""
    height, width, channels = get64(job, HEIGHT), get64(job, WIDTH), get64(job, CHANNELS)
    rows, columns = height // 2, width // 2
    out = get64(job, OUTPUT) + image * height * width * channels * item
    first = image * rows * columns * channels
    gradient, codes = get64(job, GRADIENT) + first * item, get64(job, CODES) + first
    for u in range(height):
        for v in range(width):
            i, j = u // 2, v // 2
            inside = i < rows and j < columns
            place, code = (i * columns + j) * channels, np.uint8(2 * (u % 2) + v % 2)
            for c in range(0, channels, LANES):
                if inside:
                    at = place + c
                    store(out + c * item, share(gradient + at * item, codes + at, code, load))
                else:
                    store(out + c * item, splat(ZERO))
            out += channels * item


plain_moments_float32, plain_moments_bfloat16 = whole(_plain_moments, *FLOAT32), whole(_plain_moments, *BFLOAT16)
apply_relu_float32, apply_relu_bfloat16 = whole(_apply_relu, *FLOAT32), whole(_apply_relu, *BFLOAT16)
sums_relu_float32, sums_relu_bfloat16 = whole(_sums_relu, *FLOAT32), whole(_sums_relu, *BFLOAT16)
back_relu_float32, back_relu_bfloat16 = whole(_back_relu, *FLOAT32), whole(_back_relu, *BFLOAT16)
halve_float32, halve_bfloat16 = whole(_halve, *FLOAT32), whole(_halve, *BFLOAT16)
spread_float32, spread_bfloat16 = whole(_spread, *FLOAT32), whole(_spread, *BFLOAT16)
