"""The compiled loops of `winograd`: from images to tiles and back, forward and backward.

    gather_float32(job)         # makes what is left of the job's images; any number of threads may call it at once

A job is int64 words, see `winograd_fields`; images are channels-last, [H, W, C], of 16 channels or more. Sixteen are
taken at a time, the last sixteen of an image once more where C is no multiple: they give the same again. There
is a plane for each of 36 pairs of points, with a row for each tile, image by image.

Legend: a tile's corner is the pixel (4 i, 4 j), and the pixels that it reads begin a row above it and a column before.

The transforms are those of Lavin & Gray 2016, F(4x4, 3x3): `_before` is their B', `_after` their A', and `_behind` and
`_ahead` are these transposed, which gradients go through.
"""

# numba infers the types of what stands here, and not Python's.
# mypy: disable-error-code="no-untyped-def, no-untyped-call, assignment"

import numpy as np

from fastcifar.kernels.cpu_words import fetch_add, get64, word
from fastcifar.kernels.lanes import add, fma, load6, load_float32, splat, store6, store_float32, subtract
from fastcifar.kernels.norm_fields import LANES, NEXT
from fastcifar.kernels.winograd_fields import (
    BIAS,
    CHANNELS,
    COUNT,
    HEIGHT,
    IMAGES,
    PITCH,
    PLANES,
    STEP,
    WIDTH,
    ZEROS,
)

_TWO, _FOUR, _FIVE, _EIGHT = np.float32(2), np.float32(4), np.float32(5), np.float32(8)


@word
def _times(number, a, b):
    """`number` * a + b."""
    return fma(splat(number), a, b)


@word
def _before(a, b, c, d, e, f):
    """Six values at six points: 0, 1, -1, 2, -2 and infinity."""
    even, odd = _times(-_FOUR, c, e), _times(-_FOUR, b, d)
    wide, far = subtract(e, c), subtract(d, b)
    return (
        _times(_FOUR, a, _times(-_FIVE, c, e)),
        add(even, odd),
        subtract(even, odd),
        _times(_TWO, far, wide),
        _times(-_TWO, far, wide),
        _times(_FOUR, b, _times(-_FIVE, d, f)),
    )


@word
def _after(a, b, c, d, e, f):
    """Four values, of products at six points."""
    s, t, p, q = add(b, c), subtract(b, c), add(d, e), subtract(d, e)
    return add(a, add(s, p)), _times(_TWO, q, t), _times(_FOUR, p, s), add(_times(_EIGHT, q, t), f)


@word
def _behind(a, b, c, d):
    """`_after`, transposed."""
    even, odd = add(a, c), add(b, d)
    wide, far = _times(_FOUR, c, a), _times(_FOUR, d, b)
    return a, add(even, odd), subtract(even, odd), _times(_TWO, far, wide), _times(-_TWO, far, wide), d


@word
def _ahead(a, b, c, d, e, f):
    """`_before`, transposed."""
    s, t, p, q = add(b, c), subtract(b, c), add(d, e), subtract(d, e)
    zero = splat(np.float32(0))
    return (
        _times(_FOUR, a, zero),
        _times(-_TWO, q, _times(_FOUR, subtract(f, t), zero)),
        subtract(_times(-_FIVE, a, _times(-_FOUR, s, zero)), p),
        _times(_TWO, q, _times(-_FIVE, f, t)),
        add(a, add(s, p)),
        f,
    )


@word
def _pixel(job, x, row, column):
    """Sixteen channels of a pixel; zeros beyond the image."""
    height, width, step = get64(job, HEIGHT), get64(job, WIDTH), 4 * get64(job, CHANNELS)
    inside = row >= 0 and row < height and column >= 0 and column < width
    return load_float32(x + (row * width + column) * step if inside else get64(job, ZEROS))


@word
def _column6(job, x, row, column):
    return _before(
        _pixel(job, x, row, column),
        _pixel(job, x, row + 1, column),
        _pixel(job, x, row + 2, column),
        _pixel(job, x, row + 3, column),
        _pixel(job, x, row + 4, column),
        _pixel(job, x, row + 5, column),
    )


@word
def _column4(job, x, row, column):
    return _behind(
        _pixel(job, x, row, column),
        _pixel(job, x, row + 1, column),
        _pixel(job, x, row + 2, column),
        _pixel(job, x, row + 3, column),
    )


@word
def _gather(job, x, i, j, out, step, bias):
    row, column = 4 * i - 1, 4 * j - 1
    a, b, c = _column6(job, x, row, column), _column6(job, x, row, column + 1), _column6(job, x, row, column + 2)
    d, e, f = _column6(job, x, row, column + 3), _column6(job, x, row, column + 4), _column6(job, x, row, column + 5)
    store6(out, step, _before(a[0], b[0], c[0], d[0], e[0], f[0]))
    store6(out + 6 * step, step, _before(a[1], b[1], c[1], d[1], e[1], f[1]))
    store6(out + 12 * step, step, _before(a[2], b[2], c[2], d[2], e[2], f[2]))
    store6(out + 18 * step, step, _before(a[3], b[3], c[3], d[3], e[3], f[3]))
    store6(out + 24 * step, step, _before(a[4], b[4], c[4], d[4], e[4], f[4]))
    store6(out + 30 * step, step, _before(a[5], b[5], c[5], d[5], e[5], f[5]))


@word
def _gather_back(job, x, i, j, out, step, bias):
    row, column = 4 * i, 4 * j
    a, b = _column4(job, x, row, column), _column4(job, x, row, column + 1)
    c, d = _column4(job, x, row, column + 2), _column4(job, x, row, column + 3)
    store6(out, step, _behind(a[0], b[0], c[0], d[0]))
    store6(out + 6 * step, step, _behind(a[1], b[1], c[1], d[1]))
    store6(out + 12 * step, step, _behind(a[2], b[2], c[2], d[2]))
    store6(out + 18 * step, step, _behind(a[3], b[3], c[3], d[3]))
    store6(out + 24 * step, step, _behind(a[4], b[4], c[4], d[4]))
    store6(out + 30 * step, step, _behind(a[5], b[5], c[5], d[5]))


@word
def _put4(job, y, row, column, values, bias):
    height, width, step = get64(job, HEIGHT), get64(job, WIDTH), 4 * get64(job, CHANNELS)
    if row < height:
        at = y + (row * width + column) * step
        store_float32(at, add(values[0], bias))
        if column + 1 < width:
            store_float32(at + step, add(values[1], bias))
        if column + 2 < width:
            store_float32(at + 2 * step, add(values[2], bias))
        if column + 3 < width:
            store_float32(at + 3 * step, add(values[3], bias))


@word
def _scatter(job, y, i, j, tile, step, bias):
    row, column = 4 * i, 4 * j
    a, b, c = load6(tile, 6 * step), load6(tile + step, 6 * step), load6(tile + 2 * step, 6 * step)
    d, e, f = load6(tile + 3 * step, 6 * step), load6(tile + 4 * step, 6 * step), load6(tile + 5 * step, 6 * step)
    a, b, c = _after(*a), _after(*b), _after(*c)
    d, e, f = _after(*d), _after(*e), _after(*f)
    _put4(job, y, row, column, _after(a[0], b[0], c[0], d[0], e[0], f[0]), bias)
    _put4(job, y, row + 1, column, _after(a[1], b[1], c[1], d[1], e[1], f[1]), bias)
    _put4(job, y, row + 2, column, _after(a[2], b[2], c[2], d[2], e[2], f[2]), bias)
    _put4(job, y, row + 3, column, _after(a[3], b[3], c[3], d[3], e[3], f[3]), bias)


@word
def _plus(at, inside, value):
    if inside:
        store_float32(at, add(load_float32(at), value))


@word
def _plus6(job, y, row, column, values):
    height, width, step = get64(job, HEIGHT), get64(job, WIDTH), 4 * get64(job, CHANNELS)
    if row >= 0 and row < height:
        at = y + (row * width + column) * step
        _plus(at, column >= 0, values[0])
        store_float32(at + step, add(load_float32(at + step), values[1]))
        _plus(at + 2 * step, column + 2 < width, values[2])
        _plus(at + 3 * step, column + 3 < width, values[3])
        _plus(at + 4 * step, column + 4 < width, values[4])
        _plus(at + 5 * step, column + 5 < width, values[5])


@word
def _scatter_back(job, y, i, j, tile, step, bias):
    row, column = 4 * i - 1, 4 * j - 1
    a, b, c = load6(tile, 6 * step), load6(tile + step, 6 * step), load6(tile + 2 * step, 6 * step)
    d, e, f = load6(tile + 3 * step, 6 * step), load6(tile + 4 * step, 6 * step), load6(tile + 5 * step, 6 * step)
    a, b, c = _ahead(*a), _ahead(*b), _ahead(*c)
    d, e, f = _ahead(*d), _ahead(*e), _ahead(*f)
    _plus6(job, y, row, column, _ahead(a[0], b[0], c[0], d[0], e[0], f[0]))
    _plus6(job, y, row + 1, column, _ahead(a[1], b[1], c[1], d[1], e[1], f[1]))
    _plus6(job, y, row + 2, column, _ahead(a[2], b[2], c[2], d[2], e[2], f[2]))
    _plus6(job, y, row + 3, column, _ahead(a[3], b[3], c[3], d[3], e[3], f[3]))
    _plus6(job, y, row + 4, column, _ahead(a[4], b[4], c[4], d[4], e[4], f[4]))
    _plus6(job, y, row + 5, column, _ahead(a[5], b[5], c[5], d[5], e[5], f[5]))


@word
def _nothing(job, images, offset):
    return 0


@word
def _clear(job, images, offset):
    """Zeros to sixteen channels of an image."""
    step = 4 * get64(job, CHANNELS)
    for pixel in range(get64(job, HEIGHT) * get64(job, WIDTH)):
        store_float32(images + pixel * step + offset, splat(np.float32(0)))
    return 0


@word
def _bias(job, images, offset):
    return load_float32(get64(job, BIAS) + offset)


def _whole(first, body):
    """The function of a job that does `body` for each tile of the images that are left, `first` before an image's."""

    def function(job):
        height, width, channels = get64(job, HEIGHT), get64(job, WIDTH), get64(job, CHANNELS)
        rows, columns, pitch, step = (height + 3) // 4, (width + 3) // 4, get64(job, PITCH), get64(job, STEP)
        image = fetch_add(job + 8 * NEXT, 1)
        while image < get64(job, COUNT):
            images = get64(job, IMAGES) + image * height * width * channels * 4
            planes = get64(job, PLANES) + image * rows * columns * pitch
            for block in range((channels + LANES - 1) // LANES):
                offset = 4 * min(block * LANES, channels - LANES)
                bias = first(job, images, offset)
                for i in range(rows):
                    for j in range(columns):
                        plane = planes + (i * columns + j) * pitch + offset
                        body(job, images + offset, i, j, plane, step, bias)
            image = fetch_add(job + 8 * NEXT, 1)
        return 0

    return function


gather, gather_back = _whole(_nothing, _gather), _whole(_nothing, _gather_back)
scatter, scatter_back = _whole(_bias, _scatter), _whole(_clear, _scatter_back)
