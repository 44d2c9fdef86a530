"""What does a recipe reach in which time on a CPU, beside the original report's recipe and beside airbench94?

    python -m benchmarks.recipe_race --data ARCHIVE --arch small --split report --contestants report fast:3,11
    python -m benchmarks.recipe_race --data ARCHIVE --arch small --split full --contestants fast:4 airbench94:1.1
    python -m benchmarks.recipe_race --show [--minutes 10 20]

Each run is a process of its own. In mode "beside" two run at a time, each with one thread on a core of its own, so that
all meet the same machine; in mode "turn" one at a time, with two threads. Each finished run is kept at once in
results/recipe_race.json, and one that is there already, with the same recipe, is not repeated: a race may take days.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, get_args

from benchmarks.harness import RESULTS
from benchmarks.trainers import BUDGETS, CONTESTANTS
from benchmarks.trainers.picture import save
from benchmarks.trainers.pool import Entry, Mode, Planned, Pool
from benchmarks.trainers.records import Records, Run, races
from benchmarks.trainers.summary import epochs_within, summarise
from fastcifar import open_store
from fastcifar.errors import ConfigError, FastcifarError

QUESTION = (__doc__ or "").splitlines()[0]


def entries(
    specs: Sequence[str], *, archs: Sequence[str], split: str, seeds: Sequence[int], change: Sequence[str] = ()
) -> list[Entry]:
    """The runs that are wanted, seed by seed, so that a race that is cut short has some of all.

    Args:
        specs: such as "report" or "fast:3,11"; without numbers of epochs, those of `BUDGETS`. None: all there.
        archs: nets.
        split: the scheme of the data.
        seeds: a run each.
        change: changes to the recipe of each contestant of ours that is no base.

    Raises:
        ConfigError: a contestant or its epochs are not there or not possible.
    """
    found = []
    for arch in archs:
        budgets = BUDGETS.get((arch, split), {})
        if not (specs or budgets):
            raise ConfigError(f"contestants: none has a budget for arch {arch}, split {split}: name them")
        for spec in specs or budgets:
            name, _, given = spec.partition(":")
            if name not in CONTESTANTS:
                raise ConfigError(f"contestants: unknown {name!r}: choose from {', '.join(CONTESTANTS)}")
            contestant = CONTESTANTS[name]
            try:
                epochs = tuple(float(part) for part in given.split(",")) if given else budgets.get(name, ())
            except ValueError:
                raise ConfigError(f"contestants: {spec!r}: epochs must be numbers, as in {name}:3,11") from None
            if not epochs:
                raise ConfigError(
                    f"contestants: {name} has no budget for arch {arch}, split {split}: say {name}:EPOCHS"
                )
            laid_over = tuple(change) if contestant.ours and not contestant.base else ()
            for count in epochs:
                found.append((contestant, arch, count, laid_over))
    return [
        Entry(contestant=contestant, arch=arch, split=split, epochs=count, seed=seed, change=laid_over)
        for seed in seeds
        for contestant, arch, count, laid_over in found
    ]


def compete(records: Records, pool: Pool, planned: Sequence[Planned], *, again: bool = False) -> None:
    """Run what is not there yet, or everything `again`; keep each run as it ends."""
    wanted = {one.known["digest"]: one for one in planned}  # those with a net of their own are there once for each arch
    left = [one for one in wanted.values() if again or not records.has(one.known["digest"])]
    print(f"{len(left)} of {len(wanted)} runs to do", flush=True)
    for run in pool.run(left):
        records.add(run)
        print(_line(run), flush=True)


def _line(run: Run) -> str:
    """A finished run, on the console."""
    who = (
        f"{', '.join([run['contestant'], *run['change']])}, {run['arch']}, {run['epochs']:g} epochs, seed {run['seed']}"
    )
    if "failed" in run:
        return f"  {who}: failed: {run['failed']}"
    tta = f" ({100 * run['tta_accuracy']:.2f} % with {run['tta']})" if run["tta_accuracy"] else ""
    busy = run["processor_seconds"] / run["seconds"] / run["threads"]
    return f"  {who}: {100 * run['accuracy']:.2f} %{tta} in {run['train_seconds']:,.0f} s, processor {100 * busy:.0f} %"


def show(found: Sequence[dict[str, Any]], *, minutes: Sequence[float] = ()) -> None:
    """The summary on the console; for each of `minutes`, how many epochs fit."""
    for race in found:
        print(f"{race['arch']}, split {race['split']}, mode {race['mode']}, {race['threads']} threads")
        for setting in race["settings"]:
            who = f"  {setting['title']}, {setting['epochs']:g} epochs"
            for failure in setting["failed"]:
                print(f"{who}: failed: {failure}")
            if "seeds" in setting:
                values = ", ".join(f"{100 * value:.2f}" for value in setting["accuracy"]["values"])
                fitting = (f", {time:g} min: {epochs_within(setting, 60 * time):g} epochs" for time in minutes)
                print(f"{who}: {setting['train_seconds']['mean']:,.0f} s, {values} %{''.join(fitting)}")
        for pair in race["comparisons"]:
            time, accuracy = pair["time"], pair["accuracy"]
            faster = f"{time['ratio']:.2f} times as fast" if "ratio" in time else time["target"]
            better = f"{100 * accuracy['mean']:+.2f} points" if "mean" in accuracy else accuracy["target"]
            base = f"{pair['base']}, {pair['base_epochs']:g} epochs ({pair['measure']})"
            print(f"  {pair['other']} beside {base}: to the same accuracy: {faster}; in the same time: {better}")


def main(arguments: Sequence[str]) -> None:
    """Race, summarise, draw."""
    parser = argparse.ArgumentParser(description=QUESTION)
    parser.add_argument("--dataset", default="cifar10", help="a registered name or the folder of a store")
    parser.add_argument("--data", type=Path, help="the data set's archive or unpacked folder")
    parser.add_argument("--allow-unverified", action="store_true", help="of an unpublished checksum; it is recorded")
    parser.add_argument("--arch", nargs="+", default=["big", "small"])
    parser.add_argument("--split", default="report", help="report, full or holdout")
    parser.add_argument("--contestants", nargs="+", default=[], help=f"NAME or NAME:EPOCHS: {', '.join(CONTESTANTS)}")
    parser.add_argument("--change", nargs="+", default=[], help="changes to recipe fast, as in `fastcifar train`")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0])
    parser.add_argument("--mode", choices=get_args(Mode), default="beside")
    parser.add_argument("--again", action="store_true", help="also what was run before")
    parser.add_argument("--show", action="store_true", help="run nothing")
    parser.add_argument("--minutes", nargs="+", type=float, default=[], help="say how many epochs fit into them")
    parser.add_argument("--out", default="recipe_race", help="name of the files in benchmarks/results")
    options = parser.parse_args(arguments)
    records = Records(RESULTS / f"{options.out}.json", QUESTION, summarise)
    try:
        if not options.show:
            wanted = entries(
                options.contestants,
                archs=options.arch,
                split=options.split,
                seeds=options.seeds,
                change=options.change,
            )
            store = open_store(options.dataset, data=options.data, allow_unverified=options.allow_unverified)
            pool = Pool(store, options.mode)
            compete(records, pool, [pool.plan(entry) for entry in wanted], again=options.again)
        runs = records.runs()
        show(summarise(runs), minutes=options.minutes)
        if any("failed" not in run for run in runs):
            save(races(runs), RESULTS / f"{options.out}.svg")
    except FastcifarError as error:
        sys.exit(f"recipe_race: {error}")
    except KeyboardInterrupt:
        sys.exit("recipe_race: stopped; the runs that had ended are kept, the same command goes on")


if __name__ == "__main__":
    main(sys.argv[1:])
