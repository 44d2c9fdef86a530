"""Ablations: the same seeds for all, differences seed by seed, and never a look at the test images."""

import dataclasses
import json
import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from scipy import stats

from fastcifar import many
from fastcifar.ablation import AblationResult, AblationRow, ablate, ablation_table
from fastcifar.commands import main
from fastcifar.config import TrainConfig
from fastcifar.data.writer import SourceFile, write_store
from fastcifar.engine import fit
from fastcifar.errors import CheckpointError, ConfigError, DivergedError, FastcifarError, StoppedError
from fastcifar.estimates import estimate
from fastcifar.nets import ARCHS, Arch
from fastcifar.recipes import RECIPES, resolve
from fastcifar.reporter import NullReporter
from fastcifar.variants import plan_variants, vary
from tests.test_changes import FAST

TINY = Arch(blocks=((4,), (4,), (4,), (4,)), hidden=(8,))
SECRET = 0.123456  # the test accuracy that nothing may show


@pytest.fixture(autouse=True)
def _tiny(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setitem(ARCHS, "tiny", TINY)
    monkeypatch.setitem(RECIPES, "tested", FAST)
    monkeypatch.setattr("fastcifar.figures.write_figures", lambda *arguments, **options: ())
    monkeypatch.chdir(tmp_path)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> str:
    """60 images to train on and validate with, 20 of the test, of 3 classes."""
    generator = np.random.default_rng(0)
    path = tmp_path_factory.mktemp("ablation") / "noise"
    files = [
        SourceFile(name, generator.integers(0, 256, (count, 24, 24, 3), np.uint8), generator.integers(0, 3, count))
        for name, count in (("a", 60), ("b", 20))
    ]
    splits = {"full": {"train": ["a"], "test": ["b"]}}
    write_store(path, files, name="noise", classes=["x", "y", "z"], splits=splits, source={"verified": True})
    return str(path)


def config(data: str, **options: Any) -> TrainConfig:
    defaults: dict[str, Any] = {
        "arch": "tiny",
        "recipe": "tested",
        "epochs": 1,
        "batch_size": 16,
        "device": "cpu",
        "out": Path("all"),
    }
    return TrainConfig(**{**defaults, "dataset": data, **options})


class Heard(NullReporter):
    def __init__(self) -> None:
        self.messages: list[str] = []

    def message(self, text: str) -> None:
        self.messages.append(text)


Answer = Callable[[TrainConfig], float]


def fake_fit(monkeypatch: pytest.MonkeyPatch, accuracy: Answer) -> list[TrainConfig]:
    """Runs that take no time: their validation accuracy is `accuracy`, or what that raises; which ones were made."""
    made: list[TrainConfig] = []

    def fake(config: TrainConfig, **options: Any) -> None:
        made.append(config)
        value = accuracy(config)
        part = "test" if resolve(config).split == "full" else "validation"
        epoch = {"kind": "epoch", "step": 3, "evaluated": part, "eval_accuracy": value}
        test = {"kind": "test", "accuracy": SECRET, "tta": "none", "tta_accuracy": None, "train_seconds": 100 * value}
        assert config.out is not None
        config.out.mkdir(parents=True)
        (config.out / "metrics.jsonl").write_text(f"{json.dumps(epoch)}\n{json.dumps(test)}\n")

    monkeypatch.setattr(many, "fit", fake)
    return made


def by_seed(config: TrainConfig) -> float:
    """The base learns more by cut-out, and each seed more than the one before."""
    return 0.5 + 0.01 * config.seed**2 - (0.1 - 0.02 * config.seed) * ("augment.cutout=0" in config.change)


def everything_shown(result: AblationResult, heard: Heard) -> str:
    files = [path.read_text() for path in Path("all").glob("ablation.*")]
    assert len(files) == 2
    return "\n".join([*files, *heard.messages, str(ablation_table(result)), *result.notes])


def test_differences_are_paired_by_seed(data: str, monkeypatch: pytest.MonkeyPatch) -> None:
    made = fake_fit(monkeypatch, by_seed)
    heard = Heard()
    base = config(data, change=("cutout=4",))
    result = ablate(base, (0, 1, 3), without=("cutout",), variants=("lr=0.1  warmup=0",), reporter=heard)
    names = ["base", "without cutout", "lr=0.1 warmup=0"]
    assert [row.name for row in result.rows] == names
    # every variant has its first seed before any has its second
    assert [(run.seed, run.change[0]) for run in made] == [
        (seed, first) for seed in (0, 1, 3) for first in ("cutout=4", "augment.cutout=0", "cutout=4")
    ]
    assert {run.split for run in made} == {"holdout"}
    without = [0.4, 0.43, 0.55]
    plain = [0.5, 0.51, 0.59]
    first, cut, other = result.rows
    assert list(cut.accuracies.values()) == pytest.approx(without)
    assert first.accuracy is not None
    assert first.accuracy.mean == pytest.approx(np.mean(plain))
    assert (first.difference, first.seconds_difference) == (None, None)
    assert cut.difference is not None
    assert cut.difference.mean == pytest.approx(np.mean(without) - np.mean(plain))
    interval = stats.ttest_rel(without, plain).confidence_interval(0.95)
    assert cut.difference.interval95 == pytest.approx((interval.low, interval.high))
    assert cut.seconds_difference is not None
    assert cut.seconds_difference.mean == pytest.approx(100 * cut.difference.mean)
    assert other.difference is not None
    assert other.difference.interval95 == (0.0, 0.0)
    table = ablation_table(result)
    assert table[0] == ("variant", "validation accuracy", "difference", "95 % interval", "train s", "difference s")
    assert table[1] == ("base", "53.33 %", "", "", "53.33", "")
    assert table[2][:3] == ("without cutout", "46.00 %", "-7.33")
    assert table[2][3] == f"{100 * interval.low:+.2f} to {100 * interval.high:+.2f}"
    assert table[2][4:] == ("46.00", "-7.33")
    stored = json.loads(Path("all/ablation.json").read_text())
    assert [row["name"] for row in stored["rows"]] == names
    assert stored["rows"][1]["difference"]["mean"] == cut.difference.mean
    assert {run["state"] for run in stored["runs"]} == {"done"}
    markdown = Path("all/ablation.md").read_text().splitlines()
    assert markdown[0] == "# tiny on noise, tested, changed: cutout=4"
    assert f"| {' | '.join(table[2])} |" in markdown
    assert result.exit_status == 0
    assert [line for line in heard.messages if line.startswith("without cutout, seed 1")] == [
        "without cutout, seed 1: validation accuracy 43.00 %, 43.00 s of training; 5 of 9 runs ended"
    ]
    shown = everything_shown(result, heard)
    assert "validation images; the test images play no part" in shown
    assert "0.1234" not in shown
    assert "12.3" not in shown


def test_the_figure_is_the_last_epochs_of_the_validation_images(data: str) -> None:
    result = ablate(config(data, epochs=2), (1,), without=("flip",))
    for row, change in zip(result.rows, ((), ("flip=none",)), strict=True):
        alone = fit(config(data, epochs=2, seed=1, split="holdout", change=change, out=Path(f"alone-{len(change)}")))
        assert alone.history[-1].evaluated == "validation"
        assert row.accuracies == {1: alone.history[-1].eval_accuracy}
    assert {path.name for path in Path("all").iterdir()} == {
        *("0-base", "1-without-flip", "ablation.json", "ablation.md", "config.json", "environment.json", ".lock")
    }
    assert Path("all/1-without-flip/seed-1/report.html").exists()


def test_without_validation_images_it_is_the_test_and_says_so(data: str, monkeypatch: pytest.MonkeyPatch) -> None:
    fake_fit(monkeypatch, lambda config: 0.9)
    result = ablate(config(data, split="full"), (0,), without=("flip",))
    assert result.evaluated == "test"
    assert result.rows[0].accuracies == {0: SECRET}
    assert ablation_table(result)[0][1] == "test accuracy"
    assert "accuracies are of the test images: split full has no validation images" in result.notes


def test_a_run_that_ends_on_reduced_images_says_so(data: str, monkeypatch: pytest.MonkeyPatch) -> None:
    fake_fit(monkeypatch, lambda config: 0.9)
    result = ablate(config(data), (0,), variants=("resolutions=20:0.5,17:0.5", "resolutions=20:0.5"))
    said = [note for note in result.notes if "pixels" in note]
    assert said == ["resolutions=20:0.5,17:0.5, seed 0 ended at 17 pixels a side, which its accuracy is of too"]


def test_a_variant_that_diverges_is_a_row_and_not_tried_again(data: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def accuracy(config: TrainConfig) -> float:
        if "lr=9" in config.change or ("lr=2" in config.change and config.seed == 1):
            raise DivergedError("the training loss became nan")
        if not config.change and config.seed == 3:
            raise DivergedError("the base's too")
        return by_seed(config)

    made = fake_fit(monkeypatch, accuracy)
    result = ablate(config(data), (0, 1, 2, 3), variants=("lr=9", "lr=2"))
    assert result.exit_status == 3
    base, always, once = result.rows
    assert base.errors == {3: "diverged: the base's too"}
    assert always.accuracy is None
    assert always.difference is None
    assert always.errors[2] == "diverged: the training loss became nan"
    assert list(once.accuracies) == [0, 2, 3]
    assert once.difference is not None
    assert (once.difference.count, once.difference.mean) == (2, 0.0)  # neither seed 1 nor the base's 3 is half a pair
    table = ablation_table(result)
    assert table[2] == ("lr=9", "diverged", "", "", "", "")
    assert table[3][1] == "54.33 % (1 diverged)"
    assert "lr=2, seed 1 diverged: the training loss became nan" in result.notes
    made.clear()
    assert ablate(TrainConfig(resume=Path("all"))) == result
    assert made == []


def test_each_way_to_end_is_counted_for_itself() -> None:
    row = AblationRow(
        name="x",
        changes=(),
        accuracies={0: 0.5},
        seconds={0: 1.0},
        errors={1: "diverged: nan", 2: "failed: the disk is full"},
        accuracy=None,
        difference=None,
        train_seconds=None,
        seconds_difference=None,
    )
    rows = (row, dataclasses.replace(row, accuracy=estimate([0.5])))
    result = AblationResult(path=Path(), title="", evaluated=None, rows=rows, notes=(), exit_status=3)
    assert [cells[1] for cells in ablation_table(result)[1:]] == ["diverged, failed", "50.00 % (1 diverged, 1 failed)"]


def test_what_failed_or_was_stopped_is_done_again_and_no_more(data: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(config: TrainConfig) -> float:
        if config.seed == 1 and config.change:
            os.kill(os.getpid(), signal.SIGINT)
            raise StoppedError("stopped by SIGINT after step 1 of 4, saved", 130)  # as `fit` does then
        if config.change == ("lr=2",):
            raise FastcifarError("cpu has too little memory")
        return by_seed(config)

    fake_fit(monkeypatch, fail)
    with pytest.raises(StoppedError, match=r"4 of 6 runs have ended, .* go on with: fastcifar ablate --resume all$"):
        ablate(config(data), (0, 1), variants=("lr=2", "lr=3"))
    stored = json.loads(Path("all/ablation.json").read_text())
    assert [run["state"] for run in stored["runs"]] == ["done", "failed", "done", "done", "unfinished", "unfinished"]
    assert "| lr=2 | failed |" in Path("all/ablation.md").read_text()
    made = fake_fit(monkeypatch, by_seed)
    result = ablate(TrainConfig(resume=Path("all")), (0, 1))
    assert [(run.change, run.seed) for run in made] == [(("lr=2",), 0), (("lr=2",), 1), (("lr=3",), 1)]
    assert all(row.accuracy is not None and row.accuracy.count == 2 for row in result.rows)
    for options, message in (
        ({"without": ("flip",)}, "without and variant cannot be given with resume"),
        ({"variants": ("lr=1",)}, "without and variant cannot be given with resume"),
        ({"seeds": (0,)}, "seeds 0 differ from the folder's 0,1"),
    ):
        with pytest.raises(ConfigError, match=message):
            ablate(TrainConfig(resume=Path("all")), **options)  # type: ignore[arg-type]
    with pytest.raises(CheckpointError, match=r"all/0-base is no folder of ablate: ablation\.json: No such .*ory$"):
        ablate(TrainConfig(resume=Path("all/0-base")))
    Path("all/0-base/config.json").touch()  # a run
    with pytest.raises(CheckpointError, match=r"ory; what it is goes on with fastcifar train --resume all/0-base$"):
        ablate(TrainConfig(resume=Path("all/0-base")))


@pytest.mark.parametrize("variants", [None, [{"name": "base"}], [0], 3])
def test_a_damaged_record_is_said(data: str, monkeypatch: pytest.MonkeyPatch, variants: Any) -> None:
    fake_fit(monkeypatch, by_seed)
    ablate(config(data), (0,), variants=("lr=2",))
    stored = json.loads(Path("all/ablation.json").read_text())
    Path("all/ablation.json").write_text(json.dumps({**stored, "variants": variants}))
    with pytest.raises(CheckpointError, match=r"ablation\.json is damaged: no variants with a name and changes"):
        ablate(TrainConfig(resume=Path("all")))


def test_what_fails_for_all_is_said_once_and_leaves_no_folder(data: str) -> None:
    with pytest.raises(ConfigError, match="unknown arch 'huge'"):
        ablate(config(data, arch="huge"), (0, 1), without=("flip",))
    assert not Path("all").exists()


def test_runs_side_by_side_are_asked_for(data: str, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[int] = []

    def side_by_side(members: Any, parallel: int, reporter: Any) -> Any:
        asked.append(parallel)
        yield from many._in_turn(members, reporter, lines=True)

    monkeypatch.setattr(many, "_side_by_side", side_by_side)
    fake_fit(monkeypatch, by_seed)
    assert ablate(config(data), (0,), without=("flip",), parallel=2).exit_status == 0
    assert asked == [2]


def test_each_ingredient_is_left_out_where_nothing_is_named() -> None:
    plan = plan_variants(TrainConfig(recipe="report", change=("cutout=8", "schedule=cosine")), (), ())
    assert plan == {
        "base": (),
        "without drop_last": ("drop_last=yes",),
        "without schedule": ("schedule=constant",),
        "without scaling": ("scaling=standardize",),
        "without cutout": ("augment.cutout=0",),
    }
    tested = plan_variants(TrainConfig(recipe="tested"), (), ())
    assert {"without label_smoothing", "without flip", "without crop", "without resolutions"} <= tested.keys()
    assert tested["without resolutions"] == ("resolutions=none",)
    plain = ("drop_last=yes", "scaling=standardize", "tta=flip")
    with pytest.raises(ConfigError, match="recipe 'report' has no ingredient to leave out: give --variant"):
        plan_variants(TrainConfig(recipe="report", change=plain), (), ())


def test_a_variants_changes_have_the_last_word() -> None:
    base = TrainConfig(recipe="tested", epochs=4, lr=0.5, change=("cutout=8", "warmup=0.5"))
    varied = vary(base, ("lr=0.1", "augment.cutout=0"))
    assert (varied.epochs, varied.lr) == (4, None)
    assert varied.change == ("warmup=0.5", "lr=0.1", "augment.cutout=0")
    recipe = resolve(varied)
    assert (recipe.lr, recipe.augment.cutout, recipe.warmup, recipe.epochs) == (0.1, 0, 0.5, 4)
    assert vary(base, ()) == base


@pytest.mark.parametrize(
    ("without", "variants", "message"),
    [
        (("lr",), (), "without 'lr': lr has no default to go back to: give a value with --variant"),
        (("cutout",), (), "without 'cutout': the recipe has the default, augment.cutout=0, already"),
        (("cutuot",), (), "a recipe has no field 'cutuot': perhaps you meant augment.cutout"),
        (("flip", "augment.flip"), (), "variant 'without flip' is given twice"),
        ((), ("lr=1", " lr=1 "), "variant 'lr=1' is given twice"),
        ((), ("lr=1 lr=2",), "names lr a second time"),
        ((), ("lr",), "change 'lr' must be FIELD=VALUE"),
        ((), ("lr=0",), "lr must be a number above 0"),
        ((), ("weight_decay=0.005",), "variant 'weight_decay=0.005' is the base itself: it changes nothing"),
        ((), ("",), "variant '' is the base itself"),
        ((), ("split=report",), "variant 'split=report' has another split than the base, full: give --split for all"),
    ],
)
def test_a_wrong_variant_is_one_line(without: tuple[str, ...], variants: tuple[str, ...], message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        plan_variants(TrainConfig(recipe="tested"), without, variants)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_the_command_prints_lines_then_the_table(
    data: str, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    made = fake_fit(monkeypatch, by_seed)
    arguments = [
        "--dataset",
        data,
        "--arch",
        "tiny",
        "--recipe",
        "tested",
        "--epochs",
        "1",
        "--batch-size",
        "16",
        "--device",
        "cpu",
    ]
    variants = ["--without", "flip", "crop", "--variant", "lr=1", "--variant", "optimizer=adam lr=0.01"]
    assert main(["ablate", *arguments, *variants, "--change", "cutout=4", "--out", "all"]) == 0
    lines = capfd.readouterr().out.splitlines()
    assert lines[0] == "the base and 4 variants, 3 seeds each, in all"
    table = lines[lines.index("tiny on noise, tested, changed: cutout=4") :]
    assert [line.split("  ")[0] for line in table[2:7]] == [
        "base",
        "without flip",
        "without crop",
        "lr=1",
        "optimizer=adam lr=0.01",
    ]
    assert table[-1] == "written to all"
    assert {run.seed for run in made} == {0, 1, 2}
    made.clear()
    assert main(["ablate", "--resume", "all"]) == 0
    assert capfd.readouterr().out.splitlines()[1:] == table
    assert made == []
    assert main(["ablate", "--resume", "all", "--epochs", "2"]) == 2
    assert "epochs 2 differs from the run's 1" in capfd.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--seed", "3"], "unrecognized options: --seed, 3: perhaps you meant --seeds"),
        (["--seeds", "x"], "seeds must be whole numbers such as 0..4 or 0,3,7, got 'x'"),
        (["--without", "flip", "--without", "crop"], "--without is given twice: write all its values after one"),
        (["--without", "cutuot"], "perhaps you meant augment.cutout"),
        (["--resume", "nowhere"], "nowhere is not a run: config.json: No such file or directory"),
    ],
)
def test_wrong_options_are_one_line(
    arguments: list[str], message: str, capfd: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    assert main(["ablate", *arguments]) == 2
    out, err = capfd.readouterr()
    assert (out, err.count("\n")) == ("", 1)
    assert message in err
    assert not list(tmp_path.iterdir())


def test_the_split_of_a_recipe_gives_way_to_holdout_unless_named(data: str, monkeypatch: pytest.MonkeyPatch) -> None:
    made = fake_fit(monkeypatch, by_seed)
    ablate(config(data), (0,), without=("flip",))
    ablate(config(data, change=("split=full",), out=Path("other")), (0,), without=("flip",))
    assert [resolve(run).split for run in made] == ["holdout"] * 2 + ["full"] * 2
