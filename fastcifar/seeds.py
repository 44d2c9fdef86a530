"""The same training with several seeds: what a recipe does, apart from what a seed does.

A folder gets a run's folder `seed-N` for each seed, and `seeds.json`, written anew whenever a run ends.

    result = fit_seeds(TrainConfig(arch="small", dataset="digits"), range(5))
    result.test_accuracy.mean, result.test_accuracy.interval95
"""

import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from numbers import Integral
from pathlib import Path
from typing import Any

from fastcifar.checks import check_integer, check_kind
from fastcifar.config import TrainConfig
from fastcifar.errors import ConfigError
from fastcifar.estimates import Estimate, estimate, interval_text
from fastcifar.formats import percent, seconds
from fastcifar.many import Member, Outcome, run_all
from fastcifar.reporter import NullReporter, Reporter, TeeReporter
from fastcifar.series import open_series
from fastcifar.several import SEEDS
from fastcifar.signals import catch_stop

__all__ = ["SeedsResult", "check_runs", "fit_seeds", "seeds_table"]


@dataclass(frozen=True, kw_only=True)
class SeedsResult:
    """How several seeds' runs ended, and estimates over those that are done.

    `path` is their folder. Accuracies are fractions of the test images, `tta_accuracy` with test-time augmentation
    (None where the recipe has none), times seconds of training.
    """

    path: Path
    runs: Mapping[int, Outcome]
    test_accuracy: Estimate | None
    tta_accuracy: Estimate | None
    train_seconds: Estimate | None

    @property
    def exit_status(self) -> int:
        """0, or the largest of the runs that failed: 3 where one diverged."""
        return max(outcome.exit_status for outcome in self.runs.values())


@catch_stop()
def fit_seeds(
    config: TrainConfig,
    seeds: Iterable[int] = (),
    *,
    parallel: int = 1,
    reporter: Reporter | None = None,
    complete: bool = False,
) -> SeedsResult:
    """Train once with each seed; with `config.resume`, go on with those that are not done.

    Each run is, bit for bit, what `fit` makes of `config` with that seed and as many threads.

    Args:
        config: the options of all runs; `out` and `resume` are the folder of them all, `seed` is not used.
        seeds: different ones; may be left out where `config.resume` has them.
        parallel: runs at a time. More than one get a process each, and share the threads evenly; on CUDA they get a
            stream each of this process, so that they fill the GPU together.
        reporter: hears of each run as `fit` tells it, or where several are under way of messages alone.
        complete: as `fit` has it.

    Raises:
        ConfigError, DataError, OutputError, CheckpointError: before training, each with one clear line.
        StoppedError: SIGINT, SIGTERM or SIGHUP came; runs that had begun are saved.
    """
    reporter = TeeReporter(reporter or NullReporter())
    seeds = check_runs(config, seeds, parallel)
    with open_series(config, record=SEEDS, kind="seeds", complete=complete) as series:
        own = series.seeds(seeds)
        members = {
            f"seed {seed}": dataclasses.replace(series.run.config, seed=seed, out=series.folder(f"seed-{seed}"))
            for seed in own
        }

        def summarise(outcomes: Mapping[str, Outcome]) -> SeedsResult:
            return _summarise(
                series.path, {seed: outcomes[f"seed {seed}"] for seed in own if f"seed {seed}" in outcomes}
            )

        def record(outcomes: Mapping[str, Outcome], newest: str | None) -> None:
            series.write(_to_json(own, summarise(outcomes)))
            if newest is not None and (parallel > 1 or outcomes[newest].error):
                reporter.message(f"{newest}: {_say(outcomes[newest])}")

        outcomes = run_all(
            [Member(name, config) for name, config in members.items()],
            series.diverged,
            parallel=parallel,
            reporter=reporter,
            lines=False,
            record=record,
            go_on=series.go_on("train"),
        )
        return summarise(outcomes)


def check_runs(config: TrainConfig, seeds: Iterable[int], parallel: int) -> tuple[int, ...]:
    """The seeds of several runs: refuses one that is given twice and what is no seed, and none where none are resumed.

    Raises:
        ConfigError: it is so, or the other arguments are not what they must be.
    """
    check_kind("config", config, TrainConfig, "a TrainConfig")
    check_integer("parallel", parallel, 1)
    check_kind("seeds", seeds, Iterable, "whole numbers")
    found: list[int] = []
    for seed in seeds:
        check_integer("seed", seed, 0, 2**64 - 1, kind=Integral)
        if seed in found:
            raise ConfigError(f"seeds: {seed} is given twice")
        found.append(int(seed))  # NumPy's too
    if not found and config.resume is None:
        raise ConfigError("seeds: give at least one")
    return tuple(found)


def seeds_table(result: SeedsResult) -> list[tuple[str, ...]]:
    """The result as rows of text, the header first."""
    tta = next((outcome.figures.tta for outcome in result.runs.values() if outcome.figures), "none")
    estimates = [(result.test_accuracy, percent), (result.tta_accuracy, percent), (result.train_seconds, seconds)]
    rows: list[tuple[str, ...]] = [("seed", "test accuracy", f"with {tta} TTA", "train s")]
    for seed, outcome in result.runs.items():
        if (figures := outcome.figures) is None:
            rows.append((str(seed), outcome.state, "", ""))
            continue
        with_tta = percent(figures.tta_accuracy) if figures.tta_accuracy is not None else ""
        rows.append((str(seed), percent(figures.test_accuracy), with_tta, seconds(figures.train_seconds)))
    rows.append(("mean", *(form(found.mean) if found else "" for found, form in estimates)))
    spread = (form(found.deviation) if found and found.deviation is not None else "" for found, form in estimates)
    rows.append(("deviation", *spread))
    rows.append(("95 % interval", *(interval_text(found, form) for found, form in estimates)))
    return rows if tta != "none" else [(*row[:2], row[3]) for row in rows]


def _summarise(path: Path, runs: Mapping[int, Outcome]) -> SeedsResult:
    done = [outcome.figures for outcome in runs.values() if outcome.figures]
    return SeedsResult(
        path=path,
        runs=runs,
        test_accuracy=estimate([figures.test_accuracy for figures in done]),
        tta_accuracy=estimate([figures.tta_accuracy for figures in done if figures.tta_accuracy is not None]),
        train_seconds=estimate([figures.train_seconds for figures in done]),
    )


def _to_json(seeds: Sequence[int], result: SeedsResult) -> dict[str, Any]:
    def run(seed: int) -> dict[str, Any]:
        head = {"name": f"seed {seed}", "seed": seed, "folder": f"seed-{seed}"}
        return head | result.runs[seed].to_json() if seed in result.runs else {**head, "state": "unfinished"}

    estimates = {name: getattr(result, name) for name in ("test_accuracy", "tta_accuracy", "train_seconds")}
    summary = {name: dataclasses.asdict(found) if found else None for name, found in estimates.items()}
    return {"seeds": list(seeds), "runs": [run(seed) for seed in seeds], "summary": summary}


def _say(outcome: Outcome) -> str:
    figures = outcome.figures
    if figures is None:
        return f"{outcome.state}: {outcome.error}"
    return f"test accuracy {percent(figures.test_accuracy)}, {seconds(figures.train_seconds)} s of training"
