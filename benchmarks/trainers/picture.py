"""The picture of the race of recipes: test accuracy against training seconds, a panel for each race.

Its ink is of middle lightness on a transparent ground, so that it can be read on light and on dark pages.

    save(races(runs), RESULTS / "recipe_race.svg")
"""

import io
import itertools
import math
import textwrap
from collections.abc import Sequence
from pathlib import Path

from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, FuncFormatter, MaxNLocator, NullLocator, PercentFormatter

from benchmarks.trainers import CONTESTANTS
from benchmarks.trainers.records import Race, processor_share
from fastcifar.publish import publish_bytes

__all__ = ["draw", "save"]

_INK = "#7a7a7a"
"""Contrast 4.3 with white and 4.4 with #0d1117, GitHub's dark ground."""
# Okabe and Ito's palette, for any colour vision; its darker blue and green are lightened or darkened to that middle
_COLORS = ("#1F86C7", "#D55E00", "#12936D", "#B36A97", "#8A7B2E", "#6E72D0", "#D0447E")
_TICKS = (1, 2, 5, 10, 20, 60, 120, 300, 600, 1200, 3600, 7200, 18000, 36000, 86400)
_APART = 0.19
"""Of a panel's width: the least distance of two times on its axis."""

_LETTERS = 26
"""Of a name in a line, at most: what it is wide a panel is not."""

_CHANGES = 2
"""Named beside a recipe, at most."""

_COLUMNS = 3
"""Panels side by side."""

_BELOW, _BEFORE = 0.12, 2.5
"""How far below the lowest end, and before the first one, is shown: the curves' beginnings tell nothing."""


def save(races: Sequence[Race], path: Path) -> None:
    """Draw, and write an SVG; the same runs give the same bytes."""
    content = io.BytesIO()
    with rc_context({"svg.hashsalt": "recipe race"}):
        draw(races).savefig(content, format="svg", transparent=True, metadata={"Date": None})
    publish_bytes(path, content.getvalue())


def draw(races: Sequence[Race]) -> Figure:
    """Dots are runs' test accuracies, rings those with test-time augmentation, lines the accuracies on the way."""
    shown = [race for race in races if any(group.runs for group in race.groups)]
    if not shown:
        raise ValueError("races must have at least one run, got none")
    groups = [group for race in shown for group in race.groups if group.runs]
    groups.sort(key=lambda group: CONTESTANTS[group.contestant].base)  # ours first, whatever ran first
    named = [_names(race) for race in shown]
    titles = dict.fromkeys(name for group in groups for names in named if (name := names.get(group.title)))
    kinds = dict(zip(dict.fromkeys(map(_kind, titles)), itertools.cycle(_COLORS), strict=False))
    colors = {title: kinds[_kind(title)] for title in titles}
    columns, rows = min(_COLUMNS, len(shown)), -(-len(shown) // _COLUMNS)
    figure = Figure(figsize=(3.7 * columns, 2.9 * rows), layout="constrained")
    several = len({race.about["cpu"] for race in shown}) > 1
    panels = list(figure.subplots(rows, columns, squeeze=False).flat)
    for axes, race, names in zip(panels, shown, named, strict=False):
        _panel(axes, race, names, colors, cpu=race.about["cpu"] if several else "")
    for axes in panels[len(shown) :]:
        axes.remove()
    rings = any(run["tta_accuracy"] for race in shown for group in race.groups for run in group.runs)
    said = ["dots: test accuracy at the end", "rings: with test-time augmentation", "lines: on the way"]
    if not rings:
        del said[1]
    label = f"seconds of training ({'; '.join(said)})"
    figure.supxlabel(textwrap.fill(label, 60 * columns), fontsize=8, color=_INK)
    return figure


def _kind(title: str) -> str:
    """What has a colour of its own: a contestant, in float32 or not."""
    return title.replace(", --amp", "").replace(", bfloat16", "")


def _names(race: Race) -> dict[str, str]:
    """Title -> name in the race's panel: where a contestant was changed in several ways, these have one together."""
    changed: dict[str, set[str]] = {}
    for group in race.groups:
        if group.change:
            changed.setdefault(group.contestant, set()).add(group.title)
    names = {}
    for group in race.groups:
        ways = len(changed.get(group.contestant, ()))
        together = f"{CONTESTANTS[group.contestant].title}, changed in {ways} ways"
        names[group.title] = together if group.change and ways > 1 else group.title
    return names


def _panel(axes: Axes, race: Race, names: dict[str, str], colors: dict[str, str], *, cpu: str) -> None:
    ends: dict[str, float] = {}  # name -> accuracy of its longest run, where it goes
    lowest, first = 1.0, math.inf
    for group in sorted(race.groups, key=lambda group: group.epochs):
        for run in group.runs:
            color = colors[names[group.title]]
            share = processor_share(run)
            end = (share * run["train_seconds"], run["accuracy"])
            curve = [(share * seconds, accuracy) for seconds, accuracy in run["curve"][:-1]]
            axes.plot(*zip(*curve, end, strict=True), color=color, linewidth=0.8, alpha=0.6)
            axes.plot(*end, "o", color=color, markersize=4.5)
            if run["tta_accuracy"]:
                axes.plot(end[0], run["tta_accuracy"], "o", color=color, markersize=4.5, fillstyle="none")
            ends[names[group.title]] = run["tta_accuracy"] or end[1]
            lowest, first = min(lowest, end[1]), min(first, end[0])
    about = race.about
    threads = f"{about['threads']} thread{'s' * (about['threads'] != 1)}"
    title = f"{about['arch']}, split {about['split']}, {threads}" + (f"\n{cpu}" if cpu else "")
    axes.set_title(title, loc="left", fontsize=9, color=_INK)
    axes.set_facecolor("none")
    axes.set_xscale("log")
    axes.set_xlim(left=first / _BEFORE)
    axes.xaxis.set_major_locator(FixedLocator(_ticks(*axes.get_xlim())))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_major_formatter(FuncFormatter(lambda seconds, _: _duration(seconds)))
    axes.yaxis.set_major_locator(MaxNLocator(nbins=6, steps=(1, 2, 5, 10)))  # whole percents
    axes.yaxis.set_major_formatter(PercentFormatter(xmax=1.0, decimals=0, symbol=" %"))
    axes.set_ylim(bottom=lowest - _BELOW)
    axes.tick_params(colors=_INK, labelsize=8)
    axes.grid(color=_INK, alpha=0.25, linewidth=0.6)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set_color(_INK)
    _name(axes, ends, colors)


def _name(axes: Axes, ends: dict[str, float], colors: dict[str, str]) -> None:
    """Write the names at the right edge, at their height or as near to it as leaves each a line of its own."""
    low, high = axes.get_ylim()
    titles = sorted(ends, key=lambda title: ends[title])
    written = [textwrap.fill(_short(title), _LETTERS) for title in titles]
    halves = [0.04 * (high - low) * (name.count("\n") + 1) for name in written]
    heights = _stacked([ends[title] for title in titles], halves, low, high)
    for title, name, at in zip(titles, written, heights, strict=True):
        axes.annotate(
            name,
            (1.0, at),
            xycoords=("axes fraction", "data"),
            xytext=(4, 0),
            textcoords="offset points",
            va="center",
            color=colors[title],
            fontsize=8,
            annotation_clip=False,
        )


def _stacked(wanted: Sequence[float], halves: Sequence[float], low: float, high: float) -> list[float]:
    """Where names are put that want to be at these heights, from the lowest: none above `high`, none in another."""
    heights = []
    for at, half in zip(wanted, halves, strict=True):
        heights.append(max(at, low + half))
        low = heights[-1] + half
    for index in reversed(range(len(heights))):
        heights[index] = min(heights[index], high - halves[index])
        high = heights[index] - halves[index]
    return heights


def _short(title: str) -> str:
    """A name with the first changes to the recipe alone, and how many more there are; the tables have all of them."""
    parts = title.replace("augment.", "").split(", ")
    changes = [part for part in parts if "=" in part]
    more = [f"{len(changes) - _CHANGES} more"] if len(changes) > _CHANGES else []
    return ", ".join([part for part in parts if part not in changes[_CHANGES:]] + more)


def _ticks(low: float, high: float) -> list[float]:
    """Those of `_TICKS` between two times that are far enough from the one before to be read."""
    found: list[float] = []
    for tick in _TICKS:
        if low <= tick <= high and (not found or math.log(tick / found[-1]) >= _APART * math.log(high / low)):
            found.append(tick)
    return found


def _duration(seconds: float) -> str:
    """Such as 30 s, 5 min or 2 h."""
    for size, unit in ((3600, "h"), (60, "min")):
        if seconds >= size:
            return f"{seconds / size:g} {unit}"
    return f"{seconds:g} s"
