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

    def evaluate(self, r: Tensor, cutoff: float) -> Tensor:
        """Envelope at distances ``r`` (Angstrom); zero beyond the cutoff."""
        r2, on2, cut2 = r * r, self.onset**2, cutoff**2
        value = (cut2 - r2) ** 2 * (cut2 + 2 * r2 - 3 * on2) / (cut2 - on2) ** 3
        value = torch.where(r < self.onset, torch.ones_like(r), value)
        return torch.where(r < cutoff, value, torch.zeros_like(r))


Envelope = Annotated[PolynomialEnvelope | XPLOREnvelope, Field(discriminator="kind")]


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
