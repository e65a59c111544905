"""Download one file over HTTP: resumable, checked, and afterwards either complete or absent."""

from __future__ import annotations

import html
import re
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from http.client import HTTPException, HTTPMessage, HTTPResponse
from pathlib import Path
from urllib.error import HTTPError, URLError
from urllib.request import Request, urlopen

from compactmlip import __version__
from compactmlip.checkpoint import sha256 as sha256_of
from compactmlip.errors import DownloadError
from compactmlip.families.partial import Part, disk, locked_part
from compactmlip.progress import Track

TIMEOUT = 60.0
"""Seconds without any data after which a connection counts as stalled."""
WAITS = (1.0, 4.0, 15.0, 60.0)
"""Seconds before each further attempt after a failure that may pass."""
ADVANCE = 1 << 20
"""Bytes that an attempt must add for the waits to begin anew."""
BY_HAND = "Open the address in a browser, save the file, and give its path instead of the name."

_BLOCK = 1 << 18
_PASSING = {408, 425, 429, 500, 502, 503, 504}


class _Failure(Exception):
    """Why there is no file; the text is a reason without full stop."""


class _Passing(_Failure):
    """Another attempt may succeed."""


class _Unreachable(_Failure):
    """No connection: final at the beginning, passing once the server has answered."""


def download(
    url: str,
    target: Path,
    *,
    sha256: str | None = None,
    check: Callable[[Path], None] | None = None,
    advice: str = BY_HAND,
    timeout: float = TIMEOUT,
    waits: Sequence[float] = WAITS,
    sleep: Callable[[float], None] = time.sleep,
    progress: bool = True,
) -> str:
    """Fetch ``url`` into ``target`` and return the hex sha256 of what arrived.

    Data go to ``target.part``, which is kept after an interruption.  The next call asks for the rest
    (``Range`` with ``If-Range``, RFC 9110, section 13.1.5) if the server named a version of the file,
    and begins anew if the file has changed or the server sends all of it.  A second process that
    wants the same file waits for the first.

    Parameters
    ----------
    url
        Address, http or https.
    target
        File to write; an existing one is replaced, at the end and at once.
    sha256
        Expected hex digest, if known.
    check
        Looks at the complete file and raises ValueError, with a reason, if it is not what it should be.
    advice
        Last sentence of error messages: what to do by hand.
    timeout
        Seconds without data after which an attempt ends.
    waits, sleep
        Seconds before each further attempt, and the function that waits.
    progress
        Show progress, on stderr.

    Raises
    ------
    DownloadError
        If the file cannot be had, or what arrived is not what was expected.
    """
    if not url.startswith(("http://", "https://")):
        raise DownloadError(f"cannot download {url}: not an http or https address.")
    with disk(target.parent):
        target.parent.mkdir(parents=True, exist_ok=True)
    before = _stamp(target)
    try:
        with locked_part(target, progress) as part:
            if _stamp(target) not in (None, before):  # another process brought it in the meantime
                found = sha256_of(target)
                if _refusal(target, found, sha256, check) is None:
                    return found
            for again in (True, False):
                _receive(url, part, timeout, waits, sleep, progress)
                found = sha256_of(part.path)
                reason = _refusal(part.path, found, sha256, check)
                if reason is None:
                    part.publish(target)
                    return found
                resumed = part.resumed
                part.clear()
                if not (resumed and again):  # else the pieces may not fit: once more, from the beginning
                    raise _Failure(reason)
            raise AssertionError("unreachable")
    except _Failure as failure:
        raise DownloadError(f"cannot download {url}: {failure}. {advice}") from failure


def _refusal(
    path: Path, found: str, expected: str | None, check: Callable[[Path], None] | None
) -> str | None:
    if expected is not None and found != expected.lower():
        return f"what arrived has sha256 {found}, expected {expected}; it is not used"
    try:
        if check is not None:
            check(path)
    except ValueError as error:
        return str(error)
    return None


def _receive(
    url: str,
    part: Part,
    timeout: float,
    waits: Sequence[float],
    sleep: Callable[[float], None],
    progress: bool,
) -> None:
    """Complete the part, in several attempts if need be."""
    failures, furthest = 0, part.size
    while not part.is_complete(url):
        try:
            _attempt(url, part, timeout, progress)
            return
        except (_Passing, _Unreachable) as failure:
            if isinstance(failure, _Unreachable) and not part.received:
                raise
            failures = 1 if part.size > furthest + ADVANCE else failures + 1
            furthest = max(furthest, part.size)
            if failures > len(waits):
                kept = "; what arrived is kept, and the same call continues there" if part.size else ""
                raise _Failure(f"{failure} ({failures} attempts{kept})") from failure
            if progress:
                print(f"{failure}; next attempt in {waits[failures - 1]:g} s", file=sys.stderr, flush=True)
            sleep(waits[failures - 1])


def _attempt(url: str, part: Part, timeout: float, progress: bool) -> None:
    headers = {"User-Agent": f"compactmlip/{__version__}", "Accept-Encoding": "identity"}
    begin = part.size if part.can_resume(url) else 0
    if begin:
        headers |= {"Range": f"bytes={begin}-", "If-Range": part.state["validator"]}
    try:
        with _network(timeout), urlopen(Request(url, headers=headers), timeout=timeout) as response:
            first = response.read1(_BLOCK)
            if response.status == 206:
                _expect_rest(response.headers, part, begin)
            else:
                _refuse_page(response, first)
                part.begin(url, _validator(response.headers), _length(response.headers))
            _copy(response, first, part, progress)
    except HTTPError as error:
        error.close()
        if error.code == 416:  # nothing beyond what is here: it was another file
            part.clear()
        kind = _Passing if error.code in _PASSING | {416} else _Failure
        raise kind(f"the server answers {error.code} {error.reason}") from error


def _copy(response: HTTPResponse, block: bytes, part: Part, progress: bool) -> None:
    total: int | None = part.state["total"]
    title = part.path.name.removesuffix(".part")
    left = 0.0 if total is None else (total - part.size) / 1e6
    if progress and total is None:
        print(f"Downloading {title}, of unknown size", file=sys.stderr, flush=True)
    with Track(f"Downloading {title}", left, "MB", enabled=progress and total is not None) as track:
        while block:
            part.append(block)
            track.advance(len(block) / 1e6)
            block = response.read1(_BLOCK)
    if total is not None and part.size != total:
        raise _Passing(f"the connection ended after {part.size} of {total} bytes")
    if not part.size:
        raise _Failure("the server sends an empty file")


@contextmanager
def _network(timeout: float) -> Iterator[None]:
    """Turn what sockets raise into failures; answers of the server pass."""
    try:
        yield
    except HTTPError:
        raise
    except (OSError, HTTPException) as error:
        reason = error.reason if isinstance(error, URLError) else error
        if isinstance(reason, TimeoutError):
            raise _Passing(f"no data for {timeout:g} s") from error
        text = getattr(reason, "strerror", None) or str(reason) or type(reason).__name__
        if isinstance(error, URLError) and not isinstance(reason, ConnectionResetError):
            raise _Unreachable(f"no connection ({text})") from error
        raise _Passing(f"the connection broke ({text})") from error


def _validator(headers: HTTPMessage) -> str | None:
    """Name of this version of the file, for ``If-Range``, which allows no weak entity tags."""
    tag = headers["ETag"]
    return tag if tag and not tag.startswith("W/") else headers["Last-Modified"]


def _length(headers: HTTPMessage) -> int | None:
    text = headers["Content-Length"]
    return int(text) if text and text.isdigit() else None


def _expect_rest(headers: HTTPMessage, part: Part, begin: int) -> None:
    """Check that a partial answer continues the part."""
    match = re.fullmatch(r"bytes (\d+)-\d+/(\d+|\*)", (headers["Content-Range"] or "").strip())
    total = part.state.get("total")
    fits = match and int(match[1]) == begin and (total is None or match[2] in ("*", str(total)))
    tag = headers["ETag"]
    other_version = tag is not None and not tag.startswith("W/") and tag != part.state.get("validator")
    if not fits or other_version:
        part.clear()
        raise _Passing("the server sends another piece than was asked for")
    part.resumed = True


def _refuse_page(response: HTTPResponse, first: bytes) -> None:
    """Refuse a web page: a login, a portal of the network, an error with status 200."""
    start = first.removeprefix(b"\xef\xbb\xbf").lstrip()[:14].lower()
    if response.headers.get_content_type() != "text/html" and not start.startswith(
        (b"<!doctype html", b"<html")
    ):
        return
    text = (first + response.read(1 << 16)).decode(errors="replace")
    match = re.search(r"<title[^>]*>(.*?)</title", text, re.IGNORECASE | re.DOTALL)
    title = " ".join(html.unescape(match[1]).split())[:100] if match else "no title"
    printable = "".join(c for c in title if c.isprintable())
    raise _Failure(f"the server sends a web page ('{printable}') instead of the file")


def _stamp(path: Path) -> tuple[int, int] | None:
    try:
        found = path.stat()
    except FileNotFoundError:
        return None
    return found.st_ino, found.st_mtime_ns
