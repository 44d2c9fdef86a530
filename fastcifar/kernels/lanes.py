"""Vectors of sixteen numbers for the CPU's compiled loops: numba has no such type, and LLVM has.

    values = load_bfloat16(address)            # sixteen channels of a pixel
    store_float32(address, fma(scale, relu(values), shift))

Where LLVM is left to find vectors itself it must ask at each loop whether what is written overlaps what is read, which
here costs as much as the loop. Addresses are int64 and may have any alignment.
"""

# numba infers the types of its words, and not Python's.
# mypy: disable-error-code="no-untyped-def, no-untyped-call, misc"

from collections.abc import Callable
from typing import Any

from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic, models, register_model

from fastcifar.kernels.cpu_words import constant, round_bfloat16, word
from fastcifar.kernels.machine import has_bfloat16
from fastcifar.kernels.norm_fields import LANES

__all__ = [
    "add",
    "define",
    "divide",
    "equal",
    "exp",
    "floats",
    "fma",
    "fma_lanes",
    "load3",
    "load4",
    "load5",
    "load6",
    "load7",
    "load_bfloat16",
    "load_codes",
    "load_float32",
    "more",
    "multiply",
    "pick",
    "pick_code",
    "place",
    "relu",
    "room",
    "rounded",
    "splat",
    "splat_code",
    "splat_lanes",
    "store3",
    "store4",
    "store5",
    "store6",
    "store7",
    "store_bfloat16",
    "store_codes",
    "store_float32",
    "subtract",
]

_FLOAT, _BYTE, _BIT, _HALF, _WORD = ir.FloatType(), ir.IntType(8), ir.IntType(1), ir.IntType(16), ir.IntType(32)


class _Lanes(types.Type):
    """Sixteen of an LLVM type, by value."""

    def __init__(self, name: str, element: Any) -> None:
        super().__init__(name=f"Lanes({name})")
        self.vector = ir.VectorType(element, LANES)


@register_model(_Lanes)
class _LanesModel(models.PrimitiveModel):
    def __init__(self, manager: Any, kind: Any) -> None:
        super().__init__(manager, kind, kind.vector)


floats, _codes, _mask = _Lanes("float32", _FLOAT), _Lanes("uint8", _BYTE), _Lanes("bool", _BIT)


def define(result: Any, takes: tuple[Any, ...], generate: Callable[..., Any]) -> Any:
    """An intrinsic of `takes`, whose LLVM code `generate(builder, *values)` writes; without a result it gives None."""

    def build(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        value = generate(builder, *arguments)
        return context.get_dummy_value() if result is types.void else value

    def typed(typingctx: Any, *given: Any) -> Any:
        return result(*takes), build

    return intrinsic(_OF_COUNT[len(takes)](typed))


# numba reads the number of arguments from the function's signature
_OF_COUNT: dict[int, Callable[[Any], Any]] = {
    0: lambda typed: lambda typingctx: typed(typingctx),
    1: lambda typed: lambda typingctx, a: typed(typingctx, a),
    2: lambda typed: lambda typingctx, a, b: typed(typingctx, a, b),
    3: lambda typed: lambda typingctx, a, b, c: typed(typingctx, a, b, c),
}


def _load(element: Any) -> Callable[..., Any]:
    def generate(builder: Any, address: Any) -> Any:
        return builder.load(builder.inttoptr(address, ir.VectorType(element, LANES).as_pointer()), align=1)

    return generate


def _store(builder: Any, address: Any, value: Any) -> None:
    builder.store(value, builder.inttoptr(address, value.type.as_pointer()), align=1)


def _widen(builder: Any, address: Any) -> Any:
    """The upper half of a float32 is a bfloat16."""
    words = builder.zext(_load(_HALF)(builder, address), ir.VectorType(_WORD, LANES))
    return builder.bitcast(builder.shl(words, constant(_WORD, 16, LANES)), floats.vector)


def rounded(builder: Any, value: Any) -> Any:
    """The bits of bfloat16: to nearest, ties to even; a NaN stays one. The instruction makes zero of subnormal ones."""
    if has_bfloat16():
        kind = ir.FunctionType(ir.VectorType(_HALF, LANES), [value.type])
        return builder.asm(kind, "vcvtneps2bf16 $1, $0", "=v,v", [value], False)
    is_nan = builder.fcmp_unordered("uno", value, value)
    return builder.select(is_nan, constant(_HALF, 0x7FC0, LANES), round_bfloat16(builder, value, LANES))


def _narrow(builder: Any, address: Any, value: Any) -> None:
    _store(builder, address, rounded(builder, value))


def fma_lanes(builder: Any, a: Any, b: Any, c: Any) -> Any:
    """`a * b + c`, rounded once."""
    name = f"llvm.fma.v{LANES}f32"
    kind = ir.FunctionType(a.type, [a.type] * 3)
    return builder.call(cgutils.get_or_insert_function(builder.module, kind, name), [a, b, c])


def splat_lanes(builder: Any, value: Any) -> Any:
    """The number in every lane."""
    first = builder.insert_element(ir.Constant(ir.VectorType(value.type, LANES), ir.Undefined), value, _WORD(0))
    return builder.shuffle_vector(first, first, ir.Constant(ir.VectorType(_WORD, LANES), [0] * LANES))


def _place(builder: Any, base: Any, offset: Any) -> Any:
    """The sum, of which LLVM knows which is the pointer: a constant offset of 0 may not be taken for it."""
    pointer = builder.gep(builder.inttoptr(base, _BYTE.as_pointer()), [offset])
    return builder.ptrtoint(pointer, base.type)


def _room(builder: Any) -> Any:
    """The address of room for 64 times sixteen float32 on the thread's stack."""
    return builder.ptrtoint(cgutils.alloca_once(builder, floats.vector, 64), ir.IntType(64))


def _relu(builder: Any, value: Any) -> Any:
    """Zero where it is below; a NaN stays one."""
    zero = constant(_FLOAT, 0.0, LANES)
    return builder.select(builder.fcmp_ordered("<", value, zero), zero, value)


def _exp(builder: Any, value: Any) -> Any:
    """The exponential of values from -87 to 87, within 2 units in the last place; of a NaN, anything.

    2**k times the exponential of what is left, at most half of log 2, by the polynomial of Cephes' expf.
    """

    def float32(number: float) -> Any:
        return constant(_FLOAT, number, LANES)

    magic = float32(1.5 * 2**23)  # a sum with it is rounded to whole numbers, which its last bits are
    shifted = fma_lanes(builder, value, float32(1.44269504), magic)
    k = builder.fsub(shifted, magic)
    left = fma_lanes(builder, k, float32(-0.693359375), value)
    left = fma_lanes(builder, k, float32(2.12194440e-4), left)  # log 2 in two parts: the first has few digits
    result = float32(1.9875691500e-4)
    for factor in (1.3981999507e-3, 8.3334519073e-3, 4.1665795894e-2, 1.6666665459e-1, 5.0000001201e-1, 1.0, 1.0):
        result = fma_lanes(builder, result, left, float32(factor))
    words = ir.VectorType(_WORD, LANES)
    exponent = builder.shl(builder.bitcast(shifted, words), constant(_WORD, 23, LANES))
    return builder.bitcast(builder.add(builder.bitcast(result, words), exponent), value.type)


def _more(builder: Any, a: Any, b: Any) -> Any:
    return builder.fcmp_unordered(">", a, b)


_address = types.int64
load_float32 = define(floats, (_address,), _load(_FLOAT))
load_bfloat16 = define(floats, (_address,), _widen)
load_codes = define(_codes, (_address,), _load(_BYTE))
store_float32 = define(types.void, (_address, floats), _store)
store_bfloat16 = define(types.void, (_address, floats), _narrow)
store_codes = define(types.void, (_address, _codes), _store)
place = define(_address, (_address, types.int64), _place)
room = define(_address, (), _room)
splat = define(floats, (types.float32,), splat_lanes)
splat_code = define(_codes, (types.uint8,), splat_lanes)
add = define(floats, (floats, floats), lambda builder, a, b: builder.fadd(a, b))
subtract = define(floats, (floats, floats), lambda builder, a, b: builder.fsub(a, b))
multiply = define(floats, (floats, floats), lambda builder, a, b: builder.fmul(a, b))
divide = define(floats, (floats, floats), lambda builder, a, b: builder.fdiv(a, b))
fma = define(floats, (floats, floats, floats), fma_lanes)
exp = define(floats, (floats,), _exp)
relu = define(floats, (floats,), _relu)
more = define(_mask, (floats, floats), _more)
equal = define(_mask, (_codes, _codes), lambda builder, a, b: builder.icmp_unsigned("==", a, b))
pick = define(floats, (_mask, floats, floats), lambda builder, mask, a, b: builder.select(mask, a, b))
pick_code = define(_codes, (_mask, _codes, _codes), lambda builder, mask, a, b: builder.select(mask, a, b))


@word
def load3(at, step):
    """Three times sixteen float32, `step` bytes apart."""
    return load_float32(at), load_float32(at + step), load_float32(at + 2 * step)


@word
def load4(at, step):
    """Four of them."""
    return (*load3(at, step), load_float32(at + 3 * step))


@word
def load5(at, step):
    """Five of them."""
    return (*load4(at, step), load_float32(at + 4 * step))


@word
def load6(at, step):
    """Six of them."""
    return (*load5(at, step), load_float32(at + 5 * step))


@word
def load7(at, step):
    """Seven of them."""
    return (*load6(at, step), load_float32(at + 6 * step))


@word
def store3(at, step, values):
    """Write what `load3` reads: the first three of the values."""
    store_float32(at, values[0])
    store_float32(at + step, values[1])
    store_float32(at + 2 * step, values[2])


@word
def store4(at, step, values):
    """Write the first four."""
    store3(at, step, values)
    store_float32(at + 3 * step, values[3])


@word
def store5(at, step, values):
    """Write the first five."""
    store4(at, step, values)
    store_float32(at + 4 * step, values[4])


@word
def store6(at, step, values):
    """Write the first six."""
    store5(at, step, values)
    store_float32(at + 5 * step, values[5])


@word
def store7(at, step, values):
    """Write the first seven."""
    store6(at, step, values)
    store_float32(at + 6 * step, values[6])
