"""The compiled loops of `winograd`: from images to tiles and back, forward and backward.

    gather4(job)        # makes what is left of the job's images; any number of threads may call it at once

A job is int64 words, see `winograd_fields`; images are channels-last, [H, W, C], of 16 channels or more. Sixteen are
taken at a time, the last sixteen of an image once more where C is no multiple: they give the same again. There
is a plane for each pair of points, with a row for each tile, image by image.

Legend: a tile gives side x side outputs, its corner is the pixel (side i, side j), and the pixels that it reads begin
a row above it and a column before.

A tile is transformed along its columns, then along its rows; see `winograd_transforms`.
"""

# numba infers the types of what stands here, and not Python's.
# mypy: disable-error-code="no-untyped-def, no-untyped-call, assignment"

import numpy as np

from fastcifar.kernels.cpu_words import fetch_add, get64, word
from fastcifar.kernels.lanes import (
    add,
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
from fastcifar.kernels.winograd_transforms import (
    after5,
    after6,
    after7,
    ahead5,
    ahead6,
    ahead7,
    before5,
    before6,
    before7,
    behind5,
    behind6,
    behind7,
)

_STEP = 4 * LANES


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
def _write5(out, step, row, values):
    store5(out + row * 5 * step, step, values)


@word
def _write6(out, step, row, values):
    store6(out + row * 6 * step, step, values)


@word
def _write7(out, step, row, values):
    store7(out + row * 7 * step, step, values)


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


def gathering(side, reads, transform, pixels, load, store, write):
    """To the planes, from the `reads` pixels a side that a tile reads, or from the gradients of its `side` outputs.

    write: the word that puts what is at a row of points where `out` and `step` say.
    """
    points, margin = side + 2, (reads - side) // 2

    def body(job, x, i, j, out, step, bias):
        between = room()
        for n in range(reads):
            values = pixels(job, x, side * i - margin, side * j - margin + n)
            store(between + n * _STEP, reads * _STEP, transform(*values))
        for n in range(points):
            write(out, step, n, transform(*load(between + n * reads * _STEP, _STEP)))

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


# What `gathering` takes, for tiles of each side: forward, and back.
FORWARD = {
    3: (5, before5, _pixels5, load5, store5),
    4: (6, before6, _pixels6, load6, store6),
    5: (7, before7, _pixels7, load7, store7),
}
BACK = {
    3: (3, behind5, _pixels3, load3, store5),
    4: (4, behind6, _pixels4, load4, store6),
    5: (5, behind7, _pixels5, load5, store7),
}

gather3 = _whole(3, _nothing, gathering(3, *FORWARD[3], _write5))
gather4 = _whole(4, _nothing, gathering(4, *FORWARD[4], _write6))
gather5 = _whole(5, _nothing, gathering(5, *FORWARD[5], _write7))
gather_back3 = _whole(3, _nothing, gathering(3, *BACK[3], _write5))
gather_back4 = _whole(4, _nothing, gathering(4, *BACK[4], _write6))
gather_back5 = _whole(5, _nothing, gathering(5, *BACK[5], _write7))
scatter3 = _whole(3, _bias, _scatter(3, after5, load5, store3, _put3))
scatter4 = _whole(4, _bias, _scatter(4, after6, load6, store4, _put4))
scatter5 = _whole(5, _bias, _scatter(5, after7, load7, store5, _put5))
scatter_back3 = _whole(3, _clear, _scatter_back(3, ahead5, load5, store5, _plus5))
scatter_back4 = _whole(4, _clear, _scatter_back(4, ahead6, load6, store6, _plus6))
scatter_back5 = _whole(5, _clear, _scatter_back(5, ahead7, load7, store7, _plus7))
