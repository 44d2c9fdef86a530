"""SIGKILL before every step that changes a file, and at random moments: the old or the new is there, whole."""

import itertools
import os
import random
import shutil
import signal
import time
from collections.abc import Callable, Generator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from fastcifar import checkpoint
from fastcifar.config import TrainConfig
from fastcifar.data.arrays import convert_arrays
from fastcifar.data.content import Content, SourceFile
from fastcifar.data.datasets import open_store
from fastcifar.data.store import ArrayStore
from fastcifar.data.writer import make_store
from fastcifar.engine import fit
from fastcifar.publish import publish_bytes, publish_folder
from fastcifar.reporter import JsonLinesReporter, RunSummary
from tests.cifar_files import tiny_cifar10
from tests.effort import effort
from tests.faults import tiny_runs
from tests.faults.children import end_of, start
from tests.faults.steps import Kind, kill_at, steps

pytestmark = pytest.mark.skipif(not os.path.isdir("/proc/self/fd"), reason="needs fork and /proc")

SUMMARY = RunSummary(title="t", choices=(), epochs=1, steps_per_epoch=1, evaluated="test", notices=())


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def killed_at_each_step(
    place: Path,
    *,
    before: Callable[[], object],
    work: Callable[[], object],
    check: Callable[[], object],
    after: Callable[[], object],
) -> int:
    """How many times `work` was killed in `place`, until it ended.

    Args:
        place: emptied each time.
        before: what was there before.
        work: what is killed, in a child.
        check: that what is there now is sound.
        after: that it can be done now.
    """
    for number in itertools.count(1):
        shutil.rmtree(place, ignore_errors=True)
        place.mkdir()
        before()

        def stepping(number: int = number) -> None:
            with steps(place, kill_at(number)):
                work()

        end = end_of(start(stepping))
        check()
        after()
        if end == "done":
            return number - 1
    raise AssertionError


def killed_at_random(work: Callable[[], object], *, seconds: float, seed: int) -> None:
    """Kill a child that does `work` after 0 to `seconds` seconds."""
    child = start(work)
    time.sleep(random.Random(seed).uniform(0, seconds))
    os.kill(child, signal.SIGKILL)
    assert end_of(child) == "killed"


def nothing() -> None:
    pass


def test_bytes_are_the_old_or_the_new(tmp_path: Path) -> None:
    place, old, new = tmp_path / "place", b"old" * 1000, b"new" * 2000

    def after() -> None:
        publish_bytes(place / "a", new)
        assert (place / "a").read_bytes() == new
        assert names(place) == ["a"]

    seen = set()
    kills = killed_at_each_step(
        place,
        before=lambda: publish_bytes(place / "a", old),
        work=lambda: publish_bytes(place / "a", new),
        check=lambda: seen.add((place / "a").read_bytes()),
        after=after,
    )
    assert seen == {old, new}
    assert kills == 8  # make, open, write twice, flush, close, rename, flush the folder


def test_a_folder_is_whole_or_absent(tmp_path: Path) -> None:
    place = tmp_path / "place"

    def work() -> None:
        with publish_folder(place / "done") as folder:
            (folder / "sub").mkdir()
            (folder / "sub" / "file").write_bytes(b"content")
            (folder / "other").write_bytes(b"more")

    def check() -> None:
        if (place / "done").exists():
            assert (place / "done" / "sub" / "file").read_bytes() == b"content"
            assert (place / "done" / "other").read_bytes() == b"more"

    def after() -> None:
        work()
        check()
        assert names(place) == ["done"]

    assert killed_at_each_step(place, before=nothing, work=work, check=check, after=after) >= 14


def save(folder: Path, step: int, with_: Callable[..., object] = checkpoint.save) -> None:
    with_(folder, step=step, model=tensors(step), training={"sum": torch.tensor(step)}, state={"step": step})


def save_in_the_background(folder: Path, step: int) -> None:
    saver = checkpoint.Saver(folder)
    save(folder, step, lambda _, **content: saver.save(**content))
    saver.wait()
    saver.close()


def tensors(step: int) -> dict[str, torch.Tensor]:
    return {"filters": torch.randn(3, 5, generator=torch.Generator().manual_seed(step))}


def newest(folder: Path) -> int:
    """The step of the newest checkpoint, which is as it was saved."""
    found = checkpoint.load_newest(folder)
    assert tiny_runs.equal(found.model, tensors(found.step))
    assert found.state == {"step": found.step}
    assert found.training["sum"] == found.step
    return found.step


@pytest.mark.parametrize("way", [save, save_in_the_background])
def test_the_newest_checkpoint_is_the_one_before_or_this_one(tmp_path: Path, way: Callable[..., None]) -> None:
    place = tmp_path / "place"
    seen = set()

    def check() -> None:
        assert [checkpoint.problem(path) for path in checkpoint.saved(place)] in ([None] * 2, [None] * 3)
        seen.add(newest(place))

    def after() -> None:
        save(place, 3)
        assert newest(place) == 3
        assert names(place) == ["00000002", "00000003"]

    kills = killed_at_each_step(
        place,
        before=lambda: [save(place, step) for step in (1, 2)],
        work=lambda: way(place, 3),
        check=check,
        after=after,
    )
    assert seen == {2, 3}
    assert kills >= 20


def test_a_damaged_newest_checkpoint_is_replaced(tmp_path: Path) -> None:
    place = tmp_path / "place"

    def before() -> None:
        save(place, 1)
        save(place, 2)
        (place / "00000002" / "model.safetensors").write_bytes(b"damaged")

    def after() -> None:
        save(place, 2)
        assert newest(place) == 2
        assert names(place) == ["00000001", "00000002"]

    seen = set()
    killed_at_each_step(
        place, before=before, work=lambda: save(place, 2), check=lambda: seen.add(newest(place)), after=after
    )
    assert seen == {1, 2}


IMAGES = np.random.default_rng(0).integers(0, 256, (40, 8, 8, 3), np.uint8)
LABELS = np.arange(40) % 4


def test_a_store_is_whole_or_absent(tmp_path: Path) -> None:
    place = tmp_path / "place"
    expected = convert_arrays(tmp_path / "expected", IMAGES, LABELS, name="mine").digest

    def work() -> ArrayStore:
        return convert_arrays(place / "out", IMAGES, LABELS, name="mine")

    def check() -> None:
        assert {name for name in names(place) if not name.startswith(".tmp-")} <= {"out"}
        if (place / "out").exists():
            assert ArrayStore(place / "out", verify=True).digest == expected

    def after() -> None:
        if not (place / "out").exists():
            assert work().digest == expected
            assert names(place) == ["out"]

    assert killed_at_each_step(place, before=nothing, work=work, check=check, after=after) >= 20


def test_an_opened_data_set_is_converted_whole_or_not(tmp_path: Path) -> None:
    place, archive = tmp_path / "place", tiny_cifar10(tmp_path / "tiny.tar.gz", per_file=10)

    def work(home: Path = place) -> ArrayStore:
        return open_store("cifar10", data=archive, allow_unverified=True, home=home)

    expected = work(tmp_path / "expected")

    def check() -> None:
        for path in (place / "stores").glob("cifar10-*"):
            assert ArrayStore(path, verify=True).digest == expected.digest

    def after() -> None:
        assert work().digest == expected.digest
        left = {path.name for path in (place / "stores").iterdir()}
        assert left - {f".{expected.path.name}.lock"} == {expected.path.name}

    assert killed_at_each_step(place, before=nothing, work=work, check=check, after=after) >= 20


def test_a_record_is_the_old_or_the_new(tmp_path: Path) -> None:
    place = tmp_path / "place"
    path = place / "run" / "metrics.jsonl"

    def begin() -> None:
        reporter = JsonLinesReporter(path)
        reporter.start(SUMMARY, ())
        reporter.close()

    def before() -> None:
        path.parent.mkdir()
        publish_bytes(path, b"old\n")

    def after() -> None:
        begin()
        assert names(path.parent) == ["metrics.jsonl"]

    seen = set()
    killed_at_each_step(place, before=before, work=begin, check=lambda: seen.add(path.read_bytes()), after=after)
    assert len(seen) == 2
    assert b"old\n" in seen


@pytest.mark.parametrize(
    "work",
    [
        lambda place: publish_bytes(place / "a", b"content"),
        lambda place: save(place / "checkpoints", 1),
        lambda place: convert_arrays(place / "out", IMAGES, LABELS),
    ],
    ids=["a file", "a checkpoint", "a store"],
)
def test_what_is_renamed_is_on_the_disk_before_and_its_new_name_after(
    tmp_path: Path, work: Callable[[Path], object]
) -> None:
    place = tmp_path.resolve()
    unflushed: set[Path] = set()
    renamed = None

    def before(kind: Kind, path: Path) -> None:
        nonlocal renamed
        if kind == "fsync":
            unflushed.discard(path)
        elif kind == "rename":
            assert not [changed for changed in unflushed if changed.is_relative_to(path)]
            renamed = path
            unflushed.add(path.parent)
        elif kind != "close":
            unflushed.update({path, path.parent} if kind in ("open", "mkdir") else {path})

    with steps(place, before):
        work(place)
    assert renamed is not None
    assert renamed.parent not in unflushed


def test_random_kills_leave_whole_files(tmp_path: Path) -> None:
    versions = [bytes([letter]) * 100_000 for letter in b"abc"]
    path = tmp_path / "a"
    publish_bytes(path, versions[0])

    def work() -> None:
        for version in itertools.cycle(versions):
            publish_bytes(path, version)

    for seed in range(effort(25)):
        killed_at_random(work, seconds=0.05, seed=seed)
        assert path.read_bytes() in versions
    publish_bytes(path, versions[0])
    assert names(tmp_path) == ["a"]


def test_random_kills_never_lose_a_checkpoint(tmp_path: Path) -> None:
    save(tmp_path, 1)
    step = 1

    def work() -> None:
        for following in itertools.count(step + 1):
            save(tmp_path, following)

    for seed in range(effort(25)):
        killed_at_random(work, seconds=0.1, seed=seed)
        before, step = step, newest(tmp_path)
        assert step >= before
    assert step > 1
    save(tmp_path, step + 1)
    assert names(tmp_path) == [f"{step:08d}", f"{step + 1:08d}"]


def test_random_kills_leave_whole_stores(tmp_path: Path) -> None:
    expected = convert_arrays(tmp_path / "expected", IMAGES, LABELS, name="mine").digest
    made = 0

    def work() -> None:
        for number in itertools.count(made):
            convert_arrays(tmp_path / f"out-{number}", IMAGES, LABELS, name="mine")

    for seed in range(effort(25)):
        killed_at_random(work, seconds=0.1, seed=seed)
        made = len(list(tmp_path.glob("out-*")))
        for number in range(made):
            assert ArrayStore(tmp_path / f"out-{number}", verify=True).digest == expected
            shutil.rmtree(tmp_path / f"out-{number}")
        made = 0


@pytest.fixture
def undisturbed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[dict[str, torch.Tensor], float]:
    """The weights of a run that nobody killed, and its seconds."""
    tiny_runs.prepare(monkeypatch, tmp_path)
    with tiny_runs.one_thread():  # here, so that no child has to import and compile anything
        fit(tiny_runs.config("undisturbed"))
    started = time.monotonic()
    assert end_of(start(lambda: fit(tiny_runs.config("timed")))) == "done"
    return tiny_runs.weights(Path("undisturbed")), time.monotonic() - started


def to_go_on(run: Path) -> TrainConfig:
    """Resume it, or begin anew where nothing was saved."""
    if checkpoint.saved(run / "checkpoints"):
        return TrainConfig(resume=run)
    shutil.rmtree(run, ignore_errors=True)
    return tiny_runs.config(str(run))


def test_runs_killed_at_random_end_as_if_nothing_had_been(undisturbed: tuple[dict[str, torch.Tensor], float]) -> None:
    expected, seconds = undisturbed
    draw, kills, most = random.Random(0), 0, effort(3)
    for number in range(4 * most):
        if number >= most <= kills:
            break
        run, limit = Path(f"run-{number}"), 3
        while True:
            config = to_go_on(run)
            child = start(lambda config=config: fit(config))
            if limit:
                limit -= 1
                time.sleep(draw.uniform(0, seconds))
                os.kill(child, signal.SIGKILL)
            if end_of(child) == "done":
                break
            kills += 1
        if limit == 2:  # done before the first kill: a shared machine is now faster than it was
            seconds *= 0.8
        assert tiny_runs.equal(tiny_runs.weights(run), expected)
    assert kills >= most


def test_runs_killed_between_two_steps_end_as_if_nothing_had_been(
    undisturbed: tuple[dict[str, torch.Tensor], float],
) -> None:
    expected, _ = undisturbed
    seen: list[Any] = []

    def count() -> None:
        with steps(Path(), lambda kind, path: seen.append(kind)):
            fit(tiny_runs.config("counted"))
        Path("count").write_text(str(len(seen)))

    assert end_of(start(count)) == "done"
    total = int(Path("count").read_text())
    assert total > 100
    chosen = sorted(random.Random(0).sample(range(1, total + 1), min(total, effort(4))))
    resumed = 0
    for number in chosen:
        run = Path(f"run-{number}")

        def stepping(number: int = number, run: Path = run) -> None:
            with steps(run, kill_at(number)):
                fit(tiny_runs.config(str(run)))

        ended = end_of(start(stepping))
        config = to_go_on(run)
        resumed += config.resume is not None
        assert ended == "killed"
        assert end_of(start(lambda config=config: fit(config))) == "done"
        assert tiny_runs.equal(tiny_runs.weights(run), expected)
        assert not [path for path in run.rglob(".tmp-*") if path.parent.name == "checkpoints"]
    assert 0 < resumed < len(chosen)


def half_way(ready: int, go: int) -> Content:
    """Images of a conversion that says on `ready` that it is half way, and waits for `go`."""

    def files() -> Generator[SourceFile, None, None]:
        yield SourceFile("train", IMAGES[:20], LABELS[:20])
        os.write(ready, b"x")
        os.read(go, 1)
        yield SourceFile("test", IMAGES[20:], LABELS[20:])

    splits = {"full": {"train": ["train"], "test": ["test"]}}
    return Content(name="mine", classes=None, splits=splits, source={"verified": True}, files=files())


def test_a_killed_conversion_leaves_a_temporary_that_the_next_one_removes(tmp_path: Path) -> None:
    out = tmp_path / "out"
    (ready, is_ready), (go, _) = os.pipe(), os.pipe()
    child = start(lambda: make_store(out, half_way(is_ready, go)))
    os.read(ready, 1)
    [left] = names(tmp_path)
    assert left.startswith(".tmp-out-")

    other = convert_arrays(tmp_path / "out", IMAGES, LABELS)  # the child lives: what it holds stays
    assert names(tmp_path) == [left, "out"]
    shutil.rmtree(other.path)

    os.kill(child, signal.SIGKILL)
    assert end_of(child) == "killed"
    assert names(tmp_path) == [left]
    convert_arrays(tmp_path / "out", IMAGES, LABELS).verify()
    assert names(tmp_path) == ["out"]
