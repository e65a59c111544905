"""The symmetric contraction with weights that no longer change."""

from __future__ import annotations

import copy
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from compactmlip.kernels.contraction_folded import contract_folded, fold_weights
from compactmlip.kernels.contraction_source import compiled_program
from compactmlip.models.contraction import SymmetricContraction, widened


class FoldedContraction(nn.Module):
    """A symmetric contraction whose weights are folded once, for energies and forces.

    Where the library has no program for these orders and this degree (``compiled`` is false), it
    evaluates the contraction that it was made from, which folds the weights in every call.

    Parameters
    ----------
    contraction
        In float64; it is not changed.  Cast the folded one afterwards.
    """

    weights: Tensor

    def __init__(self, contraction: SymmetricContraction) -> None:
        super().__init__()
        self.width, self.orders = contraction.width, contraction.orders
        self.rows = sum(2 * L + 1 for L in contraction.outputs)
        self.program = compiled_program(contraction.orders, contraction.outputs, contraction.degree)
        self.original: SymmetricContraction | None = None
        if self.program is None or not contraction.tables:
            self.program = None
            self.original = copy.deepcopy(contraction).requires_grad_(False)
            return
        with torch.no_grad():
            self.register_buffer("weights", fold_weights(self.program, contraction.product_weights()))
        for l in self.orders:
            self.register_buffer(f"input_{l}", getattr(contraction, f"input_{l}"), persistent=False)

    @property
    def compiled(self) -> bool:
        """Whether there is a compiled program for this contraction."""
        return self.program is not None

    def forward(self, x: Tensor | Sequence[Tensor | None], species: Tensor) -> Tensor:
        """Contract features.

        Parameters
        ----------
        x
            One tensor per order (N, 2l+1, channels of that order), or all orders side by side in all
            channels (N, components, width).
        species
            (N,) int64.

        Returns
        -------
        Tensor
            (N, rows, width): outputs (L, M) side by side, zero in channels that an output does not have.
        """
        if self.original is not None:
            return self._original(x, species)
        assert self.program is not None
        parts = [x] if isinstance(x, Tensor) else [self._widened(x, l) for l in self.orders]
        return contract_folded(parts, self.weights, species, self.program)

    def _widened(self, x: Sequence[Tensor | None], l: int) -> Tensor:
        return widened(x[l], getattr(self, f"input_{l}"), self.width)

    def _original(self, x: Tensor | Sequence[Tensor | None], species: Tensor) -> Tensor:
        contraction = self.original
        assert contraction is not None
        if isinstance(x, Tensor):
            split: list[Tensor | None] = [None] * (max(self.orders) + 1)
            for l, part in zip(self.orders, x.split([2 * l + 1 for l in self.orders], dim=1), strict=True):
                index = getattr(contraction, f"input_{l}")
                split[l] = part if index is None else part.index_select(2, index)
            x = split
        values = contraction(x, species)
        first = next(part for part in x if part is not None)
        rows = []
        for L in contraction.outputs:
            index, value = getattr(contraction, f"output_{L}"), values[L]
            zeros = first.new_zeros((first.shape[0], 2 * L + 1, self.width))
            if value is not None:
                zeros = value if index is None else zeros.index_copy(2, index, value)
            rows.append(zeros)
        return torch.cat(rows, dim=1)
