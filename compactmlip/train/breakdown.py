"""Tables of errors: by configuration type and by species."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from ase import Atoms

from compactmlip.train.dataset import Dataset
from compactmlip.train.loss import Residuals
from compactmlip.train.metrics import Error

MOST_GROUPS = 24
"""Configuration types with rows of their own; the others, with the fewest atoms, share one."""


@dataclass(frozen=True)
class Row:
    """Errors of one group: energies in meV/atom, forces in meV/Angstrom, stresses in meV/Angstrom^3."""

    name: str
    frames: int
    atoms: int
    energy: Error
    forces: Error
    stress: Error


def by_config_type(found: Residuals, dataset: Dataset, frames: Sequence[Atoms]) -> list[Row]:
    """One row for each ``info["config_type"]``, those with most atoms first; empty if there is only one."""
    names = [str(a.info.get("config_type", "Default")) for a in frames]
    atoms: dict[str, int] = {}
    for name, a in zip(names, frames, strict=True):
        atoms[name] = atoms.get(name, 0) + len(a)
    ranked = sorted(atoms, key=lambda n: (-atoms[n], n))
    if len(ranked) < 2:
        return []
    own = ranked if len(ranked) <= MOST_GROUPS else ranked[: MOST_GROUPS - 1]
    rest = f"{len(ranked) - len(own)} other types"
    groups = [n if n in own else rest for n in names]
    order = [*own, rest] if len(own) < len(ranked) else own
    return [_row(name, [g == name for g in groups], found, dataset) for name in order]


def _row(name: str, chosen: Sequence[bool], found: Residuals, dataset: Dataset) -> Row:
    mask = torch.tensor(chosen)
    labelled = torch.tensor([len(s.labelled_atoms) for s in dataset.structures])
    stressed = torch.tensor([len(s.with_stress) for s in dataset.structures])
    return Row(
        name,
        int(mask.sum()),
        sum(s.num_atoms for s, inside in zip(dataset.structures, chosen, strict=True) if inside),
        Error.of(found.energies[mask]),
        Error.of(found.forces[mask.repeat_interleave(labelled)]),
        Error.of(found.stresses[mask.repeat_interleave(stressed)]),
    )
