"""Neighbour lists, batches of structures, and energies with their derivatives.

Convention: the edge vector r_ij = r_j + shift - r_i points from centre i to neighbour j; every pair
appears in both directions; edges are sorted by centre.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, fields

import numpy as np
import torch
from ase import Atoms
from ase.cell import Cell
from matscipy.neighbours import neighbour_list
from torch import Tensor

from compactmlip.errors import InputError
from compactmlip.spec import ModelSpec

EdgeArrays = tuple[np.ndarray, np.ndarray, np.ndarray]
"""Centers (E,), neighbors (E,) and edge vectors (E, 3)."""

SHORTEST_DISTANCE = 1e-3
"""Angstrom; atoms closer than this count as lying on top of each other."""

MAX_EDGES = 1000
"""Default number of directed edges per batch.  The work is bound by memory traffic: SevenNet-l3i5 evaluates
76 atoms/s in batches of 500 edges, which fit the cache, 66 of 1000 and 44 of 8000 (one thread); the smallest
models want fewer calls."""

SMALLEST_VOLUME = 1e-6
"""Angstrom^d; a cell with less volume (area, length) spanned by its d periodic vectors is refused."""


@dataclass(frozen=True)
class GraphBatch:
    """One or several structures as one graph.

    Attributes
    ----------
    species
        (N,) model species index of each atom.
    centers, neighbors
        (E,) atom index of each edge's ends.
    vectors
        (E, 3) edge vectors in Angstrom.
    structure
        (N,) index of the structure that each atom belongs to.
    num_atoms
        (S,) atoms per structure.
    volumes
        (S,) cell volumes in Angstrom^3, NaN where there is no periodic cell.
    """

    species: Tensor
    centers: Tensor
    neighbors: Tensor
    vectors: Tensor
    structure: Tensor
    num_atoms: Tensor
    volumes: Tensor

    def to(self, device: torch.device | str | None = None, dtype: torch.dtype | None = None) -> GraphBatch:
        """Return a copy on a device, with edge vectors in the given dtype."""
        moved = {f.name: getattr(self, f.name).to(device=device) for f in fields(self)}
        moved["vectors"] = moved["vectors"].to(dtype=dtype)
        return GraphBatch(**moved)


@dataclass(frozen=True)
class Derivatives:
    """Energies and what follows from them.

    Attributes
    ----------
    energies
        (S,) eV, float64.
    node_energies
        (N,) eV, float64.
    forces
        (N, 3) eV/Angstrom.
    stresses
        (S, 3, 3) eV/Angstrom^3, tension positive; NaN where there is no periodic cell.
    """

    energies: Tensor
    node_energies: Tensor
    forces: Tensor
    stresses: Tensor


def check_structure(atoms: Atoms, where: str = "the structure") -> None:
    """Refuse structures that have no meaningful energy.

    Raises
    ------
    InputError
        If there is no atom, a position or cell entry is not finite, or a periodic cell has no volume.
    """
    if len(atoms) == 0:
        raise InputError(f"{where} has no atoms.")
    bad = np.flatnonzero(~np.isfinite(atoms.positions).all(axis=1))
    if bad.size:
        raise InputError(
            f"{where}: the position of atom {bad[0]} is not finite; check the input or time step."
        )
    cell = atoms.cell.array
    if not np.isfinite(cell).all():
        raise InputError(f"{where}: the cell has entries that are not finite.")
    periodic = cell[atoms.pbc]
    if len(periodic) and np.linalg.det(periodic @ periodic.T) < SMALLEST_VOLUME**2:
        raise InputError(
            f"{where} is periodic along {atoms.pbc.tolist()}, but its cell has no volume; "
            "set the cell or switch periodicity off."
        )


def _box(atoms: Atoms, cutoff: float) -> Atoms:
    """Copy in a box that fits the atoms along the directions that are not periodic.

    Cell vectors along these directions mean nothing; a search grid made from them would be slow.  Atoms
    outside the box are found all the same, so that a few atoms far apart need no huge grid.
    """
    free = ~atoms.pbc
    box = Cell(np.where(free[:, None], 0.0, atoms.cell.array)).complete().array
    scaled = np.linalg.solve(box.T, atoms.positions.T)[free]
    most_bins = 64 * len(atoms)
    low, extent = scaled.min(axis=1), np.minimum(np.ptp(scaled, axis=1), most_bins * cutoff)
    extent *= min(1.0, most_bins / np.prod(extent / cutoff + 1.0)) ** (1 / 3)
    positions = atoms.positions - low @ box[free]
    box[free] *= extent[:, None] + 1.0
    return Atoms(atoms.numbers, positions, cell=box, pbc=atoms.pbc)


def neighbor_list(atoms: Atoms, cutoff: float) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Full neighbour list.

    Returns
    -------
    centers, neighbors, shifts, vectors
        (E,), (E,), (E, 3) integer lattice shifts of the neighbour and (E, 3) edge vectors (Angstrom).

    Raises
    ------
    InputError
        As :func:`check_structure`, and if two atoms lie on top of each other.
    """
    check_structure(atoms)
    centers, neighbors, shifts, vectors = neighbour_list("ijSD", _box(atoms, cutoff), float(cutoff))
    check_overlap(centers, neighbors, vectors)
    order = np.argsort(centers, kind="stable")
    return centers[order], neighbors[order], shifts[order], vectors[order]


def check_overlap(centers: np.ndarray, neighbors: np.ndarray, vectors: np.ndarray) -> None:
    """Raise :class:`InputError` if an edge is too short to have a direction."""
    too_close = np.flatnonzero(np.einsum("ij,ij->i", vectors, vectors) < SHORTEST_DISTANCE**2)
    if too_close.size:
        i, j = centers[too_close[0]], neighbors[too_close[0]]
        raise InputError(
            f"atoms {i} and {j} lie on top of each other (< {SHORTEST_DISTANCE} Angstrom apart)."
        )


def build_graph(
    atoms: Atoms,
    spec: ModelSpec,
    dtype: torch.dtype = torch.float64,
    edges: EdgeArrays | None = None,
) -> GraphBatch:
    """Turn one structure into a graph for a model.

    Parameters
    ----------
    atoms
        The structure.
    spec
        Gives species and cutoff.
    dtype
        Of the edge vectors.
    edges
        Centers, neighbors and vectors (Angstrom) of all pairs within the cutoff, if they are known
        (:class:`compactmlip.data.neighbors.VerletList`); else they are searched.

    Raises
    ------
    SpeciesError, InputError
        If the model does not cover a species or the structure is unusable.
    """
    species = spec.species_index(atoms.get_chemical_symbols())
    if edges is None:
        centers, neighbors, _, vectors = neighbor_list(atoms, spec.cutoff)
    else:
        centers, neighbors, vectors = edges
    volume = atoms.cell.volume if atoms.pbc.any() and atoms.cell.rank == 3 else np.nan
    return GraphBatch(
        torch.tensor(species, dtype=torch.long),
        torch.as_tensor(centers, dtype=torch.long),
        torch.as_tensor(neighbors, dtype=torch.long),
        torch.as_tensor(vectors, dtype=dtype).reshape(-1, 3),
        torch.zeros(len(atoms), dtype=torch.long),
        torch.tensor([len(atoms)]),
        torch.tensor([volume], dtype=torch.float64),
    )


def collate(graphs: Sequence[GraphBatch]) -> GraphBatch:
    """Join graphs into one batch."""
    if not graphs:
        raise InputError("cannot make a batch of no structures.")
    atom_starts = np.cumsum([0] + [len(g.species) for g in graphs])
    structure_starts = np.cumsum([0] + [len(g.num_atoms) for g in graphs])
    shifted = zip(graphs, atom_starts, structure_starts, strict=False)
    parts = [
        (
            g.species,
            g.centers + int(a),
            g.neighbors + int(a),
            g.vectors,
            g.structure + int(s),
            g.num_atoms,
            g.volumes,
        )
        for g, a, s in shifted
    ]
    return GraphBatch(*(torch.cat(column) for column in zip(*parts, strict=True)))


def batches_by_edges(graphs: Iterable[GraphBatch], max_edges: int) -> list[list[int]]:
    """Group graph indices in order so that a batch has at most ``max_edges`` edges (or one graph)."""
    groups: list[list[int]] = []
    filled = 0
    for k, graph in enumerate(graphs):
        edges = len(graph.centers)
        if not groups or filled + edges > max_edges:
            groups.append([])
            filled = 0
        groups[-1].append(k)
        filled += edges
    return groups


def energy_and_derivatives(
    node_energy: Callable[[Tensor, Tensor, Tensor, Tensor], Tensor],
    batch: GraphBatch,
    *,
    create_graph: bool = False,
) -> Derivatives:
    """Energies, forces and stresses from the gradient with respect to the edge vectors.

    With g_e = dE/dr_e for edge e = (i, j): F_i = sum g_e over edges that leave i minus those that
    arrive; stress = (1/V) sum_e r_e (x) g_e, symmetrised.

    Parameters
    ----------
    node_energy
        ``f(species, centers, neighbors, vectors) -> (N,)`` energies in eV.
    batch
        The structures.
    create_graph
        Keep the graph so that forces and stresses can be differentiated (training).
    """
    _, node_energies, gradient = edge_gradient(node_energy, batch, create_graph=create_graph)
    return derivatives(batch, node_energies if create_graph else node_energies.detach(), gradient)


def edge_gradient(
    node_energy: Callable[[Tensor, Tensor, Tensor, Tensor], Tensor],
    batch: GraphBatch,
    *,
    create_graph: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return edge vectors (E, 3) of a new graph, energies (N,) and the derivative of their sum (E, 3).

    Arguments are those of :func:`energy_and_derivatives`.
    """
    vectors = batch.vectors.detach().requires_grad_()
    with torch.enable_grad():
        node_energies = node_energy(batch.species, batch.centers, batch.neighbors, vectors)
        total = node_energies.sum()
        (gradient,) = torch.autograd.grad(total, vectors, create_graph=create_graph)
    return vectors, node_energies, gradient


def on_atoms(batch: GraphBatch, gradient: Tensor) -> Tensor:
    """Forces (N, 3) of an energy with this derivative (E, 3) with respect to the edge vectors."""
    forces = gradient.new_zeros(len(batch.species), 3)
    return forces.index_add(0, batch.centers, gradient).index_add(0, batch.neighbors, -gradient)


def derivatives(batch: GraphBatch, node_energies: Tensor, gradient: Tensor) -> Derivatives:
    """Energies, forces and stresses of a batch.

    Parameters
    ----------
    batch
        The structures.
    node_energies
        (N,) energies in eV.
    gradient
        (E, 3) derivative of their sum with respect to the edge vectors, eV/Angstrom.
    """
    num_structures = len(batch.num_atoms)
    forces = on_atoms(batch, gradient)
    edge_virial = (batch.vectors.unsqueeze(-1) * gradient.unsqueeze(-2)).flatten(1)
    virial = gradient.new_zeros(num_structures, 9)
    virial = virial.index_add(0, batch.structure[batch.centers], edge_virial).unflatten(1, (3, 3))
    stresses = 0.5 * (virial + virial.mT) / batch.volumes.to(gradient.dtype)[:, None, None]
    energies = node_energies.new_zeros(num_structures).index_add(0, batch.structure, node_energies)
    return Derivatives(energies, node_energies, forces, stresses)
