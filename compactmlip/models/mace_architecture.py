"""Shape of a MACE model: everything that the parameters alone do not tell."""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

from compactmlip.channels import Channels
from compactmlip.models.contraction import Parametrisation
from compactmlip.models.convolution import Path
from compactmlip.models.radial import BasisKind, Envelope, Transform
from compactmlip.models.repulsion import ZBLOptions

Positions = dict[int, tuple[int, ...]]
"""Order -> which of the contraction's channels it has; an order that is not listed has all of them."""

_CONFIG = ConfigDict(frozen=True, extra="forbid")


class MACEReadout(BaseModel):
    """Energy readout of one layer's scalars.

    ``linear``: one matrix; ``nonlinear``: hidden units with SiLU; ``biased``: two hidden layers, the second
    and the output with biases.
    """

    model_config = _CONFIG
    kind: Literal["linear", "nonlinear", "biased"]
    hidden: tuple[int, ...] = ()

    @model_validator(mode="after")
    def _consistent(self) -> MACEReadout:
        if len(self.hidden) != {"linear": 0, "nonlinear": 1, "biased": 2}[self.kind]:
            raise ValueError(f"a {self.kind} readout cannot have hidden layers {self.hidden}")
        return self


class MACELayer(BaseModel):
    """Shape of one layer: interaction (two-body messages), contraction (many-body), readout."""

    model_config = _CONFIG
    interaction: Literal["plain", "density", "nonlinear"]
    species_map: bool = Field(description="map the messages by a matrix per species")
    skip: Literal["none", "species", "linear"]
    up: Channels = Field(description="channels per order of the neighbours' features")
    paths: tuple[Path, ...]
    radial_hidden: tuple[int, ...]
    density_hidden: tuple[int, ...] = ()
    pair_embedding: tuple[int, int] | None = Field(
        default=None, description="sizes of the neighbour's and the centre's species embedding"
    )
    inner: Channels = Field(default=(), description="channels before the species map, or after the gate")
    width: int = Field(ge=1, description="channels of the contraction")
    atomic: Channels = Field(description="channels per order that enter the contraction")
    atomic_positions: Positions = Field(default_factory=dict)
    product: Channels = Field(description="channels per order that leave the contraction")
    product_positions: Positions = Field(default_factory=dict)
    correlation: int = Field(ge=1, le=4)
    out: Channels = Field(description="channels per order of the layer's output")
    readout: MACEReadout | None = None

    @property
    def has_inner(self) -> bool:
        """Whether there are channels between the convolution's linear map and the contraction's input."""
        return self.species_map or self.interaction == "nonlinear"

    @property
    def down(self) -> Channels:
        """Channels per order that leave the linear map after the convolution (without gates)."""
        return self.inner if self.has_inner else self.atomic

    @model_validator(mode="after")
    def _consistent(self) -> MACELayer:
        if not self.out or not self.out[0]:
            raise ValueError("a layer needs scalar channels")
        for l1, l2, l3 in self.paths:
            gates = self.interaction == "nonlinear" and l3 == 0 and any(self.down)
            made = gates or (l3 < len(self.down) and self.down[l3])
            alive = l1 < len(self.up) and self.up[l1] and made
            if not alive or not abs(l1 - l2) <= l3 <= l1 + l2:
                raise ValueError(f"path {(l1, l2, l3)} couples orders that are not there")
        for channels, positions in (
            (self.atomic, self.atomic_positions),
            (self.product, self.product_positions),
        ):
            for l, size in enumerate(channels):
                count = len(positions[l]) if l in positions else self.width
                if size and size != count:
                    raise ValueError(f"order {l} has {size} channels, but {count} places in the contraction")
        return self


def upstream_layer(
    channels_in: Channels,
    *,
    width: int,
    out: Channels,
    lmax_edge: int,
    correlation: int,
    radial_hidden: tuple[int, ...] = (64, 64, 64),
    up: Channels | None = None,
    interaction: Literal["plain", "density", "nonlinear"] = "plain",
    species_map: bool = False,
    skip: Literal["none", "species", "linear"] = "species",
    readout: MACEReadout | None = None,
) -> MACELayer:
    """Layer of the shape that upstream builds: every order 0 ... lmax_edge enters the contraction.

    Parameters
    ----------
    channels_in, out
        Channels per order before and after the layer.
    width
        Channels of the contraction, the same for all orders.
    up
        Channels per order that neighbours send; as many as enter by default.
    """
    sent = channels_in if up is None else up
    paths = tuple(
        (l1, l2, l3)
        for l1, size in enumerate(sent)
        for l2 in range(lmax_edge + 1)
        for l3 in range(abs(l1 - l2), min(l1 + l2, lmax_edge) + 1)
        if size and (l1 + l2 + l3) % 2 == 0
    )
    atomic = (width,) * (lmax_edge + 1)
    nonlinear = interaction == "nonlinear"
    return MACELayer(
        interaction=interaction,
        species_map=species_map,
        skip=skip,
        up=sent,
        paths=paths,
        radial_hidden=radial_hidden,
        density_hidden=(64,) if nonlinear else (),
        pair_embedding=(channels_in[0], channels_in[0]) if nonlinear else None,
        inner=atomic if species_map or nonlinear else (),
        width=width,
        atomic=atomic,
        product=tuple(width if size else 0 for size in out),
        correlation=correlation,
        out=out,
        readout=readout,
    )


class MACEArchitecture(BaseModel):
    """Shape of the whole model."""

    model_config = _CONFIG
    embedding: int = Field(ge=1)
    basis: BasisKind = "bessel"
    num_basis: int = Field(ge=1)
    envelope: Envelope
    envelope_on_basis: bool = True
    transform: Transform | None = None
    repulsion: ZBLOptions | None = None
    lmax_edge: int = Field(ge=0)
    contraction: Parametrisation = "paths"
    contraction_per_species: bool = True
    layers: tuple[MACELayer, ...] = Field(min_length=1)

    @model_validator(mode="after")
    def _consistent(self) -> MACEArchitecture:
        if all(layer.readout is None for layer in self.layers):
            raise ValueError("no layer has a readout")
        for t, layer in enumerate(self.layers):
            if any(path[1] > self.lmax_edge for path in layer.paths):
                raise ValueError(f"layer {t}: a path needs spherical harmonics above {self.lmax_edge}")
        return self

    def channels_in(self, t: int) -> Channels:
        """Channels per order that enter layer ``t``."""
        return (self.embedding,) if t == 0 else self.layers[t - 1].out

    def skip_orders(self, t: int) -> list[int]:
        """Orders that the skip connection of layer ``t`` carries over."""
        if self.layers[t].skip == "none":
            return []
        pairs = zip(self.channels_in(t), self.layers[t].out, strict=False)
        return [l for l, (c_in, c_out) in enumerate(pairs) if c_in and c_out]
