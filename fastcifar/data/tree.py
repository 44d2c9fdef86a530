"""Finds the images in a tree of class folders. Lists folders and opens no file.

ROOT/CLASS/... is all training images; ROOT/train/CLASS/..., with test, and val, valid or validation beside train, is
their parts. Classes and files are sorted by name, as torchvision's ImageFolder does; hidden files and folders are
passed over, and files without an image's name; links are followed, but not back to a folder that holds them.

    read_tree(Path("pets"), None).classes               # ("cat", "dog")
"""

import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from fastcifar.data.images import EXTENSIONS
from fastcifar.errors import ConfigError, DataError

__all__ = ["Tree", "read_tree"]

_AGAIN = 1000  # times that links may lead to folders of a class that were seen before

_PARTS = {"train": "train", "test": "test", "val": "validation", "valid": "validation", "validation": "validation"}
_EXPECTED = "expected ROOT/CLASS/IMAGE, or ROOT/train/CLASS/IMAGE with test and val beside train"


@dataclass(frozen=True)
class Tree:
    """A tree's images.

    Attributes:
        root: its top folder.
        classes: names of the class folders, in label order.
        parts: "train", and "test" and "validation" if there are such -> label, and path below the root, of each image.
    """

    root: Path
    classes: tuple[str, ...]
    parts: dict[str, list[tuple[int, str]]]


def read_tree(root: Path, classes: tuple[str, ...] | None) -> Tree:
    """List a tree's images.

    Args:
        root: its top folder.
        classes: the class folders to take, in label order; None for all, sorted.

    Raises:
        ConfigError: a class that is asked for is not there.
        DataError: it is no such tree, or a class has no training images.
    """
    if not root.is_dir():
        raise DataError(f"{root}: {'is no folder' if root.exists() else 'does not exist'}")
    folders, _ = _entries(root)
    if not folders:
        raise DataError(f"{root}: there are no class folders in it: {_EXPECTED}")
    places = _parts(root, folders)
    names = _entries(root / places["train"])[0]
    if classes is not None:
        if unknown := [name for name in classes if name not in names]:
            raise ConfigError(
                f"classes: {root / places['train']} has no folder {unknown[0]!r}: there are {', '.join(names)}"
            )
        if len(set(classes)) < len(classes):
            raise ConfigError(f"classes: a name comes twice in {', '.join(classes)}")
    chosen = classes if classes is not None else tuple(names)
    parts: dict[str, list[tuple[int, str]]] = {}
    for part, place in places.items():
        if place and classes is None and (extra := [name for name in _entries(root / place)[0] if name not in chosen]):
            raise DataError(f"{root / place / extra[0]}: there is no such class in {root / places['train']}")
        parts[part] = []
        for label, name in enumerate(chosen):
            below = f"{place}/{name}" if place else name
            images = _images(root, below) if (root / below).is_dir() else []
            if not images and part == "train":
                raise DataError(
                    f"{root / below}: there are no images in this class folder ({', '.join(EXTENSIONS)}): "
                    "delete it, or name the --classes to take"
                )
            parts[part] += [(label, image) for image in images]
        if not parts[part]:
            raise DataError(f"{root / place}: there are no images of the classes in it: {_EXPECTED}")
    return Tree(root, chosen, parts)


def _parts(root: Path, folders: Sequence[str]) -> dict[str, str]:
    """Part -> its folder, in the order train, test, validation; or train -> "" where all folders are classes."""
    named = [name for name in folders if name in _PARTS]
    inside = {name: _entries(root / name) for name in named}
    for name, (classes, images) in inside.items():
        if classes and images:
            raise DataError(
                f"{root / name}: holds class folders, and images beside them ({images[0]}): move these away, or rename "
                f"{name} if it is a class ({_EXPECTED})"
            )
    holding = [name for name, (classes, _) in inside.items() if classes]
    if "train" not in holding:
        if holding and len(holding) == len(folders):
            raise DataError(f"{root}: holds {', '.join(holding)}, but no train: {_EXPECTED}")
        return {"train": ""}  # classes that have such a name hold images
    if others := [name for name in folders if name not in holding]:
        raise DataError(
            f"{root / others[0]}: is beside {root / 'train'}, which holds class folders, but is no part of that kind: "
            f"move it away, or rename train if it is a class ({_EXPECTED})"
        )
    places: dict[str, str] = {}
    for name in sorted(holding, key=list(_PARTS).index):
        if _PARTS[name] in places:
            raise DataError(f"{root}: holds both {places[_PARTS[name]]} and {name}, which mean the same part")
        places[_PARTS[name]] = name
    return places


def _is_hidden(name: str) -> bool:
    return name.startswith(".") or name == "__MACOSX"  # what zip files from a Mac leave behind


def _entries(folder: Path) -> tuple[list[str], list[str]]:
    """Names of the folders and of the images in `folder`, each sorted."""
    folders, images = [], []
    for entry in _scan(str(folder)):
        if _is_folder(entry):
            folders.append(entry.name)
        elif entry.name.lower().endswith(EXTENSIONS):
            images.append(entry.name)
    return sorted(folders), sorted(images)


def _images(root: Path, below: str) -> list[str]:
    """Paths below `root` of all images in a folder of it and in those within, in torchvision's order."""
    found: list[tuple[str, str]] = []
    waiting: list[tuple[str, frozenset[tuple[int, int]]]] = [(below, frozenset())]
    seen: set[tuple[int, int]] = set()
    again = 0
    while waiting:
        place, above = waiting.pop()
        try:
            status = (root / place).stat()
        except OSError as error:
            raise DataError(f"{root / place}: cannot be read: {error.strerror or error}") from None
        if (status.st_dev, status.st_ino) in above:  # a link back to a folder that holds it
            continue
        again += (status.st_dev, status.st_ino) in seen
        if again > _AGAIN:  # a few links in each of some folders make millions of paths
            raise DataError(f"{root / below}: links lead to the same folders more than {_AGAIN} times: remove them")
        seen.add((status.st_dev, status.st_ino))
        for entry in _scan(f"{root}/{place}"):
            if _is_folder(entry):
                waiting.append((f"{place}/{entry.name}", above | {(status.st_dev, status.st_ino)}))
            elif entry.name.lower().endswith(EXTENSIONS):
                found.append((place, entry.name))
    return [f"{place}/{name}" for place, name in sorted(found)]


def _scan(folder: str) -> Iterator["os.DirEntry[str]"]:
    try:
        with os.scandir(folder) as entries:
            yield from (entry for entry in entries if not _is_hidden(entry.name))
    except OSError as error:
        raise DataError(f"{folder}: cannot be read: {error.strerror or error}") from None


def _is_folder(entry: "os.DirEntry[str]") -> bool:
    try:
        return entry.is_dir()
    except OSError:  # a link to itself
        return False
