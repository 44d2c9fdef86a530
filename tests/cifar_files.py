"""Small files in CIFAR's published form, for tests: pickles of Python 2's protocol 2, and archives of them.

Written opcode by opcode, with the memo entries that Python 2's cPickle leaves, since no Python 3 writes them.

    (folder / "data_batch_1").write_bytes(batch_pickle(images, labels))
"""

import io
import struct
import tarfile
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

CLASSES = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")
FOLDER = "cifar-10-batches-py"
BATCHES = (*(f"data_batch_{k}" for k in range(1, 6)), "test_batch")


class _Writer:
    """Python 2 values as opcodes; each text, list and object is put in the memo, as cPickle does."""

    def __init__(self) -> None:
        self.count = 0

    def put(self) -> bytes:
        self.count += 1
        return b"q" + bytes([self.count]) if self.count < 256 else b"r" + struct.pack("<I", self.count)

    def text(self, value: bytes) -> bytes:
        head = b"U" + bytes([len(value)]) if len(value) < 256 else b"T" + struct.pack("<i", len(value))
        return head + value + self.put()

    @staticmethod
    def integer(value: int) -> bytes:
        if 0 <= value < 256:
            return b"K" + bytes([value])
        return b"M" + struct.pack("<H", value) if 0 <= value < 65536 else b"J" + struct.pack("<i", value)

    def value(self, value: object) -> bytes:
        if isinstance(value, bytes):
            return self.text(value)
        if isinstance(value, int):
            return self.integer(value)
        if isinstance(value, np.ndarray):
            return self.array(value)
        assert isinstance(value, list)
        out = b"]" + self.put()
        for start in range(0, len(value), 1000):  # cPickle appends a thousand at a time
            out += b"(" + b"".join(map(self.value, value[start : start + 1000])) + b"e"
        return out

    def array(self, value: NDArray[np.uint8]) -> bytes:
        out = b"cnumpy.core.multiarray\n_reconstruct\n" + self.put() + b"cnumpy\nndarray\n" + self.put()
        out += b"K\x00\x85" + self.put() + self.text(b"b") + b"\x87" + self.put() + b"R" + self.put()
        shape = b"".join(map(self.integer, value.shape))
        out += b"(K\x01" + (shape + b"\x86" if value.ndim == 2 else b"(" + shape + b"t") + self.put()
        out += b"cnumpy\ndtype\n" + self.put() + self.text(value.dtype.str[1:].encode())
        out += b"K\x00K\x01\x87" + self.put() + b"R" + self.put()
        out += b"(K\x03" + self.text(value.dtype.str[:1].encode()) + b"NNNJ\xff\xff\xff\xffJ\xff\xff\xff\xffK\x00t"
        return out + self.put() + b"b\x89" + self.text(value.tobytes()) + b"t" + self.put() + b"b"


def py2_pickle(fields: Mapping[str, object]) -> bytes:
    """A dict of bytes, integers, uint8 arrays and lists of them, as Python 2 pickled it."""
    writer = _Writer()
    out = b"\x80\x02}" + writer.put() + b"("
    return out + b"".join(writer.text(key.encode()) + writer.value(value) for key, value in fields.items()) + b"u."


def batch_pickle(
    images: NDArray[np.uint8],
    labels: Sequence[int],
    *,
    label_key: str = "labels",
    batch_label: str = "training batch 1 of 5",
    filenames: Sequence[str] | None = None,
) -> bytes:
    """A batch file. `images` is uint8[N, 3072]; file names are made up unless given."""
    names = filenames if filenames is not None else [f"image_s_{i:06d}.png" for i in range(len(labels))]
    return py2_pickle(
        {
            "batch_label": batch_label.encode(),
            label_key: [int(label) for label in labels],
            "data": np.asarray(images, np.uint8),
            "filenames": [name.encode() for name in names],
        }
    )


def meta_pickle(names: Sequence[str] = CLASSES, *, key: str = "label_names") -> bytes:
    """A meta file: the names of the classes."""
    return py2_pickle({"num_cases_per_batch": 10000, key: [name.encode() for name in names], "num_vis": 3072})


def write_archive(path: Path, members: Mapping[str, bytes], *, folder: str = FOLDER) -> Path:
    """A .tar.gz whose `folder` holds `members`, in their order."""
    with tarfile.open(path, "w:gz", compresslevel=1, format=tarfile.GNU_FORMAT) as archive:
        entry = tarfile.TarInfo(folder)
        entry.type, entry.mode = tarfile.DIRTYPE, 0o755
        archive.addfile(entry)
        for name, content in members.items():
            entry = tarfile.TarInfo(f"{folder}/{name}")
            entry.size = len(content)
            archive.addfile(entry, io.BytesIO(content))
    return path


def tiny_members(per_file: int = 20, seed: int = 0) -> dict[str, bytes]:
    """CIFAR-10's seven files with `per_file` images each: noise, brighter for each class so that nets can learn."""
    generator = np.random.default_rng(seed)
    members = {"batches.meta": meta_pickle()}
    for name in BATCHES:
        labels = generator.permutation(np.arange(per_file) % 10)
        images = generator.integers(0, 76, (per_file, 3072)) + 20 * labels[:, None]
        members[name] = batch_pickle(images.astype(np.uint8), labels.tolist(), batch_label=f"batch {name}")
    return members


def tiny_cifar10(path: Path, *, per_file: int = 20, seed: int = 0) -> Path:
    """A tiny CIFAR-10 at `path`: an archive if its name ends in .tar.gz, else a folder that is made."""
    members = tiny_members(per_file, seed)
    if path.name.endswith(".tar.gz"):
        return write_archive(path, members)
    path.mkdir(parents=True, exist_ok=True)
    for name, content in members.items():
        (path / name).write_bytes(content)
    return path
