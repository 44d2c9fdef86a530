"""The race of recipes: what is run, what is kept, what the runs say together, and what is shown of it."""

import importlib
import json
import math
import os
import statistics
import sys
import textwrap
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from benchmarks import recipe_race
from benchmarks.trainers import BUDGETS, CONTESTANTS, Contestant, one, picture, pool
from benchmarks.trainers.common import Job
from benchmarks.trainers.pool import Entry, Pool
from benchmarks.trainers.records import Records, Run, races
from benchmarks.trainers.summary import difference, epochs_within, estimate, ratio, summarise
from fastcifar import ArrayStore, open_store
from fastcifar.errors import ConfigError, DataError

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT / "tools"))

import readme_tables  # noqa: E402


def run(contestant: str = "fast", **values: Any) -> Run:
    """A run as the race keeps it."""
    base = {
        "contestant": contestant,
        "arch": CONTESTANTS[contestant].net or "small",
        "split": "report",
        "epochs": 3.0,
        "seed": 0,
        "change": [],
        "mode": "beside",
        "threads": 1,
        "cpu": "a CPU",
        "data": "d",
        "verified": True,
        "recipe_digest": "r",
        "accuracy": 0.7,
        "tta": "none",
        "tta_accuracy": None,
        "train_seconds": 100.0,
        "seconds": 120.0,
        "processor_seconds": 120.0,
        "curve": [[50.0, 0.4], [100.0, 0.6]],
        "curve_of": "test",
        "batch_size": 64,
        "versions": {"torch": "2.0"},
    } | values
    named = ("contestant", "arch", "split", "epochs", "seed", "mode", "cpu", "data", "change", "recipe_digest")
    return {"digest": json.dumps([base[name] for name in named]), **base}


def report(**values: Any) -> Run:
    return run("report", **({"epochs": 20.0, "accuracy": 0.68, "train_seconds": 1000.0} | values))


# what the runs say


def test_time_that_others_took_is_not_counted() -> None:
    (race,) = summarise([report(processor_seconds=60.0), run(epochs=2.0, processor_seconds=240.0)])
    times = {setting["contestant"]: setting["train_seconds"]["mean"] for setting in race["settings"]}
    assert times == {"report": 500.0, "fast": 100.0}


def test_an_estimate_is_the_mean_with_students_interval_and_one_run_has_none() -> None:
    values = [0.70, 0.72, 0.74]
    found = estimate(values)
    assert found["mean"] == pytest.approx(0.72)
    # 4.303: Student's 97.5 % quantile for 2 degrees of freedom
    assert found["interval95"] == pytest.approx(4.303 * statistics.stdev(values) / math.sqrt(3), rel=1e-3)
    assert estimate([0.7]) == {"mean": 0.7, "interval95": None, "values": [0.7]}
    assert estimate([0.7, 0.7])["interval95"] == 0


def test_a_difference_has_welchs_interval() -> None:
    first, second = [5.0, 6.0, 7.0, 9.0], [1.0, 2.0, 4.0]
    found = difference(first, second)
    assert found["mean"] == pytest.approx(6.75 - 7 / 3)
    from scipy.stats import ttest_ind

    low, high = ttest_ind(first, second, equal_var=False).confidence_interval(0.95)
    assert found["mean"] - found["interval95"] == pytest.approx(low)
    assert found["mean"] + found["interval95"] == pytest.approx(high)
    assert difference(first, [1.0])["interval95"] is None


def test_a_ratio_is_of_geometric_means_and_its_interval_holds_it() -> None:
    found = ratio([100.0, 400.0], [10.0, 40.0])
    assert found["ratio"] == pytest.approx(10)
    low, high = found["interval95"]
    assert low < 10 < high
    assert low * high == pytest.approx(100)
    assert ratio([100.0], [50.0]) == {"ratio": pytest.approx(2), "interval95": None}


def test_a_recipe_is_held_against_the_report() -> None:
    runs = [
        *(report(seed=seed, accuracy=0.67 + 0.01 * seed, train_seconds=1000.0 + seed) for seed in (0, 1, 2)),
        *(run(epochs=2.0, seed=seed, accuracy=0.679 + 0.01 * seed, train_seconds=50.0) for seed in (0, 1, 2)),
        *(run(epochs=3.0, seed=seed, accuracy=0.69, train_seconds=100.0 + seed) for seed in (0, 1, 2)),
        *(run(epochs=9.0, seed=seed, accuracy=0.75, train_seconds=300.0) for seed in (0, 1, 2)),
        *(run(epochs=29.0, seed=seed, accuracy=0.80, train_seconds=1001.0) for seed in (0, 1, 2)),
        *(run(epochs=31.0, seed=seed, accuracy=0.81, train_seconds=1002.0) for seed in (0, 1, 2)),
    ]
    (race,) = summarise(runs)
    assert (race["arch"], race["split"], race["cpu"]) == ("small", "report", "a CPU")
    (pair,) = race["comparisons"]
    assert (pair["base"], pair["other"], pair["measure"]) == ("the report's recipe", "fastcifar", "accuracy")
    assert (pair["goal"], pair["limit"]) == (pytest.approx(0.68), 1001)
    # with 2 epochs the mean is above the goal, but one run is not
    assert (pair["time"]["epochs"], pair["time"]["target"]) == (3, "reached")
    assert pair["time"]["ratio"] == pytest.approx(statistics.geometric_mean((1000, 1001, 1002)) / 101, rel=1e-4)
    assert pair["time"]["runs"] == "3 and 3 runs"
    # 29 epochs took just the report's time, 31 more
    assert (pair["accuracy"]["epochs"], pair["accuracy"]["target"]) == (29, "reached")
    assert pair["accuracy"]["mean"] == pytest.approx(0.12)
    assert pair["accuracy"]["interval95"] > 0
    assert race["settings"][0]["seeds"] == [0, 1, 2]


def test_what_was_not_reached_keeps_its_reason() -> None:
    (race,) = summarise([report(), run(accuracy=0.66, train_seconds=1200.0)])
    (pair,) = race["comparisons"]
    assert pair["time"] == {"target": "not reached: 3 epochs ended at 66.00 % of 68.00 %"}
    assert pair["accuracy"] == {"target": "no run is within 1,000 s: the shortest took 1,200 s"}


def test_accuracies_with_and_without_augmentation_are_not_mixed() -> None:
    tta = {"tta": "flip", "tta_accuracy": 0.9}
    runs = [run("airbench94", accuracy=0.6, **tta), run(accuracy=0.7)]
    assert [pair["measure"] for pair in summarise(runs)[0]["comparisons"]] == ["accuracy"]
    runs[1] |= {"tta": "flip", "tta_accuracy": 0.8}
    first, second = summarise(runs)[0]["comparisons"]
    assert (first["time"]["target"], second["measure"]) == ("reached", "tta_accuracy")
    assert second["time"]["target"] == "not reached: 3 epochs ended at 80.00 % of 90.00 %"


@pytest.mark.parametrize(("name", "value"), [("mode", "turn"), ("cpu", "another"), ("data", "e"), ("split", "full")])
def test_runs_of_other_places_are_another_race(name: str, value: str) -> None:
    found = summarise([report(), run(**{name: value})])
    assert [race["comparisons"] for race in found] == [[], []]


def test_a_contestant_with_its_own_net_races_with_every_net() -> None:
    guest = run("airbench94")
    found = races([run(), run(arch="big"), guest])
    assert [race.about["arch"] for race in found] == ["small", "big"]
    assert all(guest in race.groups[-1].runs for race in found)
    assert [race.about["arch"] for race in races([guest])] == ["airbench94"]


def test_the_newest_recipe_counts_and_of_a_seed_the_newest_run() -> None:
    old = run(epochs=5.0, recipe_digest="old")
    runs = [old, run(seed=0), run(seed=1), run(seed=0, accuracy=0.9), run(seed=1) | {"failed": "no memory"}]
    (race,) = races(runs)
    (group,) = race.groups
    assert [found["accuracy"] for found in group.runs] == [0.7, 0.9]
    assert group.failed == ()
    unmade = run(recipe_digest="new") | {"failed": "no environment"}
    assert [one.groups for one in races([*runs, unmade])] == [race.groups]  # which replaces none that did not fail
    assert [one.groups[0].failed for one in races([unmade])] == [(unmade,)]
    changed = run(change=["lr=0.1"], recipe_digest="other")
    assert [group.title for group in races([*runs, changed])[0].groups] == ["fastcifar", "fastcifar, lr=0.1"]


def test_epochs_that_fit_are_whole_or_hundredths() -> None:
    (race,) = summarise([run(), run("airbench94", epochs=1.5)])
    ours, theirs = race["settings"]
    assert epochs_within(ours, 199) == 5
    assert epochs_within(ours, 200) == 6
    assert epochs_within(theirs, 123) == pytest.approx(1.84)


# what is kept


def test_runs_accumulate_and_the_file_is_read_anew(tmp_path: Path) -> None:
    path = tmp_path / "results" / "race.json"
    first, second = (Records(path, "Which?", summarise) for _ in range(2))
    assert first.runs() == []
    first.add(report())
    second.add(run())
    first.add(run(seed=1) | {"failed": "no memory"})
    content = json.loads(path.read_text(encoding="utf-8"))
    assert content["runs"] == [report(), run(), run(seed=1) | {"failed": "no memory"}]
    assert content["summary"] == json.loads(json.dumps(summarise(content["runs"])))
    assert content["summary"][0]["settings"][1]["failed"] == ["seed 1: no memory"]
    assert first.has(run()["digest"])
    assert not first.has(run(seed=1)["digest"])  # it failed: it is run again
    assert not first.has(run(seed=2)["digest"])
    assert sum(line.startswith('  {"') for line in path.read_text(encoding="utf-8").splitlines()) == 3


def test_a_damaged_file_is_not_written_over(tmp_path: Path) -> None:
    path = tmp_path / "race.json"
    path.write_text("{}", encoding="utf-8")
    with pytest.raises(DataError, match=r"race\.json is not a file of runs"):
        Records(path, "Which?", summarise).add(run())
    assert path.read_text(encoding="utf-8") == "{}"


# what is run


def wanted(*specs: str, **changes: Any) -> list[Entry]:
    return recipe_race.entries(specs, **({"archs": ["small"], "split": "report", "seeds": [0]} | changes))


def test_entries_are_seed_by_seed_and_take_epochs_from_the_table() -> None:
    found = wanted("report", "fast:3,11", seeds=[4, 5], change=["lr=0.1"])
    assert [(entry.seed, entry.contestant.name, entry.epochs) for entry in found] == [
        (seed, name, epochs) for seed in (4, 5) for name, epochs in (("report", 20), ("fast", 3), ("fast", 11))
    ]
    assert [entry.change for entry in found[:3]] == [(), ("lr=0.1",), ("lr=0.1",)]
    assert {entry.contestant.name for entry in wanted()} == set(BUDGETS["small", "report"])


@pytest.mark.parametrize(
    ("specs", "changes", "message"),
    [
        (["slow"], {}, "contestants: unknown 'slow': choose from report, fast, fast-amp, long, long-amp, airbench94, "),
        (["fast:x"], {}, "contestants: 'fast:x': epochs must be numbers, as in fast:3,11"),
        (["fast"], {"split": "holdout"}, "fast has no budget for arch small, split holdout: say fast:EPOCHS"),
        ([], {"split": "holdout"}, "none has a budget for arch small, split holdout: name them"),
        (["fast:1.5"], {}, "fast trains for multiples of 1 epochs, got 1.5"),
        (["airbench94:0"], {}, "airbench94 trains for multiples of 0.01 epochs, got 0"),
    ],
)
def test_wrong_contestants_are_named(specs: list[str], changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        wanted(*specs, **changes)


def test_every_contestant_has_its_file_and_environment() -> None:
    folder = ROOT / "benchmarks"
    for name, contestant in CONTESTANTS.items():
        assert name == contestant.name
        text = (folder / "trainers" / f"{contestant.file}.py").read_text(encoding="utf-8")
        assert "\ndef train(job: Job, " in text
        assert ("from fastcifar" in text) == contestant.ours
        if contestant.environment:
            listed = (folder / "requirements" / f"{contestant.environment}.txt").read_text(encoding="utf-8")
            assert f"\n{contestant.package}==" in listed


DUMMY = """
    import os, time
    import numpy as np
    from benchmarks.trainers.common import Outcome

    def train(job, *, mode="good"):
        print("this is no answer")
        if mode == "raise":
            raise ValueError("the loss is nan" + chr(10) + "and more")
        if mode == "exit":
            print("last words")
            os._exit(3)
        if mode == "long":
            (job.store / f"started-{job.seed}").write_text(str(os.getpid()))
            time.sleep(60)
        images, labels = job.part("test")
        assert labels.tolist() == np.load(job.scratch / "test.npy").tolist() and images.shape[0] == len(labels)
        threads = {name: os.environ[name] for name in ("OMP_NUM_THREADS", "NUMBA_NUM_THREADS")}
        recipe = {"affinity": sorted(os.sched_getaffinity(0)), "threads": threads, "change": job.change}
        return Outcome(accuracy=0.5, tta="flip", tta_accuracy=0.6, train_seconds=1.5, eval_seconds=0.5,
            curve=((1.0, 0.25), (1.5, 0.5)), curve_of="test", batch_size=8, threads=1, precision="float32",
            recipe=recipe, versions={"dummy": "1"})
"""


@pytest.fixture
def store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> ArrayStore:
    """A store whose labels are its row numbers, and a module `trainer_dummy.one` that worker processes can import."""
    from fastcifar.data.writer import SourceFile, write_store

    files = [
        SourceFile(name, np.zeros((8, 20, 20, 3), np.uint8), np.arange(8 * start, 8 * start + 8))
        for start, name in enumerate(("first", "second"))
    ]
    write_store(
        tmp_path / "store",
        files,
        name="rows",
        classes=[str(i) for i in range(16)],
        splits={"full": {"train": ["first"], "test": ["second"]}},
        source={},
    )
    package = tmp_path / "trainer_dummy"
    package.mkdir()
    (package / "__init__.py").touch()
    (package / "one.py").write_text(textwrap.dedent(DUMMY), encoding="utf-8")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    monkeypatch.setitem(CONTESTANTS, "dummy", Contestant(name="dummy", title="dummy", file="trainer_dummy.one"))
    monkeypatch.setattr(pool, "_recipe", lambda entry, store: {"of": entry.contestant.setting})
    return ArrayStore(tmp_path / "store")


def dummy(mode: str = "good", **values: Any) -> Entry:
    contestant = Contestant(name="dummy", title="dummy", file="trainer_dummy.one", setting={"mode": mode})
    return Entry(contestant=contestant, arch="small", split="full", epochs=2, **({"seed": 0} | values))


linux = pytest.mark.skipif(sys.platform != "linux", reason="pins processes to cores")
two_cores = pytest.mark.skipif((os.cpu_count() or 1) < 2, reason="needs two cores")


@linux
@two_cores
def test_runs_side_by_side_have_one_thread_on_a_core_each(store: ArrayStore) -> None:
    racing = Pool(store, "beside")
    found = list(racing.run([racing.plan(dummy(seed=seed, change=("a=1",))) for seed in (0, 1)]))
    assert sorted(one["seed"] for one in found) == [0, 1]
    cores = sorted(os.sched_getaffinity(0))[:2]
    assert sorted(one["pinned"] for one in found) == [[core] for core in cores]
    for made in found:
        assert "failed" not in made
        assert made["recipe"]["affinity"] == made["pinned"]
        assert made["recipe"]["threads"] == {"OMP_NUM_THREADS": "1", "NUMBA_NUM_THREADS": "1"}
        assert made["recipe"]["change"] == ["a=1"]
        assert (made["accuracy"], made["tta_accuracy"], made["curve"]) == (0.5, 0.6, [[1.0, 0.25], [1.5, 0.5]])
        assert (made["threads"], made["mode"], made["data"], made["epochs"]) == (1, "beside", store.digest, 2)
        assert made["date"].startswith("20")
        assert len(made["load_average"]) == 2
        assert made["processor_seconds"] >= 0
        assert -1e-6 <= made["alone_seconds"] < made["seconds"] + 60
    assert json.loads(json.dumps(found)) == found


@linux
def test_runs_in_turn_have_two_threads_and_failures_are_runs(store: ArrayStore) -> None:
    racing = Pool(store, "turn")
    good, bad, ended = racing.run([racing.plan(dummy(mode)) for mode in ("good", "raise", "exit")])
    assert good["recipe"]["threads"]["OMP_NUM_THREADS"] == "2"
    assert good["pinned"] == []
    assert good["recipe"]["affinity"] == sorted(os.sched_getaffinity(0))
    assert bad["failed"] == "ValueError: the loss is nan"
    assert ended["failed"] == "ended with status 3: last words"


@linux
def test_leaving_early_ends_the_processes(store: ArrayStore) -> None:
    import threading
    import time

    before = threading.active_count()
    racing = Pool(store, "turn")
    running = racing.run([racing.plan(dummy()), racing.plan(dummy("long", seed=1)), racing.plan(dummy("long", seed=2))])
    assert next(running)["seed"] == 0
    deadline = time.monotonic() + 30
    while not (store.path / "started-1").exists():
        assert time.monotonic() < deadline, "the second run did not start"
        time.sleep(0.01)
    pid = int((store.path / "started-1").read_text() or 0)
    started = time.monotonic()
    running.close()  # type: ignore[attr-defined]
    assert time.monotonic() - started < 20
    assert not Path(f"/proc/{pid}").exists()
    assert not (store.path / "started-2").exists()
    assert threading.active_count() <= before


ENDED = {
    "accuracy": 0.7,
    "tta": "none",
    "tta_accuracy": None,
    "train_seconds": 1.0,
    "seconds": 2.0,
    "processor_seconds": 1.0,
    "batch_size": 8,
    "versions": {},
}


def test_a_run_is_not_repeated_unless_asked(
    store: ArrayStore, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    records = Records(tmp_path / "race.json", "Which?", summarise)
    racing = Pool(store, "turn")
    monkeypatch.setattr(Pool, "_train", lambda self, entry, cores, scratch: {**ENDED})
    planned = [racing.plan(dummy(seed=seed)) for seed in (0, 1, 1)]
    recipe_race.compete(records, racing, planned[:1])
    recipe_race.compete(records, racing, planned)
    assert len(records.runs()) == 2
    assert "1 of 2 runs to do" in capsys.readouterr().out
    recipe_race.compete(records, racing, planned[:1], again=True)
    assert len(records.runs()) == 3


def test_what_makes_a_run_another_one() -> None:
    digits = open_store("digits")
    racing = Pool(digits, "turn")

    def known(**changes: Any) -> Run:
        values = {"contestant": CONTESTANTS["fast"], "arch": "small", "split": "report", "epochs": 2, "seed": 0}
        return racing.plan(Entry(**(values | changes))).known

    first = known()
    assert known() == first
    for changes in ({"seed": 1}, {"epochs": 3}, {"arch": "big"}, {"split": "full"}, {"change": ("lr=0.123",)}):
        assert known(**changes)["digest"] != first["digest"]
    assert known(epochs=3)["recipe_digest"] == first["recipe_digest"]  # so that epochs are rows of one recipe
    assert known(change=("lr=0.123",))["recipe_digest"] != first["recipe_digest"]
    guest = known(contestant=CONTESTANTS["airbench94"])
    assert guest == known(contestant=CONTESTANTS["airbench94"], arch="big")
    assert guest["arch"] == "airbench94"
    other = known(contestant=CONTESTANTS["airbench94-256"])
    assert other["recipe_digest"] != guest["recipe_digest"]
    with pytest.raises(ConfigError, match="unknown arch 'huge'"):
        known(arch="huge")
    with pytest.raises(ConfigError, match="unknown split 'half/train'"):
        known(split="half")


def test_side_by_side_needs_two_cores(store: ArrayStore, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: {3}, raising=False)
    with pytest.raises(ConfigError, match=r"needs two cores.*use --mode turn"):
        Pool(store, "beside")


# the contestants' own files


def test_fastcifar_trains_as_it_is_told(tmp_path: Path) -> None:
    digits = open_store("digits")
    job = Job(
        store=digits.path, scratch=tmp_path, split="full", arch="small", epochs=1, seed=3, change=("batch_size=700",)
    )
    assert Job.from_json(json.loads(json.dumps(job.to_json()))) == job
    from benchmarks.trainers.fastcifar_fit import config_of

    config = config_of(job, recipe="fast")
    assert (config.arch, config.dataset, config.split, config.epochs, config.seed) == (
        *("small", str(digits.path), "full", 1, 3),
    )
    assert (config.out, config.change, config.device) == (tmp_path / "run", ("batch_size=700",), "cpu")


AIRBENCH = {
    "__init__": "from .lib_airbench94 import train94\nfrom .utils import CifarLoader",
    "utils": """
        import time, torch

        class CifarLoader:
            def __init__(self, path, train=True, batch_size=500, aug=None, altflip=False, gpu=0):
                data = torch.load(f"{path}/{'train' if train else 'test'}.pt", map_location=torch.device(gpu))
                self.images, self.labels = data["images"].half(), data["labels"]
                self.made = (train, batch_size, aug, altflip)

        def print_training_details(variables, is_final_entry):
            raise AssertionError("this is the race's to hear")

        def train(loader, epochs, make_net):
            test = CifarLoader("cifar10", train=False, batch_size=2000)
            net = make_net()
            assert net(torch.ones(1, 1)).dtype == torch.float32
            assert {loader.images.dtype, net.weight.dtype} == {torch.float32}
            assert loader.made == (True, 4, {"flip": True}, True) and test.labels.tolist() == [8, 9]
            starter, ender = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            total_time_seconds = 0.0
            for epoch in range(2):
                starter.record()
                ender.record()
                torch.cuda.synchronize()
                total_time_seconds += 1e-3 * starter.elapsed_time(ender) + 10
                val_acc = 0.25 * (epoch + 1)
                print_training_details(locals(), is_final_entry=False)
            total_time_seconds += 1000
            time.sleep(0.05)
            tta_val_acc = float(torch.rand(()))
            epoch = "eval"
            print_training_details(locals(), is_final_entry=True)
    """,
    "lib_airbench94": """
        import torch
        from .utils import train
        hyp = {"aug": {"flip": True}, "opt": {"lr": 1.0}}

        class Net(torch.nn.Linear):
            def forward(self, images):
                computed_in.append(super().forward(images).dtype)
                return super().forward(images)

        computed_in = []

        def make_net94():
            return Net(1, 1).half().cuda()

        def train94(loader, epochs, make_net):
            return train(loader, epochs, make_net)
    """,
}


@pytest.mark.parametrize("amp", [False, True])
def test_airbench_is_run_on_the_cpu_from_outside(
    amp: bool, store: ArrayStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    package = tmp_path / "airbench"
    package.mkdir()
    for name, text in AIRBENCH.items():
        (package / f"{name}.py").write_text(textwrap.dedent(text), encoding="utf-8")
    for name in [name for name in sys.modules if name.split(".")[0] == "airbench" or name.endswith(".airbench94")]:
        monkeypatch.delitem(sys.modules, name)  # each is given a package of its own
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.chdir(tmp_path)  # it changes the folder
    monkeypatch.setattr("importlib.metadata.version", lambda name: f"{name} 1")
    scratch = tmp_path / "scratch"
    scratch.mkdir()
    np.save(scratch / "train.npy", np.arange(6))
    np.save(scratch / "test.npy", np.array([8, 9]))
    job = Job(store=store.path, scratch=scratch, split="full", arch="small", epochs=1.5, seed=7)
    state = torch.random.get_rng_state()
    before = (torch.Tensor.half, torch.nn.Module.half, torch.nn.Module.cuda, torch.cuda.Event, torch.cuda.synchronize)
    found = one.run("benchmarks.trainers.airbench94", [], job, {"batch_size": 4, "amp": amp})
    after = (torch.Tensor.half, torch.nn.Module.half, torch.nn.Module.cuda, torch.cuda.Event, torch.cuda.synchronize)
    assert after == before
    computed_in = importlib.import_module("airbench.lib_airbench94").computed_in
    assert computed_in == [torch.bfloat16 if amp else torch.float32]
    assert found["precision"] == ("bfloat16" if amp else "float32")
    assert found["accuracy"] == 0.5
    torch.manual_seed(7)
    torch.nn.Linear(1, 1)
    assert found["tta_accuracy"] == float(torch.rand(()))
    torch.random.set_rng_state(state)
    assert 20 <= found["train_seconds"] < 21  # two epochs, and not the last evaluation
    assert 0.05 <= found["train_seconds"] + found["eval_seconds"] <= found["seconds"]
    assert [accuracy for _, accuracy in found["curve"]] == [0.25, 0.5]
    assert [math.floor(seconds) for seconds, _ in found["curve"]] == [10, 20]
    assert found["recipe"] == {"aug": {"flip": True}, "opt": {"lr": 1.0}, "epochs": 1.5, "batch_size": 4}
    assert found["versions"]["airbench"] == "airbench 1"


# what is shown


def many() -> list[Run]:
    tta = {"tta": "flip", "tta_accuracy": 0.72}
    return [
        *(report(seed=seed, train_seconds=1000.0 + seed, curve=[[1000.0, 0.66]]) for seed in (0, 1)),
        *(run(seed=seed, train_seconds=100.0 + seed, **tta) for seed in (0, 1)),
        run("airbench94", epochs=1.15, split="full", **tta),
        run(arch="big", epochs=2.0) | {"failed": "the loss became nan"},
    ]


def test_the_picture_is_there_and_the_same_for_the_same_runs(tmp_path: Path) -> None:
    paths = [tmp_path / name for name in ("a.svg", "b.svg")]
    for path in paths:
        picture.save(races(many()), path)
    assert paths[0].read_bytes() == paths[1].read_bytes()
    assert b"</svg>" in paths[0].read_bytes()
    figure = picture.draw(races(many()))
    small, guest = figure.axes  # big has no run that did not fail
    assert small.get_xscale() == "log"
    assert [text.get_text() for text in small.texts] == ["the report's recipe", "fastcifar"]
    dots = [line.get_xydata()[0].tolist() for line in small.lines if line.get_marker() == "o"]
    assert dots == [[100.0, 0.7], [100.0, 0.72], [101.0, 0.7], [101.0, 0.72], [1000.0, 0.68], [1001.0, 0.68]]
    assert guest.get_title(loc="left") == "airbench94, split full, 1 thread"
    with pytest.raises(ValueError, match="at least one run"):
        picture.draw([])


def test_a_contestant_has_one_colour_and_three_panels_are_a_row() -> None:
    ours = [("fast", "small"), ("long", "small"), ("fast-amp", "big"), ("long-amp", "big")]
    runs = [run(name, arch=arch) for name, arch in ours]
    runs += [report(arch="big"), run("airbench94", epochs=1.15, split="full"), run("airbench94-amp", split="report")]
    figure = picture.draw(races(runs))
    colors = {text.get_text(): text.get_color() for axes in figure.axes for text in axes.texts}
    assert colors["fastcifar"] == colors["fastcifar, --amp"]
    assert len(set(colors.values())) == 4
    for axes in figure.axes:
        assert len({text.get_color() for text in axes.texts}) == len(axes.texts)
    assert [axes.get_gridspec().ncols for axes in figure.axes] == [3] * len(figure.axes)  # type: ignore[union-attr]


def test_names_in_the_picture_do_not_lie_on_each_other() -> None:
    longer = {"accuracy": 0.703, "change": ["lr=1", "head_lr=0.5"]}  # of two lines
    runs = [report(accuracy=0.70), run(accuracy=0.701), run("long", accuracy=0.702), run("long", **longer)]
    axes = picture.draw(races(runs)).axes[0]
    low, high = axes.get_ylim()
    heights = [text.xy[1] for text in axes.texts]  # type: ignore[attr-defined]
    assert len(heights) == 4
    assert np.diff(heights).min() >= 0.07 * (high - low)
    assert heights[-1] < high - 0.03 * (high - low)  # and not on the panel's title


def test_of_many_changes_the_picture_names_the_first() -> None:
    changes = ["augment.policy=trivial", "batch_size=500", "lr=0.1", "head_lr=0.2"]
    axes = picture.draw(races([run(change=changes)])).axes[0]
    assert " ".join(axes.texts[0].get_text().split()) == "fastcifar, policy=trivial, batch_size=500, 2 more"


def test_the_tables_show_the_race(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    runs = [*many(), report(arch="big"), run(arch="big", epochs=9.0, accuracy=0.69)]
    Records(tmp_path / "recipe_race.json", "Which?", summarise).add(runs[0])
    for more in runs[1:]:
        Records(tmp_path / "recipe_race.json", "Which?", summarise).add(more)
    monkeypatch.setattr(readme_tables, "RESULTS", tmp_path)
    made = readme_tables.with_tables("\n".join(readme_tables.markers("recipe-race")))
    for line in (
        "| small, report | fastcifar | 3 | 2 | 100 ± 6 s | 70.00 ± 0.00 % | 72.00 ± 0.00 % (flip) |",
        "| small, report | the report's recipe | 20 | 2 | 1,000 ± 6 s | 68.00 ± 0.00 % |  |",
        "| airbench94, full | airbench94 | 1.15 | 1 | 100 s | 70.00 % | 72.00 % (flip) |",
        "| big, report | fastcifar | 2 |  |  | failed: seed 0: the loss became nan |  |",
        "| small, report | fastcifar | the report's recipe, 20 epochs | 68.00 %, 1,000 s | 9.96 times as fast "
        "(9.37 to 10.58): 3 epochs, 100 s | +2.00 ± 0.00 points: 3 epochs, 70.00 % |",
        "| big, report | fastcifar | the report's recipe, 20 epochs | 68.00 %, 1,000 s | 10.00 times as fast "
        "(one run each): 9 epochs, 100 s | +1.00 points (one run each): 9 epochs, 69.00 % |",
    ):
        assert line in made.splitlines()
    assert "On the published CIFAR-10; a CPU; torch 2.0." in made
    assert "made to run on a CPU, with float32 for half" in made


def test_a_long_run_tells_where_it_stood_on_the_way(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    curve = [[2400.0, 0.4], [4800.0, 0.7]]
    # threads of one run wait for each other, which is no doing of others
    halved = {"mode": "turn", "threads": 2, "train_seconds": 4800.0, "seconds": 6000.0, "processor_seconds": 9600.0}
    long = run("long", arch="big", split="full", curve=curve, tta="flip", tta_accuracy=0.72, **halved)
    validated = long | {"arch": "small", "curve_of": "validation", "digest": "other"}
    for more in (*many(), long, validated):
        Records(tmp_path / "recipe_race.json", "Which?", summarise).add(more)
    monkeypatch.setattr(readme_tables, "RESULTS", tmp_path)
    made = readme_tables.with_tables("\n".join(readme_tables.markers("recipe-curves")))
    assert made.splitlines()[4:-2] == [
        "| big, full, 2 threads, a CPU | fastcifar, long, 3 epochs | 40 | 40.00 % |",
        "| big, full, 2 threads, a CPU | fastcifar, long, 3 epochs | 80 | 70.00 %; 72.00 % with test-time "
        "augmentation |",
    ]
    short = readme_tables.with_tables("\n".join(readme_tables.markers("recipe-summary")))
    said = "70.00 % in 4,800 s, 72.00 % with test-time augmentation"
    assert f"| big, full | a CPU | nothing: fastcifar, long, 3 epochs, 2 threads |  | {said} |" in short.splitlines()


def test_the_short_table_has_the_soonest_and_the_best(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    later = run(contestant="long", epochs=30.0, train_seconds=900.0, accuracy=0.75)
    for more in (*many(), later, run(epochs=5.0, accuracy=0.2), report(arch="big"), run(arch="big", accuracy=0.1)):
        Records(tmp_path / "recipe_race.json", "Which?", summarise).add(more)
    monkeypatch.setattr(readme_tables, "RESULTS", tmp_path)
    made = readme_tables.with_tables("\n".join(readme_tables.markers("recipe-summary")))
    assert made.splitlines()[4:-2] == [
        "| small, report | a CPU | the report's recipe, 20 epochs: 68.00 % in 1,000 s | "
        "10.0 times as fast: fastcifar, 3 epochs, 100 s | +7.0 points: fastcifar, long, 30 epochs, 900 s |",
        "| big, report | a CPU | the report's recipe, 20 epochs: 68.00 % in 1,000 s | "
        "not reached: 3 epochs ended at 10.00 % of 68.00 % | -58.0 points: fastcifar, 3 epochs, 100 s |",
    ]


def test_errors_are_one_line_and_the_command_shows_what_there_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(recipe_race, "RESULTS", tmp_path)
    with pytest.raises(SystemExit, match=r"^recipe_race: contestants: unknown 'slow'"):
        recipe_race.main(["--contestants", "slow"])
    with pytest.raises(SystemExit, match=r"^recipe_race: unknown dataset 'nothing'"):
        recipe_race.main(["--contestants", "fast:1", "--dataset", "nothing"])
    recipe_race.main(["--show"])
    assert not (tmp_path / "recipe_race.svg").exists()
    for more in many():
        Records(tmp_path / "recipe_race.json", "Which?", summarise).add(more)
    recipe_race.main(["--show", "--minutes", "10"])
    said = capsys.readouterr().out
    assert "fastcifar, 3 epochs: 100 s, 70.00, 70.00 %, 10 min: 17 epochs" in said
    assert "fastcifar beside the report's recipe, 20 epochs (accuracy): to the same accuracy: 9.96 times" in said
    assert (tmp_path / "recipe_race.svg").exists()


def test_several_ways_to_change_a_recipe_have_one_name_together() -> None:
    runs = [run(change=[f"lr={rate}"], seed=seed) for rate in (0.1, 0.2, 0.3) for seed in (0, 1)]
    axes = picture.draw(races([run(), *runs])).axes[0]
    assert sorted(text.get_text().replace("\n", " ") for text in axes.texts) == [
        "fastcifar",
        "fastcifar, changed in 3 ways",
    ]
    assert len({text.get_color() for text in axes.texts}) == 2
    assert sum(line.get_fillstyle() == "full" and line.get_marker() == "o" for line in axes.lines) == 7
