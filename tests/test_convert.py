"""`fastcifar convert` as a user meets it: what it says in a pipe and on a terminal, and how it stops."""

import inspect
import json
import os
import pty
import re
import select
import signal
import subprocess
import sys
import time
from dataclasses import MISSING, fields
from pathlib import Path

import numpy as np
import pytest

from fastcifar.commands import main
from fastcifar.commands.convert import ConvertOptions
from fastcifar.data.arrayfiles import file_content
from fastcifar.data.folders import folder_content
from fastcifar.data.store import ArrayStore
from tests.cifar_files import tiny_cifar10
from tests.image_trees import noise, write_image, write_tree
from tests.test_binary import both_forms, write
from tests.test_folders import helpers_of

COMMAND = [sys.executable, "-m", "fastcifar", "convert"]


@pytest.fixture(autouse=True)
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "100")
    return tmp_path


def convert(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([*COMMAND, *arguments], capture_output=True, text=True, timeout=60, check=False)


def test_a_folder_in_a_pipe_is_plain_lines(place: Path) -> None:
    write_tree(place / "pets", {"train/cat": 3, "train/dog": 2, "test/cat": 1}, size=(40, 30))
    for name in ("1.jpg", "2.jpg", "3.jpg", "new\nline.jpg"):
        (place / "pets" / "train" / "dog" / name).write_text("no image")
    done = convert("pets", "out", "--size", "32", "--broken", "skip")
    assert (done.returncode, done.stderr) == (0, "")
    assert "\x1b" not in done.stdout
    lines = done.stdout.splitlines()
    assert lines[0] == "pets: a folder: 10 images, 2 classes, train, test"
    assert lines[1] == "converting pets ..."
    assert re.fullmatch(r"converting pets: 6 images, 0:0\d", lines[2])
    store = ArrayStore("out", verify=True)
    expected = {
        "images": "6 of 32 x 32, RGB",
        "classes": "2: cat, dog",
        "splits": "train 5, test 1",
        "digest": store.digest,
        "train": "fastcifar train --dataset out --batch-size 5",
        "load": "Loader('out')",
    }
    for name, value in expected.items():
        assert f"  {name}: {value}" in lines
    assert any(re.fullmatch(r"  skipped: 4: train/dog/1\.jpg is no image .*; and 1 more", line) for line in lines)
    assert len(json.loads((place / "out" / "manifest.json").read_text())["source"]["skipped"]) == 4


def test_a_terminal_has_a_bar_and_a_panel(place: Path) -> None:
    write_tree(place / "pets", {"cat": 700}, size=(60, 60), end="jpg")
    ours, theirs = pty.openpty()
    environment = dict(os.environ, TERM="xterm-256color")
    process = subprocess.Popen(
        [*COMMAND, "pets", "out", "--size", "100", "--workers", "1"],
        stdin=theirs,
        stdout=theirs,
        stderr=theirs,
        env=environment,
    )
    os.close(theirs)
    shown = b""
    while True:
        if not select.select([ours], [], [], 30)[0]:
            break
        try:
            piece = os.read(ours, 65536)
        except OSError:  # how Linux says that the other end is closed
            break
        if not piece:
            break
        shown += piece
    os.close(ours)
    assert process.wait(timeout=30) == 0
    text = shown.decode()
    assert "\x1b[?25h" in text[text.rindex("\x1b[?25l") :]  # the cursor is back
    text = re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", text)
    assert re.search(r"\d+ of 700 images", text)
    assert "\N{BOX DRAWINGS HEAVY HORIZONTAL}" in text
    assert "images/s" in text
    assert "\N{BOX DRAWINGS LIGHT ARC DOWN AND RIGHT}\N{BOX DRAWINGS LIGHT HORIZONTAL} pets in out" in text
    assert "these nets take images of 17 to 32 pixels a side" in text


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "missing from fastcifar convert: SOURCE What to convert. (required) OUT Folder"),
        (["pets"], "missing from fastcifar convert: OUT Folder"),
        (["nowhere", "out"], "nowhere: does not exist"),
        (["pets", "pets"], "pets exists already: delete it first"),
        (["pets", "out", "--size", "big"], "size must be a side or HxW, in pixels from 1 to 16384, such as 32 or"),
        (["pets", "out", "--resize", "stretch"], "--resize must be one of crop, squash, got"),
        (["pets", "out", "--broken", "maybe"], "--broken must be one of refuse, skip, got 'maybe'"),
        (["pets", "out", "--workers", "0"], "workers must be a whole number at least 1, got 0"),
        (["pets", "out", "--workers", "many"], "--workers takes a whole number, got 'many'"),
        (["pets", "out", "--sizes", "3"], "perhaps you meant --size"),
        (["pets", "out", "--classes", "cat", "cow"], "classes: pets has no folder 'cow': there are cat, dog"),
        (["pets", "out", "--layout", "nhwc"], "--layout says nothing about pets, which is a folder"),
        (["pets", "out", "--allow-unverified"], "--allow-unverified says nothing about pets, which is a folder"),
        (["a.npz", "out", "--size", "32"], "--size says nothing about a.npz, which is a file of arrays"),
        (["a.npz", "out", "--classes", "a"], "labels run from 0 to 1, there are 1 classes"),
        (["c.tar.gz", "out", "--size", "32"], "--size says nothing about c.tar.gz, which is a CIFAR archive"),
        (["c.tar.gz", "out"], "is not the published cifar-10-python.tar.gz"),
        (["notes.txt", "out"], "notes.txt: is neither an .npz nor an .npy file"),
        (["x.npy", "out"], "x.npy holds images alone: give their labels with --labels FILE.npy"),
        (["store", "out"], "store is a store already: train and Loader open it as it is"),
        (["odd", "out"], "odd/a/?[31m.png: is empty; --broken skip leaves such images out"),
    ],
)
def test_a_wrong_option_is_one_line_and_status_2(
    place: Path, arguments: list[str], message: str, capfd: pytest.CaptureFixture[str]
) -> None:
    write_tree(place / "pets", {"cat": 1, "dog": 1})
    np.savez("a.npz", x=noise(8, 6)[None].repeat(2, 0), y=[0, 1])
    np.save("x.npy", noise(8, 6)[None])
    tiny_cifar10(place / "c.tar.gz")
    (place / "notes.txt").write_text("notes")
    (place / "store").mkdir()
    (place / "store" / "manifest.json").write_text("{}")
    (place / "odd" / "a").mkdir(parents=True)
    (place / "odd" / "a" / "\x1b[31m.png").write_text("")
    assert main(["convert", *arguments]) == 2
    error = capfd.readouterr().err
    assert error.startswith("fastcifar: ")
    assert error.count("\n") == 1
    assert message in error
    assert not (place / "out").exists()
    assert not list(place.glob(".tmp-*"))


def test_what_is_advised_can_be_done(place: Path, capfd: pytest.CaptureFixture[str]) -> None:
    images = np.random.default_rng(0).integers(0, 256, (3, 20, 20, 3), np.uint8)
    images[..., 1] = 7
    parts = {"test_images": images, "test_labels": np.zeros(3, np.int64), "classes": np.array(["a"])}
    np.savez("still.npz", images=images, labels=np.zeros(3, np.int64), **parts)
    np.savez("one.npz", images=images[:1], labels=np.zeros(1, np.int64), **parts)
    assert main(["convert", "still.npz", "still"]) == 0
    out = capfd.readouterr().out
    assert "fastcifar train --dataset still --batch-size 3 --change scaling=unit\n" in out
    assert """Loader('still', scaling="unit")""" in out
    assert main(["train", "--dataset", "still", "--arch", "small"]) == 2
    assert "channel 1 is the same in all training images: choose another, such as unit" in capfd.readouterr().err
    assert main(["convert", "one.npz", "one"]) == 0
    assert "needs at least two training images" in capfd.readouterr().out
    assert main(["train", "--dataset", "one", "--arch", "small", "--change", "scaling=raw"]) == 2
    assert "there is one training image, and BatchNorm needs two in a step" in capfd.readouterr().err


def test_arrays_and_cifar_are_recognised(place: Path, capfd: pytest.CaptureFixture[str]) -> None:
    images, labels = np.stack([noise(20, 20, 1, seed=k) for k in range(9)]), np.arange(9) % 3
    np.savez("mine.npz", x_train=images, y_train=labels, x_test=images[:2], y_test=labels[:2])
    np.save("x.npy", images)
    np.save("y.npy", labels)
    binary = write(place / "cifar", "cifar-10-batches-bin", both_forms("cifar10")[1], "folder")
    python = write(place / "python", "cifar-10-batches-py", both_forms("cifar10")[0], "archive")
    assert main(["convert", "mine.npz", "1"]) == 0
    assert "mine.npz: a file of arrays: 11 images, train, test" in capfd.readouterr().out
    assert main(["convert", "x.npy", "2", "--labels", "y.npy", "--classes", "a", "b", "c", "--name", "my own"]) == 0
    out = capfd.readouterr().out
    assert "my own in 2" in out
    assert "train: needs test images too" in out
    assert ArrayStore("2").classes == ("a", "b", "c")
    assert main(["convert", str(binary), "3", "--allow-unverified"]) == 0
    assert "an unverified copy" in capfd.readouterr().out
    assert main(["convert", str(python), "4", "--allow-unverified"]) == 0
    assert ArrayStore("3").digest == ArrayStore("4").digest


def test_the_defaults_are_those_of_the_functions() -> None:
    options = {field.name: field.default for field in fields(ConvertOptions) if field.default is not MISSING}
    for function in (folder_content, file_content):
        for name, parameter in inspect.signature(function).parameters.items():
            if parameter.default is not parameter.empty:
                assert (options[name] or None) == (parameter.default or None), name


def test_help_shows_examples_and_waits_for_nothing() -> None:
    code = (
        "import sys\nfrom fastcifar.commands import main\n"
        "try:\n main(['convert', '--help'])\nexcept SystemExit as end:\n assert end.code in (0, None)\n"
        "assert 'torch' not in sys.modules\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    for part in ("SOURCE OUT", "Examples:", "--size", "--allow-unverified"):
        assert part in done.stdout


@pytest.mark.parametrize(
    ("number", "status", "message"),
    [
        (signal.SIGINT, 130, "fastcifar: stopped by SIGINT before the store was made; nothing was left behind\n"),
        (signal.SIGTERM, 143, "fastcifar: stopped by SIGTERM before the store was made; nothing was left behind\n"),
        (signal.SIGHUP, 129, "fastcifar: stopped by SIGHUP before the store was made; nothing was left behind\n"),
    ],
)
def test_a_signal_leaves_nothing(place: Path, number: signal.Signals, status: int, message: str) -> None:
    write_tree(place / "pets", {"a": 600}, size=(60, 60), end="jpg")
    command = [*COMMAND, "pets", "out", "--size", "400", "--workers", "2"]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    deadline = time.monotonic() + 30
    while not (helpers := helpers_of(process.pid)) and time.monotonic() < deadline:
        time.sleep(0.05)
    process.send_signal(number)
    _, error = process.communicate(timeout=30)
    assert (process.returncode, error) == (status, message)
    assert helpers
    assert not [pid for pid in helpers if Path(f"/proc/{pid}").exists()]
    assert [path.name for path in place.iterdir()] == ["pets"]


def test_a_reader_that_has_gone_does_not_stop_it(place: Path) -> None:
    write_tree(place / "pets", {"a": 3})
    reading, writing = os.pipe()
    os.close(reading)
    done = subprocess.run(
        [*COMMAND, "pets", "out"], stdout=writing, stderr=subprocess.PIPE, text=True, check=False, timeout=60
    )
    os.close(writing)
    assert done.returncode == 0
    assert done.stderr.count("\n") == 1
    assert "all else goes on: BrokenPipeError" in done.stderr
    assert len(ArrayStore("out", verify=True)) == 3


@pytest.mark.parametrize("channels", [1, 3])
def test_the_nets_train_on_what_was_converted(place: Path, channels: int) -> None:
    from fastcifar import TrainConfig, fit

    write_tree(
        place / "pets", {"train/a": 20, "train/b": 20, "test/a": 4, "test/b": 4}, size=(20, 24), channels=channels
    )
    write_image(place / "pets" / "train" / "a" / "x.png", noise(50, 50, channels))
    assert main(["convert", "pets", "out", "--size", "20"]) == 0
    result = fit(TrainConfig(arch="small", dataset="out", epochs=1, batch_size=16, device="cpu"))
    assert result.test.samples == 8
    assert result.test.classes == ("a", "b")
