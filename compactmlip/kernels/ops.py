"""The fused convolution, and the same in plain PyTorch: its oracle, and its stand-in without a compiler."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from compactmlip.kernels.build import usable


def convolve(
    coupling: Tensor,
    features: Tensor,
    radial: Tensor,
    centers: Tensor,
    neighbors: Tensor,
    path_of_row: Sequence[int],
    path_index: Tensor | None = None,
) -> Tensor:
    """Couple neighbours' features with edges, weight them and sum over the neighbours of each centre.

    With edges e = (i, j)::

        out[i, r, c] = sum_e  (sum_a coupling[e, r, a] features[j, a, c])  radial[e, path_of_row[r], c]

    Parameters
    ----------
    coupling
        (E, rows, A).
    features
        (N, A, C); the compiled operator takes A up to 64, which is l = 31.
    radial
        (E, paths, C).
    centers, neighbors
        (E,) int64.  Edges that are sorted by centre need no sorting here.
    path_of_row
        Path of each row; it must not decrease.
    path_index
        The same as a tensor on the device of the others; made on the spot if None.

    Returns
    -------
    Tensor
        (N, rows, C), zero where no edge arrives.  It can be differentiated any number of times with
        respect to coupling, features and radial; bits do not depend on the number of threads where the
        compiled operator is used.
    """
    if usable(coupling, features, radial):
        out: Tensor = torch.ops.compactmlip.convolve(
            coupling, features, radial, centers, neighbors, list(path_of_row)
        )
        return out
    if path_index is None:
        path_index = torch.tensor(path_of_row, dtype=torch.long, device=features.device)
    return convolve_reference(coupling, features, radial, centers, neighbors, path_index)


def convolve_reference(
    coupling: Tensor,
    features: Tensor,
    radial: Tensor,
    centers: Tensor,
    neighbors: Tensor,
    path_index: Tensor,
) -> Tensor:
    """:func:`convolve` in plain PyTorch, on any device; it stores (E, rows, C)."""
    message = torch.bmm(coupling, features.index_select(0, neighbors))
    total = features.new_zeros((features.shape[0], coupling.shape[1], features.shape[2]))
    return total.index_add(0, centers, message * radial.index_select(1, path_index))
