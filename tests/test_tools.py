import subprocess
import sys
from pathlib import Path

import pytest

from fastcifar.reporter import JsonLinesReporter
from tests.sample_stats import make_epochs, make_result, make_summary

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT / "tools"))

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
