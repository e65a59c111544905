"""Trust region of a compiled model of MgO: false alarms, detection, and what it says about the error.

Compiles the model with the calibration set and scores structures like those (held-out files, dynamics at the
temperatures of the set) and others: expanded and compressed cells, vacancies, surfaces, other phases,
exchanged atoms.  An atom counts as outside if one score is above 1, a structure if one atom is.
Errors of forces are those against the teacher, by atom.

    OMP_NUM_THREADS=1 python benchmarks/trust.py --model distilled.safetensors --teacher teacher.safetensors
        --calibration train.xyz --held-out test.xyz valid.xyz
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from ase import Atoms, units
from ase.build import bulk, surface
from ase.io import read
from ase.md.langevin import Langevin
from common import header, parser, report, table
from scipy.stats import rankdata, spearmanr

from compactmlip.data.graph import build_graph
from compactmlip.deploy.archive import DTYPES
from compactmlip.deploy.ase import CompactMLIPCalculator
from compactmlip.deploy.compile import compile_model
from compactmlip.deploy.engine import Engine, load_engine
from compactmlip.deploy.trust import REASONS, Outside, TrustRegion

COPIES = 4
"""Of each case that is not a file or dynamics, rattled by 0.05 Angstrom with different seeds."""

SAME, FAR = "like the calibration set", "unlike it"


@dataclass(frozen=True)
class Scored:
    """Structures of one case: scores of all atoms (n, 4), errors of their forces (n,), eV/Angstrom."""

    kind: str
    sizes: list[int]
    scores: np.ndarray
    errors: np.ndarray


def rattled(atoms: Atoms, amount: float = 0.05) -> list[Atoms]:
    copies = [atoms.copy() for _ in range(COPIES)]
    for seed, copy in enumerate(copies):
        copy.rattle(amount, seed=seed)
    return copies


def scaled(atoms: Atoms, factor: float) -> Atoms:
    copy = atoms.copy()
    copy.set_cell(copy.cell * factor, scale_atoms=True)
    return copy


def without(atoms: Atoms, indices: list[int]) -> Atoms:
    copy = atoms.copy()
    del copy[indices]
    return copy


def static_cases() -> dict[str, list[Atoms]]:
    """Structures that no calibration set made of the perfect crystal has."""
    cell = bulk("MgO", "rocksalt", a=4.21, cubic=True)
    crystal = cell * (2, 2, 2)
    slab = cell * (1, 1, 3)
    slab.pbc = (True, True, False)
    slab.center(vacuum=6.0, axis=2)
    exchanged = crystal.copy()
    exchanged.numbers[[0, 1]] = exchanged.numbers[[1, 0]]
    cases = {f"lattice constant x {f}": scaled(crystal, f) for f in (0.90, 0.93, 1.07, 1.10, 1.15)}
    cases |= {
        "vacancy, Mg": without(crystal, [0]),
        "vacancy, O": without(crystal, [1]),
        "two vacancies, Mg and O": without(crystal, [0, 1]),
        "slab (100)": slab,
        "slab (110)": surface(cell, (1, 1, 0), 3, vacuum=6.0),
        "CsCl structure": bulk("MgO", "cesiumchloride", a=2.6) * (3, 3, 3),
        "zinc blende": bulk("MgO", "zincblende", a=4.6, cubic=True) * (2, 2, 2),
        "wurtzite": bulk("MgO", "wurtzite", a=3.3, c=5.1) * (2, 2, 2),
        "neighbours Mg and O exchanged": exchanged,
    }
    return {name: rattled(atoms) for name, atoms in cases.items()}


def dynamics(calculator: CompactMLIPCalculator, temperature: float, steps: int) -> list[Atoms]:
    """Eight frames of Langevin dynamics with 64 atoms, after a time of equilibration."""
    atoms = bulk("MgO", "rocksalt", a=4.21, cubic=True) * (2, 2, 2)
    rng = np.random.default_rng(0)
    atoms.calc = calculator
    # Twice the temperature, half of which becomes potential energy.
    thermal = np.sqrt(2 * units.kB * temperature * atoms.get_masses())[:, None]
    atoms.set_momenta(thermal * rng.standard_normal((len(atoms), 3)))
    run = Langevin(atoms, units.fs, temperature_K=temperature, friction=0.02 / units.fs, rng=rng, fixcm=False)
    run.run(steps // 3)
    frames = []
    for _ in range(8):
        run.run(steps // 12)
        frames.append(Atoms(atoms.numbers, atoms.positions, cell=atoms.cell, pbc=True))
    return frames


def scored(kind: str, frames: list[Atoms], engine: Engine, teacher: CompactMLIPCalculator) -> Scored:
    scores, errors = [], []
    assert engine.trust is not None
    for atoms in frames:
        graph = build_graph(atoms, engine.spec, DTYPES[engine.spec.dtype])
        scores.append(engine.trust(graph.species, graph.centers, graph.neighbors, graph.vectors).numpy())
        expected = atoms.copy()
        expected.calc = teacher
        difference = engine.evaluate(graph).forces.numpy() - expected.get_forces()
        errors.append(np.linalg.norm(difference, axis=1))
    return Scored(kind, [len(a) for a in frames], np.concatenate(scores), np.concatenate(errors))


def percent(part: np.ndarray) -> str:
    return f"{100 * part.mean():.1f}" if part.size else "-"


def outside_structures(case: Scored) -> np.ndarray:
    """(structures,) bool: whether an atom is outside."""
    found: np.ndarray = np.logical_or.reduceat(Outside(case.scores).mask, np.cumsum([0, *case.sizes[:-1]]))
    return found


def case_row(name: str, case: Scored) -> list[object]:
    outside = Outside(case.scores).mask
    columns = [REASONS.index(reason) for reason in ("distance", "coordination", "features")]
    by_reason = [percent(case.scores[:, k] > 1) for k in columns]
    errors = [float(case.errors[chosen].mean()) if chosen.any() else "-" for chosen in (~outside, outside)]
    counts = f"{len(case.sizes)}, {sum(case.sizes)}"
    return [name, counts, percent(outside_structures(case)), percent(outside), *by_reason, *errors]


def summary_rows(cases: dict[str, Scored]) -> list[list[object]]:
    """Over all cases of each kind."""
    rows: list[list[object]] = []
    for kind in (SAME, FAR):
        chosen = [c for c in cases.values() if c.kind == kind]
        structures = np.concatenate([outside_structures(c) for c in chosen])
        atoms = np.concatenate([Outside(c.scores).mask for c in chosen])
        error = float(np.concatenate([c.errors for c in chosen]).mean())
        rows.append([kind, len(structures), percent(structures), len(atoms), percent(atoms), error])
    return rows


def largest_and_errors(cases: list[Scored]) -> tuple[np.ndarray, np.ndarray]:
    """Largest score and error of all atoms."""
    return np.concatenate([c.scores.max(axis=1) for c in cases]), np.concatenate([c.errors for c in cases])


def error_rows(cases: dict[str, Scored]) -> list[list[object]]:
    """How the largest score of an atom follows the error of its force."""
    scores, errors = largest_and_errors(list(cases.values()))
    same_scores, same_errors = largest_and_errors([c for c in cases.values() if c.kind == SAME])
    limit = 2 * float(np.quantile(same_errors, 0.99))
    bad = errors > limit
    ranks = rankdata(scores)
    area = (ranks[bad].mean() - (bad.sum() + 1) / 2) / (~bad).sum()
    return [
        ["rank correlation of score and error, all atoms", float(spearmanr(scores, errors).statistic)],
        [f"the same, structures {SAME}", float(spearmanr(same_scores, same_errors).statistic)],
        [f"atoms with an error above {limit:.2f} eV/Å, twice the 99 % quantile of those, %", percent(bad)],
        ["of these outside, %", percent(scores[bad] > 1)],
        ["of the others outside, %", percent(scores[~bad] > 1)],
        ["area under the ROC curve (does the score find such atoms)", float(area)],
    ]


def cost(path: Path) -> str:
    """Time of a calculation with a check at every step over one without, alternately."""
    atoms = rattled(bulk("MgO", "rocksalt", a=4.21, cubic=True) * (3, 3, 3))[0]
    calculators = [CompactMLIPCalculator(path), CompactMLIPCalculator(path, check=1)]
    times: list[list[float]] = [[], []]
    for round_ in range(8):
        for calculator, found in zip(calculators, times, strict=True):
            atoms.rattle(0.001, seed=round_)
            start = time.perf_counter()
            calculator.calculate(atoms)
            found.append(time.perf_counter() - start)
    without_check, with_check = (float(np.median(t[2:])) for t in times)
    return f"{with_check / without_check:.2f}"


def region_rows(region: TrustRegion) -> list[list[object]]:
    return [
        [s, r.num_atoms, _range(r.nearest), _range(r.coordination), r.directions, r.feature_distance]
        for s, r in region.species.items()
    ]


def _range(limits: tuple[float, float]) -> str:
    return f"{limits[0]:.2f} to {limits[1]:.2f}"


def make_cases(
    options: argparse.Namespace, model: CompactMLIPCalculator, score: Callable[[str, list[Atoms]], Scored]
) -> dict[str, Scored]:
    cases: dict[str, Scored] = {}

    def add(name: str, kind: str, frames: list[Atoms]) -> None:
        cases[name] = score(kind, frames)
        print(case_row(name, cases[name]), flush=True)

    for path in options.held_out:
        frames: Any = read(path, ":")
        add(path.name, SAME, frames)
    for temperature in (300.0, 600.0, 1000.0):
        add(f"dynamics, {temperature:.0f} K, 64 atoms", SAME, dynamics(model, temperature, options.steps))
    for temperature in (2000.0, 3000.0):
        add(f"dynamics, {temperature:.0f} K, 64 atoms", FAR, dynamics(model, temperature, options.steps))
    for name, frames in static_cases().items():
        add(name, FAR, frames)
    return cases


def main() -> None:
    options_parser = parser(__doc__)
    options_parser.add_argument("--model", type=Path, required=True, help="checkpoint of a model for MgO")
    options_parser.add_argument("--teacher", type=Path, required=True, help="checkpoint, for the errors")
    options_parser.add_argument("--calibration", type=Path, required=True, help="structures")
    options_parser.add_argument("--held-out", type=Path, nargs="*", default=[], help="more of the same kind")
    options_parser.add_argument("--backend", default="kernels", help="of the compiled files")
    options_parser.add_argument("--steps", type=int, default=900, help="of 1 fs in each run of dynamics")
    options = options_parser.parse_args()
    torch.set_num_threads(options.threads)
    text = header(
        "Trust region of a compiled model", f"python benchmarks/trust.py --backend {options.backend}"
    )
    with tempfile.TemporaryDirectory() as folder:
        path, teacher = Path(folder) / "model.pt", Path(folder) / "teacher.pt"
        frames: Any = read(options.calibration, ":")
        made = compile_model(options.model, path, backend=options.backend, trust_structures=frames)
        compile_model(options.teacher, teacher, backend=options.backend)
        assert made.trust is not None
        reference, engine = CompactMLIPCalculator(teacher), load_engine(path)
        cases = make_cases(
            options, CompactMLIPCalculator(path), lambda kind, f: scored(kind, f, engine, reference)
        )
        ratio = cost(path)
    text += (
        f"\nCalibration: {made.trust.num_structures} structures, {made.trust.num_atoms} atoms; in "
        f"cross-validation {100 * made.trust.held_out:.2f} % of the atoms are outside. A calculation of 216 "
        f"atoms with a check takes {ratio} times as long as one without.\n\n"
    )
    columns = ("species", "atoms", "nearest neighbour, Å", "coordination", "directions", "largest distance")
    text += table(columns, region_rows(made.trust))
    text += "\n" + table(
        ("structures", "number", "with an atom outside, %", "atoms", "outside, %", "mean force error, eV/Å"),
        summary_rows(cases),
    )
    kinds: tuple[str, str] = (SAME, FAR)
    for kind in kinds:
        text += f"\n## Structures {kind}\n\n"
        text += table(
            (
                "case",
                "structures, atoms",
                "structures outside, %",
                "atoms outside, %",
                "distance",
                "coordination",
                "features",
                "force error inside, eV/Å",
                "outside",
            ),
            [case_row(name, case) for name, case in cases.items() if case.kind == kind],
        )
    text += "\n## Score and error of an atom's force\n\n" + table(("", "value"), error_rows(cases))
    report(text, options.output)


if __name__ == "__main__":
    main()
