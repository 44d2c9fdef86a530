"""Odd places and odd terminals: it works there, or is one clear line."""

import errno
import json
import os
import re
import select
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import platformdirs
import pytest

from fastcifar import checkpoint
from fastcifar.commands import main
from fastcifar.data.home import find_home
from fastcifar.data.store import ArrayStore
from tests.cifar_files import tiny_cifar10
from tests.effort import effort
from tests.faults import tiny_runs
from tests.faults.forked import Forked
from tests.faults.steps import Failing, steps

ARCHIVE = Path("tiny.tar.gz")
ODD = {
    "spaces": "with  spaces ",
    "unicode": "Ünï \N{CJK UNIFIED IDEOGRAPH-6F22}\N{GRINNING FACE} e\u0301",
    "newline": "new\nline\x1b[31m",
    "dash": "-dash",
    "trailing": "trailing/",
    "bytes": os.fsdecode(b"\xff\xfe x"),
    "longest": "n" * 255,
    "quotes": 'it\'s "$HOME" & <b>[red]',
}
odd = pytest.mark.parametrize("name", ODD.values(), ids=ODD)


@pytest.fixture(autouse=True)
def _place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    tiny_runs.prepare(monkeypatch, tmp_path)
    tiny_cifar10(ARCHIVE, per_file=12)
    monkeypatch.setenv("FASTCIFAR_HOME", "home")
    monkeypatch.setenv("COLUMNS", "100")
    with tiny_runs.one_thread():
        yield


def train(**options: str | Path) -> list[str]:
    given: dict[str, str | Path] = {"arch": "tiny", "epochs": "1", "batch-size": "16", "device": "cpu", "split": "full"}
    given |= {"dataset": "cifar10", "data": ARCHIVE, "out": "run"} | options
    return ["train", "--allow-unverified", *(f"--{name}={value}" for name, value in given.items() if str(value))]


def assert_whole(run: Path) -> None:
    kinds = [json.loads(line)["kind"] for line in (run / "metrics.jsonl").read_bytes().splitlines()]
    assert kinds == ["run", "epoch", "test"]
    assert checkpoint.load_newest(run / "checkpoints").step == 3
    assert (run / "report.html").read_text().rstrip().endswith("</html>")
    assert not list(run.rglob(".tmp-*"))


def one_line(capfd: pytest.CaptureFixture[str]) -> str:
    error = capfd.readouterr().err
    assert error.startswith("fastcifar: ")
    assert error.count("\n") == 1
    assert error[:-1].isprintable()
    return error


@odd
def test_a_home_may_have_any_name(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FASTCIFAR_HOME", name)
    assert main(train()) == 0
    assert_whole(Path("run"))
    [store] = Path(name, "stores").glob("cifar10-*")
    assert len(ArrayStore(store, verify=True)) == 72
    assert main(["evaluate", "run", "--device", "cpu"]) == 0
    assert main(["verify", f"./{name}", "run"]) == 0


@odd
def test_a_run_and_its_data_may_have_any_name(name: str, capfd: pytest.CaptureFixture[str]) -> None:
    run, data = Path("runs", name), Path("data-of", name)
    data.mkdir(parents=True)
    ARCHIVE.rename(data / "cifar-10-python.tar.gz")
    assert main(train(out=f"runs/{name}", data=data)) == 0, capfd.readouterr()
    assert_whole(run)
    assert main(["train", f"--resume={run}"]) == 0
    assert main(["evaluate", str(run), "--device", "cpu"]) == 0
    assert main(train(out=run, data=data)) == 2
    assert "is not empty: resume it with --resume" in capfd.readouterr().err
    assert_whole(run)


@odd
def test_a_store_may_have_any_name(name: str, capfd: pytest.CaptureFixture[str]) -> None:
    np.savez("mine.npz", x=np.zeros((6, 20, 20, 3), np.uint8), y=[0, 1, 2] * 2)
    out = Path("stores", name)
    assert main(["convert", "mine.npz", f"stores/{name}"]) == 0
    assert len(ArrayStore(out, verify=True)) == 6
    assert main(["verify", str(out)]) == 0
    capfd.readouterr()
    assert main(["convert", "mine.npz", f"stores/{name}"]) == 2
    assert "exists already" in one_line(capfd)


def test_a_name_that_looks_like_an_option_needs_two_dashes_or_a_folder(capfd: pytest.CaptureFixture[str]) -> None:
    np.savez("mine.npz", x=np.zeros((6, 20, 20, 3), np.uint8), y=[0, 1, 2] * 2)
    assert main(["convert", "mine.npz", "-dash"]) == 2
    one_line(capfd)
    assert main(["convert", "mine.npz", "./-dash"]) == 0
    assert main(train(out="-dash-run")) == 0
    assert_whole(Path("-dash-run"))


TOO_LONG = {"a name": "n" * 256, "a path": "/".join(["n" * 200] * 30)}


@pytest.mark.parametrize("name", TOO_LONG.values(), ids=TOO_LONG)
def test_what_is_too_long_is_said(
    name: str, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    before = sorted(Path().iterdir())
    np.savez("mine.npz", x=np.zeros((6, 20, 20, 3), np.uint8), y=[0, 1, 2] * 2)
    for arguments in (train(out=name), train(data=name), ["convert", "mine.npz", name], ["convert", name, "out"]):
        assert main(arguments) == 2, arguments[0]
        assert "name too long" in one_line(capfd).lower()
    for arguments in (["train", f"--resume={name}"], ["evaluate", name], ["verify", name]):
        assert main(arguments) == 2, arguments[0]
        assert "too long" in "".join(capfd.readouterr()).lower()
    assert {path.name for path in Path().iterdir()} - {path.name for path in before} <= {"mine.npz", "home"}
    monkeypatch.setattr(tempfile, "tempdir", str(Path("temporary").absolute()))
    monkeypatch.setenv("FASTCIFAR_HOME", name)
    assert main(train()) == 0
    assert_whole(Path("run"))
    assert "cannot be made" in caplog.text
    assert list(Path("temporary").glob("fastcifar*/stores/cifar10-*"))


def test_a_file_in_place_of_the_home_is_said_and_left(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    Path("file").write_text("mine")
    monkeypatch.setattr(tempfile, "tempdir", str(Path("temporary").absolute()))
    for home in ("file", "file/inside"):
        caplog.clear()
        monkeypatch.setenv("FASTCIFAR_HOME", home)
        assert find_home().parent == Path("temporary").absolute()
        assert caplog.text.count("cannot be made") == 1
    assert Path("file").read_text() == "mine"


def test_without_home_or_a_cache_folder_that_can_be_made(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    for variable in ("FASTCIFAR_HOME", "HOME", "XDG_CACHE_HOME"):
        monkeypatch.delenv(variable, raising=False)
    monkeypatch.setattr(platformdirs, "user_cache_path", lambda name: Path("cache", name))
    assert find_home() == Path("cache/fastcifar")
    assert caplog.text == ""
    Path("cache/fastcifar").rmdir()
    monkeypatch.setattr(tempfile, "tempdir", str(Path("temporary").absolute()))
    with steps(Path("cache"), Failing(1, errno.EROFS, lasting=True, kinds=("mkdir",))):
        assert find_home().parent == Path("temporary").absolute()
    assert "Read-only file system" in caplog.text
    assert "set FASTCIFAR_HOME to a folder of yours" in caplog.text


@pytest.mark.parametrize("code", [errno.EROFS, errno.EACCES])
def test_a_home_that_can_only_be_read(code: int, capfd: pytest.CaptureFixture[str]) -> None:
    kinds = ("open", "mkdir", "write", "rename", "remove")
    Path("home").mkdir()
    with steps(Path("home"), Failing(1, code, lasting=True, kinds=kinds)):
        assert main(train()) == 2
    assert os.strerror(code) in one_line(capfd)
    assert not Path("run").exists()
    assert main(train()) == 0
    Path("archive").mkdir()
    with steps(Path("home"), Failing(1, code, lasting=True, kinds=kinds)):  # what is there is used
        assert main(train(out="again")) == 0
    assert_whole(Path("again"))


def test_a_process_without_any_home() -> None:
    environment = {name: value for name, value in os.environ.items() if name not in ("HOME", "FASTCIFAR_HOME")}
    code = "from fastcifar.data.home import find_home; print(find_home())"
    environment |= {"XDG_CACHE_HOME": str(Path("cache").absolute()), "PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    assert (done.stdout, done.stderr) == (f"{Path('cache').absolute() / 'fastcifar'}\n", "")


REAL = {"arch": "small", "dataset": "data", "data": "", "split": "report", "batch-size": "16"}


OUTPUTS: dict[str, tuple[dict[str, str], str]] = {
    "full": ({"NO_COLOR": "1"}, ">/dev/full"),
    "ascii": ({"PYTHONIOENCODING": "ascii", "LANG": "C", "LC_ALL": "C", "PYTHONUTF8": "0"}, ""),
    "closed": ({"PYTHONIOENCODING": "cp1252", "TERM": "dumb"}, "2>&- >&-"),
}


@pytest.mark.parametrize("output", list(OUTPUTS)[: effort(1)])  # each takes ten seconds, most of them imports
def test_a_real_run_goes_on_whatever_becomes_of_its_output(output: str) -> None:
    variables, closed = OUTPUTS[output]
    run = "Ü \N{CJK UNIFIED IDEOGRAPH-6F22}"
    arguments = [argument for argument in train(**REAL, out=run) if argument != "--allow-unverified"]
    command = f'"$0" -m fastcifar "$@" {closed}'
    whole = ["bash", "-c", command, sys.executable, *arguments]
    environment = os.environ | {"OMP_NUM_THREADS": "1"} | variables
    done = subprocess.run(whole, env=environment, capture_output=True, check=False)
    assert done.returncode == 0, done.stderr
    assert_whole(Path(run))
    assert done.stderr.count(b"\n") == (closed == ">/dev/full"), done.stderr
    if not closed:
        assert done.stdout.isascii()
        assert b"epoch 1/1: train loss" in done.stdout


def test_a_result_that_cannot_be_shown_is_said() -> None:
    for arguments in (["--help"], ["--version"], ["verify", "data"]):
        with open("/dev/full", "w") as full:
            command = [sys.executable, "-m", "fastcifar", *arguments]
            done = subprocess.run(command, stdout=full, stderr=subprocess.PIPE, text=True, check=False)
        assert done.returncode == 2
        assert done.stderr == "fastcifar: standard output cannot be written: No space left on device\n"


@pytest.mark.parametrize(("term", "color"), [("xterm-256color", True), ("xterm-256color", False), ("dumb", True)])
def test_a_run_on_a_narrow_terminal(term: str, color: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TERM", term)
    monkeypatch.setenv("COLUMNS", "20")
    monkeypatch.setenv("LINES", "5")
    if not color:
        monkeypatch.setenv("NO_COLOR", "1")
    running = Forked(*train(), on_terminal=True)
    shown = b""
    while select.select([running.terminal], [], [], 30)[0]:
        try:
            shown += os.read(running.terminal, 65536)
        except OSError:  # how Linux says that the other end is closed
            break
    os.close(running.terminal)
    assert running.wait() == 0, shown
    assert_whole(Path("run"))
    text = shown.decode()
    assert bool(re.search(r"\x1b\[[0-9;]*3[0-9]", text)) == (color and term != "dumb")
    plain = re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", text)
    if term != "dumb":
        assert max(len(line) for line in re.split(r"[\r\n]+", plain)) <= 20
        assert text.rindex("\x1b[?25h") > text.rindex("\x1b[?25l")  # the cursor is back
