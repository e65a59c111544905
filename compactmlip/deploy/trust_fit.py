"""Make the trust region of a model that is being compiled; see :mod:`compactmlip.deploy.trust`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from compactmlip.data.graph import GraphBatch
from compactmlip.deploy.archive import Precision
from compactmlip.deploy.matmul import matmul_precision
from compactmlip.deploy.precision import input_dtype
from compactmlip.deploy.trust import SpeciesRegion, TrustRegion, TrustScores
from compactmlip.errors import InputError, SelfCheckError
from compactmlip.spec import ModelSpec

MAX_DIRECTIONS = 32
"""Principal directions of the features with a variance of their own."""

ATOMS_PER_DIRECTION = 4
"""No more directions than there are atoms of the species over this."""

MIN_ATOMS = 8
"""A species with fewer atoms in the calibration set is not covered."""

TOO_FEW = (
    f"no trust region: fewer than {MIN_ATOMS} atoms of every species have neighbours in the calibration "
    "structures; give more of them"
)

SHRINKAGE = 0.01
"""Part of the mean variance of the features that is added to each of them.  Without it the directions with
the least variance decide, which few atoms do not tell, and the distances of held-out atoms scatter more."""

NOISE = 1e-4
"""Standard deviations of features count as at least this much of their root mean square: float32 rounds at a
hundredth of it."""

FOLDS = 10
"""Of the cross-validation; structures are dealt out in turn."""

QUANTILE = 0.995
"""Part of the held-out atoms whose features are inside, before the margin."""

FEATURE_MARGIN = 1.1
"""Factor on the quantile."""

FURTHEST = 10.0
"""Features may be no further than this many median distances, or one strange atom among few would let
everything in.  In MgO the quantile is at four to five."""

DISTANCE_MARGIN = 0.02
"""Part of a distance by which limits lie beyond what was seen."""

COORDINATION_MARGIN = 0.1
"""Part of a range's width by which it is wider at each end; a hundredth of its middle is added."""


@dataclass(frozen=True)
class Surroundings:
    """What is checked of N atoms.

    Attributes
    ----------
    species
        (N,) index of the model.
    closest
        (N, species) distance of the nearest neighbour of each species, at most the cutoff.
    coordination
        (N,) smooth number of neighbours.
    features
        (N, channels) float64.
    """

    species: Tensor
    closest: Tensor
    coordination: Tensor
    features: Tensor

    def at(self, chosen: Tensor) -> Surroundings:
        """Some of the atoms."""
        return Surroundings(*(getattr(self, n)[chosen] for n in self.__dataclass_fields__))


def surroundings(
    features: Tensor,
    species: Tensor,
    centers: Tensor,
    neighbors: Tensor,
    vectors: Tensor,
    num_species: int,
    cutoff: float,
) -> Surroundings:
    """Surroundings of owned atoms: as many as there are features; they come first among the nodes."""
    nodes, count = species.shape[0], features.shape[0]
    lengths = torch.linalg.vector_norm(vectors.to(torch.float64), dim=-1).clamp(max=cutoff)
    weights = 0.5 * (1 + torch.cos(lengths * (torch.pi / cutoff)))
    coordination = lengths.new_zeros(nodes).index_add(0, centers, weights)
    place = centers * num_species + species.index_select(0, neighbors)
    closest = lengths.new_full((nodes * num_species,), cutoff).scatter_reduce(0, place, lengths, "amin")
    closest = closest.reshape(nodes, num_species)
    return Surroundings(
        species.narrow(0, 0, count),
        closest.narrow(0, 0, count),
        coordination.narrow(0, 0, count),
        features.to(torch.float64),
    )


class Ball(nn.Module):
    """Mahalanobis distance of features (n, channels) from their mean, with a covariance that few atoms give.

    Parameters
    ----------
    features
        (atoms, channels) float64, of one species.
    """

    mean: Tensor
    directions: Tensor
    weights: Tensor
    rest: Tensor

    def __init__(self, features: Tensor) -> None:
        super().__init__()
        count, channels = features.shape
        mean = features.mean(dim=0)
        centred = features - mean
        values, vectors = torch.linalg.eigh(centred.mT @ centred / max(count - 1, 1))
        floor = (NOISE**2 * features.square().mean()).clamp(min=1e-24)
        values, vectors = values.flip(0) + SHRINKAGE * values.mean(), vectors.flip(1)
        kept = min(MAX_DIRECTIONS, channels, count // ATOMS_PER_DIRECTION, int((values > floor).sum()))
        left = values[kept:]
        self.register_buffer("mean", mean)
        self.register_buffer("directions", vectors[:, :kept].clone())
        self.register_buffer("weights", 1 / values[:kept])
        self.register_buffer("rest", 1 / (left.mean() if len(left) else floor).clamp(min=floor))

    def forward(self, features: Tensor) -> Tensor:
        """Return (n,)."""
        centred = features - self.mean
        along = centred @ self.directions
        across = centred - along @ self.directions.mT
        squared = along.square() @ self.weights + across.square().sum(dim=-1) * self.rest
        return squared.sqrt()


@dataclass(frozen=True)
class Limits:
    """Ranges of one species, margins included; see :class:`compactmlip.deploy.trust.SpeciesRegion`."""

    nearest: tuple[float, float]
    coordination: tuple[float, float]
    shortest: Tensor


def limits_of(atoms: Surroundings, cutoff: float) -> Limits:
    """Ranges that atoms of one species span, and (species,) the shortest distance allowed to each."""
    nearest = atoms.closest.amin(dim=1)
    lowest, highest = float(atoms.coordination.min()), float(atoms.coordination.max())
    extra = COORDINATION_MARGIN * (highest - lowest) + 0.005 * (highest + lowest) + 1e-3
    shortest = atoms.closest.amin(dim=0)
    # A pair that was not seen within the cutoff keeps it.
    shortest = torch.where(shortest < cutoff, shortest * (1 - DISTANCE_MARGIN), shortest)
    return Limits(
        (float(nearest.min()) * (1 - DISTANCE_MARGIN), float(nearest.max()) * (1 + DISTANCE_MARGIN)),
        (lowest - extra, highest + extra),
        shortest,
    )


class Scores(nn.Module):
    """Scores (n_owned, 4) of atoms in a trust region.

    Parameters
    ----------
    calibration
        Atoms that span the region.
    num_species
        Of the model.
    cutoff
        Angstrom.
    distances
        Species index -> largest Mahalanobis distance of the features; which species are covered.
    """

    covered: Tensor
    shortest: Tensor
    nearest: Tensor
    middle: Tensor
    half_width: Tensor

    def __init__(
        self, calibration: Surroundings, num_species: int, cutoff: float, distances: dict[int, float]
    ) -> None:
        super().__init__()
        self.num_species, self.cutoff, self.distances = num_species, cutoff, distances
        covered = torch.full((num_species,), torch.inf, dtype=torch.float64)
        shortest = torch.zeros(num_species, num_species, dtype=torch.float64)
        nearest, middle, half = (torch.ones(num_species, dtype=torch.float64) for _ in range(3))
        self.limits: dict[int, Limits] = {}
        self.balls = nn.ModuleDict()
        for s in distances:
            atoms = calibration.at(calibration.species == s)
            found = self.limits[s] = limits_of(atoms, cutoff)
            covered[s], shortest[s], nearest[s] = 0.0, found.shortest, found.nearest[1]
            middle[s] = sum(found.coordination) / 2
            half[s] = (found.coordination[1] - found.coordination[0]) / 2
            self.balls[str(s)] = Ball(atoms.features)
        for name, value in (
            ("covered", covered),
            ("shortest", shortest),
            ("nearest", nearest),
            ("middle", middle),
            ("half_width", half),
        ):
            self.register_buffer(name, value)

    def forward(
        self, features: Tensor, species: Tensor, centers: Tensor, neighbors: Tensor, vectors: Tensor
    ) -> Tensor:
        """Return (n_owned, 4), float64; ``features`` are those of owned atoms."""
        return self.of(
            surroundings(features, species, centers, neighbors, vectors, self.num_species, self.cutoff)
        )

    def of(self, atoms: Surroundings) -> Tensor:
        """Scores of atoms whose surroundings are known."""
        own = atoms.species
        covered = self.covered.index_select(0, own)
        ratios = self.shortest.index_select(0, own) / atoms.closest
        close = torch.where(atoms.closest < self.cutoff, ratios, torch.zeros_like(ratios)).amax(dim=1)
        far = atoms.closest.amin(dim=1) / self.nearest.index_select(0, own)
        middle, half = self.middle.index_select(0, own), self.half_width.index_select(0, own)
        coordination = (atoms.coordination - middle).abs() / half
        features = torch.zeros_like(covered)
        for key, ball in self.balls.items():
            chosen = (own == int(key)).nonzero().flatten()
            distance = ball(atoms.features.index_select(0, chosen)) / self.distances[int(key)]
            features = features.index_copy(0, chosen, distance)
        known = covered == 0
        distance, coordination = (
            torch.where(known, x, torch.zeros_like(x)) for x in (torch.maximum(close, far), coordination)
        )
        return torch.stack([covered, distance, coordination, features], dim=1)


@dataclass(frozen=True)
class FittedTrust:
    """A trust region: what computes scores, and what the file says about it."""

    scores: Scores
    region: TrustRegion

    @torch.no_grad()
    def check(
        self, compiled: TrustScores, module: nn.Module, graphs: Sequence[GraphBatch], precision: Precision
    ) -> None:
        """Compare what the file computes with what the module does.

        Raises
        ------
        SelfCheckError
            If they differ.
        """
        for graph in graphs:
            given = graph.to(dtype=input_dtype(precision))
            inputs = given.species, given.centers, given.neighbors, given.vectors
            with matmul_precision():
                features = module.descriptors(*inputs)  # type: ignore[operator]
                found, expected = compiled(*inputs), self.scores(features, *inputs)
            if not torch.allclose(found, expected, rtol=1e-3, atol=1e-3, equal_nan=True):
                raise SelfCheckError(
                    "the compiled model scores atoms by its trust region otherwise than the original. "
                    "Nothing was written."
                )


@torch.no_grad()
def fit(module: nn.Module, spec: ModelSpec, graphs: Sequence[GraphBatch]) -> FittedTrust | None:
    """Make the trust region of a module with ``descriptors``; None if no species has enough atoms.

    Parameters
    ----------
    module
        What is going to be compiled, in its final precision.
    spec
        Of the model.
    graphs
        The calibration set, one structure each, with edge vectors in the dtype that the module takes.

    Raises
    ------
    InputError
        If features are not finite.
    """
    num_species = len(spec.species)
    used = [graph for graph in graphs if len(graph.centers)]
    parts = []
    for graph in used:
        inputs = graph.species, graph.centers, graph.neighbors, graph.vectors
        features = module.descriptors(*inputs)  # type: ignore[operator]
        if not features.isfinite().all():
            raise InputError(
                f"the model's features are not finite for a calibration structure of {len(graph.species)} "
                "atoms. Leave out structures with atoms very close; if all are sound, the model is broken."
            )
        parts.append(surroundings(features, *inputs, num_species, spec.cutoff))
    counts = [int(sum((part.species == s).sum() for part in parts)) for s in range(num_species)]
    covered = [s for s, count in enumerate(counts) if count >= MIN_ATOMS]
    if not covered:
        return None
    everything = _joined(parts)
    fold = _folds([len(part.species) for part in parts])
    distances = {s: _feature_distance(everything, fold, s) for s in covered}
    scores = Scores(everything, num_species, spec.cutoff, distances).eval()
    region = TrustRegion(
        num_structures=len(used),
        num_atoms=len(fold),
        species={spec.species[s]: _species_region(scores, s, counts[s]) for s in distances},
        shortest=_shortest_pairs(scores, spec),
        held_out=_held_out(everything, fold, scores),
    )
    return FittedTrust(scores, region)


def _joined(parts: Sequence[Surroundings]) -> Surroundings:
    names = Surroundings.__dataclass_fields__
    return Surroundings(*(torch.cat([getattr(part, name) for part in parts]) for name in names))


def _folds(sizes: Sequence[int]) -> Tensor:
    """Fold of each atom; atoms of one structure stay together, unless there is only one structure."""
    if len(sizes) == 1:
        return torch.arange(sizes[0]) % FOLDS
    return torch.repeat_interleave(torch.arange(len(sizes)) % FOLDS, torch.tensor(sizes))


def _feature_distance(atoms: Surroundings, fold: Tensor, s: int) -> float:
    """Largest distance allowed, from atoms that the mean and the covariance have not seen."""
    mine = atoms.species == s
    count = int(mine.sum())
    if count - max(int((fold[mine] == k).sum()) for k in range(FOLDS)) < MIN_ATOMS // 2:
        fold = torch.cumsum(mine.long(), 0) % FOLDS  # most are in one structure: split that
    found = []
    for k in fold[mine].unique():
        held = mine & (fold == k)
        found.append(Ball(atoms.features[mine & ~held])(atoms.features[held]))
    held_out = torch.cat(found)
    limit = torch.minimum(FEATURE_MARGIN * held_out.quantile(QUANTILE), FURTHEST * held_out.median())
    # At least 1, for structures that repeat each other: only rounding tells their features apart.
    return max(float(limit), 1.0)


def _held_out(atoms: Surroundings, fold: Tensor, scores: Scores) -> float:
    """Fraction of atoms outside the region that the other folds make."""
    outside = 0
    for k in fold.unique():
        others, held = atoms.at(fold != k), atoms.at(fold == k)
        distances = {s: d for s, d in scores.distances.items() if int((others.species == s).sum()) >= 2}
        made = Scores(others, scores.num_species, scores.cutoff, distances)
        outside += int((~(made.of(held) <= 1)).any(dim=1).sum())
    return outside / len(fold)


def _species_region(scores: Scores, s: int, count: int) -> SpeciesRegion:
    limits, ball = scores.limits[s], scores.balls[str(s)]
    assert isinstance(ball, Ball)
    return SpeciesRegion(
        num_atoms=count,
        nearest=limits.nearest,
        coordination=limits.coordination,
        directions=ball.directions.shape[1],
        feature_distance=scores.distances[s],
    )


def _shortest_pairs(scores: Scores, spec: ModelSpec) -> dict[str, float]:
    return {
        f"{spec.species[i]}-{spec.species[j]}": float(scores.shortest[i, j])
        for i in scores.distances
        for j in range(len(spec.species))
        if (j >= i or j not in scores.distances) and scores.shortest[i, j] < spec.cutoff
    }
