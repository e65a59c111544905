"""Candidates for sampling: perturbed copies of the inputs, defects of crystals, snapshots of teacher MD."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from ase import Atoms
from torch import nn

from compactmlip.data.md import stiffness, trajectory
from compactmlip.data.perturb import (
    SHORTEST_DISTANCE_RATIO,
    Repeats,
    bare,
    compact_supercells,
    deformed,
    displaced,
    random_deformation,
    shortest_ratio,
    thermal_sigma,
    with_vacancy,
)
from compactmlip.data.sample_options import SampleOptions
from compactmlip.data.slabs import cleavage_gap, is_network, low_index_planes, slab
from compactmlip.models import model_spec
from compactmlip.progress import Track

KINDS = {"rattle": 0.40, "strain": 0.35, "supercell": 0.25}
"""Shares of the kinds of candidates (where a structure allows them), apart from defects and MD."""

DEFECT_SHARES = {"vacancy": 0.14, "surface": 0.08}
"""In networks of atoms, where the options leave it open.  With half as many vacancies a model of MgO learned
their energy in cells of the size that it had seen, and was 2 eV off in larger ones."""

GAP_RATIO = 0.6
"""Planes are cleaved whose gaps are at least this times the widest: (100) and (110) of rock salt, not the
polar (111); (111) and (110) of diamond; (111), (100) and (110) of fcc metals."""

SLAB_THICKNESS = (8.0, 4.0)
"""Angstrom; thinner where the first would give too many atoms, but not than the second."""

SMALLEST_CELL = 8
"""Periodic inputs with fewer atoms are repeated before atoms move: images that move together teach little."""

PROBED_SOURCES = 4
"""Force constants are measured on this many inputs; the others get the mean of each species."""

LEAST_MD_BUDGET = 1500
"""Atoms x steps that MD may take by default, however small the data set is."""

ATTEMPTS = 5
"""Times that a candidate with atoms too close together is drawn again."""


@dataclass(frozen=True)
class Source:
    """One input structure, the cells that are made of it, and the force constants of its atoms.

    ``network``: its bonds run through it in all directions, so that it may have defects of single atoms.
    """

    index: int
    atoms: Atoms
    stiffness: np.ndarray
    base: Repeats
    supercells: list[Repeats]
    vacancy_cells: list[Repeats]
    slabs: list[Atoms]
    network: bool

    @property
    def can_have_vacancy(self) -> bool:
        """Whether there is a periodic cell of more than one atom."""
        return bool(self.atoms.pbc.any()) and math.prod(self.vacancy_cells[0]) * len(self.atoms) > 1

    def allows(self, kind: str) -> bool:
        """Whether it can have a vacancy, or a surface."""
        return self.can_have_vacancy if kind == "vacancy" else bool(self.slabs)

    def displaced_slab(self, number: int, temperature: float, rng: np.random.Generator) -> Atoms:
        """Return a slab with thermally displaced atoms, as stiff as those of their species inside."""
        chosen = self.slabs[number]
        mean = {z: self.stiffness[self.atoms.numbers == z].mean() for z in set(self.atoms.numbers)}
        k = np.array([mean[z] for z in chosen.numbers])
        return displaced(chosen, thermal_sigma(k, temperature), rng)

    def displaced(self, repeats: Repeats, temperature: float, rng: np.random.Generator) -> Atoms:
        """Return a repeated cell with thermally displaced atoms."""
        k = np.tile(self.stiffness, math.prod(repeats))
        return displaced(self.atoms.repeat(repeats), thermal_sigma(k, temperature), rng)


def make_sources(
    structures: Sequence[Atoms], teacher: nn.Module, options: SampleOptions, rng: np.random.Generator
) -> list[Source]:
    """Prepare at most ``options.n`` inputs; measure force constants on a few of them."""
    used = evenly(len(structures), options.n)
    probed = {used[k] for k in evenly(len(used), PROBED_SOURCES)}
    constants: dict[int, np.ndarray] = {}
    for k in sorted(probed):
        atoms = bare(structures[k])
        repeats = next(iter(compact_supercells(atoms, options.max_atoms)), (1, 1, 1))
        measured = stiffness(atoms.repeat(repeats), teacher, rng, options.max_edges)
        constants[k] = measured.reshape(-1, len(atoms)).mean(axis=0)
    numbers = np.concatenate([structures[k].numbers for k in constants])
    values = np.concatenate(list(constants.values()))
    mean = {int(z): float(values[numbers == z].mean()) for z in np.unique(numbers)}
    sources = []
    for k in used:
        atoms = bare(structures[k])
        typical = np.array([mean.get(int(z), float(values.mean())) for z in atoms.numbers])
        # The floor keeps the probes' noise from making an atom look free.
        constant = np.maximum(constants.get(k, typical), 0.25 * typical)
        supercells = compact_supercells(atoms, options.max_atoms)
        base = _smallest(supercells, SMALLEST_CELL, len(atoms))
        larger = [r for r in supercells if math.prod(r) > math.prod(base)]
        network = is_network(atoms)
        wanted = options.surfaces or (options.surfaces is None and network)
        slabs = _slabs(atoms, model_spec(teacher).cutoff, options.max_atoms) if wanted else []
        # A wide one, for a vacancy alone, and the next, for training to be quick.
        wide = compact_supercells(atoms, max(options.max_atoms, options.vacancy_atoms))[:2]
        sources.append(Source(k, atoms, constant, base, larger[:3], wide or [base], slabs, network))
    return sources


def _slabs(atoms: Atoms, cutoff: float, max_atoms: int) -> list[Atoms]:
    """Slabs along the planes that a crystal prefers, as thick as :data:`SLAB_THICKNESS` and size allow."""
    if not atoms.pbc.all():
        return []
    gaps = {plane: cleavage_gap(atoms, plane)[0] for plane in low_index_planes()}
    found = []
    for plane in (p for p, gap in gaps.items() if gap >= GAP_RATIO * max(gaps.values()) - 1e-6):
        made = (slab(atoms, plane, cutoff + 1.0, thickness) for thickness in SLAB_THICKNESS)
        found += [system for system in made if len(system) <= max(max_atoms, len(atoms))][:1]
    return found


def evenly(total: int, n: int) -> list[int]:
    """At most ``n`` evenly spaced indices below ``total``."""
    return sorted({int(k) for k in np.linspace(0, total - 1, min(n, total)).round()})


def _smallest(supercells: Sequence[Repeats], atoms_wanted: int, atoms_in_cell: int) -> Repeats:
    """Repeats of the smallest cell with the wanted number of atoms, or of the largest one there is."""
    cells = sorted([(1, 1, 1), *supercells], key=math.prod)
    enough = [r for r in cells if math.prod(r) * atoms_in_cell >= atoms_wanted]
    return enough[0] if enough else cells[-1]


def _tagged(atoms: Atoms, kind: str, temperature: float, source: int, **info: Any) -> Atoms:
    atoms.info.update(config_type=kind, temperature=float(temperature), source=source, **info)
    return atoms


def input_candidates(sources: Sequence[Source], most: int) -> list[Atoms]:
    """At most ``most`` of the inputs as they are."""
    kept = [sources[k] for k in evenly(len(sources), most)]
    return [_tagged(bare(source.atoms), "input", 0.0, source.index) for source in kept]


def able_sources(sources: Sequence[Source], options: SampleOptions) -> dict[str, list[Source]]:
    """Sources of each kind of defect: those that can have it if the options ask for it, else networks."""
    asked = {"vacancy": options.vacancies, "surface": options.surfaces}
    return {
        kind: [s for s in sources if s.allows(kind) and (share is not None or s.network)]
        for kind, share in asked.items()
    }


def defect_shares(sources: Sequence[Source], options: SampleOptions) -> dict[str, float]:
    """Fraction of vacancies and of surfaces among the candidates.

    Where the options leave it open, networks of atoms have :data:`DEFECT_SHARES`, other sources none.
    """
    shares = {"vacancy": options.vacancies, "surface": options.surfaces}
    able = able_sources(sources, options)
    return {
        kind: share if share is not None else DEFECT_SHARES[kind] * len(able[kind]) / max(1, len(sources))
        for kind, share in shares.items()
    }


def draw_candidates(
    sources: Sequence[Source], number: int, options: SampleOptions, rng: np.random.Generator
) -> list[Atoms]:
    """Up to ``number`` candidates with sensible distances; sources and temperatures take turns."""
    shares = defect_shares(sources, options)
    able = {"": list(sources), **able_sources(sources, options)}
    weights = [1 - sum(shares.values()), *shares.values()]
    out: list[Atoms] = []
    for k in range(number):
        defect = str(rng.choice(["", *shares], p=weights))
        suited = able[defect]
        source = suited[k % len(suited)]
        temperature = options.temperature[(k // len(suited) + k % len(suited)) % len(options.temperature)]
        for _ in range(ATTEMPTS):
            if defect:
                candidate = _defective(source, temperature, defect, rng)
            else:
                candidate = _perfect(source, temperature, options, rng)
            if shortest_ratio(candidate) >= SHORTEST_DISTANCE_RATIO:
                out.append(candidate)
                break
    return out


def _perfect(source: Source, temperature: float, options: SampleOptions, rng: np.random.Generator) -> Atoms:
    periodic = bool(source.atoms.pbc.any())
    possible = {
        "rattle": True,
        "strain": periodic and options.strain + options.shear > 0,
        "supercell": bool(source.supercells),
    }
    weights = np.array([share * possible[kind] for kind, share in KINDS.items()])
    kind = str(rng.choice(list(KINDS), p=weights / weights.sum()))
    repeats = source.base
    if kind == "supercell" or (source.supercells and kind != "rattle" and rng.random() < 0.5):
        repeats = source.supercells[rng.integers(len(source.supercells))]
    if kind == "strain" and rng.random() < 1 / 3:
        temperature = 0.0  # pure strain carries the equation of state and the elastic constants
    atoms = source.displaced(repeats, temperature, rng)
    if kind == "strain":
        atoms = deformed(atoms, random_deformation(atoms, options.strain, options.shear, rng))
    return _tagged(atoms, kind, temperature, source.index)


def _defective(source: Source, temperature: float, kind: str, rng: np.random.Generator) -> Atoms:
    """A vacancy, or a surface."""
    if kind == "surface":
        atoms = source.displaced_slab(int(rng.integers(len(source.slabs))), temperature, rng)
        return _tagged(atoms, kind, temperature, source.index)
    repeats = source.vacancy_cells[rng.integers(len(source.vacancy_cells))]
    atoms = source.displaced(repeats, temperature, rng)
    # Each species as often, however many atoms it has.
    removed = rng.choice(np.flatnonzero(atoms.numbers == rng.choice(np.unique(atoms.numbers))))
    return _tagged(with_vacancy(atoms, int(removed), rng), kind, temperature, source.index)


@dataclass(frozen=True)
class _Run:
    source: Source
    temperature: float
    cost: int


def md_candidates(
    sources: Sequence[Source],
    pool_atoms: int,
    teacher: nn.Module,
    options: SampleOptions,
    rng: np.random.Generator,
    progress: bool,
) -> list[Atoms]:
    """Snapshots of short MD runs over sources and temperatures in turn.

    ``pool_atoms`` is the number of atoms in all other candidates; it sets the default budget.
    """
    runs = _plan_runs(sources, pool_atoms, options)
    out: list[Atoms] = []
    cost = sum(run.cost for run in runs)
    with Track("Teacher MD", cost, "atoms", enabled=progress and bool(runs)) as track:
        for number, run in enumerate(runs):
            frames = trajectory(
                run.source.displaced(run.source.base, run.temperature, rng),
                teacher,
                run.temperature,
                steps=options.md_steps,
                interval=min(options.md_interval, options.md_steps),
                rng=rng,
                advance=track.advance,
            )
            out += [_tagged(f, "md", run.temperature, run.source.index, trajectory=number) for f in frames]
    return out


def _plan_runs(sources: Sequence[Source], pool_atoms: int, options: SampleOptions) -> list[_Run]:
    """Runs until there are enough snapshots or the budget is spent; at least one."""
    budget = options.md_evaluations
    if budget is None:
        budget = max(LEAST_MD_BUDGET, pool_atoms // 5)
    wanted = math.ceil(options.md_fraction * options.n * options.oversample) if budget else 0
    per_run = max(1, options.md_steps // options.md_interval)
    runs: list[_Run] = []
    while len(runs) * per_run < wanted:
        turn, which = divmod(len(runs), len(sources))
        source = sources[which]
        temperature = options.temperature[(turn + which) % len(options.temperature)]
        cost = options.md_steps * math.prod(source.base) * len(source.atoms)
        if runs and sum(run.cost for run in runs) + cost > budget:
            break
        runs.append(_Run(source, temperature, cost))
    return runs
