"""Neighbour lists that outlive a time step (Verlet 1967)."""

from __future__ import annotations

import numpy as np
from ase import Atoms

from compactmlip.data.graph import EdgeArrays, check_overlap, check_structure, neighbor_list
from compactmlip.errors import InputError


class VerletList:
    """Full neighbour list that is searched again only when it could miss a pair.

    A search keeps the pairs within ``cutoff + skin`` together with the positions r0 and the cell C0.
    Later the cell is ``C = C0 F`` along the periodic directions and atom i has moved by
    ``u_i = r_i - r0_i F``.  Two atoms (or images) that are now within the cutoff were then at most
    ``(cutoff + max |u_j - u_i|) / s`` apart, where s is the smallest singular value of F.  As long as
    this is no more than ``cutoff + skin``, no pair is missing.  For a constant cell it is the usual
    rule that no atom has moved more than skin / 2; a common translation does not count.

    The vectors are computed anew from positions and cell at every call, so the result does not
    depend on the history (only the order of the edges of one centre does).

    Parameters
    ----------
    cutoff, skin
        Angstrom; a skin of zero searches at every call.

    Attributes
    ----------
    num_searches
        How often the pairs were searched.

    Raises
    ------
    InputError
        If cutoff or skin is not a usable number.
    """

    def __init__(self, cutoff: float, skin: float) -> None:
        if not (np.isfinite(skin) and skin >= 0 and np.isfinite(cutoff) and cutoff > 0):
            raise InputError(
                f"neighbour list with cutoff {cutoff} and skin {skin}: cutoff must be positive and skin zero "
                "or more (Angstrom)."
            )
        self.cutoff, self.skin = float(cutoff), float(skin)
        self.num_searches = 0
        self._reference: tuple[np.ndarray, np.ndarray, np.ndarray] | None = None
        self._pairs: EdgeArrays | None = None

    def edges(self, atoms: Atoms) -> EdgeArrays:
        """Return centers (E,), neighbors (E,) and vectors (E, 3) of all pairs closer than the cutoff.

        Edges are sorted by centre.

        Raises
        ------
        InputError
            As :func:`compactmlip.data.graph.neighbor_list`.
        """
        check_structure(atoms)
        positions, cell = atoms.positions, atoms.cell.array
        if self._pairs is None or not self._is_complete(positions, cell, atoms.pbc):
            self._search(atoms)
        assert self._pairs is not None
        centers, neighbors, shifts = self._pairs
        vectors = positions[neighbors] - positions[centers] + shifts @ cell
        near = np.einsum("ij,ij->i", vectors, vectors) < self.cutoff**2
        found = centers[near], neighbors[near], vectors[near]
        check_overlap(*found)
        return found

    def _search(self, atoms: Atoms) -> None:
        self._pairs = None
        centers, neighbors, shifts, _ = neighbor_list(atoms, self.cutoff + self.skin)
        self._pairs = centers, neighbors, shifts.astype(np.float64)
        self._reference = atoms.positions.copy(), atoms.cell.array.copy(), atoms.pbc.copy()
        self.num_searches += 1

    def _is_complete(self, positions: np.ndarray, cell: np.ndarray, pbc: np.ndarray) -> bool:
        assert self._reference is not None
        old_positions, old_cell, old_pbc = self._reference
        if positions.shape != old_positions.shape or (pbc != old_pbc).any():
            return False
        deformation = np.eye(3)
        if pbc.any():
            # The smallest deformation that maps the periodic cell vectors: directions without
            # periodicity stay as they are, whatever their cell vectors say.
            deformation += np.linalg.pinv(old_cell[pbc]) @ (cell[pbc] - old_cell[pbc])
        moved = positions - old_positions @ deformation
        moved -= moved.mean(axis=0)
        largest = 2.0 * np.sqrt(np.einsum("ij,ij->i", moved, moved).max())
        smallest_stretch = np.linalg.svd(deformation, compute_uv=False)[-1]
        return bool(self.cutoff + largest < (self.cutoff + self.skin) * smallest_stretch)
