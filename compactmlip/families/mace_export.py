"""Write native MACE models as ``.model`` files of mace-torch.

The inverse of :mod:`compactmlip.families.mace`: the upstream class is built from the shape, its state dict
is filled from ours.  Frozen factors that upstream computes from its sizes are put into the weights, since
ours keep the values of the model that was cut.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from compactmlip import checkpoint
from compactmlip.errors import SelfCheckError, UnsupportedFeatureError
from compactmlip.families import mace_contraction, mace_upstream
from compactmlip.families.mace import upstream_columns
from compactmlip.families.mace_uniform import constructor_arguments, nearest_uniform_target
from compactmlip.models import model_dtype
from compactmlip.models.linear import EquivariantLinear, NormedMLP, RadialMLP, ScaledWeight
from compactmlip.models.mace import MACE, Interaction, MACEBlock, Readout
from compactmlip.models.mace_architecture import MACELayer

__all__ = ["export_model", "nearest_uniform_target"]

TOLERANCE = 1e-9
"""Largest relative difference between the native and the exported model, both in float64."""

_LARGEST_CHECK = 16
_SPACING = 2.1


def export_model(model: nn.Module, path: Path, *, dtype: torch.dtype | None = None) -> None:
    """Write a MACE model as a whole-module file that mace-torch 0.3.16 loads.

    MACECalculator, ``mace_run_train --foundation_model`` and ``mace_create_lammps_model`` read it.  It is a
    ``ScaleShiftMACE`` with one head, "Default".  Upstream adds a shift to the energies of isolated atoms; the
    native model knows their sum only, which becomes the energies of isolated atoms.

    Parameters
    ----------
    model
        A native model of the MACE family, on any device; it is not changed.
    path
        File to write; usually ``*.model``.
    dtype
        Of the file's tensors; the model's compute dtype by default.  In float32, upstream rounds
        the energies of isolated atoms as well.

    Raises
    ------
    UnsupportedFeatureError
        If upstream has no such model (the message lists every reason and the nearest uniform target), or
        mace-torch is not installed.
    SelfCheckError
        If upstream's energies or forces differ from the native ones; nothing is written.
    CheckpointError
        If the file cannot be written.
    """
    if not isinstance(model, MACE):
        family = getattr(getattr(model, "spec", None), "family", type(model).__name__)
        raise UnsupportedFeatureError(
            f"only models of the MACE family are exported to mace-torch, not '{family}'."
        )
    native = _in_float64(model)
    neighbors = _avg_num_neighbors(native)
    arguments = constructor_arguments(native.spec, neighbors)
    arguments |= {
        "atomic_energies": native.energy_shift.unsqueeze(0).numpy(),
        "atomic_inter_scale": [_one_scale(native)],
        "atomic_inter_shift": [0.0],
    }
    with mace_upstream.upstream_state(torch.float64):
        upstream = mace_upstream.build(arguments)
        template = upstream.state_dict()
        upstream.load_state_dict(template | _Writer(native, template, neighbors).upstream_state())
        _self_check(native, upstream)
        upstream.to(dtype or model_dtype(model))
        checkpoint.atomic_write(path, lambda temporary: _save(upstream, temporary))


def _in_float64(model: MACE) -> MACE:
    """Copy with the same weights; constants, which are rounded in a float32 model, are made anew."""
    with torch.random.fork_rng(devices=[]):
        native = MACE(model.spec)
    native.load_state_dict(model.state_dict())
    return native


def _save(upstream: nn.Module, path: Path) -> None:
    # Given a name, torch.save would write it into the archive.
    with path.open("wb") as file:
        torch.save(upstream, file)


def _avg_num_neighbors(model: MACE) -> float:
    """Divisor of the messages of the first layer that has one."""
    for block in model.layers:
        assert isinstance(block, MACEBlock)
        if block.shape.interaction == "plain":
            return 1.0 / float(block.interaction.convolution.normalisation)
    return 1.0


def _one_scale(model: MACE) -> float:
    """Energy scale, which upstream has one of.

    Raises
    ------
    UnsupportedFeatureError
        If it differs between species.
    """
    values = model.energy_scale
    if not torch.equal(values, values[:1].expand_as(values)):
        low, high = float(values.min()), float(values.max())
        raise UnsupportedFeatureError(
            "mace-torch cannot hold this model: its energy scale differs between species "
            f"({low:.6g} to {high:.6g})."
        )
    return float(values[0])


class _Writer:
    """Translate one model to upstream's names and layouts."""

    def __init__(self, model: MACE, template: Mapping[str, Tensor], avg_num_neighbors: float) -> None:
        self.model, self.template, self.avg_num_neighbors = model, template, avg_num_neighbors
        self.state: dict[str, Tensor] = {}

    def upstream_state(self) -> dict[str, Tensor]:
        """Everything that upstream does not know from its arguments."""
        self._table("node_embedding.linear.weight", self.model.embedding)
        self._radial()
        count = len(self.model.layers)
        for t, block in enumerate(self.model.layers):
            assert isinstance(block, MACEBlock)
            self._interaction(t, block.interaction)
            for name, weight in mace_contraction.upstream_weights(
                self.template, t, block.shape, block.contraction, "the exported model"
            ).items():
                self._put(name, weight)
            self._linear(f"products.{t}.linear.weight", block.linear)
            if block.skip is not None:
                self._linear(f"interactions.{t}.skip_tp.weight", block.skip)
            if block.readout is not None:
                single = count > 1 and self.model.arch.layers[0].readout is None
                self._readout(f"readouts.{0 if single else t}", block.readout)
        return self.state

    def _put(self, name: str, value: Tensor) -> None:
        self.state[name] = value.detach().reshape(self.template[name].shape)

    def _radial(self) -> None:
        arch, radial = self.model.arch, self.model.radial
        names = {"bessel": "bessel_weights", "gaussian": "gaussian_weights"}
        if arch.basis in names:
            self._put(f"radial_embedding.bessel_fn.{names[arch.basis]}", radial.functions.points)
        if arch.transform is not None:
            prefix = "radial_embedding.distance_transform"
            for name, value in arch.transform.model_dump(exclude={"kind"}).items():
                self._put(f"{prefix}.{name}", torch.tensor(value))
            self._radii(f"{prefix}.covalent_radii", radial.radii)
        if arch.repulsion is not None:
            assert self.model.repulsion is not None
            options, prefix = arch.repulsion, "pair_repulsion_fn"
            values = {
                "c": options.coefficients,
                "a_exp": options.a_exponent,
                "a_prefactor": options.a_prefactor,
            }
            for name, number in values.items():
                self._put(f"{prefix}.{name}", torch.tensor(number))
            self._put(f"{prefix}.p", torch.tensor(options.p, dtype=self.template[f"{prefix}.p"].dtype))
            self._radii(f"{prefix}.covalent_radii", self.model.repulsion.radii)

    def _radii(self, name: str, radii: Tensor) -> None:
        """Radii of the model's species in upstream's table of all elements."""
        self._put(name, self.template[name].index_copy(0, self.template["atomic_numbers"].long(), radii))

    def _interaction(self, t: int, block: Interaction) -> None:
        layer, target = block.shape, f"interactions.{t}"
        normalisation = float(block.convolution.normalisation)
        self._linear(f"{target}.linear_up.weight", block.up)
        if layer.interaction == "nonlinear":
            self._linear(f"{target}.linear_1.weight", block.down, normalisation)
            self._linear(f"{target}.linear_res.weight", block.residual)
            self._linear(f"{target}.linear_2.weight", block.mix)
            for name, table in (("source", block.source), ("target", block.target)):
                self._table(f"{target}.{name}_embedding.weight", table)
            for name, value in (("alpha", block.alpha), ("beta", block.beta)):
                self._put(f"{target}.{name}", value)
            self._normed_network(f"{target}.density_fn", block.density_network)
            self._normed_network(f"{target}.conv_tp_weights", block.convolution.radial, layer)
            return
        divided = self.avg_num_neighbors if layer.interaction == "plain" else 1.0
        self._linear(f"{target}.linear.weight", block.down, normalisation * divided)
        if layer.species_map:
            self._linear(f"{target}.skip_tp.weight", block.species_map)
        self._network(f"{target}.conv_tp_weights", block.convolution.radial, layer)
        if layer.interaction == "density":
            self._network(f"{target}.density_fn", block.density)

    def _table(self, name: str, table: ScaledWeight) -> None:
        """Linear map of the one-hot species."""
        self._put(name, _unscaled(table, table.weight.shape[0]))

    def _network(self, target: str, network: nn.Module, layer: MACELayer | None = None) -> None:
        assert isinstance(network, RadialMLP)
        for k, block in enumerate(network.layers):
            assert isinstance(block, ScaledWeight)
            weight = _unscaled(block, block.weight.shape[0])
            last = k == len(network.layers) - 1
            self._put(
                f"{target}.layer{k}.weight", upstream_columns(weight, layer) if layer and last else weight
            )

    def _normed_network(self, target: str, network: nn.Module, layer: MACELayer | None = None) -> None:
        """Linear layers, each but the last followed by a layer norm and an activation."""
        assert isinstance(network, NormedMLP)
        last = len(network.layers) - 1
        for k, linear in enumerate(network.layers):
            assert isinstance(linear, nn.Linear)
            weight, bias = linear.weight.detach(), linear.bias.detach()
            if layer and k == last:
                weight = upstream_columns(weight.T, layer).T
                bias = upstream_columns(bias.unsqueeze(0), layer).squeeze(0)
            self._put(f"{target}.net.{3 * k}.weight", weight)
            self._put(f"{target}.net.{3 * k}.bias", bias)
            if k < last:
                for name, value in network.norms[k].named_parameters():
                    self._put(f"{target}.net.{3 * k + 1}.{name}", value)

    def _linear(self, name: str, linear: EquivariantLinear, factor: float = 1.0) -> None:
        """Join the orders of a map to e3nn's flat weight; with weights per species, (in, species, out)."""
        pieces = []
        for l in sorted(linear.orders, key=int):
            block = linear.orders[l]
            assert isinstance(block, ScaledWeight)
            *species, fan_in, _ = block.weight.shape
            weight = factor * _unscaled(block, fan_in * (species[0] if species else 1))
            pieces.append((weight.transpose(0, 1) if species else weight).reshape(-1))
        self._put(name, torch.cat(pieces))

    def _readout(self, target: str, readout: Readout) -> None:
        kinds = {"linear": ("linear",), "nonlinear": ("linear_1", "linear_2")}
        names = kinds.get(readout.shape.kind, ("linear_1", "linear_mid", "linear_2"))
        for k, (name, block) in enumerate(zip(names, readout.maps, strict=True)):
            assert isinstance(block, ScaledWeight)
            self._put(f"{target}.{name}.weight", _unscaled(block, block.weight.shape[0]))
            if k and readout.biases:
                self._put(f"{target}.{name}.bias", readout.biases[k - 1])


def _unscaled(block: ScaledWeight, fan_in: int) -> Tensor:
    """Weight that gives the same map when upstream multiplies it by ``1 / sqrt(fan_in)``."""
    return block.weight.detach() * (float(block.scale) * fan_in**0.5)


def _self_check(native: MACE, upstream: nn.Module) -> None:
    """Compare both models, float64, on clusters that contain every species.

    Raises
    ------
    SelfCheckError
        If energies without those of isolated atoms, or forces, differ by more than :data:`TOLERANCE`.
    """
    for species, positions in _clusters(len(native.spec.species), native.spec.cutoff):
        centers, neighbors = _pairs(positions, native.spec.cutoff)
        moving = positions.clone().requires_grad_(True)
        energies = native(species, centers, neighbors, moving[neighbors] - moving[centers])
        forces = -torch.autograd.grad(energies.sum(), moving)[0]
        other = mace_upstream.evaluate(
            upstream, species, centers, neighbors, positions, len(native.spec.species)
        )
        shift = native.energy_shift[species]
        pairs = ((energies.detach() - shift, other[0] - shift), (forces, other[1]))
        for what, (ours, theirs) in zip(("energies", "forces"), pairs, strict=True):
            error = float((ours - theirs).abs().max() / ours.abs().max().clamp(min=1e-3))
            if not error < TOLERANCE:
                raise SelfCheckError(
                    f"the exported model's {what} differ from the native model's by {error:.1e} (relative; "
                    f"allowed {TOLERANCE:.0e}), so nothing was written. Please report this with the model's "
                    "architecture."
                )


def _clusters(num_species: int, cutoff: float) -> Iterator[tuple[Tensor, Tensor]]:
    """Species (N,) and positions (N, 3) of small clusters on a jittered lattice, and of a short dimer."""
    generator = np.random.default_rng(0)
    spacing = min(_SPACING, 0.45 * cutoff)
    lattice = np.array([(x, y, z) for z in range(4) for y in range(2) for x in range(2)]) * spacing
    for start in range(0, num_species, _LARGEST_CHECK):
        chosen = np.resize(np.arange(start, min(start + _LARGEST_CHECK, num_species)), _LARGEST_CHECK)
        jitter = generator.normal(scale=0.1 * spacing, size=lattice.shape)
        yield torch.tensor(chosen), torch.tensor(lattice + jitter)
    dimer = np.array([[0.0, 0.0, 0.0], [0.3, 0.4, 0.5]]) * spacing
    yield torch.tensor([0, num_species - 1]), torch.tensor(dimer)


def _pairs(positions: Tensor, cutoff: float) -> Sequence[Tensor]:
    """Centres and neighbours of all pairs within the cutoff."""
    distances = (positions.unsqueeze(1) - positions).norm(dim=-1)
    return torch.nonzero((distances < cutoff) & (distances > 0), as_tuple=True)
