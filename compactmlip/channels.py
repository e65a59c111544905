"""Structure that pruning acts on: which channels exist and which parameter slices they own.

A :class:`ChannelGroup` is a set of channels that can be kept or cut one by one, for instance the
l = 1 channels that layer 2 puts out.  It lists its :class:`Slot` s: the places in the model's
parameters that belong to these channels and must be cut with them.  The :class:`ChannelGraph` of a
model is all its groups.  Nothing here holds a tensor.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from compactmlip.errors import InputError, did_you_mean

Channels = tuple[int, ...]
"""Number of channels per order: ``channels[l]``."""

Mask = NDArray[np.bool_]
Indices = NDArray[np.int64]


def parse_channels(text: str) -> Channels:
    """Parse ``"64x0+32x1+16x2"`` into ``(64, 32, 16)``; parity letters (``64x0e``) are accepted.

    Raises
    ------
    InputError
        If the text is not of this form or an order appears twice.
    """
    counts: dict[int, int] = {}
    for part in text.replace(" ", "").split("+"):
        match = re.fullmatch(r"(\d+)x(\d+)[eo]?", part)
        if match is None or int(match[2]) in counts:
            raise InputError(
                f"cannot read channels '{text}': expected one <count>x<order> per order, "
                "for instance 64x0+32x1+16x2."
            )
        counts[int(match[2])] = int(match[1])
    return tuple(counts.get(l, 0) for l in range(max(counts) + 1))


def format_channels(channels: Iterable[int]) -> str:
    """Inverse of :func:`parse_channels`; orders without channels are left out."""
    return "+".join(f"{c}x{l}" for l, c in enumerate(channels) if c) or "none"


def path_group(t: int, path: tuple[int, int, int]) -> str:
    """Name of the group that stands for one path (l1, l2, l3) of the tensor product of layer ``t``."""
    return f"layers.{t}.path/{path[0]}-{path[1]}-{path[2]}"


def is_path(name: str) -> bool:
    """Whether a group stands for a path of a tensor product."""
    return ".path/" in name


def parse_path(name: str) -> tuple[int, tuple[int, int, int]]:
    """Layer and (l1, l2, l3) of a group that stands for a path; inverse of :func:`path_group`."""
    layer, _, path = name.removeprefix("layers.").partition(".path/")
    l1, l2, l3 = map(int, path.split("-"))
    return int(layer), (l1, l2, l3)


@dataclass(frozen=True)
class Slot:
    """Where a group's channels live in one parameter.

    Channel ``k`` of the group owns the indices ``offset + k * block ... offset + (k + 1) * block - 1``
    of axis ``axis`` of parameter ``parameter``.
    """

    parameter: str
    axis: int
    offset: int = 0
    block: int = 1


@dataclass(frozen=True)
class ChannelGroup:
    """Channels that are kept or cut one by one, each together with everything it owns.

    Attributes
    ----------
    name
        Unique, for instance ``"layers.2.out/1"``: the feature space, a slash, the order l.
    size
        Number of channels.
    space, order
        The feature tap where these channels can be watched or masked, and their order l;
        ``space`` is None where there is no such feature (a path of the tensor product).
    slots
        What the channels own.
    requires
        Groups without which this one is dead: when one of them keeps no channel, all of this is cut.
    requires_any
        The same for alternatives: all of this is cut when none of them keeps a channel.
    """

    name: str
    size: int
    slots: tuple[Slot, ...]
    space: str | None = None
    order: int = 0
    requires: tuple[str, ...] = ()
    requires_any: tuple[str, ...] = ()


@dataclass(frozen=True)
class ChannelGraph:
    """All channel groups of a model and the shapes of the parameters that they slice."""

    groups: Mapping[str, ChannelGroup]
    shapes: Mapping[str, tuple[int, ...]] = field(repr=False)

    @classmethod
    def build(cls, groups: Iterable[ChannelGroup], shapes: Mapping[str, tuple[int, ...]]) -> ChannelGraph:
        """Check that names are unique and that every slot lies inside its parameter."""
        by_name: dict[str, ChannelGroup] = {}
        for group in groups:
            if group.name in by_name:
                raise ValueError(f"channel group {group.name} is declared twice")
            for slot in group.slots:
                extent = shapes[slot.parameter][slot.axis]
                if slot.offset + group.size * slot.block > extent:
                    raise ValueError(
                        f"{group.name}: {slot} exceeds {slot.parameter} {shapes[slot.parameter]}"
                    )
            by_name[group.name] = group
        for group in by_name.values():
            missing = {*group.requires, *group.requires_any} - by_name.keys()
            if missing:
                raise ValueError(f"{group.name} requires unknown groups {sorted(missing)}")
        return cls(by_name, dict(shapes))

    def complete(self, masks: Mapping[str, Mask]) -> dict[str, Mask]:
        """Return masks of all groups: given ones checked, others full, dead groups emptied.

        Raises
        ------
        InputError
            If a mask names an unknown group or has the wrong length.
        """
        for name, mask in masks.items():
            if name not in self.groups:
                raise InputError(f"unknown channel group '{name}'.{did_you_mean(name, self.groups)}")
            if np.shape(mask) != (self.groups[name].size,):
                raise InputError(
                    f"mask of '{name}' has shape {np.shape(mask)}, expected ({self.groups[name].size},)."
                )
        full = {
            name: np.array(masks.get(name, np.ones(group.size)), dtype=bool)
            for name, group in self.groups.items()
        }
        changed = True
        while changed:
            changed = False
            for name, group in self.groups.items():
                if full[name].any() and _is_dead(group, full):
                    full[name][:] = False
                    changed = True
        return full

    def kept_indices(self, masks: Mapping[str, Mask]) -> dict[str, tuple[Indices, ...]]:
        """Return, per parameter and axis, the indices that survive ``masks`` (complete ones)."""
        keep = {name: tuple(np.ones(n, dtype=bool) for n in shape) for name, shape in self.shapes.items()}
        for name, group in self.groups.items():
            for slot in group.slots:
                end = slot.offset + group.size * slot.block
                keep[slot.parameter][slot.axis][slot.offset : end] &= np.repeat(masks[name], slot.block)
        return {name: tuple(np.flatnonzero(axis) for axis in axes) for name, axes in keep.items()}


def _is_dead(group: ChannelGroup, masks: Mapping[str, Mask]) -> bool:
    if any(not masks[r].any() for r in group.requires):
        return True
    return bool(group.requires_any) and not any(masks[r].any() for r in group.requires_any)
