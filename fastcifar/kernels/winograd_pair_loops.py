"""Loops of `winograd_loops` that make planes of bfloat16, each as those who multiply them want them, or both.

    gather_pairs4(job)    # makes what is left of the job's images; any number of threads may call it at once

PLANES has a row for each tile, of bfloat16: products take two channels of it as a pair. PAIRS has a row for the same
tile of two images, the first and second, third and fourth and so on, which make the pair: products that sum over tiles
take these. Where the last image has no other, its pairs end in zeros.
"""

# numba infers the types of what stands here, and not Python's.
# mypy: disable-error-code="no-untyped-def, no-untyped-call, assignment"

from fastcifar.kernels.cpu_words import fetch_add, get64, word
from fastcifar.kernels.lanes import place, store_bfloat16
from fastcifar.kernels.norm_fields import LANES, NEXT
from fastcifar.kernels.pair_lanes import store_pair
from fastcifar.kernels.winograd_fields import (
    CHANNELS,
    COUNT,
    HEIGHT,
    IMAGES,
    PAIR_PITCH,
    PAIR_STEP,
    PAIRS,
    PITCH,
    PLANES,
    STEP,
    WIDTH,
)
from fastcifar.kernels.winograd_loops import BACK, FORWARD, gathering


@word
def _write(out, step, point, value):
    has_halves, halves, has_pairs, pairs, second = out
    half_step, pair_step = step
    if has_halves:
        store_bfloat16(place(halves, point * half_step), value)
    if has_pairs:
        store_pair(place(pairs, point * pair_step), second, value)


@word
def _write_five(out, step, point, values):
    _write(out, step, point, values[0])
    _write(out, step, point + 1, values[1])
    _write(out, step, point + 2, values[2])
    _write(out, step, point + 3, values[3])
    _write(out, step, point + 4, values[4])


@word
def _write5(out, step, row, values):
    _write_five(out, step, 5 * row, values)


@word
def _write6(out, step, row, values):
    _write_five(out, step, 6 * row, values)
    _write(out, step, 6 * row + 5, values[5])


def _whole(side, body):
    """The function of a job that does `body` for each tile of the images that are left; a part is two images."""
    body = word(body)

    def function(job):
        height, width, channels = get64(job, HEIGHT), get64(job, WIDTH), get64(job, CHANNELS)
        pitch, pair_pitch = get64(job, PITCH), get64(job, PAIR_PITCH)
        step = get64(job, STEP), get64(job, PAIR_STEP)
        rows, columns = (height + side - 1) // side, (width + side - 1) // side
        tiles, size = rows * columns, height * width * channels * 4
        has_halves, has_pairs = get64(job, PLANES) != 0, get64(job, PAIRS) != 0
        part = fetch_add(job + 8 * NEXT, 1)
        while 2 * part < get64(job, COUNT):
            for image in range(2 * part, min(2 * part + 2, get64(job, COUNT))):
                for block in range((channels + LANES - 1) // LANES):
                    first = min(block * LANES, channels - LANES)
                    images = get64(job, IMAGES) + image * size + 4 * first
                    for i in range(rows):
                        for j in range(columns):
                            tile = i * columns + j
                            halves = get64(job, PLANES) + (image * tiles + tile) * pitch + 2 * first
                            pairs = get64(job, PAIRS) + (part * tiles + tile) * pair_pitch + 4 * first
                            out = has_halves, halves, has_pairs, pairs, image - 2 * part
                            body(job, images, i, j, out, step, 0)
            part = fetch_add(job + 8 * NEXT, 1)
        return 0

    return function


gather_pairs3 = _whole(3, gathering(3, *FORWARD[3], _write5))
gather_pairs4 = _whole(4, gathering(4, *FORWARD[4], _write6))
gather_back_pairs3 = _whole(3, gathering(3, *BACK[3], _write5))
gather_back_pairs4 = _whole(4, gathering(4, *BACK[4], _write6))
