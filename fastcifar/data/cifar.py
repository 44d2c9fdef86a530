"""CIFAR-10 and CIFAR-100, from either form they are published in: pickles, or binary records.

Both forms give the same store, digest and all. Reads what `archive` found; writes nothing.

    found = CIFAR[0].find(data=Path("cifar-10-binary.tar.gz"), home=home, allow_unverified=False, progress=None)
    found.content().files
"""

from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from fastcifar.data import archive, binary, pickles
from fastcifar.data.content import Content, Found, SourceFile, Splits
from fastcifar.data.download import Progress

__all__ = ["CIFAR", "CifarDataset", "Form", "recognise_cifar"]

_SIDE = 32


class _Batch(Protocol):
    @property
    def data(self) -> NDArray[np.uint8]: ...

    @property
    def labels(self) -> NDArray[np.int64]: ...


@dataclass(frozen=True, kw_only=True)
class Form:
    """One of the forms in which a data set is published.

    Attributes:
        spec: its archive.
        names_file: the member that names the classes.
        read_names: the names in that member's bytes; takes `source`, its name for messages.
        read_batch: likewise for the other members: rows of three planes of 32x32 (R, G, B), and labels.
    """

    spec: archive.ArchiveSpec
    names_file: str
    read_names: Callable[..., tuple[str, ...]]
    read_batch: Callable[..., _Batch]


@dataclass(frozen=True, kw_only=True)
class CifarDataset:
    """A CIFAR data set.

    Attributes:
        name: as `open_store` knows it.
        forms: the one that is fetched, then the others that are understood.
        parts: cuts a file into equal pieces with names of their own, which `splits` refers to.
        splits: of the store.
    """

    name: str
    forms: tuple[Form, ...]
    parts: Mapping[str, tuple[str, ...]]
    splits: Splits

    @property
    def published(self) -> str:
        """Name of the store that is made from the archive that is fetched."""
        return self._folder(self.forms[0].spec.sha256)

    def find(self, *, data: Path | None, home: Path, allow_unverified: bool, progress: Progress | None) -> Found:
        """Find the archive or folder, in whichever form, or fetch the archive.

        Raises:
            DataError: it cannot be had, or is not the published one.
            OutputError: HOME/downloads cannot be written.
        """
        recognised = archive.recognise(data, [form.spec for form in self.forms]) if data is not None else None
        form = next((form for form in self.forms if form.spec is recognised), self.forms[0])
        source = archive.find(form.spec, data=data, home=home, allow_unverified=allow_unverified, progress=progress)
        return Found(self._folder(source.sha256), partial(self._content, form, source))

    def _folder(self, sha256: str) -> str:
        return f"{self.name}-{sha256[:12]}"

    def _content(self, form: Form, source: archive.Source) -> Content:
        order = (form.names_file, *(name for name in form.spec.members if name != form.names_file))
        members = _in_order(source.members(), order)
        _, names = next(members)
        return Content(
            name=self.name,
            classes=form.read_names(names, source=f"{source.path}: {form.names_file}"),
            splits=self.splits,
            source={"origin": str(source.path), "sha256": source.sha256, "verified": source.verified},
            files=self._files(form, members, source.path),
        )

    def _files(self, form: Form, members: Iterator[tuple[str, bytes]], path: Path) -> Generator[SourceFile, None, None]:
        for member, blob in members:
            batch = form.read_batch(blob, source=f"{path}: {member}")
            images = batch.data.reshape(-1, 3, _SIDE, _SIDE).transpose(0, 2, 3, 1)
            name = member.removesuffix(".bin")  # the two forms name their files alike but for this
            pieces = self.parts.get(name, (name,))
            bounds = [len(images) * k // len(pieces) for k in range(len(pieces) + 1)]
            for piece, start, stop in zip(pieces, bounds, bounds[1:], strict=False):
                yield SourceFile(piece, images[start:stop], batch.labels[start:stop])


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


_BATCHES = tuple(f"data_batch_{k}" for k in range(1, 6))
_PIECES = tuple(f"train_{k}" for k in range(1, 6))

CIFAR = (
    CifarDataset(
        name="cifar10",
        forms=(
            Form(
                spec=archive.CIFAR10,
                names_file="batches.meta",
                read_names=partial(pickles.read_label_names, key="label_names", classes=10),
                read_batch=partial(pickles.read_batch, label_key="labels", classes=10),
            ),
            Form(
                spec=archive.CIFAR10_BINARY,
                names_file="batches.meta.txt",
                read_names=partial(binary.read_label_names, classes=10),
                read_batch=partial(binary.read_batch, labels=(10,)),
            ),
        ),
        parts={},
        splits={
            "report": {"train": _BATCHES[:1], "validation": _BATCHES[1:2], "test": ("test_batch",)},
            "full": {"train": _BATCHES, "test": ("test_batch",)},
        },
    ),
    CifarDataset(
        name="cifar100",
        forms=(
            Form(
                spec=archive.CIFAR100,
                names_file="meta",
                read_names=partial(pickles.read_label_names, key="fine_label_names", classes=100),
                read_batch=partial(pickles.read_batch, label_key="fine_labels", classes=100),
            ),
            Form(
                spec=archive.CIFAR100_BINARY,
                names_file="fine_label_names.txt",
                read_names=partial(binary.read_label_names, classes=100),
                read_batch=partial(binary.read_batch, labels=(20, 100)),
            ),
        ),
        parts={"train": _PIECES},
        splits={
            "report": {"train": _PIECES[:1], "validation": _PIECES[1:2], "test": ("test",)},
            "full": {"train": _PIECES, "test": ("test",)},
        },
    ),
)


def recognise_cifar(data: Path) -> tuple[CifarDataset, Form] | None:
    """Which data set, in which form, an archive or folder is, going by names inside; None if it is none."""
    forms = [(dataset, form) for dataset in CIFAR for form in dataset.forms]
    spec = archive.recognise(data, [form.spec for _, form in forms])
    return next((pair for pair in forms if pair[1].spec is spec), None)
