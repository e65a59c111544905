"""Labelled structures as graphs in memory, and batches of them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import pairwise

import numpy as np
import torch
from ase import Atoms
from numpy.typing import ArrayLike, NDArray
from torch import Tensor

from compactmlip.data.graph import GraphBatch, build_graph, collate
from compactmlip.data.hessian import DIRECTIONS, PRODUCTS
from compactmlip.data.read import ENERGY, FORCES, STRESS
from compactmlip.data.subset import choose_per_group
from compactmlip.errors import InputError
from compactmlip.spec import ModelSpec

VOIGT = ((0, 1, 2, 1, 0, 0), (0, 1, 2, 2, 2, 1))
"""Rows and columns of the components xx yy zz yz xz xy."""


@dataclass(frozen=True)
class HessianLabels:
    """Displacements (N, K, 3) and the teacher's Hessian times each, (N, K, 3) eV/Angstrom^2."""

    directions: Tensor
    products: Tensor

    def some(self, start: int, number: int) -> HessianLabels:
        """``number`` directions from the one numbered ``start`` on, in a circle."""
        count = self.directions.shape[1]
        chosen = [(start + k) % count for k in range(min(number, count))]
        return HessianLabels(self.directions[:, chosen], self.products[:, chosen])


@dataclass(frozen=True)
class LabelledBatch:
    """One or several structures with their labels.

    Attributes
    ----------
    graph
        The structures.  The volume of a structure without stress label is one instead of NaN, so
        that its unused stress has a finite gradient.
    energies
        (S,) eV, float64.
    forces
        (M, 3) eV/Angstrom of the M atoms of structures that have force labels.
    stresses
        (L, 6) eV/Angstrom^3 of the L structures that have a stress label, Voigt order.
    with_stress
        (L,) indices of these structures.
    with_forces
        (M,) indices of the atoms that have force labels; None if all have.
    weights
        (S, 3) weights of each structure's energy, forces and stress in the loss; None if all are one.
    hessian
        Labels of the Hessian; None if they are not used.
    """

    graph: GraphBatch
    energies: Tensor
    forces: Tensor
    stresses: Tensor
    with_stress: Tensor
    with_forces: Tensor | None = None
    weights: Tensor | None = None
    hessian: HessianLabels | None = None

    def to(self, device: torch.device) -> LabelledBatch:
        """Return a copy on a device."""
        return LabelledBatch(
            self.graph.to(device),
            self.energies.to(device),
            self.forces.to(device),
            self.stresses.to(device),
            self.with_stress.to(device),
            None if self.with_forces is None else self.with_forces.to(device),
            None if self.weights is None else self.weights.to(device),
            None
            if self.hessian is None
            else HessianLabels(self.hessian.directions.to(device), self.hessian.products.to(device)),
        )

    def with_hessian(self, start: int, number: int) -> LabelledBatch:
        """Keep some directions of the Hessian labels, see :meth:`HessianLabels.some`; none for 0."""
        if self.hessian is None or number == 0:
            return replace(self, hessian=None)
        return replace(self, hessian=self.hessian.some(start, number))

    @property
    def num_atoms(self) -> int:
        """Atoms of all structures."""
        return len(self.graph.species)

    @property
    def labelled_atoms(self) -> Tensor:
        """(M,) indices of the atoms that have force labels."""
        if self.with_forces is None:
            return torch.arange(self.num_atoms, device=self.forces.device)
        return self.with_forces


@dataclass(frozen=True)
class Draw:
    """Random part of each group that an epoch uses; see :func:`compactmlip.data.subset.choose_per_group`."""

    groups: tuple[str, ...]
    number: int | None
    share: float | None

    def epoch(self, seed: Sequence[int]) -> NDArray[np.int64]:
        """Indices of the frames of an epoch."""
        return np.array(choose_per_group(self.groups, self.number, self.share, seed), dtype=np.int64)


@dataclass(frozen=True)
class Dataset:
    """Labelled structures in memory, one :class:`LabelledBatch` each.

    Attributes
    ----------
    structures
        One entry per frame.
    species
        Chemical symbols that the species indices mean.
    draw
        Which structures shuffled batches take; None for all of them.
    """

    structures: tuple[LabelledBatch, ...]
    species: tuple[str, ...]
    draw: Draw | None = None

    @classmethod
    def from_frames(
        cls,
        frames: Sequence[Atoms],
        spec: ModelSpec,
        dtype: torch.dtype = torch.float32,
        name: str = "the training set",
        *,
        weights: NDArray[np.float64] | None = None,
        need_forces: bool = True,
        hessian: int = 0,
    ) -> Dataset:
        """Build the graphs of labelled frames.

        Energies (``info["REF_energy"]``, eV) and forces (``arrays["REF_forces"]``, eV/Angstrom) are
        needed; stresses (``info["REF_stress"]``, eV/Angstrom^3, Voigt or 3 x 3) are used where they
        exist and the frame has a periodic cell.

        Parameters
        ----------
        frames
            The structures.
        spec
            Gives species and cutoff.
        dtype
            Of edge vectors, forces and stresses.
        name
            What the frames are, for messages.
        weights
            (frames, 3) weights of energy, forces and stress of each frame in the loss.
        need_forces
            Refuse frames without forces; else their energies alone are used.
        hessian
            Read so many directions of the Hessian, as ``compactmlip label --hessian`` writes them, or all
            that there are if these are fewer; 0 reads none.

        Raises
        ------
        InputError
            If there is no frame, a label is missing, not finite or of the wrong shape, or a structure
            is unusable.
        """
        if not frames:
            raise InputError(f"{name} has no frames.")
        structures = []
        for k, atoms in enumerate(frames):
            where = f"frame {k} of {name} ({atoms.get_chemical_formula()})"
            try:
                graph = build_graph(atoms, spec, dtype)
            except InputError as error:
                raise type(error)(f"{where}: {error}") from error
            own = None if weights is None else torch.as_tensor(weights[k : k + 1], dtype=torch.float64)
            products = _hessian(atoms, dtype, where).some(0, hessian) if hessian else None
            labelled = _labelled(atoms, graph, dtype, where, need_forces)
            structures.append(replace(labelled, weights=own, hessian=products))
        if len({s.hessian.directions.shape[1] for s in structures if s.hessian is not None}) > 1:
            raise InputError(
                f"{name} has frames with different numbers of Hessian products; label them in one run."
            )
        return cls(tuple(structures), spec.species)

    @property
    def num_atoms(self) -> int:
        """Atoms of all structures."""
        return sum(s.num_atoms for s in self.structures)

    @property
    def num_edges(self) -> int:
        """Edges of all structures."""
        return sum(len(s.graph.centers) for s in self.structures)

    def batches(
        self, max_atoms: int, max_edges: int, seed: Sequence[int] | None = None
    ) -> list[NDArray[np.int64]]:
        """Group the structures into batches of bounded size; each has at least one structure.

        Parameters
        ----------
        max_atoms, max_edges
            A batch has no more, unless a single structure has.
        seed
            Shuffle the structures with this seed, and draw those of an epoch; None takes all in order.
        """
        order = np.arange(len(self.structures))
        if seed is not None:
            drawn = order if self.draw is None else self.draw.epoch(seed)
            order = np.random.default_rng(seed).permutation(drawn)
        starts, atoms, edges = [0], 0, 0
        for position, k in enumerate(order):
            graph = self.structures[k].graph
            atoms, edges = atoms + len(graph.species), edges + len(graph.centers)
            if position > starts[-1] and (atoms > max_atoms or edges > max_edges):
                starts.append(position)
                atoms, edges = len(graph.species), len(graph.centers)
        return [order[a:b] for a, b in pairwise([*starts, len(order)])]

    def batch(self, indices: Sequence[int] | NDArray[np.int64]) -> LabelledBatch:
        """Join some structures."""
        parts = [self.structures[k] for k in indices]
        return LabelledBatch(
            collate([p.graph for p in parts]),
            torch.cat([p.energies for p in parts]),
            torch.cat([p.forces for p in parts]),
            torch.cat([p.stresses for p in parts]),
            torch.cat([p.with_stress + k for k, p in enumerate(parts)]),
            _with_forces(parts),
            _weights(parts),
            _joined_hessian(parts),
        )


def _with_forces(parts: Sequence[LabelledBatch]) -> Tensor | None:
    """Indices of the atoms with force labels in the joined batch."""
    if all(p.with_forces is None for p in parts):
        return None
    starts = np.cumsum([0, *(p.num_atoms for p in parts)])
    return torch.cat([p.labelled_atoms + int(a) for p, a in zip(parts, starts, strict=False)])


def _joined_hessian(parts: Sequence[LabelledBatch]) -> HessianLabels | None:
    """Hessian labels of the joined batch."""
    labels = [p.hessian for p in parts if p.hessian is not None]
    if len(labels) < len(parts):
        return None
    return HessianLabels(torch.cat([h.directions for h in labels]), torch.cat([h.products for h in labels]))


def _weights(parts: Sequence[LabelledBatch]) -> Tensor | None:
    """Weights in the joined batch."""
    if all(p.weights is None for p in parts):
        return None
    one = torch.ones(1, 3, dtype=torch.float64)
    return torch.cat([one if p.weights is None else p.weights for p in parts])


def _labelled(
    atoms: Atoms, graph: GraphBatch, dtype: torch.dtype, where: str, need_forces: bool
) -> LabelledBatch:
    """Attach the labels of one frame to its graph."""
    for key, holder in ((ENERGY, atoms.info), (FORCES, atoms.arrays)):
        if holder.get(key) is None and (need_forces or key == ENERGY):
            raise InputError(
                f"{where} has no {key}. Label the frames with the teacher ('compactmlip label'), or "
                "rename the labels of your own data."
            )
    energy = _numbers(atoms.info[ENERGY], (), f"{where}: {ENERGY}")
    with_forces = None
    if FORCES in atoms.arrays:
        forces = _numbers(atoms.arrays[FORCES], (len(atoms), 3), f"{where}: {FORCES}")
    else:
        forces, with_forces = np.zeros((0, 3)), torch.zeros(0, dtype=torch.long)
    stress = atoms.info.get(STRESS)
    if stress is None or bool(graph.volumes.isnan().any()):
        graph = replace(graph, volumes=torch.ones_like(graph.volumes))
        voigt = np.zeros((0, 6))
    else:
        if np.shape(stress) == (6,):
            voigt = _numbers(stress, (6,), f"{where}: {STRESS}")[None]
        else:
            voigt = _numbers(stress, (3, 3), f"{where}: {STRESS}")[VOIGT][None]
    return LabelledBatch(
        graph,
        torch.tensor([float(energy)], dtype=torch.float64),
        torch.as_tensor(forces, dtype=dtype),
        torch.as_tensor(voigt, dtype=dtype),
        torch.zeros(len(voigt), dtype=torch.long),
        with_forces,
    )


def _hessian(atoms: Atoms, dtype: torch.dtype, where: str) -> HessianLabels:
    """Hessian labels of one frame."""
    missing = [key for key in (DIRECTIONS, PRODUCTS) if key not in atoms.arrays]
    if missing:
        raise InputError(
            f"{where} has no {missing[0]}, which training with a weight of the Hessian needs. Label "
            "the frames with 'compactmlip label --hessian 4', or leave the weight out."
        )
    shape = np.shape(atoms.arrays[DIRECTIONS])
    if len(shape) != 2 or shape[1] == 0 or shape[1] % 3:
        raise InputError(f"{where}: {DIRECTIONS} has shape {shape}, expected ({len(atoms)}, 3 K).")
    arrays = [_numbers(atoms.arrays[key], shape, f"{where}: {key}") for key in (DIRECTIONS, PRODUCTS)]
    moved, products = (torch.as_tensor(a, dtype=dtype).reshape(len(atoms), -1, 3) for a in arrays)
    return HessianLabels(moved, products)


def _numbers(value: ArrayLike, shape: tuple[int, ...], what: str) -> NDArray[np.float64]:
    try:
        array = np.asarray(value, dtype=np.float64)
    except (TypeError, ValueError) as error:
        raise InputError(f"{what} is not numeric ({error}).") from error
    if array.shape != shape:
        raise InputError(f"{what} has shape {array.shape}, expected {shape}.")
    if not np.isfinite(array).all():
        raise InputError(f"{what} holds values that are not finite; remove the frame or label it again.")
    return array
