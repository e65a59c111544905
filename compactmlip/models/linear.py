"""Dense layers.  Every weight W has a frozen factor s next to it; the layer computes x @ (s W).

The factors are upstream's normalisation constants, stored instead of recomputed, so that cutting
channels changes no remaining number and optimisers see the same parametrisation as upstream.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import pairwise

import torch
from torch import Tensor, nn
from torch.nn import functional

SILU_GAIN = 1.679176792398942
"""1 / sqrt(E[silu(z)^2]) for standard normal z: keeps unit second moment (normalize2mom)."""


Tap = Callable[[str, int, Tensor], Tensor]
"""Called as ``tap(space, order, x)`` on a feature; returns it, possibly changed."""


def apply_tap(tap: Tap | None, space: str, order: int, x: Tensor) -> Tensor:
    """Hand a feature (channels last) to the tap, if there is one."""
    return x if tap is None else tap(space, order, x)


def tap_all(tap: Tap | None, space: str, x: Sequence[Tensor | None]) -> list[Tensor | None]:
    """Hand the features of every order to the tap."""
    return [None if f is None else apply_tap(tap, space, l, f) for l, f in enumerate(x)]


def add_features(
    a: Sequence[Tensor | None], b: Sequence[Tensor | None], num_orders: int
) -> list[Tensor | None]:
    """Sum per order 0 ... num_orders - 1; what one of them lacks comes from the other."""
    total: list[Tensor | None] = []
    for l in range(num_orders):
        x, y = (f[l] if l < len(f) else None for f in (a, b))
        total.append(x if y is None else y if x is None else x + y)
    return total


def normalised_silu(x: Tensor) -> Tensor:
    """SiLU with unit second moment under a standard normal input."""
    return functional.silu(x) * SILU_GAIN


def multiply(x: Tensor, weight: Tensor, precision: str | None) -> Tensor:
    """Return ``x @ weight``: every product of features with a dense weight goes through here.

    With precision "bf16" both operands are rounded to bfloat16; products are summed in, and the result
    has, the precision of ``x``.  With "float64" operands and result are float64.  None changes nothing.
    """
    x, weight = operands(x, weight, precision)
    return x @ weight


def operands(x: Tensor, weight: Tensor, precision: str | None) -> tuple[Tensor, Tensor]:
    """Factors of a dense product as :func:`multiply` has them."""
    if precision == "bf16":
        return x.to(torch.bfloat16).to(x.dtype), weight.to(torch.bfloat16).to(x.dtype)
    if precision == "float64":
        return x.to(torch.float64), weight.to(torch.float64)
    return x, weight


class Weight(nn.Module):
    """A weight; ``precision`` is that of products with it, see :func:`multiply`."""

    precision: str | None = None

    def product(self, x: Tensor) -> Tensor:
        """Return ``x`` (..., in) times a weight (in, out)."""
        return multiply(x, self(), self.precision)


class ScaledWeight(Weight):
    """A weight of any shape with its frozen factor."""

    scale: Tensor

    def __init__(self, *shape: int, scale: float = 1.0) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(*shape, dtype=torch.float64))
        self.register_buffer("scale", torch.tensor(scale, dtype=torch.float64))

    def forward(self) -> Tensor:
        """Return the factor times the weight."""
        return self.weight * self.scale


class ConstantWeight(Weight):
    """A weight that is its product with its frozen factor, and not trained."""

    value: Tensor

    def __init__(self, value: Tensor) -> None:
        super().__init__()
        self.register_buffer("value", value)

    def forward(self) -> Tensor:
        """Return the weight."""
        return self.value


class EquivariantLinear(nn.Module):
    """Linear map within each order l: ``y[l] = x[l] @ W[l]``, optional bias on l = 0.

    Features are lists indexed by l of tensors (n_nodes, 2l+1, channels) or None where an order has no
    channels.  With ``num_species`` each species has its own weights, shape (species, in, out); with
    ``static_shapes`` no operation then has a shape that depends on how often a species occurs, which a
    compiler may need.
    """

    static_shapes = False

    def __init__(
        self,
        channels_in: Sequence[int],
        channels_out: Sequence[int],
        *,
        bias: bool = False,
        num_species: int | None = None,
    ) -> None:
        super().__init__()
        species = () if num_species is None else (num_species,)
        self.per_species = num_species is not None
        self.orders = nn.ModuleDict(
            {
                str(l): ScaledWeight(*species, c_in, c_out, scale=c_in**-0.5)
                for l, (c_in, c_out) in enumerate(zip(channels_in, channels_out, strict=False))
                if c_in and c_out
            }
        )
        has_bias = bias and channels_out[0] > 0
        self.bias = nn.Parameter(torch.zeros(channels_out[0], dtype=torch.float64)) if has_bias else None

    def forward(self, x: Sequence[Tensor | None], species: Tensor | None = None) -> list[Tensor | None]:
        """Apply the map; orders without weights come out as None.

        ``species`` (n_nodes,) is needed only by maps with weights per species.
        """
        out: list[Tensor | None] = []
        for l, features in enumerate(x):
            key = str(l)
            if key not in self.orders or features is None:
                out.append(None)
                continue
            block = self.orders[key]
            assert isinstance(block, Weight)
            if not self.per_species:
                out.append(block.product(features))
                continue
            if species is None:
                raise ValueError("weights per species need the species index of each node")
            apply = _per_species_static if self.static_shapes else _per_species
            out.append(apply(features, block(), species, block.precision))
        if self.bias is not None:
            if out[0] is None:
                raise ValueError("a bias needs scalar input channels")
            out[0] = out[0] + self.bias
        return out


def _per_species(features: Tensor, weight: Tensor, species: Tensor, precision: str | None) -> Tensor:
    """Multiply each node by its species' matrix, one matmul per species."""
    dtype = torch.float64 if precision == "float64" else features.dtype
    out = features.new_zeros((features.shape[0], features.shape[1], weight.shape[-1]), dtype=dtype)
    everything = range(weight.shape[0])
    for s in everything if torch.jit.is_tracing() else torch.unique(species).tolist():
        chosen = torch.nonzero(species == s).squeeze(-1)
        part = multiply(features.index_select(0, chosen), weight[s], precision)
        out = out.index_add(0, chosen, part)
    return out


MANY_SPECIES = 16
"""From here on it is faster to gather a matrix for each node than to multiply all nodes by every matrix."""


def _per_species_static(features: Tensor, weight: Tensor, species: Tensor, precision: str | None) -> Tensor:
    """:func:`_per_species` with operations on all nodes only; it does more work."""
    everything = range(weight.shape[0])  # traced, the size would be a tensor
    if len(everything) >= MANY_SPECIES:
        return multiply(features, weight.index_select(0, species), precision)
    mine = [(species == s).to(features.dtype)[:, None, None] for s in everything]
    out = multiply(features * mine[0], weight[0], precision)
    for s in everything[1:]:
        out = out + multiply(features * mine[s], weight[s], precision)
    return out


class RadialMLP(nn.Module):
    """Network from radial basis values to path weights: SiLU between bias-free layers."""

    def __init__(self, sizes: Sequence[int]) -> None:
        super().__init__()
        self.layers = nn.ModuleList(
            ScaledWeight(n_in, n_out, scale=n_in**-0.5) for n_in, n_out in pairwise(sizes)
        )

    def forward(self, basis: Tensor, tap: Tap | None = None, space: str = "") -> Tensor:
        """Return (E, sizes[-1]); ``tap`` may watch or change the hidden units."""
        return self._last().product(self._hidden(basis, tap, space))

    def pieces(
        self, basis: Tensor, sizes: Sequence[int], tap: Tap | None = None, space: str = ""
    ) -> list[Tensor]:
        """Output in groups of columns, each a tensor of its own.

        The weights are split, not the output: the gradient of that is small, with no size of the edges.
        """
        hidden, last = self._hidden(basis, tap, space), self._last()
        return [multiply(hidden, w, last.precision) for w in last().split(list(sizes), dim=1)]

    def _last(self) -> Weight:
        last = self.layers[-1]
        assert isinstance(last, Weight)
        return last

    def _hidden(self, basis: Tensor, tap: Tap | None, space: str) -> Tensor:
        x = basis
        for k, layer in enumerate(self.layers):
            assert isinstance(layer, Weight)
            if k < len(self.layers) - 1:
                x = apply_tap(tap, f"{space}.{k}", 0, normalised_silu(layer.product(x)))
        return x


class NormedMLP(nn.Module):
    """Network of biased linear layers with layer normalisation and plain SiLU between them.

    ``precision`` is that of the products; see :func:`multiply`.
    """

    precision: str | None = None

    def __init__(self, sizes: Sequence[int]) -> None:
        super().__init__()
        self.layers = nn.ModuleList(
            nn.Linear(n_in, n_out, dtype=torch.float64) for n_in, n_out in pairwise(sizes)
        )
        self.norms = nn.ModuleList(nn.LayerNorm(n, dtype=torch.float64) for n in sizes[1:-1])

    def forward(self, x: Tensor, tap: Tap | None = None, space: str = "") -> Tensor:
        """Return (E, sizes[-1]); hidden units are normalised together, so none can be cut alone."""
        for layer, norm in zip(self.layers, self.norms, strict=False):
            x = functional.silu(norm(self._linear(x, layer)))
        return self._linear(x, self.layers[-1])

    def pieces(
        self, x: Tensor, sizes: Sequence[int], tap: Tap | None = None, space: str = ""
    ) -> list[Tensor]:
        """Output in groups of columns."""
        return list(self(x, tap, space).split(list(sizes), dim=1))

    def _linear(self, x: Tensor, layer: nn.Module) -> Tensor:
        if self.precision is None:
            result: Tensor = layer(x)
            return result
        assert isinstance(layer, nn.Linear)
        return multiply(x, layer.weight.mT, self.precision).to(x.dtype) + layer.bias
