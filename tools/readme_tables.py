"""The tables of README.md and benchmarks/README.md, from benchmarks/results/*.json: no figure there is typed by hand.

Example:
    write_tables()      # replaces what stands between the markers
"""

import json
import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from gpu_tables import gpu_check_table, gpu_seeds_table, gpu_summary_table, gpu_training_table, gpu_tries_table
from recipe_tables import recipe_curves_table, recipe_race_table, recipe_summary_table
from table_cells import grid, measured, percent, where

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results"
PAGES = (ROOT / "README.md", ROOT / "benchmarks" / "README.md")

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


ROWS: tuple[tuple[str, str, Callable[[Any], str]], ...] = (
    ("parameters (Table 1)", "parameters", "{:,}".format),
    ("test accuracy (Table 2)", "accuracy", percent),
    ("training time (Table 2)", "train_seconds", "{:,.0f} s".format),
    ("highest validation accuracy", "validation", percent),
    ("class recognised best", "best", str),
)


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


def race_table(content: Mapping[str, Any]) -> list[str]:
    """The loaders that people use, making the same batches; what failed comes last, with the reason."""
    results = content["results"]
    ran = [(name, result) for name, result in results.items() if "failed" not in result]
    base = results[content["base"]].get("median", math.nan)
    head = ["loader", "what differs", "images/s (95 % interval)", "times slower", "first batch", "version"]
    rows = [
        [
            name + chosen(result["setting"]),
            "; ".join([*result["differences"], *filter(None, [result["remark"]])]) or "nothing",
            measured(result),
            f"{base / result['median']:,.1f}",
            f"{result['first_batch_seconds']:.2f} s",
            result["version"],
        ]
        for name, result in sorted(ran, key=lambda item: -item[1]["median"])
    ]
    rows += [
        [name, "; ".join(filter(None, [result["remark"]])), measured(result), "", "", ""]
        for name, result in results.items()
        if "failed" in result
    ]
    note = (
        f"`make bench`: {content['images']} images of 32x32; each loader in a process of its own, in the fastest of "
        f"the settings that were tried, in turn, {content['repeats']} rounds of {content['seconds']:g} s or more, "
        "while all others stand still. All shuffle, draw a crop (4 pixels, reflected) and a flip for each image, and "
        "standardise to float32, in batches of 512, but for what differs. The first batch is timed from making the "
        "loader, its libraries imported, its data converted and fastcifar's kernel compiled before; who compiles in "
        "each process does so within that time. Other projects' loaders run with the PyTorch that their "
        f"environment pins (benchmarks/requirements). {where(content)}."
    )
    return [*grid(head, rows), "", note]


def chosen(setting: Mapping[str, Any]) -> str:
    """The setting that raced, behind a loader's name."""
    return f" ({', '.join(f'{key} {value}' for key, value in setting.items())})" if setting else ""


def ceiling_table(content: Mapping[str, Any]) -> list[str]:
    """The loader beside the same reads and writes without arithmetic."""
    results = content["results"]
    own = results["fastcifar"]
    what = {
        "fastcifar": "fastcifar: crop, flip, standardise",
        "gather and write": "the same gather and as many bytes written, no arithmetic",
        "copy": "a copy of as many bytes (memcpy)",
    }
    rows = [
        [title, measured(results[name]), f"{100 * own['median'] / results[name]['median']:.0f} %"]
        for name, title in what.items()
    ]
    note = (
        f"`make bench`: in turn in one process; {content['bytes_read']:,} bytes read and {content['bytes_written']:,} "
        f"written for an image, batches of 512. {where(content)}."
    )
    return [*grid(["", "images/s (95 % interval)", "fastcifar's share of it"], rows), "", note]


def safety_table(content: Mapping[str, Any]) -> list[str]:
    """What a checkpoint costs the training thread, and checksums the first batch."""
    results = content["results"]
    rows = [[name, f"{measured(result, unit=0.001)} ms"] for name, result in results.items()]
    checked, unchecked, first = (
        results[name] for name in ("the store's bytes, each checked", "the store's bytes, none checked", "first batch")
    )
    if not any("failed" in result for result in (checked, unchecked, first)):
        share = (checked["median"] - unchecked["median"]) / first["median"]
        rows.append(["checksums' share of the time to the first batch", f"{100 * share:.1f} %"])
    note = (
        "`python -m benchmarks.safety`: a checkpoint is copied in the training thread and written by another, or all "
        "at once; the store is read in one process, the first batch from a new one that has imported torch; "
        f"{content['images']:,} images. {where(content)}."
    )
    return [*grid(["", "95 % interval"], rows), "", note]


def training_step_table(content: Mapping[str, Any]) -> list[str]:
    """A training step beside its convolutions and matrix products alone, and what its batch costs."""
    rows = []
    for entry in content["results"]:
        raced, shares = entry["raced"], entry["shares"]
        rows.append(
            [
                f"{entry['arch']}, {entry['batch_size']}, {entry['precision']}",
                measured(raced["step"]),
                f"{measured(shares['input'], unit=0.01, digits=1)} %",
                f"{measured(shares['batches'], unit=0.01, digits=2)} %",
                measured(raced["bare"]),
                f"{measured(shares['of bare'], unit=0.01, digits=1)} %",
                measured(shares["reduced"], digits=2),
            ]
        )
    side = content["reduced"]
    head = [
        *("net, batch, type", "images/s (95 % interval)", "more than on one batch again and again", "making the batch"),
        *("PyTorch's convolutions and products alone", "the step's share of it", f"times faster at {side}x{side}"),
    ]
    note = (
        "`python -m benchmarks.training_step`: recipe fast, channels-last, 32x32 pixels; bfloat16 is what --amp "
        "computes in; in turn in one process; forward and backward, optimiser and sums included, and nothing left out "
        "of what a run does for a step. Our convolutions may take fewer products, so that a step may be faster "
        f"than PyTorch's alone. {where(content)}."
    )
    return [*grid(head, rows), "", note]


def scaling_table(content: Mapping[str, Any]) -> list[str]:
    """Threads, batch sizes, numbers of samples, and what a batch costs at least."""
    rows = []
    for title, series in content["results"].items():
        for name, result in series.items():
            cost = "" if "failed" in result else f"{1e6 * size_of(title, name) / result['median']:,.0f} µs"
            rows.append([title, name, measured(result), cost])
    note = (
        "`make bench`: crop, flip, float32; batches of 512, 32x32 pixels and all threads, but for what a row varies. "
        "Numbers of samples at 16x16, since ten million images of 32x32 would need 31 GB; they are in memory. "
        f"{where(content)}."
    )
    return [*grid(["what varies", "", "images/s (95 % interval)", "a batch"], rows), "", note]


def size_of(title: str, name: str) -> int:
    """Images in a batch of a row of the scaling table."""
    return int(name) if title.startswith("batch") else 512


def first_batch_table(content: Mapping[str, Any]) -> list[str]:
    """Seconds from a new process to the first batch."""
    rows = [[name, measured(result, digits=2)] for name, result in content["results"].items()]
    note = (
        "`make bench`: from a process that has imported torch and nothing else to the first batch of 512, "
        f"from {content['images']:,} images that were converted before. {where(content)}."
    )
    return [*grid(["", "seconds (95 % interval)"], rows), "", note]


def memory_table(content: Mapping[str, Any]) -> list[str]:
    """Peak memory beyond torch's."""
    rows = [[name, measured(result, unit=2**20)] for name, result in content["results"].items()]
    note = (
        "`make bench`: the most during an epoch beyond what importing torch takes, summed over processes (PSS); "
        f"the {content['images']:,} images themselves are {content['image_bytes'] / 2**20:,.0f} MiB. {where(content)}."
    )
    return [*grid(["", "MiB (95 % interval)"], rows), "", note]


def streaming_table(content: Mapping[str, Any]) -> list[str]:
    """A store larger than memory, beside the same one in memory."""
    rows = []
    for name, result in content["results"].items():
        failed = "failed" in result
        first = "" if failed else f"{result['first_epoch']:,.0f}"
        resident = "" if failed else f"{result['resident_mib']:,.0f} MiB"
        rows.append([name, measured(result), first, resident])
    note = (
        f"`python -m benchmarks.streaming`: {content['images']:,} images of 32x32, {content['store_mib']:,.0f} MiB; "
        "where limited, a cgroup allows the process and the files' pages it reads "
        f"{content['limit_mib']:,.0f} MiB. In the first epoch the bytes are checked. Each run is a new process and "
        f"begins with nothing cached. {where(content)}."
    )
    head = ["placement", "images/s (95 % interval)", "in the first epoch", "most that was resident"]
    return [*grid(head, rows), "", note]


TABLES: tuple[tuple[str, str, Callable[[Any], list[str]]], ...] = (
    ("report", "runs", report_table),
    ("race", "race", race_table),
    ("ceiling", "ceiling", ceiling_table),
    ("training-step", "training_step", training_step_table),
    ("training-step-bfloat16", "training_step_bfloat16", training_step_table),
    ("safety", "safety", safety_table),
    ("scaling", "scaling", scaling_table),
    ("first-batch", "first_batch", first_batch_table),
    ("memory", "memory", memory_table),
    ("streaming", "streaming", streaming_table),
    ("recipe-race", "recipe_race", recipe_race_table),
    ("recipe-summary", "recipe_race", recipe_summary_table),
    ("recipe-curves", "recipe_race", recipe_curves_table),
    ("gpu-check", "gpu_check", gpu_check_table),
    ("gpu-summary", "gpu_check", gpu_summary_table),
    ("gpu-seeds", "gpu_check", gpu_seeds_table),
    ("gpu-training", "gpu_training", gpu_training_table),
    ("gpu-tries", "gpu_tries", gpu_tries_table),
)
"""Marker, file in `RESULTS`, and what makes the lines."""


def replace_block(text: str, name: str, lines: list[str]) -> str:
    """`text` with what stands between the markers of table `name` replaced.

    Raises:
        ValueError: the markers are not there.
    """
    begin, end = markers(name)
    before, rest = text.split(begin)
    after = rest.split(end)[1]
    return "\n".join([before + begin, "", *lines, *([""] if lines else []), end + after])


def markers(name: str) -> tuple[str, str]:
    """What stands before and after table `name`."""
    return f"<!-- {name} table: generated -->", f"<!-- end of {name} table -->"


def with_tables(text: str) -> str:
    """A page's `text` with every table that has markers there and results."""
    for name, file, lines in TABLES:
        path = RESULTS / f"{file}.json"
        if markers(name)[0] in text and path.exists():
            text = replace_block(text, name, lines(json.loads(path.read_text(encoding="utf-8"))))
    return text


def write_tables() -> None:
    """Bring the pages up to date."""
    for page in PAGES:
        page.write_text(with_tables(page.read_text(encoding="utf-8")), encoding="utf-8")
