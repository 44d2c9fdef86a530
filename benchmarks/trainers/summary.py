"""What the runs of the race of recipes say together: means over seeds, and each recipe beside those it is held against.

Example:
    summarise(records.runs())[0]["comparisons"]
"""

import itertools
import math
import statistics
from collections.abc import Sequence
from typing import Any

from scipy.stats import t as student

from benchmarks.trainers import CONTESTANTS
from benchmarks.trainers.records import Group, Run, processor_share, races

__all__ = ["difference", "epochs_within", "estimate", "ratio", "summarise"]

Setting = dict[str, Any]
_MEASURES = ("accuracy", "tta_accuracy")
_LONG = 3600  # seconds of training: what a run was at on the way is told of those that take an hour


def estimate(values: Sequence[float]) -> dict[str, Any]:
    """The mean, the half-width of Student's 95 % interval (None for a single value), and the values."""
    return {"mean": statistics.fmean(values), "interval95": _half_width(values), "values": list(values)}


def difference(first: Sequence[float], second: Sequence[float]) -> dict[str, Any]:
    """The mean of `first` minus that of `second`, with Welch's 95 % interval; None where either is a single value."""
    between = statistics.fmean(first) - statistics.fmean(second)
    return {"mean": between, "interval95": _half_width(first, second)}


def ratio(first: Sequence[float], second: Sequence[float]) -> dict[str, Any]:
    """The geometric mean of `first` divided by that of `second`, with the 95 % interval from the logarithms."""
    found = difference([math.log(value) for value in first], [math.log(value) for value in second])
    mean, around = found["mean"], found["interval95"]
    return {
        "ratio": math.exp(mean),
        "interval95": None if around is None else [math.exp(mean - around), math.exp(mean + around)],
    }


def _half_width(*samples: Sequence[float]) -> float | None:
    """Of the 95 % interval of a mean, or of the difference of two (Welch 1947)."""
    if min(map(len, samples)) < 2:
        return None
    parts = [(statistics.variance(values) / len(values), len(values) - 1) for values in samples]
    variance = sum(part for part, _ in parts)
    if variance == 0:
        return 0.0
    freedom = variance**2 / sum(part**2 / degrees for part, degrees in parts)
    return float(student.ppf(0.975, freedom)) * math.sqrt(variance)


def summarise(runs: Sequence[Run]) -> list[dict[str, Any]]:
    """Each of the `races`, as JSON values.

    Returns:
        Of each race what its runs have in common, and
        `settings`: for each group its estimates over seeds, or why it `failed`; `train_seconds` are times the
        share of its cores that a run had; so is the time in the `curve` of a long run, (seconds, test accuracy);
        `comparisons`: each base beside each other contestant, by the accuracy with and without test-time augmentation.
    """
    found = []
    for race in races(runs):
        settings = [_setting(group) for group in race.groups]
        found.append({**race.about, "settings": settings, "comparisons": _comparisons(settings)})
    return found


def epochs_within(setting: Setting, seconds: float) -> float:
    """How many epochs of a setting fit into `seconds` of training, by the time that its own took."""
    step = CONTESTANTS[setting["contestant"]].step
    fitting = seconds * setting["epochs"] / setting["train_seconds"]["mean"]
    return float(round(math.floor(fitting / step) * step, 2))


def _setting(group: Group) -> Setting:
    said: Setting = {"contestant": group.contestant, "title": group.title, "epochs": group.epochs}
    said["remark"] = CONTESTANTS[group.contestant].remark
    said["failed"] = [f"seed {run['seed']}: {run['failed']}" for run in group.failed]
    if not group.runs:
        return said
    first = group.runs[0]
    said |= {"seeds": [run["seed"] for run in group.runs]}
    said |= {name: first[name] for name in ("batch_size", "tta", "versions")}
    said["lr"] = first.get("recipe", {}).get("lr") if CONTESTANTS[group.contestant].ours else None
    said["train_seconds"] = estimate([run["train_seconds"] * processor_share(run) for run in group.runs])
    for name in _MEASURES:
        values = [run[name] for run in group.runs]
        said[name] = None if None in values else estimate(values)
    if first.get("curve_of") == "test" and said["train_seconds"]["mean"] >= _LONG:
        said["curve"] = [(seconds * processor_share(first), accuracy) for seconds, accuracy in first["curve"]]
    return said


def _comparisons(settings: Sequence[Setting]) -> list[dict[str, Any]]:
    ran = [setting for setting in settings if "seeds" in setting]
    bases = [setting for setting in ran if CONTESTANTS[setting["contestant"]].base]
    titles = dict.fromkeys(setting["title"] for setting in ran if setting not in bases)
    found = []
    for base, title, measure in itertools.product(bases, titles, _MEASURES):
        others = [setting for setting in ran if setting["title"] == title and setting[measure]]
        if base[measure] and others:
            found.append(_comparison(base, others, measure))
    return found


def _comparison(base: Setting, others: Sequence[Setting], measure: str) -> dict[str, Any]:
    """One contestant's settings beside a base: `time` to the same accuracy, `accuracy` in the same time.

    A setting reaches the base's mean accuracy if each of its runs ended there or above. Where none does, or none is as
    short, `target` says why there is no figure.
    """
    goal, limit = base[measure]["mean"], base["train_seconds"]["mean"]

    def seconds(setting: Setting) -> float:
        return float(setting["train_seconds"]["mean"])

    time: dict[str, Any]
    accuracy: dict[str, Any]
    if there := [setting for setting in others if min(setting[measure]["values"]) >= goal]:
        quickest = min(there, key=seconds)
        times = base["train_seconds"]["values"], quickest["train_seconds"]["values"]
        time = {"target": "reached", "epochs": quickest["epochs"], "seconds": seconds(quickest)}
        time |= {**ratio(*times), "runs": _runs(*times)}
    else:
        best = max(others, key=lambda setting: float(setting[measure]["mean"]))
        lowest = f"{best['epochs']:g} epochs ended at {100 * min(best[measure]['values']):.2f} %"
        time = {"target": f"not reached: {lowest}{' at the lowest' * (len(best['seeds']) > 1)} of {100 * goal:.2f} %"}
    if short := [setting for setting in others if seconds(setting) <= limit]:
        longest = max(short, key=seconds)
        accuracies = longest[measure]["values"], base[measure]["values"]
        accuracy = {"target": "reached", "epochs": longest["epochs"], "seconds": seconds(longest)}
        accuracy |= {"reached": longest[measure]["mean"], **difference(*accuracies), "runs": _runs(*accuracies)}
    else:
        shortest = min(map(seconds, others))
        accuracy = {"target": f"no run is within {limit:,.0f} s: the shortest took {shortest:,.0f} s"}
    return {
        "base": base["title"],
        "base_epochs": base["epochs"],
        "other": others[0]["title"],
        "measure": measure,
        "goal": goal,
        "limit": limit,
        "time": time,
        "accuracy": accuracy,
    }


def _runs(first: Sequence[float], second: Sequence[float]) -> str:
    """How many runs a figure is of."""
    counts = len(first), len(second)
    return "one run each" if counts == (1, 1) else f"{counts[0]} and {counts[1]} runs"
