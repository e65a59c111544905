"""How a family says which sizes a target means for its channel groups: pure data."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True)
class TargetOptions:
    """What a target may fix besides the channels of the layers; a family ignores what it does not have.

    Attributes
    ----------
    radial_hidden, readout_hidden
        Units to keep in each hidden layer of the radial networks and of the readout; None keeps all.
    odd_paths
        Keep tensor-product paths with odd l1 + l2 + l3, in families that have them.
    edge_order
        Largest order of the spherical harmonics of edges to keep, in families where it is free; None is the
        largest order of the target.
    without_paths
        Groups of tensor-product paths to cut, for instance ``layers.1.path/0-1-1``.
    """

    radial_hidden: int | None = None
    readout_hidden: int | None = None
    odd_paths: bool = True
    edge_order: int | None = None
    without_paths: tuple[str, ...] = ()


@dataclass(frozen=True)
class Tie:
    """Groups of one size that have to keep the same channels.

    Attributes
    ----------
    groups
        Names of the groups; all get one mask.
    scored_by
        Groups whose scores are added to rank the channels.  By default, those of ``groups`` that
        have scores.
    """

    groups: tuple[str, ...]
    scored_by: tuple[str, ...] = ()


@dataclass(frozen=True)
class Follow:
    """A group that keeps each channel that any of the groups in ``of`` (of the same size) keeps."""

    group: str
    of: tuple[str, ...]


@dataclass(frozen=True)
class Targets:
    """Number of channels to keep per group, and which groups choose them together.

    Attributes
    ----------
    sizes
        By group name; groups that are not named stay whole.
    ties, follows
        No group is in two of them, and a group that follows has no size of its own.  Follows are
        resolved in order, after the ties.
    """

    sizes: Mapping[str, int]
    ties: tuple[Tie, ...] = ()
    follows: tuple[Follow, ...] = ()
