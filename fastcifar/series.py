"""The folder of several runs: made at their start, found again to go on with those that are not done.

It holds `config.json` and `environment.json` like a run's folder, a record of how the runs ended, and their folders.

    with open_series(TrainConfig(), record="seeds.json", kind="seeds") as series:
        series.diverged                      # of the record that was there when it was opened
        series.write({"runs": [{"name": "seed 0", "state": "done"}]})
"""

import contextlib
import json
import os
import shlex
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fastcifar import runs, runtime
from fastcifar.config import TrainConfig
from fastcifar.errors import CheckpointError, ConfigError, FastcifarError, StoppedError, one_line
from fastcifar.publish import publish_bytes, publish_json, read_file
from fastcifar.ranks import asked_for
from fastcifar.recipes import resolve

__all__ = ["Series", "open_series"]


@dataclass(frozen=True, kw_only=True)
class Series:
    """The folder of several runs.

    Attributes:
        run: the folder, and the options and the recipe that the runs share.
        record: name of the file that says how they ended.
        stored: its content as it was found; empty for a new folder.
    """

    run: runs.Run
    record: str
    stored: Mapping[str, Any]

    @property
    def path(self) -> Path:
        """The folder."""
        return self.run.path

    def folder(self, *names: str) -> Path:
        """The folder of a run.

        Raises:
            CheckpointError: a link leads elsewhere: what is there must not be cleared away.
        """
        place = self.path.joinpath(*names)
        if os.path.realpath(place) != os.path.join(os.path.realpath(self.path), *names):
            raise CheckpointError(f"{place} leads elsewhere by a link: put the folder itself in its place")
        return place

    @property
    def diverged(self) -> dict[str, str]:
        """Name -> error of the runs that diverged."""
        return {run["name"]: run["error"] for run in self.stored.get("runs", ()) if run["state"] == "diverged"}

    def seeds(self, given: Sequence[int]) -> tuple[int, ...]:
        """The folder's seeds, or for a new one those that are given.

        Raises:
            ConfigError: the folder has others.
        """
        own = tuple(self.stored.get("seeds", given))
        if given and tuple(given) != own:
            wanted, kept = (",".join(map(str, each)) for each in (given, own))
            raise ConfigError(f"seeds {wanted} differ from the folder's {kept}: a resumed run keeps its options")
        return own

    def write(self, content: Mapping[str, Any], **texts: str) -> None:
        """Publish the record, and any other text beside it.

        Args:
            content: JSON values.
            texts: suffix -> text; `md` goes into the record's name with that suffix.

        Raises:
            OutputError: they cannot be written.
        """
        with self.run.writing():
            publish_json(self.path / self.record, dict(content))
            for suffix, text in texts.items():
                place = (self.path / self.record).with_suffix(f".{suffix}")
                publish_bytes(place, text.encode("utf-8", "backslashreplace"))  # a path may hold what is no UTF-8

    def go_on(self, command: str) -> str:
        """The command line that goes on with it."""
        return f"fastcifar {command} --resume {shlex.quote(str(self.path))}"

    def discard(self) -> None:
        """Leave nothing, if no run has left anything."""
        if not any(path.is_dir() for path in self.path.iterdir()):
            for path in self.path.glob(f"{Path(self.record).stem}.*"):
                path.unlink()
            self.run.discard()


def _is_record(stored: object) -> bool:
    """Whether it has what `Series` reads of it."""
    if not isinstance(stored, dict) or not all(isinstance(stored.get(name), list) for name in ("seeds", "runs")):
        return False
    if not stored["seeds"] or not all(type(seed) is int for seed in stored["seeds"]):
        return False
    return all(
        isinstance(run, dict)
        and all(
            isinstance(run.get(key), str) for key in ("name", "state", *["error"] * (run.get("state") == "diverged"))
        )
        for run in stored["runs"]
    )


@contextlib.contextmanager
def open_series(config: TrainConfig, *, record: str, kind: str, complete: bool = False) -> Iterator[Series]:
    """For a block that runs them: make the folder, or find it again where `config.resume` names it.

    No other process may work on it meanwhile. Where the block fails, but for a stop, a new folder in which no run has
    left anything goes.

    Args:
        config: what the runs share.
        record: as in `Series`.
        kind: the default name begins with it.
        complete: as `runs.reopen` has it.

    Raises:
        OutputError: it cannot be made, or another process works on it.
        CheckpointError: it is no such folder, its files are damaged, or the recipe is no longer what it was.
        ConfigError: `config` asks for something else than the runs were started with, or names no recipe; or this is
            one of several ranks.
    """
    if (ranks := asked_for()) > 1:
        raise ConfigError(f"several runs cannot be trained by {ranks} ranks: start them without torchrun")
    if config.resume is None:
        run = before = runs.create(config, resolve(config), kind=kind)
        stored = {}
    else:
        path = config.resume / record
        try:
            stored = json.loads(read_file(path))
        except OSError as error:
            told = f"{config.resume} is no folder of {kind}: {record}: {error.strerror}"
            if (config.resume / "config.json").exists():
                told += f"; what it is goes on with fastcifar train --resume {shlex.quote(str(config.resume))}"
            raise CheckpointError(told) from None
        except (ValueError, RecursionError) as error:
            raise CheckpointError(f"{path} is damaged: {one_line(error)}") from None
        if not _is_record(stored):
            raise CheckpointError(f"{path} is damaged: no seeds, or no runs with a name and a state")
        run, before = runs.reopen(config.resume, config, complete=complete), runs.reopen(config.resume)
        if resolve(run.config) != run.recipe:
            raise CheckpointError(f"{path.parent}: recipe {run.config.recipe!r} has changed since: start anew")
    series = Series(run=run, record=record, stored=stored)
    with run.claimed(new=config.resume is None):
        try:
            run.write(runtime.environment(), resumed=config.resume is not None)
            yield series
        except StoppedError:
            raise
        except BaseException as error:
            if config.resume is None:
                series.discard()
            elif isinstance(error, FastcifarError):  # what was given is of no use: not to be kept
                with run.writing():
                    publish_json(series.path / "config.json", before.config_json())
            raise
