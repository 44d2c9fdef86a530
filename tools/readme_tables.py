"""The tables of README.md, from benchmarks/results/*.json: no figure in it is typed by hand.

Example:
    write_tables()      # replaces what stands between the markers
"""

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results"
README = ROOT / "README.md"

# What the original report states, on the published pixels and a Colab GPU.
REPORT = {
    "big": {
        "parameters": "5,655,498",
        "accuracy": "72.9 %",
        "train_seconds": "116.72 s",
        "validation": "about 71 %",
        "best": "car",
    },
    "small": {
        "parameters": "1,816,714",
        "accuracy": "69.23 %",
        "train_seconds": "60.31 s",
        "validation": "about 71 %",
        "best": "truck",
    },
}


def percent(value: float) -> str:
    """A fraction, as the tables show it."""
    return f"{100 * value:.2f} %"


ROWS: tuple[tuple[str, str, Callable[[Any], str]], ...] = (
    ("parameters (Table 1)", "parameters", "{:,}".format),
    ("test accuracy (Table 2)", "accuracy", percent),
    ("training time (Table 2)", "train_seconds", "{:,.0f} s".format),
    ("highest validation accuracy", "validation", percent),
    ("class recognised best", "best", str),
)


def grid(head: list[str], rows: list[list[str]]) -> list[str]:
    """Markdown lines of a table."""
    return [f"| {' | '.join(cells)} |" for cells in (head, ["---"] * len(head), *rows)]


def conditions(runs: list[dict[str, Any]]) -> str:
    """Data, hardware and version that runs share, for the line under a table."""
    places = {
        ", ".join(run["environment"]["gpus"])
        or f"{run['environment']['cpu']}, {run['environment']['threads']} CPU thread"
        + "s" * (run["environment"]["threads"] != 1)
        for run in runs
    }
    verified = all(run["verified"] for run in runs)
    data = "on the published CIFAR-10" if verified else "on an unverified copy of CIFAR-10"
    versions = {f"PyTorch {run['environment']['torch']}" for run in runs}
    return f"{data}; {' and '.join(sorted(places))}; {' and '.join(sorted(versions))}"


def report_table(runs: list[dict[str, Any]]) -> list[str]:
    """The original report's Tables 1 and 2, beside runs of --recipe report."""
    by_arch = {run["arch"]: run for run in runs if run["recipe"] == "report"}
    names = [name for name in REPORT if name in by_arch]
    if not names:
        return []
    head = ["", *(f"{name.capitalize()}, {who}" for name in names for who in ("the report", "fastcifar"))]
    rows = [
        [title, *(cell for name in names for cell in (REPORT[name][key], show(by_arch[name][key])))]
        for title, key, show in ROWS
    ]
    ours = [by_arch[name] for name in names]
    epochs = " and ".join(sorted({str(run["epochs"]) for run in ours}))
    note = (
        f"Ours: {epochs} epochs of `--recipe report`, one run each, {conditions(ours)}. "
        "The report's: a Colab GPU, so the times compare machines, not programs."
    )
    return [*grid(head, rows), "", note]


def fast_table(runs: list[dict[str, Any]]) -> list[str]:
    """Runs of other recipes."""
    others = [run for run in runs if run["recipe"] != "report"]
    if not others:
        return []
    head = ["net", "recipe", "split", "epochs", "training time", "test accuracy"]
    rows = [
        [
            run["arch"],
            run["recipe"],
            run["split"],
            str(run["epochs"]),
            f"{run['train_seconds']:,.0f} s",
            percent(run["accuracy"]),
        ]
        for run in others
    ]
    return [*grid(head, rows), "", f"One run each, {conditions(others)}."]


def loader_table(content: Mapping[str, Any]) -> list[str]:
    """The loader's speed, beside the report's pipeline in the same process."""
    results = content["results"]
    base = next(result["median"] for name, result in results.items() if name.startswith("the report's"))
    head = ["loader", "images/s (95 % interval)", "times the last row"]
    rows = [
        [name, f"{result['median']:,.0f} ± {result['interval95']:,.0f}", f"{result['median'] / base:,.1f}"]
        for name, result in results.items()
    ]
    where = content["receipt"]
    note = (
        f"`make bench`: in turn in one process, {where['cpu']}, {where['threads']} threads, PyTorch {where['torch']}."
    )
    return [*grid(head, rows), "", note]


def replace_block(text: str, name: str, lines: list[str]) -> str:
    """`text` with what stands between the markers of table `name` replaced.

    Raises:
        ValueError: the markers are not there.
    """
    begin, end = f"<!-- {name} table: generated -->", f"<!-- end of {name} table -->"
    before, rest = text.split(begin)
    after = rest.split(end)[1]
    return "\n".join([before + begin, "", *lines, *([""] if lines else []), end + after])


def with_tables(text: str) -> str:
    """README.md's `text` with every table that there are results for."""
    if (RESULTS / "runs.json").exists():
        runs = json.loads((RESULTS / "runs.json").read_text())
        text = replace_block(text, "report", report_table(runs))
        text = replace_block(text, "fast", fast_table(runs))
    if (RESULTS / "loader_speed.json").exists():
        text = replace_block(text, "loader", loader_table(json.loads((RESULTS / "loader_speed.json").read_text())))
    return text


def write_tables() -> None:
    """Bring README.md up to date."""
    README.write_text(with_tables(README.read_text(encoding="utf-8")), encoding="utf-8")
