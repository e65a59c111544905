"""What cannot be run gives one line that says why and what to do, and a status that is not zero."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from ase import Atoms
from ase.build import bulk
from lammps_runs import Lammps, header

from compactmlip import CompactMLIPCalculator
from compactmlip.deploy.archive import DEPLOYED_VERSION, ENTRY, quiet_torchscript
from compactmlip.kernels.build import require
from compactmlip.lammps.input import write_data

ROOT = Path(__file__).resolve().parents[2]


def refused(lammps: Lammps, folder: Path, script: str, *, ranks: int = 1, **environment: str) -> str:
    """The error of a run that must not succeed."""
    done = lammps.run(folder, script, ranks=ranks, **environment)
    assert done.status != 0, done.output[-2000:]
    assert "Segmentation" not in done.output and "Loop time" not in done.output
    return done.error


@pytest.fixture
def start(tmp_path: Path) -> str:
    """Commands up to the pair style: a crystal of MgO."""
    atoms = bulk("MgO", "rocksalt", a=4.21, cubic=True)
    write_data(tmp_path / "data.lammps", atoms, ["Mg", "O"])
    return f"{header(atoms)}read_data data.lammps\n"


@pytest.mark.parametrize(
    ("style", "coefficients", "message"),
    [
        (
            "compactmlip thread 2",
            "MODEL Mg O",
            "unknown keyword 'thread'; known are check, committee, device, precision",
        ),
        ("compactmlip threads", "MODEL Mg O", "keyword 'threads' has no value"),
        ("compactmlip threads 0", "MODEL Mg O", "threads must be at least 1"),
        ("compactmlip precision double", "MODEL Mg O", "unknown precision 'double'; known are float32"),
        (
            "compactmlip precision float32",
            "MODEL Mg O",
            "compiled in float64, not in float32; use 'compactmlip",
        ),
        ("compactmlip device gpu", "MODEL Mg O", "gpu"),
        ("compactmlip device cuda", "MODEL Mg O", "run on the CPU only; use 'device cpu'"),
        ("compactmlip", "MODEL Mg", "a symbol or NULL for each of the 2 atom types, but 1 were given"),
        ("compactmlip", "MODEL Fe O", "does not cover Fe; it covers H C O Mg Si"),
        ("compactmlip", "MODEL Fe Ni", "does not cover Fe Ni; it covers"),
        ("compactmlip", "nothing.pt Mg O", "nothing.pt: no such file"),
        ("compactmlip", "data.lammps Mg O", "data.lammps: not a deployed file"),
    ],
)
def test_commands(
    lammps: Lammps, models: Any, tmp_path: Path, start: str, style: str, coefficients: str, message: str
) -> None:
    given = coefficients.replace("MODEL", str(models("mace")))
    error = refused(lammps, tmp_path, f"{start}pair_style {style}\npair_coeff * * {given}\nrun 0\n")
    assert message in error and error.startswith("ERROR")


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("units metal", "units real", "needs 'units metal' (eV and Angstrom), not 'units real'"),
        ("units metal", "units metal\nnewton off", "needs 'newton on'"),
        ("units metal", "units metal\natom_modify id no", "needs atom IDs"),
    ],
)
def test_settings_of_lammps(
    lammps: Lammps, models: Any, tmp_path: Path, start: str, old: str, new: str, message: str
) -> None:
    script = f"{start}pair_style compactmlip\npair_coeff * * {models('mace')} Mg O\nrun 0\n".replace(old, new)
    if "id no" in new:  # a data file has IDs
        script = script.replace("read_data data.lammps", BOX)
    assert message in refused(lammps, tmp_path, script)


BOX = """region box block 0 4 0 4 0 4
create_box 2 box
create_atoms 1 single 1 1 1
mass * 1.0"""


def test_bonds_do_not_hide_neighbors(lammps: Lammps, models: Any, tmp_path: Path) -> None:
    """Neighbour lists leave out bonded atoms unless the user says otherwise."""
    (tmp_path / "data.lammps").write_text(
        "\n\n2 atoms\n2 atom types\n1 bonds\n1 bond types\n0 9 xlo xhi\n0 9 ylo yhi\n0 9 zlo zhi\n\n"
        "Masses\n\n1 1\n2 16\n\nAtoms # bond\n\n1 1 1 1 1 1\n2 1 2 1.97 1 1\n\nBonds\n\n1 1 1 2\n"
    )
    script = (
        f"units metal\natom_style bond\nSPECIAL\nread_data data.lammps\nbond_style zero\nbond_coeff *\n"
        f"pair_style compactmlip\npair_coeff * * {models('mace')} H O\nthermo_style custom step pe\n"
        "thermo_modify format float %.17g\nrun 0\n"
    )
    error = refused(lammps, tmp_path, script.replace("SPECIAL", ""))
    assert "use 'special_bonds lj/coul 1.0 1.0 1.0'" in error
    for allowed in ("special_bonds lj/coul 1.0 1.0 1.0", "special_bonds lj/coul 0.5 0.5 0.5"):
        done = lammps.run(tmp_path, script.replace("SPECIAL", allowed))
        assert done.status == 0, done.output
        atoms = Atoms("HO", [[1, 1, 1], [1.97, 1, 1]], cell=[9, 9, 9], pbc=True)
        atoms.calc = CompactMLIPCalculator(models("mace"))
        assert done.thermo()["PotEng"][0] == pytest.approx(atoms.get_potential_energy(), rel=1e-10)


def test_plain_torch_file_on_two_ranks(lammps: Lammps, models: Any, tmp_path: Path, start: str) -> None:
    script = f"{start}pair_style compactmlip\npair_coeff * * {models('mace', backend='torch')} Mg O\nrun 0\n"
    error = refused(lammps, tmp_path, script, ranks=2)
    assert "runs on one process, and these are 2; compile it with --backend kernels" in error


def changed(path: Path, target: Path, *, version: int | None = None, poison: str = "") -> Path:
    """A deployed file that says another version of its format, or whose atoms of a species have no energy."""
    entries = {ENTRY: ""}
    require()
    with quiet_torchscript():
        module = torch.jit.load(str(path), _extra_files=entries)
        description = json.loads(entries[ENTRY])
        if version is not None:
            description["deployed"]["format_version"] = version
        if poison:
            shift = next(b for name, b in module.named_buffers() if name.endswith("energy_shift"))
            shift[description["species"].index(poison)] = float("nan")
        torch.jit.save(module, str(target), _extra_files={ENTRY: json.dumps(description)})
    return target


def test_file_of_a_newer_version(lammps: Lammps, models: Any, tmp_path: Path, start: str) -> None:
    model = changed(models("mace"), tmp_path / "newer.pt", version=DEPLOYED_VERSION + 1)
    error = refused(lammps, tmp_path, f"{start}pair_style compactmlip\npair_coeff * * {model} Mg O\nrun 0\n")
    assert f"made by a newer compactmlip (format {DEPLOYED_VERSION + 1}" in error and "upgrade" in error


def test_plugin_knows_the_newest_format() -> None:
    source = (ROOT / "lammps_plugin" / "src" / "model.cpp").read_text()
    assert re.search(r"kNewestFormat = (\d+);", source)[1] == str(DEPLOYED_VERSION)  # type: ignore[index]


def test_damaged_file(lammps: Lammps, models: Any, tmp_path: Path, start: str) -> None:
    content = models("mace").read_bytes()
    (tmp_path / "cut.pt").write_bytes(content[: len(content) // 2])
    error = refused(lammps, tmp_path, f"{start}pair_style compactmlip\npair_coeff * * cut.pt Mg O\nrun 0\n")
    assert "cut.pt: not a deployed file, or a damaged one" in error


@pytest.mark.parametrize("ranks", [1, 2])
def test_value_that_is_not_finite_stops_the_run(
    lammps: Lammps, models: Any, tmp_path: Path, start: str, ranks: int
) -> None:
    model = changed(models("mace"), tmp_path / "poisoned.pt", poison="O")
    script = f"{start}pair_style compactmlip\npair_coeff * * {model} Mg O\nfix move all nve\nrun 5\n"
    error = refused(lammps, tmp_path, script, ranks=ranks)
    assert re.search(r"not finite at atom [2468] \(O\) in step 0", error), error


def test_atoms_on_top_of_each_other(lammps: Lammps, models: Any, tmp_path: Path, start: str) -> None:
    script = f"{start}pair_style compactmlip\npair_coeff * * {models('mace')} Mg O\n"
    script += "set atom 2 x 0 y 0 z 0\nrun 0\n"
    error = refused(lammps, tmp_path, script)
    assert re.search(r"atoms [12] and [12] lie on top of each other in step 0", error), error


@pytest.mark.parametrize("missing", ["libcompactmlip_kernels.so", "libcompactmlip_pair.so"])
def test_incomplete_plugin(lammps: Lammps, models: Any, tmp_path: Path, start: str, missing: str) -> None:
    folder = tmp_path / "plugin"
    shutil.copytree(lammps.plugin, folder, symlinks=True)
    (folder / missing).unlink()
    script = f"{start}pair_style compactmlip\npair_coeff * * {models('mace')} Mg O\nrun 0\n"
    other = Lammps(folder)
    error = refused(
        other, tmp_path, f"plugin load {folder}/compactmlipplugin.so\n{script}", COMPACTMLIP_KERNELS="off"
    )
    assert missing in error and "'compactmlip build'" in error, error
