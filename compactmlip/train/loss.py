"""The training loss: Huber functions of the errors of energy per atom, forces, stress and Hessian."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import huber_loss

from compactmlip.data.graph import derivatives, edge_gradient
from compactmlip.data.hessian import products_from
from compactmlip.train.dataset import VOIGT, LabelledBatch
from compactmlip.train.options import TrainOptions

UNIVERSAL_SIZES, UNIVERSAL_FACTORS = (100.0, 200.0, 300.0), (1.0, 0.7, 0.4, 0.1)
"""Force labels (eV/Angstrom) from which the universal loss uses the next factor of delta."""

NodeEnergy = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class Residuals:
    """Model minus label.

    Attributes
    ----------
    energies
        (S,) eV/atom, float64.
    forces
        (M, 3) eV/Angstrom, of the atoms that have a force label.
    stresses
        (L, 6) eV/Angstrom^3, Voigt order, of the structures that have a stress label.
    weights
        (S,), (M,), (L,) and, with ``hessians``, (N,) weights of their rows in the loss; None if all are one.
    sizes
        (M,) absolute values of the force labels, eV/Angstrom; None if they are not known.
    hessians
        (N, 3 K) eV/Angstrom^2, of the products of the Hessian with K directions; None without labels.
    """

    energies: Tensor
    forces: Tensor
    stresses: Tensor
    weights: tuple[Tensor, ...] | None = None
    sizes: Tensor | None = None
    hessians: Tensor | None = None

    @property
    def parts(self) -> tuple[Tensor, ...]:
        """All errors, in the order of the weights."""
        known = (self.energies, self.forces, self.stresses)
        return known if self.hessians is None else (*known, self.hessians)


@dataclass(frozen=True)
class LossTerms:
    """Weighted terms of the loss (scalars without unit); the loss is their sum."""

    energy: Tensor
    forces: Tensor
    stress: Tensor
    hessian: Tensor

    @property
    def total(self) -> Tensor:
        """The loss."""
        return self.energy + self.forces + self.stress + self.hessian

    def stacked(self) -> Tensor:
        """Return the terms as a detached tensor (4,), float64."""
        terms = (self.energy, self.forces, self.stress, self.hessian)
        return torch.stack([t.detach().double() for t in terms])


def residuals(model: NodeEnergy, batch: LabelledBatch, *, create_graph: bool = False) -> Residuals:
    """Evaluate a model on labelled structures and subtract the labels.

    ``create_graph`` keeps the graph, so that the loss can be differentiated.
    """
    graph, labels = batch.graph, batch.hessian
    again = create_graph or labels is not None
    vectors, node_energies, gradient = edge_gradient(model, graph, create_graph=again)
    hessians = None
    if labels is not None:
        products = products_from(graph, vectors, gradient, labels.directions, create_graph=create_graph)
        hessians = (products - labels.products).flatten(1)
    if not create_graph:
        node_energies, gradient = node_energies.detach(), gradient.detach()
    found = derivatives(graph, node_energies, gradient)
    stresses = found.stresses.index_select(0, batch.with_stress)[:, VOIGT[0], VOIGT[1]]
    forces, structure = found.forces, graph.structure
    if batch.with_forces is not None:
        forces, structure = forces.index_select(0, batch.with_forces), structure[batch.with_forces]
    weights: tuple[Tensor, ...] | None = None
    if batch.weights is not None:
        by_row = batch.weights
        weights = (by_row[:, 0], by_row[structure, 1], by_row[batch.with_stress, 2])
        weights = weights if hessians is None else (*weights, by_row[graph.structure, 1])
    return Residuals(
        (found.energies - batch.energies) / graph.num_atoms,
        forces - batch.forces,
        stresses - batch.stresses,
        weights,
        batch.forces.norm(dim=1),
        hessians,
    )


def joined(parts: Sequence[Residuals]) -> Residuals:
    """Residuals of several batches as one, on the CPU."""
    weights = None
    if any(p.weights is not None for p in parts):
        rows = [p.weights or tuple(x.new_ones(len(x)) for x in p.parts) for p in parts]
        weights = tuple(torch.cat([x.double() for x in column]).cpu() for column in zip(*rows, strict=True))
    sizes = [p.sizes for p in parts if p.sizes is not None]
    hessians = [p.hessians for p in parts if p.hessians is not None]
    return Residuals(
        torch.cat([p.energies for p in parts]).cpu(),
        torch.cat([p.forces for p in parts]).cpu(),
        torch.cat([p.stresses for p in parts]).cpu(),
        weights,
        torch.cat(sizes).cpu() if len(sizes) == len(parts) else None,
        torch.cat(hessians).cpu() if len(hessians) == len(parts) else None,
    )


def loss_terms(errors: Residuals, options: TrainOptions, numbers: Sequence[int] | None = None) -> LossTerms:
    """Weighted losses of a batch.

    Each error x enters as h(x / delta).  With ``loss="huber"``, h(u) = u^2 / 2 for abs(u) < 1 and
    abs(u) - 1/2 beyond (Huber 1964): delta is both the unit of the quantity and the error beyond which
    outliers count linearly.  "universal" lets the linear part begin earlier for large forces, at 0.7, 0.4
    and 0.1 delta where the label is above 100, 200 and 300 eV/Angstrom (Batatia et al.,
    arXiv:2401.00096).  "mse" is u^2 / 2 everywhere.  Energies are averaged over structures, forces, stresses
    and Hessian products over components; a structure's own weights multiply its part of these sums, that of
    its forces also its Hessian.  Where the batch is a part of a larger one, ``numbers`` are the larger one's
    (:func:`number_of_entries`), and the terms of all parts add up to its own.
    """

    def term(k: int, x: Tensor, delta: float, weight: float) -> Tensor:
        if weight == 0 or x.numel() == 0:
            return 0.0 * x.sum().to(torch.float64)
        unit = x / delta
        universal = k == 1 and options.loss == "universal" and errors.sizes is not None
        if options.loss == "huber" and errors.weights is None and numbers is None:
            return weight * huber_loss(unit, torch.zeros_like(unit)).to(torch.float64)
        if options.loss == "mse":
            each = 0.5 * unit.square()
        elif universal and errors.sizes is not None:
            each = _huber(unit, _linear_from(errors.sizes).to(unit.dtype)[:, None])
        else:
            each = huber_loss(unit, torch.zeros_like(unit), reduction="none")
        each = each.to(torch.float64)
        if errors.weights is not None:
            each = each.reshape(len(each), -1) * errors.weights[k][:, None]
        return weight * (each.mean() if numbers is None else each.sum() / numbers[k])

    return LossTerms(
        term(0, errors.energies, options.energy_delta, options.energy_weight),
        term(1, errors.forces, options.forces_delta, options.forces_weight),
        term(2, errors.stresses, options.stress_delta, options.stress_weight),
        errors.energies.new_zeros((), dtype=torch.float64)
        if errors.hessians is None
        else term(3, errors.hessians, options.hessian_delta, options.hessian_weight),
    )


def number_of_entries(batch: LabelledBatch) -> tuple[int, int, int, int]:
    """Numbers of labels (energies, components of forces, stresses and Hessian products) in a batch."""
    hessian = 0 if batch.hessian is None else batch.hessian.products.numel()
    return len(batch.energies), batch.forces.numel(), batch.stresses.numel(), hessian


def _huber(x: Tensor, delta: Tensor) -> Tensor:
    size = x.abs()
    return torch.where(size < delta, 0.5 * x.square(), delta * (size - 0.5 * delta))


def _linear_from(sizes: Tensor) -> Tensor:
    """Share of delta at which the universal loss turns linear, by the size of the force label."""
    factors = sizes.new_tensor(UNIVERSAL_FACTORS)
    return factors[torch.bucketize(sizes, sizes.new_tensor(UNIVERSAL_SIZES), right=True)]
