"""Downloads from a local server that also truncates, stalls, changes the file and answers with pages."""

from __future__ import annotations

import hashlib
import io
import os
import random
import re
import signal
import socket
import subprocess
import sys
import threading
import time
import zipfile
from collections.abc import Callable, Iterator
from email.message import Message
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from compactmlip.errors import DownloadError
from compactmlip.families import download as module
from compactmlip.families.download import download

CONTENT = random.Random(0).randbytes(600_000)
HALF = len(CONTENT) // 2
DIGEST = hashlib.sha256(CONTENT).hexdigest()
DATE = "Wed, 21 Oct 2026 07:28:00 GMT"
PAGE = (
    b"\n<!DOCTYPE html><html><head><title>Sign in &amp;\n accept\x1b[31m</title></head><body>no</body></html>"
)


class Server(ThreadingHTTPServer):
    """Serves ``content``; ``plan`` holds one dictionary of misbehaviour per coming request."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.content = CONTENT
        self.versions: dict[str, str] = {"ETag": '"one"', "Last-Modified": DATE}
        self.plan: list[dict[str, Any]] = []
        self.requests: list[Message] = []
        self.released = threading.Event()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}/files/toy.model"

    def handle_error(self, *_: Any) -> None:
        """A client that hangs up is part of the tests."""


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: Server

    def log_message(self, *_: Any) -> None:
        pass

    def do_GET(self) -> None:
        self.close_connection = True
        self.server.requests.append(self.headers)
        step = self.server.plan.pop(0) if self.server.plan else {}
        time.sleep(step.get("pause", 0.0))
        if step.get("silent"):
            self.server.released.wait(10)
            return
        if step.get("hang up"):
            return
        if "status" in step:
            return self.send_error(step["status"])
        if "body" in step:
            return self._send(200, step["body"], {"Content-Type": step["type"]})
        begin = self._begin(step)
        if begin >= len(self.server.content):
            return self.send_error(416)
        headers = {"Content-Type": "application/octet-stream", **self.server.versions}
        if begin:
            last, total = len(self.server.content) - 1, len(self.server.content)
            headers["Content-Range"] = f"bytes {begin + step.get('shift', 0)}-{last}/{total}"
        self._send(206 if begin else 200, self.server.content[begin:], headers, **step)

    def _begin(self, step: dict[str, Any]) -> int:
        match = re.fullmatch(r"bytes=(\d+)-", self.headers.get("Range", ""))
        guard = self.headers.get("If-Range")
        if (
            match is None
            or not step.get("ranges", True)
            or guard not in (None, *self.server.versions.values())
        ):
            return 0
        return int(match[1])

    def _send(
        self,
        status: int,
        body: bytes,
        headers: dict[str, str],
        cut: int | None = None,
        stall: bool = False,
        chunked: bool = False,
        **_: Any,
    ) -> None:
        self.send_response(status)
        length = {"Transfer-Encoding": "chunked"} if chunked else {"Content-Length": str(len(body))}
        for key, value in (headers | length).items():
            self.send_header(key, value)
        self.end_headers()
        part = body[:cut]
        self.wfile.write(b"%x\r\n%b\r\n" % (len(part), part) if chunked else part)
        if chunked and cut is None:
            self.wfile.write(b"0\r\n\r\n")
        if stall:
            self.server.released.wait(10)


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    for name in ("http_proxy", "https_proxy", "all_proxy", "HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY"):
        monkeypatch.delenv(name, raising=False)
    with Server() as running:
        thread = threading.Thread(target=running.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        yield running
        running.released.set()
        running.shutdown()
        thread.join()


@pytest.fixture
def target(tmp_path: Path) -> Path:
    return tmp_path / "cache" / "toy.model"


def _get(server: Server, target: Path, **options: Any) -> tuple[str, list[float]]:
    """Download without real waiting; returns the digest and the waits."""
    waited: list[float] = []
    return download(server.url, target, **{"sleep": waited.append, "progress": False, **options}), waited


def _interrupt(*_: Any) -> None:
    raise KeyboardInterrupt


def _names(target: Path) -> list[str]:
    return sorted(p.name for p in target.parent.iterdir())


def test_whole_file(server: Server, target: Path) -> None:
    digest, waited = _get(server, target, sha256=DIGEST.upper())
    assert digest == DIGEST and target.read_bytes() == CONTENT and waited == []
    assert _names(target) == [target.name]
    (request,) = server.requests
    assert "Range" not in request and request["User-Agent"].startswith("compactmlip/")


@pytest.mark.parametrize(
    ("versions", "guard"),
    [
        ({"ETag": '"one"', "Last-Modified": DATE}, '"one"'),
        ({"ETag": 'W/"one"', "Last-Modified": DATE}, DATE),  # If-Range allows strong validators only
        ({"Last-Modified": DATE}, DATE),
    ],
)
def test_truncated_then_resumed(server: Server, target: Path, versions: dict[str, str], guard: str) -> None:
    server.versions = versions
    server.plan = [{"cut": HALF}]
    digest, waited = _get(server, target)
    assert digest == DIGEST and target.read_bytes() == CONTENT and waited == [module.WAITS[0]]
    assert server.requests[1]["Range"] == f"bytes={HALF}-" and server.requests[1]["If-Range"] == guard
    assert _names(target) == [target.name]


def test_without_a_version_the_file_is_fetched_anew(server: Server, target: Path) -> None:
    server.versions = {}
    server.plan = [{"cut": HALF}]
    assert _get(server, target)[0] == DIGEST
    assert len(server.requests) == 2 and "Range" not in server.requests[1]


def test_truncated_every_time(server: Server, target: Path) -> None:
    """The waits grow, then it gives up; what arrived is kept and a later call continues there."""
    server.plan = [{"cut": 100_000}] * 5
    with pytest.raises(
        DownloadError, match=r"ended after 500000 of 600000 bytes \(5 attempts.*By hand it is\."
    ):
        _get(server, target, advice="By hand it is.")
    assert not target.exists() and target.with_name("toy.model.part").stat().st_size == 500_000
    assert _get(server, target, sha256=DIGEST) == (DIGEST, [])
    assert server.requests[-1]["Range"] == "bytes=500000-"


def test_waits_grow_and_begin_anew_after_progress(
    server: Server, target: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "ADVANCE", 1000)
    server.plan = [{"status": 503}, {"hang up": True}, {"cut": HALF}, {"status": 429}, {"cut": 10}]
    digest, waited = _get(server, target, waits=(1.0, 4.0, 15.0))
    assert digest == DIGEST and waited == [1.0, 4.0, 1.0, 4.0, 15.0]
    assert list(module.WAITS) == sorted(module.WAITS) and len(set(module.WAITS)) == len(module.WAITS)


def test_server_without_ranges(server: Server, target: Path) -> None:
    server.plan = [{"cut": HALF}, {"ranges": False}]
    assert _get(server, target)[0] == DIGEST and target.read_bytes() == CONTENT
    assert "Range" in server.requests[1]


def test_file_that_changes_between_attempts(server: Server, target: Path) -> None:
    """The new file is fetched whole: nothing of the old one is in it."""
    server.plan = [{"cut": HALF}]
    with pytest.raises(DownloadError, match="1 attempts; what arrived is kept"):
        _get(server, target, waits=())
    server.content = bytes(reversed(CONTENT))[:-50_000]
    server.versions = {"ETag": '"two"'}
    _get(server, target)
    assert server.requests[1]["If-Range"] == '"one"' and target.read_bytes() == server.content


def test_shorter_file_in_its_place(server: Server, target: Path) -> None:
    """A server that ignores If-Range and has less than what is here answers 416."""
    server.plan = [{"cut": HALF}]
    with pytest.raises(DownloadError):
        _get(server, target, waits=())
    server.content = CONTENT[:1000]
    _get(server, target)
    assert target.read_bytes() == CONTENT[:1000]


def test_other_piece_than_asked_for(server: Server, target: Path) -> None:
    server.plan = [{"cut": HALF}, {"shift": 5}]
    assert _get(server, target)[0] == DIGEST and target.read_bytes() == CONTENT
    assert len(server.requests) == 3 and "Range" not in server.requests[2]


def test_wrong_part_is_noticed_by_the_digest(server: Server, target: Path) -> None:
    """A part that was damaged on the disk gives a wrong file; it is fetched once more, whole."""
    server.plan = [{"cut": HALF}]
    with pytest.raises(DownloadError):
        _get(server, target, waits=())
    part = target.with_name("toy.model.part")
    part.write_bytes(b"x" * HALF)
    assert _get(server, target, sha256=DIGEST)[0] == DIGEST and target.read_bytes() == CONTENT
    assert ["Range" in r for r in server.requests] == [False, True, False]


def test_damaged_complete_part_is_fetched_anew(
    server: Server, target: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(module.Part, "publish", _interrupt)
        with pytest.raises(KeyboardInterrupt):
            _get(server, target)
    target.with_name("toy.model.part").write_bytes(bytes(len(CONTENT)))
    assert _get(server, target, sha256=DIGEST)[0] == DIGEST and len(server.requests) == 2


def test_wrong_digest_behind_a_bad_line_ends(server: Server, target: Path) -> None:
    server.plan = [{"cut": HALF}, {}] * 4
    with pytest.raises(DownloadError, match="it is not used"):
        _get(server, target, sha256="0" * 64)
    assert len(server.requests) == 4 and _names(target) == []


@pytest.mark.parametrize("step", [{"stall": True, "cut": HALF}, {"silent": True}])
def test_stall_then_success(server: Server, target: Path, step: dict[str, Any], capfd: Any) -> None:
    server.plan = [step]
    digest, waited = _get(server, target, timeout=0.2, progress=True)
    assert digest == DIGEST and target.read_bytes() == CONTENT and waited == [module.WAITS[0]]
    assert "no data for 0.2 s; next attempt in 1 s" in capfd.readouterr().err


def test_stall_every_time(server: Server, target: Path) -> None:
    server.plan = [{"silent": True}] * 3
    with pytest.raises(DownloadError, match=r"no data for 0\.1 s \(3 attempts\)"):
        _get(server, target, timeout=0.1, waits=(1.0, 2.0))
    assert _names(target) == []


@pytest.mark.parametrize("kind", ["text/html; charset=utf-8", "application/octet-stream"])
def test_web_page_instead_of_the_file(server: Server, target: Path, kind: str) -> None:
    """The part of an earlier attempt survives the portal of a network."""
    server.plan = [{"cut": HALF}, {"body": PAGE, "type": kind}]
    with pytest.raises(
        DownloadError, match=r"web page \('Sign in & accept\[31m'\).*Open the address"
    ) as caught:
        _get(server, target)
    assert server.url in str(caught.value)
    assert _get(server, target, sha256=DIGEST)[0] == DIGEST
    assert server.requests[2]["Range"] == f"bytes={HALF}-"


@pytest.mark.parametrize("status", [403, 404])
def test_missing_file(server: Server, target: Path, status: int) -> None:
    server.plan = [{"status": status}]
    with pytest.raises(DownloadError, match=f"the server answers {status} .*Open the address"):
        _get(server, target)
    assert len(server.requests) == 1 and _names(target) == []


def test_wrong_digest(server: Server, target: Path) -> None:
    """Nothing is left, and an older file under the name stays as it was."""
    target.parent.mkdir()
    target.write_bytes(b"old")
    with pytest.raises(DownloadError, match=f"sha256 {DIGEST}, expected {'0' * 64}; it is not used"):
        _get(server, target, sha256="0" * 64)
    assert target.read_bytes() == b"old" and _names(target) == [target.name]
    assert len(server.requests) == 1


def test_check_refuses(server: Server, target: Path) -> None:
    def check(path: Path) -> None:
        if not zipfile.is_zipfile(path):
            raise ValueError("not a zip archive")

    with pytest.raises(DownloadError, match="not a zip archive"):
        _get(server, target, check=check)
    assert _names(target) == []
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        archive.writestr("data", "x")
    server.content = buffer.getvalue()
    _get(server, target, check=check)
    assert target.read_bytes() == buffer.getvalue()


def test_length_unknown(server: Server, target: Path) -> None:
    server.plan = [{"chunked": True, "cut": HALF}, {"chunked": True}]
    assert _get(server, target)[0] == DIGEST and target.read_bytes() == CONTENT
    assert server.requests[1]["Range"] == f"bytes={HALF}-"


def test_empty_answer(server: Server, target: Path) -> None:
    server.plan = [{"body": b"", "type": "application/octet-stream"}]
    with pytest.raises(DownloadError, match="empty file"):
        _get(server, target)
    assert _names(target) == []


def test_offline(target: Path) -> None:
    """No waiting where there is no connection at all."""
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{unused.getsockname()[1]}/toy.model"
        with pytest.raises(DownloadError, match=r"no connection \(Connection refused\)"):
            download(url, target, progress=False, sleep=lambda _: pytest.fail("waited"))
    assert _names(target) == []


def test_connection_lost_on_the_way(server: Server, target: Path) -> None:
    """Once data have come, a refused connection is worth another attempt."""
    server.plan = [{"cut": HALF}]
    waited: list[float] = []

    def sleep(seconds: float) -> None:
        waited.append(seconds)
        if len(waited) == 1:
            server.shutdown()
            server.server_close()  # refuses from now on

    with pytest.raises(DownloadError, match=r"no connection .*\(3 attempts; what arrived is kept"):
        _get(server, target, sleep=sleep, waits=(1.0, 2.0))
    assert waited == [1.0, 2.0]


def test_other_addresses_are_refused(target: Path) -> None:
    with pytest.raises(DownloadError, match="not an http or https address"):
        download((target.parent / "x").as_uri(), target)


def test_folder_that_cannot_be_written(server: Server, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(DownloadError, match="cannot write .*XDG_CACHE_HOME"):
        _get(server, tmp_path / "file" / "toy.model")
    assert server.requests == []


def test_two_at_once_download_once(server: Server, target: Path) -> None:
    server.plan = [{"pause": 0.3}]
    results: list[tuple[str, list[float]]] = []
    threads = [threading.Thread(target=lambda: results.append(_get(server, target))) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [digest for digest, _ in results] == [DIGEST] * 3
    assert len(server.requests) == 1 and _names(target) == [target.name]


@pytest.mark.parametrize(("failure", "asked"), [({"cut": HALF}, f"bytes={HALF}-"), ({"status": 404}, None)])
def test_second_takes_over_when_the_first_fails(
    server: Server, target: Path, failure: dict[str, Any], asked: str | None
) -> None:
    """It waits for the part of the first, which may be gone then."""
    server.plan = [{"pause": 0.3, **failure}]
    outcomes: list[object] = []

    def first() -> None:
        with pytest.raises(DownloadError):
            _get(server, target, waits=())

    def second() -> None:
        outcomes.append(_get(server, target)[0])

    threads = [threading.Thread(target=work) for work in (first, second)]
    threads[0].start()
    while not server.requests:
        time.sleep(0.01)
    threads[1].start()
    for thread in threads:
        thread.join()
    assert outcomes == [DIGEST] and target.read_bytes() == CONTENT and _names(target) == [target.name]
    assert server.requests[1]["Range"] == asked


def _until(condition: Callable[[], bool], seconds: float = 60.0) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.02)


def test_killed_process(server: Server, target: Path) -> None:
    """SIGKILL in the middle: the next process continues where the first was."""
    server.plan = [{"stall": True, "cut": HALF}]
    code = (
        "import sys; from pathlib import Path; from compactmlip.families.download import download; "
        "download(sys.argv[1], Path(sys.argv[2]))"
    )
    process = subprocess.Popen([sys.executable, "-c", code, server.url, str(target)], env=dict(os.environ))
    part = target.with_name("toy.model.part")
    try:
        _until(lambda: process.poll() is not None or (part.is_file() and part.stat().st_size == HALF))
        assert process.poll() is None
    finally:
        process.send_signal(signal.SIGKILL)
        process.wait()
    assert _get(server, target) == (DIGEST, []) and target.read_bytes() == CONTENT
    assert server.requests[1]["Range"] == f"bytes={HALF}-"


def test_killed_before_the_renaming(server: Server, target: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """All bytes are here: nothing is asked for again."""
    with monkeypatch.context() as patch:
        patch.setattr(module.Part, "publish", _interrupt)
        with pytest.raises(KeyboardInterrupt):
            _get(server, target)
    assert not target.exists()
    assert _get(server, target)[0] == DIGEST and target.read_bytes() == CONTENT
    assert len(server.requests) == 1


def test_progress_goes_to_stderr(server: Server, target: Path, capfd: Any, monkeypatch: Any) -> None:
    import compactmlip.progress

    monkeypatch.setattr(compactmlip.progress, "LOG_INTERVAL", -1.0)
    _get(server, target, progress=True)
    out, err = capfd.readouterr()
    assert out == "" and "Downloading toy.model: 100 %" in err and "MB/s" in err
