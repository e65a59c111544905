"""Reference numbers for the SevenNet import, computed by sevenn itself.

To regenerate: ``python tests/reference/make_sevennet_reference.py --venv DIR``
(a few minutes on one core; DIR is made, from PyPI, if it is missing).

``sevennet/structures.xyz``: S structures of N atoms in all, to be used as read back (positions
with 8 decimals). ``sevennet/<checkpoint>[__<modality>].npz``:

* ``names`` (S,); ``offsets`` (S+1,): structure s has the atoms ``offsets[s]:offsets[s+1]``
* ``energy_P`` (S,) eV, ``energies_P`` (N,) eV per atom, ``forces_P`` (N, 3) eV/A,
  ``stress_P`` (S, 6) eV/A^3 in ASE's sign and order (xx yy zz yz xz xy; per volume of the cell,
  also for a slab or a chain in a box; NaN without periodicity or without volume)
* P: ``f32`` as sevenn ships it; ``f64`` true float64 throughout (weights upcast from the file);
  ``f64_w3j32`` the same, but Wigner 3j symbols keep the float32 rounding of the checkpoint
* ``n_edges`` (S,) directed edges within ``cutoff``; ``fd_force_error``, ``fd_stress_error`` (S,)
  |analytic - finite difference| in f64 along one random displacement (eV/A) and strain (eV/A^3)
* ``checkpoint``, ``modality`` ("" if none), ``modalities``, ``version_<package>``

``e3nn.npz`` (float64): ``w3j_<l1>_<l2>_<l3>`` for l <= 4; ``normalize2mom_<silu or tanh>``;
``spherical_harmonics`` (20, 25), l = 0..4, normalize=True, "component", of ``vectors`` (20, 3).
"""

import argparse
import functools
import itertools
import os
import pathlib
import subprocess
import sys
import timeit
import venv
from importlib.metadata import version

WORKER = "--worker" in sys.argv
if WORKER:  # only the environment that the launcher makes has these
    import ase.io
    import numpy as np
    import sevenn.util
    import torch
    from ase import Atoms
    from ase.build import add_adsorbate, bulk, fcc111, graphene, molecule, mx2
    from ase.neighborlist import neighbor_list
    from e3nn.math import normalize2mom
    from e3nn.o3 import spherical_harmonics, wigner_3j
    from sevenn.calculator import SevenNetCalculator
    from sevenn.nn.node_embedding import OnehotEmbedding
    from sevenn.train.dataload import unlabeled_atoms_to_graph

    to_tensor = sevenn.util.dtype_correct

OUT = pathlib.Path(__file__).resolve().parent / "sevennet"
STEP = 2e-5  # of finite differences, in A or as strain


def launch(directory):
    """Make the environment if there is none, then run this file inside it."""
    python = directory / "bin" / "python"
    if not python.exists():
        venv.create(directory, with_pip=True)
        # torch on its own first: the second call must find it and not fetch another build
        for requirements in (["torch==2.13.0"], ["sevenn==0.13.0", "e3nn==0.5.1"]):
            subprocess.run([python, "-m", "pip", "install", *requirements], check=True)
    environment = dict(os.environ, OMP_NUM_THREADS="1", PYTHONWARNINGS="ignore")
    subprocess.run([python, __file__, "--worker"], check=True, env=environment)


def mixture(symbols, cell, rng):
    """Put one atom of each symbol at random into a periodic cell, well apart."""
    symbols, atoms = symbols.split(), Atoms(cell=cell, pbc=True)
    while len(atoms) < len(symbols):
        trial = atoms + Atoms(symbols[len(atoms)], positions=rng.random((1, 3)) @ cell)
        if not len(neighbor_list("i", trial, 2.1)):
            atoms = trial
    return atoms


def structures():
    """Yield named structures; those with more than one atom are rattled."""
    rng = np.random.default_rng(5)
    periodic = functools.partial(Atoms, pbc=True)
    perovskite = [(0, 0, 0), (0.5, 0.5, 0.5), (0.5, 0.5, 0), (0.5, 0, 0.5), (0, 0.5, 0.5)]
    alloy = bulk("Ni", "fcc", a=3.62, cubic=True) * (2, 1, 1)
    alloy.symbols = "CrMnFeCoNiCuVAl"
    slab = fcc111("Pt", (2, 2, 2), vacuum=7.0, periodic=False)
    add_adsorbate(slab, molecule("CO"), 3.0, "ontop")
    sheet = graphene("BN", a=2.47, size=(2, 2, 1), vacuum=5.0)
    sheet.rotate(90, "x", rotate_cell=True)  # the second vector has no periodicity, and is along y
    sheet = Atoms(sheet.symbols, sheet.positions, cell=sheet.cell[[0, 2, 1]], pbc=(1, 0, 1))
    helix = [[7.9, 6.0, 0.0], [5.05, 7.65, 1.95], [5.05, 4.35, 3.9]]
    skew = np.array([[2.8, 0.1, -0.2], [0.9, 2.7, 0.3], [-1.1, 0.8, 2.9]])
    unwrapped = bulk("GaAs", "zincblende", a=5.66, cubic=True)
    unwrapped.positions += 5.66 * rng.integers(-2, 3, (8, 3))
    dimers = [[0, 0, 0], [0.55, 0, 0], [1, 2.5, 0.4], [1, 2.9, 1.15], [3, 0.5, 2.6], [3.9, 1, 2.6]]
    box = np.array([[6.9, 0.4, -0.7], [1.5, 6.6, 0.5], [-1.2, 1.1, 7.2]])
    everything = {
        "mgo_rocksalt": bulk("MgO", "rocksalt", a=4.21, cubic=True),
        "batio3_perovskite": periodic("BaTiO3", scaled_positions=perovskite, cell=(4.0, 4.0, 4.1)),
        "cspbi3_perovskite": periodic("CsPbI3", scaled_positions=perovskite, cell=(6.1, 6.2, 6.4)),
        "alloy_fcc": alloy,
        "slab_pt_co": slab,
        "slab_mos2_no_c_vector": mx2("MoS2", size=(2, 1, 1), vacuum=None),
        "sheet_bn_tft": sheet,
        "chain_te": Atoms("Te2Se", helix, cell=[12, 12, 5.85], pbc=(False, False, True)),
        "molecule_h2o": molecule("H2O"),
        "molecule_ethanol": molecule("CH3CH2OH"),
        "molecule_long_pairs": Atoms("KClNa", [[0, 0, 0], [4.72, 0, 0], [0.3, 4.9, 0.2]]),
        "molecule_no_edges": Atoms("RbBr", [[0, 0, 0], [4.0, 4.0, 1.0]]),
        "isolated_xe": Atoms("Xe", [[0.1, 0.2, 0.3]]),
        "isolated_ar_in_box": periodic("Ar", [[0.1, 0.2, 0.3]], cell=[11, 12, 13]),
        "triclinic_w": periodic("W", [[0.4, 0.3, 0.2]], cell=0.97 * skew),
        "triclinic_lif": periodic("LiF", [[0, 0, 0], [1.3, 1.7, 1.5]], cell=skew),
        "uo2_fluorite": bulk("UO2", "fluorite", a=5.47),
        "gdzn": bulk("GdZn", "cesiumchloride", a=3.61) * (2, 1, 1),
        "zrnisn": bulk("ZrNiSn", "fluorite", a=6.2),
        "gaas_unwrapped": unwrapped,
        "short_bonds": periodic("H2N2CO", dimers, cell=[4.8, 5.1, 5.3]),
        "mixture_1": mixture("Be Sc Ru Rh Ag Cd In Sb La Ce Hf Re Ir Au Hg Th", box, rng),
        "mixture_2": mixture("Ca Ge P Y Nb Tc Pd Pr Eu Yb Lu Ta Os Bi Np Pu", box.T.copy(), rng),
    }
    for name, atoms in everything.items():
        width = 0 if len(atoms) == 1 else 0.03 if name == "short_bonds" else 0.06
        positions = atoms.positions + rng.normal(0, 1, (len(atoms), 3)) * width
        yield Atoms(atoms.symbols, positions, cell=atoms.cell, pbc=atoms.pbc, info={"name": name})


def to_double(model):
    """Upcast a model and the one-hot vectors that it makes in float32; return its Wigner 3j."""

    def upcast(module, arguments, data):
        for key in filter(None, (module.key_output, module.key_additional_output)):
            data[key] = data[key].double()
        return data

    for module in model.double().modules():
        if isinstance(module, OnehotEmbedding):
            module.register_forward_hook(upcast)
    return {key: buffer for key, buffer in model.named_buffers() if "_w3j_" in key}


def evaluate(calculator, atoms):
    """Run sevenn's own path from atoms to results."""
    calculator.calculate(atoms)
    if not atoms.pbc.any() or atoms.cell.volume < 1e-6:
        calculator.results["stress"] = np.full(6, np.nan)
    return dict(calculator.results)


def finite_difference_errors(calculator, atoms, result):
    """Compare forces and stress with 4-point differences of the energy."""
    direction, strain = np.split(np.random.default_rng(1).normal(size=(len(atoms) + 3, 3)), [-3])
    direction, strain = direction / np.linalg.norm(direction), (strain + strain.T) / 4

    def slope(direction, strain):
        energies = []
        for step in (-2 * STEP, -STEP, STEP, 2 * STEP):
            moved, deformation = atoms.copy(), np.eye(3) + step * strain
            moved.cell = atoms.cell.array @ deformation
            moved.positions = (atoms.positions + step * direction) @ deformation
            energies.append(evaluate(calculator, moved)["energy"])
        return np.dot(energies, (1, -8, 8, -1)) / (12 * STEP)

    force_error = abs(slope(direction, 0) + (direction * result["forces"]).sum())
    stress = result["stress"][[[0, 5, 4], [5, 1, 3], [4, 3, 2]]]
    volume = np.nan if np.isnan(stress).any() else atoms.cell.volume
    return force_error, abs(slope(0, strain) / volume - (stress * strain).sum())


def check_neighbours(atoms, cutoff):
    """Check sevenn's neighbour list against that of ASE; no distance is close to the cutoff."""
    graph, tables = unlabeled_atoms_to_graph(atoms, cutoff), []
    lists = [neighbor_list("ijD", atoms, cutoff + shift) for shift in (-1e-4, 0, 1e-4)]
    for i, j, vectors in (*lists, (*graph["edge_index"], graph["edge_vec"])):
        table = np.column_stack([i, j, np.round(vectors, 6) + 0.0])
        tables.append(table[np.lexsort(table.T)])
        assert np.allclose(tables[0], tables[-1], atol=2e-6), atoms.info["name"]
    return len(graph["edge_vec"])


def compute(checkpoint, modality, frames):
    """All arrays of one reference file."""
    load = functools.partial(SevenNetCalculator, checkpoint, device="cpu", modal=modality or None)
    single, double = load(), load()
    symbols = to_double(double.model)
    sevenn.util.dtype_correct = to_tensor  # inputs become float32
    results = {"f32": [evaluate(single, atoms) for atoms in frames]}
    sevenn.util.dtype_correct = functools.partial(to_tensor, float_dtype=torch.float64)
    results["f64_w3j32"] = [evaluate(double, atoms) for atoms in frames]
    for key, symbol in symbols.items():
        exact = wigner_3j(*map(int, key.split("_")[-3:]), dtype=torch.float64)
        assert torch.allclose(symbol, exact, rtol=0, atol=1e-6), key  # also of the same sign
        symbol.copy_(exact)
    results["f64"] = [evaluate(double, atoms) for atoms in frames]
    compare = functools.partial(finite_difference_errors, double)
    errors = np.array(list(map(compare, frames, results["f64"]))).T
    print("  finite differences: force {:.1e}, stress {:.1e}".format(*np.nanmax(errors, axis=1)))
    arrays = {
        "names": np.array([atoms.info["name"] for atoms in frames]),
        "offsets": np.cumsum([0] + [len(atoms) for atoms in frames]),
        "n_edges": np.array([check_neighbours(atoms, single.cutoff) for atoms in frames]),
        "cutoff": single.cutoff,
        "fd_force_error": errors[0],
        "fd_stress_error": errors[1],
    }
    for key, precision in itertools.product(("energy", "energies", "forces", "stress"), results):
        join = np.concatenate if key in ("energies", "forces") else np.array
        arrays[f"{key}_{precision}"] = join([result[key] for result in results[precision]])
    for key in ("forces_f32", "forces_f64_w3j32"):
        print(f"  max |{key} - forces_f64|: {abs(arrays[key] - arrays['forces_f64']).max():.1e}")
    return arrays


def worker():
    """Compute everything and write the files."""
    torch.set_num_threads(1)
    packages = "torch", "sevenn", "e3nn", "numpy", "ase", "matscipy"
    print(versions := {f"version_{name}": version(name) for name in packages})
    oracles = {
        "vectors": 2 * np.random.default_rng(7).normal(size=(20, 3)),
        "normalize2mom_silu": normalize2mom(torch.nn.functional.silu).cst,
        "normalize2mom_tanh": normalize2mom(torch.tanh).cst,
    }
    oracles["spherical_harmonics"] = spherical_harmonics(
        list(range(5)), torch.tensor(oracles["vectors"]), normalize=True, normalization="component"
    )
    for ls in itertools.product(range(5), repeat=3):
        if abs(ls[0] - ls[1]) <= ls[2] <= ls[0] + ls[1]:
            oracles["w3j_{}_{}_{}".format(*ls)] = wigner_3j(*ls, dtype=torch.float64)
    np.savez_compressed(OUT.parent / "e3nn.npz", **oracles, **versions)
    atoms = bulk("MgO", "rocksalt", a=4.21, cubic=True) * (2, 2, 2)
    calculator = SevenNetCalculator("7net-l3i5", device="cpu")
    best = min(timeit.repeat(lambda: calculator.calculate(atoms), number=1, repeat=5))
    print(f"7net-l3i5, float32, {len(atoms)} atoms, one thread: best of 5 {best:.2f} s")
    OUT.mkdir(exist_ok=True)
    ase.io.write(OUT / "structures.xyz", list(structures()), format="extxyz")
    frames = ase.io.read(OUT / "structures.xyz", ":")
    for checkpoint in ("7net-l3i5", "7net-0", "7net-0_22May2024", "7net-mf-0"):
        modal_map = sevenn.util.load_checkpoint(checkpoint).config.get("_modal_map")
        modalities = np.array(sorted(modal_map or {}), dtype=str)
        for modality in modalities.tolist() or [""]:
            print(f"{checkpoint}, modality {modality!r} of {modalities}")
            labels = {"checkpoint": checkpoint, "modality": modality, "modalities": modalities}
            path = OUT / (f"{checkpoint}__{modality}".removesuffix("__") + ".npz")
            np.savez_compressed(path, **compute(checkpoint, modality, frames), **labels, **versions)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--venv", type=pathlib.Path, required=True, help="environment to use")
    worker() if WORKER else launch(parser.parse_args().venv.absolute())
