"""The benchmarks' machinery: rounds, intervals, worker processes, and what is said of a batch."""

import json
import math
import statistics
import sys
import textwrap
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from benchmarks import processes
from benchmarks.checks import CheckError, differences, examine
from benchmarks.contestants import BASE, CONTESTANTS
from benchmarks.contestants.common import Task, Windows, batches_of
from benchmarks.harness import alternate, race, summary
from benchmarks.images import noise
from benchmarks.remote import Remote, WorkerError

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT / "tools"))

import readme_tables  # noqa: E402

MEAN, STD = (125.0, 123.0, 114.0), (63.0, 62.0, 67.0)


def test_a_summary_has_the_median_and_students_interval() -> None:
    values = [1.0, 2.0, 3.0, 4.0, 100.0]
    found = summary(values)
    assert found["median"] == 3
    assert found["rounds"] == values
    # 2.776: Student's 97.5 % quantile for 4 degrees of freedom
    assert math.isclose(found["interval95"], 2.776 * 1.2533 * statistics.stdev(values) / math.sqrt(5), rel_tol=1e-3)
    assert math.isnan(summary([1.0])["interval95"])


def test_contestants_take_turns_and_the_first_one_changes() -> None:
    calls: list[str] = []

    def contestant(name: str) -> Any:
        return lambda: calls.append(name) or float(len(calls))

    found = alternate({name: contestant(name) for name in "abc"}, repeats=3)
    assert "".join(calls) == "cab" + "abc" + "bca" + "cab"
    assert found["a"]["rounds"] == [4.0, 9.0, 11.0]  # the warm-up is not counted


def test_one_that_fails_is_reported_and_the_others_go_on() -> None:
    def fail() -> float:
        raise ValueError("no such thing\nand more")

    found = alternate({"good": lambda: 1.0, "bad": fail}, repeats=2)
    assert found["bad"] == {"failed": "no such thing"}
    assert found["good"]["rounds"] == [1.0, 1.0]


def test_a_race_gives_items_a_second() -> None:
    def run() -> int:
        time.sleep(0.01)
        return 5

    assert 100 < race({"a": run}, repeats=2)["a"]["median"] < 500


def test_every_contestant_has_its_file_which_is_free_of_fastcifar() -> None:
    folder = ROOT / "benchmarks" / "contestants"
    assert len({entry.name for entry in CONTESTANTS}) == len(CONTESTANTS)
    assert CONTESTANTS[0].name == BASE
    for entry in CONTESTANTS:
        text = (folder / f"{entry.file}.py").read_text(encoding="utf-8")
        assert "def open_loader(" in text
        assert ("from fastcifar" in text or "import fastcifar" in text) == (entry.file == "fastcifar_loader")
        environment = ROOT / "benchmarks" / "requirements" / f"{entry.environment}.txt"
        assert entry.environment == "" or environment.exists()


DUMMY = """
    import sys, time
    import numpy as np
    from benchmarks.contestants.common import Opened, Windows, batches_of

    def version():
        print("this is no answer")
        return "dummy 1"

    def open_loader(task, *, mode="good"):
        if mode == "raise":
            raise ValueError("this cannot be opened")
        if mode == "exit":
            print("last words", file=sys.stderr, flush=True)
            import os
            os._exit(3)

        if mode == "real":
            images, labels = task.images(), task.labels()
            windows, generator = Windows(images, task.crop), np.random.default_rng()

            def real():
                for rows in batches_of(len(images), task.batch_size, generator):
                    made = (windows.take(rows, generator) - np.array(task.mean)) / task.std
                    yield made.transpose(0, 3, 1, 2).astype(np.float32), labels[rows]

            return Opened(epoch=real)

        def epoch():
            for _ in range(4):
                time.sleep(0.01)
                yield np.zeros((8, 3, 4, 4), np.float32), np.arange(8)

        return Opened(epoch=epoch, settle=3, whole_epochs=mode == "whole")
"""


@pytest.fixture
def task(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Task:
    """With a module `race_dummy.loader` that worker processes can import."""
    package = tmp_path / "race_dummy"
    package.mkdir()
    (package / "__init__.py").touch()
    (package / "loader.py").write_text(textwrap.dedent(DUMMY), encoding="utf-8")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    return Task(store=tmp_path, scratch=tmp_path, mean=MEAN, std=STD, count=32, batch_size=8, crop=4)


def start(task: Task, **setting: Any) -> Remote:
    return Remote(Path(sys.executable), "race_dummy.loader", task, setting, patience=20)


def test_a_worker_answers_and_counts_only_what_comes_after_it_has_settled(task: Task, tmp_path: Path) -> None:
    with start(task) as remote:
        assert remote.ask("prepare")["seconds"] >= 0
        opened = remote.ask("open")
        assert opened["version"] == "dummy 1"
        assert opened["first_batch_seconds"] >= 0.01
        path = tmp_path / "sample.npz"
        assert remote.ask("sample", path=str(path)) == {"shape": [8, 3, 4, 4], "dtypes": ["float32", "int64"]}
        assert np.load(path)["labels"].tolist() == list(range(8))
        ran = remote.ask("run", seconds=0.1)
        assert ran["seconds"] >= 0.1
        assert ran["images"] % 8 == 0
        assert ran["images"] / 8 <= ran["seconds"] / 0.01
    with start(task, mode="whole") as remote:
        remote.ask("open")
        assert remote.ask("run", seconds=0.03)["images"] in (8, 40, 72)  # epochs of 32, without 3 batches


@pytest.mark.parametrize(
    ("mode", "reason"), [("raise", "ValueError: this cannot be opened"), ("exit", "ended with status 3: last words")]
)
def test_a_worker_that_fails_says_why(task: Task, mode: str, reason: str) -> None:
    with start(task, mode=mode) as remote, pytest.raises(WorkerError, match=reason):
        remote.ask("open")


def test_a_worker_that_cannot_be_imported_or_does_not_answer_says_so(task: Task) -> None:
    python = Path(sys.executable)
    missing = pytest.raises(WorkerError, match=r"ModuleNotFoundError: No module named 'race_dummy\.missing'")
    with Remote(python, "race_dummy.missing", task, {}) as remote, missing:
        remote.ask("open")
    late = pytest.raises(WorkerError, match=r"no answer to 'open' in 0\.01 s")
    with Remote(python, "race_dummy.loader", task, {}, patience=0.01) as remote, late:
        remote.ask("open")


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_a_frozen_worker_uses_no_time_and_goes_on_when_asked(task: Task) -> None:
    with start(task) as remote:
        remote.ask("open")
        assert remote.freeze()
        leader = remote._process.pid
        assert processes.session(leader) == [leader]
        deadline = time.monotonic() + 10
        while Path(f"/proc/{leader}/stat").read_text().rpartition(")")[2].split()[0] != "T":
            assert time.monotonic() < deadline, "it was not stopped"
            time.sleep(0.01)
        before = processes.ticks(leader)
        time.sleep(0.1)
        assert processes.ticks(leader) == before
        assert processes.memory(leader) > 2**20
        assert remote.ask("run", seconds=0.02)["images"] > 0
    assert processes.ticks(leader) == 0


def batches(kind: str = "each image", count: int = 48) -> Iterator[tuple[Any, Any, Any, Any]]:
    """First batches: float32[B, 3, H, W], labels, and the images and labels they are from."""
    images, labels = noise(300, 16), np.arange(300) % 10
    generator = np.random.default_rng(0)
    windows = Windows(images, 4)
    while True:
        rows = batches_of(len(images), count, generator)[0]
        if kind == "none":
            made = images[rows]
        elif kind == "whole batch":
            y, x = generator.integers(0, 9, 2)
            padded = np.pad(images[rows], ((0, 0), (4, 4), (4, 4), (0, 0)))
            made = padded[:, y : y + 16, x : x + 16]
        else:
            made = windows.take(rows, generator)
        yield ((made - np.array(MEAN)) / STD).transpose(0, 3, 1, 2).astype(np.float32), labels[rows], images, labels


def look(batch: Any, labels: Any, images: Any, targets: Any, **changes: Any) -> dict[str, Any]:
    return examine(batch, labels, images, targets, mean=MEAN, std=STD, crop=4, **changes)


@pytest.mark.parametrize(
    ("kind", "said"),
    [
        ("each image", []),
        ("whole batch", ["the same crop and flip for a whole batch", "zero padding"]),
        ("none", ["no augmentation"]),
    ],
)
def test_a_batch_is_seen_for_what_it_is(kind: str, said: list[str]) -> None:
    source = batches(kind)
    first, second = look(*next(source)), look(*next(source))
    assert first["crops"] == kind
    assert differences(first, second, scaled=False) == said
    assert differences(first, second, scaled=True) == [*said, "scaled to [-1, 1]"]


def test_a_batch_that_is_not_what_was_asked_for_is_refused() -> None:
    batch, labels, images, targets = next(batches())
    with pytest.raises(CheckError, match="has label"):
        look(batch, (labels + 1) % 10, images, targets)
    with pytest.raises(CheckError, match="not standardised pixels"):
        look(batch * 0.9, labels, images, targets)
    shifted = np.roll(batch, 1, axis=3)
    with pytest.raises(CheckError, match="not a crop"):
        look(shifted, labels, images, targets)
    found = look(batch, labels, images, targets)
    with pytest.raises(CheckError, match="same images"):
        differences(found, found, scaled=False)
    other = {**found, "rows": sorted(found["rows"])}
    with pytest.raises(CheckError, match="order in which they are stored"):
        differences(other, found, scaled=False)
    other = {**found, "rows": found["rows"][:1] * 2}
    with pytest.raises(CheckError, match="twice"):
        differences(other, found, scaled=False)


def test_bfloat16_may_blur_a_few_images() -> None:
    batch, labels, images, targets = next(batches())
    batch[:5] = 0
    with pytest.raises(CheckError):
        look(batch, labels, images, targets)
    assert len(look(batch, labels, images, targets, exact=False)["rows"]) == 43


def test_the_race_reports_a_contestant_that_fails(task: Task, tmp_path: Path) -> None:
    from benchmarks.contestants import Contestant
    from benchmarks.loader_race import Race

    images = noise(1000, 32)
    np.save(tmp_path / "images.npy", images)
    np.save(tmp_path / "labels.npy", np.arange(1000) % 10)
    small = replace(task, count=1000, mean=MEAN, std=STD)
    entries = (
        Contestant(name="real", file="race_dummy.loader", batch_size=64, settings=({"mode": "real"}, {"mode": "exit"})),
        Contestant(name="broken", file="race_dummy.loader", batch_size=8, settings=({"mode": "raise"},)),
        Contestant(name="wrong", file="race_dummy.loader", batch_size=8),
        Contestant(name="missing", file="race_dummy.loader", environment="nowhere"),
    )
    found = Race(task=small, seconds=0.05, repeats=2).run(entries)
    assert found["real"]["median"] > 0
    assert found["real"]["setting"] == {"mode": "real"}
    assert found["real"]["tried"][1]["failed"] == "ended with status 3: last words"
    assert found["real"]["differences"] == []
    assert found["broken"]["failed"] == "ValueError: this cannot be opened"
    assert found["wrong"]["failed"] == "a batch has shape [8, 3, 4, 4]"
    assert "nowhere" in found["missing"]["failed"]


RECEIPT = {"cpu": "a CPU", "threads": 2, "torch": "2.0"}


def result(median: float, **more: Any) -> dict[str, Any]:
    return {"median": median, "interval95": median / 10, "rounds": [median], **more}


def entry(median: float, **more: Any) -> dict[str, Any]:
    said = {
        "differences": [],
        "remark": "",
        "setting": {},
        "tried": [{}],
        "first_batch_seconds": 0.25,
        "version": "x 1",
    }
    return result(median, **said) | more


RESULTS: dict[str, dict[str, Any]] = {
    "race": {
        "base": "ours",
        "images": "random, 50,000",
        "repeats": 7,
        "seconds": 1.0,
        "results": {
            "slow": entry(1000, differences=["zero padding"], remark="so", setting={"workers": 2}),
            "ours": entry(1_000_000),
            "broken": {"failed": "it is not there", "remark": ""},
        },
    },
    "ceiling": {
        "bytes_read": 3072,
        "bytes_written": 12288,
        "results": {"fastcifar": result(100), "gather and write": result(160), "copy": result(400)},
    },
    "scaling": {"results": {"threads": {"2": result(512_000)}, "batch size": {"8": {"failed": "no memory"}}}},
    "first_batch": {"images": 50000, "results": {"ours": result(0.2)}},
    "memory": {"images": 50000, "image_bytes": 150 * 2**20, "results": {"ours": result(2**28)}},
}


def test_the_tables_show_what_was_measured(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, content in RESULTS.items():
        (tmp_path / f"{name}.json").write_text(json.dumps(content | {"receipt": RECEIPT}), encoding="utf-8")
    monkeypatch.setattr(readme_tables, "RESULTS", tmp_path)
    names = ("race", "ceiling", "scaling", "first-batch", "memory")
    text = "\n".join("\n".join(readme_tables.markers(name)) for name in names)
    made = readme_tables.with_tables(text)
    for line in (
        "| ours | nothing | 1,000,000 ± 100,000 | 1.0 | 0.25 s | x 1 |",
        "| slow (workers 2) | zero padding; so | 1,000 ± 100 | 1,000.0 | 0.25 s | x 1 |",
        "| broken |  | failed: it is not there |  |  |  |",
        "| the same gather and as many bytes written, no arithmetic | 160 ± 16 | 62 % |",
        "| threads | 2 | 512,000 ± 51,200 | 1,000 µs |",
        "| batch size | 8 | failed: no memory |  |",
        "| ours | 0.20 ± 0.02 |",
        "| ours | 256 ± 26 |",
    ):
        assert line in made.splitlines()
    assert made.index("| ours |") < made.index("| slow ") < made.index("| broken ")
    assert readme_tables.with_tables(made) == made
    assert readme_tables.with_tables("no markers") == "no markers"
