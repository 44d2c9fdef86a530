"""A run as one web page: `report.html`, with nothing outside it to load.

Style and pictures are inside the page, every text is escaped, and no script is used; the page's
own security policy forbids the rest. Writes the file it is given, reads the figures.

    write_page(run / "report.html", title="big on cifar10", config=config, environment=environment,
               choices=summary.choices, history=history, test=test, result=result, figures=paths)
"""

import base64
import json
from collections.abc import Iterable, Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

from fastcifar.formats import count, epoch_cells, loss, part_short_name, percent, seconds
from fastcifar.metrics import EpochStats, TestStats
from fastcifar.publish import publish_bytes
from fastcifar.reporter import RunResult

__all__ = ["write_page"]

_STYLE = """
:root { color-scheme: light dark; --text: #1c1e21; --back: #ffffff; --soft: #5b6270; --line: #dde1e6; --bar: #0072b2;
  --card: #f5f7f9; }
@media (prefers-color-scheme: dark) {
  :root { --text: #e6e8eb; --back: #15181c; --soft: #a0a8b4; --line: #343a42; --bar: #56b4e9; --card: #1e2328; } }
* { box-sizing: border-box; }
body { margin: 0 auto; max-width: 60rem; padding: 1rem; color: var(--text); background: var(--back);
  font: 16px/1.5 system-ui, sans-serif; overflow-wrap: anywhere; }
h1 { font-size: 1.6rem; margin: .5rem 0 1rem; } h2 { font-size: 1.15rem; margin: 2rem 0 .5rem; }
.facts { display: grid; grid-template-columns: repeat(auto-fit, minmax(9rem, 1fr)); gap: .75rem; margin: 0; }
.facts div { background: var(--card); border-radius: .5rem; padding: .6rem .8rem; }
.facts dt { color: var(--soft); font-size: .85rem; } .facts dd { margin: 0; font-size: 1.2rem; font-weight: 600; }
.wide { overflow-x: auto; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; font-size: .9rem; }
th, td { padding: .25rem .7rem; border-bottom: 1px solid var(--line); text-align: right; white-space: nowrap; }
th { color: var(--soft); font-weight: 600; } .names th, .names td { text-align: left; white-space: normal; }
.names th { white-space: nowrap; vertical-align: top; }
td:first-child, th:first-child { padding-left: 0; text-align: left; }
.bar { width: 12rem; min-width: 6rem; } .bar span { display: block; height: .6rem; background: var(--bar); }
figure { margin: 1rem 0; max-width: 44rem; }
img { max-width: 100%; height: auto; background: #fff; border-radius: .25rem; }
figcaption, .soft { color: var(--soft); font-size: .9rem; }
pre { overflow-x: auto; padding: .8rem; background: var(--card); border-radius: .5rem; font-size: .85rem; }
summary { cursor: pointer; font-weight: 600; margin: .5rem 0; }
"""
_POLICY = "default-src 'none'; style-src 'unsafe-inline'; img-src data:"
_CAPTIONS = {
    "loss": "Mean loss by epoch: of training images as they are trained on, augmented and in the epoch's size, and of "
    "the evaluated images in that size",
    "accuracy": "Accuracy by epoch, of the same images",
    "mistakes": "Test images that were taken for another class; below each its own, and the other with a question mark",
    "confusion": "Confusion matrix of the test: the share of each true class (row) taken for each class (column)",
}


def write_page(
    path: Path,
    *,
    title: str,
    config: Mapping[str, Any],
    environment: Mapping[str, Any],
    choices: Sequence[tuple[str, str]],
    history: Sequence[EpochStats],
    test: TestStats,
    result: RunResult,
    figures: Sequence[Path],
) -> None:
    """Write the page to `path`, replacing an old one atomically.

    Args:
        path: the file; its folder exists.
        title: what was trained on what, such as "big on cifar10".
        config: the run's configuration.
        environment: versions and machine.
        choices: what the runtime decided and why.
        history: one entry an epoch.
        test: the evaluation on the test images.
        result: totals of the run.
        figures: PNG files to embed.

    Raises:
        OSError: a figure cannot be read or the page not written.
    """
    sections = (
        f"<h1>{_text(title)}</h1>",
        _headline(test, result),
        _section("What the runtime chose", _names(choices)),
        _section("Epochs", _epochs(history)) if history else "",
        _section("Test accuracy by class", _classes(test)),
        _section("Figures", "".join(_figure(figure, title) for figure in figures)) if figures else "",
        _section("Written", _names(result.files)) if result.files else "",
        _section("Details", _details("Configuration", config) + _details("Environment", environment)),
    )
    page = (
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        f'<meta http-equiv="Content-Security-Policy" content="{_POLICY}">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{_text(title)}</title>\n<style>{_STYLE}</style>\n</head>\n<body>\n"
        + "\n".join(section for section in sections if section)
        + "\n</body>\n</html>\n"
    )
    # A path can hold bytes that are no text; a question mark stands for each
    publish_bytes(path, page.encode("utf-8", "replace"))


def _text(value: object) -> str:
    return escape(str(value), quote=True)


def _section(heading: str, body: str) -> str:
    return f"<section>\n<h2>{_text(heading)}</h2>\n{body}\n</section>"


def _headline(test: TestStats, result: RunResult) -> str:
    augmented: tuple[tuple[str, str], ...] = ()
    if test.tta_accuracy is not None:
        augmented = ((f"accuracy with test-time augmentation ({test.tta})", percent(test.tta_accuracy)),)
    facts = (
        ("test accuracy", percent(test.accuracy)),
        *augmented,
        ("test loss", loss(test.loss)),
        ("parameters", count(result.parameters)),
        ("epochs", count(result.epochs)),
        ("training", f"{seconds(result.train_seconds)} s"),
        ("evaluation", f"{seconds(result.eval_seconds)} s"),
        ("warm-up, compilation", f"{seconds(result.warmup_seconds)} s"),
        ("images/s in training", count(result.images_per_second)),
    )
    cells = "\n".join(f"<div><dt>{_text(name)}</dt><dd>{_text(value)}</dd></div>" for name, value in facts)
    return (
        f'<dl class="facts">\n{cells}\n</dl>\n<p class="soft">Accuracy and loss are of the model after its last '
        f"epoch on {count(test.samples)} test images, in evaluation mode. Warm-up and compilation are in no other "
        "time.</p>"
    )


def _table(head: Iterable[str], rows: Iterable[Iterable[str]]) -> str:
    """A table of cells that are HTML already."""
    top = "".join(f'<th scope="col">{cell}</th>' for cell in head)
    body = "\n".join("<tr>" + "".join(f"<td>{cell}</td>" for cell in row) + "</tr>" for row in rows)
    return f'<div class="wide"><table>\n<thead><tr>{top}</tr></thead>\n<tbody>\n{body}\n</tbody>\n</table></div>'


def _names(pairs: Iterable[tuple[str, str]]) -> str:
    rows = "\n".join(f'<tr><th scope="row">{_text(name)}</th><td>{_text(value)}</td></tr>' for name, value in pairs)
    return f'<table class="names">\n{rows}\n</table>'


def _epochs(history: Sequence[EpochStats]) -> str:
    part = part_short_name(history[-1].evaluated)
    rows = [epoch_cells(stats) for stats in history]
    head = [_text(name.replace("eval", part)) for name in rows[0]]
    return _table(head, ([_text(cell) for cell in row.values()] for row in rows))


def _classes(test: TestStats) -> str:
    rows = (
        (
            _text(name),
            percent(accuracy),
            # a share that isn't a number has no bar
            f'<div class="bar"><span style="width:{100 * min(max(accuracy, 0.0), 1.0):.1f}%"></span></div>'
            if accuracy == accuracy
            else "",
        )
        for name, accuracy in zip(test.classes, test.class_accuracies, strict=True)
    )
    return _table(("class", "accuracy", ""), rows)


def _figure(path: Path, title: str) -> str:
    caption = _CAPTIONS.get(path.stem, path.stem)
    data = base64.b64encode(path.read_bytes()).decode("ascii")
    return (
        f'<figure>\n<img src="data:image/png;base64,{data}" alt="{_text(f"{caption}, {title}")}">\n'
        f"<figcaption>{_text(caption)}</figcaption>\n</figure>\n"
    )


def _details(name: str, value: Mapping[str, Any]) -> str:
    told = json.dumps(value, indent=2, ensure_ascii=False, default=str)
    return f"<details>\n<summary>{_text(name)}</summary>\n<pre>{_text(told)}</pre>\n</details>\n"
