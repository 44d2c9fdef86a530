"""Checks what is on disk: a store, a run, several runs, CIFAR's archive or folder, or all that a home folder keeps.

Every byte of stores, archives and checkpoints is compared with its checksum; a run's records, which have none, need
to be JSON. Writes nothing.

    for found in verify(Path("runs/cifar10-big-fast-20260101-120000")):
        found.path, found.what, found.problems
"""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from fastcifar.data.cifar import CifarDataset, Form, recognise_cifar
from fastcifar.data.store import ArrayStore
from fastcifar.errors import DamagedStoreError, DataError, FastcifarError
from fastcifar.publish import read_file
from fastcifar.several import RECORDS, holds_several, members

__all__ = ["Finding", "verify"]

_KEPT = ("stores", "downloads")  # folders of a home
_CONTENT = ("manifest.json", "model.safetensors")
"""What a store or a checkpoint has in its folder, the latter even where its manifest is lost."""


@dataclass(frozen=True, kw_only=True)
class Finding:
    """What is known of one thing.

    Attributes:
        path: where it is.
        what: in words, such as "a store: cifar10, 60,000 images of 32 x 32".
        problems: a line each; none if all is as it should be.
    """

    path: Path
    what: str
    problems: tuple[str, ...]


def verify(path: Path) -> Iterator[Finding]:
    """Check what is at `path`, and what is in it.

    Args:
        path: a store, a run's folder, a checkpoint's, or a folder with several of these in it; CIFAR's archive or its
            unpacked folder in either form; or a folder with `stores` and `downloads` in it, such as FASTCIFAR_HOME.

    Raises:
        DataError: it is none of these, or cannot be read.
    """
    try:
        yield from _verify(path)
    except OSError as error:
        raise DataError(f"{error.filename or path}: cannot be read: {error.strerror or error}") from None


def _verify(path: Path) -> Iterator[Finding]:
    if not path.exists():
        raise DataError(f"{path}: does not exist")
    if _holds(path, *_CONTENT):
        if _is_checkpoint(path):
            yield Finding(path=path, what="a checkpoint", problems=_checkpoint_problems(path))
        else:
            yield _store(path)
    elif holds_several(path):
        yield from _series(path)
    elif _holds(path, "config.json"):
        yield _run(path)
    else:
        yield from _verify_other(path)


def _verify_other(path: Path) -> Iterator[Finding]:
    """What is neither store nor run nor checkpoint: CIFAR, or a folder of several things, a home for one."""
    form = recognise_cifar(path)
    several = sorted(each for each in path.glob("[!.]*") if each.name not in _KEPT and _is_one(each))
    homes = [path / name for name in _KEPT if (path / name).is_dir()]
    if form is None and not several and not homes:
        raise DataError(f"{path}: is no store, run, checkpoint, or archive or folder of CIFAR, and no home of them")
    if form is not None and (not several or _holds(path, *form[1].spec.members)):
        yield _cifar(path, *form)
    for each in several:
        yield from _verify(each)
    for home in homes:
        for each in sorted(home.glob("[!.]*")):
            yield from _kept(each)


def _is_one(path: Path) -> bool:
    """Whether it is something to check, in a folder of several."""
    archive = path.is_file() and path.name.endswith(".tar.gz")
    return _holds(path, "config.json", *_CONTENT, *RECORDS) or (
        (archive or path.is_dir()) and recognise_cifar(path) is not None
    )


def _holds(path: Path, *names: str) -> bool:
    """Whether any of these is in a folder."""
    return any((path / name).is_file() for name in names)


def _kept(path: Path) -> Iterator[Finding]:
    """Something in a home folder."""
    if ".damaged-" in path.name or ".wrong-" in path.name:
        yield Finding(path=path, what="set aside", problems=("was set aside as damaged, and is of no use: delete it",))
    elif path.parent.name == "downloads" and path.name.endswith(".part.json"):
        pass  # beside the next one
    elif path.parent.name == "downloads" and path.name.endswith(".part"):
        yield Finding(path=path, what="a download that was interrupted: it goes on when it is wanted", problems=())
    elif path.parent.name == "stores":
        yield _store(path)
    else:
        try:
            yield from _verify(path)
        except (DataError, OSError):
            yield Finding(path=path, what="", problems=("is no intact archive of CIFAR: delete it",))


def _store(path: Path) -> Finding:
    try:
        store = ArrayStore(path)
        problems = tuple(store.damaged_parts())
    except DataError as error:
        return Finding(path=path, what="a store", problems=(_within(path, error),))
    height, width, channels = store.image_shape
    colour = {1: "grey", 3: "RGB"}.get(channels, f"{channels} channels")
    note = "" if store.verified else ", from an unverified copy"
    what = f"a store: {store.name}, {len(store):,} images of {height} x {width}, {colour}{note}"
    return Finding(path=path, what=what, problems=problems)


def _cifar(path: Path, dataset: CifarDataset, form: Form) -> Finding:
    problems, images = [], 0
    try:
        content = dataset.find(data=path, home=Path(), allow_unverified=True, progress=None).content()
        images = sum(len(file.images) for file in content.files)
        published = bool(content.source["verified"])
    except DataError as error:
        problems, published = [_within(path, error)], False
    if not published:
        try:
            dataset.find(data=path, home=Path(), allow_unverified=False, progress=None)
        except DataError as error:
            problems.insert(0, _within(path, error).partition("; --allow-unverified")[0])
    return Finding(path=path, what=f"{form.spec.name}: {images:,} images", problems=tuple(dict.fromkeys(problems)))


def _is_checkpoint(path: Path) -> bool:
    try:
        manifest = json.loads(read_file(path / "manifest.json"))
    except (OSError, ValueError, RecursionError):
        return _holds(path, "model.safetensors")
    return isinstance(manifest, dict) and manifest.get("format") == "fastcifar-checkpoint"


def _checkpoint_problems(path: Path) -> tuple[str, ...]:
    from fastcifar.checkpoint import problem  # torch takes seconds to import: not for a store

    found = problem(path)
    return () if found is None else (found.removeprefix(f"{path} "),)


def _run(path: Path) -> Finding:
    from fastcifar import checkpoint, runs

    problems = []
    what = "a run"
    run = None
    try:
        run = runs.reopen(path)
        what = f"a run: {run.title}, recipe {run.recipe_title}"
    except FastcifarError as error:
        problems.append(_within(path, error))
    saved = checkpoint.saved(path / "checkpoints")
    damaged = [(each, line) for each in saved for line in _checkpoint_problems(each)]
    problems += [f"{each.relative_to(path)}: {line}" for each, line in damaged]
    if len(saved) == len(damaged):
        problems.append(f"holds no {'sound ' * bool(saved)}checkpoint: there is nothing to go on from")
    elif run is not None:
        try:
            newest = checkpoint.load_newest(run.checkpoints)
            run.check(newest)
            what += f", saved after step {newest.step}"
        except FastcifarError as error:
            if not any(line in str(error) for _, line in damaged):  # else it is said already
                problems.append(_within(path, error))
    resumed = ["environment-resumed.json"] * _holds(path, "environment-resumed.json")
    for name in ("environment.json", "metrics.jsonl", *resumed):
        problems += _json_problems(path / name, lines=name.endswith("l"))
    return Finding(path=path, what=what, problems=tuple(problems))


def _series(path: Path) -> Iterator[Finding]:
    record = next(name for name in RECORDS if _holds(path, name))
    problems = [line for name in (record, "config.json") for line in _json_problems(path / name)]
    runs = members(path)
    done = [] if problems else _done(path / record)
    problems += [f"{name}: is done, as {record} says, but not there" for name in done if path / name not in runs]
    yield Finding(path=path, what=f"several runs: {len(runs)} begun", problems=tuple(problems))
    for run in runs:
        yield _run(run)


def _done(record: Path) -> list[str]:
    """The folders of the runs that are done, as a record says."""
    runs = json.loads(read_file(record)).get("runs")
    listed = [run for run in runs if isinstance(run, dict)] if isinstance(runs, list) else []
    return [str(run.get("folder")) for run in listed if run.get("state") == "done"]


def _json_problems(path: Path, *, lines: bool = False) -> list[str]:
    try:
        content = read_file(path)
        for part in content.splitlines() if lines else [content]:
            if not isinstance(json.loads(part), dict):
                raise ValueError("it holds no object")
    except OSError as error:
        return [f"{path.name}: {error.strerror}"]
    except (ValueError, RecursionError):
        return [f"{path.name}: is not the JSON that was written"]
    return []


def _within(path: Path, error: Exception) -> str:
    """An error's message without the path that it begins with, which is said before it, and without what to do."""
    text = error.found if isinstance(error, DamagedStoreError) else str(error)
    return text.removeprefix(str(path)).lstrip("/: ")
