"""The data sets known by name, and the one way to open any of them.

A data set is fetched and converted once, to `HOME/stores/NAME-CHECKSUM`; after that, opening it reads a
manifest and maps two files. Data of your own are converted by `folders`, `arrays` and `items`.

    store = open_store("digits")
"""

import logging
import os
import secrets
from pathlib import Path

import filelock

from fastcifar.checks import check_kind
from fastcifar.data.cifar import CIFAR, recognise_cifar
from fastcifar.data.content import Dataset, Found
from fastcifar.data.digits import DigitsDataset
from fastcifar.data.download import Progress
from fastcifar.data.home import VARIABLE, find_home
from fastcifar.data.store import ArrayStore
from fastcifar.data.writer import write_content
from fastcifar.errors import ConfigError, DamagedStoreError, OutputError

__all__ = ["DATASETS", "open_store", "set_aside"]

_log = logging.getLogger(__name__)

DATASETS: dict[str, Dataset] = {
    **{dataset.name: dataset for dataset in CIFAR},
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
    home: Path | str | None = None,
    verify: bool = False,
    fetch_progress: Progress | None = None,
    convert_progress: Progress | None = None,
) -> ArrayStore:
    """Open a data set, fetching and converting it first if that was not done before.

    Args:
        name: a registered name ("cifar10", "cifar100", "digits"), or the folder of a store, which a `Path` always is.
        data: the data set's archive or unpacked folder, in either form, instead of a download.
        allow_unverified: accept an archive or folder whose checksum is not the published one; the
            store's `verified` is then False.
        home: folder for downloads and stores; by default that of `find_home`.
        verify: check every byte of the store now, not when it is first copied.
        fetch_progress: called with bytes done and bytes in all (None where unknown).
        convert_progress: called with images done and images in all (None where unknown).

    Raises:
        ConfigError: no data set has that name.
        DamagedStoreError: the folder that was given is a damaged store; one that was made here is set aside and made
            again.
        DataError: the data cannot be had, or is not what it should be.
        OutputError: the store cannot be written.
    """
    check_kind("store", name, str | Path, "a name or a folder")
    for option, place in (("data", data), ("home", home)):
        check_kind(option, place, str | Path | None, "a path or None")
    if isinstance(name, Path) or name not in DATASETS:
        if _is_store(Path(name)):
            if data is not None:
                raise ConfigError(f"data {str(data)!r} cannot be given with the store {str(name)!r}")
            return ArrayStore(name, verify=verify)
        if os.path.lexists(name):
            raise ConfigError(f"dataset {str(name)!r} is no store: {_use_of(Path(name))}")
        if isinstance(name, Path) or os.sep in name:
            known = f"; the data set is the name {Path(name).name!r} alone" if Path(name).name in DATASETS else ""
            raise ConfigError(f"dataset {str(name)!r}: there is no such folder{known}")
        raise ConfigError(
            f"unknown dataset {str(name)!r}: choose from {', '.join(sorted(DATASETS))}, or give the folder of a store"
        )
    dataset = DATASETS[name]
    home = Path(home) if home is not None else find_home()
    published = home / "stores" / dataset.published
    if data is None and published.is_dir():
        try:
            return ArrayStore(published, verify=verify)
        except DamagedStoreError as error:
            _set_aside(published, error)
    found = dataset.find(
        data=Path(data) if data is not None else None,
        home=home,
        allow_unverified=allow_unverified,
        progress=fetch_progress,
    )
    path = home / "stores" / found.folder
    _convert_once(path, found, convert_progress)
    try:
        return ArrayStore(path, verify=verify)
    except DamagedStoreError as error:
        _set_aside(path, error)
    _convert_once(path, found, convert_progress)
    return ArrayStore(path, verify=verify)


def set_aside(store: ArrayStore, error: DamagedStoreError) -> bool:
    """Rename a damaged store that `open_store` made, so that opening it again makes it anew; a warning says so.

    Args:
        store: what `open_store` gave.
        error: what is wrong with it.

    Returns:
        Whether it was one of those; a store of the user's own is left as it is.

    Raises:
        OutputError: it cannot be renamed.
    """
    if store.path.parent != (find_home() / "stores").absolute():
        return False
    _set_aside(store.path, error)
    return True


def _set_aside(path: Path, error: DamagedStoreError) -> None:
    aside = path.with_name(f"{path.name}.damaged-{secrets.token_hex(4)}")
    try:
        os.rename(path, aside)
    except FileNotFoundError:  # another process was first
        return
    except OSError as problem:
        raise OutputError(f"{error}; it cannot be set aside: {problem.strerror or problem}") from None
    _log.warning("%s: set aside as %s, and made anew", error.found, aside.name)


def _use_of(path: Path) -> str:
    """What to do with what is there and no store, as the end of a message."""
    found = recognise_cifar(path)
    if found is None:
        return f"make one of it with fastcifar convert {path} OUT"
    return f"it is {found[0].name}'s archive or folder: give the name {found[0].name}, and {path} as data (--data)"


def _is_store(path: Path) -> bool:
    try:
        return (path / "manifest.json").is_file()
    except OSError:  # too long a name, or a folder that may not be read
        return False


def _convert_once(path: Path, found: Found, progress: Progress | None) -> None:
    """Make the store at `path` where it is not there; one process converts, others wait."""
    if path.is_dir():
        return
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with filelock.FileLock(path.parent / f".{path.name}.lock"):
            if not path.is_dir():
                write_content(path, found.content(), progress)
    except OSError as error:
        where = error.filename or path
        raise OutputError(f"{where} cannot be written: {error.strerror or error}; see {VARIABLE}") from None
