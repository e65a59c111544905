"""Small random native MACE models: one per combination of options that the family has."""

from __future__ import annotations

from typing import Any

import contract
import torch
from ase.build import bulk, molecule
from ase.data import atomic_numbers
from torch import nn

from compactmlip.models import build
from compactmlip.models.mace_architecture import MACEArchitecture, MACELayer, MACEReadout, upstream_layer
from compactmlip.models.radial import AgnesiTransform, PolynomialEnvelope, SoftTransform
from compactmlip.models.repulsion import ZBLOptions
from compactmlip.spec import ModelSpec, Provenance

SPECIES = ("H", "C", "O", "Mg", "Si")
CUTOFF = 4.0
LINEAR = MACEReadout(kind="linear")
NONLINEAR = MACEReadout(kind="nonlinear", hidden=(5,))
BIASED = MACEReadout(kind="biased", hidden=(5, 4))

_AGNESI = {"transform": AgnesiTransform()}
VARIANTS: dict[str, dict[str, Any]] = {
    "residual": {},
    "agnostic first": {"blocks": "agnostic", **_AGNESI},
    "density": {"blocks": "density", "transform": SoftTransform(), "repulsion": ZBLOptions()},
    "nonlinear": {"blocks": "nonlinear", "envelope_on_basis": False, "contraction_per_species": False},
    "independent products": {"contraction": "independent", "correlation": 2, "basis": "gaussian"},
    "three layers, four factors": {"correlation": 4, "lmax_edge": 2, "hidden": (6, 4), "num_layers": 3},
    "one layer, one factor": {"num_layers": 1, "correlation": 1, "basis": "chebyshev", **_AGNESI},
    "last readout, all orders": {"last_only": True, "keep_orders": True, "correlation": 2},
    "scalars": {"hidden": (6,), "repulsion": ZBLOptions(), **_AGNESI},
}
"""Arguments of :func:`make_spec`."""


def _layer_options(blocks: str, t: int, channels_in: tuple[int, ...]) -> dict[str, Any]:
    """What upstream's interaction blocks are in native terms."""
    if blocks == "residual":
        return {}
    if blocks == "nonlinear":
        return {"interaction": "nonlinear", "skip": "linear", "up": tuple(4 for _ in channels_in)}
    kind = "density" if blocks == "density" else "plain"
    return {"interaction": kind, "species_map": t == 0, "skip": "none" if t == 0 else "species"}


def make_spec(
    *,
    blocks: str = "residual",
    hidden: tuple[int, ...] = (6, 5, 4),
    width: int = 6,
    num_layers: int = 2,
    lmax_edge: int = 3,
    correlation: int = 3,
    last_only: bool = False,
    keep_orders: bool = False,
    **architecture: Any,
) -> ModelSpec:
    """Spec of a model whose hidden features have different channel counts per order."""
    layers: list[MACELayer] = []
    into: tuple[int, ...] = (6,)
    for t in range(num_layers):
        last = t == num_layers - 1
        final = BIASED if blocks == "nonlinear" else NONLINEAR
        out = hidden[:1] if last and not keep_orders else hidden
        layer = upstream_layer(
            into,
            width=width,
            out=out,
            lmax_edge=lmax_edge,
            correlation=correlation,
            radial_hidden=(7, 9),
            readout=final if last else None if last_only else LINEAR,
            **_layer_options(blocks, t, into),
        )
        layers.append(layer)
        into = out
    shape = MACEArchitecture(
        embedding=6,
        num_basis=5,
        envelope=PolynomialEnvelope(p=5),
        lmax_edge=lmax_edge,
        layers=tuple(layers),
        **architecture,
    )
    return ModelSpec(
        family="mace",
        species=SPECIES,
        cutoff=CUTOFF,
        dtype="float64",
        num_message_passing_layers=num_layers,
        architecture=shape.model_dump(mode="json"),
        provenance=Provenance(name="small random model", source="tests", licence="MIT"),
    )


def make_model(spec: ModelSpec, seed: int = 0) -> nn.Module:
    """Float64 model with seeded parameters, none of them zero; forces are about 1 eV/A."""
    generator = torch.Generator().manual_seed(seed)
    with torch.random.fork_rng(devices=[]):
        model = build(spec)

    def normal(t: torch.Tensor) -> torch.Tensor:
        return torch.randn(t.shape, generator=generator, dtype=torch.float64)

    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith((".alpha", ".beta")):  # the divisor of messages stays positive
                parameter.fill_(3.0 if name.endswith("alpha") else 0.5)
            elif ".norms." in name and name.endswith("weight"):
                parameter.copy_(1 + 0.3 * normal(parameter))
            else:
                parameter.copy_(normal(parameter) * (0.3 if "bias" in name else 1.0))
        charges = [float(atomic_numbers[s]) for s in spec.species]
        for name, buffer in model.named_buffers():
            if name.endswith("normalisation"):
                buffer.fill_(0.3)
            elif name.endswith("radii"):
                buffer.copy_(torch.rand(buffer.shape, generator=generator, dtype=torch.float64) * 0.5 + 0.9)
            elif name.endswith("charges"):
                buffer.copy_(torch.tensor(charges))
        crystal, ethanol = bulk("MgO", "rocksalt", a=4.21, cubic=True), molecule("CH3CH2OH")
        crystal.rattle(0.08, seed=1)
        forces = [contract.evaluate(model, atoms).forces for atoms in (crystal, ethanol)]
        largest = max(float(f.abs().max()) for f in forces) / 2
        scale, shift = model.get_buffer("energy_scale"), model.get_buffer("energy_shift")
        scale.copy_((1 + 0.1 * normal(scale)) / largest)
        shift.copy_(-4.0 + normal(shift))
    return model
