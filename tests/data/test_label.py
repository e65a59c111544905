from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import ase.io
import numpy as np
import pytest
import torch
from ase import Atoms
from ase.build import molecule
from ase.constraints import FixAtoms
from ase.stress import voigt_6_to_full_3x3_stress
from torch import Tensor, nn

from compactmlip.data.extxyz import format_frame
from compactmlip.data.graph import build_graph, energy_and_derivatives
from compactmlip.data.label import label
from compactmlip.errors import CheckpointError, CompactMLIPError, InputError, SpeciesError


class Interrupted(Exception):
    pass


class Watched(nn.Module):
    """A model that records how many atoms it was asked for and fails after some batches."""

    def __init__(self, model: nn.Module, batches: int | None = None) -> None:
        super().__init__()
        self.model, self.spec, self.batches = model, model.spec, batches
        self.sizes: list[int] = []

    def forward(self, species: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        if self.batches is not None and len(self.sizes) == self.batches:
            raise Interrupted
        self.sizes.append(len(species))
        return self.model(species, *args, **kwargs)


@pytest.fixture
def frames(structures: dict[str, Atoms], rng: np.random.Generator) -> list[Atoms]:
    out = []
    for k in range(3):
        for name, atoms in structures.items():
            moved = atoms.copy()
            moved.positions += 0.02 * rng.standard_normal((len(atoms), 3))
            moved.info.update(config_type="rattle", source=k, temperature=300.0, name=name)
            out.append(moved)
    return out


@pytest.fixture
def tiny_model(make_spec: Callable[..., Any], make_model: Callable[..., nn.Module]) -> nn.Module:
    return make_model(make_spec(channels=(4, 2), num_layers=1, lmax_edge=1))


def run(frames: list[Atoms], model: nn.Module, output: Path, **options: Any) -> list[Atoms]:
    return label(frames, model, output, max_edges=400, progress=False, **options)


def test_labels_are_the_models_own(tiny_model: nn.Module, frames: list[Atoms], tmp_path: Path) -> None:
    frames[0].info.update(REF_energy=99.0, REF_stress=np.ones(6))
    frames[0].new_array("tags", np.arange(len(frames[0])))
    frames[0].set_constraint(FixAtoms([0, 1]))
    labelled = run(frames, tiny_model, tmp_path / "out.extxyz")
    for atoms, out in zip(frames, labelled, strict=True):
        expected = energy_and_derivatives(tiny_model, build_graph(atoms, tiny_model.spec))
        assert np.array_equal(out.positions, atoms.positions)
        assert out.info["REF_energy"] == pytest.approx(expected.energies.item(), abs=1e-9)
        assert out.arrays["REF_energies"] == pytest.approx(expected.node_energies.numpy(), abs=1e-9)
        assert out.arrays["REF_forces"] == pytest.approx(expected.forces.numpy(), abs=1e-9)
        assert out.info["REF_energy"] == pytest.approx(out.arrays["REF_energies"].sum(), abs=1e-9)
        assert ("REF_stress" in out.info) == bool(atoms.pbc.any())
        if atoms.pbc.any():
            full = voigt_6_to_full_3x3_stress(out.info["REF_stress"])
            assert full == pytest.approx(expected.stresses[0].numpy(), abs=1e-9)
        assert out.info["name"] == atoms.info["name"] and out.info["temperature"] == 300.0
    assert np.array_equal(labelled[0].arrays["tags"], np.arange(len(frames[0])))
    assert frames[0].info["REF_energy"] == 99.0, "the input must not change"


def test_forces_are_minus_the_energy_gradient(
    tiny_model: nn.Module, structures: dict[str, Atoms], tmp_path: Path
) -> None:
    step, atoms = 1e-4, structures["molecule"]
    moved = [atoms.copy() for _ in range(3)]
    moved[1].positions[3, 1] += step
    moved[2].positions[3, 1] -= step
    out = run(moved, tiny_model, tmp_path / "out.xyz")
    slope = (out[1].info["REF_energy"] - out[2].info["REF_energy"]) / (2 * step)
    assert abs(slope) > 1e-3
    assert out[0].arrays["REF_forces"][3, 1] == pytest.approx(-slope, rel=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_file_keeps_every_digit(
    make_model: Callable[..., nn.Module],
    tiny_model: nn.Module,
    frames: list[Atoms],
    tmp_path: Path,
    dtype: torch.dtype,
) -> None:
    model = make_model(tiny_model.spec, dtype=dtype)
    label([frames[0]], model, tmp_path / "out.extxyz", progress=False)
    (atoms,) = ase.io.read(tmp_path / "out.extxyz", ":")
    expected = energy_and_derivatives(model, build_graph(frames[0], model.spec, dtype))
    assert np.array_equal(atoms.arrays["REF_forces"], expected.forces.double().numpy())
    assert np.array_equal(atoms.arrays["REF_energies"], expected.node_energies.numpy())


@pytest.mark.parametrize("torn", [0, 1, 40, 400])
def test_interrupted_run_goes_on(
    tiny_model: nn.Module, frames: list[Atoms], tmp_path: Path, torn: int
) -> None:
    whole = run(frames, tiny_model, tmp_path / "whole.xyz")
    output, partial = tmp_path / "out.xyz", tmp_path / "out.xyz.partial"
    broken = Watched(tiny_model, batches=3)
    with pytest.raises(Interrupted):
        run(frames, broken, output)
    assert not output.exists()
    done = ase.io.read(partial, ":", format="extxyz")
    assert sum(map(len, done)) == sum(broken.sizes) > 0
    if torn:  # the machine died while the last frame was written
        partial.write_bytes(partial.read_bytes()[:-torn])
    lost = next(k for k in range(9) if torn <= sum(len(format_frame(a)) for a in done[len(done) - k :]))
    again = Watched(tiny_model)
    assert_same(run(frames, again, output), whole)
    assert sum(again.sizes) == sum(map(len, frames)) - sum(map(len, done[: len(done) - lost]))
    assert not partial.exists()


def assert_same(a: list[Atoms], b: list[Atoms]) -> None:
    assert len(a) == len(b)
    for x, y in zip(a, b, strict=True):
        assert x.info["REF_energy"] == pytest.approx(y.info["REF_energy"], abs=1e-9)
        assert x.arrays["REF_forces"] == pytest.approx(y.arrays["REF_forces"], abs=1e-9)
        assert np.array_equal(x.positions, y.positions)


def test_finished_run_is_not_repeated(tiny_model: nn.Module, frames: list[Atoms], tmp_path: Path) -> None:
    output = tmp_path / "out.xyz"
    first = run(frames, tiny_model, output)
    watched = Watched(tiny_model)
    # The wrapper changes the names of the parameters: take the state dict of the model inside.
    watched.state_dict = tiny_model.state_dict  # type: ignore[method-assign]
    assert_same(run(frames, watched, output), first)
    assert watched.sizes == []


@pytest.mark.parametrize("change", ["model", "frames", "order"])
@pytest.mark.parametrize("finished", [True, False])
def test_other_work_is_not_mixed_in(
    make_model: Callable[..., nn.Module],
    tiny_model: nn.Module,
    frames: list[Atoms],
    tmp_path: Path,
    change: str,
    finished: bool,
) -> None:
    output, model = tmp_path / "out.xyz", Watched(tiny_model, None if finished else 2)
    if finished:
        run(frames, model, output)
    else:
        with pytest.raises(Interrupted):
            run(frames, model, output)
    model.batches = None
    others = [atoms.copy() for atoms in frames]
    if change == "model":
        model = Watched(make_model(tiny_model.spec, seed=1))
    elif change == "frames":
        others[-1].positions[0, 0] += 1e-3
    else:
        others.reverse()
    left = output if finished else tmp_path / "out.xyz.partial"
    before = left.read_bytes()
    with pytest.raises(InputError, match=r"out\.xyz.*(another model|other structures).*(delete|overwrite)"):
        run(others, model, output)
    assert left.read_bytes() == before
    replaced = run(others, model, output, overwrite=True)
    assert_same(replaced, run(others, model, tmp_path / "fresh.xyz"))
    assert sorted(p.name for p in tmp_path.iterdir()) == ["fresh.xyz", "out.xyz"]


def test_foreign_output_is_not_overwritten(
    tiny_model: nn.Module, frames: list[Atoms], tmp_path: Path
) -> None:
    output = tmp_path / "dft.xyz"
    ase.io.write(output, molecule("H2O"))
    before = output.read_bytes()
    with pytest.raises(InputError, match="holds other structures"):
        run(frames, tiny_model, output)
    assert output.read_bytes() == before


def test_bad_input(tiny_model: nn.Module, frames: list[Atoms], tmp_path: Path) -> None:
    output = tmp_path / "out.xyz"
    with pytest.raises(InputError, match="no structure"):
        run([], tiny_model, output)
    with pytest.raises(SpeciesError, match=r"frame 2 contains N,"):
        run([*frames[:2], molecule("NH3")], tiny_model, output)
    broken = frames[1].copy()
    broken.positions[2, 0] = np.nan
    with pytest.raises(InputError, match=r"frame 1: the position of atom 2 is not finite"):
        run([frames[0], broken], tiny_model, output)
    overlap = Atoms("O2", [[0, 0, 0], [0, 0, 1e-5]])
    with pytest.raises(InputError, match=r"frame 1: .*on top of each other"):
        run([frames[0], overlap], tiny_model, output)
    with pytest.raises(InputError, match=r"out\.traj"):
        run(frames, tiny_model, tmp_path / "out.traj")
    with pytest.raises(InputError, match="does not exist"):
        run(frames, tiny_model, tmp_path / "nowhere" / "out.xyz")
    assert not output.exists()


def test_frame_number_after_a_resume(tiny_model: nn.Module, frames: list[Atoms], tmp_path: Path) -> None:
    """An error in a resumed run counts frames from the start of the data set."""
    frames[12] = Atoms("O2", [[0, 0, 0], [0, 0, 1e-5]])
    with pytest.raises(InputError, match="frame 12"):
        run(frames, tiny_model, tmp_path / "out.xyz")
    assert (tmp_path / "out.xyz.partial").stat().st_size > 0
    with pytest.raises(InputError, match="frame 12"):
        run(frames, tiny_model, tmp_path / "out.xyz")


def test_numbers_that_are_not_finite_are_refused(
    tiny_model: nn.Module, frames: list[Atoms], tmp_path: Path
) -> None:
    tiny_model.get_buffer("energy_shift")[:] = float("nan")
    with pytest.raises(CompactMLIPError, match="frame 0"):
        run(frames, tiny_model, tmp_path / "out.xyz")


def test_full_disk_is_reported(
    tiny_model: nn.Module, frames: list[Atoms], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(_: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("compactmlip.data.label.os.fsync", full)
    with pytest.raises(CheckpointError, match=r"No space left on device.*Finished frames are kept"):
        run(frames, tiny_model, tmp_path / "out.xyz")
