"""What is kept of a model where nothing is asked for."""

from __future__ import annotations

from dataclasses import dataclass

from compactmlip.spec import ModelSpec


@dataclass(frozen=True)
class Cut:
    """What to cut, in the words of the command line.

    Attributes
    ----------
    to
        Channels per order to keep.
    cut_paths
        Share of the paths of the tensor products to cut.
    cutoffs
        Of the layers, as :func:`compactmlip.compress.plan.parse_cutoffs` takes them.
    """

    to: str
    cut_paths: float = 0.0
    cutoffs: str | None = None


DEFAULTS = {
    "nequip": (
        Cut("128x0+64x1+32x2", 0.65, "-,80%"),
        Cut("64x0+32x1+16x2", 0.0, "-,80%"),
    ),
    "mace": (Cut("64x0+32x1+16x2"),),
}
"""By family, best guess first.

Convolutions take most of the time of NequIP's family, so that paths go, channels stay and layers behind the
first see fewer neighbours; in MACE it is the products, whose work grows with the channels.  Whether many
channels with few paths learn better, or fewer channels with more paths, depends on the material
(benchmarks/results/paths.md)."""


def default_cut(spec: ModelSpec) -> Cut:
    """The first of a model's defaults."""
    return DEFAULTS[spec.family][0]
