"""Ablations: a recipe beside variants of it, each trained with the same seeds, so that differences are paired.

What is compared is the accuracy on the validation images where the split has some; the test images are kept out.
A folder gets a run's folder for each variant and seed, and `ablation.json` and `ablation.md`, written anew whenever
a run ends.

    result = ablate(TrainConfig(arch="small", epochs=4), range(3), without=("cutout",), variants=("lr=0.1 warmup=0.1",))
    result.rows[1].difference.interval95
"""

import dataclasses
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fastcifar.changes import changed_fields
from fastcifar.config import TrainConfig
from fastcifar.errors import CheckpointError, ConfigError
from fastcifar.estimates import Estimate, estimate, interval_text
from fastcifar.formats import percent, seconds, things
from fastcifar.many import Figures, Member, Outcome, run_all
from fastcifar.optim import resolution
from fastcifar.recipes import describe, resolve
from fastcifar.reporter import NullReporter, Reporter, TeeReporter
from fastcifar.seeds import check_runs
from fastcifar.series import Series, open_series
from fastcifar.several import ABLATION
from fastcifar.signals import catch_stop
from fastcifar.variants import plan_variants, vary

__all__ = ["AblationResult", "AblationRow", "ablate", "ablation_table"]


@dataclass(frozen=True, kw_only=True)
class AblationRow:
    """A variant: its changes to the base, what each seed gave, and estimates over the seeds that are done.

    Accuracies are fractions, times seconds of training. `difference` and `seconds_difference` are to the base, over
    the seeds that are done in both; None for the base itself. `errors` say how the others ended: "diverged: ...".
    """

    name: str
    changes: tuple[str, ...]
    accuracies: Mapping[int, float]
    seconds: Mapping[int, float]
    errors: Mapping[int, str]
    accuracy: Estimate | None
    difference: Estimate | None
    train_seconds: Estimate | None
    seconds_difference: Estimate | None


@dataclass(frozen=True, kw_only=True)
class AblationResult:
    """An ablation, in the folder `path`: the base's row, then the variants'.

    `title` says of what, `evaluated` is the part of the data that accuracies are of (None while no run is done),
    `notes` say what else a reader must know, `exit_status` is 0 or the largest of the runs that failed: 3 where one
    diverged.
    """

    path: Path
    title: str
    evaluated: str | None
    rows: tuple[AblationRow, ...]
    notes: tuple[str, ...]
    exit_status: int


@catch_stop()
def ablate(
    config: TrainConfig,
    seeds: Iterable[int] = (),
    *,
    without: Sequence[str] = (),
    variants: Sequence[str] = (),
    parallel: int = 1,
    reporter: Reporter | None = None,
    complete: bool = False,
) -> AblationResult:
    """Train the recipe and each variant of it once with each seed; with `config.resume`, what of it is not done.

    Seeds come one after another, each with all variants, so that every variant has its first figure early. With
    neither `without` nor `variants`, each ingredient of the recipe is left out once.

    Args:
        config: the base; `out` and `resume` are the folder of all runs, `seed` is not used. Where neither it nor a
            change names a split, that is holdout.
        seeds: different ones; may be left out where `config.resume` has them.
        without: fields of the recipe that a variant each puts back to their default.
        variants: changes that a variant each makes, such as "optimizer=adam lr=0.001".
        parallel: as in `fit_seeds`.
        reporter: hears messages.
        complete: as `fit` has it.

    Raises:
        ConfigError, DataError, OutputError, CheckpointError: before training, each with one clear line.
        StoppedError: SIGINT, SIGTERM or SIGHUP came; runs that had begun are saved.
    """
    reporter = TeeReporter(reporter or NullReporter())
    seeds = check_runs(config, seeds, parallel)
    if config.resume is None:
        if config.split is None and "split" not in changed_fields(config.change):
            config = dataclasses.replace(config, split="holdout")
        plan = plan_variants(config, without, variants)
    elif without or variants:
        raise ConfigError("without and variant cannot be given with resume: the folder keeps its own")
    with open_series(config, record=ABLATION, kind="ablate", complete=complete) as series:
        seeds = series.seeds(seeds)
        if series.stored:
            plan = _stored_plan(series)
        ablation = _Ablation(series, plan, seeds)

        def record(outcomes: Mapping[str, Outcome], newest: str | None) -> None:
            result = ablation.summarise(outcomes)
            series.write(ablation.to_json(outcomes, result), md=ablation.to_markdown(result))
            if newest is not None:
                reporter.message(
                    f"{newest}: {_say(outcomes[newest])}; {len(outcomes)} of {len(ablation.members)} runs ended"
                )

        reporter.message(
            f"the base and {things(len(plan) - 1, 'variant')}, {things(len(seeds), 'seed')} each, in {series.path}"
        )
        outcomes = run_all(
            ablation.members,
            series.diverged,
            parallel=parallel,
            reporter=reporter,
            lines=True,
            record=record,
            go_on=series.go_on("ablate"),
        )
        return ablation.summarise(outcomes)


def ablation_table(result: AblationResult) -> list[tuple[str, ...]]:
    """The result as rows of text, the header first; differences of accuracies are in percentage points."""
    part = result.evaluated or "validation"
    rows: list[tuple[str, ...]] = [
        ("variant", f"{part} accuracy", "difference", "95 % interval", "train s", "difference s")
    ]
    for row in result.rows:
        states = Counter(error.partition(":")[0] for error in row.errors.values())  # "diverged", say
        if row.accuracy is None:
            accuracy = ", ".join(states)
        else:
            ended = ", ".join(f"{number} {state}" for state, number in states.items())
            accuracy = percent(row.accuracy.mean) + f" ({ended})" * bool(ended)
        rows.append(
            (
                row.name,
                accuracy,
                _points(row.difference.mean) if row.difference else "",
                interval_text(row.difference, _points),
                seconds(row.train_seconds.mean) if row.train_seconds else "",
                f"{row.seconds_difference.mean:+.2f}" if row.seconds_difference else "",
            )
        )
    return rows


class _Ablation:
    """The runs of an ablation, and what their outcomes say."""

    def __init__(self, series: Series, plan: Mapping[str, tuple[str, ...]], seeds: tuple[int, ...]) -> None:
        self.series, self.plan, self.seeds = series, plan, seeds
        self.members = []
        for seed in seeds:
            for number, (name, changes) in enumerate(plan.items()):
                variant = f"{number}-{re.sub('[^A-Za-z0-9.=_-]+', '-', name)[:60]}"
                folder = series.folder(variant, f"seed-{seed}")
                config = dataclasses.replace(vary(series.run.config, changes), seed=seed, out=folder)
                self.members.append(Member(_run_name(name, seed), config))

    def summarise(self, outcomes: Mapping[str, Outcome]) -> AblationResult:
        """All there is to say now."""
        rows: list[AblationRow] = []
        for name, changes in self.plan.items():
            ended = {seed: outcomes[_run_name(name, seed)] for seed in self.seeds if _run_name(name, seed) in outcomes}
            rows.append(_row(name, changes, ended, rows[0] if rows else None))
        figures = [outcome.figures for outcome in outcomes.values() if outcome.figures]
        evaluated = figures[0].evaluated if figures else None
        return AblationResult(
            path=self.series.path,
            title=f"{self.series.run.title}, {self.series.run.recipe_title}",
            evaluated=evaluated,
            rows=tuple(rows),
            notes=self._notes(outcomes, evaluated),
            exit_status=max((outcome.exit_status for outcome in outcomes.values()), default=0),
        )

    def to_json(self, outcomes: Mapping[str, Outcome], result: AblationResult) -> dict[str, Any]:
        """The record."""
        runs = []
        for member in self.members:
            folder = member.path.relative_to(self.series.path)
            run: dict[str, Any] = {"name": member.name, "folder": folder.as_posix(), "state": "unfinished"}
            if (outcome := outcomes.get(member.name)) is not None:
                figures = outcome.figures
                said = {"accuracy": _accuracy(figures), "train_seconds": figures.train_seconds} if figures else {}
                run |= {"state": outcome.state, "error": outcome.error} | said
            runs.append(run)
        return {
            "seeds": list(self.seeds),
            "variants": [{"name": name, "changes": list(changes)} for name, changes in self.plan.items()],
            "evaluated": result.evaluated,
            "runs": runs,
            "rows": [dataclasses.asdict(row) for row in result.rows],
            "notes": list(result.notes),
        }

    def to_markdown(self, result: AblationResult) -> str:
        """The table and its notes."""
        head, *body = ablation_table(result)
        rules = ("---", *("---:" for _ in head[1:]))
        table = "\n".join(f"| {' | '.join(row)} |" for row in (head, rules, *body))
        base = f"Base: {describe(self.series.run.recipe)}. Seeds: {', '.join(map(str, self.seeds))}."
        notes = "".join(f"\n- {note}" for note in result.notes)
        return f"# {result.title}\n\n{base}\n\n{table}\n{notes}\n"

    def _notes(self, outcomes: Mapping[str, Outcome], evaluated: str | None) -> tuple[str, ...]:
        split = self.series.run.recipe.split
        notes = []
        if evaluated == "validation":
            notes.append(f"accuracies are of split {split}'s validation images; the test images play no part")
        elif evaluated is not None:
            notes.append(f"accuracies are of the test images: split {split} has no validation images")
        notes.append("differences are to the base, seed by seed, in percentage points; intervals are Student's, 95 %")
        for member in self.members:
            outcome = outcomes.get(member.name)
            if outcome is not None and outcome.error is not None:
                notes.append(f"{member.name} {outcome.state}: {outcome.error}")
            elif outcome is not None and outcome.figures is not None and evaluated == "validation":
                steps = outcome.figures.steps
                side = resolution(resolve(member.config), steps - 1, steps)
                if side is not None:
                    notes.append(f"{member.name} ended at {side} pixels a side, which its accuracy is of too")
        return tuple(notes)


def _stored_plan(series: Series) -> dict[str, tuple[str, ...]]:
    try:
        return {variant["name"]: tuple(variant["changes"]) for variant in series.stored["variants"]}
    except (KeyError, TypeError):
        raise CheckpointError(f"{series.path / ABLATION} is damaged: no variants with a name and changes") from None


def _row(name: str, changes: tuple[str, ...], ended: Mapping[int, Outcome], base: AblationRow | None) -> AblationRow:
    done = {seed: outcome.figures for seed, outcome in ended.items() if outcome.figures}
    accuracies = {seed: _accuracy(figures) for seed, figures in done.items()}
    times = {seed: figures.train_seconds for seed, figures in done.items()}
    paired = [seed for seed in done if base is not None and seed in base.accuracies]
    return AblationRow(
        name=name,
        changes=changes,
        accuracies=accuracies,
        seconds=times,
        errors={seed: f"{outcome.state}: {outcome.error}" for seed, outcome in ended.items() if outcome.error},
        accuracy=estimate(list(accuracies.values())),
        difference=estimate([accuracies[seed] - base.accuracies[seed] for seed in paired]) if base else None,
        train_seconds=estimate(list(times.values())),
        seconds_difference=estimate([times[seed] - base.seconds[seed] for seed in paired]) if base else None,
    )


def _run_name(variant: str, seed: int) -> str:
    return f"{variant}, seed {seed}"


def _accuracy(figures: Figures) -> float:
    """What is compared: never the test's where there are validation images."""
    return figures.eval_accuracy if figures.evaluated == "validation" else figures.test_accuracy


def _say(outcome: Outcome) -> str:
    figures = outcome.figures
    if figures is None:
        return f"{outcome.state}: {outcome.error}"
    return f"{figures.evaluated} accuracy {percent(_accuracy(figures))}, {seconds(figures.train_seconds)} s of training"


def _points(difference: float) -> str:
    return f"{100 * difference:+.2f}"
