"""What the compiled loops of `norms` and those who call them agree on; importing it loads no numba."""

from typing import Final

INPUT, OUTPUT, GRADIENT, CODES, PEAKS, SUMS, SCALE, BIAS, CENTRE, SLOPE, OFFSET = range(11)
"""Words of a job that are addresses: of values in their type, of uint8 `CODES`, and of float32 from `SUMS` on."""

COUNT, PIXELS, HEIGHT, WIDTH, CHANNELS = range(11, 16)
"""Its numbers: parts there are, pixels of all images together, and an image's shape."""

NEXT, WORDS = 24, 32
"""The next part to take, which threads share, a cache line apart; and how many words a job has."""

LANES: Final = 16
"""Channels that are computed at once; a norm has a multiple of them."""

PART: Final = 1024
"""Pixels that a thread takes at a time where each stands alone."""

FUNCTIONS: Final = {
    f"{name}_{kind}": 1
    for name in (
        *("moments", "apply", "pool", "sums", "back", "unpool"),
        *("plain_moments", "apply_gelu", "sums_gelu", "plain_back", "halve", "spread"),
    )
    for kind in ("float32", "bfloat16")
}
"""The functions of `norm_loops` and `halve_loops`, and how many int64 each takes; each gives one back."""
