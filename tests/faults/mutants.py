"""Bad inputs made of good ones: bytes that are flipped, cut, put in and spliced, and JSON values of other kinds.

mutant(random.Random("tar 7"), [good, another])      # the same bytes each time
"""

import json
import random
from collections.abc import Sequence
from typing import Any

__all__ = ["altered", "mutant"]

_PIECES = (
    *(
        b"",
        b"\0",
        b"\xff",
        b"\n",
        b"\0" * 8,
        b"\xff" * 8,
        b"\x7f" + b"\xff" * 7,
        b"-1",
        b"1e999",
        b"9" * 30,
        b"0" * 512,
    ),
    *(
        b"(" * 300,
        b"[" * 3000,
        b"{" * 100,
        b'"',
        b"'",
        b"\\",
        b"../",
        b"/etc/passwd",
        b"\xed\xa0\x80",
        b"\x1b[2J",
        b"None",
    ),
)

_DEEP = "a value in 600 lists"
_VALUES: tuple[Any, ...] = (
    *(None, True, False, 0, 1, -1, 2, 3, 255, 256, 2**31, 2**32, 2**53 + 1, 2**63 - 1, 2**63, 2**64, -(2**63), 10**400),
    *(0.0, 1.0, 1.5, -0.0, 1e308, float("nan"), float("inf"), -float("inf"), "", "a", "0", "a/b", "../x", "\0", "a\nb"),
    *("\x1b[2J", "\ud800", "train", "holdout", "images.npy", "x" * 5000, [], {}, [[]], [0], ["a"], {"a": 1}),
)


def mutant(generator: random.Random, good: Sequence[bytes]) -> bytes:
    """One of `good` with one to four changes."""
    blob = bytearray(generator.choice(good))
    for _ in range(generator.choice((1, 1, 2, 4))):
        size = len(blob)
        at = generator.randrange(size + 1)
        match generator.randrange(8):
            case 0 | 1 if size:
                blob[at % size] ^= 1 << generator.randrange(8)
            case 2 if size:
                blob[at % size] = generator.randrange(256)
            case 3:
                del blob[at:]
            case 4:
                blob[at:at] = generator.randbytes(generator.randrange(1, 20))
            case 5:
                blob[at : at + generator.choice((0, 1, 4, 8))] = generator.choice(_PIECES)
            case 6:
                del blob[at : at + generator.randrange(1, 40)]
            case _:
                other = generator.choice(good)
                start = generator.randrange(len(other) + 1)
                blob[at : at + generator.choice((0, 8, size))] = other[start : start + generator.choice((8, 64, size))]
    return bytes(blob)


def altered(generator: random.Random, text: str) -> Any:
    """A JSON text's value with one to three of its parts replaced, left out, renamed, moved or given twice."""
    value = json.loads(text)
    for _ in range(generator.choice((1, 1, 1, 2, 3))):
        places = _places(value)
        if not places:
            break
        parent, key = generator.choice(places)
        match generator.randrange(8):
            case 0:
                del parent[key]
            case 1 if isinstance(parent, dict):
                parent[generator.choice(("", "a\nb", "train", "\ud800", *parent))] = parent.pop(key)
            case 1:
                parent.insert(key, parent[key])
            case 2 | 3:
                other, place = generator.choice(places)
                parent[key] = json.loads(json.dumps(other[place]))
            case 4 if isinstance(parent[key], int | float):
                parent[key] = generator.choice(
                    (parent[key] - 1, parent[key] + 1, parent[key] * 2, -parent[key], 10**20)
                )
            case _:
                parent[key] = generator.choice(_VALUES) if generator.random() < 0.97 else _DEEP
        value = json.loads(json.dumps(value))  # no part is another one from here on
    return json.loads(json.dumps(value).replace(json.dumps(_DEEP), "[" * 600 + "]" * 600))


def _places(value: Any) -> list[tuple[Any, Any]]:
    """Each part of a JSON value, as what holds it and its key or index; the outer ones come up more often."""
    found, waiting = [], [(value, 0)]
    while waiting:
        holder, depth = waiting.pop()
        if depth > 20 or not isinstance(holder, dict | list):
            continue
        for key in holder if isinstance(holder, dict) else range(len(holder)):
            found += [(holder, key)] * (3 if depth == 0 else 1)
            waiting.append((holder[key], depth + 1))
    return found
