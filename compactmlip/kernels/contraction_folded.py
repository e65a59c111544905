"""Symmetric contraction with constant weights, for evaluation, and the same in plain PyTorch."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional

from compactmlip.kernels.build import usable
from compactmlip.kernels.contraction_program import ContractionProgram, Input

BLOCK = 16
"""Channels whose weights are neighbours in memory (``kBlock`` in ``contraction_folded.cpp``)."""


def fold_weights(program: ContractionProgram, weights: Tensor) -> Tensor:
    """Weights of a program from those of the independent products.

    Parameters
    ----------
    weights
        (species, products, channels), products by output order, then degree.  Fold in float64 and
        round the result: it has sums of weights.

    Returns
    -------
    Tensor
        (species, blocks, trees, ``BLOCK``), zero where the last block has more channels than there are.
    """
    mixing = torch.tensor(program.mixing, dtype=weights.dtype, device=weights.device)
    folded = torch.einsum("rk,src->skc", mixing, weights)
    blocks = -(-weights.shape[2] // BLOCK)
    padded = functional.pad(folded, (0, blocks * BLOCK - weights.shape[2]))
    return padded.unflatten(2, (blocks, BLOCK)).transpose(1, 2).contiguous()


def contract_folded(
    x: Sequence[Tensor], weights: Tensor, species: Tensor, program: ContractionProgram
) -> Tensor:
    """Contract features with constant weights.

    Parameters
    ----------
    x
        One tensor (N, components, channels), or one per order side by side; channels must be
        neighbours in memory, or they are copied.
    weights
        What :func:`fold_weights` returns.  One set of weights belongs to all species.
    species
        (N,) int64.

    Returns
    -------
    Tensor
        (N, rows, channels), rows (L, M).  The compiled operator can be differentiated once, with respect
        to x.  Each atom's bits depend on nothing else than its own features and species.

    Raises
    ------
    RuntimeError
        If shapes or dtypes do not fit, weights require a gradient, or a second derivative is asked for.
    IndexError
        If an atom has a species without weights.
    """
    if usable(*x, weights):
        out: Tensor = torch.ops.compactmlip.contract_folded(
            list(x), weights, species, program.identity, program.rows
        )
        return out
    return contract_folded_reference(x, weights, species, program)


def contract_folded_reference(
    x: Sequence[Tensor], weights: Tensor, species: Tensor, program: ContractionProgram
) -> Tensor:
    """:func:`contract_folded` in plain PyTorch, on any device, one operation per term of the program."""
    rows = torch.cat(list(x), dim=1).unbind(1)
    chosen = weights.expand(1, *weights.shape[1:]) if weights.shape[0] == 1 else weights[species]
    # (N or 1, trees, channels)
    factors = chosen.transpose(1, 2).flatten(2)[..., : rows[0].shape[-1]].unbind(1)
    values: list[Tensor] = []
    for node in program.forward.nodes:
        if isinstance(node, Input):
            values.append(rows[node.row])
            continue
        total: Tensor | None = None
        for kind, factor, k in node:
            if kind == "constant":
                term = values[k] * factor
            else:
                term = values[k] * (factors if kind == "weight" else values)[int(factor)]
            total = term if total is None else total + term
        assert total is not None
        values.append(total)
    return torch.stack([values[k] for k in program.forward.outputs], dim=1)
