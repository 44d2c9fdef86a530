"""The runs that the race of recipes has had: a file that grows run by run, over days, and is whole at any time.

Nothing is compared across machines, data, threads or modes: each such place is a race of its own, and so is each net.

    records = Records(RESULTS / "recipe_race.json", "Which recipe ...?", summarise)
    if not records.has(run["digest"]):
        records.add(run)
    races(records.runs())[0].groups
"""

import hashlib
import json
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import filelock

from benchmarks.trainers import CONTESTANTS
from fastcifar.errors import DataError
from fastcifar.publish import publish_bytes

__all__ = ["Group", "Race", "Records", "Run", "digest", "processor_share", "races"]

Run = dict[str, Any]
_PLACE = ("split", "mode", "threads", "cpu", "data")
"""What all runs of a race have in common, beside the net."""


class Records:
    """The runs in a file, oldest first, and what they say together.

    Args:
        path: the file; made with the first run.
        question: that the race asks.
        summarise: gives JSON values from all runs, written after them.

    Raises:
        DataError: by any call, when the file is not one of these.
    """

    def __init__(self, path: Path, question: str, summarise: Callable[[Sequence[Run]], Any]) -> None:
        self.path, self._question, self._summarise = path, question, summarise

    def runs(self) -> list[Run]:
        """All of them, oldest first."""
        try:
            runs: list[Run] = json.loads(self.path.read_bytes())["runs"]
        except FileNotFoundError:
            return []
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise DataError(f"{self.path} is not a file of runs ({error}): move it away") from None
        return runs

    def has(self, wanted: str) -> bool:
        """Whether a run of that digest is there that did not fail."""
        return any(run["digest"] == wanted and "failed" not in run for run in self.runs())

    def add(self, run: Run) -> None:
        """Keep one more. The file is read anew before: another race may have added to it."""
        self.path.parent.mkdir(exist_ok=True)
        with filelock.FileLock(self.path.with_name(f".{self.path.name}.lock")):
            runs = [*self.runs(), run]
            # a run is a line, so that a change to the file shows as the runs that came
            lines = ",\n  ".join(json.dumps(one) for one in runs)
            summary = json.dumps(self._summarise(runs), indent=1)
            question = json.dumps(self._question)
            text = f'{{\n "question": {question},\n "runs": [\n  {lines}\n ],\n "summary": {summary}\n}}\n'
            publish_bytes(self.path, text.encode())


@dataclass(frozen=True, kw_only=True)
class Group:
    """The runs of one contestant that differ in nothing but the seed; `failed` are those that came to nothing."""

    contestant: str
    change: tuple[str, ...]
    epochs: float
    runs: tuple[Run, ...]
    failed: tuple[Run, ...]

    @property
    def title(self) -> str:
        """Of the contestant, with its changes; its groups share it."""
        return ", ".join([CONTESTANTS[self.contestant].title, *self.change])


@dataclass(frozen=True, kw_only=True)
class Race:
    """A net in a place; `about` are the values that its runs have in common."""

    about: dict[str, Any]
    groups: tuple[Group, ...]


def processor_share(run: Run) -> float:
    """The part of the time for which a run of one thread had its core, at most 1.

    Others use the machine too: seconds times this share are what the same work takes on a core of its own. In a run of
    more threads some wait for others, so of such a one all of the time counts.
    """
    if run["threads"] > 1:
        return 1.0
    return float(min(1.0, run["processor_seconds"] / (run["seconds"] * run["threads"])))


def races(runs: Sequence[Run]) -> list[Race]:
    """What there is to compare.

    Of a contestant's runs those of its newest recipe count, and of two of the same seed the newer one. Contestants with
    a net of their own race with each net.
    """
    current = _current(runs)
    found = []
    for place in dict.fromkeys(map(_place, current)):
        here = [run for run in current if _place(run) == place]
        guests = [run for run in here if CONTESTANTS[run["contestant"]].net]
        homes = dict.fromkeys(run["arch"] for run in here if run not in guests)
        for arch in homes or dict.fromkeys(run["arch"] for run in guests):
            about = {"arch": arch, **dict(zip(_PLACE, place, strict=True)), "verified": here[0]["verified"]}
            groups = _groups([run for run in here if run in guests or run["arch"] == arch])
            found.append(Race(about=about, groups=tuple(groups)))
    return found


def digest(values: Any) -> str:
    """Of JSON values: equal for equal ones."""
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()[:16]


def _place(run: Run) -> tuple[Any, ...]:
    return tuple(run[name] for name in _PLACE)


def _current(runs: Sequence[Run]) -> list[Run]:
    """Without what newer runs replace; a failed one replaces none that did not fail."""

    def line(run: Run) -> tuple[Any, ...]:
        return (*_place(run), run["contestant"], run["arch"], *run["change"])

    trained = sorted(runs, key=lambda run: "failed" not in run)  # a failed one counts where there is no other
    newest = {line(run): run["recipe_digest"] for run in trained}
    kept = [run for run in runs if run["recipe_digest"] == newest[line(run)]]
    last = {run["digest"]: run for run in sorted(kept, key=lambda run: "failed" not in run)}
    return [run for run in kept if run is last[run["digest"]]]


def _groups(runs: Iterable[Run]) -> list[Group]:
    by_key: dict[tuple[str, tuple[str, ...], float], list[Run]] = {}
    for run in runs:
        by_key.setdefault((run["contestant"], tuple(run["change"]), run["epochs"]), []).append(run)
    return [
        Group(
            contestant=contestant,
            change=change,
            epochs=epochs,
            runs=tuple(run for run in group if "failed" not in run),
            failed=tuple(run for run in group if "failed" in run),
        )
        for (contestant, change, epochs), group in by_key.items()
    ]
