"""Make a diverse set of structures around the user's own, for calibration and distillation.

Candidates are thermal displacements, strained cells, supercells, vacancies, surfaces and snapshots of
short teacher MD.  Unphysical ones are discarded; the rest is thinned out by farthest-point selection in the
teacher's invariant features, within each kind and temperature so that no regime is lost.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
from ase import Atoms
from torch import nn

from compactmlip.data.candidates import Source, draw_candidates, input_candidates, make_sources, md_candidates
from compactmlip.data.md import FORCE_LIMIT
from compactmlip.data.perturb import SHORTEST_DISTANCE_RATIO, shortest_ratio
from compactmlip.data.sample_options import SampleOptions
from compactmlip.data.select import farthest_points, quotas, structure_descriptors
from compactmlip.data.teacher import check_frames, evaluate, scalar_features
from compactmlip.errors import InputError
from compactmlip.models import model_spec
from compactmlip.progress import Track

__all__ = ["SampleOptions", "sample"]

STIFFEST_BOND = 100.0
"""eV/Angstrom^2; a stiff bond (diamond has about 50, N2 has 140).  A force F takes F^2 / 2k of energy, so
structures whose excess energy is below FORCE_LIMIT^2 / (2 STIFFEST_BOND) need no look at their forces."""

MAX_ROUNDS = 5
"""Rounds of drawing candidates before giving up."""


def sample(
    structures: Sequence[Atoms],
    teacher: nn.Module,
    options: SampleOptions | None = None,
    progress: bool = True,
) -> list[Atoms]:
    """Return ``options.n`` diverse structures around the given ones, without labels.

    ``info`` records ``config_type`` (input, rattle, strain, supercell, vacancy, surface or md),
    ``temperature`` (K; 0 for atoms at their ideal places), ``source`` (index of the input) and, for MD,
    ``trajectory``.  Constraints of the inputs are ignored; molecules get no strain, slabs only along
    periodic directions.  The same seed gives the same structures.

    Parameters
    ----------
    structures
        The user's structures, periodic or not.
    teacher
        A native model that covers their species.
    options
        :class:`SampleOptions`.
    progress
        Show progress on stderr.

    Raises
    ------
    SpeciesError, InputError
        If an input cannot be used, or too few sensible structures can be made.
    """
    options = options or SampleOptions()
    check_frames(structures, model_spec(teacher))
    for k, atoms in enumerate(structures):
        if (ratio := shortest_ratio(atoms)) < SHORTEST_DISTANCE_RATIO:
            raise InputError(
                f"structure {k}: two atoms are at {ratio:.2f} times the sum of their covalent radii "
                f"(expected at least {SHORTEST_DISTANCE_RATIO}); check its units and cell."
            )
    seeds = np.random.SeedSequence(options.seed).spawn(3)
    rng_probe, rng_draw, rng_md = (np.random.default_rng(s) for s in seeds)
    sources = make_sources(structures, teacher, options, rng_probe)
    if options.vacancies and not any(s.can_have_vacancy for s in sources):
        raise InputError("vacancies need a periodic structure of at least two atoms; raise max_atoms.")
    if options.surfaces and not any(s.slabs for s in sources):
        raise InputError(
            "surfaces need a structure that is periodic in three directions, and room for a slab of it; "
            "raise max_atoms."
        )
    pool, descriptors = _pool(sources, teacher, options, (rng_draw, rng_md), progress)
    return [pool[k] for k in _choose(pool, descriptors, options)]


def _pool(
    sources: Sequence[Source],
    teacher: nn.Module,
    options: SampleOptions,
    rngs: tuple[np.random.Generator, np.random.Generator],
    progress: bool,
) -> tuple[list[Atoms], np.ndarray]:
    """Sensible candidates and their descriptors (candidates, D); at least ``options.n`` of them."""
    draw, md = rngs
    geometric = input_candidates(sources, max(1, options.n // 10))
    geometric += draw_candidates(sources, math.ceil(options.oversample * options.n), options, draw)
    snapshots = md_candidates(sources, sum(map(len, geometric)), teacher, options, md, progress)
    # The more snapshots there are, the fewer other candidates need to be looked at.
    places = options.n - min(len(snapshots), round(options.md_fraction * options.n))
    pool = geometric[: max(1, math.ceil(options.oversample * places))] + snapshots
    features: list[np.ndarray] = []
    kept: list[Atoms] = []
    lowest: dict[str, float] = {}
    for _ in range(MAX_ROUNDS):
        new = _describe(pool, teacher, options, progress)
        sensible = _sensible(pool, [energy for energy, _ in new], lowest, teacher, options)
        kept += [pool[k] for k in sensible]
        features += [new[k][1] for k in sensible]
        missing = options.n - _usable(kept, options)
        if missing <= 0:
            return kept, structure_descriptors(kept, features)
        pool = draw_candidates(sources, math.ceil(options.oversample * missing), options, draw)
        if not pool:
            break
    raise InputError(
        f"only {_usable(kept, options)} of {options.n} structures are physically sensible (distances above "
        f"{SHORTEST_DISTANCE_RATIO} times the covalent radii, forces below {FORCE_LIMIT:g} eV/Angstrom): "
        "lower the temperature or strain, or check the input structures with this model."
    )


def _usable(pool: Sequence[Atoms], options: SampleOptions) -> int:
    """Structures that may be chosen: MD only up to its share."""
    snapshots = sum(atoms.info["config_type"] == "md" for atoms in pool)
    return len(pool) - snapshots + min(snapshots, round(options.md_fraction * options.n))


def _describe(
    pool: Sequence[Atoms], teacher: nn.Module, options: SampleOptions, progress: bool
) -> list[tuple[float, np.ndarray]]:
    out = []
    with Track("Features of candidates", sum(map(len, pool)), "atoms", enabled=progress) as track:
        for energy, features in scalar_features(pool, teacher, options.max_edges):
            out.append((energy, features))
            track.advance(len(features))
    return out


def _sensible(
    pool: Sequence[Atoms],
    energies: Sequence[float],
    lowest: dict[str, float],
    teacher: nn.Module,
    options: SampleOptions,
) -> list[int]:
    """Indices of the candidates whose largest force is below :data:`FORCE_LIMIT`.

    Forces cost three times an energy.  They are computed for the inputs and, among the others, for those
    with a large excess over the lowest energy per atom of their composition, or without an input of that
    composition to compare with.  ``lowest`` collects these energies over all rounds.
    """
    compositions = [str(atoms.symbols.formula.reduce()[0].format("hill")) for atoms in pool]
    per_atom = [energy / len(atoms) for energy, atoms in zip(energies, pool, strict=True)]
    is_input = [atoms.info["config_type"] == "input" for atoms in pool]
    known = {c for c, start in zip(compositions, is_input, strict=True) if start} | lowest.keys()
    for energy, composition in zip(per_atom, compositions, strict=True):
        if composition in known and np.isfinite(energy):
            lowest[composition] = min(lowest.get(composition, np.inf), energy)
    allowed = FORCE_LIMIT**2 / (2 * STIFFEST_BOND)
    asked, bad = [], set()
    for k, (atoms, energy, composition) in enumerate(zip(pool, per_atom, compositions, strict=True)):
        excess = (energy - lowest.get(composition, -np.inf)) * len(atoms)
        if not np.isfinite(energy):
            bad.add(k)
        elif is_input[k] or (excess > allowed and atoms.info["config_type"] != "md"):
            asked.append(k)
    for indices, batch in evaluate([pool[k] for k in asked], teacher, options.max_edges):
        largest = [np.linalg.norm(e.forces, axis=1).max() for e in batch]
        bad |= {asked[j] for j, force in zip(indices, largest, strict=True) if force > FORCE_LIMIT}
    return [k for k in range(len(pool)) if k not in bad]


def _choose(pool: Sequence[Atoms], descriptors: np.ndarray, options: SampleOptions) -> list[int]:
    """Farthest points within each (kind, temperature), in proportion to the pool; MD up to its share."""
    strata: dict[tuple[str, float], list[int]] = {}
    for k, atoms in enumerate(pool):
        strata.setdefault((atoms.info["config_type"], atoms.info["temperature"]), []).append(k)
    snapshots = sum(len(members) for (kind, _), members in strata.items() if kind == "md")
    from_md = min(round(options.md_fraction * options.n), snapshots)
    chosen: list[int] = []
    for is_md, places in ((False, options.n - from_md), (True, from_md)):
        part = [members for (kind, _), members in sorted(strata.items()) if (kind == "md") == is_md]
        for members, quota in zip(part, quotas([len(m) for m in part], places), strict=True):
            chosen += farthest_points(descriptors, quota, chosen=chosen, among=members)
    return chosen
