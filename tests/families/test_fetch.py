"""The cache of named checkpoints and the restricted unpickler."""

from __future__ import annotations

import hashlib
import importlib
import io
import os
import subprocess
import threading
import zipfile
from collections.abc import Iterator
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from compactmlip.errors import CheckpointError, DownloadError, InputError, UnsupportedFeatureError
from compactmlip.families import load_model
from compactmlip.families.names import NamedCheckpoint, WebFile, WheelMember
from compactmlip.families.sevennet import import_model
from compactmlip.families.unpickle import load_restricted
from compactmlip.spec import Provenance

CONTENT = b"weights"
fetch_module = importlib.import_module("compactmlip.families.fetch")


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "compactmlip"


def _entry(content: bytes = CONTENT) -> NamedCheckpoint:
    digest = hashlib.sha256(content).hexdigest()
    return NamedCheckpoint("toy", "sevennet", WheelMember("sevenn/toy.pth"), digest, "MIT", "nobody")


def _fake_pip(
    monkeypatch: pytest.MonkeyPatch, content: bytes = CONTENT, code: int = 0, good_wheel: bool = True
) -> list[Any]:
    calls: list[Any] = []

    def run(command: list[str], **options: Any) -> subprocess.CompletedProcess[str]:
        calls.append(command)
        folder = Path(command[command.index("--dest") + 1])
        if code == 0:
            wheel = folder / "sevenn-0.13.0-py3-none-any.whl"
            with zipfile.ZipFile(wheel, "w") as archive:
                archive.writestr("sevenn/toy.pth", content)
            if good_wheel:
                digest = hashlib.sha256(wheel.read_bytes()).hexdigest()
                monkeypatch.setattr(fetch_module, "SEVENN_WHEEL_SHA256", digest)
        return subprocess.CompletedProcess(command, code, "", "ERROR: No matching distribution found\n")

    monkeypatch.setattr(fetch_module.subprocess, "run", run)
    return calls


def test_fetch_once_then_from_the_cache(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = _fake_pip(monkeypatch)
    path = fetch_module.fetch(_entry())
    assert path.read_bytes() == CONTENT and cache in path.parents
    assert fetch_module.fetch(_entry()) == path
    assert len(calls) == 1
    assert "--no-deps" in calls[0]
    assert sorted(os.listdir(cache)) == ["checkpoints"]


def test_damaged_cache_is_replaced(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _fake_pip(monkeypatch)
    path = fetch_module.fetch(_entry())
    path.write_bytes(b"cut")
    assert fetch_module.fetch(_entry()).read_bytes() == CONTENT


def test_pip_failure_says_what_to_do(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _fake_pip(monkeypatch, code=1)
    with pytest.raises(DownloadError, match=r"(?s)No matching distribution.*By hand"):
        fetch_module.fetch(_entry())
    assert not list((cache / "checkpoints").iterdir())


def test_wrong_wheel_is_not_used(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _fake_pip(monkeypatch, good_wheel=False)
    with pytest.raises(DownloadError, match="has sha256"):
        fetch_module.fetch(_entry())
    assert not list((cache / "checkpoints").iterdir())


def test_wrong_member_is_not_used(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _fake_pip(monkeypatch, content=b"something else")
    with pytest.raises(DownloadError, match=r"toy\.pth has sha256"):
        fetch_module.fetch(_entry())
    assert not list((cache / "checkpoints").iterdir())


@pytest.fixture
def archive() -> bytes:
    """A file that torch.save wrote."""
    buffer = io.BytesIO()
    torch.save({"a": torch.arange(1000.0)}, buffer)
    return buffer.getvalue()


@pytest.fixture
def site(monkeypatch: pytest.MonkeyPatch, archive: bytes) -> Iterator[Site]:
    """A server on this machine and one named model on it."""
    for name in ("http_proxy", "https_proxy", "all_proxy", "HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(importlib.import_module("compactmlip.families.download"), "WAITS", ())
    with Site(archive) as running:
        thread = threading.Thread(target=running.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        yield running
        running.shutdown()
        thread.join()


class Site(ThreadingHTTPServer):
    def __init__(self, content: bytes) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.content, self.requests = content, 0

    def entry(self, **changes: Any) -> NamedCheckpoint:
        url = f"http://127.0.0.1:{self.server_address[1]}/release/Published.model"
        entry = NamedCheckpoint("mace-toy-1", "mace", WebFile(url), None, "ASL", "nobody", ("toy-1",))
        return replace(entry, **changes)


class _Handler(BaseHTTPRequestHandler):
    server: Site

    def log_message(self, *_: Any) -> None:
        pass

    def do_GET(self) -> None:
        self.server.requests += 1
        self.send_response(200)
        self.send_header("Content-Length", str(len(self.server.content)))
        self.end_headers()
        self.wfile.write(self.server.content)


def test_web_file_once_then_from_the_cache(cache: Path, site: Site, archive: bytes) -> None:
    path = fetch_module.fetch(site.entry(), progress=False)
    assert path == cache / "checkpoints" / "mace-toy-1.model" and path.read_bytes() == archive
    record = path.with_name(path.name + ".sha256")
    assert record.read_text() == f"{hashlib.sha256(archive).hexdigest()}  {path.name}\n"
    assert fetch_module.fetch(site.entry(), progress=False) == path
    assert site.requests == 1
    assert sorted(p.name for p in path.parent.iterdir()) == [path.name, record.name]


def test_recorded_digest_heals_a_damaged_file(cache: Path, site: Site, archive: bytes) -> None:
    path = fetch_module.fetch(site.entry(), progress=False)
    path.write_bytes(archive[:-1])
    assert fetch_module.fetch(site.entry(), progress=False).read_bytes() == archive
    assert site.requests == 2


def test_recorded_digest_refuses_another_file(cache: Path, site: Site, archive: bytes) -> None:
    path = fetch_module.fetch(site.entry(), progress=False)
    record = path.with_name(path.name + ".sha256")
    path.unlink()
    site.content = _zip(b"something else")
    with pytest.raises(DownloadError, match=rf"it is not used.*delete {record}"):
        fetch_module.fetch(site.entry(), progress=False)
    assert not path.exists()
    record.unlink()
    assert fetch_module.fetch(site.entry(), progress=False).read_bytes() == site.content


def test_pinned_digest(cache: Path, site: Site, archive: bytes) -> None:
    """Known beforehand, in the table or in the file that a user wrote."""
    record = cache / "checkpoints" / "mace-toy-1.model.sha256"
    record.parent.mkdir(parents=True)
    record.write_text("0" * 64 + "\n")
    with pytest.raises(DownloadError, match="it is not used"):
        fetch_module.fetch(site.entry(), progress=False)
    record.write_text("abc")
    with pytest.raises(DownloadError, match="holds no SHA-256 digest"):
        fetch_module.fetch(site.entry(), progress=False)
    record.unlink()
    with pytest.raises(DownloadError, match="it is not used"):
        fetch_module.fetch(site.entry(sha256="0" * 64), progress=False)
    assert not list(record.parent.iterdir())
    digest = hashlib.sha256(archive).hexdigest()
    assert fetch_module.fetch(site.entry(sha256=digest), progress=False).read_bytes() == archive


def test_file_put_there_by_hand(cache: Path, site: Site, archive: bytes) -> None:
    path = cache / "checkpoints" / "mace-toy-1.model"
    path.parent.mkdir(parents=True)
    path.write_bytes(archive)
    assert fetch_module.fetch(site.entry(), progress=False) == path and site.requests == 0
    assert path.with_name(path.name + ".sha256").is_file()


def test_not_a_pytorch_file(cache: Path, site: Site) -> None:
    site.content = b"version https://git-lfs.github.com/spec/v1"
    where = cache / "checkpoints" / "mace-toy-1.model"
    with pytest.raises(DownloadError, match=rf"no complete zip archive.*save the file as {where}"):
        fetch_module.fetch(site.entry(), progress=False)
    assert not list(where.parent.iterdir())


def _zip(content: bytes) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        archive.writestr("x", content)
    return buffer.getvalue()


class _Evil:
    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, ("echo this must never run > pwned",)


def test_foreign_code_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    torch.save({"config": _Evil(), "model_state_dict": {}}, tmp_path / "evil.pth")
    with pytest.raises(CheckpointError, match="refused"):
        load_model(tmp_path / "evil.pth")
    assert not (tmp_path / "pwned").exists()


def test_arrays_and_plain_containers_are_read(tmp_path: Path) -> None:
    content = {"a": np.arange(3.0, dtype=np.float32), "b": [torch.ones(2), {"c": (1, "x", None)}]}
    torch.save(content, tmp_path / "plain.pth")
    found = load_restricted(tmp_path / "plain.pth")
    np.testing.assert_array_equal(found["a"], content["a"])
    assert found["b"][1] == {"c": (1, "x", None)}


@pytest.mark.parametrize("keep", [0, 100, -30])
def test_truncated_upstream_file(tmp_path: Path, keep: int) -> None:
    path = tmp_path / "cut.pth"
    torch.save({"config": {}, "model_state_dict": {"w": torch.zeros(1000)}}, path)
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(CheckpointError, match="truncated"):
        load_model(path)


def test_other_pytorch_file(tmp_path: Path) -> None:
    torch.save({"weights": torch.zeros(2)}, tmp_path / "other.pth")
    with pytest.raises(CheckpointError, match="not a SevenNet checkpoint"):
        load_model(tmp_path / "other.pth")


def test_wrong_modality() -> None:
    with pytest.raises(InputError, match="R2SCAN"):
        load_model("7net-mf-0", modality="r2scam")
    with pytest.raises(InputError, match="only one level of theory"):
        load_model("7net-0", modality="PBE")


@pytest.mark.parametrize(
    "change",
    [
        {"is_parity": True},
        {"readout_as_fcn": True},
        {"use_bias_in_linear": True},
        {"act_radial": "ssp"},
        {"act_gate": {"e": "ssp", "o": "tanh"}},
        {"radial_basis": {"radial_basis_name": "gaussian"}},
    ],
)
def test_unsupported_features_are_named(change: dict[str, Any]) -> None:
    config = {"radial_basis": {"radial_basis_name": "bessel"}, **change}
    with pytest.raises(UnsupportedFeatureError, match=next(iter(change)).split("_")[0]):
        import_model(config, {}, Provenance())
