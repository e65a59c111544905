"""The convolution with tabulated radial weights, against the same in plain PyTorch."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pytest
import torch
from torch import Tensor

from compactmlip.kernels.spline_convolution import (
    Path,
    SplineStructure,
    flops,
    hermite_weights,
    interpolate,
    operations,
    spline_convolve_reference,
    spline_structure,
)

pytestmark = pytest.mark.usefixtures("kernels")

CUTOFF = 4.0


def paths_up_to(l1: int, l2: int, l3: int, *, odd: bool = True) -> list[Path]:
    return [
        (a, b, c)
        for a in range(l1 + 1)
        for b in range(l2 + 1)
        for c in range(abs(a - b), min(a + b, l3) + 1)
        if odd or (a + b + c) % 2 == 0
    ]


@dataclass
class Case:
    """Arguments of one convolution."""

    shape: SplineStructure
    channels: list[int]
    vectors: Tensor
    features: list[Tensor]
    species: Tensor
    centers: Tensor
    neighbors: Tensor
    table: Tensor
    pairs: Tensor
    solid: bool = False
    kink: tuple[float, int] = (0.0, 0)

    def run(self, vectors: Tensor, features: list[Tensor], *, reference: bool = False) -> list[Tensor]:
        graph = (self.species, self.centers, self.neighbors, self.table, self.pairs)
        if reference:
            return spline_convolve_reference(
                vectors, features, *graph, self.shape, self.channels, CUTOFF, *self.kink, solid=self.solid
            )
        coefficients = torch.tensor(self.shape.coefficients).to(vectors.dtype)
        paths = [l for path in self.shape.paths for l in path]
        found: list[Tensor] = torch.ops.compactmlip.spline_convolve(
            vectors,
            features,
            *graph,
            torch.tensor(self.shape.structure),
            coefficients,
            paths,
            self.channels,
            CUTOFF,
            *self.kink,
        )
        return found

    def values_and_gradients(self, *, reference: bool = False) -> list[Tensor]:
        vectors = self.vectors.clone().requires_grad_()
        features = [f.detach().clone().requires_grad_() for f in self.features]
        messages = self.run(vectors, features, reference=reference)
        generator = torch.Generator().manual_seed(5)
        loss = torch.zeros((), dtype=vectors.dtype)
        for m in messages:
            loss = loss + (m * torch.randn(m.shape, generator=generator, dtype=m.dtype)).sum()
        gradients = torch.autograd.grad(loss, [vectors, *features], allow_unused=True)
        zeros = map(torch.zeros_like, [vectors, *features])
        return [m.detach() for m in messages] + [
            z if g is None else g for g, z in zip(gradients, zeros, strict=True)
        ]


def make_case(
    paths: list[Path],
    widths: list[int],
    lmax: int,
    *,
    dtype: torch.dtype = torch.float64,
    num_nodes: int = 12,
    num_edges: int = 150,
    values: int = 3,
    num_species: int = 2,
    solid: bool = False,
    unit_channels: list[int] | None = None,
    kink: tuple[float, int] = (0.0, 0),
    seed: int = 0,
) -> Case:
    generator = torch.Generator().manual_seed(seed)

    def normal(*size: int) -> Tensor:
        return torch.randn(size, generator=generator, dtype=torch.float64).to(dtype)

    def integers(high: int, size: tuple[int, ...]) -> Tensor:
        return torch.randint(0, high, size, generator=generator)

    shape = spline_structure(paths, lmax, solid=solid, values_per_knot=values)
    channels = unit_channels or [widths[p[0]] for p in shape.paths]
    orders = [] if unit_channels else range(1 + max((p[0] for p in paths), default=-1))
    features = [normal(num_nodes, 2 * l + 1, widths[l]) for l in orders]
    # Each order is part of a wider tensor: rows are apart from each other.
    features = [torch.cat([f, f], dim=-1)[..., : f.shape[-1]] for f in features]
    return Case(
        shape,
        channels,
        normal(num_edges, 3) * 1.7,
        features,
        integers(num_species, (num_nodes,)),
        integers(num_nodes, (num_edges,)).sort().values,
        integers(num_nodes, (num_edges,)),
        normal(num_species**2, 9, values, sum(channels)),
        torch.arange(num_species**2).reshape(num_species, num_species),
        solid,
        kink,
    )


def assert_close(found: list[Tensor], expected: list[Tensor], tolerance: float) -> None:
    assert len(found) == len(expected) > 1
    for a, b in zip(found, expected, strict=True):
        assert a.shape == b.shape
        if b.numel():
            scale = max(float(b.abs().max()), 1e-3)
            assert float((a - b).abs().max()) <= tolerance * scale


CASES = {
    "scalars": dict(paths=paths_up_to(0, 3, 3), widths=[24], lmax=3),
    "natural parity": dict(paths=paths_up_to(2, 3, 3, odd=False), widths=[16, 8, 8], lmax=3),
    "all paths to l=3": dict(paths=paths_up_to(3, 3, 3), widths=[32, 16, 8, 8], lmax=3),
    "high orders": dict(paths=paths_up_to(4, 5, 5), widths=[8, 8, 8, 8, 8], lmax=5),
    "one path": dict(paths=[(1, 3, 2)], widths=[8, 8], lmax=3),
    "solid harmonics": dict(paths=paths_up_to(1, 2, 2), widths=[8, 24], lmax=3, solid=True),
    "species as features": dict(paths=paths_up_to(0, 3, 3), widths=[], lmax=3, unit_channels=[40, 16, 8, 24]),
    "high orders without features": dict(paths=[(0, 5, 5)], widths=[], lmax=5, unit_channels=[8]),
    "kink": dict(paths=paths_up_to(2, 3, 3, odd=False), widths=[16, 8, 8], lmax=3, kink=(2.3, 4)),
    "no harmonics": dict(paths=[(0, 0, 0)], widths=[8], lmax=0),
}


@pytest.mark.parametrize("values", [2, 3], ids=["cubic", "quintic"])
@pytest.mark.parametrize("name", CASES)
def test_equals_reference(name: str, values: int) -> None:
    case = make_case(**CASES[name], values=values)  # type: ignore[arg-type]
    assert_close(case.values_and_gradients(), case.values_and_gradients(reference=True), 1e-12)


@pytest.mark.parametrize("name", ["natural parity", "species as features"])
def test_float32(name: str) -> None:
    case = make_case(**CASES[name], dtype=torch.float32)  # type: ignore[arg-type]
    assert_close(case.values_and_gradients(), case.values_and_gradients(reference=True), 1e-5)


@pytest.mark.parametrize("seed", range(12))
def test_random_shapes(seed: int) -> None:
    rng = np.random.default_rng(seed)
    lmax = int(rng.integers(0, 5))
    every = paths_up_to(int(rng.integers(0, 4)), lmax, int(rng.integers(0, 5)))
    paths = [every[k] for k in rng.permutation(len(every))[: rng.integers(1, len(every) + 1)]]
    widths = [8 * int(rng.integers(1, 6)) for _ in range(4)]
    case = make_case(
        paths, widths, lmax, num_nodes=int(rng.integers(1, 20)), num_edges=int(rng.integers(1, 80)), seed=seed
    )
    assert_close(case.values_and_gradients(), case.values_and_gradients(reference=True), 1e-12)


@pytest.mark.parametrize(("nodes", "edges"), [(1, 0), (0, 0), (5, 0), (1, 1), (2, 9), (40, 17)])
def test_few_edges(nodes: int, edges: int) -> None:
    """Nodes without edges get zeros, whatever the memory held before."""
    torch.full((4096,), float("nan"))
    case = make_case(paths_up_to(1, 2, 2), [8, 8], 2, num_nodes=max(nodes, 1), num_edges=edges)
    if nodes == 0:
        case.species, case.features = case.species[:0], [f[:0] for f in case.features]
    assert_close(case.values_and_gradients(), case.values_and_gradients(reference=True), 1e-12)


def test_unsorted_edges() -> None:
    case = make_case(paths_up_to(1, 2, 2), [8, 8], 2)
    expected = case.values_and_gradients()
    order = torch.randperm(len(case.centers), generator=torch.Generator().manual_seed(1))
    case.centers, case.neighbors, case.vectors = (
        case.centers[order],
        case.neighbors[order],
        case.vectors[order],
    )
    found = case.values_and_gradients()
    vectors = len(found) - 3
    expected[vectors] = expected[vectors][order]
    assert_close(found, expected, 1e-12)


def test_gradcheck() -> None:
    case = make_case(
        paths_up_to(1, 2, 1), [8, 8], 2, num_nodes=3, num_edges=7, num_species=1, values=3, seed=3
    )

    def function(vectors: Tensor, *features: Tensor) -> tuple[Tensor, ...]:
        return tuple(case.run(vectors, list(features)))

    inputs = [case.vectors.requires_grad_(), *(f.contiguous().requires_grad_() for f in case.features)]
    assert torch.autograd.gradcheck(function, inputs, fast_mode=True)


def test_zero_and_smooth_beyond_the_cutoff() -> None:
    case = make_case(paths_up_to(0, 1, 1), [8], 1, num_nodes=2, num_edges=2)
    case.table[:, -1] = 0
    case.vectors = torch.tensor([[CUTOFF, 0, 0], [0, 0, CUTOFF + 3]], dtype=torch.float64)
    assert all(float(x.abs().max()) == 0 for x in case.values_and_gradients())


def test_not_a_number_stays_one() -> None:
    """A broken position must not look like a neighbour beyond the cutoff."""
    case = make_case(paths_up_to(0, 1, 1), [8], 1, num_nodes=2, num_edges=2)
    case.vectors[0, 1] = float("nan")
    messages = case.run(case.vectors, case.features)
    assert messages[0][case.centers[0]].isnan().any()


@pytest.mark.parametrize("name", ["all paths to l=3", "species as features"])
def test_threads(name: str) -> None:
    """Bits repeat at each number of threads; between them only rounding may differ."""
    check_threads(make_case(**CASES[name], num_nodes=170, num_edges=4000))  # type: ignore[arg-type]


def test_threads_with_many_features() -> None:
    """Where a copy of the gradients for each thread would be too large: blocks of centres, and a rest."""
    case = make_case(paths_up_to(3, 0, 3), [64] * 4, 1, num_nodes=8_501, num_edges=20_000)
    assert 8_501 * 64 * 16 * 8 > 64 << 20
    check_threads(case)


def check_threads(case: Case) -> None:
    before, found = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            first, again = case.values_and_gradients(), case.values_and_gradients()
            assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
            found.append(first)
    finally:
        torch.set_num_threads(before)
    for other in found[1:]:
        assert_close(other, found[0], 1e-12)


def test_a_million_edges() -> None:
    """Every node has the same neighbourhood, so every message is the same."""
    nodes, edges = 20_000, 50
    case = make_case(paths_up_to(0, 1, 1), [8], 1, num_nodes=1, num_edges=edges, num_species=1)
    expected = case.run(case.vectors, case.features)
    case.species = case.species.repeat(nodes)
    case.centers = torch.arange(nodes).repeat_interleave(edges)
    case.neighbors = torch.randint(0, nodes, (nodes * edges,), generator=torch.Generator().manual_seed(0))
    found = case.run(case.vectors.repeat(nodes, 1), [f.expand(nodes, -1, -1) for f in case.features])
    for a, b in zip(found, expected, strict=True):
        assert float((a - b).abs().max()) <= 1e-12 * float(b.abs().max())


def test_second_derivatives_are_refused() -> None:
    case = make_case(paths_up_to(0, 1, 1), [8], 1)
    vectors = case.vectors.requires_grad_()
    total = sum(m.sum() for m in case.run(vectors, case.features))
    assert isinstance(total, Tensor)
    with pytest.raises(RuntimeError, match="no second derivatives"):
        torch.autograd.grad(total, vectors, create_graph=True)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(channels=[2, 2], table=torch.zeros(4, 9, 3, 4).double()), "not a multiple"),
        (dict(table=torch.zeros(4, 9, 3, 8, dtype=torch.float64)), "the table must have"),
        (dict(table=torch.zeros(4, 9, 3, 16)), "must have one type"),
        (dict(species=torch.full((12,), 2)), "has species 2"),
        (dict(pairs=torch.full((2, 2), 4)), "not in the table"),
        (dict(neighbors=torch.full((150,), 12)), "number of nodes"),
        (dict(kink=(CUTOFF, 4)), "a kink must be below the cutoff"),
        (dict(kink=(2.0, 8)), "at least two of 9 knots"),
        (dict(kink=(0.0, 3)), "a kink must be"),
        (dict(kink=(2.0, -1)), "a kink must be"),
        (dict(features=[torch.zeros(12, 1, 16, dtype=torch.float64)]), "features of order 0"),
        (dict(features=[torch.zeros(12, 3, 8, dtype=torch.float64)]), "features of order 0"),
    ],
)
def test_bad_arguments(change: dict[str, object], message: str) -> None:
    case = make_case(paths_up_to(0, 1, 1), [8], 1)
    for name, value in change.items():
        setattr(case, name, value)
    with pytest.raises((RuntimeError, ValueError, IndexError), match=message):
        case.run(case.vectors, case.features)


@pytest.mark.parametrize("values", [2, 3])
def test_interpolation_is_exact_for_polynomials(values: int) -> None:
    """Cubic and quintic polynomials are reproduced between knots, with their derivatives."""
    degree, knots = 2 * values - 1, 5
    coefficients = np.random.default_rng(0).normal(size=degree + 1)
    polynomial = np.polynomial.Polynomial(coefficients)
    spacing = CUTOFF / (knots - 1)
    r = np.arange(knots) * spacing
    rows = [polynomial.deriv(k)(r) * spacing**k if k else polynomial(r) for k in range(values)]
    table = torch.tensor(np.stack(rows, axis=1))[None, :, :, None]
    at = torch.linspace(0.01, CUTOFF - 0.01, 37, dtype=torch.float64).requires_grad_()
    found = interpolate(table, torch.zeros(37, dtype=torch.long), at, CUTOFF)[:, 0]
    (slope,) = torch.autograd.grad(found.sum(), at)
    np.testing.assert_allclose(found.detach(), polynomial(at.detach().numpy()), rtol=1e-11)
    np.testing.assert_allclose(slope, polynomial.deriv()(at.detach().numpy()), rtol=1e-10)


def test_interpolation_with_a_kink_is_exact_on_both_sides() -> None:
    """Two polynomials that meet with value and slope, and differ in their second derivatives."""
    kink, step = 1.7, np.polynomial.Polynomial([-1.7, 1.0])
    left = np.polynomial.Polynomial(np.random.default_rng(0).normal(size=6))
    right = left + 3 * step**2 - step**4
    rows = []
    for polynomial, start, end, knots in ((left, 0.0, kink, 4), (right, kink, CUTOFF, 3)):
        spacing = (end - start) / (knots - 1)
        r = start + np.arange(knots) * spacing
        values = [polynomial.deriv(k)(r) * spacing**k if k else polynomial(r) for k in range(3)]
        rows.append(np.stack(values, axis=1))
    table = torch.tensor(np.concatenate(rows))[None, :, :, None]
    at = torch.cat([torch.linspace(0.01, CUTOFF - 0.01, 38), torch.tensor([kink])]).double().requires_grad_()
    found = interpolate(table, torch.zeros(39, dtype=torch.long), at, CUTOFF, kink, 4)[:, 0]
    (slope,) = torch.autograd.grad(found.sum(), at)
    r = at.detach().numpy()
    np.testing.assert_allclose(found.detach(), np.where(r < kink, left(r), right(r)), rtol=1e-10)
    np.testing.assert_allclose(
        slope, np.where(r < kink, left.deriv()(r), right.deriv()(r)), rtol=1e-9, atol=1e-9
    )


def test_files_of_earlier_releases_do_not_name_a_kink() -> None:
    case = make_case(paths_up_to(1, 2, 2), [8, 8], 2)
    arguments = [
        case.vectors,
        case.features,
        case.species,
        case.centers,
        case.neighbors,
        case.table,
        case.pairs,
    ]
    found = torch.ops.compactmlip.spline_convolve(
        *arguments,
        torch.tensor(case.shape.structure),
        torch.tensor(case.shape.coefficients),
        [l for path in case.shape.paths for l in path],
        case.channels,
        CUTOFF,
    )
    assert all(torch.equal(a, b) for a, b in zip(found, case.run(case.vectors, case.features), strict=True))


def test_weights_sum_to_one() -> None:
    u = torch.linspace(0, 1, 9, dtype=torch.float64)
    for values in (2, 3):
        weights = hermite_weights(u, values)
        assert torch.allclose(weights[:, 0] + weights[:, values], torch.ones(9, dtype=torch.float64))


def test_operations_by_hand() -> None:
    """One path with 3 rows and 1 component, 8 channels, cubic: 4 knot values."""
    shape = spline_structure([(0, 1, 1)], 1, values_per_knot=2)
    assert operations(shape, [8], unit=True) == (8 * (8 + 6), 8 * (16 + 12 + 2))


def test_operations_without_direction_by_hand() -> None:
    """The same with l2 = 0: three components that do not mix."""
    shape = spline_structure([(1, 0, 1)], 1, values_per_knot=2)
    assert operations(shape, [8], unit=False) == (8 * (8 + 9), 8 * (16 + 15 + 2))


def test_meta() -> None:
    """Shapes without numbers, as exporters ask for them."""
    case = make_case(paths_up_to(1, 2, 2), [8, 16], 2)
    expected = [m.shape for m in case.run(case.vectors, case.features)]
    meta = {k: v.to("meta") for k, v in vars(case).items() if isinstance(v, Tensor)}
    found = torch.ops.compactmlip.spline_convolve(
        meta["vectors"],
        [f.to("meta") for f in case.features],
        meta["species"],
        meta["centers"],
        meta["neighbors"],
        meta["table"],
        meta["pairs"],
        torch.tensor(case.shape.structure).to("meta"),
        torch.tensor(case.shape.coefficients).to("meta"),
        [l for path in case.shape.paths for l in path],
        case.channels,
        CUTOFF,
    )
    assert [m.shape for m in found] == expected


def test_flops_of_a_call() -> None:
    """What benchmarks count, from the arguments that a profiler sees."""
    edges = 7
    arguments = [
        torch.zeros(edges, 3),
        [],
        *[None] * 3,
        torch.zeros(1, 9, 2, 8),
        *[None] * 3,
        [0, 1, 1],
        [8],
        4.0,
    ]
    assert flops("compactmlip::spline_convolve", arguments) == edges * 8 * (8 + 6)
    assert flops("compactmlip::spline_convolve_backward", [[], *arguments, True]) == edges * 8 * 30
    assert flops("aten::mm", []) is None
