"""What compensation gains: l3i5 cut to l <= 2 and l <= 1, no training.

Case (a), specialised: twelve crystals; calibration and held-out structures are different rattled and
strained configurations of the same materials.

    python benchmarks/compensation.py specialised

Case (b), general purpose: frames of many materials in extended XYZ, split by trajectory, with more and
more calibration atoms.  The held-out trajectories are the same for all sizes.

    python benchmarks/compensation.py general --frames FILE.xyz --group-key mptrj_traj_id
"""

from __future__ import annotations

import sys
import time
from argparse import Namespace
from collections.abc import Sequence
from pathlib import Path

import ase.io
import numpy as np
import torch
from ase import Atoms
from ase.build import bulk
from common import header, parser, report, table
from torch import nn

from compactmlip.compress.apply import keep_species, prune
from compactmlip.compress.compensate import compensate
from compactmlip.compress.importance import taylor_importance
from compactmlip.compress.plan import parse_target, target_sizes, top_channels
from compactmlip.data.graph import GraphBatch, build_graph, collate, energy_and_derivatives
from compactmlip.families import load_model
from compactmlip.models import model_dtype, model_spec

CRYSTALS = (
    ("NaCl", "rocksalt", 5.64),
    ("MgO", "rocksalt", 4.21),
    ("LiF", "rocksalt", 4.03),
    ("CaO", "rocksalt", 4.81),
    ("CsCl", "cesiumchloride", 4.12),
    ("GaAs", "zincblende", 5.65),
    ("ZnS", "zincblende", 5.41),
    ("Si", "diamond", 5.43),
    ("Ge", "diamond", 5.66),
    ("Cu", "fcc", 3.61),
    ("Al", "fcc", 4.05),
    ("W", "bcc", 3.16),
)
TARGETS = {
    "l <= 2": "128x0+64x1+32x2",
    "l <= 1": "128x0+64x1",
    "64x0+32x1+16x2": "64x0+32x1+16x2",
}
BATCH_EDGES = 8000


def crystals(seed: int) -> list[Atoms]:
    """One rattled (0.12 A) and isotropically strained (2 %) configuration of each crystal."""
    rng = np.random.default_rng(seed)
    frames = []
    for name, structure, a in CRYSTALS:
        cubic = structure != "cesiumchloride"
        atoms = bulk(name, structure, a=a * (1 + 0.02 * rng.normal()), cubic=cubic)
        if len(atoms) < 4:
            atoms = atoms.repeat((2, 2, 1))
        atoms.rattle(0.12, rng=rng)
        frames.append(atoms)
    return frames


class HeldOut:
    """Errors against the uncut model: MAE of the energy (meV/atom) and of force components (meV/A)."""

    def __init__(self, teacher: nn.Module, frames: Sequence[Atoms]) -> None:
        self.batches = [collate([graph]) for graph in graphs(teacher, frames)]
        self.reference = [energy_and_derivatives(teacher, b) for b in self.batches]
        self.mean_force = 1e3 * float(torch.cat([r.forces for r in self.reference]).norm(dim=-1).mean())

    def errors(self, model: nn.Module) -> tuple[float, float]:
        energy, forces = [], []
        for batch, wanted in zip(self.batches, self.reference, strict=True):
            found = energy_and_derivatives(model, batch)
            energy.append(float((found.energies - wanted.energies).abs() / batch.num_atoms))
            forces.append((found.forces - wanted.forces).flatten())
        return 1e3 * float(np.mean(energy)), 1e3 * float(torch.cat(forces).abs().mean())


def graphs(model: nn.Module, frames: Sequence[Atoms]) -> list[GraphBatch]:
    return [build_graph(a, model_spec(model), model_dtype(model)) for a in frames]


def compare(
    teacher: nn.Module, target: str, calibration: Sequence[Atoms], held_out: HeldOut, groups: list[str] | None
) -> list[object]:
    """One row: errors of slicing, of slicing with compensation, and the ratios."""
    cal = graphs(teacher, calibration)
    sizes = target_sizes(
        model_spec(teacher), parse_target(target, model_spec(teacher).num_message_passing_layers)
    )
    masks = top_channels(
        model_spec(teacher), sizes, taylor_importance(teacher, cal[:100], max_edges=BATCH_EDGES)
    )
    sliced = prune(teacher, masks)
    begin = time.process_time()
    refit = compensate(sliced, teacher, masks, cal, groups=groups, max_edges=BATCH_EDGES)
    seconds = time.process_time() - begin
    plain, after = held_out.errors(sliced), held_out.errors(refit.model)
    atoms = sum(len(a) for a in calibration)
    ratios = plain[0] / after[0], plain[1] / after[1]
    count = sum(p.numel() for p in sliced.parameters())
    row = [count, len(calibration), atoms, *plain, *after, *ratios, seconds]
    print(target, row, file=sys.stderr, flush=True)
    return row


COLUMNS = (
    "cut to",
    "parameters",
    "calibration frames",
    "atoms",
    "E sliced (meV/atom)",
    "F sliced (meV/A)",
    "E compensated",
    "F compensated",
    "E gain",
    "F gain",
    "time (s)",
)


def specialised(teacher: nn.Module, options: Namespace) -> str:
    held_out = HeldOut(teacher, [a for seed in (90, 91, 92) for a in crystals(seed)])
    rows: list[list[object]] = []
    for count in (4, 16):
        frames = [a for seed in range(count) for a in crystals(seed)]
        rows += [[name, *compare(teacher, t, frames, held_out, None)] for name, t in TARGETS.items()]
    return f"Held out: 36 configurations, mean |F| {held_out.mean_force:.0f} meV/A.\n\n" + table(
        COLUMNS, rows
    )


def general(teacher: nn.Module, options: Namespace) -> str:
    frames = [a for a in ase.io.read(options.frames, ":") if len(a) <= options.max_atoms]
    names = [str(a.info[options.group_key]) for a in frames]
    order = list(dict.fromkeys(names))
    np.random.default_rng(0).shuffle(order)
    reserved = set(order[: len(order) // 5])
    test = [a for a, n in zip(frames, names, strict=True) if n in reserved][: options.test_frames]
    pool = [(a, n) for a, n in zip(frames, names, strict=True) if n not in reserved]
    held_out = HeldOut(teacher, test)
    rows: list[list[object]] = []
    for title in options.targets:
        for wanted in options.atoms:
            chosen, atoms = [], 0
            for frame, name in pool:
                if atoms >= wanted:
                    break
                chosen.append((frame, name))
                atoms += len(frame)
            calibration, groups = [f for f, _ in chosen], [n for _, n in chosen]
            rows.append([title, *compare(teacher, TARGETS[title], calibration, held_out, groups)])
    species = {s for a in frames for s in a.get_chemical_symbols()}
    return (
        f"Frames of at most {options.max_atoms} atoms, {len(species)} species; held out: {len(test)} frames "
        f"of trajectories not used for calibration, mean |F| {held_out.mean_force:.0f} meV/A.\n\n"
        + table(COLUMNS, rows)
    )


def main() -> None:
    options_parser = parser(__doc__)
    options_parser.add_argument("case", choices=("specialised", "general"))
    options_parser.add_argument("--frames", type=Path, help="extended XYZ for the general case")
    options_parser.add_argument("--group-key", default="mptrj_traj_id")
    options_parser.add_argument("--max-atoms", type=int, default=20)
    options_parser.add_argument("--test-frames", type=int, default=60)
    options_parser.add_argument("--atoms", type=int, nargs="+", default=[300, 600, 1000, 2300, 5000])
    options_parser.add_argument("--targets", nargs="+", default=["l <= 2"], choices=list(TARGETS))
    options = options_parser.parse_args()
    if options.case == "general" and options.frames is None:
        options_parser.error("the general case needs --frames")
    torch.set_num_threads(options.threads)
    text = header(f"Compensated pruning, {options.case}", " ".join(["python", *sys.argv[:2]]))
    teacher = load_model("7net-l3i5")
    if options.case == "specialised":
        symbols = {s for a in crystals(0) for s in a.get_chemical_symbols()}
        body = specialised(keep_species(teacher, symbols), options)
    else:
        body = general(teacher, options)
    report(text + "\n" + body, options.output)


if __name__ == "__main__":
    main()
