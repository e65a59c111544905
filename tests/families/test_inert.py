"""Whole-module files are read exactly, without the packages that wrote them.

``tests/reference/make_mace_models.py`` makes the stored models with mace-torch.
"""

from __future__ import annotations

import importlib
import os
import pickle
import pkgutil
import sys
import warnings
import zipfile
from collections import OrderedDict
from pathlib import Path

import numpy as np
import pytest
import torch
from pickles import FOLDER, archive, read, text
from torch import nn

from compactmlip.errors import CheckpointError, UnsupportedFeatureError
from compactmlip.families.inert import InertGlobal, InertObject, irreps, load_inert, modules, state_dict
from compactmlip.families.inert_names import MACE_CLASSES, NEWEST_MACE

NAMES = ("e3nn", "cueq", "plain")


@pytest.mark.parametrize("name", NAMES)
def test_state_dict_is_that_of_the_real_module(name: str) -> None:
    reference = {
        key.partition("/")[2]: value
        for key, value in np.load(FOLDER / "state-dicts.npz").items()
        if key.startswith(f"{name}/")
    }
    found = state_dict(read(FOLDER / f"{name}.model"))
    assert list(found) == list(reference) and len(found) > 70
    for key, value in reference.items():
        assert found[key].numpy().dtype == value.dtype, key
        np.testing.assert_array_equal(found[key].numpy(), value, strict=True, err_msg=key)
    assert not any(tensor.requires_grad for tensor in found.values())


def test_buffers_inside_stored_torchscript() -> None:
    """They are Wigner 3j tables, which are orthogonal: sum_{m1 m2} w_{m1 m2 m} w_{m1 m2 m'} = 1/(2l+1)."""
    root = read(FOLDER / "plain.model")
    scripts = {name: m for name, m in modules(root) if m.module.startswith("__torch__.")}
    tables = {key: value for m in scripts.values() for key, value in m.table("_buffers").items()}
    assert set(tables) == {"_w3j_1_1_2", "_w3j_1_2_1"}
    for table in tables.values():
        square = torch.tensordot(table, table, dims=([0, 1], [0, 1]))
        torch.testing.assert_close(square, torch.eye(len(square), dtype=square.dtype) / len(square))
    assert {f"interactions.1.conv_tp._compiled_main_left_right.{key}" for key in tables} <= set(
        state_dict(root)
    )


def test_classes_and_attributes() -> None:
    root = read(FOLDER / "e3nn.model")
    assert (root.module, root.name) == ("mace.modules.models", "ScaleShiftMACE")
    assert root.attribute("r_max").item() == 4.0 and root.attribute("r_max").ndim == 0
    assert root.attribute("atomic_numbers").tolist() == [1, 8]
    assert root.attribute("heads") == ["Default"]
    found = dict(modules(root))
    assert found[""] is root
    assert found["interactions.1"].name == "RealAgnosticResidualInteractionBlock"
    assert found["interactions.1"] is found["interactions"].attribute("1")
    average = found["interactions.0"].attribute("avg_num_neighbors")
    assert isinstance(average, np.float64) and average == 3.5
    assert found["interactions.0"].attribute("radial_MLP") == [8]
    assert found["interactions.0"].attribute("conv_tp") is found["interactions.0.conv_tp"]
    weight = found["node_embedding.linear"].attribute("weight")
    assert isinstance(weight, nn.Parameter) and weight.requires_grad
    assert root.attribute("no_such_thing", 7) == 7
    with pytest.raises(CheckpointError, match="ScaleShiftMACE in this file has no attribute 'no_such_thing'"):
        root.attribute("no_such_thing")


def test_functions_are_names() -> None:
    gates = {}
    for name in ("e3nn", "plain"):
        found = dict(modules(read(FOLDER / f"{name}.model")))
        gates[name] = found["readouts.1.non_linearity.acts.0"].attribute("f")
    assert gates == {
        "e3nn": InertGlobal("torch.nn.functional", "silu"),
        "plain": InertGlobal("torch", "tanh"),
    }
    assert not any(callable(gate) for gate in gates.values())


@pytest.mark.parametrize("name", NAMES)
def test_irreps(name: str) -> None:
    found = dict(modules(read(FOLDER / f"{name}.model")))
    assert irreps(found["interactions.0"].attribute("hidden_irreps")) == [(4, 0, 1), (4, 1, -1)]
    assert irreps(found["node_embedding.linear"].attribute("irreps_in")) == [(2, 0, 1)]


def test_irreps_of_both_packages_and_of_text() -> None:
    contraction = "products.0.symmetric_contractions"
    for name, package in (("e3nn", "e3nn"), ("cueq", "cuequivariance")):
        stored = dict(modules(read(FOLDER / f"{name}.model")))[contraction].attribute("irreps_in")
        assert stored.module.split(".")[0] == package
        assert irreps(stored) == [(4, 0, 1), (4, 1, -1)]
    assert irreps("128x0e + 1o+2x3e") == [(128, 0, 1), (1, 1, -1), (2, 3, 1)]
    for wrong in ("4x0e+", "4x0", InertObject("e3nn.o3._irreps", "Irreps"), 3, None):
        with pytest.raises(CheckpointError, match="irreps"):
            irreps(wrong)


def test_modules_have_the_names_of_named_modules(tmp_path: Path) -> None:
    """A torch model with everything that can make names differ: shared modules, None, hidden buffers."""
    shared = nn.Linear(2, 3)
    model = nn.Sequential(OrderedDict(a=shared, b=nn.ModuleList([shared, nn.LayerNorm(3)]), c=nn.Identity()))
    model.c.register_buffer("kept", torch.arange(6.0).reshape(2, 3).T)
    model.c.register_buffer("hidden", torch.ones(1), persistent=False)
    model.c.register_buffer("absent", None)
    model.c.register_buffer("empty", torch.zeros(0, 4, dtype=torch.int64))
    model.c.register_parameter("nothing", None)
    model.c.list = nn.ParameterList([torch.ones(2), torch.zeros(1)])
    model.c.register_buffer("bf16", torch.ones(3).to(torch.bfloat16)[1:])
    torch.save(model, tmp_path / "m.model")
    root = read(tmp_path / "m.model")
    assert [n for n, _ in modules(root)] == [n for n, _ in model.named_modules()]
    expected, found = model.state_dict(), state_dict(root)
    assert list(found) == list(expected) and "b.0.weight" in found and "c.hidden" not in found
    for key, value in expected.items():
        assert found[key].dtype == value.dtype and torch.equal(found[key], value), key


def test_plain_values_stay_what_they_are(tmp_path: Path) -> None:
    values = {
        "text": "Å",
        "numbers": [1, -(2**70), 2.5, True, None],
        "bytes": b"\x00\xff",
        "containers": ({1, 2}, frozenset([3]), OrderedDict(a=1), slice(0, 3)),
        "numpy": [np.float32(0.1), np.int64(7)],
        "array": np.arange(6, dtype=np.int32).reshape(2, 3),
        "fortran": np.asfortranarray(np.arange(6.0).reshape(2, 3)),
        "torch": [torch.float32, torch.Size([2, 3]), torch.device("cpu"), torch.tensor(1.5)],
    }
    model = nn.Identity()
    model.values = values
    for protocol in (2, 3, 4):
        torch.save(model, tmp_path / "m.model", pickle_protocol=protocol)
        found = read(tmp_path / "m.model").attribute("values")
        assert found.keys() == values.keys()
        for key in ("text", "numbers", "bytes", "containers", "numpy", "torch"):
            assert found[key] == values[key], (protocol, key)
        assert [type(v) for v in found["numpy"]] == [np.float32, np.int64]
        for key in ("array", "fortran"):
            np.testing.assert_array_equal(found[key], values[key], strict=True)


@pytest.mark.parametrize("name", ["mace.modules.evil.Foo", "mace.modules.models.FutureMACE", "mace.system"])
def test_a_newer_mace_is_named(name: str, tmp_path: Path) -> None:
    module, _, last = name.rpartition(".")
    content = f"c{module}\n{last}\n".encode() + text(f"touch {tmp_path / 'ran'}") + b"\x85R."
    with pytest.raises(
        UnsupportedFeatureError, match=rf"(?s)m.model: uses {name}, .* 0.3.16, .*Upgrade"
    ) as e:
        read(archive(tmp_path / "m.model", content))
    assert "state dict and the config" in str(e.value)
    assert not (tmp_path / "ran").exists()


def test_state_dict_file_is_no_model() -> None:
    with pytest.raises(CheckpointError, match="holds a OrderedDict.*and no model.*with its config"):
        read(FOLDER / "state-dict.pt")


def test_torchscript_file_is_no_model(tmp_path: Path) -> None:
    torch.jit.script(nn.Linear(2, 2)).save(tmp_path / "m.pt")
    with pytest.raises(CheckpointError, match="TorchScript.*Give the original .model"):
        read(tmp_path / "m.pt")


def test_damaged_files(tmp_path: Path) -> None:
    path = tmp_path / "m.model"
    with pytest.raises(CheckpointError, match="no such file"):
        load_inert(path)
    whole = (FOLDER / "e3nn.model").read_bytes()
    for content in (b"", b"MACE", pickle.dumps({"a": 1}), whole[: len(whole) // 2], whole[:-30]):
        path.write_bytes(content)
        with pytest.raises(CheckpointError, match="not a complete PyTorch file|truncated or damaged"):
            read(path)
    spoiled = bytearray(whole)
    spoiled[len(whole) // 2] ^= 1
    path.write_bytes(spoiled)
    with pytest.raises(CheckpointError, match="Bad CRC-32.*damaged"):
        read(path)
    with zipfile.ZipFile(path, "w") as file:
        file.writestr("readme.txt", "not a model")
    with pytest.raises(CheckpointError, match="has no data.pkl"):
        read(path)
    other = b"big" if sys.byteorder == "little" else b"little"
    with pytest.raises(CheckpointError, match="endian byte order"):
        read(archive(path, pickle.dumps(1, 2), byteorder=other))


def test_every_truncation_of_the_pickle_is_an_error(tmp_path: Path) -> None:
    """Also cut where a shorter pickle would still be a stack with something on it."""
    model = nn.Sequential(nn.Linear(2, 2))
    torch.save(model, tmp_path / "whole.model")
    with zipfile.ZipFile(tmp_path / "whole.model") as file:
        parts = {name.partition("/")[2]: file.read(name) for name in file.namelist()}
    content = parts.pop("data.pkl")
    for end in range(0, len(content), 7):
        with pytest.raises(CheckpointError, match="damaged"):
            load_inert(archive(tmp_path / "m.model", content[:end], **parts))


def test_known_classes_are_those_of_the_newest_mace() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        mace = pytest.importorskip("mace", reason="needs mace-torch")
        package = pytest.importorskip("mace.modules")
        if mace.__version__ != NEWEST_MACE:
            pytest.skip(f"mace-torch {mace.__version__} is not {NEWEST_MACE}")
        for known in MACE_CLASSES:
            module, _, name = known.rpartition(".")
            assert hasattr(importlib.import_module(module), name), known
        for found in pkgutil.iter_modules(package.__path__, "mace.modules."):
            module = importlib.import_module(found.name)
            defined = {
                n for n, c in vars(module).items() if isinstance(c, type) and c.__module__ == found.name
            }
            if found.name != "mace.modules.loss":  # training only; no part of a model
                assert {f"{found.name}.{name}" for name in defined} <= MACE_CLASSES


def test_a_model_of_ones_own_against_torch_load() -> None:
    """Name a .model file in COMPACTMLIP_MACE_MODEL to compare all its tensors and module names."""
    path = os.environ.get("COMPACTMLIP_MACE_MODEL")
    if not path:
        pytest.skip("COMPACTMLIP_MACE_MODEL names no file")
    root = read(Path(path))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        pytest.importorskip("mace.modules", reason="needs mace-torch")
        real = torch.load(path, map_location="cpu", weights_only=False)
    expected, found = real.state_dict(), state_dict(root)
    assert [n for n, _ in modules(root)] == [n for n, _ in real.named_modules()]
    assert list(found) == [key for key in expected if "._tensor_constant" not in key]
    for key, value in found.items():
        assert value.dtype == expected[key].dtype and torch.equal(value, expected[key]), key
