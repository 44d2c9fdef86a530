"""Sixteen pairs of bfloat16, one to each 32 bits of a vector, for products of bfloat16 that are summed in float32.

    total = add_dots(address, pairs, total)    # a pair at the address: low * low + high * high more, in each lane

A vector of pairs is held as the float32 of the same bits, which nothing computes with: `load_float32` and
`store_float32` move it as it is. Processors with AVX512-BF16 take one instruction for the products, which makes zero of
what is subnormal; others several, so that it can be tested there, and what they give differs in the last bits.
"""

# numba infers the types of its words, and not Python's.
# mypy: disable-error-code="no-untyped-def, no-untyped-call"

from typing import Any

from llvmlite import ir
from numba import types

from fastcifar.kernels.cpu_words import constant, word
from fastcifar.kernels.lanes import define, floats, fma_lanes, rounded, splat_lanes
from fastcifar.kernels.machine import has_bfloat16
from fastcifar.kernels.norm_fields import LANES

__all__ = ["add_dots", "pair6", "store_pair"]

_WORD = ir.IntType(32)
_WORDS = ir.VectorType(_WORD, LANES)


def _low(builder: Any, value: Any) -> Any:
    return builder.zext(rounded(builder, value), _WORDS)


def _pair(builder: Any, low: Any, high: Any) -> Any:
    above = builder.shl(_low(builder, high), constant(_WORD, 16, LANES))
    return builder.bitcast(builder.or_(_low(builder, low), above), floats.vector)


def _store_pair(builder: Any, address: Any, second: Any, value: Any) -> None:
    second = builder.trunc(second, _WORD)
    shift = splat_lanes(builder, builder.mul(second, _WORD(16)))
    kept = splat_lanes(builder, builder.mul(second, _WORD(0xFFFF)))  # of what is there
    place = builder.inttoptr(address, _WORDS.as_pointer())
    there = builder.and_(builder.load(place, align=1), kept)
    builder.store(builder.or_(there, builder.shl(_low(builder, value), shift)), place, align=1)


def _add_dots(builder: Any, address: Any, pairs: Any, total: Any) -> Any:
    if has_bfloat16():  # from memory: to spread a pair over a vector takes the units that multiply
        kind = ir.FunctionType(total.type, [total.type, address.type, pairs.type])
        code, where = "vdpbf16ps ($2){1to16}, $3, $0", "=v,0,r,v,~{memory}"
        return builder.asm(kind, code, where, [total, address, pairs], False)
    one = splat_lanes(builder, builder.load(builder.inttoptr(address, ir.FloatType().as_pointer()), align=1))
    for part in (_highs, _lows):
        total = fma_lanes(builder, part(builder, one), part(builder, pairs), total)
    return total


def _lows(builder: Any, pairs: Any) -> Any:
    words = builder.shl(builder.bitcast(pairs, _WORDS), constant(_WORD, 16, LANES))
    return builder.bitcast(words, floats.vector)


def _highs(builder: Any, pairs: Any) -> Any:
    words = builder.and_(builder.bitcast(pairs, _WORDS), constant(_WORD, 0xFFFF0000, LANES))
    return builder.bitcast(words, floats.vector)


add_dots = define(floats, (types.int64, floats, floats), _add_dots)
_paired = define(floats, (floats, floats), _pair)
# The sixteen float32 are rounded to the first of sixteen pairs, the second zeros (0); or to the second of these (1).
store_pair = define(types.void, (types.int64, types.int64, floats), _store_pair)


@word
def pair6(first, second):
    """Six times sixteen pairs, of two times as many float32."""
    a, b, c = _paired(first[0], second[0]), _paired(first[1], second[1]), _paired(first[2], second[2])
    return a, b, c, _paired(first[3], second[3]), _paired(first[4], second[4]), _paired(first[5], second[5])
