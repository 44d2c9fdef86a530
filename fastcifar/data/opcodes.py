"""Reads the value a pickle describes without running the pickle.

Only the opcodes and names that a CIFAR batch needs are understood: Python 2's protocol 2 as published, and
what NumPy 1 and 2 write under Python 3 at protocols 2 to 5. A name such as `numpy.ndarray` is compared with
a short list and stands for a symbol: nothing is imported, looked up or called, and there is no other way
through. Work and memory are bounded by the input's size. It touches nothing but the bytes it is given, and lets the
garbage collector rest meanwhile.

    Reader(blob, source="data_batch_1").read()["data"]       # an Array, a view into blob
"""

import gc
from collections.abc import Callable
from typing import Any, ClassVar, NoReturn

from fastcifar.data.symbols import INTEGERS, NAMES, ORDERS, Array, Dtype, Name, shown
from fastcifar.errors import DataError

__all__ = ["Reader"]

_LONGEST_KEY = 255  # bytes of a key of a dict

_MAX_BYTES = 1 << 30  # CIFAR-100's training file has 155 MB, 234 MB re-pickled by Python 3 at protocol 2
_MAX_OPCODES = 600_000  # that file needs about 200,000, and 450,000 re-pickled
_MAX_MEMO = 300_000  # that file needs about 50,000, and 150,000 re-pickled
_MAX_MARKS = 16  # nested marks; a batch needs 3
_MAX_NAME = 64  # bytes in one half of a GLOBAL


class Reader:
    """One pass over one pickle.

    Args:
        blob: the pickle.
        source: its name, for messages.
    """

    def __init__(self, blob: bytes | memoryview, *, source: str) -> None:
        self._view = memoryview(blob).cast("B").toreadonly()
        self._source = source
        self._position = 0
        self._stack: list[Any] = []
        self._below: list[list[Any]] = []  # the stack under each open mark
        self._memo: dict[int, Any] = {}
        self._encoded = 0

    def read(self) -> dict[str, Any]:
        """The dict that the pickle describes: keys as str; integers, text, bytes, lists, tuples and `Array`.

        Raises:
            DataError: it is malformed, over budget, or asks for anything that a CIFAR batch does not need.
        """
        # Half a million values, one in another, let the collector go through all that the process has again and again:
        # 0.9 s, or 2 in a large one, that took 0.3. Nothing here makes garbage that waits for it.
        collects = gc.isenabled()
        gc.disable()
        try:
            return self._read()
        finally:
            if collects:
                gc.enable()

    def _read(self) -> dict[str, Any]:
        view, actions = self._view, self._ACTIONS
        if len(view) > _MAX_BYTES:
            self._fail(f"has {len(view)} bytes, more than the {_MAX_BYTES} allowed")
        if len(view) < 3 or view[0] != 0x80 or not 2 <= view[1] <= 5:
            self._fail("is not a pickle of protocol 2 to 5")
        self._position = 2
        for _ in range(_MAX_OPCODES):
            opcode = self._take(1)[0]
            if opcode == 0x2E:  # STOP
                break
            action = actions.get(opcode)
            if action is None:
                self._fail(f"opcode 0x{opcode:02x} does not belong in a CIFAR batch; nothing was run")
            action(self)
        else:
            self._fail(f"has more than the {_MAX_OPCODES} opcodes allowed")
        if self._position != len(self._view):
            self._fail(f"{len(self._view) - self._position} bytes follow its end")
        value = self._pop()
        if self._stack or self._below:
            self._fail("ends with values left over")
        if not isinstance(value, dict):
            self._fail(f"holds {shown(value)}, not a dict")
        return value

    def _fail(self, what: str) -> NoReturn:
        raise DataError(f"{self._source}: {what} (byte {self._position} of its pickle)") from None

    # --- bytes -----------------------------------------------------------------------------------------

    def _take(self, count: int) -> memoryview:
        start = self._position
        end = start + count
        if end > len(self._view):
            self._fail(f"ends early: {count} bytes are wanted and {len(self._view) - start} are left")
        self._position = end
        return self._view[start:end]

    def _number(self, size: int, *, signed: bool = False) -> int:
        return int.from_bytes(self._take(size), "little", signed=signed)

    def _sized(self, size: int, *, signed: bool = False) -> memoryview:
        length = self._number(size, signed=signed)
        if length < 0:
            self._fail(f"a length is negative: {length}")
        return self._take(length)

    def _long(self) -> int:
        size = self._take(1)[0]
        if size > 8:
            self._fail(f"an integer has {size} bytes, more than the 8 allowed")
        return self._number(size, signed=True)

    def _decode(self, raw: bytes | memoryview) -> str:
        try:
            return str(raw, "utf-8")
        except UnicodeDecodeError:
            self._fail("text is not UTF-8")

    def _line(self) -> str:
        window = bytes(self._view[self._position : self._position + _MAX_NAME + 1])
        length = window.find(b"\n")
        if length < 0:
            self._fail(f"a name has no end within {_MAX_NAME} bytes")
        self._position += length + 1
        return self._decode(window[:length])

    # --- stack and memo --------------------------------------------------------------------------------

    def _pop(self) -> Any:
        if not self._stack:
            self._fail("takes a value from an empty stack")
        return self._stack.pop()

    def _top(self) -> Any:
        if not self._stack:
            self._fail("changes a value on an empty stack")
        return self._stack[-1]

    def _mark(self) -> None:
        if len(self._below) == _MAX_MARKS:
            self._fail(f"has more than the {_MAX_MARKS} nested marks allowed")
        self._below.append(self._stack)
        self._stack = []

    def _pop_mark(self) -> list[Any]:
        if not self._below:
            self._fail("goes back to a mark that is not there")
        items, self._stack = self._stack, self._below.pop()
        return items

    def _put(self, index: int) -> None:
        if len(self._memo) >= _MAX_MEMO:
            self._fail(f"has more than the {_MAX_MEMO} memo entries allowed")
        self._memo[index] = self._top()

    def _get(self, index: int) -> None:
        if index not in self._memo:
            self._fail(f"memo entry {index} is not there")
        self._stack.append(self._memo[index])

    def _push(self, value: Any) -> None:
        self._stack.append(value)

    def _push_tuple(self, size: int) -> None:
        if len(self._stack) < size:
            self._fail("takes a value from an empty stack")
        self._stack[-size:] = [tuple(self._stack[-size:])]

    def _append(self, items: list[Any]) -> None:
        target = self._top()
        if not isinstance(target, list):
            self._fail(f"appends to {shown(target)}")
        target.extend(items)

    def _set(self, items: list[Any]) -> None:
        target = self._top()
        if not isinstance(target, dict) or len(items) % 2:
            self._fail(f"sets {len(items)} keys and values of {shown(target)}")
        for key, value in zip(items[::2], items[1::2], strict=True):
            # longer ones may come again and again from the memo, and each time they would be decoded anew
            name = self._decode(key) if isinstance(key, bytes) and len(key) <= _LONGEST_KEY else key
            if not isinstance(name, str):
                self._fail(f"a key is {shown(key)}, not text")
            if name in target:
                self._fail(f"key {shown(name)} occurs twice")
            target[name] = value

    # --- names and what is done with them --------------------------------------------------------------

    def _name(self, module: object, name: object) -> None:
        known = NAMES.get((module, name)) if isinstance(module, str) and isinstance(name, str) else None
        if known is None:
            self._fail(
                f"refers to {shown(module)} {shown(name)}, which does not belong in a CIFAR batch; nothing was run"
            )
        self._stack.append(known)

    def _stack_global(self) -> None:
        name = self._pop()
        self._name(self._pop(), name)

    def _reduce(self) -> None:
        arguments, function = self._pop(), self._pop()
        match function, arguments:
            case Name.RECONSTRUCT, (Name.NDARRAY, (0,), _):
                self._push(Array())
            case Name.FROMBUFFER, (bytes() | memoryview() as raw, Dtype() as dtype, shape, "C" | "F" as order):
                self._push(Array(dtype, self._shape(shape), memoryview(raw), order == "F"))
            case Name.DTYPE, (str() | bytes() as code, _, _):
                text = code if isinstance(code, str) else self._decode(code)
                if text not in INTEGERS:
                    self._fail(f"dtype {shown(text)} is not one of the integer types")
                self._push(Dtype(text))
            case Name.ENCODE, (str() as text, "latin1"):
                self._push(self._encode(text))
            case _:
                self._fail(f"applies {shown(function)} to {shown(arguments)} in a way that no CIFAR batch does")

    def _encode(self, text: str) -> bytes:
        # the same text can be encoded again and again through the memo: its bytes are counted each time
        self._encoded += len(text)
        if self._encoded > len(self._view):
            self._fail("encodes more bytes than it holds")
        try:
            return text.encode("latin1")
        except UnicodeEncodeError:
            self._fail("bytes are written with a character above 255")

    def _build(self) -> None:
        state, target = self._pop(), self._top()
        match target, state:
            case Dtype(order=None), (int(), str() | bytes() as raw_order, *rest) if len(rest) <= 6:
                order = raw_order if isinstance(raw_order, str) else self._decode(raw_order)
                # fields, sub-arrays, metadata: none of an integer type's business
                if order not in ORDERS or not all(v is None or (isinstance(v, int) and -1 <= v <= 8) for v in rest):
                    self._fail("a dtype is not a plain integer type")
                target.order = order
            case Array(raw=None), (1, shape, Dtype() as dtype, fortran, bytes() | memoryview() as raw):
                target.dtype, target.shape = dtype, self._shape(shape)
                target.fortran, target.raw = bool(fortran), memoryview(raw)
            case _:
                self._fail(f"gives {shown(target)} a state that no CIFAR batch does")

    def _shape(self, shape: object) -> tuple[int, ...]:
        if not isinstance(shape, tuple) or not 1 <= len(shape) <= 2:
            self._fail(f"an array's shape is {shown(shape)}, not one or two lengths")
        if not all(type(side) is int and 0 <= side <= _MAX_BYTES for side in shape):
            self._fail("an array's shape holds something else than lengths")
        return shape

    _ACTIONS: ClassVar[dict[int, Callable[["Reader"], object]]] = {
        ord("K"): lambda r: r._push(r._take(1)[0]),
        ord("M"): lambda r: r._push(r._number(2)),
        ord("J"): lambda r: r._push(r._number(4, signed=True)),
        0x8A: lambda r: r._push(r._long()),  # LONG1
        ord("N"): lambda r: r._push(None),
        0x88: lambda r: r._push(True),
        0x89: lambda r: r._push(False),
        ord("U"): lambda r: r._push(bytes(r._sized(1))),  # SHORT_BINSTRING
        ord("T"): lambda r: r._push(r._sized(4, signed=True)),  # BINSTRING
        ord("C"): lambda r: r._push(bytes(r._sized(1))),  # SHORT_BINBYTES
        ord("B"): lambda r: r._push(r._sized(4)),  # BINBYTES
        0x8E: lambda r: r._push(r._sized(8)),  # BINBYTES8
        0x96: lambda r: r._push(r._sized(8)),  # BYTEARRAY8
        0x8C: lambda r: r._push(r._decode(r._sized(1))),  # SHORT_BINUNICODE
        ord("X"): lambda r: r._push(r._decode(r._sized(4))),  # BINUNICODE
        0x8D: lambda r: r._push(r._decode(r._sized(8))),  # BINUNICODE8
        ord("]"): lambda r: r._push([]),
        ord("}"): lambda r: r._push({}),
        ord(")"): lambda r: r._push(()),
        ord("("): lambda r: r._mark(),
        ord("t"): lambda r: r._push(tuple(r._pop_mark())),
        0x85: lambda r: r._push_tuple(1),
        0x86: lambda r: r._push_tuple(2),
        0x87: lambda r: r._push_tuple(3),
        ord("a"): lambda r: r._append([r._pop()]),
        ord("e"): lambda r: r._append(r._pop_mark()),
        ord("s"): lambda r: r._set([r._pop(), r._pop()][::-1]),
        ord("u"): lambda r: r._set(r._pop_mark()),
        ord("q"): lambda r: r._put(r._take(1)[0]),
        ord("r"): lambda r: r._put(r._number(4)),
        0x94: lambda r: r._put(len(r._memo)),  # MEMOIZE
        ord("h"): lambda r: r._get(r._take(1)[0]),
        ord("j"): lambda r: r._get(r._number(4)),
        0x95: lambda r: r._number(8),  # FRAME: a hint for buffering
        ord("c"): lambda r: r._name(r._line(), r._line()),
        0x93: lambda r: r._stack_global(),
        ord("R"): lambda r: r._reduce(),
        ord("b"): lambda r: r._build(),
    }
