"""What a plan costs, and budgets for it: parameters, memory, multiply-adds, time."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import prod
from typing import Literal, get_args

import numpy as np
from torch import nn

from compactmlip.channels import Mask
from compactmlip.compress.plan import choose, target_sizes
from compactmlip.compress.plan_file import Plan
from compactmlip.compress.tapped import Scores
from compactmlip.data.graph import GraphBatch
from compactmlip.errors import InputError, did_you_mean
from compactmlip.models import channel_graph, model_spec, pruned_spec, work
from compactmlip.spec import ModelSpec

Kind = Literal["parameters", "memory", "flops", "latency"]

BYTES_PER_NUMBER = 4
"""Deployed models compute in float32."""

COPIES = 2.0
"""A number that is kept for the forces, and its gradient."""

BYTES_PER_EDGE = 600
"""Neighbour list, vectors and their gradients (measured, see the memory benchmark)."""

BYTES_AT_REST = 320e6
"""Of a process that has loaded torch and a small model."""


@dataclass(frozen=True)
class Setting:
    """What a model is going to compute.

    Attributes
    ----------
    atoms
        Number of atoms.
    edges_per_atom
        Neighbours within the cutoff.
    """

    atoms: int
    edges_per_atom: float

    @staticmethod
    def of(graphs: Sequence[GraphBatch], atoms: int = 512) -> Setting:
        """Setting with the mean number of neighbours of some structures.

        Raises
        ------
        InputError
            If there is no structure.
        """
        if not graphs:
            raise InputError("a budget needs at least one structure.")
        total = sum(len(g.species) for g in graphs)
        return Setting(atoms, sum(len(g.centers) for g in graphs) / max(total, 1))


class Shapes:
    """What is left of one model under different plans, without touching weights."""

    def __init__(self, model: nn.Module) -> None:
        self.spec = model_spec(model)
        self.graph = channel_graph(self.spec)
        self.parameters = frozenset(name for name, _ in model.named_parameters())
        self._equal: Scores = {name: np.zeros(g.size) for name, g in self.graph.groups.items()}

    def masks(self, plan: Plan, scores: Scores | None = None) -> dict[str, Mask]:
        """Masks of a plan; without scores those of the first channels, which have the same sizes."""
        targets = target_sizes(self.spec, plan.channels, **plan.options)
        return choose(self.graph, targets, scores or self._equal)

    def pruned(self, plan: Plan) -> ModelSpec:
        """Spec of the model that a plan leaves."""
        return pruned_spec(self.spec, self.graph.complete(self.masks(plan)), plan.cutoffs)

    def num_parameters(self, plan: Plan) -> int:
        """Parameters of the model that a plan leaves."""
        kept = self.graph.kept_indices(self.graph.complete(self.masks(plan)))
        return sum(prod(len(axis) for axis in kept[name]) for name in self.parameters if name in kept)


Cost = Callable[[Plan], float]
"""Cost of a plan, in the unit of the budget."""


def multiply_adds(shapes: Shapes, setting: Setting) -> Cost:
    """Multiply-adds per atom of the energy, when the model is deployed."""
    return lambda plan: work(shapes.pruned(plan)).multiply_adds(setting.edges_per_atom)


def memory(shapes: Shapes, setting: Setting) -> Cost:
    """Bytes of a process that computes energies and forces with the deployed model, an estimate."""

    def cost(plan: Plan) -> float:
        parts = work(shapes.pruned(plan)).per_atom(setting.edges_per_atom)
        per_atom = COPIES * BYTES_PER_NUMBER * parts["kept"] + BYTES_PER_EDGE * setting.edges_per_atom
        return BYTES_AT_REST + 2 * BYTES_PER_NUMBER * shapes.num_parameters(plan) + setting.atoms * per_atom

    return cost


def cost_of(kind: Kind, shapes: Shapes, setting: Setting, latency: Cost | None = None) -> Cost:
    """Cost function of a kind of budget; ``latency`` is the measured one, in seconds per atom."""
    if kind == "parameters":
        return lambda plan: float(shapes.num_parameters(plan))
    if kind == "memory":
        return memory(shapes, setting)
    if kind == "flops":
        return multiply_adds(shapes, setting)
    if latency is None:
        raise InputError("a latency budget needs a speed that was measured on this machine.")
    return latency


@dataclass(frozen=True)
class Budget:
    """An upper bound on a cost.

    Attributes
    ----------
    kind
        What is bounded.
    value
        The bound: parameters, bytes, multiply-adds per atom or seconds per atom; or a share of the uncut
        model's.
    relative
        Whether it is a share.
    """

    kind: Kind
    value: float
    relative: bool

    def bound(self, full: float) -> float:
        """The bound in the unit of the cost, given that of the uncut model."""
        return self.value * full if self.relative else self.value

    @staticmethod
    def parse(text: str) -> Budget:
        """Parse ``parameters=20%``, ``memory=500MB``, ``flops=1.5M``, ``latency=8x`` or ``latency=40us``.

        ``8x`` is an eighth of the uncut model's cost.  Multiply-adds and latencies are per atom.

        Raises
        ------
        InputError
            If the text is not of this form.
        """
        kind, sign, value = text.partition("=")
        if not sign or kind not in get_args(Kind):
            known = ", ".join(get_args(Kind))
            raise InputError(
                f"cannot read the budget '{text}': expected KIND=VALUE with KIND one of {known}, for "
                f"instance parameters=20%.{did_you_mean(kind, get_args(Kind))}"
            )
        match = re.fullmatch(r"([0-9.]+(?:e[+-]?\d+)?)\s*([A-Za-z%]*)", value.strip())
        if match is None or match[2] not in _UNITS[kind] or not float(match[1]) > 0:
            raise InputError(
                f"cannot read '{value}' in the budget '{text}': expected a positive number with one of the "
                f"units {', '.join(u for u in _UNITS[kind] if u)}, for instance {_EXAMPLES[kind]}."
            )
        number, unit = float(match[1]), match[2]
        if unit == "x":
            return Budget(kind, 1.0 / number, True)  # type: ignore[arg-type]
        return Budget(kind, number * _UNITS[kind][unit], unit == "%")  # type: ignore[arg-type]


_COUNTS = {"%": 0.01, "x": 1.0, "": 1.0, "k": 1e3, "M": 1e6, "G": 1e9}
_UNITS: dict[str, dict[str, float]] = {
    "parameters": _COUNTS,
    "flops": _COUNTS,
    "memory": {"%": 0.01, "x": 1.0, "kB": 1e3, "MB": 1e6, "GB": 1e9},
    "latency": {"%": 0.01, "x": 1.0, "s": 1.0, "ms": 1e-3, "us": 1e-6},
}
_EXAMPLES = {"parameters": "200k", "flops": "1.5M", "memory": "2GB", "latency": "40us"}
