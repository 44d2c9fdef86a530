"""The compiled loops of `products`: a block of 6 x 16 sums stays in registers.

    multiply(job)       # rows times filters: makes what is left of the job's parts; any number of threads may call it
    add_products(job)   # rows times rows, summed over the rows and added to what is there, or instead of it
    add_upper(job)      # the same, but for the blocks that are wholly below the diagonal
    mirror(job)         # copies what is above the diagonal to below it
    multiply_pairs(job), add_products_pairs(job)   # where each number on the left and right is a pair, see `pair_lanes`
    combine_pairs(job)  # rows times rows, as pairs

A job is int64 words, see `product_fields`. Every sum is taken in one order, whatever the number of threads. Blocks
hang over: there is room for rows up to a multiple of 6, and what is in it, and comes to it, is for nobody.
"""

# numba infers the types of what stands here, and not Python's.
# mypy: disable-error-code="no-untyped-def, no-untyped-call, assignment"

import numpy as np

from fastcifar.kernels.cpu_words import fetch_add, get64, get_float, put_float, word
from fastcifar.kernels.lanes import fma, load6, load_float32, splat, store6
from fastcifar.kernels.norm_fields import LANES, NEXT
from fastcifar.kernels.pair_lanes import add_dots, pair6
from fastcifar.kernels.product_fields import (
    COLUMNS,
    COUNT,
    DEPTH,
    FRESH,
    LEFT,
    LEFT_PITCH,
    LEFT_STEP,
    OUT,
    OUT_PITCH,
    OUT_STEP,
    RIGHT,
    RIGHT_PITCH,
    RIGHT_STEP,
    ROWS,
    SPAN,
    TALL,
)


@word
def _add_product(at, values, total):
    return fma(splat(get_float(at, 0)), values, total)


def _block_of(times):
    """The word for six sums of sixteen lanes, of `depth` products of a number on the left and sixteen on the right.

    times: the word that adds a product, of the number's address, the sixteen and the sum so far.

    The word takes, beside the sums so far:
    left: the first number; `down` bytes from a row's to the next row's, `onward` to the row's next.
    right: the first sixteen; `below` bytes to the next.
    """

    def block(left, down, onward, right, below, depth, sums):
        a, b, c, d, e, f = sums
        for _ in range(depth):
            values = load_float32(right)
            a, b = times(left, values, a), times(left + down, values, b)
            c, d = times(left + 2 * down, values, c), times(left + 3 * down, values, d)
            e, f = times(left + 4 * down, values, e), times(left + 5 * down, values, f)
            left += onward
            right += below
        return a, b, c, d, e, f

    return word(block)


_block, _pair_block = _block_of(_add_product), _block_of(add_dots)


def _multiplying(block):
    """Write rows `first` to `end` of OUT = LEFT [ROWS, DEPTH] times RIGHT, which is [COLUMNS / 16, DEPTH, 16]."""

    def body(job, left, right, out, first, end):
        depth, pitch, out_pitch = get64(job, DEPTH), get64(job, LEFT_PITCH), get64(job, OUT_PITCH)
        zero = splat(np.float32(0))
        for column in range(0, get64(job, COLUMNS), LANES):
            for row in range(first, end, TALL):
                sums = (zero, zero, zero, zero, zero, zero)
                found = block(left + row * pitch, pitch, 4, right, 4 * LANES, depth, sums)
                store6(out + row * out_pitch + 4 * column, out_pitch, found)
            right += depth * 4 * LANES

    return word(body)


def _adding(block, upper=False):
    """Add rows `first` to `end` of LEFT [DEPTH, ROWS], transposed, times RIGHT [DEPTH, COLUMNS] to OUT."""

    def body(job, left, right, out, first, end):
        depth, pitch, out_pitch = get64(job, DEPTH), get64(job, LEFT_PITCH), get64(job, OUT_PITCH)
        below, zero = get64(job, RIGHT_PITCH), splat(np.float32(0))
        for start in range(0, depth, SPAN):  # so many rows stay in the cache
            count, first_of_all = min(SPAN, depth - start), start == 0 and get64(job, FRESH) != 0
            for column in range(0, get64(job, COLUMNS), LANES):
                for row in range(first, min(end, column + LANES) if upper else end, TALL):
                    at = out + row * out_pitch + 4 * column
                    here = left + start * pitch + 4 * row
                    sums = (zero, zero, zero, zero, zero, zero) if first_of_all else load6(at, out_pitch)
                    found = block(here, 4, pitch, right + start * below + 4 * column, below, count, sums)
                    store6(at, out_pitch, found)

    return word(body)


@word
def _combine_pairs(job, left, right, out, first, end):
    """Write rows `first` to `end` of LEFT [DEPTH, ROWS], transposed, times RIGHT [DEPTH, COLUMNS] to OUT.

    Columns are rounded to bfloat16 there, and the first sixteen of 32 make pairs with the others.
    """
    depth, pitch, out_pitch = get64(job, DEPTH), get64(job, LEFT_PITCH), get64(job, OUT_PITCH)
    below, zero = get64(job, RIGHT_PITCH), splat(np.float32(0))
    zeros = zero, zero, zero, zero, zero, zero
    for column in range(0, get64(job, COLUMNS), 2 * LANES):
        at = right + 4 * column
        for row in range(first, end, TALL):
            low = _block(left + 4 * row, 4, pitch, at, below, depth, zeros)
            high = _block(left + 4 * row, 4, pitch, at + 4 * LANES, below, depth, zeros)
            store6(out + row * out_pitch + 2 * column, out_pitch, pair6(low, high))


@word
def _mirror(job, left, right, out, first, end):
    """Copy rows `first` to `end` of OUT below its diagonal from above it, sixteen columns at a time."""
    pitch = get64(job, OUT_PITCH)
    for start in range(0, end, LANES):
        for row in range(max(first, start), end):
            for column in range(start, min(start + LANES, row)):
                put_float(out + row * pitch, column, get_float(out + column * pitch, row))


def _whole(body):
    """The function of a job that does `body` for the parts that are left; a part is SPAN rows of one matrix."""

    def function(job):
        rows = get64(job, ROWS)
        spans = (rows + SPAN - 1) // SPAN
        part = fetch_add(job + 8 * NEXT, 1)
        while part < get64(job, COUNT):
            which, first = part // spans, part % spans * SPAN
            left = get64(job, LEFT) + which * get64(job, LEFT_STEP)
            right = get64(job, RIGHT) + which * get64(job, RIGHT_STEP)
            out = get64(job, OUT) + which * get64(job, OUT_STEP)
            body(job, left, right, out, first, min(first + SPAN, rows))
            part = fetch_add(job + 8 * NEXT, 1)
        return 0

    return function


multiply, mirror = _whole(_multiplying(_block)), _whole(_mirror)
add_products, add_upper = _whole(_adding(_block)), _whole(_adding(_block, upper=True))
combine_pairs = _whole(_combine_pairs)
multiply_pairs, add_products_pairs = _whole(_multiplying(_pair_block)), _whole(_adding(_pair_block))
