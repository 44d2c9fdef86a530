import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from fastcifar.reporter import JsonLinesReporter
from tests.sample_stats import make_epochs, make_result, make_summary

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT / "tools"))

import gpu_tables  # noqa: E402
import readme_tables  # noqa: E402


def sample_run(arch: str, **changes: object) -> dict[str, object]:
    environment = {"cpu": "a CPU", "threads": 1, "gpus": [], "torch": "2.0"}
    run = {
        "arch": arch,
        "recipe": "report",
        "split": "report",
        "epochs": 20,
        "parameters": 5655498,
        "accuracy": 0.70123,
    }
    return (
        run
        | {"train_seconds": 1234.5, "validation": 0.7, "best": "car", "verified": False, "environment": environment}
        | changes
    )


def test_the_report_table_sets_both_beside_each_other() -> None:
    lines = readme_tables.report_table([sample_run("small", parameters=1816714), sample_run("big")])
    assert lines[0] == "|  | Big, the report | Big, fastcifar | Small, the report | Small, fastcifar |"
    assert lines[2] == "| parameters (Table 1) | 5,655,498 | 5,655,498 | 1,816,714 | 1,816,714 |"
    assert lines[3] == "| test accuracy (Table 2) | 72.9 % | 70.12 % | 69.23 % | 70.12 % |"
    assert "on an unverified copy of CIFAR-10" in lines[-1]
    assert "1 CPU thread;" in lines[-1]
    published = readme_tables.report_table([sample_run("big", verified=True)])
    assert "on the published CIFAR-10" in published[-1]


@pytest.fixture
def tool(tmp_path: Path) -> Callable[..., "subprocess.CompletedProcess[str]"]:
    """Runs a copy of `tools/report_table`, whose training is a script that says what it was asked."""
    shutil.copytree(ROOT / "tools", tmp_path / "tools", ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copytree(ROOT / "benchmarks" / "results", tmp_path / "benchmarks" / "results")
    (tmp_path / "benchmarks" / "README.md").write_text("")
    (tmp_path / "README.md").write_text("\n".join(readme_tables.markers("report")))
    (tmp_path / "fastcifar").mkdir()
    (tmp_path / "fastcifar" / "__init__.py").touch()
    (tmp_path / "fastcifar" / "train.py").write_text("import sys; print(*sys.argv[1:]); sys.exit(7)")

    def run(*arguments: str) -> "subprocess.CompletedProcess[str]":
        command = [sys.executable, "tools/report_table", *arguments]
        return subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)

    return run


def test_training_for_the_report_table_goes_on_where_it_stood(tool: Callable[..., Any], tmp_path: Path) -> None:
    done = tool("--train", "--data", "x")
    assert done.returncode == 7
    assert done.stdout == "--recipe report --arch big --out runs/report-big --data x\n"
    assert done.stderr == ""
    (tmp_path / "runs/report-big").mkdir(parents=True)
    (tmp_path / "runs/report-big/metrics.jsonl").write_text('{"kind": "test"}\n')
    (tmp_path / "runs/report-small/checkpoints/00000001").mkdir(parents=True)
    assert tool("--train").stdout == "--resume runs/report-small\n"


def test_runs_of_another_recipe_leave_the_report_table_as_it_is(tool: Callable[..., Any], tmp_path: Path) -> None:
    results = tmp_path / "benchmarks" / "results" / "runs.json"
    before = results.read_bytes()
    run = tmp_path / "run"
    run.mkdir()
    recipe = {"config": {"dataset": "cifar10", "arch": "big", "recipe": "fast", "seed": 0}, "recipe": {"split": "full"}}
    (run / "config.json").write_text(json.dumps(recipe))
    names = ("fastcifar", "torch", "python", "cpu", "threads", "gpus")
    (run / "environment.json").write_text(json.dumps(dict.fromkeys(names, "") | {"data": {"verified": True}}))
    epoch = {"kind": "epoch", "eval_accuracy": 0.5}
    test = {"kind": "test", "class_accuracies": [0.5], "classes": ["cat"], "parameters": 1, "accuracy": 0.5}
    lines = [epoch, test | {"train_seconds": 1.0}]
    (run / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    done = tool("run")
    assert done.stderr == "report_table: none of these runs is of --recipe report, which the tables are of\n"
    assert results.read_bytes() == before


def test_a_gpu_check_of_which_steps_failed_has_tables_too() -> None:
    content = json.loads((ROOT / "benchmarks/results/gpu_check.json").read_text())
    assert len(gpu_tables.gpu_check_table(content)) > 20
    content["steps"] = {name: {"ok": False, "error": "RuntimeError"} for name in content["steps"]}
    (line,) = gpu_tables.gpu_check_table(content)
    assert all(name in line.partition("Failed: ")[2] for name in content["steps"])
    assert len(gpu_tables.gpu_summary_table(content)) == 1


def test_a_block_is_replaced_and_nothing_else() -> None:
    text = "a\n<!-- x table: generated -->\n\nold\n\n<!-- end of x table -->\nb\n"
    once = readme_tables.replace_block(text, "x", ["new"])
    assert once == "a\n<!-- x table: generated -->\n\nnew\n\n<!-- end of x table -->\nb\n"
    assert readme_tables.replace_block(once, "x", ["new"]) == once
    with pytest.raises(ValueError, match="not enough values"):
        readme_tables.replace_block(text, "y", [])


@pytest.mark.parametrize("page", readme_tables.PAGES, ids=lambda page: page.parent.name)
def test_a_page_shows_what_the_results_say(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    assert readme_tables.with_tables(text) == text, "run tools/bench_table"


def test_the_console_picture_is_of_the_run(tmp_path: Path) -> None:
    reporter = JsonLinesReporter(tmp_path / "metrics.jsonl")
    history, result = make_epochs(3), make_result()
    reporter.start(make_summary(), history)
    reporter.finish(result)
    reporter.close()
    picture = tmp_path / "console.svg"
    command = [sys.executable, str(ROOT / "tools" / "console_picture"), str(tmp_path), str(picture)]
    subprocess.run(command, check=True)
    svg = picture.read_text(encoding="utf-8")
    assert svg.startswith("<svg")
    assert f"{100 * result.test.accuracy:.2f}" in svg
    for stats in history:
        assert f"{stats.train_loss:.4f}" in svg
