"""Winograd's transforms along one side of a tile: a few words for the loops of `winograd_loops`, of sixteen lanes each.

    before6(a, b, c, d, e, f)    # six pixels -> their values at six points

They are those of Lavin & Gray 2016: `before` is their B', `after` their A', and `behind` and `ahead` are these
transposed, which gradients go through; the number is that of the points. For six, F(4x4, 3x3), they are theirs. A point
p more makes F(3x3, 3x3) of F(2x2, 3x3), and F(5x5, 3x3) of F(4x4, 3x3): values at the others are then those of the
differences between a pixel and p times the one before.
"""

# numba infers the types of what stands here, and not Python's.
# mypy: disable-error-code="no-untyped-def, no-untyped-call"

import numpy as np

from fastcifar.kernels.cpu_words import word
from fastcifar.kernels.lanes import add, fma, splat, subtract

__all__ = [
    "after5",
    "after6",
    "after7",
    "ahead5",
    "ahead6",
    "ahead7",
    "before5",
    "before6",
    "before7",
    "behind5",
    "behind6",
    "behind7",
]

_HALF, _TWO, _FOUR, _FIVE = np.float32(0.5), np.float32(2), np.float32(4), np.float32(5)
_EIGHT, _SIXTEEN = np.float32(8), np.float32(16)


@word
def _times(number, a, b):
    """`number` * a + b."""
    return fma(splat(number), a, b)


@word
def before6(a, b, c, d, e, f):
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
def after6(a, b, c, d, e, f):
    """Four values, of products at six points."""
    s, t, p, q = add(b, c), subtract(b, c), add(d, e), subtract(d, e)
    return add(a, add(s, p)), _times(_TWO, q, t), _times(_FOUR, p, s), add(_times(_EIGHT, q, t), f)


@word
def behind6(a, b, c, d):
    """`after6`, transposed."""
    even, odd = add(a, c), add(b, d)
    wide, far = _times(_FOUR, c, a), _times(_FOUR, d, b)
    return a, add(even, odd), subtract(even, odd), _times(_TWO, far, wide), _times(-_TWO, far, wide), d


@word
def ahead6(a, b, c, d, e, f):
    """`before6`, transposed."""
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
def before7(a, b, c, d, e, f, g):
    """Seven values at the six points and at a half."""
    u, v, w = _times(-_HALF, a, b), _times(-_HALF, b, c), _times(-_HALF, c, d)
    x, y, z = _times(-_HALF, d, e), _times(-_HALF, e, f), _times(-_HALF, f, g)
    return (*before6(u, v, w, x, y, z), _times(_FOUR, b, _times(-_FIVE, d, f)))


@word
def after7(a, b, c, d, e, f, g):
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
def behind7(a, b, c, d, e):
    """`after7`, transposed."""
    even, odd = add(a, add(c, e)), add(b, d)
    wide, far = _times(_SIXTEEN, e, _times(_FOUR, c, a)), _times(_FOUR, d, b)
    half = _times(_SIXTEEN, a, _times(_EIGHT, b, _times(_FOUR, c, _times(_TWO, d, e))))
    return a, add(even, odd), subtract(even, odd), _times(_TWO, far, wide), _times(-_TWO, far, wide), e, half


@word
def ahead7(a, b, c, d, e, f, g):
    """`before7`, transposed."""
    u, v, w, x, y, z = ahead6(a, b, c, d, e, f)
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
def before5(a, b, c, d, e):
    """Five values at five points: 0, 1, -1, infinity and 2."""
    u, v, w, x = _times(-_TWO, a, b), _times(-_TWO, b, c), _times(-_TWO, c, d), _times(-_TWO, d, e)
    return subtract(w, u), add(w, v), subtract(w, v), subtract(x, v), subtract(d, b)


@word
def after5(a, b, c, d, e):
    """Three values, of products at five points."""
    s, t = add(b, c), subtract(b, c)
    return add(a, add(s, e)), _times(_TWO, e, t), add(_times(_FOUR, e, s), d)


@word
def behind5(a, b, c):
    """`after5`, transposed."""
    even = add(a, c)
    return a, add(even, b), subtract(even, b), c, _times(_FOUR, c, _times(_TWO, b, a))


@word
def ahead5(a, b, c, d, e):
    """`before5`, transposed."""
    v, w = subtract(subtract(b, c), d), add(a, add(b, c))
    return (
        add(a, a),
        subtract(_times(-_TWO, v, subtract(splat(np.float32(0)), a)), e),
        _times(-_TWO, w, v),
        add(_times(-_TWO, d, w), e),
        d,
    )
