"""Attacks on the batch reader: each ends in a DataError, and nothing is imported, called, opened or run."""

import os
import pickle
import re
import struct
import time
import tracemalloc
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fastcifar.data import opcodes
from fastcifar.data.pickles import PickledBatch, read_batch, read_label_names
from fastcifar.errors import DataError
from tests.cifar_files import batch_pickle, meta_pickle
from tests.effort import effort
from tests.faults.watch import events, nothing_happens


def read(blob: bytes) -> PickledBatch:
    with nothing_happens():
        return read_batch(blob, source="evil")


def refused(blob: bytes) -> str:
    """The message; checks that it comes within a second, on one line of sensible length."""
    start = time.thread_time()
    with pytest.raises(DataError) as caught:
        read(blob)
    assert time.thread_time() - start < 2  # of this thread: the machine is shared; the promise is 1 s
    message = str(caught.value)
    assert message.startswith("evil: ")
    assert message.isprintable()
    assert len(message) < 400
    return message


def test_the_watch_sees_what_a_pickle_does() -> None:
    class Evil:
        def __reduce__(self) -> tuple[Callable[[str], Any], tuple[str]]:
            return os.listdir, ("/",)

    blob = pickle.dumps(Evil(), 2)
    with pytest.raises(AssertionError), nothing_happens():
        pickle.loads(blob)
    assert any(event.startswith("os.listdir") for event in events)
    refused(blob)


def text(value: str) -> bytes:
    return b"X" + struct.pack("<I", len(value.encode())) + value.encode()


IMAGES = np.full((2, 3072), 7, np.uint8)
GOOD = batch_pickle(IMAGES, [3, 4])
ARRAY = b"cnumpy.core.multiarray\n_reconstruct\ncnumpy\nndarray\nK\x00\x85C\x01b\x87R"
DTYPE = b"cnumpy\ndtype\nX\x02\x00\x00\x00u1K\x00K\x01\x87R"
TAG = re.compile(r"does not belong in a CIFAR batch; nothing was run")

NAMES = [
    *("os system", "posix system", "nt system", "subprocess Popen", "subprocess check_output", "builtins eval"),
    *("builtins exec", "builtins getattr", "builtins __import__", "builtins open", "builtins compile"),
    *("__builtin__ eval", "__builtin__ apply", "__main__ main", "sys modules", "sys exit", "importlib import_module"),
    *("runpy run_path", "pickle loads", "_pickle loads", "marshal loads", "ctypes CDLL", "code interact"),
    *("webbrowser open", "socket socket", "urllib.request urlopen", "shutil rmtree", "pty spawn", "pdb run"),
    *("types FunctionType", "types CodeType", "functools partial", "operator attrgetter", "operator methodcaller"),
    *("copyreg _reconstructor", "copy_reg _reconstructor", "copyreg __newobj__", "collections OrderedDict"),
    *("numpy load", "numpy fromfile", "numpy memmap", "numpy frombuffer", "numpy core.multiarray._reconstruct"),
    *("numpy.core.multiarray scalar", "numpy.core.multiarray fromfile", "numpy._core.multiarray fromstring"),
    *("numpy.testing._private.utils runstring", "numpy.f2py.crackfortran getlincoef", "numpy ndarray.tofile"),
    *("numpy.core.numeric fromfile", "numpy.random._pickle __bit_generator_ctor", "numpy.distutils.exec_command run"),
    *("torch load", "torch._utils _rebuild_tensor_v2", "_codecs decode", "_codecs lookup", "codecs encode"),
    *("_codecs encode.__self__", "timeit timeit", "asyncio run", "http.server test", "smtplib SMTP", " ", "a b\x1b[2J"),
]


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("form", ["GLOBAL", "STACK_GLOBAL", "in a batch"])
def test_names_are_refused_unread(name: str, form: str) -> None:
    module, _, attribute = name.partition(" ")
    if form == "GLOBAL":
        blob = b"\x80\x02c" + f"{module}\n{attribute}\n".encode() + text("touch /tmp/owned") + b"\x85R."
    elif form == "STACK_GLOBAL":
        blob = b"\x80\x04" + text(module) + text(attribute) + b"\x93" + text("touch /tmp/owned") + b"\x85R."
    else:
        call = b"c" + f"{module}\n{attribute}\n".encode() + text("touch /tmp/owned") + b"\x85R"
        blob = GOOD[:-2] + text("extra") + call + b"u."
    message = refused(blob)
    assert TAG.search(message)
    assert repr(module) in message


OPCODES = {
    "INST": b"\x80\x02(" + text("id") + b"ios\nsystem\n.",
    "OBJ": b"\x80\x02(cos\nsystem\n" + text("id") + b"o.",
    "OBJ of ndarray": b"\x80\x02(cnumpy\nndarray\nK\x01o.",
    "NEWOBJ": b"\x80\x02cnumpy\nndarray\nK\x01\x85\x81.",
    "NEWOBJ_EX": b"\x80\x04cnumpy\nndarray\n)}\x92.",
    "PERSID": b"\x80\x02Pid\n.",
    "BINPERSID": b"\x80\x02" + text("id") + b"Q.",
    "EXT1": b"\x80\x02\x82\x01.",
    "EXT2": b"\x80\x02\x83\x01\x00.",
    "EXT4": b"\x80\x02\x84\x01\x00\x00\x00.",
    "NEXT_BUFFER": b"\x80\x05\x97.",
    "READONLY_BUFFER": b"\x80\x05C\x01a\x98.",
    "DUP": b"\x80\x02K\x012.",
    "POP": b"\x80\x02K\x010.",
    "POP_MARK": b"\x80\x02(1.",
    "STRING": b"\x80\x02S'a'\n.",
    "INT": b"\x80\x02I1\n.",
    "LONG": b"\x80\x02L1L\n.",
    "LONG4": b"\x80\x02\x8b\xff\xff\xff\x7f.",
    "FLOAT": b"\x80\x02F1.0\n.",
    "BINFLOAT": b"\x80\x02G" + bytes(8) + b".",
    "UNICODE": b"\x80\x02Va\n.",
    "GET": b"\x80\x02g0\n.",
    "PUT": b"\x80\x02K\x01p0\n.",
    "LIST": b"\x80\x02(l.",
    "DICT": b"\x80\x02(d.",
    "EMPTY_SET": b"\x80\x04\x8f.",
    "ADDITEMS": b"\x80\x04\x8f(K\x01\x90.",
    "FROZENSET": b"\x80\x04(K\x01\x91.",
    "a second PROTO": b"\x80\x02\x80\x02}.",
}


@pytest.mark.parametrize("blob", OPCODES.values(), ids=OPCODES.keys())
def test_opcodes_that_no_batch_needs_are_refused(blob: bytes) -> None:
    assert TAG.search(refused(blob))


def test_every_byte_is_an_opcode_that_is_refused_or_bounded() -> None:
    for first in range(256):
        for second in range(256):
            with pytest.raises(DataError):
                read_batch(b"\x80\x02" + bytes([first, second]), source="evil")


MALFORMED = {
    "empty": (b"", "is not a pickle of protocol 2 to 5"),
    "text": (b"<!DOCTYPE html><html>404</html>", "is not a pickle of protocol 2 to 5"),
    "protocol 0": (b"(dp0\n.", "is not a pickle of protocol 2 to 5"),
    "protocol 1": (b"\x80\x01}.", "is not a pickle of protocol 2 to 5"),
    "protocol 6": (b"\x80\x06}.", "is not a pickle of protocol 2 to 5"),
    "no STOP": (b"\x80\x02}", "ends early: 1 bytes are wanted and 0 are left"),
    "nothing at STOP": (b"\x80\x02.", "takes a value from an empty stack"),
    "two values at STOP": (b"\x80\x02}}.", "ends with values left over"),
    "open mark at STOP": (b"\x80\x02(}.", "ends with values left over"),
    "bytes after STOP": (GOOD + b"cos\nsystem\n.", "12 bytes follow its end"),
    "a list": (b"\x80\x02].", "holds a list, not a dict"),
    "an array": (b"\x80\x02" + ARRAY + b".", "holds an array, not a dict"),
    "a symbol": (b"\x80\x02cnumpy\nndarray\n.", "holds a name, not a dict"),
    "huge string": (b"\x80\x02T\xff\xff\xff\x7f.", "ends early: 2147483647 bytes are wanted"),
    "negative string": (b"\x80\x02T\xff\xff\xff\xff.", "a length is negative: -1"),
    "huge bytes": (b"\x80\x03B\xff\xff\xff\xff.", "ends early: 4294967295 bytes are wanted"),
    "huge bytes 8": (b"\x80\x04\x8e" + b"\xff" * 8 + b".", "ends early: 18446744073709551615 bytes are wanted"),
    "huge bytearray": (b"\x80\x05\x96" + b"\xff" * 8 + b".", "ends early: 18446744073709551615 bytes are wanted"),
    "huge unicode": (b"\x80\x04\x8d" + b"\xff" * 8 + b".", "ends early: 18446744073709551615 bytes are wanted"),
    "not UTF-8": (b"\x80\x02X\x01\x00\x00\x00\xff.", "text is not UTF-8"),
    "surrogates": (b"\x80\x02X\x03\x00\x00\x00\xed\xa0\x80.", "text is not UTF-8"),
    "key not UTF-8": (b"\x80\x02}U\x01\xffNs.", "text is not UTF-8"),
    "key a list": (b"\x80\x02}]Ns.", "a key is a list, not text"),
    "key an integer": (b"\x80\x02}K\x01Ns.", "a key is 1, not text"),
    "key a long string": (b"\x80\x02}T\x01\x00\x00\x00aNs.", "a key is bytes, not text"),
    "key twice": (b"\x80\x02}U\x01aNsX\x01\x00\x00\x00aNs.", "key 'a' occurs twice"),
    "odd SETITEMS": (b"\x80\x02}(U\x01au.", "sets 1 keys and values of a dict"),
    "SETITEM of a list": (b"\x80\x02]U\x01aNs.", "sets 2 keys and values of a list"),
    "APPEND to a dict": (b"\x80\x02}Na.", "appends to a dict"),
    "APPENDS to nothing": (b"\x80\x02(Ne.", "changes a value on an empty stack"),
    "APPENDS without a mark": (b"\x80\x02]e.", "goes back to a mark that is not there"),
    "TUPLE3 of two": (b"\x80\x02NN\x87.", "takes a value from an empty stack"),
    "values under a mark are out of reach": (b"\x80\x02N(\x85.", "takes a value from an empty stack"),
    "BINGET of nothing": (b"\x80\x02h\x05.", "memo entry 5 is not there"),
    "LONG_BINGET of nothing": (b"\x80\x02j\xff\xff\xff\xff.", "memo entry 4294967295 is not there"),
    "BINPUT of nothing": (b"\x80\x02q\x00.", "changes a value on an empty stack"),
    "name without an end": (b"\x80\x02c" + b"a" * 500, "a name has no end within 64 bytes"),
    "name not UTF-8": (b"\x80\x02c\xff\nb\n.", "text is not UTF-8"),
    "STACK_GLOBAL of integers": (b"\x80\x04K\x01K\x02\x93.", "refers to 1 2, which does not belong"),
    "STACK_GLOBAL of lists": (b"\x80\x04]]\x93.", "refers to a list a list, which does not belong"),
    "REDUCE of text": (b"\x80\x02U\x01a)R.", "applies bytes to a tuple"),
    "REDUCE of ndarray": (b"\x80\x02cnumpy\nndarray\n)R.", "applies a name to a tuple"),
    "dtype of objects": (b"\x80\x02cnumpy\ndtype\nX\x02\x00\x00\x00O8NN\x87R.", "dtype 'O8' is not one of"),
    "dtype with fields": (b"\x80\x02cnumpy\ndtype\n]NN\x87R.", "applies a name to a tuple"),
    "dtype of a symbol": (b"\x80\x02cnumpy\ndtype\ncnumpy\nndarray\nNN\x87R.", "applies a name to a tuple"),
    "dtype state with fields": (b"\x80\x02" + DTYPE + b"(K\x03C\x01|N)Ntb.", "a dtype is not a plain integer type"),
    "dtype state of a dict": (b"\x80\x02" + DTYPE + b"}b.", "gives a dtype a state that no CIFAR batch does"),
    "dtype state twice": (b"\x80\x02" + DTYPE + b"(K\x03C\x01|NNtb(K\x03C\x01|NNtb.", "gives a dtype a state"),
    "dtype order": (b"\x80\x02" + DTYPE + b"(K\x03C\x01xNNtb.", "a dtype is not a plain integer type"),
    "subclass of ndarray": (
        b"\x80\x02cnumpy.core.multiarray\n_reconstruct\ncnumpy\ndtype\nK\x00\x85C\x01b\x87R.",
        "applies a name to a tuple",
    ),
    "array state of a dict": (b"\x80\x02" + ARRAY + b"}b.", "gives an array a state that no CIFAR batch does"),
    "array state twice": (
        b"\x80\x02" + ARRAY + (b"(K\x01K\x01\x85" + DTYPE + b"\x89C\x01atb") * 2 + b".",
        "gives an array a state that no CIFAR batch does",
    ),
    "BUILD of a dict": (b"\x80\x02}}b.", "gives a dict a state that no CIFAR batch does"),
    "BUILD of a symbol": (b"\x80\x02cnumpy\nndarray\n}b.", "gives a name a state that no CIFAR batch does"),
    "shape of text": (b"\x80\x02" + ARRAY + b"(K\x01U\x01a" + DTYPE + b"\x89C\x01atb.", "shape is bytes, not one or"),
    "shape below zero": (
        b"\x80\x02" + ARRAY + b"(K\x01J\xff\xff\xff\xff\x85" + DTYPE + b"\x89C\x01atb.",
        "shape holds something else than lengths",
    ),
    "shape of booleans": (b"\x80\x02" + ARRAY + b"(K\x01\x88\x85" + DTYPE + b"\x89C\x01atb.", "something else than"),
    "content of objects": (b"\x80\x02" + ARRAY + b"(K\x01K\x01\x85" + DTYPE + b"\x89]tb.", "gives an array a state"),
    "encode to another codec": (
        b"\x80\x02c_codecs\nencode\n" + text("a") + text("rot13") + b"\x86R.",
        "applies a name",
    ),
    "encode a character above 255": (
        b"\x80\x02c_codecs\nencode\n" + text("\u0100") + text("latin1") + b"\x86R.",
        "bytes are written with a character above 255",
    ),
}


@pytest.mark.parametrize(("blob", "message"), MALFORMED.values(), ids=MALFORMED.keys())
def test_malformed_pickles_are_explained(blob: bytes, message: str) -> None:
    assert message in refused(blob)


def array(rows: bytes, columns: bytes, content: bytes) -> bytes:
    state = b"(K\x01" + rows + columns + b"\x86" + DTYPE + b"(K\x03C\x01|NNNK\x00K\x00K\x00tb\x89" + content + b"tb"
    return b"\x80\x02}(U\x06labels]U\x04data" + ARRAY + state + b"u."


def test_shapes_that_do_not_fit_their_bytes_are_refused() -> None:
    huge = b"J" + struct.pack("<i", 1 << 30)
    assert "'data' has shape (1073741824, 1073741824) of u1, but 1 bytes" in refused(array(huge, huge, b"C\x01a"))
    assert "'data' has shape (2, 3) of u1, but 5 bytes" in refused(array(b"K\x02", b"K\x03", b"C\x05abcde"))
    assert "'data' has shape (0, 3072), expected" in refused(array(b"K\x00", b"M\x00\x0c", b"C\x00"))
    assert "'data' has no content" in refused(b"\x80\x02}(U\x06labels]U\x04data" + ARRAY + b"u.")
    assert "shape holds something else" in refused(array(b"\x8a\x08" + b"\xff" * 7 + b"\x7f", b"K\x01", b"C\x01a"))


BOMBS = {
    "opcodes": (b"\x80\x02" + b"N" * 700_000 + b".", "more than the 600000 opcodes"),
    "marks": (b"\x80\x02" + b"(" * 500_000 + b".", "more than the 16 nested marks"),
    "memo": (b"\x80\x04N" + b"\x94" * 500_000 + b".", "more than the 300000 memo entries"),
    "nested tuples": (b"\x80\x02)" + b"\x85" * 500_000 + b".", "holds a tuple, not a dict"),
    "nested lists": (b"\x80\x02" + b"]" * 250_000 + b"a" * 249_999 + b".", "holds a list, not a dict"),
    "a deep value": (b"\x80\x02}U\x04deep)" + b"\x85" * 500_000 + b"s.", "key 'data' is missing; its keys are 'deep'"),
    "a list in itself": (b"\x80\x02}U\x06labels]q\x00h\x00asU\x04datah\x00s.", "'data' is a list"),
    "doubling lists": (
        # each list holds the one before it twice: printed or copied, the last would have 2^1000 items
        b"\x80\x02}U\x04data]q\x00" + b"".join(b"](h\x00h\x00eq\x00" for _ in range(1000)),
        "ends early",
    ),
    "doubling tuples as a name": (
        b"\x80\x04)q\x00" + b"".join(b"h\x00h\x00\x86q\x00" for _ in range(1000)) + b"h\x00\x93.",
        "refers to a tuple a tuple",
    ),
    "doubling tuples as arguments": (
        b"\x80\x04)q\x00" + b"".join(b"h\x00h\x00\x86q\x00" for _ in range(1000)) + b"cnumpy\nndarray\nh\x00R.",
        "applies a name to a tuple",
    ),
    "one text encoded for ever": (
        b"\x80\x02(" + text("a" * 100_000) + b"q\x00" + text("latin1") + b"q\x01c_codecs\nencode\nq\x02"
        + b"h\x02h\x00h\x01\x86R" * 2_000 + b".",
        "encodes more bytes than it holds",
    ),
    "list with itself again and again": (b"\x80\x02]q\x00(" + b"h\x00" * 250_000 + b"e.", "holds a list, not a dict"),
}  # fmt: skip


@pytest.mark.parametrize(("blob", "message"), BOMBS.values(), ids=BOMBS.keys())
def test_bombs_are_bounded(blob: bytes, message: str) -> None:
    assert message in refused(blob)


def test_a_long_key_is_not_decoded_again_and_again() -> None:
    long = b"c_codecs\nencode\n" + text("a" * 300) + text("latin1") + b"\x86Rq\x01"
    assert "a key is" in refused(b"\x80\x02" + long + b"}h\x01Ns.")


def test_memory_is_bounded_by_the_input(monkeypatch: pytest.MonkeyPatch) -> None:
    encoding, _ = BOMBS["one text encoded for ever"]
    tracemalloc.start()
    try:
        for blob in (encoding, b"\x80\x02T\xff\xff\xff\x7f", b"\x80\x04\x8e" + b"\xff" * 7 + b"\x00"):
            tracemalloc.reset_peak()
            before = tracemalloc.get_traced_memory()[0]
            refused(blob)
            assert tracemalloc.get_traced_memory()[1] - before < 20e6
    finally:
        tracemalloc.stop()
    monkeypatch.setattr(opcodes, "_MAX_BYTES", len(GOOD) - 1)
    assert "bytes, more than the" in refused(GOOD)


def test_every_cut_is_refused() -> None:
    small = batch_pickle(IMAGES[:1], [1])
    assert read(small).labels.tolist() == [1]
    with nothing_happens():
        for end in range(len(small)):
            with pytest.raises(DataError):
                read_batch(small[:end], source="evil")
    meta = meta_pickle()
    with nothing_happens():
        for end in range(len(meta)):
            with pytest.raises(DataError, match=r"^meta: "):
                read_label_names(meta[:end], source="meta")


AGAIN = [pickle.dumps({"data": IMAGES, "labels": [3, 4], "filenames": ["a", "b"]}, protocol) for protocol in (2, 4, 5)]


def refused_or_right(blob: bytes) -> bool:
    """Read `blob`; whether it was refused. What is not refused must satisfy every promise."""
    start = time.thread_time()
    message, batch = "evil: ", None
    try:
        batch = read_batch(blob, source="evil")
    except DataError as error:
        message = str(error)
    assert time.thread_time() - start < 2
    assert message.startswith("evil: ")
    assert message.isprintable()
    if batch is not None:
        assert batch.data.shape == (2, 3072)
        assert batch.labels.shape == (2,)
        assert ((batch.labels >= 0) & (batch.labels < 10)).all()
    return batch is None


@settings(max_examples=effort(600), deadline=None)
@given(st.data())
def test_changed_bytes_are_refused_or_harmless(data: st.DataObject) -> None:
    blob = bytearray(data.draw(st.sampled_from([GOOD, *AGAIN])))
    pixels = blob.index(b"\x07" * 6144)
    structure = [*range(pixels), *range(pixels + 6144, len(blob))]  # a changed pixel proves nothing
    for _ in range(data.draw(st.integers(1, 3))):
        blob[data.draw(st.sampled_from(structure))] = data.draw(st.integers(0, 255))
    with nothing_happens():
        refused_or_right(bytes(blob))


def test_ten_thousand_changed_bytes() -> None:
    generator = np.random.default_rng(2)
    outcomes = []
    with nothing_happens():
        for blob in [GOOD, *AGAIN]:
            pixels = blob.index(b"\x07" * 6144)
            structure = np.array([*range(pixels), *range(pixels + 6144, len(blob))])
            for position in generator.choice(structure, 2500):
                changed = bytearray(blob)
                changed[position] ^= generator.integers(1, 256)
                outcomes.append(refused_or_right(bytes(changed)))
    assert len(outcomes) == 10_000
    assert 0.5 < np.mean(outcomes) < 0.99  # most are refused; a changed file name is not


PIECES = [
    *(b"(", b"]", b"}", b")", b"t", b"e", b"a", b"s", b"u", b"R", b"b", b"N", b"\x88", b"\x85", b"\x86", b"\x87"),
    *(b"q\x00", b"h\x00", b"\x94", b"K\x01", b"U\x01a", b"C\x00", b"X\x02\x00\x00\x00u1", b"cnumpy\ndtype\n"),
    *(b"cnumpy\nndarray\n", b"c_codecs\nencode\n", b"cnumpy.core.numeric\n_frombuffer\n", b"\x93", b"\x8a\x01\xff"),
    *(ARRAY, DTYPE, b"cnumpy.core.multiarray\n_reconstruct\n", b"U\x04data", b"U\x06labels", b"\x8c\x06latin1"),
]


@settings(max_examples=effort(600), deadline=None)
@given(st.lists(st.sampled_from(PIECES), max_size=40))
def test_nonsense_of_known_opcodes_is_refused(pieces: list[bytes]) -> None:
    with nothing_happens(), pytest.raises(DataError, match=r"^evil: "):
        read_batch(b"\x80\x04" + b"".join(pieces) + b".", source="evil")
