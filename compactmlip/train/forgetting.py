"""What a fine-tuned model has forgotten: structures that its parent labels, and errors on them."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from ase import Atoms
from ase.data import atomic_numbers, covalent_radii
from torch import nn

from compactmlip.data.label import ENERGIES, put_labels
from compactmlip.data.perturb import bare, deformed, displaced, random_deformation, shortest_ratio
from compactmlip.data.read import ENERGY, FORCES, STRESS
from compactmlip.data.teacher import evaluate as evaluate_frames
from compactmlip.models import model_spec
from compactmlip.train.dataset import Dataset
from compactmlip.train.metrics import Errors, dataset_residuals, summarise

DISPLACEMENTS, STRAIN, SHEAR = (0.03, 0.25), 0.06, 0.04
"""Angstrom, and largest strains, of the structures that are made."""

SHORTEST = 0.65
"""Structures with two atoms nearer than this times the sum of their covalent radii are drawn again."""

ATTEMPTS = 20


@dataclass(frozen=True)
class Replay:
    """Structures around those of a data set.

    Attributes
    ----------
    perturbed
        Displaced and strained.
    substituted
        The same with other species of the model in their places, scaled to their size; empty if the model
        covers no other species.
    """

    perturbed: tuple[Atoms, ...]
    substituted: tuple[Atoms, ...]


@dataclass(frozen=True)
class Forgetting:
    """Errors of the fine-tuned model against its parent's labels on one kind of structures.

    ``mean_force`` is the mean absolute component of the parent's forces, meV/Angstrom.
    """

    name: str
    frames: int
    errors: Errors
    mean_force: float


def replay_structures(
    frames: Sequence[Atoms], species: Sequence[str], number: int, seed: int, max_atoms: int = 64
) -> Replay:
    """Draw ``number`` structures of each kind around frames, small ones where there are any."""
    rng = np.random.default_rng([seed, 20])
    small = [a for a in frames if len(a) <= max_atoms] or [min(frames, key=len)]
    present = {s for a in frames for s in a.get_chemical_symbols()}
    others = len(present) < len(species)
    perturbed = [_draw(small, rng, None) for _ in range(number)]
    substituted = [_draw(small, rng, species) for _ in range(number if others else 0)]
    return Replay(_found(perturbed, "replay"), _found(substituted, "replay, other species"))


def _found(made: Iterable[Atoms | None], name: str) -> tuple[Atoms, ...]:
    kept = tuple(a for a in made if a is not None)
    for atoms in kept:
        atoms.info["config_type"] = name
    return kept


def _draw(frames: Sequence[Atoms], rng: np.random.Generator, species: Sequence[str] | None) -> Atoms | None:
    """One sensible structure, or None if none was found."""
    for _ in range(ATTEMPTS):
        atoms = bare(frames[int(rng.integers(len(frames)))])
        if species is not None:
            atoms = _substituted(atoms, rng, species)
        sigma = rng.uniform(*DISPLACEMENTS)
        if atoms.pbc.any() and atoms.cell.rank == 3:
            atoms = deformed(atoms, random_deformation(atoms, STRAIN, SHEAR, rng))
        atoms = displaced(atoms, np.full(len(atoms), sigma), rng)
        if shortest_ratio(atoms) >= SHORTEST:
            return atoms
    return None


def _substituted(atoms: Atoms, rng: np.random.Generator, species: Sequence[str]) -> Atoms:
    """Give each species another one's place; lengths scale with the mean covalent radius."""
    old = np.unique(atoms.numbers)
    new = rng.choice([atomic_numbers[s] for s in species], len(old), replace=len(old) > len(species))
    before = covalent_radii[atoms.numbers].mean()
    numbers = new[np.searchsorted(old, atoms.numbers)]
    ratio = covalent_radii[numbers].mean() / before
    out = Atoms(numbers, ratio * atoms.positions, pbc=atoms.pbc)
    out.set_cell(ratio * atoms.cell.array)
    return out


def labelled_by(model: nn.Module, frames: Sequence[Atoms]) -> list[Atoms]:
    """Copies of structures with a model's energy, forces and stress as ``REF_*`` labels.

    Raises
    ------
    CompactMLIPError
        If the model returns numbers that are not finite.
    """
    out: list[Atoms] = []
    for indices, batch in evaluate_frames(frames, model):
        for k, found in zip(indices, batch, strict=True):
            atoms = bare(frames[k])
            keep = {ENERGY, FORCES, STRESS, ENERGIES}
            atoms.info = {key: v for key, v in frames[k].info.items() if key not in keep}
            put_labels(atoms, found)
            out.append(atoms)
    return out


def measure_forgetting(
    start: nn.Module, tuned: nn.Module, name: str, frames: Sequence[Atoms], dtype: torch.dtype
) -> Forgetting:
    """Errors of a fine-tuned model against the labels of the model that it started from."""
    dataset = Dataset.from_frames(labelled_by(start, frames), model_spec(start), dtype, name)
    forces = torch.cat([s.forces for s in dataset.structures]).abs().mean()
    errors = summarise(dataset_residuals(tuned, dataset), dataset)
    return Forgetting(name, len(frames), errors, 1e3 * float(forces))
