"""The compiled loops of `norms` for a net whose GELUs follow its norms, and for its 2x2 pools; see `norm_loops`.

halve_bfloat16(job)     # makes what is left of the job's parts; any number of threads may call it at once
"""

# numba infers the types of what stands here, and not Python's.
# mypy: disable-error-code="no-untyped-def, no-untyped-call, assignment"

import numpy as np

from fastcifar.kernels.cpu_words import get64, word
from fastcifar.kernels.lanes import (
    add,
    divide,
    exp,
    fma,
    load_float32,
    more,
    multiply,
    pick,
    pick_code,
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
    OUTPUT,
    PART,
    PIXELS,
    SCALE,
    SUMS,
    WIDTH,
)
from fastcifar.kernels.norm_loops import BFLOAT16, FLOAT32, ZERO, apply_of, as_it_is, back_of, share, sums_of, whole

ONE = np.float32(1)
FAR = np.float32(12.5)  # beyond it the normal distribution is 0 or 1 but for 4e-36
MINUS_HALF, DENSITY = np.float32(-0.5), np.float32(1 / np.sqrt(2 * np.pi))
# Abramowitz & Stegun 1964, 7.1.26, of erf(|z| / sqrt(2)): off by 1.5e-7 at most. Halved, for the distribution.
RECIPROCAL = np.float32(0.3275911 / np.sqrt(2))
A1, A2, A3 = np.float32(0.254829592 / 2), np.float32(-0.284496736 / 2), np.float32(1.421413741 / 2)
A4, A5 = np.float32(-1.453152027 / 2), np.float32(1.061405429 / 2)


@word
def _plain_moments(job, part, load, store, item):
    """Those of x itself, where the GELU comes after the norm."""
    sums_of(job, part, load, item, as_it_is)


@word
def _normal(z):
    """The normal distribution's probability of less than z, exp(-z**2 / 2), and z within bounds."""
    zero, one, far, near = splat(ZERO), splat(ONE), splat(FAR), splat(-FAR)
    z = pick(more(z, far), far, z)
    z = pick(more(near, z), near, z)
    positive = more(z, zero)
    t = divide(one, fma(splat(RECIPROCAL), pick(positive, z, subtract(zero, z)), one))
    bell = exp(multiply(splat(MINUS_HALF), multiply(z, z)))
    tail = fma(fma(fma(fma(splat(A5), t, splat(A4)), t, splat(A3)), t, splat(A2)), t, splat(A1))
    tail = multiply(multiply(tail, t), bell)
    return pick(positive, subtract(one, tail), tail), bell, z


@word
def _gelu(z):
    return multiply(z, _normal(z)[0])


@word
def _apply_gelu(job, part, load, store, item):
    """Write gelu(scale * x + bias)."""
    apply_of(job, part, load, store, item, as_it_is, _gelu)


@word
def _passed(x, g, a, b):
    """The gradient of a * x + b, of the gradient g of gelu(a * x + b): the derivative is P(z) + z * p(z)."""
    below, bell, z = _normal(fma(a, x, b))
    return multiply(g, fma(multiply(z, splat(DENSITY)), bell, below))


@word
def _sums_gelu(job, part, load, store, item):
    """Write the gradients g of the norm's output; and their sums and those of g * (x - centre), to float32[2, C]."""
    first, channels = part * PART, get64(job, CHANNELS)
    pixels, step = min(PART, get64(job, PIXELS) - first), channels * item
    x, gradient = get64(job, INPUT) + first * step, get64(job, GRADIENT) + first * step
    out = get64(job, OUTPUT) + first * step
    sums, centre = get64(job, SUMS) + part * 8 * channels, get64(job, CENTRE)
    scale, bias = get64(job, SCALE), get64(job, BIAS)
    for c in range(0, channels, LANES):
        m, a, b = load_float32(centre + 4 * c), load_float32(scale + 4 * c), load_float32(bias + 4 * c)
        s, t = splat(ZERO), splat(ZERO)
        at = c * item
        for _ in range(pixels):
            value = load(x + at)
            g = _passed(value, load(gradient + at), a, b)
            store(out + at, g)
            s, t = add(s, g), fma(g, subtract(value, m), t)
            at += step
        store_float32(sums + 4 * c, s)
        store_float32(sums + 4 * (channels + c), t)


@word
def _plain_finish(x, g, a, slope, offset):
    return fma(a, g, fma(slope, x, offset))


@word
def _plain_back(job, part, load, store, item):
    """The gradient of x: scale * g + slope * x + offset."""
    back_of(job, part, load, store, item, _plain_finish)


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
apply_gelu_float32, apply_gelu_bfloat16 = whole(_apply_gelu, *FLOAT32), whole(_apply_gelu, *BFLOAT16)
sums_gelu_float32, sums_gelu_bfloat16 = whole(_sums_gelu, *FLOAT32), whole(_sums_gelu, *BFLOAT16)
plain_back_float32, plain_back_bfloat16 = whole(_plain_back, *FLOAT32), whole(_plain_back, *BFLOAT16)
halve_float32, halve_bfloat16 = whole(_halve, *FLOAT32), whole(_halve, *BFLOAT16)
spread_float32, spread_bfloat16 = whole(_spread, *FLOAT32), whole(_spread, *BFLOAT16)
