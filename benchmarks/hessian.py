"""Does training on Hessian products give better phonons, at equal time?

Per material: sample structures, label them with the teacher (energies, forces, stresses, Hessian products),
cut the teacher with compensation, and train the same start for the same processor time without the Hessian
and with each of some weights.  Prints errors on held-out structures and, with phonopy, of phonon frequencies
over the Brillouin zone, each model at its own minimum.

    OMP_NUM_THREADS=1 python benchmarks/hessian.py --minutes 10 --seeds 0 1 2
    python benchmarks/hessian.py --materials MgO --minutes 0.2 --frames 12 --to 8x0+4x1
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from ase import Atoms
from ase.build import bulk
from common import header, parser, report, table
from torch import nn

from compactmlip import CompactMLIPCalculator
from compactmlip.compress.apply import keep_species
from compactmlip.compress.compress import compress
from compactmlip.data.graph import build_graph
from compactmlip.data.label import label
from compactmlip.data.sample import SampleOptions, sample
from compactmlip.data.select import split
from compactmlip.families import load_model
from compactmlip.models import model_dtype, model_spec, num_parameters
from compactmlip.train.dataset import Dataset
from compactmlip.train.distil import DistilOptions, distil
from compactmlip.train.metrics import Errors, evaluate
from compactmlip.validate.crystal import relax
from compactmlip.validate.phonons import compare_phonons

CRYSTALS = {
    "Si": lambda: bulk("Si", "diamond", a=5.43, cubic=True),
    "MgO": lambda: bulk("MgO", "rocksalt", a=4.21, cubic=True),
}
COLUMNS = (
    "material", "training", "seed", "epochs", "steps", "E (meV/atom)", "F (meV/Å)", "S (meV/Å³)",
    "H products (eV/Å²)", "phonons, mean error (THz)", "largest (THz)", "lowest (THz)",
)  # fmt: skip


@dataclass
class Case:
    """One material: teacher, start of the students, labelled sets and the teacher's minimum."""

    name: str
    teacher: nn.Module
    start: nn.Module
    train: list[Atoms]
    valid: list[Atoms]
    test: list[Atoms]
    relaxed: Atoms
    label_seconds: tuple[float, float]


def prepare(name: str, options: argparse.Namespace, folder: Path) -> Case:
    """Sample, label without and with the Hessian (both timed), and cut."""
    crystal = CRYSTALS[name]()
    loaded = load_model(options.teacher, dtype=None, accept_licence=options.accept_licence)
    teacher = keep_species(loaded, sorted(set(crystal.get_chemical_symbols())))
    settings = SampleOptions(n=options.frames, md_fraction=0.0, seed=options.sample_seed)
    frames = sample([crystal], teacher, settings, progress=False)
    seconds = []
    for count in (0, options.directions):
        begin = time.monotonic()
        labelled = label(frames, teacher, folder / f"{name}-{count}.xyz", hessian=count, progress=False)
        seconds.append(time.monotonic() - begin)
    train, valid, test = split(labelled, (0.7, 0.1, 0.2), seed=options.sample_seed)
    graphs = [build_graph(a, model_spec(teacher), model_dtype(teacher)) for a in train]
    start = compress(teacher, graphs, options.to, seed=options.sample_seed).model
    relaxed, done = relax(CompactMLIPCalculator(teacher, dtype="float64"), crystal)
    if not done:
        raise SystemExit(f"{name}: the teacher did not find the minimum of the crystal.")
    return Case(name, teacher, start, train, valid, test, relaxed, (seconds[0], seconds[1]))


def measured(case: Case, model: nn.Module) -> list[object]:
    """Errors on the test set and of the phonons."""
    test = Dataset.from_frames(case.test, model_spec(model), model_dtype(model), "the test set", hessian=4)
    errors: Errors = evaluate(model, test)
    assert errors.hessian is not None
    cells: list[object] = [errors.energy.mae, errors.forces.mae, errors.stress.mae, errors.hessian.mae]
    calculators = [CompactMLIPCalculator(m, dtype="float64") for m in (model, case.teacher)]
    own, done = relax(calculators[0], case.relaxed)
    if not done:
        return [*cells, "no minimum", "-", "-"]
    phonons, _ = compare_phonons(*calculators, (own, case.relaxed))
    return [*cells, phonons.mean_error, phonons.largest_error, phonons.lowest]


def trained(case: Case, weight: float, every: int, seed: int, minutes: float) -> list[object]:
    """Train the start and measure the result."""
    settings = {
        "max_epochs": None,
        "max_minutes": minutes,
        "seed": seed,
        "hessian_weight": weight,
        "hessian_every": every,
    }
    with tempfile.TemporaryDirectory() as folder:
        options = DistilOptions.model_validate(settings)
        result = distil(case.start, case.train, case.valid, options, folder, False, clock=time.process_time)
    last = result.history[-1]
    how = f"Hessian weight {weight:g}, every {every} steps" if weight else "no Hessian"
    row = [case.name, how, seed, int(last["epoch"]), int(last["steps"]), *measured(case, result.model)]
    print(row, file=sys.stderr, flush=True)
    return row


def summary(rows: list[list[object]]) -> str:
    """Table of means over seeds, and of the ratios to the training without the Hessian, seed by seed."""
    chosen = ("E (meV/atom)", "F (meV/Å)", "S (meV/Å³)", "phonons, mean error (THz)", "largest (THz)")
    places = [COLUMNS.index(name) for name in chosen]
    trained: dict[tuple[object, object], dict[object, list[float]]] = {}
    for material, how, seed, *rest in rows:
        values = [([material, how, seed, *rest])[k] for k in places]
        if how != "before training" and all(isinstance(v, float) for v in values):
            trained.setdefault((material, how), {})[seed] = [float(str(v)) for v in values]
    lines: list[list[object]] = []
    for (material, how), seeds in trained.items():
        plain = trained.get((material, "no Hessian"), {})
        pairs = [np.divide(values, plain[seed]) for seed, values in seeds.items() if seed in plain]
        means = np.mean(list(seeds.values()), axis=0)
        cells = [
            f"{mean:#.3g} ({ratio:.2f} ± {spread:.2f})"
            for mean, ratio, spread in zip(means, np.mean(pairs, axis=0), np.std(pairs, axis=0), strict=True)
        ]
        lines.append([material, how, len(seeds), *cells])
    note = "\nMeans over seeds; in parentheses the ratio to no Hessian, with its standard deviation.\n\n"
    return note + table(("material", "training", "seeds", *chosen), lines)


def main() -> None:
    options_parser = parser(__doc__)
    options_parser.add_argument("--teacher", default="7net-l3i5", help="name or checkpoint")
    options_parser.add_argument("--accept-licence", help="as in the command line")
    options_parser.add_argument("--materials", nargs="+", choices=list(CRYSTALS), default=list(CRYSTALS))
    options_parser.add_argument("--to", default="32x0+16x1+8x2", help="channels of the student")
    options_parser.add_argument("--frames", type=int, default=150)
    options_parser.add_argument("--directions", type=int, default=4, help="Hessian products per structure")
    options_parser.add_argument("--weights", type=float, nargs="+", default=[0.3, 1.0])
    options_parser.add_argument("--every", type=int, nargs="+", default=[1, 4])
    options_parser.add_argument("--minutes", type=float, default=5.0)
    options_parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    options_parser.add_argument("--sample-seed", type=int, default=0)
    options = options_parser.parse_args()
    torch.set_num_threads(options.threads)
    rows, notes = [], []
    runs = [(0.0, 1), *((w, n) for w in options.weights for n in options.every)]
    for name in options.materials:
        with tempfile.TemporaryDirectory() as folder:
            case = prepare(name, options, Path(folder))
        plain, more = case.label_seconds
        notes.append(
            f"{name}: {len(case.train)} training, {len(case.valid)} validation and {len(case.test)} test "
            f"structures; labelling took {plain:.0f} s without and {more:.0f} s with {options.directions} "
            f"Hessian products each; {num_parameters(case.start)} of {num_parameters(case.teacher)} "
            "parameters left."
        )
        rows.append([name, "before training", "-", 0, 0, *measured(case, case.start)])
        # Seeds outermost: a change of the machine's speed meets all kinds of training alike.
        rows += [trained(case, w, n, seed, options.minutes) for seed in options.seeds for w, n in runs]
    how = f"--minutes {options.minutes:g} --frames {options.frames} --directions {options.directions} "
    for name in ("weights", "every", "seeds"):
        how += f"--{name} " + " ".join(f"{value:g}" for value in getattr(options, name)) + " "
    how = how.rstrip()
    text = header("Hessian distillation at equal time", f"python benchmarks/hessian.py {how}")
    note = f"\n{options.minutes:g} minutes of processor time for each training; "
    note += f"{options.teacher} -> {options.to}.\n\n"
    report(text + note + "\n".join(notes) + "\n\n" + table(COLUMNS, rows) + summary(rows), options.output)


if __name__ == "__main__":
    main()
