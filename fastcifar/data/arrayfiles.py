"""NumPy's .npy and .npz files to a store: read in blocks, never unpickled. Reads files, writes none.

An .npz's arrays go by their names: `images` and `labels`, or `x` and `y`, with `train`, `test` or `val` before or
after, as in `x_train` or `test_labels` (Keras' and MedMNIST's files are of that kind). Others are passed over.

    content = file_content("mnist.npz")
"""

import math
import zipfile
from collections.abc import Generator, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fastcifar.checks import check_path
from fastcifar.data.arrays import PARTS, Layout, Stored, as_nhwc, check_pair, in_memory
from fastcifar.data.content import Content, SourceFile, rows_in_a_block
from fastcifar.errors import ConfigError, DataError, one_line

__all__ = ["file_content"]

_LONGEST_HEADER = 10_000  # bytes; NumPy refuses longer ones too

_ROLES = {"images": 0, "image": 0, "x": 0, "labels": 1, "label": 1, "y": 1}
_ALIASES = {"train": "train", "test": "test", "val": "validation", "valid": "validation", "validation": "validation"}


def file_content(
    file: Path | str,
    *,
    labels: Path | str | None = None,
    classes: Sequence[str] | None = None,
    layout: Layout = "auto",
    name: str | None = None,
) -> Content:
    """What an .npz file holds, or an .npy file of images and another one of their labels.

    Args:
        file: the .npz, or the .npy of images.
        labels: the .npy of the labels, if `file` is an .npy.
        classes: K names, in label order; None for "0", "1", ... up to the largest label.
        layout: as in `convert_arrays`.
        name: of the data set; the file's, without its end, if None.

    Raises:
        ConfigError: an option is not allowed.
        DataError: the files cannot be read, or their arrays are not images and labels.
    """
    file = check_path("file", file)
    if _is_zip(file):
        if labels is not None:
            raise ConfigError(f"labels {str(labels)!r} cannot be given with {file}, which holds its own")
        pairs = _npz_pairs(file)
    else:
        if labels is None:
            raise ConfigError(f"{file} holds images alone: give their labels with --labels FILE.npy")
        pairs = {"train": (_npy(file), _npy(check_path("labels", labels)))}
    checked = {part: (stored, *check_pair(stored, targets, layout)) for part, (stored, targets) in pairs.items()}

    def files() -> Generator[SourceFile, None, None]:
        for part, (stored, arranged, numbers) in checked.items():
            start = 0
            for block in stored.blocks(rows_in_a_block(stored.shape[1:])):
                yield SourceFile(part, as_nhwc(block, arranged), numbers[start : start + len(block)])
                start += len(block)

    return Content(
        name=name or file.stem,
        classes=classes,
        splits={"full": {part: (part,) for part in checked}},
        source={"origin": str(file.absolute()), "verified": True},
        files=files(),
        total=sum(stored.shape[0] for stored, _, _ in checked.values()),
    )


def _npy(file: Path) -> Stored:
    try:
        array = np.load(file, mmap_mode="r", allow_pickle=False)
    except OSError as error:
        raise DataError(f"{file}: cannot be read: {error.strerror or error}") from None
    except Exception as error:  # see _line
        raise DataError(f"{file}: is no intact .npy file: {_line(error)}") from None
    if not isinstance(array, np.ndarray):
        raise DataError(f"{file}: is no .npy file")
    return in_memory(str(file), array)


def _is_zip(file: Path) -> bool:
    try:
        with open(file, "rb") as handle:
            start = handle.read(6)
    except OSError as error:
        raise DataError(f"{file}: cannot be read: {error.strerror or error}") from None
    if start.startswith(b"PK"):
        return True
    if start != b"\x93NUMPY":
        raise DataError(f"{file}: is neither an .npz nor an .npy file")
    return False


def _npz_pairs(file: Path) -> dict[str, tuple[Stored, Stored]]:
    """Images and labels of each part."""
    try:
        with zipfile.ZipFile(file) as archive:
            names = [name.removesuffix(".npy") for name in archive.namelist() if name.endswith(".npy")]
    except Exception as error:  # see _line
        raise DataError(f"{file}: is no intact .npz file: {_line(error)}") from None
    found: dict[str, dict[int, str]] = {}
    for name in names:
        words = name.lower().split("_")
        parts = [_ALIASES[word] for word in words if word in _ALIASES]
        roles = [_ROLES[word] for word in words if word in _ROLES]
        if len(roles) == 1 and len(parts) == len(words) - 1 <= 1:
            pair = found.setdefault(parts[0] if parts else "train", {})
            if roles[0] in pair:
                raise DataError(f"{file}: {pair[roles[0]]!r} and {name!r} mean the same")
            pair[roles[0]] = name
    if "train" not in found or any(len(pair) < 2 for pair in found.values()):
        raise DataError(
            f"{file}: holds {one_line(', '.join(names)) or 'no arrays'}; expected images and labels, or train_images, "
            "train_labels, test_images, ... or x_train, y_train, ..."
        )
    return {
        part: (_npz_member(file, found[part][0]), _npz_member(file, found[part][1])) for part in PARTS if part in found
    }


def _npz_member(file: Path, name: str) -> Stored:
    where = f"{file}: {name}"
    try:
        with zipfile.ZipFile(file) as archive, archive.open(f"{name}.npy") as member:
            entry = archive.getinfo(f"{name}.npy")
            if entry.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
                raise ValueError("it is packed in a way that NumPy does not use")  # and Python unpacks without bounds
            shape, dtype, start = _header(member)
            size = entry.file_size
    except Exception as error:  # see _line
        raise DataError(f"{where}: cannot be read: {_line(error)}") from None
    if start + math.prod(shape) * dtype.itemsize != size:
        raise DataError(f"{where}: has {size} bytes, which do not fit its shape {list(shape)}")

    def blocks(rows: int) -> Iterator[NDArray[Any]]:
        step = math.prod(shape[1:]) * dtype.itemsize
        try:
            with zipfile.ZipFile(file) as archive, archive.open(f"{name}.npy") as member:
                _header(member)
                for row in range(0, shape[0], rows):
                    count = min(rows, shape[0] - row)
                    content = member.read(count * step)
                    if len(content) != count * step:
                        raise EOFError("it is cut short")
                    yield np.frombuffer(content, dtype).reshape(count, *shape[1:])
                member.read(1)  # at its end, the checksum is compared
        except Exception as error:  # see _line
            raise DataError(f"{where}: cannot be read: {_line(error)}") from None

    return Stored(where, shape, dtype, blocks)


def _header(member: Any) -> tuple[tuple[int, ...], np.dtype[Any], int]:
    """An .npy header's shape and type, and its length."""
    version = np.lib.format.read_magic(member)
    if version not in ((1, 0), (2, 0)):
        raise ValueError(f"its format has version {version}")
    if version == (2, 0) and int.from_bytes(member.peek(4)[:4], "little") > _LONGEST_HEADER:
        raise ValueError("its header is too long")  # NumPy would read it, and then say so
    read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
    shape, fortran, dtype = read(member)
    if dtype.hasobject or not shape or min(shape) < 0:
        raise ValueError(f"it holds {dtype} of shape {list(shape)}")
    if fortran and len(shape) > 1:
        raise ValueError("it is in Fortran order: save np.ascontiguousarray of it")
    return shape, dtype, member.tell()


def _line(error: Exception) -> str:
    """What went wrong. A damaged file raises nearly anything: zlib's, zipfile's and even the tokenizer's own errors."""
    return one_line(error) or type(error).__name__
