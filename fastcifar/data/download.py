"""Fetches one file of known SHA-256 over https, going on where an earlier attempt stopped.

Beside `reach` the only module that touches the network. Bytes go to NAME.part beside the target; NAME.part.json
remembers which version of which address they are from. The target appears by a rename, once its hash is right.

    fetch(["https://example.org/a.tar.gz"], Path("downloads/a.tar.gz"), sha256="6d95...", size=170498071)
"""

import contextlib
import hashlib
import http.client
import json
import os
import re
import shutil
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from fastcifar.data import reach
from fastcifar.errors import DownloadError, OutputError, one_line
from fastcifar.publish import publish_json

__all__ = ["Progress", "fetch", "file_sha256"]

Progress = Callable[[int, int | None], None]

_TIMEOUT = 10.0  # seconds without a byte
_ANSWER = 30.0  # seconds until an answer's headers are there, all redirects included
_SLOW, _PATIENCE = 4096, 30.0  # fewer bytes than that in so many seconds, and the address is given up
_TRIES = 6  # an address is asked again while each answer brings the file further
_MAX_SIZE = 1 << 30
_PIECE = 1 << 18
_PERIOD = 0.05  # seconds between reports of progress
# URLError, time-outs and TLS errors are OSErrors; a redirect to a host name that cannot be is a ValueError
_NETWORK_ERRORS = (OSError, http.client.HTTPException, ValueError)


class _FetchError(Exception):
    """Why an address did not give the file, in words."""


def _allowed(url: str) -> bool:
    return urlsplit(url).scheme == "https"


class _Redirects(urllib.request.HTTPRedirectHandler):
    def redirect_request(self, req: Any, fp: Any, code: Any, msg: Any, headers: Any, newurl: str) -> Any:
        fp.close()  # its body may be of any length, and would be read into memory
        if not _allowed(newurl):
            raise _FetchError(f"redirects to {newurl}, which is not https")
        return super().redirect_request(req, fp, code, msg, headers, newurl)


@dataclass(frozen=True)
class _Wanted:
    """One address and the partial file that its answers go to."""

    url: str
    part: Path
    size: int | None
    progress: Progress
    probe: reach.Probe | None = None

    @property
    def notes(self) -> Path:
        """Where the address and version of the bytes in `part` are remembered."""
        return self.part.with_name(self.part.name + ".json")

    def have(self) -> int:
        return self.part.stat().st_size if self.part.is_file() else 0

    def etag(self) -> str | None:
        """The version that `part` is of, if it is from this address and its server tells versions apart."""
        try:
            notes = json.loads(self.notes.read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return None
        match notes:
            case {"url": self.url, "etag": str() as etag}:
                return etag
        return None

    def forget(self) -> None:
        self.notes.unlink(missing_ok=True)
        self.part.unlink(missing_ok=True)


def file_sha256(path: Path) -> str:
    """A file's SHA-256, in hexadecimal.

    Raises:
        OSError: it cannot be read.
    """
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def fetch(urls: Sequence[str], target: Path, *, sha256: str, size: int | None, progress: Progress | None = None) -> str:
    """Put the file at `target`; an interrupted fetch leaves its part for the next one.

    Args:
        urls: https addresses of the same file, tried in turn.
        target: where it goes; its folder exists.
        sha256: the file's, in hexadecimal.
        size: bytes, if known.
        progress: called with bytes done and bytes in all (None where unknown), at most 20 times a second.

    Returns:
        The address that it came from.

    Raises:
        DownloadError: no address gave the file; says why for each.
        OutputError: the folder cannot be written, or the disk is too full.
    """
    part = target.with_name(target.name + ".part")
    reasons = []
    with _writing(part):
        whole = part.is_file() and part.stat().st_size == size  # needs no network
        probes = {url: reach.Probe(url) for url in urls if _allowed(url) and not whole}
        begun = time.monotonic()
        free = shutil.disk_usage(part.parent).free
        for url in urls:
            probe = probes.get(url)
            if probe is not None and time.monotonic() - begun > 2 * reach.REACH:  # the network may have changed since
                probe = reach.Probe(url)
            wanted = _Wanted(url, part, size, progress or (lambda done, total: None), probe)
            if size is not None and free + wanted.have() < size:
                raise OutputError(f"{part.parent} has {free} bytes free, {target.name} needs {size}")
            try:
                _fetch(wanted, sha256)
            except _FetchError as error:
                reasons.append(f"{url} {error}")
                continue
            os.replace(part, target)
            wanted.notes.unlink(missing_ok=True)
            return url
    raise DownloadError("; ".join(reasons))


@contextlib.contextmanager
def _writing(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise OutputError(f"{error.filename or path}: cannot be written: {error.strerror or error}") from None


def _fetch(wanted: _Wanted, sha256: str) -> None:
    """Leave the whole, right file in `part`, or raise."""
    if not _allowed(wanted.url):
        raise _FetchError("is not an https address")
    wrong = ""
    for _ in range(_TRIES):
        before = wanted.have()
        # a crash between the last byte and the rename leaves a part that needs no network
        complete = before > 0 and before == wanted.size
        reason = None if complete else _request(wanted)
        if reason is None:
            found = file_sha256(wanted.part)
            if found == sha256:
                return
            wanted.forget()
            if not before:  # a fresh copy is wrong; one that was resumed gets another try
                raise _FetchError(f"gives a file with SHA-256 {found}, expected {sha256}")
            wrong = f"gives a file with SHA-256 {found}, expected {sha256}"
            continue
        after = wanted.have()
        if not (after > before or after == 0 < before):  # it brought nothing, and there was no bad part to drop
            raise _FetchError(reason)
        wrong = reason
    raise _FetchError(f"{wrong} ({_TRIES} attempts)")


def _request(wanted: _Wanted) -> str | None:
    """Ask once, and write what comes to `part`.

    Returns:
        None if the answer ended where it should, else why it did not.
    """
    have, etag = wanted.have(), wanted.etag()
    headers = {"Accept-Encoding": "identity", "User-Agent": "fastcifar"}
    if have and etag:
        headers |= {"Range": f"bytes={have}-", "If-Range": etag}
    probe = wanted.probe or reach.Probe(wanted.url)  # none yet where there was a whole part, which was wrong
    if (reason := probe.reason()) is not None:
        return f"cannot be reached: {_words(reason)}"
    try:
        opener = urllib.request.build_opener(_Redirects)
        request = urllib.request.Request(wanted.url, headers=headers)  # noqa: S310  # only https comes this far
        response = reach.within(_ANSWER, lambda: opener.open(request, timeout=_TIMEOUT))
    except urllib.error.HTTPError as error:
        error.close()
        if error.code == 416:
            wanted.forget()
        return f"answers {error.code}"
    except _NETWORK_ERRORS as error:
        return f"cannot be reached: {_words(getattr(error, 'reason', None) or error)}"
    with response:
        start = 0
        length = _number(response.headers.get("Content-Length"))
        if response.status == 206:
            total = _resumed_total(response.headers, have, etag)
            if not have or total is None:
                wanted.forget()  # the next attempt asks for all of it
                return "answers with another range than the one asked for"
            start = have
        elif response.status == 200:
            total = length
        else:
            return f"answers {response.status}"
        if wanted.size is not None and total is not None and total != wanted.size:
            encoding = response.headers.get("Content-Encoding")
            encoded = f" in the encoding {encoding}" if encoding else ""
            return f"offers {total} bytes{encoded}, expected {wanted.size}"
        total = total if total is not None else wanted.size
        if not start:
            wanted.forget()
            tag = response.headers.get("ETag") or ""
            # a weak tag does not promise equal bytes
            publish_json(wanted.notes, {"url": wanted.url, "etag": tag if tag.startswith('"') else None})
        return _receive(wanted, response, start, total)


def _words(error: object) -> str:
    """One printable line: servers choose parts of these messages."""
    return one_line(error) or type(error).__name__


def _number(text: str | None) -> int | None:
    return int(text) if text and re.fullmatch(r"[0-9]{1,15}", text) else None


def _resumed_total(headers: Any, have: int, etag: str | None) -> int | None:
    """The size of the whole file, if the answer is the rest of the version that `part` is of."""
    match = re.fullmatch(r"bytes ([0-9]{1,15})-([0-9]{1,15})/([0-9]{1,15})", headers.get("Content-Range", "").strip())
    if match is None or headers.get("ETag", etag) != etag:  # it was asked for by If-Range: it may not be repeated
        return None
    first, last, total = (int(group) for group in match.groups())
    length = _number(headers.get("Content-Length"))
    right = first == have and last == total - 1 and length in (None, total - have)
    return total if right else None


def _receive(wanted: _Wanted, response: Any, start: int, total: int | None) -> str | None:
    done, reported = start, 0.0
    measured, before = time.monotonic(), done
    limit = total if total is not None else _MAX_SIZE
    with open(wanted.part, "ab") as file:  # where nothing is resumed, the old part is gone by now
        try:
            while done != total:  # what follows is too much, or a trailer without an end
                try:
                    piece = response.read1(
                        _PIECE
                    )  # what is there: `read` would wait for all of it, and lose it to a time-out
                except http.client.IncompleteRead as error:
                    piece = error.partial
                except _NETWORK_ERRORS as error:
                    return f"breaks off after {done} bytes: {_words(error)}"
                if not piece:
                    break
                if done + len(piece) > limit:
                    wanted.forget()
                    raise _FetchError(f"sends more than {limit} bytes")
                file.write(piece)
                done += len(piece)
                now = time.monotonic()
                if now - measured >= _PATIENCE:
                    if done - before < _SLOW:
                        raise _FetchError(f"sends too slowly: {done - before} bytes in {now - measured:.0f} s")
                    measured, before = now, done
                if now - reported >= _PERIOD:
                    reported = now
                    wanted.progress(done, total)
        finally:
            file.flush()
            os.fsync(file.fileno())
    wanted.progress(done, total)
    if total is not None and done < total:
        return f"breaks off after {done} of {total} bytes"
    return None
