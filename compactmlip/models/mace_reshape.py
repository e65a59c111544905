"""Changes of a MACE model's shape that are not cuts of channels: depth and radial basis."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor, nn

from compactmlip.errors import InputError
from compactmlip.models.linear import SILU_GAIN
from compactmlip.models.mace import MACE
from compactmlip.models.mace_architecture import MACEArchitecture, MACEReadout
from compactmlip.models.reshape import BasisStart
from compactmlip.spec import ModelSpec


def shallower(model: nn.Module, num_layers: int) -> tuple[ModelSpec, dict[str, Tensor]]:
    """Spec and state dict of the first layers; the caller cuts the orders that are no longer read."""
    assert isinstance(model, MACE)
    arch, last = model.arch, num_layers - 1
    if arch.layers[last].readout is None:
        raise InputError(
            f"layer {last} of this model has no readout of its own, so nothing can be read when the "
            "layers behind it go; only models that read every layer can be made shallower."
        )
    state = {
        name: tensor.detach().clone()
        for name, tensor in model.state_dict().items()
        if not (name.startswith("layers.") and int(name.split(".")[1]) > last)
    }
    architecture = arch.model_copy(update={"layers": arch.layers[:num_layers]}).model_dump(mode="json")
    changed = {"architecture": architecture, "num_message_passing_layers": num_layers}
    return ModelSpec.model_validate({**model.spec.model_dump(), **changed}), state


def has_linear_readout(model: nn.Module) -> bool:
    """Whether the last layer's readout is linear."""
    assert isinstance(model, MACE)
    shape = model.arch.layers[-1].readout
    return shape is not None and shape.kind == "linear"


def nonlinear_readout(
    model: nn.Module, original: nn.Module, hidden: int
) -> tuple[ModelSpec, dict[str, Tensor]]:
    """Spec and state dict with the last layer's linear readout replaced by a nonlinear one.

    It starts as the same function: for SiLU, ``silu(a) - silu(-a) = a``.  The other hidden units are those of
    the readout of ``original``'s last layer, where they fit, and do not reach the energy yet.
    """
    assert isinstance(model, MACE) and isinstance(original, MACE)
    t = len(model.layers) - 1
    prefix, state = f"layers.{t}.readout", dict(model.state_dict())
    linear = (state[f"{prefix}.maps.0.weight"].double() * state[f"{prefix}.maps.0.scale"].double()).squeeze(1)
    dtype, channels = state[f"{prefix}.maps.0.weight"].dtype, len(linear)
    first = torch.zeros(channels, hidden, dtype=torch.float64)
    old, before = f"layers.{len(original.layers) - 1}.readout.maps.0", original.state_dict()
    inherited = before[f"{old}.weight"].double() * before[f"{old}.scale"].double() * channels**0.5
    if inherited.shape[0] == channels:
        count = min(hidden, inherited.shape[1])
        first[:, :count] = inherited[:, :count]
    first[:, 0], first[:, 1] = linear * channels**0.5, -linear * channels**0.5
    second = torch.zeros(hidden, 1, dtype=torch.float64)
    second[0], second[1] = hidden**0.5 / SILU_GAIN, -(hidden**0.5) / SILU_GAIN
    state |= {
        f"{prefix}.maps.0.weight": first.to(dtype),
        f"{prefix}.maps.0.scale": torch.tensor(channels**-0.5, dtype=torch.float64),
        f"{prefix}.maps.1.weight": second.to(dtype),
        f"{prefix}.maps.1.scale": torch.tensor(hidden**-0.5, dtype=torch.float64),
    }
    shape = MACEReadout(kind="nonlinear", hidden=(hidden,))
    layers = (*model.arch.layers[:t], model.arch.layers[t].model_copy(update={"readout": shape}))
    architecture = model.arch.model_copy(update={"layers": layers}).model_dump(mode="json")
    return ModelSpec.model_validate({**model.spec.model_dump(), "architecture": architecture}), state


def check_basis(model: nn.Module, num_basis: int, start: BasisStart) -> None:
    """Refuse what :func:`with_basis` cannot do."""
    assert isinstance(model, MACE)
    arch = model.arch
    if start == "inherited" and arch.basis == "gaussian":
        raise InputError(
            "Gaussians move when their number changes: nothing can be inherited; start at random."
        )
    if start == "inherited" and num_basis < arch.num_basis:
        raise InputError(
            f"the model has {arch.num_basis} radial functions; only a larger number inherits all of them."
        )


def with_basis(
    model: nn.Module, num_basis: int, start: BasisStart, seed: int
) -> tuple[ModelSpec, dict[str, Tensor]]:
    """Spec and state dict with another number of radial basis functions (Structural Pruning, D.3)."""
    assert isinstance(model, MACE)
    arch = model.arch
    smaller = arch.model_copy(update={"num_basis": num_basis})
    spec = model.spec.model_copy(update={"architecture": smaller.model_dump(mode="json")})
    rng = np.random.default_rng(seed)
    state = {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}
    reference = MACE(spec).state_dict()
    if "radial.functions.points" in state:
        state["radial.functions.points"] = reference["radial.functions.points"].to(
            state["radial.functions.points"].dtype
        )
        if start == "inherited":
            state["radial.functions.points"][: arch.num_basis] = model.state_dict()["radial.functions.points"]
    for name in _readers(arch, state):
        state |= _resized(name, state, arch.num_basis, num_basis, start, rng)
    return ModelSpec.model_validate(spec.model_dump()), state


def _readers(arch: MACEArchitecture, state: dict[str, Tensor]) -> list[str]:
    """First layers of the networks that read the basis."""
    networks = ("convolution.radial", "density", "density_network")
    names = [f"layers.{t}.interaction.{n}.layers.0" for t in range(len(arch.layers)) for n in networks]
    return [name for name in names if f"{name}.weight" in state]


def _resized(
    name: str,
    state: dict[str, Tensor],
    old: int,
    new: int,
    start: BasisStart,
    rng: np.random.Generator,
) -> dict[str, Tensor]:
    """Rows for the new basis functions; transposed in biased networks, which have no frozen factor."""
    weight = state[f"{name}.weight"]
    transposed = f"{name}.scale" not in state
    rows = weight.T if transposed else weight
    others = rows[old:]
    if start == "inherited":
        ours = torch.cat([rows[:old], rows.new_zeros(new - old, rows.shape[1])])
        changed: dict[str, Tensor] = {}
    else:
        fan_in = new + len(others)
        drawn = torch.tensor(rng.normal(size=(new, rows.shape[1])))
        ours = (drawn * (fan_in**-0.5 if transposed else 1.0)).to(rows)
        # The factor also multiplies the rows that stay, which are none unless species are embedded here.
        changed = {} if transposed else {f"{name}.scale": torch.tensor(fan_in**-0.5, dtype=torch.float64)}
    joined = torch.cat([ours, others])
    return {**changed, f"{name}.weight": (joined.T if transposed else joined).contiguous()}
