"""Numbers as text, and the columns of the epoch table: one way for the console, the page and the figures.

Pure functions of their arguments; this module touches nothing.

    percent(0.729)                       # "72.90 %"
    epoch_line(stats)                    # "epoch 3/20: train loss 0.6790, ..."
    fit_columns(80, epochs=20, evaluated="validation").names
"""

import math
from dataclasses import dataclass

from fastcifar.metrics import EpochStats

__all__ = [
    "Columns",
    "count",
    "duration",
    "epoch_cells",
    "epoch_line",
    "fit_columns",
    "loss",
    "part_short_name",
    "percent",
    "rate",
    "seconds",
    "size",
    "things",
]


_NONE = "-"


def things(number: int, name: str) -> str:
    """A number of things by name: `1 epoch`, `1,000 epochs`."""
    return f"{number:,} {name}{'s' * (number != 1)}"


def percent(fraction: float) -> str:
    """A fraction as percent: `0.729` -> `72.90 %`; a dash where it isn't a number."""
    return f"{100 * fraction:.2f} %" if fraction == fraction else _NONE


def loss(value: float) -> str:
    """Four decimals while they fit in nine characters, then an exponent."""
    return f"{value:.4f}" if not abs(value) >= 1000 else f"{value:.3e}"


def rate(value: float) -> str:
    """A learning rate: `1.0e-03`."""
    return f"{value:.1e}"


def count(value: float) -> str:
    """A number of things, with thousands separators: `5,655,498`."""
    return f"{value:,.0f}"


def seconds(value: float) -> str:
    """Seconds without their unit; hundredths are dropped where they say nothing."""
    return f"{value:.2f}" if value < 1000 else f"{value:.0f}"


def duration(value: float) -> str:
    """Time as a clock shows it: `0:07`, `12:30`, `1:02:03`; `?` if it isn't known."""
    if not math.isfinite(value):
        return "?"
    minutes, rest = divmod(max(0, round(value)), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"


def size(value: float) -> str:
    """Bytes in decimal units: `170.5 MB`."""
    for unit in ("bytes", "kB", "MB"):
        if value < 1000:
            return f"{value:.0f} bytes" if unit == "bytes" else f"{value:.1f} {unit}"
        value /= 1000
    return f"{value:.1f} GB"


def part_short_name(evaluated: str) -> str:
    """The evaluated part's name in a column header: `val` for validation, any other as it is."""
    return "val" if evaluated == "validation" else evaluated


# Most important first: a narrow terminal shows as many from the left as fit.
_IMPORTANCE = (
    "epoch",
    "eval acc",
    "train loss",
    "eval loss",
    "train acc",
    "images/s",
    "train s",
    "lr",
    "eval s",
)
_ORDER = ("epoch", "train loss", "train acc", "eval loss", "eval acc", "train s", "eval s", "images/s", "lr")
# The widest cell of each column; all nine with single gaps fit in 80 columns for up to 99 epochs.
_WIDTHS = {"train loss": 9, "train acc": 8, "eval loss": 9, "eval acc": 8, "train s": 6, "eval s": 6, "images/s": 9}


@dataclass(frozen=True, kw_only=True)
class Columns:
    """The columns that fit, in the order shown: names (keys of `epoch_cells`), headers and widths."""

    names: tuple[str, ...]
    headers: tuple[str, ...]
    widths: tuple[int, ...]
    gap: int


def fit_columns(width: int, *, epochs: int, evaluated: str) -> Columns:
    """Choose the epoch table's columns for `width` characters; the epoch's own is always there."""
    part = part_short_name(evaluated)
    headers = {name: name.replace("eval", part) for name in _ORDER}
    widths = {name: max(len(headers[name]), _WIDTHS.get(name, 7)) for name in _ORDER}
    widths["epoch"] = max(5, 2 * len(str(epochs)) + 1)
    kept = len(_IMPORTANCE)
    while kept > 1 and sum(widths[name] + 1 for name in _IMPORTANCE[:kept]) - 1 > width:
        kept -= 1
    names = tuple(name for name in _ORDER if name in _IMPORTANCE[:kept])
    room = width - sum(widths[name] for name in names)
    return Columns(
        names=names,
        headers=tuple(headers[name] for name in names),
        widths=tuple(widths[name] for name in names),
        gap=2 if room >= 2 * (len(names) - 1) else 1,
    )


def epoch_cells(stats: EpochStats) -> dict[str, str]:
    """Every cell of an epoch's row by column name; a dash where it was not evaluated."""
    return {
        "epoch": f"{stats.epoch}/{stats.epochs}",
        "train loss": loss(stats.train_loss),
        "train acc": percent(stats.train_accuracy),
        "eval loss": _NONE if stats.eval_loss is None else loss(stats.eval_loss),
        "eval acc": _NONE if stats.eval_accuracy is None else percent(stats.eval_accuracy),
        "train s": seconds(stats.train_seconds),
        "eval s": _NONE if stats.eval_accuracy is None else seconds(stats.eval_seconds),
        "images/s": count(stats.images_per_second),
        "lr": rate(stats.learning_rate),
    }


def epoch_line(stats: EpochStats) -> str:
    """An epoch as one line of a log, with the numbers of its row."""
    cells, part = epoch_cells(stats), stats.evaluated
    found = took = ""
    if stats.eval_accuracy is not None:
        found = f", {part} loss {cells['eval loss']}, {part} accuracy {cells['eval acc']}"
        took = f", {part} {cells['eval s']} s"
    return (
        f"epoch {cells['epoch']}: train loss {cells['train loss']}, train accuracy {cells['train acc']}{found}, "
        f"train {cells['train s']} s{took}, {cells['images/s']} images/s, learning rate {cells['lr']}"
    )
