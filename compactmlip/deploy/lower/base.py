"""What lowered models of all families share."""

from __future__ import annotations

from torch import Tensor, nn


class LoweredModel(nn.Module):
    """Energies of atoms are scaled and shifted by species, in float64.

    Parameters
    ----------
    scale, shift
        (species,) eV.
    """

    energy_scale: Tensor
    energy_shift: Tensor
    wide_geometry = True  # distances and their tables' weights are in float64 in any case

    def __init__(self, scale: Tensor, shift: Tensor) -> None:
        super().__init__()
        self.register_buffer("energy_scale", scale.clone())
        self.register_buffer("energy_shift", shift.clone())

    def in_ev(self, energy: Tensor, species: Tensor) -> Tensor:
        """Energies (N,) in eV from those of the network, float64."""
        scale, shift = self.energy_scale.index_select(0, species), self.energy_shift.index_select(0, species)
        return energy * scale + shift
