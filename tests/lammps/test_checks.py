"""What the pair style tells of its own reliability: atoms outside the trust region, models that differ."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from ase import Atoms
from ase.build import bulk
from lammps_runs import Lammps, Run, dumped, header
from trust_structures import crystals, squeezed

from compactmlip import CompactMLIPCalculator
from compactmlip.lammps.input import write_data

ROOT = Path(__file__).resolve().parents[2]
WARNING = "outside the model's trust region in step"
SAID_ONCE = "This is said once"


def script(model: Path, atoms: Atoms, style: str, commands: str, before: str = "") -> str:
    start = f"{header(atoms, before)}read_data data.lammps\npair_style compactmlip {style}\n"
    return f"{start}pair_coeff * * {model} Mg O\n{commands}\n"


def run(lammps: Lammps, folder: Path, text: str, atoms: Atoms, ranks: int = 1) -> Run:
    folder.mkdir(parents=True, exist_ok=True)
    write_data(folder / "data.lammps", atoms, ["Mg", "O"])
    return lammps.run(folder, text, ranks=ranks)


def succeeded(done: Run) -> Run:
    assert done.status == 0, done.output[-3000:]
    return done


# The trust region

COUNT = """compute told all pair compactmlip
fix scores all pair 1 compactmlip trust_score 0
thermo_style custom step pe c_told[1]
dump scores all custom 1 scores.txt id f_scores
dump_modify scores sort id format float %.17g
"""


@pytest.mark.parametrize("ranks", [1, 2, 4])
@pytest.mark.parametrize("dtype", ["float64", "float32"])
def test_scores_are_those_of_ase(lammps: Lammps, models: Any, tmp_path: Path, ranks: int, dtype: str) -> None:
    atoms = squeezed() * (1, 2, 2)
    model = models("trusted", dtype=dtype)
    done = succeeded(run(lammps, tmp_path, script(model, atoms, "check 1", COUNT + "run 0"), atoms, ranks))
    atoms.calc = CompactMLIPCalculator(model, check=1)
    with pytest.warns(UserWarning, match="trust region"):
        atoms.get_potential_energy()
    outside = atoms.calc.outside
    assert outside is not None and 0 < outside.count < len(atoms)
    scores = dumped(tmp_path / "scores.txt")[:, 0]
    assert np.allclose(scores, outside.scores.max(axis=1), rtol=1e-9 if dtype == "float64" else 1e-3)
    assert done.thermo()["c_told[1]"][0] == outside.count
    assert done.output.count(WARNING) == done.output.count(SAID_ONCE) == 1
    assert f"{outside.count} of {len(atoms)} atoms" in done.output
    for name, column in zip(
        ("species", "distance", "coordination", "features"), outside.scores.T, strict=True
    ):
        bad = int((column > 1).sum())
        assert (f"{name}: {bad}" in done.output) == (bad > 0)
    example = int(done.output.split(", atom ")[1].split()[0])
    assert outside.mask[example - 1]


def test_inside_nothing_is_said(lammps: Lammps, models: Any, tmp_path: Path) -> None:
    atoms = crystals(1)[0]
    text = script(models("trusted"), atoms, "check 1", COUNT + "run 0")
    done = succeeded(run(lammps, tmp_path, text, atoms))
    assert done.thermo()["c_told[1]"][0] == 0 and WARNING not in done.output
    assert (dumped(tmp_path / "scores.txt") <= 1).all()


def test_every_so_many_steps(lammps: Lammps, models: Any, tmp_path: Path) -> None:
    """Between two looks the count stays; scores are forgotten when LAMMPS sorts atoms anew, or asked for."""
    atoms = crystals(1)[0]
    commands = COUNT.replace("trust_score 0", "trust_score FLAG") + (
        "thermo 1\nfix move all nve\ntimestep 0.001\nrun 1\ndisplace_atoms all random 0.5 0.5 0.5 7\nrun 3\n"
    )
    for flag in (0, 1):
        text = script(models("trusted"), atoms, "check 3", commands.replace("FLAG", str(flag)))
        done = succeeded(run(lammps, tmp_path, text, atoms))
        counts = done.thermo()["c_told[1]"][-4:]  # of steps 1 to 4
        known = [np.isfinite(dumped(tmp_path / "scores.txt", step)).all() for step in range(1, 5)]
        if flag:
            assert (counts[1:] > 0).all() and all(known)  # fix pair does not ask in the setup
        else:
            assert counts[0] == counts[1] == 0 and counts[2] == counts[3] > 0
            assert known[:3] == [True, False, True]
            assert done.output.count(WARNING) == 1 and f"{WARNING} 3" in done.output


@pytest.mark.parametrize("ranks", [1, 2])
def test_stop_outside(lammps: Lammps, models: Any, tmp_path: Path, ranks: int) -> None:
    atoms = squeezed()
    text = script(models("trusted"), atoms, "check 1 stop_outside yes", "run 1")
    done = run(lammps, tmp_path, text, atoms, ranks)
    assert done.status != 0 and WARNING in done.error and "Loop time" not in done.output


def test_halt_instead_of_stopping(lammps: Lammps, models: Any, tmp_path: Path) -> None:
    """LAMMPS's own commands use the count: the run ends in order, and what follows is done."""
    atoms = squeezed()
    commands = COUNT + (
        "variable outside equal c_told[1]\nfix halt all halt 1 v_outside > 0 error soft\nfix move all nve\n"
        "run 5\nwrite_data after.data\n"
    )
    done = succeeded(run(lammps, tmp_path, script(models("trusted"), atoms, "check 1", commands), atoms))
    assert "Fix halt" in done.output and (tmp_path / "after.data").exists()


def test_model_without_a_region(lammps: Lammps, models: Any, tmp_path: Path) -> None:
    atoms = crystals(1)[0]
    done = run(lammps, tmp_path, script(models("mace"), atoms, "check 5", "run 0"), atoms)
    assert done.status != 0 and "has none; use 'compactmlip compile --calibration'" in done.error


# A committee

DEVIATION = """compute told all pair compactmlip
fix deviation all pair 1 compactmlip force_deviation 0
thermo_style custom step pe c_told[2] c_told[3] c_told[4]
thermo_modify format float %.17g
dump forces all custom 1 forces.txt id fx fy fz f_deviation
dump_modify forces sort id format float %.17g
"""


@pytest.fixture(scope="module")
def crystal() -> Atoms:
    atoms = bulk("MgO", "rocksalt", a=4.21, cubic=True).repeat((2, 1, 2))
    atoms.rattle(0.1, seed=1)
    return atoms


@pytest.fixture
def files(models: Any) -> list[Path]:
    return [models("trusted"), models("mace"), models("other")]


def by_ase(files: list[Path], atoms: Atoms) -> tuple[np.ndarray, np.ndarray]:
    """Forces (models, N, 3) and energies of all models."""
    forces, energies = [], []
    for file in files:
        copy = atoms.copy()
        copy.calc = CompactMLIPCalculator(file)
        forces.append(copy.get_forces())
        energies.append(copy.get_potential_energy())
    return np.array(forces), np.array(energies)


@pytest.mark.parametrize("ranks", [1, 2, 4])
def test_deviation_of_models_with_different_species_and_cutoffs(
    lammps: Lammps, files: list[Path], crystal: Atoms, tmp_path: Path, ranks: int
) -> None:
    style = f"check 1 committee 1 {files[1]} {files[2]}"
    text = script(files[0], crystal, style, DEVIATION + "run 0")
    done = succeeded(run(lammps, tmp_path, text, crystal, ranks))
    forces, energies = by_ase(files, crystal)
    expected = np.sqrt(((forces - forces.mean(axis=0)) ** 2).sum(axis=2).mean(axis=0))
    table = dumped(tmp_path / "forces.txt")
    assert abs(table[:, :3] - forces[0]).max() < 1e-10  # those of the first model
    assert abs(table[:, 3] - expected).max() < 1e-10
    thermo = {name: column[0] for name, column in done.thermo().items()}
    assert thermo["PotEng"] == pytest.approx(energies[0], rel=1e-10)
    assert thermo["c_told[2]"] == pytest.approx(expected.max(), rel=1e-9)
    assert thermo["c_told[3]"] == pytest.approx(expected.mean(), rel=1e-9)
    assert thermo["c_told[4]"] == pytest.approx(energies.std() / len(crystal), rel=1e-9)
    assert expected.max() > 0.1 and energies.std() > 0.1


def test_committee_does_not_change_the_run(
    lammps: Lammps, files: list[Path], crystal: Atoms, tmp_path: Path
) -> None:
    moves = (
        "velocity all create 500 4928 loop all\nfix move all nve\ntimestep 0.001\n"
        "dump forces all custom 5 forces.txt id x fx fy fz\ndump_modify forces sort id format float %.17g\n"
        "run 10"
    )
    frames = []
    for style in ("", f"committee 2 {files[1]} {files[2]}"):
        succeeded(run(lammps, tmp_path, script(files[0], crystal, style, moves), crystal))
        frames.append((tmp_path / "forces.txt").read_text())
    assert frames[0] == frames[1]


@pytest.mark.parametrize("ranks", [1, 2])
def test_stop_deviation(
    lammps: Lammps, files: list[Path], crystal: Atoms, tmp_path: Path, ranks: int
) -> None:
    forces, _ = by_ase(files[:2], crystal)
    deviation = np.sqrt(((forces - forces.mean(axis=0)) ** 2).sum(axis=2).mean(axis=0))
    worst = int(deviation.argmax())
    for factor, stops in ((0.99, True), (1.01, False)):
        style = f"committee 1 {files[1]} stop_deviation {factor * deviation.max():.10f}"
        done = run(lammps, tmp_path, script(files[0], crystal, style, "run 0"), crystal, ranks)
        assert (done.status != 0) == stops, done.output[-2000:]
        if stops:
            assert f"eV/Angstrom at atom {worst + 1} in step 0, more than stop_deviation" in done.error


def test_dump_only_where_the_models_differ(
    lammps: Lammps, files: list[Path], crystal: Atoms, tmp_path: Path
) -> None:
    """As the README has it: structures that are worth a label."""
    forces, _ = by_ase(files[:2], crystal)
    deviation = np.sqrt(((forces - forces.mean(axis=0)) ** 2).sum(axis=2).mean(axis=0)).max()
    frames = []
    for k, factor in enumerate((0.5, 2.0)):
        commands = (
            "compute told all pair compactmlip\n"
            f"variable agree equal c_told[2]<{factor * deviation:.10f}\n"
            "dump worth all custom 1 worth.txt id type x y z\ndump_modify worth skip v_agree\nrun 0"
        )
        folder = tmp_path / str(k)
        text = script(files[0], crystal, f"committee 1 {files[1]}", commands)
        succeeded(run(lammps, folder, text, crystal))
        path = folder / "worth.txt"
        frames.append(path.read_text().count("TIMESTEP") if path.exists() else 0)
    assert frames == [1, 0]


@pytest.mark.parametrize("ranks", [1, 2])
def test_as_the_readme_has_it(
    lammps: Lammps, files: list[Path], crystal: Atoms, tmp_path: Path, ranks: int
) -> None:
    text = (ROOT / "README.md").read_text().split("### Reliability of a LAMMPS run")[1]
    block = text.split("```text\n")[1].split("```")[0]
    for name, file in zip(("model.pt", "other.pt", "third.pt"), files, strict=True):
        block = block.replace(name, str(file))
    start = f"{header(crystal)}read_data data.lammps\n{block}\n"
    start += "dump all all custom 100 all.txt id f_score[1] f_score[2]\nfix move all nve\nrun 100\n"
    done = succeeded(run(lammps, tmp_path, start, crystal, ranks))
    thermo, values = done.thermo(), dumped(tmp_path / "all.txt")
    assert len(thermo["Step"]) >= 1 and np.isfinite(values).all()
    assert values[:, 1].max() == pytest.approx(thermo["c_told[2]"][-1], rel=1e-4)
    assert (tmp_path / "worth-a-label.lammpstrj").exists() == (thermo["c_told[2]"].max() >= 0.3)


@pytest.mark.parametrize(
    ("style", "message"),
    [
        ("check", "keyword 'check' has no value"),
        ("check 0", "check must be at least 1, not 0"),
        ("check often", "'check' needs a whole number, not 'often'"),
        ("check 10 often", "unknown keyword 'often'; known are check, committee, device"),
        ("stop_outside yes", "needs 'check N'"),
        ("check 1 stop_outside perhaps", "unknown stop_outside 'perhaps'; known are yes, no"),
        ("committee", "needs a number of steps and the files of other models"),
        ("committee 10", "needs a number of steps and the files of other models"),
        ("committee a.pt b.pt", "'committee' needs a whole number, not 'a.pt'"),
        ("committee 10 a.pt", "a.pt: no such file"),
        ("stop_deviation 0.2", "needs 'committee N FILE ...'"),
        ("committee 10 a.pt stop_deviation -1", "stop_deviation must be above 0"),
        ("committee 10 a.pt stop_deviation small", "needs a force in eV/Angstrom, not 'small'"),
    ],
)
def test_commands(lammps: Lammps, models: Any, tmp_path: Path, style: str, message: str) -> None:
    atoms = crystals(1)[0]
    done = run(lammps, tmp_path, script(models("trusted"), atoms, style, "run 0"), atoms)
    assert done.status != 0 and message in done.error, done.output[-1000:]


def test_committee_must_know_all_species(lammps: Lammps, files: list[Path], tmp_path: Path) -> None:
    atoms = Atoms("SiO", [[1, 1, 1], [2.6, 1, 1]], cell=[6, 6, 6], pbc=True)
    write_data(tmp_path / "data.lammps", atoms, ["Si", "O"])
    text = script(files[0], atoms, f"committee 1 {files[2]}", "run 0").replace(" Mg O", " Si O")
    done = lammps.run(tmp_path, text)
    assert done.status != 0 and f"{files[2]} does not cover Si; it covers O Mg" in done.error
