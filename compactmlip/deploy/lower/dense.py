"""Constant linear maps of lowered models: weights include all frozen factors."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from compactmlip.models.linear import EquivariantLinear, multiply, operands


class Dense(nn.Module):
    """``x @ weight + bias`` over the last axis.

    Parameters
    ----------
    weight
        (in, out).
    bias
        (out,) or None.
    """

    weight: Tensor
    bias: Tensor | None
    precision: str | None = None

    def __init__(self, weight: Tensor, bias: Tensor | None = None) -> None:
        super().__init__()
        self.register_buffer("weight", weight.detach().clone())
        self.register_buffer("bias", None if bias is None else bias.detach().clone())

    def forward(self, x: Tensor) -> Tensor:
        """Apply the map."""
        out = multiply(x, self.weight, self.precision)
        return out if self.bias is None else out + self.bias


class SpeciesDense(nn.Module):
    """``x[i] @ weight[species[i]]`` over the last axis; weight (species, in, out)."""

    weight: Tensor
    precision: str | None = None

    def __init__(self, weight: Tensor) -> None:
        super().__init__()
        self.register_buffer("weight", weight.detach().clone())

    def forward(self, x: Tensor, species: Tensor) -> Tensor:
        """Apply the map to (n_nodes, components, in)."""
        x, weight = operands(x, self.weight, self.precision)
        out: Tensor = torch.ops.compactmlip.species_linear(x, weight, species)
        return out


class PerOrder(nn.Module):
    """One map per order l; orders without a map come out as None.

    Parameters
    ----------
    maps
        l -> map.
    """

    def __init__(self, maps: Mapping[int, nn.Module]) -> None:
        super().__init__()
        self.orders = nn.ModuleDict({str(l): m for l, m in maps.items()})
        self.per_species = any(isinstance(m, SpeciesDense) for m in maps.values())

    def forward(self, x: Sequence[Tensor | None], species: Tensor) -> list[Tensor | None]:
        """Apply the maps to features per order, (n_nodes, 2l+1, in)."""
        out: list[Tensor | None] = []
        for l, features in enumerate(x):
            key = str(l)
            if features is None or key not in self.orders:
                out.append(None)
            elif self.per_species:
                out.append(self.orders[key](features, species))
            else:
                out.append(self.orders[key](features))
        return out


def weights_of(linear: EquivariantLinear) -> dict[int, Tensor]:
    """Weights with their factors by order: (in, out), or (species, in, out)."""
    return {int(l): weight().detach() for l, weight in linear.orders.items()}


def constant(linear: EquivariantLinear) -> PerOrder:
    """Return the map with constant weights."""
    kind = SpeciesDense if linear.per_species else Dense
    maps: dict[int, nn.Module] = {l: kind(w) for l, w in weights_of(linear).items()}
    if linear.bias is not None:
        maps[0] = Dense(weights_of(linear)[0], linear.bias)
    return PerOrder(maps)


class SpeciesRows(nn.Module):
    """Features that depend on the species of the atom only: rows (species, channels) of scalars."""

    rows: Tensor

    def __init__(self, rows: Tensor) -> None:
        super().__init__()
        self.register_buffer("rows", rows.detach().clone())

    def forward(self, species: Tensor) -> Tensor:
        """Return (n_nodes, 1, channels)."""
        return self.rows.index_select(0, species).unsqueeze(1)
