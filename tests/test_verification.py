"""`fastcifar verify`: a line for each thing and each fault, status 0 or 2, and never a traceback."""

import dataclasses
import errno
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from fastcifar import convert_arrays, fit, fit_seeds, open_store, verification
from fastcifar.commands import main
from fastcifar.data import archive, cifar
from fastcifar.data.archive import ArchiveSpec
from fastcifar.data.datasets import DATASETS
from fastcifar.data.download import file_sha256
from fastcifar.errors import DataError
from fastcifar.verification import Finding, verify
from tests.cifar_files import tiny_cifar10, tiny_members, write_archive
from tests.faults.tiny_runs import config, prepare


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("FASTCIFAR_HOME", str(tmp_path / "home"))
    monkeypatch.chdir(tmp_path)
    return tmp_path / "home"


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a run, `run`, and two runs of different seeds, `seeds`."""
    folder = tmp_path_factory.mktemp("verified")
    with pytest.MonkeyPatch.context() as patch:
        prepare(patch, folder)
        fit(config())
        fit_seeds(config("seeds", epochs=1), (0, 1))
    return folder


def said(*paths: Path | str, capfd: pytest.CaptureFixture[str]) -> tuple[int, list[str]]:
    """What the command says, and its exit status: one printable line for each."""
    capfd.readouterr()
    status = main(["verify", *map(str, paths)])
    out, err = capfd.readouterr()
    assert err == ""
    assert status in (0, 2)
    lines = out.splitlines()
    assert all(line.isprintable() for line in lines)
    assert (status == 0) == all(": sound: " in line for line in lines)
    return status, lines


def store(path: Path) -> Path:
    pixels = np.random.default_rng(0).integers(0, 256, (30, 4, 5, 3), np.uint8)
    return convert_arrays(path, pixels, np.arange(30) % 3, splits={"train": slice(0, 20), "test": slice(20, 30)}).path


def flip(path: Path, at: int = -3) -> None:
    content = bytearray(path.read_bytes())
    content[at] ^= 8
    path.write_bytes(content)


def problems(path: Path) -> tuple[str, ...]:
    (found,) = verify(path)
    return found.problems


# --- stores --------------------------------------------------------------------------------------------------------


def test_a_sound_store_is_said_in_words(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    path = store(tmp_path / "mine")
    assert list(verify(path)) == [Finding(path=path, what="a store: mine, 30 images of 4 x 5, RGB", problems=())]
    assert said(path, capfd=capfd) == (0, [f"{path}: sound: a store: mine, 30 images of 4 x 5, RGB"])


@pytest.mark.parametrize(
    ("fault", "problem"),
    [
        (lambda path: flip(path / "images.npy"), "images.npy: bytes 0 to 1928 do not have their checksum"),
        (lambda path: flip(path / "labels.npy"), "labels.npy: bytes 0 to 4194304 do not have their checksum"),
        (lambda path: flip(path / "images.npy", 20), "images.npy: its header is not the one that was written"),
        (lambda path: (path / "images.npy").unlink(), "images.npy: No such file or directory"),
        (lambda path: os.truncate(path / "labels.npy", 200), "labels.npy: it has 200 bytes instead of 368"),
        (
            lambda path: swap(path / "manifest.json", '"mine"', '"mime"'),
            "manifest.json: its digest does not fit its content",
        ),
        (lambda path: os.truncate(path / "manifest.json", 99), "manifest.json: is not JSON"),
        (lambda path: (path / "manifest.json").write_text("{}"), "is not a store: its manifest.json is not one of"),
    ],
)
def test_a_damaged_store_is_said_by_file(
    tmp_path: Path, fault: Callable[[Path], object], problem: str, capfd: pytest.CaptureFixture[str]
) -> None:
    path = store(tmp_path / "mine")
    fault(path)
    (found,) = problems(path)
    assert found.startswith(problem)
    assert "delete" not in found
    assert said(path, capfd=capfd) == (2, [f"{path}: WRONG: {found}"])


def test_each_damaged_part_of_a_store_is_said(tmp_path: Path) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (1200, 64, 64, 3), np.uint8)
    path = convert_arrays(tmp_path / "large", pixels, np.zeros(1200, int)).path
    flip(path / "images.npy", 100_000)
    flip(path / "images.npy")
    assert problems(path) == (
        "images.npy: bytes 0 to 4194304 do not have their checksum",
        "images.npy: bytes 12582912 to 14745728 do not have their checksum",
    )


# --- runs ----------------------------------------------------------------------------------------------------------


@pytest.fixture
def run(trained: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(trained / "run", tmp_path / "run"))


def test_a_sound_run_is_said_in_words(run: Path, capfd: pytest.CaptureFixture[str]) -> None:
    assert said(run, capfd=capfd) == (0, [f"{run}: sound: a run: tiny on data, recipe fast, saved after step 6"])
    for each in ("00000003", "00000006"):
        assert said(run / "checkpoints" / each, capfd=capfd)[1] == [
            f"{run / 'checkpoints' / each}: sound: a checkpoint"
        ]


@pytest.mark.parametrize(
    ("fault", "problem"),
    [
        (lambda run: flip(run / "checkpoints/00000003/model.safetensors"), "checkpoints/00000003: model.safetensors "),
        (lambda run: flip(run / "checkpoints/00000006/manifest.json", 60), "checkpoints/00000006: manifest.json "),
        (lambda run: (run / "checkpoints/00000006/training.safetensors").unlink(), "checkpoints/00000006: training"),
        (
            lambda run: (run / "checkpoints/00000006/manifest.json").unlink(),
            "checkpoints/00000006: manifest.json cannot",
        ),
        (lambda run: shutil.rmtree(run / "checkpoints"), "holds no checkpoint: there is nothing to go on from"),
        (lambda run: os.truncate(run / "config.json", 50), "config.json is damaged: "),
        (lambda run: (run / "config.json").write_text("[" * 9000), "config.json is damaged: it is nested too deeply"),
        (lambda run: swap(run / "config.json", '"seed": 0', '"seed": 1'), "checkpoints/00000006 is of other options"),
        (lambda run: (run / "environment.json").unlink(), "environment.json: No such file or directory"),
        (lambda run: os.truncate(run / "metrics.jsonl", 80), "metrics.jsonl: is not the JSON that was written"),
    ],
)
def test_a_damaged_run_is_said_by_file(
    run: Path, fault: Callable[[Path], object], problem: str, capfd: pytest.CaptureFixture[str]
) -> None:
    fault(run)
    (found,) = problems(run)
    assert found.startswith(problem)
    assert said(run, capfd=capfd) == (2, [f"{run}: WRONG: {found}"])


def swap(path: Path, old: str, new: str) -> None:
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new))


def test_a_run_without_a_sound_checkpoint_says_each_and_that(run: Path) -> None:
    for each in ("00000003", "00000006"):
        flip(run / "checkpoints" / each / "model.safetensors")
    assert problems(run) == (
        "checkpoints/00000003: model.safetensors does not have its digest",
        "checkpoints/00000006: model.safetensors does not have its digest",
        "holds no sound checkpoint: there is nothing to go on from",
    )


def test_a_checkpoint_of_a_newer_format_is_said_once(run: Path) -> None:
    from fastcifar import checkpoint

    path = run / "checkpoints/00000006"
    manifest = json.loads((path / "manifest.json").read_bytes()) | {"version": 9}
    (path / "manifest.json").write_text(json.dumps(manifest | {"digest": checkpoint._digest(manifest)}))
    expected = "has format version 9, this fastcifar reads 1: update fastcifar"
    assert problems(path) == (expected,)
    assert problems(run) == (f"checkpoints/00000006: {expected}",)


def test_several_runs_are_said_one_by_one(trained: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    seeds = Path(shutil.copytree(trained / "seeds", tmp_path / "seeds"))
    status, lines = said(seeds, capfd=capfd)
    assert status == 0
    assert lines == [
        f"{seeds}: sound: several runs: 2 begun",
        *(
            f"{seeds / name}: sound: a run: tiny on data, recipe fast, saved after step 3"
            for name in ("seed-0", "seed-1")
        ),
    ]
    flip(seeds / "seed-1/checkpoints/00000003/model.safetensors")
    status, lines = said(seeds, capfd=capfd)
    assert status == 2
    assert lines[2] == f"{seeds}/seed-1: WRONG: checkpoints/00000003: model.safetensors does not have its digest"
    shutil.rmtree(seeds / "seed-0")
    assert next(verify(seeds)).problems == ("seed-0: is done, as seeds.json says, but not there",)
    (seeds / "seeds.json").write_text('{"runs": [1, {"state": "done"}, {"state": "done", "folder": [2]}]}')
    assert len(next(verify(seeds)).problems) == 2
    (seeds / "seeds.json").write_text("[]")
    assert next(verify(seeds)).problems == ("seeds.json: is not the JSON that was written",)


def test_a_folder_of_runs_is_said_run_by_run(trained: Path, tmp_path: Path) -> None:
    for name in ("b", "a"):
        shutil.copytree(trained / "run", tmp_path / "runs" / name)
    (tmp_path / "runs" / "notes").mkdir()
    found = list(verification.verify(tmp_path / "runs"))
    assert [finding.path.name for finding in found] == ["a", "b"]
    assert not any(finding.problems for finding in found)


def test_a_folder_of_stores_or_checkpoints_is_said_one_by_one(trained: Path, tmp_path: Path) -> None:
    mine, other = store(tmp_path / "stores" / "mine"), store(tmp_path / "stores" / "other")
    flip(other / "images.npy")
    assert [(found.path, len(found.problems)) for found in verify(mine.parent)] == [(mine, 0), (other, 1)]
    folder = trained / "run" / "checkpoints"
    found = list(verify(folder))
    assert [(one.path, one.what, one.problems) for one in found] == [
        (path, "a checkpoint", ()) for path in sorted(folder.iterdir())
    ]
    assert found
    copied = shutil.copytree(folder, tmp_path / "checkpoints")
    (copied / found[0].path.name / "manifest.json").unlink()
    lost, *others = verify(copied)
    assert lost.problems == ("manifest.json cannot be read (FileNotFoundError)",)
    assert len(others) == len(found) - 1


def test_what_lies_beside_a_homes_folders_hides_none_of_them(tmp_path: Path) -> None:
    own, kept = store(tmp_path / "mine"), store(tmp_path / "stores" / "cifar10-x")
    flip(kept / "images.npy")
    (tmp_path / "downloads").mkdir()
    (tmp_path / "downloads" / "cifar-10-python.tar.gz").write_bytes(b"junk")
    found = {finding.path: len(finding.problems) for finding in verify(tmp_path)}
    assert found == {own: 0, kept: 1, tmp_path / "downloads" / "cifar-10-python.tar.gz": 1}


def test_an_archive_hides_nothing_beside_it(tmp_path: Path) -> None:
    damaged = store(tmp_path / "pets")
    flip(damaged / "images.npy")
    first, second = (tiny_cifar10(tmp_path / name, per_file=5) for name in ("a.tar.gz", "cifar-10-python.tar.gz"))
    unpacked = tiny_cifar10(tmp_path / "cifar-10-batches-py", per_file=5)
    (tmp_path / "notes.txt").write_text("")
    assert [finding.path for finding in verify(tmp_path)] == sorted([damaged, first, second, unpacked])
    for name, content in tiny_members(5).items():
        (tmp_path / name).write_bytes(content)
    assert [finding.path for finding in verify(tmp_path)] == [tmp_path, *sorted([damaged, first, second, unpacked])]
    (tmp_path / "only").mkdir()
    only = tiny_cifar10(tmp_path / "only" / "cifar-10-python.tar.gz", per_file=5)
    assert [finding.path for finding in verify(tmp_path / "only")] == [only]


def test_an_ablations_runs_lie_deeper(trained: Path, tmp_path: Path) -> None:
    shutil.copytree(trained / "run", tmp_path / "a" / "0-base" / "seed-0")
    runs = [{"name": "base, seed 0", "folder": "0-base/seed-0", "state": "done"}]
    (tmp_path / "a/ablation.json").write_text(json.dumps({"seeds": [0], "runs": runs}))
    shutil.copy(trained / "run/config.json", tmp_path / "a/config.json")
    several, one = verify(tmp_path / "a")
    assert (several.what, several.problems) == ("several runs: 1 begun", ())
    assert (one.path, one.problems) == (tmp_path / "a/0-base/seed-0", ())


# --- archives ------------------------------------------------------------------------------------------------------


@pytest.fixture
def published(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A tiny archive that counts as the published one, and so do the files in it."""
    import hashlib

    path = tiny_cifar10(tmp_path / "cifar-10-python.tar.gz", per_file=5)
    sums = {name: hashlib.md5(content).hexdigest() for name, content in tiny_members(5).items()}
    spec: ArchiveSpec = dataclasses.replace(
        archive.CIFAR10, sha256=file_sha256(path), size=path.stat().st_size, member_md5=sums
    )
    form = dataclasses.replace(cifar.CIFAR[0].forms[0], spec=spec)
    changed = dataclasses.replace(cifar.CIFAR[0], forms=(form, *cifar.CIFAR[0].forms[1:]))
    monkeypatch.setattr(cifar, "CIFAR", (changed, *cifar.CIFAR[1:]))
    monkeypatch.setitem(DATASETS, "cifar10", changed)
    return path


def test_the_published_archive_and_its_folder_are_sound(published: Path, capfd: pytest.CaptureFixture[str]) -> None:
    folder = tiny_cifar10(published.parent / "cifar-10-batches-py", per_file=5)
    status, lines = said(published, folder, capfd=capfd)
    assert (status, lines) == (0, [f"{path}: sound: cifar-10-python.tar.gz: 30 images" for path in (published, folder)])


def test_another_archive_is_said_to_be_another(published: Path, capfd: pytest.CaptureFixture[str]) -> None:
    write_archive(published, tiny_members(per_file=4, seed=1))
    (found,) = problems(published)
    assert found.startswith("is not the published cifar-10-python.tar.gz: its SHA-256 is ")
    assert "allow-unverified" not in found
    assert said(published, capfd=capfd)[0] == 2


def test_a_damaged_archive_says_both(published: Path) -> None:
    os.truncate(published, published.stat().st_size - 100)
    first, second = problems(published)
    assert first.startswith("is not the published")
    assert second == "is cut short: its gzip data has no end"


def test_a_damaged_folder_names_the_file(published: Path) -> None:
    folder = tiny_cifar10(published.parent / "cifar-10-batches-py", per_file=5)
    flip(folder / "data_batch_3", 1000)
    (found,) = problems(folder)
    assert found.startswith("data_batch_3: is not the published file: its MD5 is ")
    (folder / "data_batch_3").write_bytes(b"junk")
    assert [line.split(":")[:2] for line in problems(folder)] == [
        ["data_batch_3", " is not the published file"],
        ["data_batch_3", " is not a pickle of protocol 2 to 5 (byte 0 of its pickle)"],
    ]
    (folder / "test_batch").unlink()
    assert problems(folder) == (f"lacks test_batch; expected {', '.join(archive.CIFAR10.members)}",)


# --- the home ------------------------------------------------------------------------------------------------------


def test_a_home_with_nothing_in_it_is_no_fault(home: Path, capfd: pytest.CaptureFixture[str]) -> None:
    assert main(["verify"]) == 0
    assert capfd.readouterr().out == f"{home}: holds no downloads and no stores yet\n"
    assert not home.exists()
    (home / "stores").mkdir(parents=True)
    assert said(capfd=capfd) == (0, [])


def test_all_that_a_home_holds_is_said(home: Path, published: Path, capfd: pytest.CaptureFixture[str]) -> None:
    open_store("cifar10", data=published)
    kept = next((home / "stores").glob("cifar10-*"))
    shutil.copytree(kept, kept.with_name(f"{kept.name}.damaged-0a1b2c3d"))
    shutil.copytree(kept, home / "stores" / ".tmp-1234")
    downloads = home / "downloads"
    downloads.mkdir()
    shutil.copy(published, downloads / published.name)
    (downloads / f"{published.name}.wrong-01234567").write_bytes(b"x")
    (downloads / "cifar-100-python.tar.gz.part").write_bytes(b"x")
    (downloads / "cifar-100-python.tar.gz.part.json").write_text("{}")
    (downloads / "cifar-100-binary.tar.gz").write_bytes(b"<html>")
    (downloads / ".cifar-10-python.tar.gz.lock").write_bytes(b"")
    (home / "stores" / "half").mkdir()
    status, lines = said(capfd=capfd)
    assert status == 2
    aside = "WRONG: was set aside as damaged, and is of no use: delete it"
    assert lines == [
        f"{kept}: sound: a store: cifar10, 30 images of 32 x 32, RGB",
        f"{kept}.damaged-0a1b2c3d: {aside}",
        f"{home}/stores/half: WRONG: is not a store: there is no manifest.json in it",
        f"{downloads}/cifar-10-python.tar.gz: sound: cifar-10-python.tar.gz: 30 images",
        f"{downloads}/cifar-10-python.tar.gz.wrong-01234567: {aside}",
        f"{downloads}/cifar-100-binary.tar.gz: WRONG: is no intact archive of CIFAR: delete it",
        f"{downloads}/cifar-100-python.tar.gz.part: sound: a download that was interrupted: it goes on when it is "
        "wanted",
    ]
    assert said(home, capfd=capfd) == (status, lines)


# --- nonsense ------------------------------------------------------------------------------------------------------


def test_nonsense_is_one_line_each(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "text").write_text("just text")
    (tmp_path / "empty").mkdir()
    (tmp_path / "a\nb\x1b[2J").mkdir()
    os.symlink("loop", tmp_path / "loop")
    os.symlink("nowhere", tmp_path / "dangling")
    os.mkfifo(tmp_path / "fifo")
    nonsense = [
        "text",
        "empty",
        "a\nb\x1b[2J",
        "loop",
        "dangling",
        "fifo",
        "nowhere",
        "x" * 5000,
        "text/x",
        "/dev/null",
    ]
    status, lines = said(*nonsense, capfd=capfd)
    assert status == 2
    assert len(lines) == len(nonsense)
    assert lines[0] == "text: is no store, run, checkpoint, or archive or folder of CIFAR, and no home of them"
    assert lines[2].startswith("a?b?[2J: is no store")
    assert lines[6] == "nowhere: does not exist"
    assert lines[7].startswith("xxxx")
    assert lines[7].endswith(": cannot be read: File name too long")


def test_the_rest_is_checked_after_a_fault(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    sound = store(tmp_path / "mine")
    status, lines = said("nowhere", sound, "x" * 300, sound, capfd=capfd)
    assert status == 2
    assert [": sound: " in line for line in lines] == [False, True, False, True]


def test_a_disk_that_cannot_be_read_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = store(tmp_path / "mine")

    def fail(*arguments: object) -> None:
        raise OSError(errno.EIO, "Input/output error", str(path / "images.npy"))

    monkeypatch.setattr(verification, "_holds", fail)
    with pytest.raises(DataError, match=r"images\.npy: cannot be read: Input/output error"):
        list(verify(path))


@pytest.mark.parametrize("encoding", ["ascii", "cp1252"])
def test_a_name_that_the_terminal_lacks_is_no_fault(tmp_path: Path, encoding: str) -> None:
    path = store(tmp_path / "名 é")
    environment = os.environ | {"PYTHONIOENCODING": encoding}
    found = subprocess.run(
        [sys.executable, "-m", "fastcifar", "verify", path],
        env=environment,
        capture_output=True,
        check=False,
        timeout=100,
    )
    assert (found.returncode, found.stderr) == (0, b"")
    assert b": sound: a store: ? " in found.stdout


def test_a_closed_pipe_is_no_traceback(tmp_path: Path) -> None:
    path = store(tmp_path / "mine")
    for end in ("| head -0", ">&-"):
        command = f"{sys.executable} -m fastcifar verify {path} {path} {end}; echo ${{PIPESTATUS[0]}} >&2"
        found = subprocess.run(["bash", "-c", command], capture_output=True, check=False, timeout=100, text=True)
        assert found.stdout == ""
        assert found.stderr in ("0\n", "141\n", "-13\n")


def test_nothing_is_written(tmp_path: Path, run: Path) -> None:
    store(tmp_path / "mine")
    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")}
    for path in (run, tmp_path / "mine"):
        assert not any(found.problems for found in verify(path))
    assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")} == before


def test_torch_is_not_loaded_for_a_store(tmp_path: Path) -> None:
    path = store(tmp_path / "mine")
    code = f"import sys; from fastcifar.commands import main; main(['verify', {str(path)!r}]); "
    code += "assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, timeout=100)
