"""LAMMPS on 1, 2 and 4 ranks computes what the ASE calculator computes."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from ase import Atoms
from ase.build import bulk
from lammps_runs import OBSERVE, Lammps, Observed, header, observed

from compactmlip import CompactMLIPCalculator
from compactmlip.lammps.input import write_data

RANKS = (1, 2, 4)
MODELS = {
    "mace": ("mace", "float64"),
    "sevennet": ("sevennet", "float64"),
    "mace float32": ("mace", "float32"),
    "sevennet float32": ("sevennet", "float32"),
    "short cutoffs": ("short", "float64"),
}


@dataclass(frozen=True)
class Case:
    """A structure, and commands that decide how it is split."""

    atoms: Atoms
    before: str = ""
    setup: str = ""


def _crystal(repeat: tuple[int, int, int], seed: int) -> Atoms:
    atoms = bulk("MgO", "rocksalt", a=4.21, cubic=True).repeat(repeat)
    atoms.rattle(0.05, seed=seed)
    return atoms


def _cases(ranks: int) -> dict[str, Case]:
    cubic = _crystal((2, 2, 2), 1)
    skewed = cubic.copy()
    skewed.set_cell(cubic.cell.array @ [[1, 0.12, 0.05], [0, 1, 0.2], [0, 0, 0.95]], scale_atoms=True)
    slab = _crystal((2, 2, 1), 2)
    slab.pbc = (True, True, False)
    slab.center(vacuum=15.0, axis=2)
    cluster = Atoms("MgOMgO", [[0, 0, 0], [2, 0, 0], [2.1, 2.1, 0], [9, 9, 9]])
    cluster.center(vacuum=3.0)
    return {
        "cubic": Case(cubic),
        "triclinic": Case(skewed),
        # Neighbours are several images of one atom, of this process or of another.
        "smaller than two cutoffs": Case(_crystal((1, 1, 1), 3)),
        "slab with empty ranks": Case(slab, before=f"processors 1 1 {ranks}"),
        "cluster": Case(cluster),
        "tiled": Case(cubic, before="comm_style tiled", setup="balance 1.0 rcb"),
        "tiled, triclinic": Case(skewed, before="comm_style tiled", setup="balance 1.0 rcb"),
        "unequal slices": Case(cubic, before=f"processors {ranks} 1 1", setup="balance 1.0 shift x 10 1.05"),
    }


CASES = tuple(_cases(1))
FEW = ("cubic", "smaller than two cutoffs", "tiled, triclinic")
"""For the slower model on four ranks, and for the one whose layers have cutoffs of their own."""
ONLY = {"mace float32": ("cubic",), "sevennet float32": ("cubic",), "short cutoffs": FEW}
KEYS = [(m, c) for m in MODELS for c in ONLY.get(m, CASES)]


def _keys(ranks: int) -> list[tuple[str, str]]:
    return [(m, c) for m, c in KEYS if ranks < 4 or m == "mace" or c in FEW]


@pytest.fixture(scope="module")
def found(
    lammps: Lammps, models: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory
) -> Callable[[int], dict[tuple[str, str], Observed]]:
    """Results of all models and structures on a number of ranks: one run, with ``clear`` between them."""
    known: dict[int, dict[tuple[str, str], Observed]] = {}

    def run(ranks: int) -> dict[tuple[str, str], Observed]:
        if ranks not in known:
            known[ranks] = _run(lammps, models, tmp_path_factory.mktemp(f"ranks{ranks}"), ranks)
        return known[ranks]

    return run


def _run(lammps: Lammps, models: Any, folder: Path, ranks: int) -> dict[tuple[str, str], Observed]:
    script = []
    for k, (model, name) in enumerate(_keys(ranks)):
        case, part = _cases(ranks)[name], folder / str(k)
        part.mkdir()
        write_data(part / "data.lammps", case.atoms, ["Mg", "O"])
        kind, dtype = MODELS[model]
        script.append(
            f"clear\nlog {k}/log.lammps\n{header(case.atoms, case.before)}read_data {k}/data.lammps\n"
            f"pair_style compactmlip\npair_coeff * * {models(kind, dtype=dtype)} Mg O\n{case.setup}\n"
            f"{OBSERVE.replace('forces.txt', f'{k}/forces.txt')}run 0\n"
        )
    done = lammps.run(folder, "\n".join(script), ranks=ranks)
    assert done.status == 0, done.output[-3000:]
    return {
        key: observed(type(done)(folder / str(k), 0, ""), _cases(ranks)[key[1]].atoms)
        for k, key in enumerate(_keys(ranks))
    }


@pytest.fixture(scope="module")
def expected(models: Any) -> Callable[[str, Atoms], Observed]:
    """The ASE calculator's results."""
    calculators: dict[str, CompactMLIPCalculator] = {}

    def evaluate(model: str, atoms: Atoms) -> Observed:
        if model not in calculators:
            kind, dtype = MODELS[model]
            calculators[model] = CompactMLIPCalculator(models(kind, dtype=dtype))
        atoms = atoms.copy()
        atoms.calc = calculators[model]
        stress = atoms.get_stress(voigt=False) if atoms.pbc.any() else np.full((3, 3), np.nan)
        return Observed(
            atoms.get_potential_energy(), atoms.get_potential_energies(), atoms.get_forces(), stress, stress
        )

    return evaluate


@pytest.mark.parametrize(("model", "name", "ranks"), [(*key, n) for n in RANKS for key in _keys(n)])
def test_same_as_ase(model: str, name: str, ranks: int, found: Any, expected: Any) -> None:
    got: Observed = found(ranks)[model, name]
    want: Observed = expected(model, _cases(ranks)[name].atoms)
    single = model.endswith("float32")
    assert abs(want.forces).max() > 0.02
    assert abs(got.energy - want.energy) <= (1e-7 if single else 1e-10) * abs(want.energy)
    assert abs(got.energies - want.energies).max() <= (2e-6 if single else 1e-10)
    assert abs(got.forces - want.forces).max() <= (1e-5 if single else 1e-10)
    assert abs(got.per_atom_stress - got.stress).max() <= 1e-12
    if name != "cluster":
        assert abs(got.stress - want.stress).max() <= (1e-6 if single else 1e-11)


def test_float32_energies_differ_from_float64(found: Any) -> None:
    """The precision of the file is that of the run."""
    for kind in ("mace", "sevennet"):
        double, single = (found(1)[model, "cubic"] for model in (kind, f"{kind} float32"))
        assert 0 < abs(single.forces - double.forces).max() < 1e-5


def test_plain_torch_file_on_one_rank(lammps: Lammps, models: Any, expected: Any, tmp_path: Path) -> None:
    """Images of atoms are the atoms, so a file without operators for messages is enough."""
    case = _cases(1)["triclinic"]
    got = lammps.evaluate(tmp_path, case.atoms, models("mace", backend="torch"))
    want = expected("mace", case.atoms)
    assert np.allclose(got.forces, want.forces, atol=1e-5)  # tables of the other file
    assert abs(got.energy - want.energy) < 1e-5
