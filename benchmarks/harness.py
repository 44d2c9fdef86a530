"""What every benchmark shares: alternation, repeats, an interval, and a receipt that says where it ran.

Example:
    results = race({"a": run_a, "b": run_b}, repeats=7)      # each returns items done; called in turn
    save("question", results)
"""

import datetime
import json
import math
import os
import platform
import statistics
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from scipy.stats import t as student

RESULTS = Path(__file__).parent / "results"
_WRITTEN = [f":(top,exclude){place}" for place in ("benchmarks/results", "benchmarks/README.md", "README.md")]
"""What benchmarks write: a change there is no change to the code."""


def alternate(
    contestants: Mapping[str, Callable[[], float]], *, repeats: int, warm_up: int = 1
) -> dict[str, dict[str, Any]]:
    """Measure each contestant in turn: `warm_up` rounds that are not counted, then `repeats` rounds.

    In turn, because shared machines drift: what disturbs one round disturbs all contestants. Each round begins one
    contestant further on, so that none always follows the same one.

    Args:
        contestants: each gives one measurement when called. One that raises is out of the race.
        repeats: rounds that count.
        warm_up: rounds that do not.

    Returns:
        For each what `summary` says, or `{"failed": reason}`.
    """
    names = list(contestants)
    values: dict[str, list[float]] = {name: [] for name in names}
    failed: dict[str, str] = {}
    for number in range(-warm_up, repeats):
        first = number % max(len(names), 1)
        for name in names[first:] + names[:first]:
            if name in failed:
                continue
            try:
                value = contestants[name]()
            except Exception as error:
                failed[name] = reason(error)
                continue
            if number >= 0:
                values[name].append(value)
    return {name: {"failed": failed[name]} if name in failed else summary(values[name]) for name in names}


def race(contestants: Mapping[str, Callable[[], int]], *, repeats: int) -> dict[str, dict[str, Any]]:
    """Items a second of each contestant, which returns how many it did; see `alternate`."""

    def timed(run: Callable[[], int]) -> Callable[[], float]:
        def measure() -> float:
            started = time.perf_counter()
            items = run()
            return items / (time.perf_counter() - started)

        return measure

    return alternate({name: timed(run) for name, run in contestants.items()}, repeats=repeats)


def summary(values: Sequence[float]) -> dict[str, Any]:
    """The median, the half-width of its 95 % interval (from the rounds' deviation), and all rounds."""
    half_width = math.nan
    if len(values) > 1:
        # 1.2533: the standard error of a median of normal samples is that much wider than the mean's
        error = 1.2533 * statistics.stdev(values) / math.sqrt(len(values))
        half_width = float(student.ppf(0.975, len(values) - 1)) * error
    return {"median": statistics.median(values), "interval95": half_width, "rounds": list(values)}


def reason(error: BaseException) -> str:
    """An exception in one line."""
    return next(iter(str(error).strip().splitlines()), "") or type(error).__name__


def receipt() -> dict[str, Any]:
    """Hardware, versions, commit and date."""
    from fastcifar.runtime import environment

    load = os.getloadavg() if hasattr(os, "getloadavg") else None
    return {
        **environment(),
        "commit": _git("rev-parse", "HEAD") or None,
        "uncommitted": bool(_git("status", "--porcelain", "--untracked-files=no", "--", ":(top)", *_WRITTEN)),
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "machine": platform.machine(),
        "load_average": load,
    }


def _git(*arguments: str) -> str:
    command = ["git", "-C", str(Path(__file__).parent), *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=False).stdout.strip()


def save(name: str, question: str, results: Any, **more: Any) -> Path:
    """Write results/NAME.json: the question, the results, `more`, and the receipt."""
    RESULTS.mkdir(exist_ok=True)
    path = RESULTS / f"{name}.json"
    content = {"question": question, "results": results, **more, "receipt": receipt()}
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    return path
