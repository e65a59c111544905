"""Names, download and the restricted unpickler."""

from __future__ import annotations

import hashlib
import importlib
import os
import subprocess
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from compactmlip.errors import CheckpointError, DownloadError, InputError, UnsupportedFeatureError
from compactmlip.families import load_model
from compactmlip.families.names import NAMED_CHECKPOINTS, NamedCheckpoint, find_named
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
    return NamedCheckpoint("toy", "sevennet", "sevenn/toy.pth", digest, "MIT", "nobody")


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


def test_names_and_aliases() -> None:
    assert find_named("7NET-L3I5") is find_named("sevennet-l3i5") is not None
    assert find_named("7net-0_11Jul2024") is find_named("7net-0")
    assert find_named("nonsense") is None
    assert all(len(entry.sha256) == 64 and entry.licence and entry.citation for entry in NAMED_CHECKPOINTS)


def test_unknown_name_lists_the_known() -> None:
    with pytest.raises(InputError, match=r"7net-mf-0.*Did you mean '7net-l3i5'"):
        load_model("7net-l3i6")


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
