"""Names that all families share for changes of depth and of the radial basis."""

from __future__ import annotations

from typing import Literal

LastReadout = Literal["linear", "nonlinear"]
"""Readout of the layer that becomes the last: the one it had, or a nonlinear one that starts equal to it."""

BasisStart = Literal["inherited", "random"]
"""Weights of a resized radial basis: kept, with zeros for new functions, or drawn anew."""
