"""Radial parts: basis functions, cutoff envelopes and the network that makes path weights."""

from __future__ import annotations

import math
from typing import Annotated, Literal

import torch
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor, nn


class PolynomialEnvelope(BaseModel):
    """Cutoff polynomial of DimeNet (arXiv:2003.03123, Eq. 8): p - 1 smooth derivatives at the cutoff."""

    model_config = ConfigDict(frozen=True, extra="forbid")
    kind: Literal["polynomial"] = "polynomial"
    p: int = Field(default=6, ge=2)

    @property
    def kink(self) -> None:
        """Smooth below the cutoff."""
        return None

    def evaluate(self, r: Tensor, cutoff: float) -> Tensor:
        """Envelope at distances ``r`` (Angstrom); zero beyond the cutoff."""
        p, x = self.p, r / cutoff
        xp = x**p
        value = 1 - xp * ((p + 1) * (p + 2) / 2 - x * (p * (p + 2) - x * (p * (p + 1) / 2)))
        return torch.where(x < 1, value, torch.zeros_like(x))


class XPLOREnvelope(BaseModel):
    """XPLOR smoothing: one up to ``onset``, then a cubic in r^2 that falls to zero at the cutoff."""

    model_config = ConfigDict(frozen=True, extra="forbid")
    kind: Literal["xplor"] = "xplor"
    onset: float = Field(gt=0, description="Angstrom")

    @property
    def kink(self) -> float:
        """Distance (Angstrom) at which the second derivative jumps."""
        return self.onset

    def evaluate(self, r: Tensor, cutoff: float) -> Tensor:
        """Envelope at distances ``r`` (Angstrom); zero beyond the cutoff."""
        r2, on2, cut2 = r * r, self.onset**2, cutoff**2
        value = (cut2 - r2) ** 2 * (cut2 + 2 * r2 - 3 * on2) / (cut2 - on2) ** 3
        value = torch.where(r < self.onset, torch.ones_like(r), value)
        return torch.where(r < cutoff, value, torch.zeros_like(r))


Envelope = Annotated[PolynomialEnvelope | XPLOREnvelope, Field(discriminator="kind")]


class AgnesiTransform(BaseModel):
    """Distance transform of ACEpotentials (Witt et al., J. Chem. Phys. 159, 164101, 2023).

    ``y = 1 / (1 + a x^q / (1 + x^(q - p)))`` with x = r / r0 and r0 the mean covalent radius of the pair.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")
    kind: Literal["agnesi"] = "agnesi"
    q: float = 0.9183
    p: float = 4.5791
    a: float = 1.0805

    def evaluate(self, r: Tensor, radii_sum: Tensor) -> Tensor:
        """Transform distances; ``radii_sum`` is the sum of the covalent radii of each pair (Angstrom)."""
        x = r / (0.5 * radii_sum)
        return 1 / (1 + self.a * x**self.q / (1 + x ** (self.q - self.p)))


class SoftTransform(BaseModel):
    """Distance transform that levels off below 3/4 of the sum of covalent radii and is r above 4/3 of it."""

    model_config = ConfigDict(frozen=True, extra="forbid")
    kind: Literal["soft"] = "soft"
    alpha: float = 4.0

    def evaluate(self, r: Tensor, radii_sum: Tensor) -> Tensor:
        """Transform distances; ``radii_sum`` is the sum of the covalent radii of each pair (Angstrom)."""
        low, high = 0.75 * radii_sum, radii_sum * (4 / 3)
        switch = 0.5 * (1 + torch.tanh(self.alpha / (high - low) * (r - 0.5 * (low + high))))
        return low + (r - low) * switch


Transform = Annotated[AgnesiTransform | SoftTransform, Field(discriminator="kind")]
BasisKind = Literal["bessel", "gaussian", "chebyshev"]


class BesselBasis(nn.Module):
    """Bessel functions times envelope: after DimeNet (arXiv:2003.03123, Eq. 7).

    ``b_n(r) = (2 / r_c) sin(k_n r) / r * envelope(r)`` with trainable wave numbers ``k_n``.
    """

    def __init__(self, size: int, cutoff: float, envelope: Envelope) -> None:
        super().__init__()
        self.cutoff, self.envelope = cutoff, envelope
        self.wave_numbers = nn.Parameter(torch.arange(1, size + 1, dtype=torch.float64) * (math.pi / cutoff))

    def forward(self, r: Tensor) -> Tensor:
        """Return shape (E, size) for distances ``r`` of shape (E,) in Angstrom."""
        envelope = self.envelope.evaluate(r, self.cutoff) * (2.0 / self.cutoff) / r
        return torch.sin(r.unsqueeze(-1) * self.wave_numbers) * envelope.unsqueeze(-1)


class RadialBasis(nn.Module):
    """Fixed radial functions of a distance: the bases that MACE knows.

    Bessel ``sqrt(2 / r_c) sin(n pi x / r_c) / x``, Gaussians on an even grid from 0 to r_c with the grid's
    spacing as width, or Chebyshev polynomials T_1 ... T_n of x.
    """

    points: Tensor

    def __init__(self, kind: BasisKind, size: int, cutoff: float) -> None:
        super().__init__()
        self.kind, self.size, self.cutoff = kind, size, cutoff
        self.width = cutoff / max(size - 1, 1)
        counting = torch.arange(1, size + 1, dtype=torch.float64)
        points = counting * (math.pi / cutoff) if kind == "bessel" else (counting - 1) * self.width
        if kind != "chebyshev":
            self.register_buffer("points", points)

    def forward(self, x: Tensor) -> Tensor:
        """Return (E, size) for (transformed) distances ``x`` (E,) in Angstrom."""
        if self.kind == "bessel":
            waves = torch.sin(x.unsqueeze(-1) * self.points)
            return waves * (math.sqrt(2.0 / self.cutoff) / x).unsqueeze(-1)
        if self.kind == "gaussian":
            return torch.exp(-0.5 * ((x.unsqueeze(-1) - self.points) / self.width) ** 2)
        terms = [torch.ones_like(x), x]
        for _ in range(self.size - 1):
            terms.append(2 * x * terms[-1] - terms[-2])
        return torch.stack(terms[1:], dim=-1)


class RadialEmbedding(nn.Module):
    """Radial basis of a transformed distance, with the cutoff envelope of the plain distance.

    Parameters
    ----------
    num_species
        Species, each with a covalent radius (Angstrom) that the transform needs.
    envelope_on_basis
        Multiply the basis by the envelope; otherwise it is left to the caller.
    """

    radii: Tensor

    def __init__(
        self,
        kind: BasisKind,
        size: int,
        cutoff: float,
        envelope: Envelope,
        transform: Transform | None,
        num_species: int,
        *,
        envelope_on_basis: bool = True,
    ) -> None:
        super().__init__()
        self.functions = RadialBasis(kind, size, cutoff)
        self.cutoff, self.envelope, self.transform = cutoff, envelope, transform
        self.envelope_on_basis = envelope_on_basis
        if transform is not None:
            self.register_buffer("radii", torch.ones(num_species, dtype=torch.float64))

    def forward(self, r: Tensor, centers: Tensor, neighbors: Tensor) -> tuple[Tensor, Tensor | None]:
        """Return the basis (E, size), and the envelope (E, 1) where it is still to be applied.

        ``centers`` and ``neighbors`` hold the species index of each edge's ends.
        """
        envelope = self.envelope.evaluate(r, self.cutoff).unsqueeze(-1)
        if self.transform is not None:
            radii_sum = self.radii.index_select(0, centers) + self.radii.index_select(0, neighbors)
            r = self.transform.evaluate(r, radii_sum)
        basis = self.functions(r)
        return (basis * envelope, None) if self.envelope_on_basis else (basis, envelope)
