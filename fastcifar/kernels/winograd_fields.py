"""What the compiled loops of `winograd` and those who call them agree on; importing it loads no numba."""

from typing import Final

IMAGES, PLANES, BIAS, ZEROS = range(4)
"""Words of a job that are addresses, of float32: images [COUNT, HEIGHT, WIDTH, CHANNELS], planes with a row
of channels for each tile, one number for each channel, and sixteen zeros."""

COUNT, HEIGHT, WIDTH, CHANNELS, PITCH, STEP = range(4, 10)
"""Its numbers: images, their shape, and the bytes from a row of a plane to the next, and from a plane to the next."""

TILES: Final = (4, 5, 3)
"""Sides of a tile's outputs there are loops for; a tile reads two pixels more a side, and has as many points."""

FUNCTIONS: Final = {
    f"{name}{tile}": 1 for name in ("gather", "scatter", "gather_back", "scatter_back") for tile in TILES
}
"""The functions of `winograd_loops`, and how many int64 each takes; each gives one back."""
