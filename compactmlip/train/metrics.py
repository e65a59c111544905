"""Errors of a model on labelled structures, in the field's units."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from compactmlip.train.dataset import Dataset
from compactmlip.train.loss import Residuals, joined, residuals
from compactmlip.train.ranks import Ranks

EVALUATION_ATOMS, EVALUATION_EDGES = 64, 2000
"""Batch size of evaluations; small enough for the cache."""


@dataclass(frozen=True)
class Error:
    """Mean absolute, root mean square and largest absolute error; NaN where there was no label."""

    mae: float
    rmse: float
    max: float

    @classmethod
    def of(cls, x: Tensor, unit: float = 1e-3) -> Error:
        """Statistics of the entries of ``x``, in ``unit`` (of x's own)."""
        if x.numel() == 0:
            return cls(float("nan"), float("nan"), float("nan"))
        x = x.double().abs() / unit
        return cls(float(x.mean()), float(x.square().mean().sqrt()), float(x.max()))


@dataclass(frozen=True)
class Errors:
    """Errors on a set of structures.

    Attributes
    ----------
    energy
        meV/atom.
    forces
        meV/Angstrom, over components.
    stress
        meV/Angstrom^3, over the six components.
    forces_by_species
        meV/Angstrom, by chemical symbol.
    hessian
        eV/Angstrom^2, over components of Hessian products; None without labels.
    """

    energy: Error
    forces: Error
    stress: Error
    forces_by_species: dict[str, Error] = field(default_factory=dict)
    hessian: Error | None = None

    def row(self) -> dict[str, float]:
        """Return MAE and RMSE as columns of a table."""
        hessian = {}
        if self.hessian is not None:
            hessian["hessian_mae_eV_per_A2"] = self.hessian.mae
            hessian["hessian_rmse_eV_per_A2"] = self.hessian.rmse
        return {
            "energy_mae_meV_per_atom": self.energy.mae,
            "energy_rmse_meV_per_atom": self.energy.rmse,
            "forces_mae_meV_per_A": self.forces.mae,
            "forces_rmse_meV_per_A": self.forces.rmse,
            "stress_mae_meV_per_A3": self.stress.mae,
            "stress_rmse_meV_per_A3": self.stress.rmse,
            **hessian,
        }

    def __str__(self) -> str:
        text = f"E {self.energy.mae:.3g} meV/atom, F {self.forces.mae:.3g} meV/A"
        text += "" if self.stress.mae != self.stress.mae else f", S {self.stress.mae:.3g} meV/A^3"
        return text if self.hessian is None else f"{text}, H {self.hessian.mae:.3g} eV/A^2"


def dataset_residuals(
    model: nn.Module,
    dataset: Dataset,
    *,
    max_atoms: int = EVALUATION_ATOMS,
    max_edges: int = EVALUATION_EDGES,
    on_batch: Callable[[int], None] | None = None,
    ranks: Ranks | None = None,
) -> Residuals:
    """Model minus label on all structures, in their order.

    ``on_batch`` is called with the number of atoms of each finished batch.  ``ranks`` share the work.
    """
    device, ranks = next(model.parameters()).device, ranks or Ranks()
    parts: dict[int, Residuals] = {}
    batches = dataset.batches(max_atoms, max_edges)
    for k in range(ranks.rank, len(batches), ranks.size):
        indices = batches[k]
        found = residuals(model, dataset.batch(indices).to(device))
        parts[k] = found if ranks.size == 1 else joined([found])
        if on_batch is not None:
            on_batch(sum(dataset.structures[k].num_atoms for k in indices))
    return joined(list(ranks.collect(parts).values()))


def summarise(found: Residuals, dataset: Dataset) -> Errors:
    """Statistics of the residuals of all structures of a data set."""
    species = torch.cat([s.graph.species[s.labelled_atoms] for s in dataset.structures])
    by_species = {
        symbol: Error.of(found.forces[species == k])
        for k, symbol in enumerate(dataset.species)
        if bool((species == k).any())
    }
    hessian = None if found.hessians is None else Error.of(found.hessians, unit=1.0)
    energy, forces, stress = map(Error.of, (found.energies, found.forces, found.stresses))
    return Errors(energy, forces, stress, by_species, hessian)


def evaluate(model: nn.Module, dataset: Dataset) -> Errors:
    """Errors of energies per atom, forces and stresses on labelled structures."""
    return summarise(dataset_residuals(model, dataset), dataset)
