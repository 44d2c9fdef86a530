"""What the compiled loops of `products` and those who call them agree on; importing it loads no numba."""

from typing import Final

LEFT, RIGHT, OUT = range(3)
"""Words of a job that are addresses, of the first of many matrices of float32."""

LEFT_STEP, RIGHT_STEP, OUT_STEP, LEFT_PITCH, RIGHT_PITCH, OUT_PITCH = range(3, 9)
"""Bytes from a matrix to the next, and from a row to the next."""

ROWS, COLUMNS, DEPTH, COUNT = range(9, 13)
"""Of an output, which has a multiple of 16 columns; the products in each sum; and parts of all outputs together."""

FRESH = 13
"""Whether sums begin at zero, rather than at what is there."""

TALL: Final = 6
"""Rows of a block of sums: with 16 columns they fill the registers of AVX2."""

SPAN: Final = 96
"""Rows that a thread takes at a time, a multiple of `TALL`."""

FUNCTIONS: Final = {
    "multiply": 1,
    "add_products": 1,
    "add_upper": 1,
    "mirror": 1,
    "multiply_pairs": 1,
    "add_products_pairs": 1,
    "combine_pairs": 1,
}
"""The functions of `product_loops`, and how many int64 each takes; each gives one back."""
