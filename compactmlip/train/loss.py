"""The training loss: Huber functions of the errors of energy per atom, forces and stress."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import huber_loss

from compactmlip.data.graph import energy_and_derivatives
from compactmlip.train.dataset import VOIGT, LabelledBatch
from compactmlip.train.options import TrainOptions

NodeEnergy = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class Residuals:
    """Model minus label.

    Attributes
    ----------
    energies
        (S,) eV/atom, float64.
    forces
        (N, 3) eV/Angstrom.
    stresses
        (L, 6) eV/Angstrom^3, Voigt order, of the structures that have a stress label.
    """

    energies: Tensor
    forces: Tensor
    stresses: Tensor


@dataclass(frozen=True)
class LossTerms:
    """Weighted terms of the loss (scalars without unit); the loss is their sum."""

    energy: Tensor
    forces: Tensor
    stress: Tensor

    @property
    def total(self) -> Tensor:
        """The loss."""
        return self.energy + self.forces + self.stress

    def stacked(self) -> Tensor:
        """Return the terms as a detached tensor (3,), float64."""
        return torch.stack([t.detach().double() for t in (self.energy, self.forces, self.stress)])


def residuals(model: NodeEnergy, batch: LabelledBatch, *, create_graph: bool = False) -> Residuals:
    """Evaluate a model on labelled structures and subtract the labels.

    ``create_graph`` keeps the graph, so that the loss can be differentiated.
    """
    found = energy_and_derivatives(model, batch.graph, create_graph=create_graph)
    stresses = found.stresses.index_select(0, batch.with_stress)[:, VOIGT[0], VOIGT[1]]
    return Residuals(
        (found.energies - batch.energies) / batch.graph.num_atoms,
        found.forces - batch.forces,
        stresses - batch.stresses,
    )


def loss_terms(errors: Residuals, options: TrainOptions) -> LossTerms:
    """Weighted Huber losses of a batch.

    Each error x enters as h(x / delta), with h(u) = u^2 / 2 for abs(u) < 1 and abs(u) - 1/2 beyond
    (Huber 1964): delta is both the unit of the quantity and the error beyond which outliers count
    linearly.  Energies are averaged over structures, forces and stresses over components.
    """

    def term(x: Tensor, delta: float, weight: float) -> Tensor:
        if weight == 0 or x.numel() == 0:
            return 0.0 * x.sum().to(torch.float64)
        unit = x / delta
        return weight * huber_loss(unit, torch.zeros_like(unit)).to(torch.float64)

    return LossTerms(
        term(errors.energies, options.energy_delta, options.energy_weight),
        term(errors.forces, options.forces_delta, options.forces_weight),
        term(errors.stresses, options.stress_delta, options.stress_weight),
    )
