"""Tables of errors: by configuration type and by species."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from ase import Atoms

from compactmlip.data.config_types import grouped
from compactmlip.train.dataset import Dataset
from compactmlip.train.loss import Residuals
from compactmlip.train.metrics import Error


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
    return [_row(name, members, found, dataset) for name, members in grouped(frames).items()]


def _row(name: str, members: Sequence[int], found: Residuals, dataset: Dataset) -> Row:
    mask = torch.zeros(len(dataset.structures), dtype=torch.bool)
    mask[list(members)] = True
    labelled = torch.tensor([len(s.labelled_atoms) for s in dataset.structures])
    stressed = torch.tensor([len(s.with_stress) for s in dataset.structures])
    return Row(
        name,
        int(mask.sum()),
        sum(dataset.structures[k].num_atoms for k in members),
        Error.of(found.energies[mask]),
        Error.of(found.forces[mask.repeat_interleave(labelled)]),
        Error.of(found.stresses[mask.repeat_interleave(stressed)]),
    )
