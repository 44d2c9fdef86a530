import struct
import warnings
from dataclasses import replace
from itertools import pairwise

import matplotlib
import numpy as np
import pytest
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import to_rgb

from fastcifar.figures import accuracy_curves, confusion_matrix, loss_curves, mistakes_grid, write_figures
from fastcifar.metrics import Mistakes
from tests.sample_stats import CIFAR10, make_epochs, make_test

HUNDRED = tuple(f"class_{i}" for i in range(100))
THOUSAND = tuple(f"class_{i}" for i in range(1000))
HOSTILE = ("$\\bad$", "_^{", "<b>", "\\frac", "x" * 30, "caf\udce9", "a\nb")


def draw(figure):
    FigureCanvasAgg(figure).draw()
    return figure.axes[0]


def shown_ticks(axis):
    low, high = sorted(axis.get_view_interval())
    return [place for place in axis.get_majorticklocs() if low <= place <= high]


@pytest.mark.parametrize(
    ("curves", "fields"),
    [(loss_curves, ("train_loss", "eval_loss")), (accuracy_curves, ("train_accuracy", "eval_accuracy"))],
)
@pytest.mark.parametrize("evaluated", ["validation", "test"])
def test_curves_show_the_history(curves, fields, evaluated):
    history = make_epochs(7, evaluated=evaluated)
    axes = draw(curves(history, title="big on cifar10"))
    assert [line.get_label() for line in axes.lines] == ["train", evaluated]
    assert [text.get_text() for text in axes.get_legend().get_texts()] == ["train", evaluated]
    for line, field in zip(axes.lines, fields, strict=True):
        assert list(line.get_xdata()) == [1, 2, 3, 4, 5, 6, 7]
        assert list(line.get_ydata()) == [getattr(stats, field) for stats in history]
    assert axes.get_xlabel() == "epoch"
    assert axes.get_ylabel() == {"train_loss": "cross-entropy (mean over images)"}.get(fields[0], "accuracy")
    assert axes.get_title() == "big on cifar10"
    # not by colour alone
    assert axes.lines[0].get_linestyle() != axes.lines[1].get_linestyle()


def test_epochs_that_were_not_evaluated_leave_no_gap():
    history = [
        stats if stats.epoch in (3, 5) else replace(stats, eval_loss=None, eval_accuracy=None)
        for stats in make_epochs(5)
    ]
    train, validation = draw(loss_curves(history, title="x")).lines
    assert list(train.get_xdata()) == [1, 2, 3, 4, 5]
    assert list(validation.get_xdata()) == [3, 5]
    assert list(validation.get_ydata()) == [history[2].eval_loss, history[4].eval_loss]
    assert len(draw(accuracy_curves(history[:2], title="x")).lines[1].get_xdata()) == 0


def test_the_only_evaluation_of_many_epochs_is_seen():
    history = [replace(stats, eval_loss=None) if stats.epoch < 40 else stats for stats in make_epochs(40, epochs=40)]
    train, test = draw(loss_curves(history, title="x")).lines
    assert (train.get_marker(), test.get_marker()) == ("", "o")


@pytest.mark.parametrize("epochs", [1, 2, 3, 7, 20, 200])
def test_epochs_are_whole_numbers(epochs):
    axes = draw(loss_curves(make_epochs(epochs, epochs=epochs), title="x"))
    ticks = shown_ticks(axes.xaxis)
    assert ticks
    assert all(place == round(place) and 1 <= place <= epochs for place in ticks)
    assert axes.get_ylim()[0] == 0
    # a single point has no line
    assert all(line.get_marker() == "o" for line in axes.lines) == (epochs <= 30)


def test_accuracy_of_one_epoch_has_a_sensible_scale():
    axes = draw(accuracy_curves(make_epochs(1), title="x"))
    low, high = axes.get_ylim()
    assert high - low >= 0.1
    assert all(text.get_text().endswith(" %") for text in axes.get_yticklabels())


def test_no_history_is_an_error():
    with pytest.raises(ValueError, match="at least one epoch"):
        loss_curves((), title="x")


def test_a_diverged_run_can_be_drawn(tmp_path):
    history = [replace(stats, train_loss=float("nan"), eval_accuracy=float("nan")) for stats in make_epochs(3)]
    assert len(write_figures(tmp_path, history, make_test(), title="x")) == 3


def luminance(color):
    channels = np.asarray(to_rgb(color))
    linear = np.where(channels <= 0.04045, channels / 12.92, ((channels + 0.055) / 1.055) ** 2.4)
    return float(linear @ [0.2126, 0.7152, 0.0722])


def test_confusion_matrix_is_the_tests():
    test = make_test()
    axes = draw(confusion_matrix(test, title="big"))
    (image,) = axes.images
    assert np.array_equal(image.get_array(), np.array(test.confusion))
    assert (axes.get_xlabel(), axes.get_ylabel()) == ("predicted class", "true class")
    assert tuple(label.get_text() for label in axes.get_xticklabels()) == CIFAR10
    assert tuple(label.get_text() for label in axes.get_yticklabels()) == CIFAR10
    low, high = axes.get_ylim()
    assert low > high  # the first class is at the top
    assert len(axes.texts) == 100
    for text in axes.texts:
        column, row = text.get_position()
        assert text.get_text() == f"{100 * test.confusion[row][column]:.0f}"


@pytest.mark.parametrize("share", np.linspace(0, 1, 21))
def test_annotations_can_be_read(share):
    test = replace(make_test(("a", "b")), confusion=((share, 1 - share), (1 - share, share)))
    axes = confusion_matrix(test, title="x").axes[0]
    image = axes.images[0]
    for text in axes.texts:
        column, row = text.get_position()
        pair = sorted((luminance(text.get_color()), luminance(image.cmap(image.norm(test.confusion[row][column]))[:3])))
        wanted = 4.5 if text.get_text() != "0" else 3.0  # zeros stand back on purpose
        assert (pair[1] + 0.05) / (pair[0] + 0.05) >= wanted


def test_long_names_leave_room_for_the_matrix():
    axes = draw(confusion_matrix(make_test(HOSTILE), title="x"))
    assert [label.get_text() for label in axes.get_yticklabels()] == [*HOSTILE[:4], "x" * 17 + "...", "caf?", "a b"]
    assert axes.get_window_extent().width > 0.4 * axes.figure.bbox.width


def test_a_hundred_classes_are_not_annotated():
    axes = draw(confusion_matrix(make_test(HUNDRED), title="x"))
    assert not axes.texts
    assert [label.get_text() for label in axes.get_xticklabels()] == [f"class_{i}" for i in range(0, 100, 10)]
    assert list(axes.get_yticks()) == list(range(0, 100, 10))


@pytest.mark.parametrize("classes", [CIFAR10, HUNDRED, THOUSAND, HOSTILE, ("cat", "dog")])
def test_no_text_is_cut_off_or_covered(classes):
    for figure in (
        confusion_matrix(make_test(classes), title="a title of quite some length, " * 3),
        accuracy_curves(make_epochs(20), title="a title of quite some length, " * 3),
    ):
        axes = draw(figure)
        texts = [axes.title, axes.xaxis.label, axes.yaxis.label]
        for axis in (axes.xaxis, axes.yaxis):
            low, high = sorted(axis.get_view_interval())
            texts += [tick.label1 for tick in axis.get_major_ticks() if low <= tick.get_loc() <= high]
        for text in texts:
            box = text.get_window_extent()
            assert box.x0 >= 0
            assert box.y0 >= 0
            assert box.x1 <= figure.bbox.x1
            assert box.y1 <= figure.bbox.y1
        names = [label.get_window_extent() for label in axes.get_yticklabels()]
        assert not any(one.overlaps(other) for one, other in pairwise(names))


def png_size(path):
    content = path.read_bytes()
    assert content[:8] == b"\x89PNG\r\n\x1a\n"
    assert content[-8:-4] == b"IEND"
    return struct.unpack(">II", content[16:24])


@pytest.mark.parametrize("classes", [CIFAR10, HUNDRED])
def test_written_files(tmp_path, classes):
    settings = dict(matplotlib.rcParams)
    folder = tmp_path / "figures"
    paths = write_figures(folder, make_epochs(1), make_test(classes), title="big on $cifar")
    assert [path.name for path in paths] == ["loss.png", "accuracy.png", "confusion.png"]
    assert {path.name for path in folder.iterdir()} == {path.name for path in paths}
    assert [png_size(path) for path in paths[:2]] == [(960, 600)] * 2
    width, height = png_size(paths[2])
    assert 700 <= height <= width <= 1600
    assert dict(matplotlib.rcParams) == settings


def test_names_in_any_script_are_no_warnings(tmp_path):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        paths = write_figures(tmp_path, make_epochs(2), make_test(("猫", "犬", "🐈")), title="big on 動物")
    assert [path.name for path in paths] == ["loss.png", "accuracy.png", "confusion.png"]


def make_mistakes(count, channels=3, wrong=None, name="cat"):
    images = np.random.default_rng(0).integers(0, 256, (count, 20, 32, channels), np.uint8)
    return Mistakes(images=images, truth=(name,) * count, taken_for=("$dog$",) * count, wrong=wrong or count)


@pytest.mark.parametrize(("count", "rows"), [(1, 1), (8, 1), (9, 2), (40, 5)])
@pytest.mark.parametrize("channels", [1, 3])
def test_mistakes_are_shown_above_their_classes(count, rows, channels):
    found = make_mistakes(count, channels)
    axes = draw(mistakes_grid(found, title="big on $cifar"))
    assert [text.get_text() for text in axes.texts] == ["cat\n$dog$?"] * count
    (picture,) = (image.get_array() for image in axes.images)
    columns = min(8, count)
    down, right = picture.shape[0] // rows, picture.shape[1] // columns
    for i, image in enumerate(found.images):
        top, left = down * (i // columns), right * (i % columns)
        assert np.array_equal(picture[top : top + 20, left : left + 32], np.broadcast_to(image, (20, 32, 3)))
    boxes = [text.get_window_extent() for text in axes.texts]
    inside = axes.figure.bbox
    for box in boxes:
        assert inside.x0 <= box.x0 < box.x1 <= inside.x1
        assert inside.y0 <= box.y0 < box.y1 <= inside.y1
        x, y = axes.transData.inverted().transform((box.x0, box.y0))
        assert y % down >= 20 or y >= down * rows - 1, "the names reach into the next row"
        assert x >= -1


def test_long_names_of_mistakes_are_cut():
    axes = draw(mistakes_grid(make_mistakes(2, name="x" * 30), title="x"))
    assert axes.texts[0].get_text() == "x" * 11 + "...\n$dog$?"
    with pytest.raises(ValueError, match="at least one"):
        mistakes_grid(make_mistakes(0), title="x")


def test_mistakes_are_written_where_there_are_some(tmp_path):
    for found, names in (
        (make_mistakes(3, wrong=70), {"confusion.png", "mistakes.png"}),
        (make_mistakes(0), {"confusion.png"}),
    ):
        folder = tmp_path / str(len(found.images))
        paths = write_figures(folder, (), make_test(), title="x", mistakes=found)
        assert {path.name for path in paths} == {path.name for path in folder.iterdir()} == names


def test_without_epochs_only_the_matrix_is_written(tmp_path):
    assert [path.name for path in write_figures(tmp_path, (), make_test(), title="x")] == ["confusion.png"]


def test_a_failed_write_keeps_the_old_file(tmp_path, monkeypatch):
    write_figures(tmp_path, make_epochs(2), make_test(), title="x")
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}

    def fail(descriptor):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", fail)
    with pytest.raises(OSError, match="No space"):
        write_figures(tmp_path, make_epochs(3), make_test(), title="y")
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before
