"""Without a network: whatever keeps silent, hangs or refuses, it is said within seconds, in one line."""

import hashlib
import socket
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from fastcifar.commands import main
from fastcifar.data import download, reach
from fastcifar.data.download import fetch
from fastcifar.errors import DownloadError

CONTENT = b"content" * 1000
SHA256 = hashlib.sha256(CONTENT).hexdigest()
FIRST, SECOND = "https://first.invalid/a.tar.gz", "https://second.invalid/a.tar.gz"
REACH = 0.5


@pytest.fixture(autouse=True)
def _direct(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("http_proxy", "https_proxy", "all_proxy", "no_proxy"):
        monkeypatch.delenv(name, raising=False)
        monkeypatch.delenv(name.upper(), raising=False)
    monkeypatch.setattr(reach, "REACH", REACH)


@pytest.fixture
def release() -> Iterator[threading.Event]:
    """Lets go of what hangs, when the test is over."""
    event = threading.Event()
    yield event
    event.set()


def get(folder: Path, *urls: str) -> str:
    return fetch(urls, folder / "a.tar.gz", sha256=SHA256, size=len(CONTENT))


def reasons(folder: Path, *urls: str) -> list[str]:
    """Why each address did not give the file, and that it was not long in coming."""
    started = time.monotonic()
    with pytest.raises(DownloadError) as caught:
        get(folder, *urls)
    assert time.monotonic() - started < REACH + 2  # the machine may be busy
    assert "\n" not in str(caught.value)
    return str(caught.value).split("; ")


@pytest.mark.parametrize("what", ["getaddrinfo", "create_connection"])
def test_a_resolver_or_host_that_hangs_is_given_up(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, release: threading.Event, what: str
) -> None:
    def hang(*arguments: Any, **options: Any) -> Any:
        release.wait(60)
        raise OSError("too late")

    monkeypatch.setattr(socket, what, hang)
    urls = [f"https://{number}.invalid/a" for number in range(10)]
    assert reasons(tmp_path, *urls) == [f"{url} cannot be reached: no answer in {REACH:g} s" for url in urls]
    assert list(tmp_path.iterdir()) == []


def test_all_addresses_are_tried_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    together = threading.Barrier(3)

    def connect(address: tuple[str, int], timeout: float) -> Any:
        together.wait(REACH)  # breaks where one waits for another
        raise OSError(f"{address[0]} says no")

    monkeypatch.setattr(socket, "create_connection", connect)
    found = reasons(tmp_path, FIRST, SECOND, "https://third.invalid:444/a")
    assert [reason.partition("reached: ")[2] for reason in found] == [
        "first.invalid says no",
        "second.invalid says no",
        "third.invalid says no",
    ]


def test_a_host_that_refuses_is_said_with_its_reason(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as closed:
        port = closed.getsockname()[1]
    found = reasons(tmp_path, f"https://127.0.0.1:{port}/a", f"https://localhost:{port}/a", "https://a..b/")
    assert ["refused" in reason for reason in found] == [True, True, False]
    assert all("cannot be reached: " in reason for reason in found)


@pytest.fixture
def probed(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The hosts that were looked for; none is found."""
    hosts: list[str] = []

    def connect(self: Any) -> None:
        hosts.append(self._host)
        self._reason = "not there"

    monkeypatch.setattr(reach.Probe, "_connect", connect)
    return hosts


def test_a_proxy_is_not_passed_by(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, probed: list[str]) -> None:
    with socket.create_server(("127.0.0.1", 0)) as closed:
        monkeypatch.setenv("https_proxy", f"http://127.0.0.1:{closed.getsockname()[1]}")
    [reason] = reasons(tmp_path, FIRST)  # of the proxy
    assert "refused" in reason
    assert probed == []
    monkeypatch.setenv("no_proxy", "first.invalid")
    assert reasons(tmp_path, FIRST) == [f"{FIRST} cannot be reached: not there"]
    assert probed == ["first.invalid"]
    monkeypatch.delenv("https_proxy")
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:9")  # has nothing to say about https
    assert reasons(tmp_path, SECOND) == [f"{SECOND} cannot be reached: not there"]
    assert probed == ["first.invalid", "second.invalid"]


def test_a_whole_part_needs_no_network_and_asks_for_none(tmp_path: Path, probed: list[str]) -> None:
    (tmp_path / "a.tar.gz.part").write_bytes(CONTENT)
    assert get(tmp_path, FIRST, SECOND) == FIRST
    assert probed == []
    assert [path.name for path in tmp_path.iterdir()] == ["a.tar.gz"]


def test_a_whole_part_that_is_wrong_is_dropped_before_anything_is_probed(tmp_path: Path, probed: list[str]) -> None:
    (tmp_path / "a.tar.gz.part").write_bytes(CONTENT[::-1])
    assert reasons(tmp_path, FIRST, SECOND) == [f"{url} cannot be reached: not there" for url in (FIRST, SECOND)]
    assert probed == ["first.invalid", "second.invalid"]
    assert list(tmp_path.iterdir()) == []


def test_a_part_is_kept_for_when_there_is_a_network(tmp_path: Path, probed: list[str]) -> None:
    part, notes = tmp_path / "a.tar.gz.part", tmp_path / "a.tar.gz.part.json"
    part.write_bytes(CONTENT[:100])
    notes.write_text(f'{{"url": "{SECOND}", "etag": "\\"1\\""}}')
    before = notes.read_bytes()
    assert len(reasons(tmp_path, FIRST, SECOND)) == 2
    assert sorted(probed) == ["first.invalid", "second.invalid"]
    assert (part.read_bytes(), notes.read_bytes()) == (CONTENT[:100], before)


def test_after_a_long_first_try_the_second_address_is_looked_for_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, probed: list[str]
) -> None:
    monkeypatch.setattr(reach, "REACH", 0.01)

    def slow(wanted: Any, sha256: str) -> None:
        time.sleep(0.05)
        raise download._FetchError("broke off")

    monkeypatch.setattr(download, "_fetch", slow)
    with pytest.raises(DownloadError):
        get(tmp_path, FIRST, SECOND)
    assert probed.count("second.invalid") == 2


@pytest.mark.parametrize("hanging", [False, True], ids=["no network", "a silent one"])
def test_the_command_says_what_to_do_instead(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
    release: threading.Event,
    hanging: bool,
) -> None:
    def resolve(*arguments: Any, **options: Any) -> Any:
        if hanging:
            release.wait(60)
        raise socket.gaierror(socket.EAI_NONAME, "Name or service not known")

    monkeypatch.setattr(socket, "getaddrinfo", resolve)
    monkeypatch.setenv("FASTCIFAR_HOME", str(tmp_path / "home"))
    monkeypatch.chdir(tmp_path)
    assert main(["train", "--dataset", "cifar10"]) == 2
    out, error = capfd.readouterr()
    assert (out, error.count("\n")) == ("", 1)
    said = f"no answer in {REACH:g} s" if hanging else "Name or service not known"
    for part in (said, "cs.toronto.edu", "dataset.bj.bcebos.com", "by hand", "--data PATH", "--dataset digits"):
        assert part in error
    assert [path.name for path in tmp_path.iterdir()] == ["home"]
