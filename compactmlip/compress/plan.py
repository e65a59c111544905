"""Which channels to keep: a target per layer and order, filled with the most important channels."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

from compactmlip import models
from compactmlip.channels import ChannelGraph, Channels, Mask, is_path, parse_channels
from compactmlip.compress.tapped import Scores
from compactmlip.errors import InputError, did_you_mean
from compactmlip.models import channel_graph
from compactmlip.models.targets import TargetOptions, Targets, Tie
from compactmlip.spec import ModelSpec


def parse_target(text: str, num_layers: int) -> list[Channels]:
    """Parse ``"64x0+32x1"`` (all layers) or one such text per layer, separated by commas.

    Raises
    ------
    InputError
        If the text is malformed or lists another number of layers.
    """
    parts = [parse_channels(part) for part in text.split(",")]
    if len(parts) == 1:
        parts *= num_layers
    if len(parts) != num_layers:
        raise InputError(f"'{text}' lists {len(parts)} layers, but the model has {num_layers}.")
    return parts


def parse_cutoffs(text: str | None, spec: ModelSpec) -> tuple[float | None, ...] | None:
    """Parse the cutoffs of a model's layers, separated by commas: the last one holds for all that follow.

    Each is a length in Angstrom (``4.5``), a share of the model's cutoff (``80%``) or ``-`` for the model's
    own: ``-,4`` lets all layers but the first see neighbours up to 4 Angstrom.  None if no layer has another
    than the model's, as without a text.

    Raises
    ------
    InputError
        If the text is malformed, lists more layers than there are, or a cutoff is not between zero and the
        model's, or the family's layers have none.
    """
    if text is None:
        return None
    found: list[float | None] = []
    for part in text.split(","):
        match = re.fullmatch(r"-|([0-9]*\.?[0-9]+)(%?)", part.strip())
        if match is None:
            raise InputError(
                f"cannot read '{part.strip()}' in the cutoffs '{text}': expected lengths in Angstrom, shares "
                "such as 80% of the model's, or - for all of it, separated by commas; for instance -,4.5."
            )
        number = float(match[1]) if match[1] else None
        found.append(round(number * spec.cutoff / 100, 2) if number and match[2] else number)
    layers = spec.num_message_passing_layers
    if len(found) > layers:
        raise InputError(f"'{text}' lists cutoffs of {len(found)} layers, but the model has {layers}.")
    cutoffs = tuple(found + found[-1:] * (layers - len(found)))
    models.with_layer_cutoffs(spec, cutoffs)
    made = tuple(None if cutoff == spec.cutoff else cutoff for cutoff in cutoffs)
    return None if all(cutoff is None for cutoff in made) else made


def target_sizes(
    spec: ModelSpec,
    target: Sequence[Channels],
    *,
    radial_hidden: int | None = None,
    readout_hidden: int | None = None,
    odd_paths: bool = True,
    edge_order: int | None = None,
    without_paths: Sequence[str] = (),
) -> Targets:
    """Number of channels to keep in each group.

    The channels of layer t's output are ``target[t]``, never more than there are; orders that it does not
    list are cut.  What else follows is the family's business (its ``..._plan`` module); a family ignores
    options that mean nothing for it.

    Parameters
    ----------
    spec
        Of the model to cut.
    target
        Channels per order for each layer.
    radial_hidden, readout_hidden, odd_paths, edge_order, without_paths
        See :class:`compactmlip.models.targets.TargetOptions`.

    Raises
    ------
    InputError
        If a layer's target has no scalars, or the model has no such path.
    """
    if any(not channels or not channels[0] for channels in target):
        raise InputError("a target needs scalar channels in every layer, for instance 64x0+32x1.")
    options = TargetOptions(radial_hidden, readout_hidden, odd_paths, edge_order, tuple(without_paths))
    targets = models.target_sizes(spec, target, options)
    for name in without_paths:
        if targets.sizes.get(name) != 0 or not is_path(name):
            known = [group for group in channel_graph(spec).groups if is_path(group)]
            raise InputError(
                f"the model has no tensor-product path '{name}' that could be cut; paths are named like "
                f"{known[-1] if known else 'layers.1.path/0-1-1'}.{did_you_mean(name, known)}"
            )
    return targets


def top_channels(spec: ModelSpec, targets: Targets, scores: Scores) -> dict[str, Mask]:
    """Masks that keep the highest-scoring channels of each group.

    Tied groups are ranked by the sum of their scores.  Equal scores are ranked by channel index, so that
    the result does not depend on the machine.

    Raises
    ------
    InputError
        If tied groups have different targets.
    ValueError
        If the family declares ties that its groups do not allow.
    """
    return choose(channel_graph(spec), targets, scores)


def choose(graph: ChannelGraph, targets: Targets, scores: Scores) -> dict[str, Mask]:
    """:func:`top_channels` for the groups of a graph."""
    tie_of = {name: tie for tie in targets.ties for name in tie.groups}
    _check(graph, targets, tie_of)
    masks: dict[str, Mask] = {}
    for name, group in graph.groups.items():
        if name in masks or not (name in targets.sizes or name in tie_of):
            continue
        if name in tie_of:
            tie = tie_of[name]
            mask = _highest(_tied_score(tie, scores), _tied_target(tie, targets.sizes))
            masks |= {tied: mask.copy() for tied in tie.groups}
        elif group.space is None:
            masks[name] = np.full(group.size, bool(targets.sizes[name]))
        else:
            masks[name] = _highest(scores[name], targets.sizes[name])
    for follow in targets.follows:
        parts = [masks.get(name, np.ones(graph.groups[name].size, dtype=bool)) for name in follow.of]
        masks[follow.group] = np.logical_or.reduce(parts)
    return masks


def _highest(score: NDArray[np.float64], count: int) -> Mask:
    mask = np.zeros(len(score), dtype=bool)
    mask[np.argsort(-score, kind="stable")[:count]] = True
    return mask


def _tied_score(tie: Tie, scores: Scores) -> NDArray[np.float64]:
    """Sum of the scores that rank the channels of a tie."""
    names = tie.scored_by or tuple(name for name in tie.groups if name in scores)
    if not names:
        raise ValueError(f"no group of the tie {tie.groups} has scores; name some in scored_by")
    total: NDArray[np.float64] = np.sum([scores[name] for name in names], axis=0)
    return total


def _tied_target(tie: Tie, sizes: Mapping[str, int]) -> int:
    """Number of channels that all groups of a tie keep."""
    wanted = {name: sizes[name] for name in tie.groups if name in sizes}
    if not wanted:
        raise ValueError(f"no group of the tie {tie.groups} has a target")
    if len(set(wanted.values())) > 1:
        listed = ", ".join(f"{count} of {name}" for name, count in wanted.items())
        raise InputError(
            f"the target asks to keep {listed}, but these groups share their channels; "
            "ask for the same number in each."
        )
    return next(iter(wanted.values()))


def _check(graph: ChannelGraph, targets: Targets, tie_of: Mapping[str, Tie]) -> None:
    """Refuse what a family must not declare."""
    sets = [(*tie.groups, *tie.scored_by) for tie in targets.ties]
    sets += [(follow.group, *follow.of) for follow in targets.follows]
    for names in sets:
        unknown = [name for name in names if name not in graph.groups]
        if unknown:
            raise ValueError(f"ties or follows name unknown groups {unknown}")
        if len({graph.groups[name].size for name in names}) > 1:
            raise ValueError(f"groups of different sizes cannot share their channels: {names}")
    led = [name for tie in targets.ties for name in tie.groups] + [f.group for f in targets.follows]
    twice = {name for name in led if led.count(name) > 1}
    twice |= {follow.group for follow in targets.follows if follow.group in targets.sizes}
    if twice:
        raise ValueError(f"more than one rule for groups {sorted(twice)}")
