"""The tables of the race of recipes: what each reached in which time, then each beside those it is held against.

Example:
    recipe_race_table(json.loads((RESULTS / "recipe_race.json").read_text()))       # everything
    recipe_summary_table(json.loads((RESULTS / "recipe_race.json").read_text()))    # the best beside each
    recipe_curves_table(json.loads((RESULTS / "recipe_race.json").read_text()))     # long runs, on the way
"""

from collections.abc import Mapping
from typing import Any

from table_cells import grid, percent

__all__ = ["recipe_curves_table", "recipe_race_table", "recipe_summary_table"]

_THREADS = {"beside": "1 thread", "turn": "2 threads"}
_MODES = {"beside": "one or two at a time, each with 1 thread on a core of its own", "turn": "in turn, 2 threads"}


def recipe_race_table(content: Mapping[str, Any]) -> list[str]:
    """Markdown lines: a table of recipes, one of comparisons where there are any, and a note."""
    races = content["summary"]
    modes = [_MODES[mode] for mode in dict.fromkeys(race["mode"] for race in races)]
    cpus = sorted({race["cpu"] for race in races})
    recipes, pairs, versions = [], [], set()
    for race in races:
        where = f"{race['arch']}, {race['split']}"
        if len(modes) > 1:
            where += f", {_THREADS[race['mode']]}"
        if len(cpus) > 1:
            where += f", {race['cpu']}"
        ran = [setting for setting in race["settings"] if "seeds" in setting]
        ran.sort(key=lambda setting: setting["train_seconds"]["mean"])
        recipes += [[where, *_recipe(setting)] for setting in ran]
        for setting in race["settings"]:
            failures = [f"failed: {failure}" for failure in setting["failed"]]
            recipes += [
                [where, setting["title"], f"{setting['epochs']:g}", "", "", failure, ""] for failure in failures
            ]
        pairs += [[where, *_pair(pair)] for pair in race["comparisons"]]
        for setting in ran:
            versions.add(", ".join(f"{name} {version}" for name, version in setting["versions"].items()))
    data = "the published CIFAR-10" if all(race["verified"] for race in races) else "an unverified copy of CIFAR-10"
    remarks = dict.fromkeys(setting["remark"] for race in races for setting in race["settings"] if setting["remark"])
    note = (
        f"`python -m benchmarks.recipe_race`: {'; or '.join(modes)}. Times are seconds of training "
        "alone; of runs with one thread, times the share of its core that a run had (others use the machine too). 95 % "
        "intervals over seeds. A recipe comes to an accuracy when each of its runs ended there or above; times are of "
        "whole runs on both sides: the report's recipe, whose accuracy jumps, is at times where it ends before. "
        f"{''.join(f'{remark}. ' for remark in remarks)}On {data}; {', '.join(cpus)}; {'; '.join(sorted(versions))}."
    )
    head = ["net, split", "recipe", "epochs", "runs", "training time", "test accuracy", "with test-time augmentation"]
    against = [
        "net, split",
        "recipe",
        "compared with",
        "which reaches",
        "a run that ends there",
        "accuracy in its time",
    ]
    return [*grid(head, recipes), *(["", *grid(against, pairs)] if pairs else []), "", note]


def recipe_curves_table(content: Mapping[str, Any]) -> list[str]:
    """Markdown lines: where the accuracy of each long run stood on the way."""
    rows = []
    for race in content["summary"]:
        for setting in race["settings"]:
            if "curve" in setting:
                where = f"{race['arch']}, {race['split']}, {_THREADS[race['mode']]}, {race['cpu']}"
                name = f"{setting['title']}, {_epochs(setting)}"
                rows += [[where, name, f"{at / 60:,.0f}", percent(accuracy)] for at, accuracy in setting["curve"]]
                if setting["tta_accuracy"]:
                    tta = f"{percent(setting['tta_accuracy']['values'][0])} with test-time augmentation"
                    rows[-1][-1] += f"; {tta}"
    return grid(["net, split", "recipe", "minutes of training", "test accuracy"], rows) if rows else []


def recipe_summary_table(content: Mapping[str, Any]) -> list[str]:
    """Markdown lines: beside each that ours are held against, the soonest of ours and the best of ours."""
    rows = []
    for race in content["summary"]:
        beside: dict[tuple[str, float], list[Mapping[str, Any]]] = {}
        for pair in race["comparisons"]:
            if pair["measure"] == "accuracy":
                beside.setdefault((pair["base"], pair["base_epochs"]), []).append(pair)
        for (base, epochs), pairs in sorted(beside.items()):
            soonest = max(pairs, key=lambda pair: pair["time"].get("ratio", 0.0))
            best = max(pairs, key=lambda pair: pair["accuracy"].get("mean", -1.0))
            goal = f"{base}, {_count(epochs)}: {percent(pairs[0]['goal'])} in {pairs[0]['limit']:,.0f} s"
            time, accuracy = _pair(soonest)[-2], _pair(best)[-1]
            if "ratio" in soonest["time"]:
                time = f"{soonest['time']['ratio']:.1f} times as fast: {_run(soonest, soonest['time'])}"
            if "mean" in best["accuracy"]:
                accuracy = f"{100 * best['accuracy']['mean']:+.1f} points: {_run(best, best['accuracy'])}"
            rows.append([f"{race['arch']}, {race['split']}", race["cpu"], goal, time, accuracy])
        for setting in race["settings"] if not race["comparisons"] else ():
            if "curve" in setting:  # a long run stands for itself
                reached = f"{percent(setting['accuracy']['mean'])} in {setting['train_seconds']['mean']:,.0f} s"
                if setting["tta_accuracy"]:
                    reached += f", {percent(setting['tta_accuracy']['mean'])} with test-time augmentation"
                name = f"nothing: {setting['title']}, {_count(setting['epochs'])}, {_THREADS[race['mode']]}"
                rows.append([f"{race['arch']}, {race['split']}", race["cpu"], name, "", reached])
    head = ["net, split", "machine", "compared with", "a run that ends there", "accuracy in its time"]
    return grid(head, rows)


def _run(pair: Mapping[str, Any], reached: Mapping[str, Any]) -> str:
    return f"{pair['other']}, {_epochs(reached)}, {reached['seconds']:,.0f} s"


def _epochs(reached: Mapping[str, Any]) -> str:
    return _count(reached["epochs"])


def _count(epochs: float) -> str:
    return f"{epochs:g} epoch{'s' * (epochs != 1)}"


def _recipe(setting: Mapping[str, Any]) -> list[str]:
    tta, title = setting["tta_accuracy"], setting["title"]
    if setting["lr"] and ", lr=" not in title:
        title += f", lr {setting['lr']:g}"
    return [
        title,
        f"{setting['epochs']:g}",
        str(len(setting["seeds"])),
        f"{_spread(setting['train_seconds'])} s",
        f"{_spread(setting['accuracy'], scale=100, digits=2)} %",
        f"{_spread(tta, scale=100, digits=2)} % ({setting['tta']})" if tta else "",
    ]


def _spread(estimate: Mapping[str, Any], *, scale: float = 1, digits: int = 0) -> str:
    """A mean over seeds and its interval; of one run the value alone."""
    around = estimate["interval95"]
    return f"{scale * estimate['mean']:,.{digits}f}" + (
        f" ± {scale * around:,.{digits}f}" if around is not None else ""
    )


def _pair(pair: Mapping[str, Any]) -> list[str]:
    time, accuracy = pair["time"], pair["accuracy"]
    faster, better = time["target"], accuracy["target"]
    if "ratio" in time:
        span = time["interval95"]
        certainty = time["runs"] if span is None else f"{span[0]:.2f} to {span[1]:.2f}"
        faster = f"{time['ratio']:.2f} times as fast ({certainty}): {_epochs(time)}, {time['seconds']:,.0f} s"
    if "mean" in accuracy:
        around = accuracy["interval95"]
        certainty = f" points ({accuracy['runs']})" if around is None else f" ± {100 * around:.2f} points"
        more = f"{100 * accuracy['mean']:+.2f}{certainty}"
        better = f"{more}: {_epochs(accuracy)}, {percent(accuracy['reached'])}"
    tta = " with test-time augmentation" * (pair["measure"] == "tta_accuracy")
    base = f"{pair['base']}, {_count(pair['base_epochs'])}"
    return [pair["other"], base, f"{percent(pair['goal'])}{tta}, {pair['limit']:,.0f} s", faster, better]
