"""The tables of what was measured on a CUDA device: the kernel and the loader, then training.

Example:
    gpu_check_table(json.loads((RESULTS / "gpu_check.json").read_text()))
"""

from collections.abc import Mapping
from statistics import median
from typing import Any

from table_cells import grid, percent

__all__ = ["gpu_check_table", "gpu_training_table"]

_WAYS = {
    (False, False): "operation by operation",
    (False, True): "compiled",
    (True, False): "CUDA graphs (as by default)",
    (True, True): "compiled, CUDA graphs",
}
"""(graphs, compiled) -> how a run took its steps."""


def gpu_check_table(content: Mapping[str, Any]) -> list[str]:
    """Markdown lines: the kernel beside a copy of as many bytes, the loader's images a second, and a note."""
    steps = content["steps"]
    kernel, loader = steps["bandwidth"]["result"], steps["loader speed"]["result"]
    rows = [
        [
            name,
            f"{measured['bytes'] / 1e6:,.1f} MB",
            f"{1e6 * measured['seconds']['as chosen']:,.1f} us",
            f"{measured['bytes_per_second'] / 1e12:.2f} TB/s",
            f"{1e6 * measured['seconds']['1 warp']:,.1f} us",
            f"{1e6 * measured['seconds']['copy_']:,.1f} us",
        ]
        for name, measured in kernel.items()
    ]
    speeds = [[name, f"{measured['median'] / 1e6:,.2f} million"] for name, measured in loader.items()]
    passed = ", ".join(name for name, step in steps.items() if step["ok"])
    failed = ", ".join(name for name, step in steps.items() if not step["ok"])
    more = content.get("note", "")
    note = f"`tools/gpu_check`: went well: {passed}; not run, or failed: {failed or 'none'}.{more} {_place(content)}."
    return [
        *grid(["batch", "bytes read and written", "kernel", "", "with one warp", "a copy of as many bytes"], rows),
        "",
        *grid(["`for images, labels in loader`", "images a second"], speeds),
        "",
        note,
    ]


def gpu_training_table(content: Mapping[str, Any]) -> list[str]:
    """Markdown lines: recipes with all their runs, but for tries of anything beside the learning rate, and a note."""
    groups: dict[tuple[Any, ...], list[Mapping[str, Any]]] = {}
    for run in content["runs"]:
        ours = run["what"] == "fastcifar"
        if run.get("first") or (ours and any(not change.startswith("lr=") for change in run["changes"])):
            continue
        who = f"fastcifar, {run['net']}, {run['recipe']}" if ours else "airbench94, its own script"
        changes = ", ".join(run["changes"]) if ours else ""
        way = _WAYS[run["graphs"], run["compiled"]] if ours else "its own"
        groups.setdefault((run["split"], who, changes, f"{run['epochs']:g}", way), []).append(run)
    rows = [
        [
            *key,
            str(len(runs)),
            f"{median(run['train_seconds'] for run in runs):.2f} s",
            percent(sum(run["accuracy"] for run in runs) / len(runs)),
            percent(sum(run["tta_accuracy"] for run in runs) / len(runs)),
        ]
        for key, runs in sorted(groups.items(), key=lambda item: (item[0][0], item[0][1], float(item[0][3])))
    ]
    head = ["split", "recipe", "changed", "epochs", "steps", "runs", "training (median)", "accuracy", "with TTA"]
    note = f"{' '.join(content['notes'])} On an unverified copy of CIFAR-10; bfloat16. {_place(content)}."
    return [*grid(head, rows), "", note]


def _place(content: Mapping[str, Any]) -> str:
    device = content["device"]
    return f"{', '.join(device['gpus'])}, PyTorch {device['torch']}"
