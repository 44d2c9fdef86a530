import base64
import re
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import pytest

from fastcifar.formats import epoch_cells
from fastcifar.page import write_page
from tests.sample_stats import CIFAR10, make_epochs, make_result, make_summary, make_test

HOSTILE = ("<script>alert(1)</script>", "\"><img src=x onerror='x'>", "a&b", "\udcff\udc80", "\u732b")
PNG = b"\x89PNG\r\n\x1a\n not really a picture"


class Page(HTMLParser):
    """Tags in the order they open, the text in each, and whether they nest."""

    VOID = ("meta", "img")

    def __init__(self, text):
        super().__init__()
        self.open, self.tags, self.text, self.rows = [], [], {}, []
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag == "tr":
            self.rows.append([])
        if tag in ("td", "th"):
            self.rows[-1].append("")
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        tag = self.open[-1] if self.open else ""
        self.text.setdefault(tag, []).append(data)
        if tag in ("td", "th"):
            self.rows[-1][-1] += data

    def all(self, tag):
        return [attrs for name, attrs in self.tags if name == tag]


def make_page(folder, **changes):
    figures = []
    for name in ("loss", "accuracy", "confusion"):
        figures.append(folder / f"{name}.png")
        figures[-1].write_bytes(PNG + name.encode())
    test = changes.pop("test", make_test())
    arguments = {
        "title": "big on cifar10",
        "config": {"arch": "big", "seed": 7, "nested": {"path": Path("a") / "b"}},
        "environment": {"torch": "2.13.0"},
        "choices": make_summary().choices,
        "history": make_epochs(5),
        "test": test,
        "result": make_result(test),
        "figures": figures,
    } | changes
    write_page(folder / "report.html", **arguments)
    return (folder / "report.html").read_text(encoding="utf-8")


def test_numbers_are_there(tmp_path):
    page = Page(make_page(tmp_path))
    facts = dict(zip(page.text["dt"], page.text["dd"], strict=True))
    assert facts["test accuracy"] == "75.75 %"
    assert facts["test loss"] == "0.8123"
    assert facts["parameters"] == "5,655,498"
    assert facts["training"] == "588.28 s"
    assert facts["images/s in training"] == "1,700"
    for stats in make_epochs(5):
        assert list(epoch_cells(stats).values()) in page.rows
    assert ["precision", "float32: this CPU has no bfloat16 units"] in page.rows
    assert ["checkpoint", "runs/big-cifar10-0/checkpoints/3920"] in page.rows
    classes = [row[:2] for row in page.rows if row[0] in CIFAR10]
    assert classes == [
        [name, f"{100 * a:.2f} %"] for name, a in zip(CIFAR10, make_test().class_accuracies, strict=True)
    ]
    assert page.text["h1"] == ["big on cifar10"]
    config, environment = page.text["pre"]
    assert '"seed": 7' in config
    assert '"path": "a/b"' in config
    assert '"torch": "2.13.0"' in environment


def test_test_time_augmentation_stands_beside_the_plain_accuracy(tmp_path):
    test = replace(make_test(), accuracy=0.91, tta="shift", tta_accuracy=0.9234)
    page = Page(make_page(tmp_path, test=test))
    facts = dict(zip(page.text["dt"], page.text["dd"], strict=True))
    assert facts["test accuracy"] == "91.00 %"
    assert facts["accuracy with test-time augmentation (shift)"] == "92.34 %"
    assert "test-time augmentation" not in make_page(tmp_path)


@pytest.mark.parametrize(("evaluated", "header"), [("validation", "val acc"), ("test", "test acc")])
def test_the_evaluated_part_is_named(tmp_path, evaluated, header):
    page = Page(make_page(tmp_path, history=make_epochs(2, evaluated=evaluated)))
    assert header in next(row for row in page.rows if row[0] == "epoch")


def test_figures_are_inside_and_described(tmp_path):
    images = Page(make_page(tmp_path)).all("img")
    prefix = "data:image/png;base64,"
    assert all(image["src"].startswith(prefix) for image in images)
    contents = [base64.b64decode(image["src"][len(prefix) :], validate=True) for image in images]
    assert contents == [PNG + b"loss", PNG + b"accuracy", PNG + b"confusion"]
    assert ["loss" in images[0]["alt"], "Accuracy" in images[1]["alt"], "Confusion" in images[2]["alt"]] == [True] * 3


def test_hostile_names_are_text(tmp_path):
    pairs = tuple((name, name) for name in HOSTILE)
    test = make_test(HOSTILE)
    text = make_page(
        tmp_path,
        title=HOSTILE[0] + HOSTILE[1],
        config={name: name for name in HOSTILE},
        environment={"</pre><script>": HOSTILE[0]},
        choices=pairs,
        test=test,
        result=replace(make_result(test), files=pairs),
    )
    page = Page(text)
    assert not page.all("script")
    assert len(page.all("img")) == 3
    assert not any(key.startswith("on") for _, attrs in page.tags for key in attrs)
    shown = [row[0] for row in page.rows if len(row) == 3]
    assert shown[1:] == [*HOSTILE[:3], "??", HOSTILE[4]]
    assert page.text["h1"] == [HOSTILE[0] + HOSTILE[1]]
    assert HOSTILE[0] in page.text["pre"][1]


def test_nothing_outside_is_loaded(tmp_path):
    text = make_page(tmp_path)
    assert not re.search(r"https?:|//[a-z]|url\(|@import|file:", re.sub(r"base64,[^\"]*", "", text))
    tags = {tag for tag, _ in Page(text).tags}
    assert not tags & {"script", "link", "iframe", "object", "a", "base", "form"}
    policy = next(meta for meta in Page(text).all("meta") if "http-equiv" in meta)
    assert policy["content"].startswith("default-src 'none';")


def test_light_dark_and_phone(tmp_path):
    text = make_page(tmp_path)
    assert "prefers-color-scheme: dark" in text
    assert {"name": "viewport", "content": "width=device-width, initial-scale=1"} in Page(text).all("meta")
    # a table wider than the phone scrolls by itself, so that the page doesn't
    assert text.count('<div class="wide"><table>') == 2


def test_parts_without_content_are_left_out(tmp_path):
    page = Page(make_page(tmp_path, history=(), figures=()))
    assert not page.all("img")
    assert "Epochs" not in page.text["h2"]
    assert "Figures" not in page.text["h2"]


def test_numbers_that_are_not_finite(tmp_path):
    nan = float("nan")
    test = replace(make_test(("a", "b")), loss=nan, accuracy=nan, class_accuracies=(nan, 0.5))
    page = Page(make_page(tmp_path, test=test))
    assert ["a", "-", ""] in page.rows
    assert len(page.all("span")) == 1


def test_a_failed_write_keeps_the_old_page(tmp_path):
    before = make_page(tmp_path)
    with pytest.raises(FileNotFoundError):
        make_page(tmp_path, title="new", figures=[tmp_path / "missing.png"])
    assert (tmp_path / "report.html").read_text(encoding="utf-8") == before
    assert not [path for path in tmp_path.iterdir() if path.name.startswith(".tmp-")]
