"""The folder of a run: made at its start, found again to resume or evaluate.

`config.json` holds the options and the recipe they resolved to; `environment.json` versions and hardware.

    run = create(TrainConfig(), resolve(TrainConfig()))
    with run.claimed():
        ...
"""

import contextlib
import dataclasses
import hashlib
import json
import shlex
import shutil
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import filelock

from fastcifar.config import Recipe, TrainConfig
from fastcifar.errors import CheckpointError, ConfigError, OutputError, one_line
from fastcifar.publish import missing, publish_json, read_file, remove_empty, remove_stale
from fastcifar.several import holds_several

if TYPE_CHECKING:  # it waits for torch
    from fastcifar.checkpoint import Checkpoint

__all__ = ["Run", "clear_unsaved", "create", "dataset_name", "locked", "reopen"]

_LOCK = ".lock"

# What may differ when a run is resumed: where things are, what computes and what is shown, not what is computed.
_FREE = ("data", "allow_unverified", "device", "compile", "eval_every", "profile", "out", "resume")


@dataclass(frozen=True, kw_only=True)
class Run:
    """A run's folder and what it was started with; `made` are the folders that `create` made, innermost first."""

    path: Path
    config: TrainConfig
    recipe: Recipe
    made: tuple[Path, ...] = ()

    @property
    def checkpoints(self) -> Path:
        """The folder of checkpoints."""
        return self.path / "checkpoints"

    @property
    def title(self) -> str:
        """Such as "big on cifar10"."""
        return f"{self.config.arch} on {dataset_name(self.config)}"

    @property
    def recipe_title(self) -> str:
        """Such as "fast", or "fast, changed: optimizer=muon"."""
        changes = " ".join(self.config.change)
        return f"{self.config.recipe}, changed: {changes}" if changes else self.config.recipe

    def go_on(self) -> str:
        """How to go on with it, as the end of a message."""
        return f"go on with: fastcifar train --resume {shlex.quote(str(self.path))}"

    def before_training(self, *, resumed: bool) -> str:
        """What a signal that comes before the first step leaves, as the end of a message."""
        return f"before training began; {self.go_on() if resumed else 'nothing was saved'}"

    def config_json(self) -> dict[str, Any]:
        """The content of config.json."""
        return {"config": self.config.to_json(), "recipe": dataclasses.asdict(self.recipe)}

    def config_hash(self) -> str:
        """SHA-256 of everything the weights depend on."""
        config, recipe = self.config_json().values()
        for fields, name, plain in ((recipe, "policy_fraction", 1.0), (recipe["augment"], "policy_epochs", 0)):
            if fields[name] == plain:  # runs from before it was a field have no other
                del fields[name]
        fixed = {"config": {key: value for key, value in config.items() if key not in _FREE}, "recipe": recipe}
        return hashlib.sha256(json.dumps(fixed, sort_keys=True).encode()).hexdigest()

    def check(self, saved: "Checkpoint") -> None:
        """Refuse a checkpoint that was saved under other options.

        Raises:
            CheckpointError: the run's config.json was changed since, or it does not hold what a checkpoint does.
        """
        kinds: dict[str, type] = {"loader": dict, "epoch": int, "arithmetic": dict}
        if not all(isinstance(saved.state.get(name, kind()), kind) for name, kind in kinds.items()):
            raise CheckpointError(f"{saved.path} does not hold what a checkpoint does")
        if saved.state.get("config_hash") != self.config_hash():
            raise CheckpointError(f"{saved.path} is of other options than {self.path / 'config.json'} now holds")

    def write(self, environment: Mapping[str, Any], *, resumed: bool) -> None:
        """Publish config.json and environment.json; where a run is resumed, environment-resumed.json in its place.

        Raises:
            OutputError: they cannot be written.
        """
        with self.writing():
            publish_json(self.path / "config.json", self.config_json())  # anew: `reopen` may have taken options over
            publish_json(self.path / f"environment{'-resumed' * resumed}.json", dict(environment))

    @contextlib.contextmanager
    def claimed(self, *, new: bool = False) -> Iterator[None]:
        """For a block that works on the run: no other process may, until it or this process ends.

        Args:
            new: whether it is one that `create` made; then nothing may have come into its folder since.

        Raises:
            OutputError: another process does, or the folder cannot be written.
        """
        with contextlib.ExitStack() as held:
            try:
                held.enter_context(locked(self.path))
            except OutputError:
                remove_empty(self.made)
                raise
            if new:
                if (used := _used(self.path)) is not None:
                    raise used
                try:
                    with self.writing():  # now, not after an hour of training
                        publish_json(self.path / "config.json", self.config_json())
                except OutputError:
                    self.discard()
                    raise
            yield

    @contextlib.contextmanager
    def writing(self) -> Iterator[None]:
        """For a block that writes files of the run.

        Raises:
            OutputError: in place of an OSError; names the file.
        """
        try:
            yield
        except OSError as error:
            raise OutputError(f"{error.filename or self.path} cannot be written: {error.strerror or error}") from None

    def discard(self) -> None:
        """Remove what `create` and `write` made, if nothing came of the run: no checkpoint is there."""
        from fastcifar.checkpoint import saved  # it waits for torch

        if saved(self.checkpoints):
            return
        with contextlib.suppress(OSError):
            for name in ("config.json", "environment.json", "metrics.jsonl", _LOCK):
                (self.path / name).unlink(missing_ok=True)
            for name in ("profile", "checkpoints"):
                shutil.rmtree(self.path / name, ignore_errors=True)
            remove_stale(self.path)
            remove_empty(self.made)


def dataset_name(config: TrainConfig) -> str:
    """What its data are called in titles and names: a registered name, or that of the store's folder."""
    return Path(config.dataset).name or "store"  # of "."


def clear_unsaved(config: TrainConfig) -> None:
    """Remove what a run of these options left in its folder `out` if it ended before its first checkpoint.

    What is not such a run's stays as it is.

    Raises:
        OutputError: another process works on it.
    """
    path = config.out
    if path is None or not (path / _LOCK).exists() or holds_several(path):
        return
    with locked(path):
        remove_stale(path)
        with contextlib.suppress(CheckpointError, ConfigError):
            reopen(path, config).discard()


@contextlib.contextmanager
def locked(path: Path) -> Iterator[None]:
    """For a block that works on the folder of a run: no other process may.

    Raises:
        OutputError: another process does, or the folder cannot be written.
    """
    try:
        lock = filelock.FileLock(path / _LOCK)
        lock.acquire(blocking=False)
    except filelock.Timeout:
        reason = "another process is working on it: let it end, or choose another folder"
        raise OutputError(f"{path} is in use: {reason}") from None
    except OSError as error:
        raise OutputError(f"{path / _LOCK} cannot be written: {error.strerror or error}") from None
    try:
        yield
    finally:
        lock.release()


def _used(path: Path) -> OutputError | None:
    """Why no new run can be in this folder."""
    if all(found.name == _LOCK for found in path.iterdir()):
        return None
    begun = holds_several(path) or any(path.glob("checkpoints/*"))
    hint = f"resume it with --resume {shlex.quote(str(path))}, or " if begun else ""
    return OutputError(f"out {str(path)!r} is not empty: {hint}choose another folder")


def create(config: TrainConfig, recipe: Recipe, *, kind: str = "") -> Run:
    """Make the folder of a new run, or of several.

    Args:
        config: names the folder, or what is in the default name.
        recipe: what `config` resolves to.
        kind: of several runs, such as "seeds": the default name begins with it.

    Raises:
        OutputError: it cannot be made, holds something already, or another process works on it.
    """
    words = filter(None, (kind, dataset_name(config)[:40], config.arch, config.recipe))
    stem = "-".join([*words, *["changed"] * bool(config.change), time.strftime("%Y%m%d-%H%M%S")])
    path = config.out or Path("runs") / stem
    try:
        number = 1
        while True:
            made = missing(path)
            try:
                path.mkdir(parents=True, exist_ok=config.out is not None)
                break
            except FileExistsError:
                if config.out is not None or not path.exists():  # there may be a file where a folder should be
                    raise
                number += 1  # another run began in this second
                path = Path("runs") / f"{stem}-{number}"
        if (used := _used(path)) is not None:
            with locked(path) if (path / _LOCK).exists() else contextlib.nullcontext():  # or that is said
                raise used
    except OSError as error:
        reason = error.strerror or str(error)
        raise OutputError(f"out {str(path)!r} cannot be written ({reason}): choose another folder with --out") from None
    data = config.data.absolute() if config.data is not None else None  # the run may be resumed from elsewhere
    return Run(path=path, config=dataclasses.replace(config, data=data), recipe=recipe, made=made)


def _shown(value: object) -> str:
    """An option's value, as it is written on a command line where that is several words."""
    return " ".join(map(str, value)) or "(none)" if isinstance(value, tuple) else repr(value)


def reopen(path: Path, given: TrainConfig | None = None, *, complete: bool = False) -> Run:
    """Find a run again.

    Args:
        path: its folder.
        given: options of the resuming command; those of `_FREE` are taken over, any other must be the run's own.
        complete: whether each field of `given` was asked for; else one that has its default value was not.

    Raises:
        CheckpointError: `path` is not a run's folder, or its config.json is damaged.
        ConfigError: `given` asks for something else than the run was started with.
    """
    try:
        stored = json.loads(read_file(path / "config.json"))
        config = TrainConfig.from_json(stored["config"])
        recipe = Recipe.from_json(stored["recipe"])
    except OSError as error:
        raise CheckpointError(f"{path} is not a run: config.json: {error.strerror}") from None
    except RecursionError:
        raise CheckpointError(f"{path / 'config.json'} is damaged: it is nested too deeply") from None
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise CheckpointError(f"{path / 'config.json'} is damaged: {one_line(error)}") from None
    if given is not None:
        default = TrainConfig()
        changed: dict[str, Any] = {}
        for field in dataclasses.fields(TrainConfig):
            value = getattr(given, field.name)
            if value == getattr(config, field.name) or (not complete and value == getattr(default, field.name)):
                continue
            if field.name not in _FREE:
                asked, own = (_shown(each) for each in (value, getattr(config, field.name)))
                raise ConfigError(f"{field.name} {asked} differs from the run's {own}: a resumed run keeps its options")
            changed[field.name] = value
        if (place := changed.get("data")) is not None:
            if not place.exists():
                raise ConfigError(f"data {str(place)!r} does not exist")
            changed["data"] = place.absolute()  # the run may be resumed from elsewhere again
        config = dataclasses.replace(config, **{**changed, "out": None, "resume": None})
    return Run(path=path, config=config, recipe=recipe)
