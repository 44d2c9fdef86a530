"""What README.md shows works as it stands."""

import re
from pathlib import Path

import pytest

README = (Path(__file__).parent.parent / "README.md").read_text(encoding="utf-8")


def test_the_python_examples_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("FASTCIFAR_HOME", str(tmp_path / "home"))
    first, *others = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    names: dict[str, object] = {}
    exec(first, names)
    assert names["images"].shape == (512, 3, 32, 32)  # type: ignore[attr-defined]
    assert names["label"] == names["store"].labels[names["store"].split("train").rows.start + 7]  # type: ignore[attr-defined]
    assert names["result"].test.samples == 359  # type: ignore[attr-defined]
    for example in others:
        exec(example, {})


@pytest.mark.parametrize(
    ("page", "some"),
    [("README.md", {"CHANGELOG.md", "benchmarks/README.md"}), ("benchmarks/README.md", {"../README.md"})],
)
def test_links_and_pictures_exist(page: str, some: set[str]) -> None:
    path = Path(__file__).parent.parent / page
    targets = re.findall(r"\]\(([^)#]+)(?:#[^)]*)?\)", path.read_text(encoding="utf-8"))
    own = [target for target in targets if "://" not in target]
    assert some <= set(own)
    assert [target for target in own if not (path.parent / target).exists()] == []


@pytest.mark.parametrize("tool", ["tools/report_table", "tools/bench_table", "tools/console_picture"])
def test_tools_it_names_can_be_run(tool: str) -> None:
    import os

    path = Path(__file__).parent.parent / tool
    assert os.access(path, os.X_OK)
    assert path.read_text(encoding="utf-8").startswith("#!/usr/bin/env python3\n")
