"""Pages drawn by processes of their own are those drawn here, and are there whatever becomes of the processes."""

import errno
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fastcifar import child, page_worker
from fastcifar.config import TrainConfig
from fastcifar.errors import OutputError
from fastcifar.metrics import Mistakes
from fastcifar.outcome import Pages
from fastcifar.page_worker import Drawers, draw_with, write_pages
from fastcifar.recipes import resolve
from fastcifar.runs import Run
from tests.sample_stats import CIFAR10, make_epochs, make_result


@pytest.fixture(autouse=True)
def _drawn_here_afterwards() -> Iterator[None]:
    yield
    draw_with(None)


def make_run(path: Path) -> Run:
    config = TrainConfig(arch="small", change=("augment.crop=2", "resolutions=20:0.5"), out=path)
    path.mkdir(exist_ok=True)
    return Run(path=path, config=config, recipe=resolve(config))


def pages(path: Path, done: int = 1, **others: Any) -> Pages:
    images = np.random.default_rng(0).integers(0, 256, (9, 32, 32, 3), np.uint8)
    wrong = Mistakes(images=images, truth=CIFAR10[:9], taken_for=CIFAR10[1:], wrong=1234)
    told: dict[str, Any] = {"environment": {"python": "3.11", "gpus": []}, "choices": (("device", "cpu"),)}
    history = make_epochs(done, epochs=max(done, 1))
    return Pages(run=make_run(path), history=history, result=make_result(), **{**told, "mistakes": wrong, **others})


def written(path: Path) -> dict[str, bytes]:
    return {str(file.relative_to(path)): file.read_bytes() for file in path.rglob("*") if file.is_file()}


def test_they_are_byte_for_byte_those_drawn_here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with Drawers(1) as drawers, monkeypatch.context() as patched:
        patched.setattr(Pages, "write", lambda pages: pytest.fail("drawn here"))
        draw_with(drawers)
        write_pages(pages(tmp_path / "a", 3))
        write_pages(pages(tmp_path / "b", mistakes=None))
    pages(tmp_path / "c", 3).write()
    there, here = written(tmp_path / "a"), written(tmp_path / "c")
    assert set(there) == {
        "report.html",
        *(f"figures/{name}.png" for name in ("loss", "accuracy", "confusion", "mistakes")),
    }
    # the folder's name is nowhere but in the configuration
    assert {**there, "report.html": there["report.html"].replace(b"/a&quot;", b"/c&quot;")} == here
    assert "figures/mistakes.png" not in written(tmp_path / "b")


def test_what_cannot_be_written_is_an_error_here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = make_run(tmp_path / "run")
    (run.path / "figures").write_text("in the way")
    monkeypatch.setattr(Pages, "write", lambda pages: pytest.fail("drawn here"))
    with Drawers(1) as drawers:
        draw_with(drawers)
        with pytest.raises(OutputError, match=r"run/figures.* cannot be written") as there:
            write_pages(pages(run.path))
        (run.path / "figures").unlink()
        write_pages(pages(run.path))  # the process goes on
    assert "\n" not in str(there.value)


SAYS = (
    "import json, sys\nfor line in sys.stdin: print(json.dumps({'number': json.loads(line)['number'], %s}), flush=True)"
)
CLAIMS = SAYS % "'drawn': True, 'error': None"
GONE = {
    "at once": "",
    "when it is asked": "import sys; sys.stdin.readline(); raise SystemExit(9)",
    "out of step": "import sys\nprint('3', flush=True)\nfor line in sys.stdin: print(line, flush=True)",
    "with a fault": SAYS % "'drawn': False, 'error': None",
}


@pytest.mark.parametrize("way", GONE)
@pytest.mark.parametrize("count", [1, 2])
def test_where_a_process_is_gone_they_are_drawn_here(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, way: str, count: int
) -> None:
    monkeypatch.setattr(page_worker, "_CODE", GONE[way])
    drawn: list[Path] = []
    monkeypatch.setattr(Pages, "write", lambda pages: drawn.append(pages.run.path))
    with Drawers(count) as drawers:
        draw_with(drawers)
        for name in ("a", "b", "c"):
            write_pages(pages(tmp_path / name))
    assert drawn == [tmp_path / name for name in ("a", "b", "c")]


def test_the_block_waits_for_no_process(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(page_worker, "_CODE", "import time; time.sleep(600)")
    monkeypatch.setattr(Pages, "write", lambda pages: None)

    def ask() -> None:
        draw_with(drawers)
        write_pages(pages(tmp_path / "a"))

    threads = [threading.Thread(target=ask, daemon=True) for _ in range(2)]  # one is asked, one waits for its turn
    with Drawers(1) as drawers:
        for thread in threads:
            thread.start()
        time.sleep(0.5)
        assert all(thread.is_alive() for thread in threads)
    for thread in threads:
        thread.join(60)
        assert not thread.is_alive()


def test_a_system_that_gives_no_process_draws_here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(code: str) -> None:
        raise BlockingIOError(errno.EAGAIN, "Resource temporarily unavailable")

    monkeypatch.setattr(child, "start", refused)
    with Drawers(2) as drawers:
        draw_with(drawers)
        write_pages(pages(tmp_path / "a"))
    assert "report.html" in written(tmp_path / "a")


def test_only_the_thread_that_asks_leaves_them_to_others(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(page_worker, "_CODE", CLAIMS)
    drawn: list[Path] = []
    monkeypatch.setattr(Pages, "write", lambda pages: drawn.append(pages.run.path))

    def elsewhere() -> None:
        draw_with(drawers)
        write_pages(pages(tmp_path / "a"))

    with Drawers(1) as drawers:
        thread = threading.Thread(target=elsewhere)
        thread.start()
        thread.join()
        write_pages(pages(tmp_path / "b"))
    assert drawn == [tmp_path / "b"]
