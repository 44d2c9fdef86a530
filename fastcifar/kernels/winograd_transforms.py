"""Winograd's transforms along one side of a tile: a few words for the loops of `winograd_loops`, of sixteen lanes each.

    before6(a, b, c, d, e, f)    # six pixels -> their values at six points

They are those of Lavin & Gray 2016, at points of `winograd_fields`: `before` is their B', `after` their A',
and `behind` and `ahead` are these transposed, which gradients go through; the number is that of the points. A point p
more makes F(3x3, 3x3) of F(2x2, 3x3), and F(5x5, 3x3) of F(4x4, 3x3): values at the others are then those of the
differences between a pixel and p times the one before.
"""

# numba infers the types of what stands here, and not Python's.
# mypy: disable-error-code="no-untyped-def, no-untyped-call"

import numpy as np

from fastcifar.kernels.cpu_words import word
from fastcifar.kernels.lanes import add, fma, multiply, splat, subtract
from fastcifar.kernels.winograd_fields import POINTS

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
def _scaled(number, a):
    """`number` * a."""
    return multiply(splat(number), a)


def _six(points):
    """The four transforms for six points: 0, s, -s, t, -t and infinity."""
    s, t = points[1], points[3]
    near, far, both, one = np.float32(s * s), np.float32(t * t), np.float32(s * s + t * t), np.float32((s * t) ** 2)
    near3, far3 = np.float32(s**3), np.float32(t**3)
    by_far, by_near = np.float32(s * t * t), np.float32(t * s * s)
    s, t = np.float32(s), np.float32(t)

    @word
    def before(a, b, c, d, e, f):
        """Six values at the six points: a polynomial's, but for the points' factors (see `winograd`)."""
        even, odd = _times(-far, c, e), _times(-far, b, d)
        wide, long = _times(-near, c, e), _times(-near, b, d)
        return (
            _times(one, a, _times(-both, c, e)),
            _times(s, odd, even),
            _times(-s, odd, even),
            _times(t, long, wide),
            _times(-t, long, wide),
            _times(one, b, _times(-both, d, f)),
        )

    @word
    def after(a, b, c, d, e, f):
        """Four values, of products at six points."""
        u, v, p, q = add(b, c), subtract(b, c), add(d, e), subtract(d, e)
        return (
            add(a, add(u, p)),
            _times(t, q, _scaled(s, v)),
            _times(far, p, _scaled(near, u)),
            _times(far3, q, _times(near3, v, f)),
        )

    @word
    def behind(a, b, c, d):
        """`after`, transposed."""
        even, odd = _times(near, c, a), _times(near3, d, _scaled(s, b))
        wide, long = _times(far, c, a), _times(far3, d, _scaled(t, b))
        return a, add(even, odd), subtract(even, odd), add(wide, long), subtract(wide, long), d

    @word
    def ahead(a, b, c, d, e, f):
        """`before`, transposed."""
        u, v, p, q = add(b, c), subtract(b, c), add(d, e), subtract(d, e)
        return (
            _scaled(one, a),
            _times(-by_far, v, _times(-by_near, q, _scaled(one, f))),
            _times(-both, a, _times(-far, u, _scaled(-near, p))),
            _times(s, v, _times(t, q, _scaled(-both, f))),
            add(a, add(u, p)),
            f,
        )

    return before, after, behind, ahead


before6, after6, behind6, ahead6 = _six(POINTS[4])
_before6, _, _, _ahead6 = _six(POINTS[5])


@word
def before7(a, b, c, d, e, f, g):
    """Seven values at the six points and at a half."""
    u, v, w = _times(-_HALF, a, b), _times(-_HALF, b, c), _times(-_HALF, c, d)
    x, y, z = _times(-_HALF, d, e), _times(-_HALF, e, f), _times(-_HALF, f, g)
    return (*_before6(u, v, w, x, y, z), _times(_FOUR, b, _times(-_FIVE, d, f)))


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
    u, v, w, x, y, z = _ahead6(a, b, c, d, e, f)
    return (
        _scaled(-_HALF, u),
        _times(_FOUR, g, _times(-_HALF, v, u)),
        _times(-_HALF, w, v),
        _times(-_FIVE, g, _times(-_HALF, x, w)),
        _times(-_HALF, y, x),
        add(g, _times(-_HALF, z, y)),
        z,
    )


_P, _P2, _Q, _Q2 = (np.float32(POINTS[3][n] ** power) for n in (1, 4) for power in (1, 2))


@word
def before5(a, b, c, d, e):
    """Five values at five points: 0, p, -p, infinity and q."""
    u, v, w, x = _times(-_Q, a, b), _times(-_Q, b, c), _times(-_Q, c, d), _times(-_Q, d, e)
    return _times(-_P2, u, w), _times(_P, v, w), _times(-_P, v, w), _times(-_P2, v, x), _times(-_P2, b, d)


@word
def after5(a, b, c, d, e):
    """Three values, of products at five points."""
    s, t = add(b, c), subtract(b, c)
    return add(a, add(s, e)), _times(_Q, e, _scaled(_P, t)), _times(_Q2, e, _times(_P2, s, d))


@word
def behind5(a, b, c):
    """`after5`, transposed."""
    even, odd = _times(_P2, c, a), _scaled(_P, b)
    return a, add(even, odd), subtract(even, odd), c, _times(_Q2, c, _times(_Q, b, a))


@word
def ahead5(a, b, c, d, e):
    """`before5`, transposed."""
    u, v, w = _scaled(-_P2, a), _times(-_P2, d, _scaled(_P, subtract(b, c))), add(a, add(b, c))
    return (
        _scaled(-_Q, u),
        _times(-_P2, e, _times(-_Q, v, u)),
        _times(-_Q, w, v),
        add(_times(-_Q, d, w), e),
        d,
    )
