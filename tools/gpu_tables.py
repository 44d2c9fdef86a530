"""The tables of what was measured on a CUDA device: kernel and loader, training, and what was tried for the recipes.

Example:
    gpu_check_table(json.loads((RESULTS / "gpu_check.json").read_text()))
"""

from collections.abc import Mapping
from statistics import median
from typing import Any

from table_cells import grid, percent

__all__ = ["gpu_check_table", "gpu_seeds_table", "gpu_summary_table", "gpu_training_table", "gpu_tries_table"]

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
    kernel = _result(steps, "bandwidth")
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
    ended: dict[str, list[str]] = {"Went well": [], "Not begun, as the time was up": [], "Failed": []}
    well, late, failed = ended
    for name, step in steps.items():
        ended[well if step["ok"] else late if step["error"].startswith("not begun") else failed].append(name)
    all_of_it = ". ".join(f"{how}: {'; '.join(names) or 'none'}" for how, names in ended.items())
    note = f"`tools/gpu_check`. {all_of_it}.{content.get('note', '')} {_place(content)}."
    head = ["batch", "bytes read and written", "kernel", "", "with one warp", "a copy of as many bytes"]
    cached = "Each row is one batch again and again, which the GPU's cache may hold."
    return [
        *([*grid(head, rows), "", cached, ""] if rows else []),
        *_speeds(steps),
        *_side_by_side(steps),
        *_beside_airbench(content),
        note,
    ]


def gpu_summary_table(content: Mapping[str, Any]) -> list[str]:
    """Markdown lines: the loader's images a second, net fast beside airbench94, and a note."""
    return [*_speeds(content["steps"]), *_beside_airbench(content), f"`tools/gpu_check`. {_place(content)}."]


def gpu_seeds_table(content: Mapping[str, Any]) -> list[str]:
    """Markdown lines: several seeds one after another, and at a time; and a note."""
    return [*_side_by_side(content["steps"]), f"`tools/gpu_check`. {_place(content)}."]


def _speeds(steps: Mapping[str, Any]) -> list[str]:
    """Markdown lines: the loader's images a second."""
    rows = [
        [name, f"{measured['median'] / 1e6:,.2f} ± {measured['interval95'] / 1e6:,.2f} million"]
        for name, measured in _result(steps, "loader speed").items()
    ]
    head = ["placement, type, batch of `for images, labels in loader`", "images a second (95 % interval)"]
    return [*grid(head, rows), ""] if rows else []


def _result(steps: Mapping[str, Any], name: str) -> Mapping[str, Any]:
    """What a step found; nothing where it failed, or was not begun."""
    found: Mapping[str, Any] = steps.get(name, {}).get("result", {})
    return found


def _side_by_side(steps: Mapping[str, Any]) -> list[str]:
    """Markdown lines: several seeds one after another, and at a time."""
    rows = []
    for name, step in steps.items():
        if not (name.startswith("seeds side by side") and step["ok"]):
            continue
        result = step["result"]
        for way, measured in result.items():
            if isinstance(measured, dict):
                what = f"{name.rpartition(' ')[2]}, {result['runs']} seeds of {result['epochs']} epochs, {way}"
                accuracy = percent(measured["accuracy"])
                rows.append([what, f"{measured['seconds']:.1f} s", f"{measured['times_as_fast']:.2f}", accuracy])
    head = ["`--seeds`, all of it: starting, training, testing, writing", "seconds", "times as fast", "mean accuracy"]
    return [*grid(head, rows), ""] if rows else []


def _beside_airbench(content: Mapping[str, Any]) -> list[str]:
    """Markdown lines: net fast and airbench94, in turn on the same device."""
    result, data = _result(content["steps"], "training beside airbench94"), content["data"]
    if not result:
        return []
    runs = result["runs"]
    titles = {
        "airbench94": "airbench94, its own script (float16)",
        "fastcifar": f"fastcifar, fast, {result['epochs']} epochs (bfloat16)",
    }
    rows = []
    for who, title in titles.items():
        # in airbench94's first run cuDNN searches for its algorithms, which changes no accuracy
        taken = median(run[who][0] for run in runs if not (run["first"] and who == "airbench94"))
        accuracy = sum(run[who][1] for run in runs) / len(runs)
        rows.append([title, str(len(runs)), f"{taken:.2f} s", percent(accuracy)])
    which = f"in turn, all {data['images']:,} images"
    head = [which, "runs", "whitening filters and training (median)", "accuracy with TTA"]
    copied = ", an unverified copy, whose accuracies are not those on the published pixels (airbench94: 94 %)"
    note = (
        f"On {data['name']}{copied * (not data['verified'])}. Beside these times: evaluation, and what comes before "
        "the first step (of airbench94 the first run, in which cuDNN searches for its algorithms; of fastcifar the "
        "capture of its CUDA graphs)."
    )
    return [*grid(head, rows), "", note, ""]


def gpu_tries_table(content: Mapping[str, Any]) -> list[str]:
    """Markdown lines: what was tried for a recipe on split holdout, and a note."""
    groups: dict[tuple[str, ...], list[Mapping[str, Any]]] = {}
    for run in content["runs"]:
        key = (f"{run['net']}, {run['recipe']}", ", ".join(run["changes"]), str(run["epochs"]))
        groups.setdefault(key, []).append(run)

    def mean(runs: list[Mapping[str, Any]], name: str) -> float:
        return float(sum(run[name] for run in runs) / len(runs))

    names = ("validation_accuracy", "test_accuracy", "test_tta_accuracy")
    order = sorted(groups.items(), key=lambda item: (item[0][0], int(item[0][2]), -mean(item[1], names[0])))
    rows = [[*key, str(len(runs)), *(percent(mean(runs, name)) for name in names)] for key, runs in order]
    head = ["recipe", "changed", "epochs", "runs", "validation accuracy", "test accuracy", "with TTA"]
    note = f"{' '.join(content['notes'])} On an unverified copy of CIFAR-10; bfloat16. {_place(content)}."
    return [*grid(head, rows), "", note]


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
        key = (run["split"], who, changes, f"{run['epochs']:g}", way, str(run["call"]))
        groups.setdefault(key, []).append(run)
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
    head = ["split", "recipe", "changed", "epochs", "steps", "session", "runs"]
    head += ["training (median)", "accuracy", "with TTA"]
    note = f"{' '.join(content['notes'])} On an unverified copy of CIFAR-10; bfloat16. {_place(content)}."
    return [*grid(head, rows), "", note]


def _place(content: Mapping[str, Any]) -> str:
    device = content["device"]
    return f"{', '.join(device['gpus'])}, PyTorch {device['torch']}"
