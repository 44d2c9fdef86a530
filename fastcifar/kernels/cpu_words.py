"""Words for the CPU kernel: the few instructions numba has no word for, as LLVM writes them.

    reverse15(target, source)            # five RGB pixels, last first, in one byte shuffle
    first = fetch_add(counter, 8)        # atomically, between threads

They take addresses (int64) and touch only what these point at. LLVM lowers them on any processor.
"""

# numba infers the types of its words, and not Python's.
# mypy: disable-error-code="no-untyped-def, no-untyped-call"

from collections.abc import Callable
from typing import Any, TypeVar

from llvmlite import ir
from numba import njit, types
from numba.core import cgutils
from numba.extending import intrinsic

__all__ = [
    "bfloat16_bits",
    "constant",
    "copy32",
    "fetch_add",
    "float16_bits",
    "get8",
    "get64",
    "get_float",
    "get_word",
    "prefetch",
    "put8",
    "put16",
    "put64",
    "put_float",
    "put_word",
    "reverse15",
    "reverse16",
    "round_bfloat16",
    "scaled",
    "stream8",
    "stream16_bfloat16",
    "stream16_float16",
    "word",
]

_Function = TypeVar("_Function", bound=Callable[..., Any])


def word(function: _Function) -> _Function:
    """Compile a function that others are made of: always in line, without a path that raises, and not for Python."""
    made = njit(nogil=True, forceinline=True, error_model="numpy", no_cpython_wrapper=True, no_cfunc_wrapper=True)
    return made(function)  # type: ignore[no-any-return]


def _mover(order: tuple[int, ...]) -> Any:
    """An intrinsic (destination, source) that moves as many bytes as `order` has, in that order."""
    vector = ir.VectorType(ir.IntType(8), len(order))

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        target, source = (builder.inttoptr(address, vector.as_pointer()) for address in arguments)
        value = builder.load(source, align=1)
        mask = ir.Constant(ir.VectorType(ir.IntType(32), len(order)), list(order))
        builder.store(builder.shuffle_vector(value, value, mask), target, align=1)
        return context.get_dummy_value()

    def move(typingctx: Any, target: Any, source: Any) -> Any:
        return types.void(types.int64, types.int64), generate

    return intrinsic(move)


copy32 = _mover(tuple(range(32)))
reverse16 = _mover(tuple(range(15, -1, -1)))  # sixteen pixels of one channel
reverse15 = _mover((12, 13, 14, 9, 10, 11, 6, 7, 8, 3, 4, 5, 0, 1, 2, 15))  # five pixels of three channels


def _element(kind: Any) -> tuple[Any, Any]:
    """Intrinsics (address, index) and (address, index, value) for the elements of an array at an address.

    numba's own arrays would do, but drag in its reference counts and a path that raises.
    """

    def place(context: Any, builder: Any, address: Any, index: Any) -> Any:
        first = builder.inttoptr(address, context.get_value_type(kind).as_pointer())
        return builder.gep(first, [index])

    def load(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return builder.load(place(context, builder, *arguments))

    def store(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        address, index, value = arguments
        builder.store(value, place(context, builder, address, index))
        return context.get_dummy_value()

    def get(typingctx: Any, address: Any, index: Any) -> Any:
        return kind(types.int64, types.int64), load

    def put(typingctx: Any, address: Any, index: Any, value: Any) -> Any:
        return types.void(types.int64, types.int64, kind), store

    return intrinsic(get), intrinsic(put)


get8, put8 = _element(types.uint8)
get64, put64 = _element(types.int64)
get_word, put_word = _element(types.uint64)
get_float, put_float = _element(types.float32)
_, put16 = _element(types.uint16)


def _of(kind: Any, lanes: int) -> Any:
    return ir.VectorType(kind, lanes) if lanes else kind


def constant(kind: Any, value: Any, lanes: int) -> Any:
    """A constant of an LLVM type; with lanes, as many of it."""
    return ir.Constant(_of(kind, lanes), [value] * lanes if lanes else value)


def _scaled(builder: Any, a: Any, pixel: Any, b: Any, lanes: int = 0) -> Any:
    """Float32 of uint8, float32 and float32; with lanes, of as many at a time."""
    single = _of(ir.FloatType(), lanes)
    kind = ir.FunctionType(single, [single, single, single])
    name = f"llvm.fmuladd.{f'v{lanes}' if lanes else ''}f32"
    function = cgutils.get_or_insert_function(builder.module, kind, name)
    return builder.call(function, [a, builder.uitofp(pixel, single), b])


# The two below are in LLVM's words because numba computes in 64 bits, which cost 0.9 us an image.


def round_bfloat16(builder: Any, value: Any, lanes: int = 0) -> Any:
    """The bits of float32, rounded to nearest, ties to even (no NaN); with lanes, of as many at a time."""

    def word(number: int) -> Any:
        return constant(ir.IntType(32), number, lanes)

    x = builder.bitcast(value, _of(ir.IntType(32), lanes))
    odd = builder.and_(builder.lshr(x, word(16)), word(1))
    rounded = builder.add(builder.add(x, word(0x7FFF)), odd)
    return builder.trunc(builder.lshr(rounded, word(16)), _of(ir.IntType(16), lanes))


def _float16(builder: Any, value: Any, lanes: int = 0) -> Any:
    """Round, nearest and ties to even (no NaN).

    Subnormal results come from adding 0.5, whose last bit is float16's least subnormal: the hardware's rounding
    does the work. Normal ones by adding half a unit in the last place and re-biasing the exponent by 112.
    """

    def word(number: int) -> Any:
        return constant(ir.IntType(32), number, lanes)

    words, single = _of(ir.IntType(32), lanes), _of(ir.FloatType(), lanes)
    x = builder.bitcast(value, words)
    size = builder.and_(x, word(0x7FFFFFFF))
    odd = builder.and_(builder.lshr(size, word(13)), word(1))
    normal = builder.lshr(builder.add(builder.add(size, word(0xC8000FFF)), odd), word(13))
    half = constant(ir.FloatType(), 0.5, lanes)
    subnormal = builder.bitcast(builder.fadd(builder.bitcast(size, single), half), words)
    bits = builder.select(
        builder.icmp_signed("<", size, word(0x38800000)), builder.sub(subnormal, word(0x3F000000)), normal
    )
    bits = builder.select(builder.icmp_signed("<", size, word(0x47800000)), bits, word(0x7C00))
    sign = builder.and_(builder.lshr(x, word(16)), word(0x8000))
    return builder.trunc(builder.or_(bits, sign), _of(ir.IntType(16), lanes))


@intrinsic  # type: ignore[untyped-decorator]
def scaled(typingctx: Any, a: Any, pixel: Any, b: Any) -> Any:
    """`a * pixel + b` in float32, of a uint8; fused or not as the processor likes: the bits are the same."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return _scaled(builder, *arguments)

    return types.float32(types.float32, types.uint8, types.float32), generate


@intrinsic  # type: ignore[untyped-decorator]
def bfloat16_bits(typingctx: Any, value: Any) -> Any:
    """Round a float32 to bfloat16, nearest and ties to even (no NaN)."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return round_bfloat16(builder, *arguments)

    return types.uint16(types.float32), generate


@intrinsic  # type: ignore[untyped-decorator]
def float16_bits(typingctx: Any, value: Any) -> Any:
    """Round a float32 to float16, nearest and ties to even (no NaN)."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return _float16(builder, *arguments)

    return types.uint16(types.float32), generate


def _streamer(lanes: int, rounded: Callable[..., Any] | None) -> Any:
    """An intrinsic (out, a, pixels, b), addresses: `lanes` elements of `a * pixels + b`, written past the cache.

    `out` is a multiple of 32, and 32 bytes are written, which other threads see after the next `fetch_add`.
    """

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        def load(address: Any, kind: Any, align: int) -> Any:
            return builder.load(builder.inttoptr(address, ir.VectorType(kind, lanes).as_pointer()), align=align)

        out, a, pixels, b = arguments
        a, b = load(a, ir.FloatType(), 4), load(b, ir.FloatType(), 4)
        value = _scaled(builder, a, load(pixels, ir.IntType(8), 1), b, lanes)
        if rounded is not None:
            value = rounded(builder, value, lanes)
        stored = builder.store(value, builder.inttoptr(out, value.type.as_pointer()), align=32)
        stored.set_metadata("nontemporal", builder.module.add_metadata([ir.IntType(32)(1)]))
        return context.get_dummy_value()

    def stream(typingctx: Any, out: Any, a: Any, pixels: Any, b: Any) -> Any:
        return types.void(types.int64, types.int64, types.int64, types.int64), generate

    return intrinsic(stream)


stream8 = _streamer(8, None)
stream16_bfloat16 = _streamer(16, round_bfloat16)
stream16_float16 = _streamer(16, _float16)


@intrinsic  # type: ignore[untyped-decorator]
def prefetch(typingctx: Any, address: Any) -> Any:
    """Ask for the cache line of an address; harmless at any address."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        byte, flag = ir.IntType(8).as_pointer(), ir.IntType(32)
        kind = ir.FunctionType(ir.VoidType(), [byte, flag, flag, flag])
        function = cgutils.get_or_insert_function(builder.module, kind, "llvm.prefetch.p0")
        builder.call(function, [builder.inttoptr(arguments[0], byte), flag(0), flag(3), flag(1)])
        return context.get_dummy_value()

    return types.void(types.int64), generate


@intrinsic  # type: ignore[untyped-decorator]
def fetch_add(typingctx: Any, address: Any, amount: Any) -> Any:
    """Add to the int64 at an address, atomically; returns what it held."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        pointer = builder.inttoptr(arguments[0], ir.IntType(64).as_pointer())
        return builder.atomic_rmw("add", pointer, arguments[1], "seq_cst")

    return types.int64(types.int64, types.int64), generate
