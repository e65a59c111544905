"""Radial functions as tables: values and derivatives at even distances, for Hermite interpolation."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

RadialFunction = Callable[[Tensor], Tensor]
"""From distances (K,) in Angstrom to values (K, columns); differentiable."""

FIRST_DISTANCE = 1e-2
"""Angstrom; basis functions such as sin(kr)/r cannot be evaluated at zero.  The first knot is continued from
here: no two atoms come closer than this."""


EDGE = 1e-8
"""Angstrom; ends of a piece are continued from this far inside, where the function is that of the piece."""

BEHIND_THE_KINK = 2.0
"""Knots behind the kink are this much denser: the functions fall to zero there."""


@dataclass(frozen=True)
class Grid:
    """Where radial functions are tabulated.

    Knots lie evenly from 0 to the kink, and, beginning with a second knot there, from the kink to the cutoff;
    without a kink from 0 to the cutoff.

    Attributes
    ----------
    cutoff
        Angstrom.
    knots
        All of them.
    values_per_knot
        2 for cubic, 3 for quintic interpolation.
    kink
        Distance (Angstrom) at which the second derivative of the functions jumps; 0 if there is none.
    knots_before_kink
        Number of knots up to it.
    """

    cutoff: float
    knots: int
    values_per_knot: int
    kink: float = 0.0
    knots_before_kink: int = 0

    @staticmethod
    def with_intervals(
        cutoff: float, intervals: int, values_per_knot: int = 3, kink: float | None = None
    ) -> Grid:
        """Grid of about so many intervals."""
        if kink is None or not 0 < kink < cutoff:
            return Grid(cutoff, intervals + 1, values_per_knot)
        before = max(1, round(intervals * kink / cutoff))
        behind = max(1, math.ceil(BEHIND_THE_KINK * intervals * (cutoff - kink) / cutoff))
        return Grid(cutoff, before + behind + 2, values_per_knot, kink, before + 1)

    def up_to(self, cutoff: float) -> Grid:
        """The same, about as dense, up to a shorter cutoff."""
        count = self.knots_before_kink
        if count and cutoff > self.kink:
            spacing = (self.cutoff - self.kink) / (self.knots - count - 1)
            behind = math.ceil((cutoff - self.kink) / spacing)
            return replace(self, cutoff=cutoff, knots=count + behind + 1)
        spacing = self.kink / (count - 1) if count else self.cutoff / (self.knots - 1)
        return Grid(cutoff, math.ceil(cutoff / spacing) + 1, self.values_per_knot)

    def tabulate(self, function: RadialFunction) -> Tensor:
        """Table (knots, values_per_knot, columns) of a radial function, as :func:`tabulate`."""
        count, values = self.knots_before_kink, self.values_per_knot
        pieces = [tabulate(function, (self.kink, self.cutoff), self.knots - count, values)]
        if count:
            pieces.insert(0, tabulate(function, (0.0, self.kink), count, values))
        return torch.cat(pieces)


def tabulate(function: RadialFunction, ends: tuple[float, float], knots: int, values_per_knot: int) -> Tensor:
    """Table of a radial function between two distances (Angstrom) with even knots, float64.

    Returns
    -------
    Tensor
        (knots, values_per_knot, columns): value and first derivative, and the second if
        ``values_per_knot`` is 3.  Derivatives are per interval, and one-sided at the ends.
    """
    start, end = ends
    spacing = (end - start) / (knots - 1)
    r = start + torch.arange(knots, dtype=torch.float64) * spacing
    edge = min(FIRST_DISTANCE, 0.5 * spacing) if start == 0 else EDGE
    inside = r.clamp(min=start + edge, max=end - EDGE)
    value, first, second = _derivatives(function, inside)
    shift = (r - inside).unsqueeze(-1)
    value = value + shift * (first + 0.5 * shift * second)
    first = first + shift * second
    columns = [value, first * spacing, second * spacing**2]
    return torch.stack(columns[:values_per_knot], dim=1)


def _derivatives(function: RadialFunction, r: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Value and first two derivatives, each (K, columns)."""
    r = r.clone().requires_grad_()
    with torch.enable_grad():
        value = function(r)
        slope = _slope(value, r)
        curvature = _slope(slope, r)
    return value.detach(), slope.detach(), curvature.detach()


def _slope(value: Tensor, r: Tensor) -> Tensor:
    """Derivative of value[k, :] by r[k], by differentiating a gradient with respect to its weights."""
    weights = torch.ones_like(value, requires_grad=True)
    if not value.requires_grad:  # constant
        return torch.zeros_like(value)
    (weighted,) = torch.autograd.grad(value, r, weights, create_graph=True)
    (slope,) = torch.autograd.grad(weighted.sum(), weights, create_graph=True)
    return slope


class SmoothLayerNorm(nn.Module):
    """Layer normalisation from elementary operations.

    Second derivatives of torch's own, by forward or by repeated backward differentiation, are wrong (2.13).
    """

    def __init__(self, norm: nn.LayerNorm) -> None:
        super().__init__()
        self.weight, self.bias, self.eps = norm.weight, norm.bias, norm.eps

    def forward(self, x: Tensor) -> Tensor:
        """Normalise the last axis."""
        centred = x - x.mean(-1, keepdim=True)
        return centred / (centred.square().mean(-1, keepdim=True) + self.eps).sqrt() * self.weight + self.bias
