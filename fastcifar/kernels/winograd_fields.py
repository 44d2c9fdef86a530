"""What the compiled loops of `winograd` and those who call them agree on; importing it loads no numba."""

from typing import Final

IMAGES, PLANES, BIAS, ZEROS = range(4)
"""Words of a job that are addresses, of float32: images [COUNT, HEIGHT, WIDTH, CHANNELS], 36 planes with a
row of channels for each tile, one number for each channel, and sixteen zeros."""

COUNT, HEIGHT, WIDTH, CHANNELS, PITCH, STEP = range(4, 10)
"""Its numbers: images, their shape, and the bytes from a row of a plane to the next, and from a plane to the next."""

FUNCTIONS: Final = dict.fromkeys(("gather", "scatter", "gather_back", "scatter_back"), 1)
"""The functions of `winograd_loops`, and how many int64 each takes; each gives one back."""
