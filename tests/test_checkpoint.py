"""Checkpoints: exact round trip, golden files, and every way in which a file can be wrong."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from compactmlip import checkpoint
from compactmlip.data.graph import build_graph, energy_and_derivatives
from compactmlip.errors import CheckpointError
from compactmlip.models import cast
from compactmlip.spec import ModelSpec

GOLDEN = Path(__file__).parent / "data" / "golden"


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_round_trip_is_bitwise(model_variant: nn.Module, tmp_path: Path, dtype: torch.dtype) -> None:
    model = cast(model_variant, dtype)
    again = checkpoint.load(checkpoint.save(model, tmp_path / "m.safetensors"))
    assert again.state_dict().keys() == model.state_dict().keys()
    for name, tensor in model.state_dict().items():
        other = again.state_dict()[name]
        assert other.dtype == tensor.dtype and torch.equal(other, tensor), name
    assert again.spec == model.spec.model_copy(update={"dtype": str(dtype).removeprefix("torch.")})


def test_energies_keep_double_precision_in_float32_files(small_model: nn.Module, tmp_path: Path) -> None:
    small_model.energy_shift[0] = -2037.7968694128
    cast(small_model, torch.float32)
    again = checkpoint.load(checkpoint.save(small_model, tmp_path / "m.safetensors"))
    assert float(again.energy_shift[0]) == -2037.7968694128


@pytest.mark.parametrize("name", ["nequip-v1.safetensors", "nequip-species-skip-v1.safetensors"])
def test_golden_files_of_version_1(name: str, structures: dict[str, Any]) -> None:
    """Written once by the first release; must be readable, with the same numbers, for ever."""
    model = checkpoint.load(GOLDEN / name)
    expected = json.loads((GOLDEN / name).with_suffix(".json").read_text())
    for title, energy in expected["energies"].items():
        batch = build_graph(structures[title], model.spec, torch.float64)
        found = energy_and_derivatives(model, batch)
        assert float(found.energies) == pytest.approx(energy, abs=1e-10)
    assert model.spec.provenance.licence == "MIT"


def test_missing_file(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="no such file"):
        checkpoint.load(tmp_path / "absent.safetensors")


@pytest.mark.parametrize("keep", [0, 5, 400, -10])
def test_truncated_file(small_model: nn.Module, tmp_path: Path, keep: int) -> None:
    path = checkpoint.save(small_model, tmp_path / "m.safetensors")
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(CheckpointError, match="truncated"):
        checkpoint.load(path)


def test_wrong_file_type(tmp_path: Path) -> None:
    path = tmp_path / "m.safetensors"
    torch.save({"a": torch.zeros(3)}, path)
    with pytest.raises(CheckpointError, match="compactmlip convert"):
        checkpoint.load(path)


def test_foreign_safetensors(tmp_path: Path) -> None:
    save_file({"a": torch.zeros(3)}, tmp_path / "m.safetensors")
    with pytest.raises(CheckpointError, match="not written by compactmlip"):
        checkpoint.load(tmp_path / "m.safetensors")


def _rewrite(path: Path, spec: dict[str, Any], tensors: dict[str, torch.Tensor] | None = None) -> None:
    tensors = load_file(path) if tensors is None else tensors
    save_file(tensors, path, metadata={checkpoint.SPEC_KEY: json.dumps(spec)})


def test_newer_version_is_refused(small_model: nn.Module, tmp_path: Path) -> None:
    path = checkpoint.save(small_model, tmp_path / "m.safetensors")
    _rewrite(path, {**json.loads(small_model.spec.to_json()), "format_version": 99})
    with pytest.raises(CheckpointError, match="Upgrade compactmlip"):
        checkpoint.load(path)


@pytest.mark.parametrize(
    "change", [{"family": "unheard-of"}, {"surprise": 1}, {"cutoff": -1.0}, {"species": ["Mg", "Xx"]}]
)
def test_damaged_spec(small_model: nn.Module, tmp_path: Path, change: dict[str, Any]) -> None:
    path = checkpoint.save(small_model, tmp_path / "m.safetensors")
    _rewrite(path, {**json.loads(small_model.spec.to_json()), **change})
    with pytest.raises(CheckpointError, match="damaged|unknown model family"):
        checkpoint.load(path)


def test_tensors_that_do_not_fit(small_model: nn.Module, tmp_path: Path) -> None:
    path = checkpoint.save(small_model, tmp_path / "m.safetensors")
    tensors = load_file(path)
    tensors["embedding.weight"] = tensors["embedding.weight"][:, :-1].contiguous()
    _rewrite(path, json.loads(small_model.spec.to_json()), tensors)
    with pytest.raises(CheckpointError, match="embedding.weight has shape"):
        checkpoint.load(path)


def test_nan_in_weights(small_model: nn.Module, tmp_path: Path) -> None:
    with torch.no_grad():
        small_model.readout.weight[0] = float("nan")
    path = checkpoint.save(small_model, tmp_path / "m.safetensors")
    with pytest.raises(CheckpointError, match="readout.weight holds values that are not finite"):
        checkpoint.load(path)


def test_unsuitable_name(small_model: nn.Module, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"\*\.safetensors"):
        checkpoint.save(small_model, tmp_path / "model.pt")


def test_missing_folder(small_model: nn.Module, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="cannot write"):
        checkpoint.save(small_model, tmp_path / "absent" / "m.safetensors")


def test_disk_full_leaves_the_old_file(
    small_model: nn.Module, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = checkpoint.save(small_model, tmp_path / "m.safetensors")
    before = path.read_bytes()

    def full(tensors: object, name: str, metadata: object = None) -> None:
        Path(name).write_bytes(b"half of it")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(checkpoint, "save_file", full)
    with pytest.raises(CheckpointError, match="No space left"):
        checkpoint.save(small_model, path)
    assert path.read_bytes() == before
    assert os.listdir(tmp_path) == ["m.safetensors"]


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
def test_disk_full_for_real(tmp_path: Path) -> None:
    """The write to a full device fails at flush time; the error is ours and nothing is left."""

    def write(temporary: Path) -> None:
        with open("/dev/full", "wb") as file:
            file.write(np.zeros(10000).tobytes())

    with pytest.raises(CheckpointError, match="No space left"):
        checkpoint.atomic_write(tmp_path / "x.bin", write)
    assert not list(tmp_path.iterdir())


def test_spec_is_frozen(small_spec: ModelSpec) -> None:
    with pytest.raises(ValueError, match="frozen"):
        small_spec.cutoff = 3.0
