import os
import sys
from pathlib import Path
from types import FrameType
from typing import Any

import pytest

from fastcifar import publish as publishing
from fastcifar.publish import publish_bytes, publish_folder, publish_json, remove_stale


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_bytes_replace_the_old_file(tmp_path: Path) -> None:
    publish_bytes(tmp_path / "a", b"old")
    publish_bytes(tmp_path / "a", b"new")
    assert (tmp_path / "a").read_bytes() == b"new"
    assert names(tmp_path) == ["a"]


@pytest.mark.parametrize("failing", ["fsync", "replace"])
def test_a_failing_write_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, failing: str) -> None:
    publish_bytes(tmp_path / "a", b"old")

    def fail(*arguments: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, failing, fail)
    with pytest.raises(OSError, match="No space"):
        publish_bytes(tmp_path / "a", b"new")
    assert (tmp_path / "a").read_bytes() == b"old"
    assert names(tmp_path) == ["a"]


def test_a_folder_is_there_whole_or_not_at_all(tmp_path: Path) -> None:
    with publish_folder(tmp_path / "x" / "done") as folder:
        (folder / "sub").mkdir()
        (folder / "sub" / "file").write_text("1")
        assert not (tmp_path / "x" / "done").exists()
    assert (tmp_path / "x" / "done" / "sub" / "file").read_text() == "1"
    with pytest.raises(RuntimeError, match="half way"), publish_folder(tmp_path / "x" / "half") as folder:
        (folder / "file").write_text("1")
        raise RuntimeError("half way")
    assert names(tmp_path / "x") == ["done"]
    with pytest.raises(RuntimeError, match="half way"), publish_folder(tmp_path / "x" / "y" / "z" / "half"):
        raise RuntimeError("half way")
    assert names(tmp_path / "x") == ["done"]  # nor the folders above it


def test_what_failed_is_the_target_not_its_temporary(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError) as found:
        publish_bytes(tmp_path / "none" / "a", b"")
    assert found.value.filename == str(tmp_path / "none" / "a")
    with pytest.raises(FileNotFoundError) as found, publish_folder(tmp_path / "b") as folder:
        (folder / "sub" / "file").write_text("1")
    assert found.value.filename == str(tmp_path / "b" / "sub" / "file")
    assert names(tmp_path) == []


def test_the_first_of_two_publishers_wins(tmp_path: Path) -> None:
    target = tmp_path / "store"
    with publish_folder(target) as second:
        (second / "who").write_text("second")
        with publish_folder(target) as first:
            (first / "who").write_text("first")
    assert (target / "who").read_text() == "first"
    assert names(tmp_path) == ["store"]


def test_permissions_follow_the_umask(tmp_path: Path) -> None:
    before = os.umask(0o022)
    try:
        publish_json(tmp_path / "a.json", {"x": 1})
        with publish_folder(tmp_path / "f"):
            pass
    finally:
        os.umask(before)
    assert (tmp_path / "a.json").stat().st_mode & 0o777 == 0o644
    assert (tmp_path / "f").stat().st_mode & 0o777 == 0o755


def test_stale_temporaries_go_and_nothing_else(tmp_path: Path) -> None:
    (tmp_path / ".tmp-a-123").mkdir()
    (tmp_path / ".tmp-a-123" / "file").write_text("x")
    (tmp_path / ".tmp-b").write_text("x")
    (tmp_path / "keep").write_text("x")
    remove_stale(tmp_path)
    assert names(tmp_path) == ["keep"]


@pytest.mark.parametrize("kind", ["file", "folder"])
def test_an_interruption_at_any_instruction_leaves_no_temporary(
    tmp_path: Path, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "fsync", lambda descriptor: None)  # hundreds of them take a minute

    def publish(path: Path) -> None:
        if kind == "file":
            publish_bytes(path, b"new")
            return
        with publish_folder(path) as folder:
            (folder / "content").write_bytes(b"new")

    def interrupted(moment: int) -> int:
        """The instructions that there are, after publishing with an interruption before number `moment` of them."""
        count, place = 0, tmp_path / str(moment)
        place.mkdir()

        def trace(frame: FrameType, event: str, value: object) -> Any:
            nonlocal count
            if frame.f_code.co_filename != publishing.__file__:
                return None
            frame.f_trace_opcodes = True
            count += event == "opcode"
            if event == "opcode" and count == moment:
                raise KeyboardInterrupt
            return trace

        tracing = sys.gettrace()
        sys.settrace(trace)
        try:
            publish(place / "it")
        except KeyboardInterrupt:
            assert moment
        finally:
            sys.settrace(tracing)
        left = {path.name for path in place.iterdir()}
        assert left <= {"it"}, moment
        whole = place / "it" if kind == "file" else place / "it" / "content"
        assert not left or whole.read_bytes() == b"new"
        return count

    count = interrupted(0)
    assert count > 100
    for moment in range(1, count + 1):
        interrupted(moment)
