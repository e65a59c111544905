"""Products in float32 stay in float32 whatever the program has set, and its settings come back."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from ase import Atoms
from torch import nn

from compactmlip.deploy import engine
from compactmlip.deploy.archive import inspect
from compactmlip.deploy.ase import CompactMLIPCalculator
from compactmlip.deploy.compile import compile_model
from compactmlip.deploy.engine import uses_tf32
from compactmlip.deploy.matmul import matmul_precision
from compactmlip.errors import InputError
from compactmlip.info import describe

CUDA, CPU = torch.backends.cuda.matmul, torch.backends.mkldnn.matmul

pytestmark = pytest.mark.skipif(not hasattr(CUDA, "fp32_precision"), reason="torch without these settings")


def state() -> tuple[object, ...]:
    """Old and new settings; the old ones cannot be read where they contradict the new ones."""
    found: list[object] = []
    for read in (torch.get_float32_matmul_precision, lambda: CUDA.allow_tf32):
        try:
            found.append(read())
        except RuntimeError:
            found.append("contradiction")
    return (*found, CUDA.fp32_precision, CPU.fp32_precision, torch.backends.fp32_precision)


@pytest.fixture(autouse=True)
def _restored() -> Iterator[None]:
    def defaults() -> None:
        torch.set_float32_matmul_precision("highest")
        CUDA.fp32_precision = CPU.fp32_precision = "none"

    defaults()  # whatever other tests, or libraries that they load, left behind
    before = state()
    yield
    defaults()
    assert state() == before


def allow_tf32() -> None:
    CUDA.allow_tf32 = True


def newer_interface() -> None:
    CUDA.fp32_precision = "tf32"


def contradiction() -> None:
    torch.set_float32_matmul_precision("medium")
    CUDA.fp32_precision = "ieee"


SETTINGS: dict[str, Callable[[], None]] = {
    "default": lambda: None,
    "high": lambda: torch.set_float32_matmul_precision("high"),
    "medium": lambda: torch.set_float32_matmul_precision("medium"),
    "allow_tf32": allow_tf32,
    "newer interface": newer_interface,
    "contradiction": contradiction,
}


@pytest.mark.parametrize("name", list(SETTINGS))
@pytest.mark.parametrize("tf32", [False, True])
def test_settings_inside_and_after(name: str, tf32: bool) -> None:
    SETTINGS[name]()
    before = state()
    expected = ("high", True, "tf32", "ieee") if tf32 else ("highest", False, "ieee", "ieee")
    with matmul_precision(tf32=tf32):
        assert state()[:4] == expected
    assert state() == before
    with pytest.raises(ZeroDivisionError), matmul_precision(tf32=tf32):
        _ = 1 / 0
    assert state() == before


@pytest.mark.parametrize("tf32", [False, True])
def test_calculator_computes_in_float32(
    tf32: bool, small_model: nn.Module, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Only the CPU is here, where a file never asks for TF32, even if it allows it."""
    path = compile_model(small_model, tmp_path / "m.pt", tf32=tf32).path
    assert inspect(path)[1].tf32 is tf32
    assert ("TF32" in describe(path)["precision"]) is tf32
    seen: list[tuple[object, ...]] = []
    real = engine.energy_and_derivatives

    def recorded(*args: object) -> object:
        seen.append(state())
        return real(*args)  # type: ignore[arg-type]

    monkeypatch.setattr(engine, "energy_and_derivatives", recorded)
    torch.set_float32_matmul_precision("medium")
    before = state()
    for model in (path, small_model):
        atoms = Atoms("OH", [[0, 0, 0], [0, 0, 1]])
        atoms.calc = CompactMLIPCalculator(model)
        atoms.get_forces()
    assert [s[:4] for s in seen] == 2 * [("highest", False, "ieee", "ieee")]
    assert state() == before


def test_only_files_that_say_so_use_tf32_and_only_on_gpus(small_model: nn.Module, tmp_path: Path) -> None:
    for tf32 in (False, True):
        _, deployment = inspect(compile_model(small_model, tmp_path / "m.pt", tf32=tf32).path)
        assert uses_tf32(deployment, torch.device("cuda")) is tf32
        assert not uses_tf32(deployment, torch.device("cpu"))


def test_where_tf32_means_nothing(small_model: nn.Module, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="without --dtype float64"):
        compile_model(small_model, tmp_path / "m.pt", dtype="float64", tf32=True)
    with pytest.raises(InputError, match="--backend torch"):
        compile_model(small_model, tmp_path / "m.pt2", backend="aoti", tf32=True)
    assert not list(tmp_path.iterdir())
