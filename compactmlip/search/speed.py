"""Speed of deployed models on this machine: measured in turns, and predicted for plans in between."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from pydantic import BaseModel, ConfigDict
from scipy.optimize import nnls
from torch import nn

from compactmlip.compress.allocate import full_channels
from compactmlip.compress.cost import Setting, Shapes
from compactmlip.compress.plan_file import Plan
from compactmlip.data.graph import GraphBatch, collate, energy_and_derivatives
from compactmlip.deploy.compile import with_constants
from compactmlip.deploy.lower.lower import lower_on_grid
from compactmlip.deploy.matmul import matmul_precision
from compactmlip.deploy.precision import in_precision
from compactmlip.errors import LoweringError
from compactmlip.kernels.build import load as load_kernels
from compactmlip.models import build, work
from compactmlip.models.workload import Work
from compactmlip.progress import Track
from compactmlip.spec import ModelSpec

INTERVALS = 200
"""Intervals of the tables of a timed model; about what :func:`compactmlip.deploy.lower.lower.lower` finds."""

PROBES = ("8x0", "64x0", "32x0+16x1", "64x0+64x1", "32x0+16x1+8x2", "64x0+32x1+16x2", "16x0+16x1+16x2+16x3")
"""Plans, the same in all layers, that are measured to fit the prediction; never more than the model has."""


def deployed(model: nn.Module) -> nn.Module:
    """What a deployed file of the model would run: lowered with compiled operators, where there are some."""
    if load_kernels():
        try:
            return in_precision(with_constants(lower_on_grid(model, INTERVALS)), "float32")
        except LoweringError:
            pass
    return in_precision(with_constants(model), "float32")


def deployed_shape(spec: ModelSpec) -> nn.Module:
    """The same for random weights: how long a model takes depends on its shape only."""
    return deployed(build(spec))


def time_models(
    models: Mapping[str, nn.Module], graph: GraphBatch, *, repeats: int = 5, progress: bool = False
) -> dict[str, list[float]]:
    """Seconds of energies and forces, ``repeats`` of each; the models take turns.

    Edge vectors differ a little from one calculation to the next.  The first calculation of each model does
    not count.  With one thread it is the processor's time that counts, so that other programs on the machine
    hardly matter.
    """
    clock = time.process_time if torch.get_num_threads() == 1 else time.perf_counter
    times: dict[str, list[float]] = {name: [] for name in models}
    vectors = torch.Generator().manual_seed(0)
    with matmul_precision(), Track("speed", repeats + 1, "rounds", enabled=progress) as track:
        for turn in range(repeats + 1):
            shift = 1e-3 * torch.randn(graph.vectors.shape, generator=vectors).to(graph.vectors)
            moved = GraphBatch(**{**vars(graph), "vectors": graph.vectors + shift})
            for name, model in models.items():
                start = clock()
                energy_and_derivatives(model, moved)
                if turn:
                    times[name].append(clock() - start)
            track.advance(1)
    return times


def relative(times: Mapping[str, Sequence[float]], reference: str) -> dict[str, float]:
    """Median over rounds of each model's time over the reference's in the same round."""
    base = np.array(times[reference])
    return {name: float(np.median(np.array(t) / base)) for name, t in times.items()}


CLOSE = 1.5
"""Factor between times that count as about the same."""


class SpeedModel(BaseModel):
    """Time of a calculation relative to the uncut model's, linear in the counted work.

    Attributes
    ----------
    coefficients
        Relative time for each multiply-add (or number) per atom, by part of the work, none negative.
    constant
        Relative time of everything else.
    edges_per_atom
        Of the structure that was timed.
    reference_seconds
        Time of the uncut model, per atom.
    deviation
        Root mean square relative deviation from the measurements.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")
    coefficients: dict[str, float]
    constant: float
    edges_per_atom: float
    reference_seconds: float
    deviation: float

    @staticmethod
    def fit(
        measured: Sequence[tuple[Work, float]],
        edges_per_atom: float,
        seconds: float,
        near: float | None = None,
    ) -> SpeedModel:
        """Least squares of relative deviations, from pairs of work and relative time.

        The times of models whose time is about ``near`` (within :data:`CLOSE`) are then right in the median.
        """
        parts = [w.per_atom(edges_per_atom) for w, _ in measured]
        times = np.array([t for _, t in measured])
        names = list(parts[0])
        matrix = np.array([[*(p[n] for n in names), 1.0] for p in parts]) / times[:, None]
        scale = np.linalg.norm(matrix, axis=0)
        scale[scale == 0] = 1.0
        found, _ = nnls(matrix / scale, np.ones(len(times)))
        found = found / scale
        if near is not None:
            close = np.abs(np.log(times / near)) < np.log(CLOSE)
            if close.any():
                found = found / np.median((matrix @ found)[close])
        deviation = float(np.sqrt(np.mean((matrix @ found - 1) ** 2)))
        return SpeedModel(
            coefficients=dict(zip(names, map(float, found), strict=False)),
            constant=float(found[-1]),
            edges_per_atom=edges_per_atom,
            reference_seconds=seconds,
            deviation=deviation,
        )

    def relative_time(self, counted: Work) -> float:
        """Predicted time over that of the uncut model."""
        parts = counted.per_atom(self.edges_per_atom)
        return self.constant + sum(self.coefficients.get(name, 0.0) * value for name, value in parts.items())


def shares_within(graph: GraphBatch) -> Callable[[float], float]:
    """Share of the edges of a structure that are shorter than a distance (Angstrom)."""
    lengths = np.sort(torch.linalg.vector_norm(graph.vectors, dim=-1).numpy())
    return lambda distance: float(np.searchsorted(lengths, distance)) / max(len(lengths), 1)


class Stopwatch:
    """Measures plans of one model against the model itself, and learns to predict their times.

    Parameters
    ----------
    teacher
        The uncut model.
    graph
        Structure to time, as a graph in float32.
    """

    def __init__(self, teacher: nn.Module, graph: GraphBatch, shapes: Shapes, repeats: int = 5) -> None:
        self.shapes, self.graph, self.repeats = shapes, graph, repeats
        self.reference = deployed(teacher)
        self.edges_per_atom = len(graph.centers) / len(graph.species)
        self.within = shares_within(graph)
        self.measured: dict[str, tuple[Work, float]] = {}
        self.seconds: list[float] = []

    def measure(self, plans: Sequence[Plan], progress: bool = False) -> list[float]:
        """Times of plans relative to the uncut model's."""
        specs = {key(plan): self.shapes.pruned(plan) for plan in plans}
        models = {name: deployed_shape(spec) for name, spec in specs.items()}
        times = time_models(
            {"reference": self.reference, **models}, self.graph, repeats=self.repeats, progress=progress
        )
        self.seconds += [t / len(self.graph.species) for t in times["reference"]]
        found = relative(times, "reference")
        self.measured |= {name: (work(spec, self.within), found[name]) for name, spec in specs.items()}
        return [found[key(plan)] for plan in plans]

    def fitted(self, near: float | None = None) -> SpeedModel:
        """Prediction from all measurements so far, the uncut model's included; see :meth:`SpeedModel.fit`."""
        rows = [*self.measured.values(), (work(self.shapes.spec), 1.0)]
        return SpeedModel.fit(rows, self.edges_per_atom, float(np.median(self.seconds)), near)


def key(plan: Plan) -> str:
    """What decides a plan's speed, as a text."""
    cut = " ".join(plan.without_paths)
    return f"{plan.target} edges {plan.edge_order} odd {plan.odd_paths} without {cut} cutoffs {plan.cutoffs}"


def probe_plans(shapes: Shapes, **options: Any) -> list[Plan]:
    """Plans of very different shape."""
    full = full_channels(shapes)
    highest = max(len(channels) for channels in full)
    plans: dict[str, Plan] = {}
    for text in PROBES:
        plan = Plan.uniform(text, len(full), **options)
        if max(len(c) for c in plan.channels) <= highest:
            made = capped(plan, full)
            plans[made.target] = made
    return list(plans.values())


def capped(plan: Plan, full: Sequence[Sequence[int]]) -> Plan:
    """The plan with no more channels than there are."""
    layers = [
        tuple(min(c, have[l]) for l, c in enumerate(channels) if l < len(have))
        for channels, have in zip(plan.channels, full, strict=True)
    ]
    return plan.model_copy(update={"layers": Plan.of(layers).layers})


CORRECTIONS = 3
"""A plan for a latency is measured, and made anew with what was learned, at most so often ..."""

CLOSE_ENOUGH = 0.02
"""... or until prediction and measurement differ by less."""


class Latency:
    """Seconds per atom of plans on this machine: predicted, and put right where a plan was measured.

    Parameters
    ----------
    teacher
        Model that plans cut.
    graphs
        Structures, of which some with about as many atoms as the setting has are timed together.
    shapes
        Of the model.
    setting
        Number of atoms.
    seed
        Of the choice of structures.
    """

    def __init__(
        self,
        teacher: nn.Module,
        graphs: Sequence[GraphBatch],
        shapes: Shapes,
        setting: Setting,
        *,
        seed: int = 0,
        progress: bool = False,
    ) -> None:
        rng = np.random.default_rng(seed)
        chosen: list[GraphBatch] = []
        while sum(len(g.species) for g in chosen) < setting.atoms:
            chosen.append(graphs[int(rng.integers(len(graphs)))])
        self.shapes, self.progress = shapes, progress
        self.watch = Stopwatch(teacher, collate(chosen).to(dtype=torch.float32), shapes)
        self.watch.measure(probe_plans(shapes), progress)
        self.model = self.watch.fitted()
        self.factor = 1.0

    @property
    def uncut(self) -> float:
        """Seconds per atom of the uncut model."""
        return self.model.reference_seconds

    def __call__(self, plan: Plan) -> float:
        """Predicted seconds per atom."""
        counted = work(self.shapes.pruned(plan), self.watch.within)
        return self.uncut * self.factor * self.model.relative_time(counted)

    def correct(self, plan: Plan) -> float:
        """Measure a plan; from then on predictions for plans like it are right.

        Returns
        -------
        float
            Measured time over the one that was predicted.
        """
        predicted = self(plan)
        (relative_time,) = self.watch.measure([plan], self.progress)
        off = self.uncut * relative_time / predicted
        self.factor *= off
        return off

    def settled(self, make: Callable[[], Plan]) -> Plan:
        """What ``make`` makes by these predictions when they are right for it."""
        plan = make()
        for _ in range(CORRECTIONS):
            if abs(self.correct(plan) - 1) < CLOSE_ENOUGH:
                break
            plan = make()
        return plan
