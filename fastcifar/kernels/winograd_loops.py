"""The compiled loops of `winograd`: from images to tiles and back, forward and backward.

    gather4(job)        # makes what is left of the job's images; any number of threads may call it at once

A job is int64 words, see `winograd_fields`; images are channels-last, [H, W, C], of 16 channels or more. Sixteen are
taken at a time, the last sixteen of an image once more where C is no multiple: they give the same again. There
is a plane for each pair of points, with a row for each tile, image by image.

Legend: a tile gives side x side outputs, its corner is the pixel (side i, side j), and the pixels that it reads begin
a row above it and a column before.

The transforms are those of Lavin & Gray 2016, along a tile's columns, then along its rows: `_before` is their B',
`_after` their A', and `_behind` and `_ahead` are these transposed, which gradients go through. Of F(4x4, 3x3) they are
theirs. A point p more makes F(3x3, 3x3) of F(2x2, 3x3), and F(5x5, 3x3) of F(4x4, 3x3): values at the others are then
those of the differences between a pixel and p times the one before.
"""

# numba infers the types of what stands here, and not Python's.
# mypy: disable-error-code="no-untyped-def, no-untyped-call, assignment"

import numpy as np

from fastcifar.kernels.cpu_words import fetch_add, get64, word
from fastcifar.kernels.lanes import (
    add,
    fma,
    load3,
    load4,
    load5,
    load6,
    load7,
    load_float32,
    room,
    splat,
    store3,
    store4,
    store5,
    store6,
    store7,
    store_float32,
    subtract,
)
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

_HALF, _TWO, _FOUR, _FIVE = np.float32(0.5), np.float32(2), np.float32(4), np.float32(5)
_EIGHT, _SIXTEEN, _STEP = np.float32(8), np.float32(16), 4 * LANES


@word
def _times(number, a, b):
    """`number` * a + b."""
    return fma(splat(number), a, b)


@word
def _before6(a, b, c, d, e, f):
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
def _after6(a, b, c, d, e, f):
    """Four values, of products at six points."""
    s, t, p, q = add(b, c), subtract(b, c), add(d, e), subtract(d, e)
    return add(a, add(s, p)), _times(_TWO, q, t), _times(_FOUR, p, s), add(_times(_EIGHT, q, t), f)


@word
def _behind6(a, b, c, d):
    """`_after6`, transposed."""
    even, odd = add(a, c), add(b, d)
    wide, far = _times(_FOUR, c, a), _times(_FOUR, d, b)
    return a, add(even, odd), subtract(even, odd), _times(_TWO, far, wide), _times(-_TWO, far, wide), d


@word
def _ahead6(a, b, c, d, e, f):
    """`_before6`, transposed."""
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
def _before7(a, b, c, d, e, f, g):
    """Seven values at the six points and at a half."""
    u, v, w = _times(-_HALF, a, b), _times(-_HALF, b, c), _times(-_HALF, c, d)
    x, y, z = _times(-_HALF, d, e), _times(-_HALF, e, f), _times(-_HALF, f, g)
    return (*_before6(u, v, w, x, y, z), _times(_FOUR, b, _times(-_FIVE, d, f)))


@word
def _after7(a, b, c, d, e, f, g):
    """Five values, of products at seven points; that at a half is sixteen times too little."""
    s, t, p, q = add(b, c), subtract(b, c), add(d, e), subtract(d, e)
    return (
        add(_times(_SIXTEEN, g, a), add(s, p)),
        _times(_EIGHT, g, _times(_TWO, q, t)),
        _times(_FOUR, g, _times(_FOUR, p, s)),
        _times(_TWO, g, _times(_EIGHT, q, t)),
        add(add(f, g), _times(_SIXTEEN, p, s)),
    )


@word
def _behind7(a, b, c, d, e):
    """`_after7`, transposed."""
    even, odd = add(a, add(c, e)), add(b, d)
    wide, far = _times(_SIXTEEN, e, _times(_FOUR, c, a)), _times(_FOUR, d, b)
    half = _times(_SIXTEEN, a, _times(_EIGHT, b, _times(_FOUR, c, _times(_TWO, d, e))))
    return a, add(even, odd), subtract(even, odd), _times(_TWO, far, wide), _times(-_TWO, far, wide), e, half


@word
def _ahead7(a, b, c, d, e, f, g):
    """`_before7`, transposed."""
    u, v, w, x, y, z = _ahead6(a, b, c, d, e, f)
    zero = splat(np.float32(0))
    return (
        _times(-_HALF, u, zero),
        _times(_FOUR, g, _times(-_HALF, v, u)),
        _times(-_HALF, w, v),
        _times(-_FIVE, g, _times(-_HALF, x, w)),
        _times(-_HALF, y, x),
        add(g, _times(-_HALF, z, y)),
        z,
    )


@word
def _before5(a, b, c, d, e):
    """Five values at five points: 0, 1, -1, infinity and 2."""
    u, v, w, x = _times(-_TWO, a, b), _times(-_TWO, b, c), _times(-_TWO, c, d), _times(-_TWO, d, e)
    return subtract(w, u), add(w, v), subtract(w, v), subtract(x, v), subtract(d, b)


@word
def _after5(a, b, c, d, e):
    """Three values, of products at five points."""
    s, t = add(b, c), subtract(b, c)
    return add(a, add(s, e)), _times(_TWO, e, t), add(_times(_FOUR, e, s), d)


@word
def _behind5(a, b, c):
    """`_after5`, transposed."""
    even = add(a, c)
    return a, add(even, b), subtract(even, b), c, _times(_FOUR, c, _times(_TWO, b, a))


@word
def _ahead5(a, b, c, d, e):
    """`_before5`, transposed."""
    v, w = subtract(subtract(b, c), d), add(a, add(b, c))
    return (
        add(a, a),
        subtract(_times(-_TWO, v, subtract(splat(np.float32(0)), a)), e),
        _times(-_TWO, w, v),
        add(_times(-_TWO, d, w), e),
        d,
    )


@word
def _pixel(job, x, row, column):
    """Sixteen channels of a pixel; zeros beyond the image."""
    height, width, step = get64(job, HEIGHT), get64(job, WIDTH), 4 * get64(job, CHANNELS)
    inside = row >= 0 and row < height and column >= 0 and column < width
    return load_float32(x + (row * width + column) * step if inside else get64(job, ZEROS))


@word
def _pixels3(job, x, row, column):
    return _pixel(job, x, row, column), _pixel(job, x, row + 1, column), _pixel(job, x, row + 2, column)


@word
def _pixels4(job, x, row, column):
    return (*_pixels3(job, x, row, column), _pixel(job, x, row + 3, column))


@word
def _pixels5(job, x, row, column):
    return (*_pixels4(job, x, row, column), _pixel(job, x, row + 4, column))


@word
def _pixels6(job, x, row, column):
    return (*_pixels5(job, x, row, column), _pixel(job, x, row + 5, column))


@word
def _pixels7(job, x, row, column):
    return (*_pixels6(job, x, row, column), _pixel(job, x, row + 6, column))


@word
def _put(at, inside, value):
    if inside:
        store_float32(at, value)


@word
def _put3(at, step, left, values, bias):
    """Write the first three of the values plus the bias to pixels in a row, of which `left` are in the image."""
    store_float32(at, add(values[0], bias))
    _put(at + step, left > 1, add(values[1], bias))
    _put(at + 2 * step, left > 2, add(values[2], bias))


@word
def _put4(at, step, left, values, bias):
    _put3(at, step, left, values, bias)
    _put(at + 3 * step, left > 3, add(values[3], bias))


@word
def _put5(at, step, left, values, bias):
    _put4(at, step, left, values, bias)
    _put(at + 4 * step, left > 4, add(values[4], bias))


@word
def _plus(at, inside, value):
    if inside:
        store_float32(at, add(load_float32(at), value))


@word
def _plus5(at, step, column, left, values):
    """Add the first five of the values to pixels in a row; the first is in `column`, and `left` from there on."""
    _plus(at, column >= 0, values[0])
    _plus(at + step, True, values[1])
    _plus(at + 2 * step, left > 2, values[2])
    _plus(at + 3 * step, left > 3, values[3])
    _plus(at + 4 * step, left > 4, values[4])


@word
def _plus6(at, step, column, left, values):
    _plus5(at, step, column, left, values)
    _plus(at + 5 * step, left > 5, values[5])


@word
def _plus7(at, step, column, left, values):
    _plus6(at, step, column, left, values)
    _plus(at + 6 * step, left > 6, values[6])


def _gather(side, transform, pixels, load, store):
    """From the pixels that a tile reads to the planes."""
    points = side + 2

    def body(job, x, i, j, out, step, bias):
        between = room()
        for n in range(points):
            values = pixels(job, x, side * i - 1, side * j - 1 + n)
            store(between + n * _STEP, points * _STEP, transform(*values))
        for n in range(points):
            store(out + n * points * step, step, transform(*load(between + n * points * _STEP, _STEP)))

    return body


def _gather_back(side, transform, pixels, load, store):
    """From the gradients of a tile's outputs to the planes."""
    points = side + 2

    def body(job, x, i, j, out, step, bias):
        between = room()
        for n in range(side):
            values = pixels(job, x, side * i, side * j + n)
            store(between + n * _STEP, side * _STEP, transform(*values))
        for n in range(points):
            store(out + n * points * step, step, transform(*load(between + n * side * _STEP, _STEP)))

    return body


def _scatter(side, transform, load, store, put):
    """From the planes to a tile's outputs."""
    points = side + 2

    def body(job, y, i, j, tile, step, bias):
        height, width, pixel = get64(job, HEIGHT), get64(job, WIDTH), 4 * get64(job, CHANNELS)
        row, column, between = side * i, side * j, room()
        for n in range(points):
            store(between + n * _STEP, points * _STEP, transform(*load(tile + n * step, points * step)))
        for n in range(min(side, height - row)):
            values = transform(*load(between + n * points * _STEP, _STEP))
            put(y + ((row + n) * width + column) * pixel, pixel, width - column, values, bias)

    return body


def _scatter_back(side, transform, load, store, plus):
    """From the planes to the gradients of the pixels that a tile reads, added to what is there."""
    points = side + 2

    def body(job, y, i, j, tile, step, bias):
        height, width, pixel = get64(job, HEIGHT), get64(job, WIDTH), 4 * get64(job, CHANNELS)
        row, column, between = side * i - 1, side * j - 1, room()
        for n in range(points):
            store(between + n * _STEP, points * _STEP, transform(*load(tile + n * step, points * step)))
        for n in range(max(0, -row), min(points, height - row)):
            values = transform(*load(between + n * points * _STEP, _STEP))
            plus(y + ((row + n) * width + column) * pixel, pixel, column, width - column, values)

    return body


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


def _whole(side, first, body):
    """The function of a job that does `body` for each tile of the images that are left, `first` before an image's."""
    body = word(body)

    def function(job):
        height, width, channels = get64(job, HEIGHT), get64(job, WIDTH), get64(job, CHANNELS)
        pitch, step = get64(job, PITCH), get64(job, STEP)
        rows, columns = (height + side - 1) // side, (width + side - 1) // side
        image = fetch_add(job + 8 * NEXT, 1)
        while image < get64(job, COUNT):
            images = get64(job, IMAGES) + image * height * width * channels * 4
            planes = get64(job, PLANES) + image * rows * columns * pitch
            for block in range((channels + LANES - 1) // LANES):
                offset = 4 * min(block * LANES, channels - LANES)
                at = first(job, images, offset)
                for i in range(rows):
                    for j in range(columns):
                        plane = planes + (i * columns + j) * pitch + offset
                        body(job, images + offset, i, j, plane, step, at)
            image = fetch_add(job + 8 * NEXT, 1)
        return 0

    return function


gather3 = _whole(3, _nothing, _gather(3, _before5, _pixels5, load5, store5))
gather4 = _whole(4, _nothing, _gather(4, _before6, _pixels6, load6, store6))
gather5 = _whole(5, _nothing, _gather(5, _before7, _pixels7, load7, store7))
gather_back3 = _whole(3, _nothing, _gather_back(3, _behind5, _pixels3, load3, store5))
gather_back4 = _whole(4, _nothing, _gather_back(4, _behind6, _pixels4, load4, store6))
gather_back5 = _whole(5, _nothing, _gather_back(5, _behind7, _pixels5, load5, store7))
scatter3 = _whole(3, _bias, _scatter(3, _after5, load5, store3, _put3))
scatter4 = _whole(4, _bias, _scatter(4, _after6, load6, store4, _put4))
scatter5 = _whole(5, _bias, _scatter(5, _after7, load7, store5, _put5))
scatter_back3 = _whole(3, _clear, _scatter_back(3, _ahead5, load5, store5, _plus5))
scatter_back4 = _whole(4, _clear, _scatter_back(4, _ahead6, load6, store6, _plus6))
scatter_back5 = _whole(5, _clear, _scatter_back(5, _ahead7, load7, store7, _plus7))
