"""Downloads that go wrong in every way a server can: the file is right in the end, or one line says why not."""

import contextlib
import dataclasses
import errno
import hashlib
import http.server
import json
import random
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from fastcifar.data import archive, download
from fastcifar.data.archive import CIFAR10, find
from fastcifar.data.download import fetch
from fastcifar.errors import DownloadError, OutputError

CONTENT = random.Random(0).randbytes(40_000)
SHA256 = hashlib.sha256(CONTENT).hexdigest()
ETAG = '"version-1"'


class Handler(http.server.BaseHTTPRequestHandler):
    """Answers each request with the next behaviour in its server's script; the last one stays."""

    server: "Server"

    def do_GET(self) -> None:
        self.server.requests.append((self.path, dict(self.headers)))
        script = self.server.script
        (script.pop(0) if len(script) > 1 else script[0])(self)

    def log_message(self, *arguments: object) -> None:
        pass

    def answer(self, status: int, body: bytes = b"", **headers: str | None) -> None:
        """Send it; `Content_Length=None` leaves that header out."""
        self.send_response(status)
        for name, value in ({"Content_Length": str(len(body)), "ETag": ETAG} | headers).items():
            if value is not None:
                self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        self.wfile.write(body)

    def rest(self, **headers: str | None) -> None:
        """What the range asked for holds."""
        start = int(self.headers["Range"].removeprefix("bytes=").removesuffix("-"))
        whole = f"bytes {start}-{len(CONTENT) - 1}/{len(CONTENT)}"
        self.answer(206, CONTENT[start:], **({"Content_Range": whole} | headers))


class Server(http.server.ThreadingHTTPServer):
    script: list[Callable[[Handler], None]]
    requests: list[tuple[str, dict[str, str]]]

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}/a.tar.gz"


def ok(handler: Handler) -> None:
    """All of it, or the range that is asked for if the version still is the same."""
    if "Range" in handler.headers and handler.headers.get("If-Range") == ETAG:
        handler.rest()
    else:
        handler.answer(200, CONTENT)


def whole(handler: Handler) -> None:
    handler.answer(200, CONTENT)


def cut(at: int) -> Callable[[Handler], None]:
    def behave(handler: Handler) -> None:
        handler.answer(200, CONTENT[:at], Content_Length=str(len(CONTENT)))

    return behave


def status(code: int, body: bytes = b"", **headers: str | None) -> Callable[[Handler], None]:
    return lambda handler: handler.answer(code, body, **headers)


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    with Server(("127.0.0.1", 0), Handler) as made:
        made.script, made.requests = [ok], []
        thread = threading.Thread(target=made.serve_forever, args=(0.01,))
        thread.start()
        monkeypatch.setattr(download, "_allowed", lambda url: url.startswith(f"http://127.0.0.1:{made.server_port}/"))
        monkeypatch.setenv("no_proxy", "127.0.0.1")
        yield made
        made.shutdown()
        thread.join()


def get(target: Path, *urls: str, size: int | None = len(CONTENT), sha256: str = SHA256, **options: Any) -> str:
    return fetch(urls, target, sha256=sha256, size=size, **options)


def got(target: Path) -> bool:
    """Whether the right file is there, alone."""
    return target.read_bytes() == CONTENT and list(target.parent.iterdir()) == [target]


def ranges(server: Server) -> list[str | None]:
    return [headers.get("Range") for _, headers in server.requests]


@pytest.fixture
def target(tmp_path: Path) -> Path:
    return tmp_path / "a.tar.gz"


def test_a_plain_download(server: Server, target: Path) -> None:
    seen: list[tuple[int, int | None]] = []
    assert get(target, server.url, progress=lambda done, total: seen.append((done, total))) == server.url
    assert got(target)
    assert seen[-1] == (len(CONTENT), len(CONTENT))
    assert server.requests[0][1]["Accept-Encoding"] == "identity"


def test_progress_is_told_at_most_twenty_times_a_second(
    server: Server, target: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = iter(i * 0.01 for i in range(1, 10**6))
    monkeypatch.setattr(download, "_PIECE", 100)
    monkeypatch.setattr(download.time, "monotonic", lambda: next(clock))
    seen: list[int] = []
    get(target, server.url, progress=lambda done, total: seen.append(done))
    assert 60 <= len(seen) <= 82  # 400 pieces, 100 in a second of the clock, and the end
    assert seen == sorted(seen)
    assert seen[-1] == len(CONTENT)


@pytest.mark.parametrize("at", [0, 1, 511, 512, 1000, *range(2_000, 40_000, 2_533), 39_999])
def test_a_cut_download_goes_on_where_it_stopped(server: Server, target: Path, at: int) -> None:
    server.script = [cut(at), status(404)]
    with pytest.raises(DownloadError):
        get(target, server.url)
    part = target.with_name("a.tar.gz.part")
    assert part.read_bytes() == CONTENT[:at]
    assert not target.exists()
    server.script, server.requests[:] = [ok], []
    get(target, server.url)
    assert got(target)
    assert ranges(server) == ([f"bytes={at}-"] if at else [None])
    assert server.requests[0][1].get("If-Range") == (ETAG if at else None)


def test_a_connection_that_breaks_off_is_taken_up_at_once(server: Server, target: Path) -> None:
    def more(handler: Handler) -> None:
        start = int(handler.headers["Range"][6:-1])
        span = f"bytes {start}-{len(CONTENT) - 1}/{len(CONTENT)}"
        body = CONTENT[start : start + 9_000]
        handler.answer(206, body, Content_Range=span, Content_Length=str(len(CONTENT) - start))

    server.script = [cut(9_000), more, more, ok]
    get(target, server.url)
    assert got(target)
    assert ranges(server) == [None, "bytes=9000-", "bytes=18000-", "bytes=27000-"]


def test_a_connection_that_always_breaks_off_is_given_up(server: Server, target: Path) -> None:
    server.script = [cut(k * 1000) for k in range(1, 20)]
    with pytest.raises(DownloadError, match=r"breaks off after 6000 of 40000 bytes \(6 attempts\)"):
        get(target, server.url)
    server.script = [cut(500)]
    server.requests.clear()
    with pytest.raises(DownloadError, match="breaks off after 500 of 40000 bytes"):
        get(target, server.url)
    assert len(server.requests) < 6


def test_a_whole_file_for_a_range_starts_again(server: Server, target: Path) -> None:
    server.script = [cut(10_000), whole]  # appending it would double the start
    get(target, server.url)
    assert got(target)
    assert ranges(server) == [None, "bytes=10000-"]


def test_another_version_starts_again(server: Server, target: Path) -> None:
    server.script = [lambda h: h.answer(200, b"old" * 1000, Content_Length="40000", ETag='"old"'), ok]
    get(target, server.url)
    assert got(target)
    assert server.requests[1][1]["If-Range"] == '"old"'


@pytest.mark.parametrize("etag", [None, 'W/"weak"', "bare"])
def test_without_a_strong_version_nothing_is_resumed(server: Server, target: Path, etag: str | None) -> None:
    server.script = [lambda h: h.answer(200, CONTENT[:9000], Content_Length="40000", ETag=etag), ok]
    get(target, server.url)
    assert got(target)
    assert ranges(server) == [None, None]


def test_another_address_does_not_resume_the_first(server: Server, target: Path) -> None:
    server.script = [cut(9_000), status(503), ok]
    mirror = server.url + "?mirror"
    assert get(target, server.url, mirror) == mirror
    assert got(target)
    assert ranges(server) == [None, "bytes=9000-", None]


@pytest.mark.parametrize(
    "headers",
    [
        {"Content_Range": "bytes 0-39999/40000"},
        {"Content_Range": "bytes 9999-39999/40000"},
        {"Content_Range": "bytes 10000-39998/40000"},
        {"Content_Range": "bytes 10000-39999/40001"},
        {"Content_Range": "bytes 10000-40000/40001"},
        {"Content_Range": "bytes 10000-39999/*"},
        {"Content_Range": "nonsense"},
        {"Content_Range": None},
        {"ETag": '"version-2"'},
        {"Content_Length": "29999"},
    ],
)
def test_a_wrong_range_is_not_appended(server: Server, target: Path, headers: dict[str, str | None]) -> None:
    server.script = [cut(10_000), lambda h: h.rest(**headers), ok]
    get(target, server.url)
    assert got(target)
    assert ranges(server) == [None, "bytes=10000-", None]


def test_a_range_that_was_not_asked_for_is_refused(server: Server, target: Path) -> None:
    server.script = [status(206, CONTENT, Content_Range="bytes 0-39999/40000")]
    with pytest.raises(DownloadError, match="answers with another range than the one asked for"):
        get(target, server.url)


def test_416_starts_again(server: Server, target: Path) -> None:
    server.script = [cut(10_000), status(416, Content_Range="bytes */5"), ok]
    get(target, server.url)
    assert got(target)
    server.script = [status(416)]
    with pytest.raises(DownloadError, match="answers 416"):
        get(target.with_name("b"), server.url)


def test_a_damaged_part_is_found_by_its_hash_and_fetched_again(server: Server, target: Path) -> None:
    server.script = [cut(10_000), status(404)]
    with pytest.raises(DownloadError):
        get(target, server.url)
    part = target.with_name("a.tar.gz.part")
    part.write_bytes(b"\0" + part.read_bytes()[1:])
    server.script, server.requests[:] = [ok], []
    get(target, server.url)
    assert got(target)
    assert ranges(server) == ["bytes=10000-", None]


@pytest.mark.parametrize("right", [True, False])
def test_a_whole_part_is_only_checked(server: Server, target: Path, right: bool) -> None:
    part = target.with_name("a.tar.gz.part")
    part.write_bytes(CONTENT if right else bytes(len(CONTENT)))
    get(target, server.url)
    assert got(target)
    assert len(server.requests) == (0 if right else 1)


@pytest.mark.parametrize("size", [len(CONTENT), None])
def test_a_wrong_file_is_refused_and_the_next_address_tried(server: Server, target: Path, size: int | None) -> None:
    wrong = bytes(len(CONTENT))
    server.script = [status(200, wrong)]
    found = hashlib.sha256(wrong).hexdigest()
    with pytest.raises(DownloadError, match=rf"a\.tar\.gz gives a file with SHA-256 {found}, expected {SHA256}"):
        get(target, server.url, size=size)
    assert list(target.parent.iterdir()) == []
    server.script = [status(200, wrong), ok]
    assert get(target, server.url, server.url + "?2", size=size) == server.url + "?2"
    assert got(target)


@pytest.mark.parametrize("body", [CONTENT + b"x", CONTENT[:-1], b"<html>sign in</html>", b""])
def test_another_length_is_refused_before_it_is_fetched(server: Server, target: Path, body: bytes) -> None:
    server.script = [status(200, body)]
    with pytest.raises(DownloadError, match=f"offers {len(body)} bytes, expected 40000"):
        get(target, server.url)


def test_an_encoding_is_named(server: Server, target: Path) -> None:
    server.script = [status(200, b"packed twice", Content_Encoding="gzip")]
    with pytest.raises(DownloadError, match="offers 12 bytes in the encoding gzip, expected 40000"):
        get(target, server.url)
    # some servers call a .tar.gz file "encoded" and send it as it is: the hash decides
    server.script = [status(200, CONTENT, Content_Encoding="x-gzip")]
    get(target, server.url)
    assert got(target)


@pytest.mark.parametrize("size", [len(CONTENT), None])
def test_a_reply_without_length(server: Server, target: Path, size: int | None) -> None:
    server.script = [status(200, CONTENT, Content_Length=None)]
    get(target, server.url, size=size)
    assert got(target)


def test_a_reply_without_length_or_end_is_bounded(
    server: Server, target: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    server.script = [status(200, CONTENT + bytes(10**6), Content_Length=None)]
    with pytest.raises(DownloadError, match="sends more than 40000 bytes"):
        get(target, server.url)
    monkeypatch.setattr(download, "_MAX_SIZE", 50_000)
    with pytest.raises(DownloadError, match="sends more than 50000 bytes"):
        get(target, server.url, size=None)
    server.script = [status(200, CONTENT[:-5], Content_Length=None)]
    with pytest.raises(DownloadError, match="breaks off after 39995 of 40000 bytes"):
        get(target, server.url)


def test_a_chunked_reply_that_is_cut(server: Server, target: Path) -> None:
    def chunks(handler: Handler) -> None:
        handler.protocol_version = "HTTP/1.1"
        handler.close_connection = True
        handler.answer(200, b"2710\r\n" + CONTENT[:10_000] + b"\r\n", Content_Length=None, Transfer_Encoding="chunked")

    server.script = [chunks, ok]
    get(target, server.url)
    assert got(target)
    assert ranges(server)[1] in {"bytes=10000-", None}


def test_redirects_stay_on_allowed_addresses(server: Server, target: Path) -> None:
    elsewhere = f"http://localhost:{server.server_port}/a.tar.gz"
    server.script = [status(302, Location=elsewhere), ok]
    with pytest.raises(DownloadError, match=f"a.tar.gz redirects to {elsewhere}, which is not https"):
        get(target, server.url)
    assert len(server.requests) == 1
    server.script = [status(302, Location="/b.tar.gz"), ok]
    get(target, server.url)
    assert got(target)
    assert server.requests[-1][0] == "/b.tar.gz"
    for bad in ("file:///etc/passwd", "ftp://127.0.0.1/x", "//"):
        server.script = [status(301, Location=bad)]
        with pytest.raises(DownloadError):
            get(target.with_name("b"), server.url)
    server.script = [status(302, Location=server.url)]
    with pytest.raises(DownloadError, match="answers 302"):  # round and round
        get(target.with_name("b"), server.url)


def test_only_https_is_allowed(target: Path) -> None:
    for url in ("http://www.cs.toronto.edu/a", "ftp://x/a", "file:///etc/passwd", "data:,a", "//x", ""):
        with pytest.raises(DownloadError, match="is not an https address"):
            get(target, url)
    assert download._allowed("https://www.cs.toronto.edu/a")


def test_missing_then_mirror(server: Server, target: Path) -> None:
    server.script = [status(404), status(500), status(403), ok]
    assert get(target, *(f"{server.url}?{k}" for k in range(5))) == f"{server.url}?3"
    assert got(target)


def test_every_reason_is_given(server: Server, target: Path) -> None:
    closed = Server(("127.0.0.1", 0), Handler)
    closed.server_close()
    dead = f"http://127.0.0.1:{server.server_port}/"
    server.script = [status(404), lambda h: h.wfile.write(b"not\x1b[2J HTTP\r\n\r\n"), lambda h: None]
    with pytest.raises(DownloadError) as caught:
        get(target, dead + "1", dead + "2", dead + "3")
    message = str(caught.value)
    assert f"{dead}1 answers 404; {dead}2 cannot be reached: not?[2J HTTP" in message
    assert f"; {dead}3 cannot be reached: " in message
    assert message.isprintable()


def test_no_server_is_said_at_once(server: Server, target: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(download, "_allowed", lambda url: True)
    with Server(("127.0.0.1", 0), Handler) as closed:
        url = closed.url
    with pytest.raises(DownloadError, match=r"cannot be reached: .*refused"):
        get(target, url)
    with pytest.raises(DownloadError, match="cannot be reached: "):
        get(target, "https://a..b/")  # no such host name can be


def test_a_server_that_says_nothing_times_out(server: Server, target: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(download, "_TIMEOUT", 0.05)
    release = threading.Event()

    def silent(handler: Handler) -> None:
        handler.answer(200, CONTENT[:100], Content_Length=str(len(CONTENT)))
        release.wait()

    server.script = [silent, lambda handler: release.wait() and None]
    try:
        with pytest.raises(DownloadError, match="timed out"):
            get(target, server.url)
    finally:
        release.set()
    assert target.with_name("a.tar.gz.part").read_bytes() == CONTENT[:100]


def test_a_server_that_drips_is_given_up_and_its_part_used(
    server: Server, target: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(download, "_PATIENCE", 0.2)
    release = threading.Event()

    def drip(handler: Handler) -> None:
        handler.answer(200, CONTENT[:5000], Content_Length=str(len(CONTENT)))
        with contextlib.suppress(OSError):
            for byte in CONTENT[5000:]:
                handler.wfile.write(bytes([byte]))
                if release.wait(0.01):
                    break

    part = target.with_name("a.tar.gz.part")
    server.script = [drip]
    try:
        with pytest.raises(DownloadError, match=r"sends too slowly: \d+ bytes in"):
            get(target, server.url)
        kept = part.read_bytes()
        assert 5000 < len(kept) < 6000
        assert CONTENT.startswith(kept)
        server.script, server.requests[:] = [ok], []
        get(target, server.url)
        assert got(target)
        assert ranges(server) == [f"bytes={len(kept)}-"]
        target.unlink()
        server.script, server.requests[:] = [drip, ok], []
        assert get(target, server.url, f"{server.url}?mirror") == f"{server.url}?mirror"
        assert got(target)
    finally:
        release.set()


def test_a_server_that_drips_its_headers_is_given_up(
    server: Server, target: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(download, "_ANSWER", 1.0)
    release = threading.Event()

    def drip(handler: Handler) -> None:
        with contextlib.suppress(OSError):
            handler.wfile.write(b"HTTP/1.1 200 OK\r\nX-Long: ")
            while not release.wait(0.05):
                handler.wfile.write(b"x")

    server.script = [drip, ok]
    try:
        with pytest.raises(DownloadError, match=r"cannot be reached: no whole answer in 1 s$"):
            get(target, server.url)
        get(target, server.url)
        assert got(target)
    finally:
        release.set()


def test_ctrl_c_leaves_the_part(server: Server, target: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(download, "_PIECE", 1000)
    monkeypatch.setattr(download, "_PERIOD", 0)

    def stop(done: int, total: int | None) -> None:
        if done >= 5000:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        get(target, server.url, progress=stop)
    part = target.with_name("a.tar.gz.part")
    assert part.read_bytes() == CONTENT[:5000]
    get(target, server.url)
    assert got(target)
    assert ranges(server) == [None, "bytes=5000-"]


@pytest.mark.parametrize("notes", ["", "{", "[]", '{"url": 1}', '{"etag": "\\"version-1\\""}', "\udcff"])
def test_notes_that_make_no_sense_are_ignored(server: Server, target: Path, notes: str) -> None:
    target.with_name("a.tar.gz.part").write_bytes(CONTENT[:100])
    target.with_name("a.tar.gz.part.json").write_bytes(notes.encode("utf-8", "surrogateescape"))
    get(target, server.url)
    assert got(target)
    assert ranges(server) == [None]


def test_a_full_disk_is_said_before_and_while(server: Server, target: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = type("Usage", (), {"free": 39_999})
    with monkeypatch.context() as patch:
        patch.setattr(download.shutil, "disk_usage", lambda path: usage)
        with pytest.raises(OutputError, match=r"has 39999 bytes free, a\.tar\.gz needs 40000"):
            get(target, server.url)
    assert server.requests == []

    def full(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(download.os, "fsync", full)
    monkeypatch.setattr(download, "publish_json", lambda path, value: path.write_text(json.dumps(value)))
    with pytest.raises(OutputError, match=r"a\.tar\.gz\.part: cannot be written: No space left on device"):
        get(target, server.url)
    assert not target.exists()


def test_a_rename_that_fails_is_said_and_loses_nothing(
    server: Server, target: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(source: Path, goal: Path) -> None:
        raise OSError(errno.EROFS, "Read-only file system", str(goal))

    with monkeypatch.context() as patch:
        patch.setattr(download.os, "replace", fail)
        patch.setattr(download, "publish_json", lambda path, value: path.write_text(json.dumps(value)))
        with pytest.raises(OutputError, match=r"a\.tar\.gz: cannot be written: Read-only file system"):
            get(target, server.url)
    server.requests.clear()
    get(target, server.url)
    assert got(target)
    assert server.requests == []


def test_a_folder_that_is_not_there_is_said(server: Server, tmp_path: Path) -> None:
    with pytest.raises(OutputError, match="cannot be written: No such file or directory"):
        get(tmp_path / "no" / "a.tar.gz", server.url)


def test_many_at_once_download_once(server: Server, tmp_path: Path) -> None:
    spec = dataclasses.replace(CIFAR10, urls=(server.url,), sha256=SHA256, size=len(CONTENT))
    sources: list[archive.Source] = []

    def one() -> None:
        sources.append(find(spec, data=None, home=tmp_path, allow_unverified=False))

    threads = [threading.Thread(target=one) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(server.requests) == 1
    assert len(sources) == 8
    assert all(source.verified and source.path.read_bytes() == CONTENT for source in sources)
