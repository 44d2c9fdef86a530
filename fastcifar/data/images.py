"""One image file to pixels, and blocks of them; also what each decoding process runs. Reads files, writes none.

Pixels are those of the file, as torchvision's ImageFolder gives them: alpha is dropped, a palette is looked up, CMYK is
converted by Pillow, an animation gives its first frame, and the EXIF orientation counts only where it is asked for.

    how = Decoding(size=(32, 32), channels=3, resize="crop", upright=False)
    decode_block(["cat/1.jpg", "cat/2.png"], how).images        # uint8[2, 32, 32, 3]
"""

import contextlib
import dataclasses
import json
import logging
import os
import stat
import sys
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageFile, ImageOps, UnidentifiedImageError

__all__ = [
    "EXTENSIONS",
    "Decoded",
    "Decoding",
    "Failure",
    "Resize",
    "decode_block",
    "is_grey",
    "peek",
    "pixels",
    "serve",
]

EXTENSIONS = (".jpg", ".jpeg", ".png", ".ppm", ".pgm", ".bmp", ".tif", ".tiff", ".webp", ".gif")
"""Ends of names, in lower case, of what is taken for an image: torchvision's, and GIF."""
Resize = Literal["crop", "squash"]

_FORMATS = ("JPEG", "PNG", "PPM", "BMP", "TIFF", "WEBP", "GIF")
_GREY = ("1", "L", "LA", "La")
_DEEP = ("I", "F", "I;16", "I;16L", "I;16B", "I;16N")  # Pillow would cut these off at 255
_KEPT = 24 << 20  # bytes; glibc takes 32 MB at most
_MOST_PIXELS = 1 << 26  # of a source image; three quarters of where Pillow begins to warn of a bomb


@dataclass(frozen=True, kw_only=True)
class Decoding:
    """How files become pixels.

    Attributes:
        size: (H, W) of each image.
        channels: 1 for grey, 3 for RGB.
        resize: how an image of another size gets there: "crop" scales the shorter side and cuts off what is too much of
            the longer one, evenly; "squash" scales both; None refuses it.
        upright: turn an image as its EXIF orientation says.
    """

    size: tuple[int, int]
    channels: int
    resize: Resize | None
    upright: bool


@dataclass(frozen=True)
class Failure:
    """An image that could not be had: its place in the block, and why, in words.

    `fits` is False for a good image of another size than all must have.
    """

    index: int
    reason: str
    fits: bool = True


@dataclass(frozen=True)
class Decoded:
    """A block: uint8[n, H, W, C] of the images that could be read, in order, and the others."""

    images: NDArray[np.uint8]
    failures: tuple[Failure, ...]


class _RefusedError(ValueError):
    """Why an image is not taken, in words."""


class _SizeError(_RefusedError):
    """An image has another size than all must have."""


def pixels(image: Image.Image, channels: int) -> NDArray[np.uint8]:
    """A Pillow image as uint8[H, W, C].

    Raises:
        ValueError: it has more than 8 bits a channel.
    """
    _refuse_deep(image)
    return np.asarray(_converted(image, channels)).reshape(image.height, image.width, channels)


def is_grey(image: Image.Image) -> bool:
    """Whether a Pillow image has no colour, by its mode."""
    return image.mode in _GREY


def peek(path: str, *, upright: bool, whole: bool = False) -> tuple[tuple[int, int], bool] | None:
    """An image's (H, W) and whether it is grey, from its header; None if that, or all of it, cannot be read."""
    with _strict():
        try:
            with _opened(path, upright=upright) as image:
                if whole:
                    image.load()
                return (image.height, image.width), is_grey(image)
        except Exception:  # decoding says what is wrong with it
            return None


def decode_block(paths: Sequence[str], how: Decoding) -> Decoded:
    """Read some images; the same files give the same bytes, in any process."""
    images = np.empty((len(paths), *how.size, how.channels), np.uint8)
    failures = []
    count = 0
    with _strict():
        for index, path in enumerate(paths):
            try:
                images[count] = _decode(path, how)
            except Exception as error:  # a hostile file may raise anything, MemoryError included
                failures.append(Failure(index, _words(error), not isinstance(error, _SizeError)))
            else:
                count += 1
    return Decoded(images[:count], tuple(failures))


def keep_freed_memory() -> None:
    """Let the next image have the last one's memory, instead of pages that the kernel must clear first.

    glibc gives large blocks back at once, until one of a size has been freed: from then on it keeps twice as much.
    Measured on 500x375 JPEGs: 2.7 ms of processor time an image without it, 1.9 with. Elsewhere it does nothing.
    """
    np.empty(_KEPT, np.uint8)


def serve() -> None:
    """Decode what is asked for on standard input, to standard output, until that is closed.

    A request is a line of JSON, {"paths": [...], "how": {...}}; the answer is a line, {"count": n, "failures": [...]},
    and the images' bytes.
    """
    keep_freed_memory()
    asked, out = sys.stdin.buffer, sys.stdout.buffer
    for line in asked:
        request = json.loads(line)
        how = Decoding(**{**request["how"], "size": tuple(request["how"]["size"])})
        found = decode_block(request["paths"], how)
        answer = {"count": len(found.images), "failures": [dataclasses.astuple(one) for one in found.failures]}
        out.write(json.dumps(answer).encode() + b"\n")
        out.write(found.images.data)
        out.flush()


@contextlib.contextmanager
def _strict() -> Iterator[None]:
    """Let Pillow refuse files that are cut short, whatever the program around has set, and say nothing itself."""
    lenient, ImageFile.LOAD_TRUNCATED_IMAGES = ImageFile.LOAD_TRUNCATED_IMAGES, False
    log = logging.getLogger("PIL")
    level = log.level
    log.setLevel(logging.CRITICAL + 1)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        log.setLevel(level)
        ImageFile.LOAD_TRUNCATED_IMAGES = lenient


@contextlib.contextmanager
def _opened(path: str, *, upright: bool) -> Iterator[Image.Image]:
    # before it is opened: a FIFO would make that wait for ever
    status = os.stat(path)
    if not stat.S_ISREG(status.st_mode):
        raise _RefusedError("is no regular file")
    if status.st_size == 0:
        raise _RefusedError("is empty")
    with open(path, "rb") as file, Image.open(file, formats=_FORMATS) as image:
        if image.width * image.height > _MOST_PIXELS:
            raise _RefusedError(f"claims {image.width} x {image.height} pixels, more than the {_MOST_PIXELS:,} allowed")
        _refuse_deep(image)
        yield ImageOps.exif_transpose(image) if upright else image


def _refuse_deep(image: Image.Image) -> None:
    """Raise where a channel has more than 8 bits: in the image, or in the file that it is still to be loaded from."""
    found = f"Pillow's mode {image.mode}" if image.mode in _DEEP else _deep_format(image)
    if found is not None:
        raise _RefusedError(f"has more than 8 bits a pixel and channel ({found}): convert it first")


def _deep_format(image: Image.Image) -> str | None:
    """How an image's file has more than 8 bits a channel, where its mode does not tell: Pillow cuts colour off to 8."""
    for codec, _, _, args in getattr(image, "tile", ()):
        parts = args if isinstance(args, tuple) else (args,)
        if codec in ("ppm", "ppm_plain") and isinstance(parts[-1], int) and parts[-1] > 255:
            return f"values up to {parts[-1]}"
        for raw in parts:
            if isinstance(raw, str) and ";16" in raw and not raw.startswith("BGR"):  # BGR;16 is of 5, 6 and 5 bits
                return raw
    return None


def _decode(path: str, how: Decoding) -> NDArray[np.uint8]:
    with _opened(path, upright=how.upright) as opened:
        image = _converted(opened, how.channels)
    height, width = how.size
    if image.size != (width, height):
        if how.resize is None:
            raise _SizeError(f"is {image.height} x {image.width} pixels, those before are {height} x {width}")
        if how.resize == "crop":
            image = ImageOps.fit(image, (width, height), Image.Resampling.BILINEAR)
        else:
            image = image.resize((width, height), Image.Resampling.BILINEAR)
    return np.asarray(image).reshape(height, width, how.channels)


def _converted(image: Image.Image, channels: int) -> Image.Image:
    return image.convert("L" if channels == 1 else "RGB")


def _words(error: Exception) -> str:
    """One line, without the path, which the reader is told anyway."""
    if isinstance(error, _RefusedError):
        return str(error)
    if isinstance(error, UnidentifiedImageError):
        return f"is no image of a kind that can be read ({', '.join(_FORMATS)})"
    if isinstance(error, Image.DecompressionBombError):
        return f"claims more than the {_MOST_PIXELS:,} pixels allowed"
    if isinstance(error, OSError) and error.errno is not None:
        return f"cannot be read: {error.strerror}"
    return f"is damaged: {' '.join(str(error).split()) or type(error).__name__}"
