"""Pictures of a run: loss and accuracy by epoch, the confusion matrix of the test, and images that it got wrong.

Drawn on `matplotlib.figure.Figure` objects, without pyplot: no window, no global state. Importing
matplotlib takes a second, so the engine imports this module when a run is over. Writes only the
files of `write_figures`.

    write_figures(run / "figures", history, result.test, title="big on cifar10")
"""

import functools
import io
import textwrap
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
from matplotlib import font_manager
from matplotlib.axes import Axes
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure
from matplotlib.text import Text
from matplotlib.ticker import MaxNLocator, PercentFormatter

from fastcifar.errors import one_line
from fastcifar.formats import percent, things
from fastcifar.metrics import EpochStats, Mistakes, TestStats
from fastcifar.publish import publish_bytes

__all__ = ["accuracy_curves", "confusion_matrix", "loss_curves", "mistakes_grid", "write_figures"]

_DPI = 150
# Blue and vermillion of Okabe and Ito's palette: told apart with any colour vision, and in grey
_TRAIN, _EVAL = "#0072B2", "#D55E00"
_ANNOTATED = 20  # classes; the numbers of a larger matrix can't be read
_COLUMNS = 8  # of mistakes
_NAMED = 30  # classes; with more, every tenth is named, and of more than 300 so many
_OF_OTHER_SCRIPTS = (
    *("Noto Sans CJK SC", "Noto Sans CJK JP", "Noto Sans CJK KR", "WenQuanYi Zen Hei", "PingFang SC", "Hiragino Sans"),
    *("Apple SD Gothic Neo", "Microsoft YaHei", "Yu Gothic", "Malgun Gothic", "Arial Unicode MS"),
    *("Noto Sans Devanagari", "Noto Sans Bengali", "Noto Sans Tamil", "Noto Sans Thai"),
)


def loss_curves(history: Sequence[EpochStats], *, title: str) -> Figure:
    """Mean loss on the training and the evaluated part by epoch.

    Raises:
        ValueError: `history` is empty.
    """
    figure, axes = _curves(history, title, lambda s: s.train_loss, lambda s: s.eval_loss)
    axes.set_ylabel("cross-entropy (mean over images)")
    axes.set_ylim(bottom=0.0)
    return figure


def accuracy_curves(history: Sequence[EpochStats], *, title: str) -> Figure:
    """Accuracy on the training and the evaluated part by epoch.

    Raises:
        ValueError: `history` is empty.
    """
    figure, axes = _curves(history, title, lambda s: s.train_accuracy, lambda s: s.eval_accuracy)
    axes.set_ylabel("accuracy")
    axes.yaxis.set_major_formatter(PercentFormatter(xmax=1.0, symbol=" %"))
    low, high = axes.get_ylim()
    if high - low < 0.1:  # one epoch, or very even ones: don't make a mountain of a hundredth of a percent
        axes.set_ylim(max(0.0, low - 0.05), high + 0.05)
    return figure


def _curves(
    history: Sequence[EpochStats],
    title: str,
    of_train: Callable[[EpochStats], float | None],
    of_eval: Callable[[EpochStats], float | None],
) -> tuple[Figure, Axes]:
    if not history:
        raise ValueError("history must have at least one epoch, got none")
    figure = Figure(figsize=(6.4, 4.0), layout="constrained")
    axes = figure.add_subplot()
    for name, color, line, value in (
        ("train", _TRAIN, "-", of_train),
        (history[-1].evaluated, _EVAL, "--", of_eval),
    ):
        points = {stats.epoch: found for stats in history if (found := value(stats)) is not None}
        marker = "o" if len(points) <= 30 else ""  # a single epoch has no line to see
        axes.plot([*points], [*points.values()], line, color=color, marker=marker, markersize=3.5, label=name)
    _plain(axes.set_title(textwrap.fill(_clean(title), 60)))
    axes.set_xlabel("epoch")
    axes.set_xlim(history[0].epoch - 0.5, history[-1].epoch + 0.5)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
    axes.grid(color="0.9")
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    for text in axes.legend(frameon=False).get_texts():
        _plain(text)
    return figure, axes


def confusion_matrix(test: TestStats, *, title: str) -> Figure:
    """The share of each true class (row) that was taken for each class (column), in class order.

    Cells are annotated in percent for up to 20 classes.
    """
    size = len(test.classes)
    edge = min(9.0, max(4.8, 0.62 * size + 1.6))  # inches; 0.62 holds a number of three digits
    figure = Figure(figsize=(edge + 0.6, edge), layout="compressed")
    axes = figure.add_subplot()
    image = axes.imshow(test.confusion, cmap="Blues", vmin=0.0, vmax=1.0, aspect="equal")
    shown = range(size) if size <= _NAMED else range(0, size, max(10, -(-size // _NAMED)))
    # a longer name would leave no room for the matrix
    names = [name if len(name) <= 20 else f"{name[:17]}..." for name in (_clean(test.classes[i]) for i in shown)]
    axes.set_xticks(shown, names, rotation=45, ha="right", rotation_mode="anchor")
    axes.set_yticks(shown, names)
    for text in (
        *axes.get_xticklabels(),
        *axes.get_yticklabels(),
        axes.set_title(textwrap.fill(_clean(title), round(8 * edge))),
    ):
        _plain(text)
    axes.set_xlabel("predicted class")
    axes.set_ylabel("true class")
    bar = figure.colorbar(image, ax=axes, fraction=0.046, pad=0.03)
    bar.set_label("share of the true class")
    bar.ax.yaxis.set_major_formatter(PercentFormatter(xmax=1.0, symbol=" %"))
    if size <= _ANNOTATED:
        for i, row in enumerate(test.confusion):
            for j, share in enumerate(row):
                color = _ink(to_rgb(image.cmap(share))) if share >= 0.005 else "0.45"
                axes.text(j, i, f"{100 * share:.0f}", ha="center", va="center", color=color, fontsize=9)
    return figure


def mistakes_grid(found: Mistakes, *, title: str) -> Figure:
    """Images, each above its class and the one that it was taken for.

    Raises:
        ValueError: there is none.
    """
    count, height, width, channels = found.images.shape
    if not count:
        raise ValueError("mistakes must be at least one, got none")
    columns = min(_COLUMNS, count)
    rows = -(-count // columns)
    down, right = height + round(0.4 * width), round(1.1 * width)  # from one to the next: names go below, in two lines
    canvas = np.full((rows * down, columns * right, 3), 255, np.uint8)
    figure = Figure(figsize=(1.1 * columns + 0.2, 1.1 * rows * down / right + 0.5), layout="constrained")
    axes = figure.add_subplot()
    for i, (image, truth, taken_for) in enumerate(zip(found.images, found.truth, found.taken_for, strict=True)):
        top, left = down * (i // columns), right * (i % columns)
        canvas[top : top + height, left : left + width] = image if channels == 3 else image[..., :1]
        both = (_clean(truth), f"{_clean(taken_for)}?")
        names = "\n".join(name if len(name) <= 14 else f"{name[:11]}..." for name in both)
        _plain(axes.text(left + width / 2, top + height, names, ha="center", va="top", fontsize=7, linespacing=1.1))
    axes.imshow(canvas, interpolation="nearest")
    axes.set_axis_off()
    _plain(axes.set_title(textwrap.fill(_clean(title), max(24, 14 * columns)), fontsize=10))
    return figure


def write_figures(
    folder: Path, history: Sequence[EpochStats], test: TestStats, *, title: str, mistakes: Mistakes | None = None
) -> tuple[Path, ...]:
    """Write loss.png, accuracy.png (if there are epochs), confusion.png and mistakes.png (if there are mistakes).

    Each is there whole or not at all.

    Returns:
        The paths written.
    """
    figures = {"loss.png": loss_curves(history, title=f"{title}: loss")} if history else {}
    if history:
        figures["accuracy.png"] = accuracy_curves(history, title=f"{title}: accuracy")
    figures["confusion.png"] = confusion_matrix(test, title=f"{title}: test, {percent(test.accuracy)} right")
    if mistakes is not None and mistakes.wrong:
        shown = f"{len(mistakes.images):,} of {things(mistakes.wrong, 'mistake')}"
        figures["mistakes.png"] = mistakes_grid(mistakes, title=f"{title}: test, {shown}")
    folder.mkdir(parents=True, exist_ok=True)
    for name, figure in figures.items():
        buffer = io.BytesIO()
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "Glyph .* missing from font", UserWarning)  # a box says so too
            figure.savefig(buffer, format="png", dpi=_DPI)
        publish_bytes(folder / name, buffer.getvalue())
    return tuple(folder / name for name in figures)


def _ink(background: tuple[float, float, float]) -> str:
    """Black or white, whichever contrasts more (WCAG 2's relative luminance; the two are equal at 0.179)."""
    luminance = sum(weight * channel**2.2 for weight, channel in zip((0.2126, 0.7152, 0.0722), background, strict=True))
    return "black" if luminance > 0.179 else "white"


def _plain(text: Text) -> None:
    """Take the text as it is: a name with two dollar signs is not a formula, and may be in any script."""
    text.set_parse_math(False)
    text.set_fontfamily(_families())


@functools.cache
def _families() -> list[str]:
    """Fonts that texts are drawn in, of which the first that has a letter draws it: matplotlib's own comes first."""
    installed = set(font_manager.get_font_names())
    return ["DejaVu Sans", *(name for name in _OF_OTHER_SCRIPTS if name in installed)]


def _clean(text: str) -> str:
    """In one line of what can be drawn: a folder's name may hold what is no text."""
    return one_line(text, longest=len(text))
