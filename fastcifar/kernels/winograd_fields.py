"""What the compiled loops of `winograd` and those who call them agree on; importing it loads no numba."""

from math import inf
from typing import Final

IMAGES, PLANES, BIAS, ZEROS = range(4)
"""Words of a job that are addresses, of float32: images [COUNT, HEIGHT, WIDTH, CHANNELS], planes with a row
of channels for each tile, one number for each channel, and sixteen zeros."""

COUNT, HEIGHT, WIDTH, CHANNELS, PITCH, STEP = range(4, 10)
"""Its numbers: images, their shape, and the bytes from a row of a plane to the next, and from a plane to the next."""

PAIRS, PAIR_PITCH, PAIR_STEP = range(10, 13)
"""Of the loops that write bfloat16: the address of pairs, and their bytes from a row and a plane to the next.

In these PLANES are bfloat16, and either may be left out: an address of 0."""

TILES: Final = (4, 5, 3)
"""Sides of a tile's outputs there are loops for; a tile reads two pixels more a side, and has as many points."""

POINTS: Final = {
    3: (0, 0.7, -0.7, inf, 2),
    4: (0, 5 / 8, -5 / 8, 8 / 5, -8 / 5, inf),
    5: (0, 1, -1, 2, -2, inf, 1 / 2),
}
"""The points at which polynomials are taken, for tiles of each side: for 3 and 4 those of small rounding errors.

With planes in bfloat16 these are, relative to the result and in root mean square, 0.9 % for 3, 1.1 for 4 and 3.8 for
5; with 0, 1, -1, 2, -2 and infinity, those of Lavin & Gray, 2.5 for 4. A plain product of bfloat16 has 0.24.
"""

PAIR_TILES: Final = (4, 3)
"""Those whose planes may be bfloat16. In those of 5 rounding would be felt."""

FUNCTIONS: Final = {
    **{f"{name}{tile}": 1 for name in ("gather", "scatter", "gather_back", "scatter_back") for tile in TILES},
    **{f"{name}_pairs{tile}": 1 for name in ("gather", "gather_back") for tile in PAIR_TILES},
}
"""The functions of `winograd_loops` and `winograd_pair_loops`, and how many int64 each takes; each gives one back."""
