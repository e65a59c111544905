"""Short-range pair repulsion of Ziegler, Biersack and Littmark (ZBL) with a smooth cutoff."""

from __future__ import annotations

import torch
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor, nn

from compactmlip.models.radial import PolynomialEnvelope

_DECAYS = (3.2, 0.9423, 0.4028, 0.2016)
_COULOMB = 14.3996
_BOHR = 0.529


class ZBLOptions(BaseModel):
    """Constants of the potential: screening coefficients, exponent and length, envelope exponent."""

    model_config = ConfigDict(frozen=True, extra="forbid")
    coefficients: tuple[float, float, float, float] = (0.1818, 0.5099, 0.2802, 0.02817)
    a_exponent: float = 0.300
    a_prefactor: float = 0.4543
    p: int = Field(default=6, ge=2)


class ZBLRepulsion(nn.Module):
    """Screened Coulomb repulsion of the nuclei that ends at the sum of the covalent radii.

    ``V(r) = 14.3996 Z_i Z_j / r * phi(r / a) * envelope(r)`` in eV with r in Angstrom, phi the universal
    screening function and ``a = 0.4543 * 0.529 / (Z_i^0.3 + Z_j^0.3)``.  Each atom gets half of each pair.
    """

    charges: Tensor
    radii: Tensor

    def __init__(self, options: ZBLOptions, num_species: int) -> None:
        super().__init__()
        self.options, self.envelope = options, PolynomialEnvelope(p=options.p)
        self.register_buffer("charges", torch.ones(num_species, dtype=torch.float64))
        self.register_buffer("radii", torch.ones(num_species, dtype=torch.float64))

    def forward(self, r: Tensor, species: Tensor, centers: Tensor, neighbors: Tensor) -> Tensor:
        """Return the energy of each atom in eV, (n_nodes,), from distances (E,) in Angstrom."""
        own, other = species.index_select(0, centers), species.index_select(0, neighbors)
        z_own, z_other = self.charges.index_select(0, own), self.charges.index_select(0, other)
        options = self.options
        length = options.a_prefactor * _BOHR / (z_own**options.a_exponent + z_other**options.a_exponent)
        x = r / length
        terms = [c * torch.exp(-d * x) for c, d in zip(options.coefficients, _DECAYS, strict=True)]
        phi = terms[0] + terms[1] + terms[2] + terms[3]
        reach = self.radii.index_select(0, own) + self.radii.index_select(0, other)
        pair = 0.5 * _COULOMB * z_own * z_other / r * phi * self.envelope.evaluate(r / reach, 1.0)
        return pair.new_zeros(species.shape[0]).index_add(0, centers, pair)
