"""The data sets known by name, and the one way to open any of them.

A data set is fetched and converted once, to `HOME/stores/NAME-CHECKSUM`; after that, opening it reads a
manifest and maps two files.

    store = open_store("digits")
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import filelock
import numpy as np
from numpy.typing import NDArray

from fastcifar.data import archive, pickles
from fastcifar.data.download import Progress
from fastcifar.data.home import VARIABLE, find_home
from fastcifar.data.store import ArrayStore
from fastcifar.data.writer import SourceFile, write_store
from fastcifar.errors import ConfigError, OutputError
from fastcifar.publish import remove_stale

__all__ = ["DATASETS", "CifarDataset", "DigitsDataset", "open_store"]

Splits = Mapping[str, Mapping[str, Sequence[str]]]

_SIDE = 32


def _no_progress(done: int, total: int | None) -> None:
    return None


@dataclass(frozen=True, kw_only=True)
class CifarDataset:
    """A data set in the form of CIFAR's Python archives.

    `parts` cuts a file into equal pieces with names of their own, which `splits` refers to.
    """

    spec: archive.ArchiveSpec
    meta: str
    names_key: str
    label_key: str
    classes: int
    parts: Mapping[str, tuple[str, ...]]
    splits: Splits

    def read(self, source: archive.Source, progress: Progress) -> tuple[tuple[str, ...], Iterator[SourceFile]]:
        """The class names, and each file's images as they are asked for."""
        order = (self.meta, *(name for name in self.spec.members if name != self.meta))
        members = _in_order(source.members(), order)
        _, meta = next(members)
        names = pickles.read_label_names(
            meta, source=f"{source.path}: {self.meta}", key=self.names_key, classes=self.classes
        )
        return names, self._files(members, source.path, progress)

    def _files(self, members: Iterator[tuple[str, bytes]], path: Path, progress: Progress) -> Iterator[SourceFile]:
        done = 0
        for name, blob in members:
            batch = pickles.read_batch(blob, source=f"{path}: {name}", label_key=self.label_key, classes=self.classes)
            # a row is three planes of 32x32: R, G, B
            images = batch.data.reshape(-1, 3, _SIDE, _SIDE).transpose(0, 2, 3, 1)
            pieces = self.parts.get(name, (name,))
            bounds = [len(images) * k // len(pieces) for k in range(len(pieces) + 1)]
            for piece, start, stop in zip(pieces, bounds, bounds[1:], strict=False):
                yield SourceFile(piece, images[start:stop], batch.labels[start:stop])
                done += stop - start
                progress(done, None)


def _in_order(members: Iterator[tuple[str, bytes]], names: Sequence[str]) -> Iterator[tuple[str, bytes]]:
    """Members in the order of `names`, whatever their order in the archive: rows must not depend on it.

    The published CIFAR-10 archive holds its batches as 4, test, 3, 2, 5, 1, so most wait in memory.
    """
    waiting: dict[str, bytes] = {}
    for name in names:
        while name not in waiting:
            found, blob = next(members)
            waiting[found] = blob
            del blob
        yield name, waiting.pop(name)
    for _ in members:  # to its end: what follows is checked too
        pass


@dataclass(frozen=True, kw_only=True)
class DigitsDataset:
    """scikit-learn's bundled 1,797 handwritten digits, 8x8, enlarged to 32x32 RGB. Needs no download."""

    splits: Splits

    def files(self) -> Iterator[SourceFile]:
        """Five files, by turns, so that each holds digits of all the writers."""
        from sklearn.datasets import load_digits  # a second to import: only where it is needed

        digits = load_digits()
        small = np.rint(digits.images * (255 / 16)).astype(np.uint8)  # 0..16 -> 0..255
        pixels = small.repeat(_SIDE // 8, axis=1).repeat(_SIDE // 8, axis=2)
        images: NDArray[np.uint8] = np.repeat(pixels[..., None], 3, axis=3)
        labels = digits.target.astype(np.int64)
        for fold in range(5):
            yield SourceFile(f"fold_{fold + 1}", images[fold::5], labels[fold::5])


_BATCHES = tuple(f"data_batch_{k}" for k in range(1, 6))
_PIECES = tuple(f"train_{k}" for k in range(1, 6))

DATASETS: dict[str, CifarDataset | DigitsDataset] = {
    "cifar10": CifarDataset(
        spec=archive.CIFAR10,
        meta="batches.meta",
        names_key="label_names",
        label_key="labels",
        classes=10,
        parts={},
        splits={
            "report": {"train": _BATCHES[:1], "validation": _BATCHES[1:2], "test": ("test_batch",)},
            "full": {"train": _BATCHES, "test": ("test_batch",)},
        },
    ),
    "cifar100": CifarDataset(
        spec=archive.CIFAR100,
        meta="meta",
        names_key="fine_label_names",
        label_key="fine_labels",
        classes=100,
        parts={"train": _PIECES},
        splits={
            "report": {"train": _PIECES[:1], "validation": _PIECES[1:2], "test": ("test",)},
            "full": {"train": _PIECES, "test": ("test",)},
        },
    ),
    "digits": DigitsDataset(
        splits={
            "report": {"train": ("fold_1", "fold_2"), "validation": ("fold_3", "fold_4"), "test": ("fold_5",)},
            "full": {"train": ("fold_1", "fold_2", "fold_3", "fold_4"), "test": ("fold_5",)},
        },
    ),
}


def open_store(
    name: str | Path,
    *,
    data: Path | str | None = None,
    allow_unverified: bool = False,
    home: Path | None = None,
    verify: bool = False,
    fetch_progress: Progress | None = None,
    convert_progress: Progress | None = None,
) -> ArrayStore:
    """Open a data set, fetching and converting it first if that was not done before.

    Args:
        name: a registered name ("cifar10", "cifar100", "digits"), or the folder of a store.
        data: the data set's archive or unpacked folder, instead of a download.
        allow_unverified: accept an archive or folder whose checksum is not the published one; the
            store's `verified` is then False.
        home: folder for downloads and stores; by default that of `find_home`.
        verify: check every byte of the store now, not when it is first copied.
        fetch_progress: called with bytes done and bytes in all (None where unknown).
        convert_progress: called with images done and images in all (None where unknown).

    Raises:
        ConfigError: no data set has that name.
        DataError: the data cannot be had, or is not what it should be.
        OutputError: the store cannot be written.
    """
    if str(name) not in DATASETS:
        if _is_store(Path(name)):
            if data is not None:
                raise ConfigError(f"data {str(data)!r} cannot be given with the store {str(name)!r}")
            return ArrayStore(name, verify=verify)
        raise ConfigError(
            f"unknown dataset {str(name)!r}: choose from {', '.join(sorted(DATASETS))}, or give the folder of a store"
        )
    dataset = DATASETS[str(name)]
    home = home or find_home()
    stores = home / "stores"
    if isinstance(dataset, DigitsDataset):
        if data is not None:
            raise ConfigError(f"data {str(data)!r} cannot be given with digits, which are bundled with scikit-learn")

        def convert_digits(path: Path) -> None:
            write_store(
                path,
                dataset.files(),
                name="digits",
                classes=tuple("0123456789"),
                splits=dataset.splits,
                source={"origin": "scikit-learn's load_digits", "verified": True},
            )

        return _open_or_convert(stores / "digits", convert_digits, verify=verify)
    published = stores / f"{name}-{dataset.spec.sha256[:12]}"
    if data is None and published.is_dir():
        return ArrayStore(published, verify=verify)
    source = archive.find(
        dataset.spec,
        data=Path(data) if data is not None else None,
        home=home,
        allow_unverified=allow_unverified,
        progress=fetch_progress,
    )

    def convert(path: Path) -> None:
        classes, files = dataset.read(source, convert_progress or _no_progress)
        origin = {"origin": str(source.path), "sha256": source.sha256, "verified": source.verified}
        write_store(path, files, name=str(name), classes=classes, splits=dataset.splits, source=origin)

    return _open_or_convert(stores / f"{name}-{source.sha256[:12]}", convert, verify=verify)


def _is_store(path: Path) -> bool:
    try:
        return (path / "manifest.json").is_file()
    except OSError:  # too long a name, or a folder that may not be read
        return False


def _open_or_convert(path: Path, convert: Callable[[Path], None], *, verify: bool) -> ArrayStore:
    """Open the store at `path`, converting first where it is not there; one process converts, others wait."""
    if not path.is_dir():
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            with filelock.FileLock(path.parent / f".{path.name}.lock"):
                if not path.is_dir():
                    remove_stale(path.parent, path.name)  # of one who was killed while converting
                    convert(path)
        except OSError as error:
            where = error.filename or path
            raise OutputError(f"{where} cannot be written: {error.strerror or error}; see {VARIABLE}") from None
    return ArrayStore(path, verify=verify)
