"""What is kept of a model where nothing is asked for."""

from __future__ import annotations

from dataclasses import dataclass, replace

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


def default_cuts(spec: ModelSpec) -> tuple[Cut, ...]:
    """A model's defaults; where there is no layer behind the first, cutoffs stay."""
    cuts = DEFAULTS[spec.family]
    if spec.num_message_passing_layers > 1:
        return cuts
    return tuple(replace(cut, cutoffs=None) for cut in cuts)


def default_cut(spec: ModelSpec) -> Cut:
    """The first of them."""
    return default_cuts(spec)[0]
