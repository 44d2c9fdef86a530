"""What every benchmark shares: alternation, repeats, an interval, and a receipt that says where it ran.

Example:
    results = race({"a": run_a, "b": run_b}, repeats=5)      # each returns items done; called in turn
    save("question", results)
"""

import json
import math
import os
import platform
import statistics
import subprocess
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parent / "results"


def race(contestants: Mapping[str, Callable[[], int]], *, repeats: int) -> dict[str, dict[str, Any]]:
    """Items a second of each contestant: one warm-up, then `repeats` rounds in which each runs once.

    In turn, because shared machines drift: what disturbs one round disturbs all contestants.

    Returns:
        For each: the median, the half-width of its 95 % interval (from the rounds' deviation), and all rounds.
    """
    for run in contestants.values():
        run()
    speeds: dict[str, list[float]] = {name: [] for name in contestants}
    for _ in range(repeats):
        for name, run in contestants.items():
            started = time.perf_counter()
            items = run()
            speeds[name].append(items / (time.perf_counter() - started))
    return {name: _summary(values) for name, values in speeds.items()}


def _summary(values: list[float]) -> dict[str, Any]:
    deviation = statistics.stdev(values) if len(values) > 1 else math.nan
    # 1.2533: the standard error of a median of normal samples is that much wider than the mean's
    half_width = 1.96 * 1.2533 * deviation / math.sqrt(len(values))
    return {"median": statistics.median(values), "interval95": half_width, "rounds": values}


def receipt() -> dict[str, Any]:
    """Hardware, versions and commit."""
    from fastcifar.runtime import environment

    git = ["git", "-C", str(Path(__file__).parent), "rev-parse", "HEAD"]
    commit = subprocess.run(git, capture_output=True, text=True, check=False).stdout.strip() or None
    load = os.getloadavg() if hasattr(os, "getloadavg") else None
    return {**environment(), "commit": commit, "machine": platform.machine(), "load_average": load}


def save(name: str, question: str, results: Mapping[str, Any]) -> Path:
    """Write results/NAME.json."""
    RESULTS.mkdir(exist_ok=True)
    path = RESULTS / f"{name}.json"
    content = {"question": question, "results": results, "receipt": receipt()}
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    return path
