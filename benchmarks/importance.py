"""Which criterion should rank channels?  Equal plans, with and without compensation, no training.

Each criterion scores the channels of one model on the same calibration structures; each plan then keeps the
highest-scoring ones.  Errors are those against the uncut model on held-out structures.  'random' is drawn for
several seeds.  The stability of each ranking is the agreement of scores from two halves of the calibration
structures (mean over channel groups).

    python benchmarks/importance.py MODEL --calibration FILE.xyz --held-out FILE.xyz --plan 64x0+32x1
    python benchmarks/importance.py ... --every 25 --output benchmarks/results/FILE.md
"""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from ase import Atoms
from common import header, parser, report, shown, table
from torch import nn

from compactmlip.compress.apply import keep_species, prune
from compactmlip.compress.cost import Shapes
from compactmlip.compress.importance import CRITERIA, importance
from compactmlip.compress.plan_file import Plan
from compactmlip.compress.stability import stability, summary
from compactmlip.compress.tapped import Scores
from compactmlip.data.read import read_structures
from compactmlip.families import load_model
from compactmlip.models import model_spec
from compactmlip.search.evaluate import Evaluator, Frames, PlanError

SEEDS = 3
"""Of the random ranking."""


def limited(frames: Sequence[Atoms], every: int, atoms: int) -> list[Atoms]:
    """Every so many frames, up to a number of atoms."""
    chosen: list[Atoms] = []
    for frame in frames[::every]:
        if sum(map(len, chosen)) >= atoms:
            break
        chosen.append(frame)
    return chosen


class Ranked:
    """Errors of plans under one ranking, sliced and compensated."""

    def __init__(self, evaluator: Evaluator) -> None:
        self.evaluator = evaluator

    def errors(self, plan: Plan, scores: Scores) -> tuple[PlanError, PlanError]:
        self.evaluator.scores = scores
        sliced = prune(self.evaluator.teacher, self.evaluator.shapes.masks(plan, scores))
        return self.evaluator.error_of(sliced), self.evaluator.error(plan)


def main(arguments: Sequence[str]) -> None:
    options = parser(__doc__)
    options.add_argument("model")
    options.add_argument("--calibration", type=Path, nargs="+", required=True)
    options.add_argument("--held-out", type=Path, nargs="+", required=True)
    options.add_argument("--plan", nargs="+", required=True, help="channels to keep, the same in all layers")
    options.add_argument("--every", type=int, default=1, help="take every so many frames")
    options.add_argument("--fit-atoms", type=int, default=500)
    options.add_argument("--held-out-atoms", type=int, default=300)
    options.add_argument("--resamples", type=int, default=1)
    given = options.parse_args(arguments)
    torch.set_num_threads(given.threads)
    frames = read_structures(given.calibration)
    held_out = read_structures(given.held_out)
    present = {s for a in (*frames, *held_out) for s in a.get_chemical_symbols()}
    teacher = keep_species(load_model(given.model, dtype=None), present)
    chosen = Frames(
        limited(frames, given.every, given.fit_atoms), limited(held_out, given.every, given.held_out_atoms)
    )
    command = shown(arguments)
    title = header("Importance criteria", f"python benchmarks/importance.py {command}")
    report(title + _tables(teacher, chosen, given.plan, given.resamples), given.output)


def _tables(teacher: nn.Module, frames: Frames, plans: Sequence[str], resamples: int) -> str:
    evaluator = Evaluator(teacher, frames, Shapes(teacher), {}, damping=3.0)
    graphs = evaluator.graphs
    ranked = Ranked(evaluator)
    layers = model_spec(teacher).num_message_passing_layers
    rows: dict[str, list[list[object]]] = {plan: [] for plan in plans}
    costs: list[list[object]] = []
    for criterion in CRITERIA:
        seeds = range(SEEDS) if criterion == "random" else range(1)
        start = time.process_time()
        scored = [importance(teacher, graphs, criterion, seed=seed) for seed in seeds]
        seconds = (time.process_time() - start) / len(scored)
        agreed = summary(stability(teacher, graphs, criterion, resamples=resamples))
        costs.append([criterion, seconds, agreed.spearman, 100 * agreed.overlap])
        for text in plans:
            found = [ranked.errors(Plan.uniform(text, layers), scores) for scores in scored]
            cells: list[object] = [criterion]
            for which in (0, 1):
                cells += [_spread([pair[which].energy for pair in found])]
                cells += [_spread([pair[which].forces for pair in found])]
            rows[text].append(cells)
            print(text, *cells, file=sys.stderr, flush=True)
    atoms = [sum(map(len, part)) for part in (frames.fit, frames.held_out)]
    text = f"\nCalibration: {len(frames.fit)} structures, {atoms[0]} atoms; held out: {len(frames.held_out)} "
    text += f"structures, {atoms[1]} atoms. Mean absolute errors against the uncut model, meV/atom and "
    text += "meV/Angstrom. Compensation with one fixed damping.\n"
    for plan, found in rows.items():
        text += f"\n## {plan}\n\n"
        text += table(["criterion", "E sliced", "F sliced", "E compensated", "F compensated"], found)
    text += "\n## Cost and stability\n\n"
    text += table(["criterion", "processor time (s)", "Spearman", "upper half in common (%)"], costs)
    return text


def _spread(values: Sequence[float]) -> str:
    if len(values) == 1:
        return f"{values[0]:.3g}"
    return f"{np.mean(values):.3g} ± {np.std(values, ddof=1):.2g}"


if __name__ == "__main__":
    main(sys.argv[1:])
