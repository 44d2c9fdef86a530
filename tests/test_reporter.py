import io
import json
import logging
import math
import os
import pty
import re
import struct
import subprocess
import sys
import termios
import textwrap
import time
from contextlib import contextmanager
from dataclasses import fields, replace
from fcntl import ioctl
from pathlib import Path

import pytest
from rich.cells import cell_len
from rich.console import Console

from fastcifar.console import ConsoleReporter, print_test
from fastcifar.formats import duration, epoch_cells, fit_columns, loss, seconds, size
from fastcifar.metrics import EpochStats
from fastcifar.phase import Phase
from fastcifar.reporter import JsonLinesReporter, NullReporter, TeeReporter
from tests.sample_stats import CIFAR10, make_epochs, make_result, make_summary, make_test

ROOT = Path(__file__).parents[1]
ESCAPE = re.compile(r"\x1b\[[0-9;?]*[A-Za-z]")
HOSTILE = ("[red]cat[/red]", "a\x1b[2Jb", "line\nbreak", "\udcff", "\u732b", "x" * 300)


class Clock:
    """Seconds that pass when told to."""

    def __init__(self):
        self.now = 100.0

    def __call__(self):
        return self.now


def make_console(width, encoding="utf-8", **options):
    file = io.TextIOWrapper(io.BytesIO(), encoding=encoding, newline="")
    options = {"force_terminal": True, "color_system": "standard"} | options
    return Console(file=file, width=width, height=40, _environ={"TERM": "xterm"}, **options)


def written(console):
    console.file.flush()
    return console.file.buffer.getvalue().decode(console.file.encoding)


def screen(output, width):
    """The lines a terminal of `width` columns shows after `output`, scrolled-off ones too."""
    lines, x, y = [""], 0, 0
    for part in re.findall(r"\x1b\[[0-9;?]*[A-Za-z]|.", output, re.DOTALL):
        if part == "\n":
            x, y = 0, y + 1
        elif part == "\r":
            x = 0
        elif part.endswith("A") and len(part) > 1:
            y -= int(part[2:-1] or 1)
        elif part == "\x1b[2K":
            lines[y] = ""
        elif part.startswith("\x1b"):
            assert part[-1] in "mhl", f"the emulator doesn't know {part!r}"
        else:
            assert x < width, f"a line is longer than {width}: {lines[y]!r}"
            lines += [""] * (y + 1 - len(lines))
            lines[y] = lines[y][:x].ljust(x) + part + lines[y][x + 1 :]
            x += cell_len(part)
        assert y >= 0
        lines += [""] * (y + 1 - len(lines))
    return [line.rstrip() for line in lines]


def play(reporter, *, done=3, test=None, summary=None):
    """A whole run, as the engine would report it."""
    with reporter.transfer("fetching cifar-10-python.tar.gz", "bytes") as progress:
        for done_bytes in (10_000_000, 100_000_000, 170_498_071):
            progress(done_bytes, 170_498_071)
    reporter.start(summary or make_summary(notices=("look at this",)), make_epochs(1))
    for stats in make_epochs(done)[1:]:
        reporter.epoch_start(stats.epoch)
        for step in range(1, 197):
            reporter.train_step(step, 196, 1699.87)
        reporter.evaluate_start("validation")
        reporter.epoch_end(stats)
    reporter.message("something happened")
    reporter.evaluate_start("test")
    reporter.finish(make_result(test))
    reporter.close()


@pytest.mark.parametrize("width", [20, 33, 50, 80, 120])
@pytest.mark.parametrize("encoding", ["utf-8", "ascii", "cp1252"])
@pytest.mark.parametrize("names", [CIFAR10, tuple(f"c{i}" for i in range(100)), HOSTILE])
def test_every_line_fits_and_is_encodable(width, encoding, names):
    console = make_console(width, encoding)
    summary = replace(make_summary(notices=HOSTILE), title="[b]x", choices=tuple(zip(HOSTILE, HOSTILE, strict=True)))
    play(ConsoleReporter(console), test=make_test(names), summary=summary)
    output = written(console)
    for line in ESCAPE.sub("\n", output).replace("\r", "\n").split("\n"):
        assert cell_len(line) <= width, line
    if encoding != "utf-8":
        assert output.isascii()
    assert "\x1b[2J" not in output  # a name's own escape code
    assert output.count("\x1b[?25h") >= output.count("\x1b[?25l") > 0
    assert output.rindex("\x1b[?25h") > output.rindex("\x1b[?25l")


@pytest.mark.parametrize("width", [60, 80, 120])
def test_what_is_left_on_the_screen(width):
    console = make_console(width)
    play(ConsoleReporter(console), done=4)
    lines = screen(written(console), width)
    columns = fit_columns(width, epochs=20, evaluated="validation")
    rows = [columns.headers] + [tuple(epoch_cells(s)[name] for name in columns.names) for s in make_epochs(4)]
    expected = [
        (" " * columns.gap).join(cell.rjust(w) for cell, w in zip(row, columns.widths, strict=True)) for row in rows
    ]
    first = lines.index(expected[0])
    # each row once and under the last, and nothing of the live part between or after
    assert lines[first : first + 6] == [*expected, "something happened"]
    assert lines[first + 6].startswith("\u256d\u2500 test ")
    assert not any("training" in line or "evaluating" in line for line in lines)
    assert not any("fetching" in line for line in lines[1:])
    assert "" not in lines[:-1]
    assert lines[0].startswith("fetching cifar-10-python.tar.gz: 170.5 MB, ")
    for told in ("75.75 %", "0.8123", "588.28 s, 1,700 images/s", "45.78 s", "3.21 s", "5,655,498", "report.html"):
        assert any(told in line for line in lines[first + 6 :]), told


def test_live_part_shows_progress_and_time_left():
    clock, console = Clock(), make_console(120)
    reporter = ConsoleReporter(console, clock=clock)
    reporter.start(make_summary(epochs=3), ())
    reporter.epoch_start(1)
    for step in (1, 51, 99):
        reporter.train_step(step, 197, 12345.6)
        clock.now += 50.0
    bottom = screen(written(console), 120)[-2:]
    assert bottom[0] == "1/3  training  1:40"
    # 98 steps took 100 s, so 98 more take as long; two epochs of 197 steps follow
    assert bottom[1].endswith("  99/197, 12,346 images/s, 1:40 left, run 8:22 left")
    reporter.evaluate_start("validation")
    assert screen(written(console), 120)[-1] in ("", "1/3  evaluating on validation  0:00")
    reporter.epoch_end(replace(make_epochs(1, epochs=3)[0], train_seconds=200.0, eval_seconds=10.0))
    lines = screen(written(console), 120)
    assert lines[-2].startswith("  1/3      2.0123") or lines[-1].startswith("  1/3      2.0123")
    assert not any("evaluating" in line for line in lines)
    reporter.epoch_start(2)
    for step in (1, 99):
        reporter.train_step(step, 197, 12345.6)
        clock.now += 100.0
    # as long again, this epoch's evaluation, and one epoch like the last
    assert screen(written(console), 120)[-1].endswith("  99/197, 12,346 images/s, 1:40 left, run 5:20 left")
    reporter.close()
    assert not any("2/3" in line for line in screen(written(console), 120))
    assert written(console).endswith("\x1b[?25h")


def test_time_left_counts_the_evaluations_that_there_will_be():
    clock, console = Clock(), make_console(120)
    reporter = ConsoleReporter(console, clock=clock)
    reporter.start(replace(make_summary(epochs=8), eval_every=3), ())
    epochs = make_epochs(4, epochs=8)
    no_evaluation = {"eval_loss": None, "eval_accuracy": None, "eval_seconds": 0.0}
    reporter.epoch_end(replace(epochs[2], train_seconds=100.0, eval_seconds=10.0))
    reporter.epoch_end(replace(epochs[3], train_seconds=100.0, **no_evaluation))
    reporter.epoch_start(5)
    for step in (1, 99):
        reporter.train_step(step, 197, 12345.6)
        clock.now += 50.0
    # half an epoch, three more, and the evaluations after the sixth and the last
    assert screen(written(console), 120)[-1].endswith("0:50 left, run 6:10 left")
    row = next(line for line in screen(written(console), 120) if line.strip().startswith("4/8"))
    assert row.split() == ["4/8", "0.5123", "84.98", "%", "-", "-", "100.00", "-", "1,706", "6.3e-04"]
    reporter.close()


def test_live_part_takes_two_lines_on_a_narrow_terminal():
    console = make_console(20)
    reporter = ConsoleReporter(console)
    reporter.start(make_summary(), ())
    panel = len(screen(written(console), 20)) - 1
    reporter.epoch_start(1)
    reporter.train_step(98, 196, 1699.87)
    assert screen(written(console), 20)[panel:] == ["1/20  training  0:00", "\u2501" * 12 + "  98/196"]
    reporter.evaluate_start("validation")
    assert [line for line in screen(written(console), 20)[panel:] if line] == ["1/20  evaluating on"]
    reporter.close()


def test_many_classes_run_down_the_columns():
    console = make_console(100)
    print_test(make_test(tuple(f"c{i:02}" for i in range(90))), console)
    rows = [re.findall(r"c\d\d", line) for line in screen(written(console), 100) if "c0" in line]
    assert len(rows[0]) > 2
    names = [row[0] for row in rows]
    assert names == [f"c{i:02}" for i in range(len(names))]


def test_narrow_terminals_drop_columns_by_importance():
    def names(width):
        return set(fit_columns(width, epochs=20, evaluated="test").names)

    assert names(20) == {"epoch", "eval acc"}
    assert len(names(80)) == 9
    for width in range(20, 120):
        assert names(width) <= names(width + 1)
        columns = fit_columns(width, epochs=20, evaluated="test")
        assert sum(columns.widths) + columns.gap * (len(columns.widths) - 1) <= width
    assert "test acc" in fit_columns(80, epochs=20, evaluated="test").headers
    assert "val acc" in fit_columns(80, epochs=20, evaluated="validation").headers


def test_table_follows_a_window_that_is_resized():
    console = make_console(120)
    reporter = ConsoleReporter(console)
    reporter.start(make_summary(), make_epochs(2))
    console.width = 30
    reporter.epoch_end(make_epochs(3)[2])
    lines = screen(written(console), 120)
    assert lines[-3].split() == ["epoch", "train", "loss", "val", "acc"]
    assert lines[-2].split() == ["3/20", "0.6790", "73.36", "%"]


def test_no_color_and_dumb_terminals(monkeypatch):
    console = make_console(80, color_system=None, no_color=True)
    play(ConsoleReporter(console))
    assert not re.search(r"\x1b\[[0-9;]*(3[0-7]|9[0-7])m", written(console))
    dumb = Console(file=io.StringIO(), force_terminal=True, width=80, _environ={"TERM": "dumb"})
    play(ConsoleReporter(dumb))
    assert not re.search("\x1b|\u256d", dumb.file.getvalue())
    assert "epoch 3/20: train loss 0.6790" in dumb.file.getvalue()


def test_plain_lines_off_a_terminal():
    clock, console = Clock(), Console(file=io.StringIO())
    reporter = ConsoleReporter(console, clock=clock)
    reporter.start(make_summary(), ())
    reporter.epoch_start(1)
    for step in range(1, 101):  # 100 s: lines at 30, 60 and 90 s
        reporter.train_step(step, 100, 1000.0)
        clock.now += 1.0
    reporter.epoch_end(make_epochs(1)[0])
    reporter.finish(make_result())
    lines = console.file.getvalue().splitlines()
    assert [line for line in lines if ": train " in line and "epoch" in line and "loss" not in line] == [
        "epoch 1/20: train 31 %, 1,000 images/s, 1:09 left, run 32:49 left",
        "epoch 1/20: train 61 %, 1,000 images/s, 0:39 left, run 32:19 left",
        "epoch 1/20: train 91 %, 1,000 images/s, 0:09 left, run 31:49 left",
    ]
    assert (
        "epoch 1/20: train loss 2.0123, train accuracy 39.98 %, validation loss 1.7568, validation accuracy 40.03 %, "
        "train 29.27 s, validation 2.14 s, 1,708 images/s, learning rate 1.0e-03"
    ) in lines
    reporter.epoch_end(replace(make_epochs(1)[0], eval_loss=None, eval_accuracy=None, eval_seconds=0.0))
    assert console.file.getvalue().splitlines()[-1] == (
        "epoch 1/20: train loss 2.0123, train accuracy 39.98 %, train 29.27 s, 1,708 images/s, learning rate 1.0e-03"
    )
    classes = [line.split()[0] for line in lines if re.match(r"[a-z]+ +\d+\.\d\d % ", line)]
    assert tuple(classes) == CIFAR10
    assert not any("\x1b" in line or "\r" in line or line != line.rstrip() for line in lines)


def test_plain_transfers():
    clock, console = Clock(), Console(file=io.StringIO())
    reporter = ConsoleReporter(console, clock=clock)
    with reporter.transfer("fetching", "bytes") as progress:
        for second in range(41):
            progress(second * 1_000_000, 100_000_000)
            clock.now += 1.0
    with reporter.transfer("converting", "images") as progress:
        pass
    assert console.file.getvalue().splitlines() == [
        "fetching ...",
        "fetching: 30.0 MB of 100.0 MB, 1.0 MB/s, 1:10 left",
        "fetching: 40.0 MB, 0:40",
    ]


def test_a_transfer_that_begins_anew_is_told_anew():
    clock, console = Clock(), Console(file=io.StringIO())
    reporter = ConsoleReporter(console, clock=clock)
    with reporter.transfer("fetching", "bytes") as progress:
        for seconds in (5.0, 40.0):
            for done in (0, 1_000_000, 2_000_000):
                progress(done, 2_000_000)
                clock.now += seconds
    assert console.file.getvalue().splitlines() == [
        "fetching ...",
        "fetching: 2.0 MB, 0:10",
        "fetching: 0 bytes of 2.0 MB",
        "fetching: 1.0 MB of 2.0 MB, 25.0 kB/s, 0:40 left",
        "fetching: 2.0 MB, 1:20",
    ]


def test_a_transfer_is_told_when_it_ends_and_not_what_follows_it():
    clock, console = Clock(), Console(file=io.StringIO())
    reporter = ConsoleReporter(console, clock=clock)
    with reporter.transfer("fetching", "bytes") as fetching, reporter.transfer("converting", "images") as converting:
        for progress, seconds in ((fetching, 40.0), (converting, 5.0)):
            progress(0, 2_000_000)
            clock.now += seconds
            progress(2_000_000, 2_000_000)
        clock.now += 3.0
    assert console.file.getvalue().splitlines() == [
        "fetching ...",
        "fetching: 2.0 MB, 0:40",
        "converting ...",
        "converting: 2,000,000 images, 0:05",
    ]


def test_a_failed_transfer_gives_the_terminal_back():
    console = make_console(80)
    reporter = ConsoleReporter(console)
    with pytest.raises(TypeError), reporter.transfer("fetching", "bytes") as progress:
        progress("not a number", None)
    assert written(console).endswith("\x1b[?25h")
    assert not any(screen(written(console), 80))


def test_train_step_is_cheap():
    console = make_console(100)
    reporter = ConsoleReporter(console)
    reporter.start(make_summary(), ())
    reporter.epoch_start(1)
    before = len(written(console))
    started = time.perf_counter()
    for step in range(10_000):
        reporter.train_step(step, 10_000, 1e4)
    took = time.perf_counter() - started
    drawn = written(console)[before:].count("/10,000")
    reporter.close()
    assert 1 <= drawn <= 2 + 5 * took
    assert took / 10_000 < 20e-6


def test_drawing_waits_longer_on_a_slow_terminal():
    clock, console = Clock(), make_console(80)
    reporter = ConsoleReporter(console, clock=clock)
    write = console.file.write

    def slow_write(text):
        clock.now += 0.1
        return write(text)

    reporter.start(make_summary(), ())
    reporter.epoch_start(1)
    console.file.write = slow_write
    began = clock.now
    for step in range(1000):
        reporter.train_step(step, 1000, 1.0)
        clock.now += 0.1
    console.file.write = write
    reporter.close()
    assert 100.0 <= clock.now - began < 105.0


def test_print_test_can_be_recorded():
    console = Console(record=True, force_terminal=True, width=60, file=io.StringIO())
    print_test(make_test(), console)
    text = console.export_text(clear=False)
    assert [text.index(name) for name in CIFAR10] == sorted(text.index(name) for name in CIFAR10)
    for accuracy in make_test().class_accuracies:
        assert f"{100 * accuracy:.2f} %" in text
    assert "<svg" in console.export_svg()


@pytest.mark.parametrize("width", [40, 80])
def test_print_test_shows_test_time_augmentation_beside_the_plain_accuracy(width):
    console = Console(record=True, force_terminal=True, width=width, file=io.StringIO())
    print_test(replace(make_test(), accuracy=0.91, tta="flip", tta_accuracy=0.9234), console)
    text = " ".join(console.export_text().replace("\u2502", " ").split())
    assert "accuracy 91.00 %; 92.34 % with test-time augmentation (flip)" in text
    print_test(make_test(), console)
    assert "augmentation" not in console.export_text()


def run_script(body, **options):
    """Run `body` in a process of its own, with `play` and the rest of this module at hand."""
    prelude = f"import sys; sys.path.insert(0, {str(ROOT)!r})\nfrom tests.test_reporter import *\n"
    return subprocess.Popen([sys.executable, "-c", prelude + textwrap.dedent(body)], **options)


def run_on_terminal(body, columns, **environment):
    leader, follower = pty.openpty()
    ioctl(follower, termios.TIOCSWINSZ, struct.pack("HHHH", 40, columns, 0, 0))
    hidden = {"COLUMNS", "LINES", "NO_COLOR", "FORCE_COLOR", "PYTHONIOENCODING"}
    inherited = {key: value for key, value in os.environ.items() if key not in hidden}
    process = run_script(
        body, stdin=follower, stdout=follower, stderr=follower, env=inherited | {"TERM": "xterm"} | environment
    )
    os.close(follower)
    output = b""
    while True:
        try:
            part = os.read(leader, 65536)
        except OSError:  # the last process has closed its end
            break
        if not part:
            break
        output += part
    os.close(leader)
    return process.wait(), output.decode()


@pytest.mark.parametrize(("columns", "encoding"), [(20, "utf-8"), (120, "cp1252")])
def test_real_terminal(columns, encoding):
    status, output = run_on_terminal("play(ConsoleReporter())", columns, PYTHONIOENCODING=encoding)
    assert status == 0
    lines = screen(output, columns)
    assert sum("3/20" in line and "73.36 %" in line for line in lines) == 1
    assert any("truck  70.50 %" in line for line in lines)
    assert output.rindex("\x1b[?25h") > output.rindex("\x1b[?25l")
    assert output.isascii() == (encoding != "utf-8")


def test_interrupt_leaves_a_clean_terminal():
    body = """
    import signal
    reporter = TeeReporter(ConsoleReporter())
    try:
        reporter.start(make_summary(), ())
        reporter.epoch_start(1)
        for step in range(10):
            reporter.train_step(step, 100, 1.0)
        print("printed by someone else")
        signal.raise_signal(signal.SIGINT)
    except KeyboardInterrupt:
        pass
    finally:
        reporter.close()
    print("after")
    """
    status, output = run_on_terminal(body, 80)
    assert status == 0
    lines = [line for line in screen(output, 80) if line]
    assert lines[-2:] == ["printed by someone else", "after"]
    assert "?25" not in output[output.rindex("\x1b[?25h") + 6 :]


def test_pipe_gets_no_escape_codes():
    process = run_script(
        "play(ConsoleReporter(), test=make_test(HOSTILE))",
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env=os.environ | {"FORCE_COLOR": "1", "PYTHONIOENCODING": "ascii"},
    )
    output, errors = process.communicate()
    assert (process.returncode, errors) == (0, b"")
    assert b"\x1b" not in output
    assert b"epoch 3/20: train loss 0.6790" in output


@pytest.mark.parametrize("closing", ["pipe", "descriptor"])
def test_closed_output_does_not_stop_a_run(closing, tmp_path):
    body = f"""
    reporter = TeeReporter(ConsoleReporter(), JsonLinesReporter(Path({str(tmp_path)!r}) / "metrics.jsonl"))
    sys.stdin.read(1)  # until the reader is gone
    play(reporter)
    """
    options = {"stdin": subprocess.PIPE, "stderr": subprocess.PIPE}
    if closing == "descriptor":
        options["preexec_fn"] = lambda: os.close(1)
    else:
        options["stdout"] = subprocess.PIPE
    process = run_script(body, **options)
    if process.stdout:
        process.stdout.close()
        process.stdout = None
    _, errors = process.communicate(b"x")
    assert process.returncode == 0, errors
    assert b"Traceback" not in errors
    assert b"Exception ignored" not in errors
    assert len((tmp_path / "metrics.jsonl").read_text().splitlines()) == 1 + 3 + 1
    # without the descriptor Python has no sys.stdout, and rich writes nowhere
    assert errors.count(b"ConsoleReporter stopped reporting") == (1 if closing == "pipe" else 0)


def test_a_closed_stdout_object_does_not_stop_a_run(monkeypatch, caplog):
    closed = io.StringIO()
    closed.close()
    monkeypatch.setattr(sys, "stdout", closed)
    good = Recorder()
    play(TeeReporter(ConsoleReporter(), good))
    assert set(good.calls) == set(CALLS)
    assert caplog.text.count("ConsoleReporter stopped reporting") == 1


def parse(path):
    return [json.loads(line) for line in path.read_bytes().splitlines()]


def epochs_in(path):
    names = {field.name for field in fields(EpochStats)}
    records = [record for record in parse(path) if record.pop("kind") == "epoch"]
    assert all(set(record) == names for record in records)
    return tuple(EpochStats(**record) for record in records)


def test_json_lines_hold_what_went_in(tmp_path):
    path = tmp_path / "new folder" / "metrics.jsonl"
    reporter = JsonLinesReporter(path)
    reporter.start(make_summary(), ())
    for number, stats in enumerate(make_epochs(5), start=1):
        reporter.epoch_end(stats)
        assert epochs_in(path) == make_epochs(number)  # flushed: readable at once
    reporter.finish(make_result())
    reporter.close()
    records = parse(path)
    assert [record["kind"] for record in records] == ["run"] + 5 * ["epoch"] + ["test"]
    assert records[0]["title"] == "big on cifar10"
    assert records[0]["choices"][0] == ["device", "cpu: AMD EPYC, 2 threads"]
    test = records[-1]
    assert test["confusion"] == [list(row) for row in make_test().confusion]
    assert (test["accuracy"], test["classes"]) == (make_test().accuracy, list(CIFAR10))
    assert (test["parameters"], test["files"]["report"]) == (5_655_498, "runs/big-cifar10-0/report.html")


def test_json_lines_of_a_resumed_run(tmp_path):
    path = tmp_path / "metrics.jsonl"
    reporter = JsonLinesReporter(path)
    reporter.start(make_summary(), ())
    for stats in make_epochs(7):
        reporter.epoch_end(stats)
    reporter.close()
    with open(path, "ab") as handle:
        handle.write(b'{"kind": "epoch", "epo')  # killed in the middle of a line
    resumed = JsonLinesReporter(path)
    resumed.start(make_summary(), make_epochs(4))  # the checkpoint is from epoch 4
    assert epochs_in(path) == make_epochs(4)
    for stats in make_epochs(6)[4:]:
        resumed.epoch_end(stats)
    resumed.close()
    assert epochs_in(path) == make_epochs(6)
    once = JsonLinesReporter(tmp_path / "once.jsonl")
    once.start(make_summary(), ())
    for stats in make_epochs(6):
        once.epoch_end(stats)
    once.close()
    assert path.read_bytes() == (tmp_path / "once.jsonl").read_bytes()
    assert {file.name for file in tmp_path.iterdir()} == {"metrics.jsonl", "once.jsonl"}


def test_json_lines_are_strict_json(tmp_path):
    reporter = JsonLinesReporter(tmp_path / "m.jsonl")
    reporter.start(replace(make_summary(), title="\udcff\n"), ())
    reporter.epoch_end(replace(make_epochs(1)[0], train_loss=math.nan, eval_loss=math.inf))
    reporter.close()
    run, epoch = parse(tmp_path / "m.jsonl")
    assert run["title"] == "\udcff\n"
    assert (epoch["train_loss"], epoch["eval_loss"], epoch["train_seconds"]) == (None, None, 29.265625)


def test_json_lines_must_be_started(tmp_path):
    reporter = JsonLinesReporter(tmp_path / "m.jsonl")
    with pytest.raises(RuntimeError, match="not started"):
        reporter.epoch_end(make_epochs(1)[0])
    reporter.close()


class Recorder(NullReporter):
    """Remembers the names of calls, and raises `error` at the one called `fails_at`."""

    def __init__(self, fails_at="", error=None):
        self.calls, self.fails_at, self.error = [], fails_at, error

    def hear(self, name):
        self.calls.append(name)
        if name == self.fails_at:
            raise self.error

    def start(self, summary, history):
        self.hear("start")

    def epoch_start(self, epoch):
        self.hear("epoch_start")

    def train_step(self, step, steps, images_per_second):
        self.hear("train_step")

    def evaluate_start(self, part):
        self.hear("evaluate_start")

    def epoch_end(self, stats):
        self.hear("epoch_end")

    def finish(self, result):
        self.hear("finish")

    def message(self, text):
        self.hear("message")

    @contextmanager
    def transfer(self, description, unit):
        self.hear("transfer")
        try:
            yield lambda done, total: self.hear("progress")
        finally:
            self.hear("leave")

    def close(self):
        self.hear("close")


CALLS = ["transfer", "progress", "leave", "start", "epoch_start", "train_step", "evaluate_start", "epoch_end"]
CALLS += ["message", "finish", "close"]


@pytest.mark.parametrize("fails_at", CALLS)
@pytest.mark.parametrize(
    "error", [BrokenPipeError(32, "Broken pipe"), OSError(28, "No space left"), UnicodeError("x"), KeyError("bug")]
)
def test_tee_goes_on_without_the_one_that_fails(fails_at, error, caplog):
    failing, good = Recorder(fails_at, error), Recorder()
    play(TeeReporter(failing, good))
    assert set(good.calls) == set(CALLS)
    after = failing.calls[failing.calls.index(fails_at) + 1 :]
    assert [call for call in after if call != "leave"] == ["close"]
    assert [record.levelno for record in caplog.records] == [logging.WARNING]
    assert type(error).__name__ in caplog.text
    assert "Recorder" in caplog.text


@pytest.mark.parametrize("error", [KeyboardInterrupt(), SystemExit(143)])
def test_tee_lets_through_what_is_meant_for_the_run(error):
    failing, good = Recorder("train_step", error), Recorder()
    with pytest.raises(type(error)):
        play(TeeReporter(failing, good))
    assert "close" not in failing.calls


def test_tee_hands_the_error_of_a_transfer_to_everyone():
    class Sees(Recorder):
        @contextmanager
        def transfer(self, description, unit):
            try:
                yield lambda done, total: None
            except OSError as error:
                self.calls.append(str(error))
                raise

    reporters = [Sees(), Sees()]
    with pytest.raises(OSError, match="cut"), TeeReporter(*reporters).transfer("x", "bytes"):
        raise OSError("cut")
    assert [reporter.calls for reporter in reporters] == [["cut"], ["cut"]]


def test_null_reporter_hears_everything_and_says_nothing(capfd):
    play(NullReporter())
    assert capfd.readouterr() == ("", "")


def test_numbers():
    assert [duration(x) for x in (0, 59.6, 3723, math.nan, -1)] == ["0:00", "1:00", "1:02:03", "?", "0:00"]
    assert [size(x) for x in (12, 1500, 170_498_071, 2.5e9)] == ["12 bytes", "1.5 kB", "170.5 MB", "2.5 GB"]
    assert [loss(x) for x in (2.30259, 12345.6, math.nan)] == ["2.3026", "1.235e+04", "nan"]
    assert [seconds(x) for x in (0.126, 999.5, 12345.6)] == ["0.13", "999.50", "12346"]


def test_speed_counts_from_the_first_step_told():
    phase = Phase("training", "steps", since=0.0)
    phase.advance(100, 200, now=60.0)  # resumed at step 100, after a minute of compilation
    assert (phase.speed(60.0), phase.facts(60.0)) == (None, ["100/200"])
    phase.advance(110, 200, now=65.0)
    assert (phase.speed(65.0), phase.left(65.0)) == (2.0, 45.0)
