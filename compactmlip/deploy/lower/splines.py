"""Radial functions as tables: values and derivatives at even distances, for Hermite interpolation."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

RadialFunction = Callable[[Tensor], Tensor]
"""From distances (K,) in Angstrom to values (K, columns); differentiable."""

FIRST_DISTANCE = 1e-2
"""Angstrom; basis functions such as sin(kr)/r cannot be evaluated at zero.  The first knot is continued from
here: no two atoms come closer than this."""


def tabulate(function: RadialFunction, cutoff: float, knots: int, values_per_knot: int) -> Tensor:
    """Table of a radial function on [0, cutoff], float64.

    Returns
    -------
    Tensor
        (knots, values_per_knot, columns): value and first derivative, and the second if
        ``values_per_knot`` is 3.  Derivatives are per interval.
    """
    spacing = cutoff / (knots - 1)
    r = torch.arange(knots, dtype=torch.float64) * spacing
    inside = r.clamp(min=min(FIRST_DISTANCE, 0.5 * spacing))
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
