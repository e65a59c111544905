"""The compiled convolution against the same in plain PyTorch, with derivatives of all orders."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

from compactmlip.kernels.build import without_kernels
from compactmlip.kernels.ops import convolve, convolve_reference

ROWS = (1, 3, 5, 7, 2, 4)
"""Rows per path: sizes that are unrolled, and others."""


pytestmark = pytest.mark.usefixtures("kernels")


@dataclass
class Problem:
    """Random arguments of a convolution."""

    coupling: Tensor
    features: Tensor
    radial: Tensor
    centers: Tensor
    neighbors: Tensor
    path_of_row: list[int]

    @property
    def inputs(self) -> tuple[Tensor, Tensor, Tensor]:
        return self.coupling, self.features, self.radial

    def kernel(self, coupling: Tensor, features: Tensor, radial: Tensor) -> Tensor:
        arguments = (coupling, features, radial, self.centers, self.neighbors, self.path_of_row)
        out: Tensor = torch.ops.compactmlip.convolve(*arguments)
        return out

    def reference(self, coupling: Tensor, features: Tensor, radial: Tensor) -> Tensor:
        index = torch.tensor(self.path_of_row, dtype=torch.long)
        return convolve_reference(coupling, features, radial, self.centers, self.neighbors, index)


def problem(
    nodes: int = 7,
    edges: int = 60,
    components: int = 3,
    channels: int = 16,
    rows: Sequence[int] = ROWS,
    dtype: torch.dtype = torch.float64,
    is_sorted: bool = True,
    seed: int = 0,
) -> Problem:
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        values = torch.randn(*shape, generator=generator, dtype=torch.float64)
        return values.to(dtype).requires_grad_()

    path_of_row = [k for k, n in enumerate(rows) for _ in range(n)]
    centers = torch.randint(0, max(nodes - 1, 1), (edges,), generator=generator)  # the last one is isolated
    return Problem(
        normal(edges, len(path_of_row), components),
        normal(nodes, components, channels),
        normal(edges, len(rows), channels),
        centers.sort().values if is_sorted else centers,
        torch.randint(0, max(nodes, 1), (edges,), generator=generator),
        path_of_row,
    )


def derivatives(f: Callable[..., Tensor], inputs: tuple[Tensor, ...], order: int) -> list[Tensor]:
    """Value and derivatives: each order differentiates a nonlinear function of the one before."""
    found, now = [], [f(*inputs)]
    for k in range(order + 1):
        found += now
        if k < order:
            total = sum((x**3).mean() for x in now)
            now = list(torch.autograd.grad(total, inputs, create_graph=k + 1 < order))
    return [x.detach() for x in found]


def assert_close(found: Sequence[Tensor], expected: Sequence[Tensor], tolerance: float) -> None:
    assert len(found) == len(expected)
    for k, (a, b) in enumerate(zip(found, expected, strict=True)):
        assert a.shape == b.shape and a.dtype == b.dtype
        if b.numel():
            assert float((a - b).abs().max()) <= tolerance * float(b.abs().max()), f"value {k}"


@pytest.mark.parametrize("channels", [1, 5, 16, 24, 35])
@pytest.mark.parametrize("components", [1, 2, 3, 5, 7, 9, 11])
def test_equals_the_reference(components: int, channels: int) -> None:
    given = problem(components=components, channels=channels, seed=components + channels)
    found = derivatives(given.kernel, given.inputs, 2)
    assert_close(found, derivatives(given.reference, given.inputs, 2), 1e-12)


def test_third_derivatives_as_of_losses_on_hessians() -> None:
    given = problem(components=3, channels=8)
    found = derivatives(given.kernel, given.inputs, 3)
    assert_close(found, derivatives(given.reference, given.inputs, 3), 1e-12)


@pytest.mark.parametrize("components", [1, 5])
def test_unsorted_edges(components: int) -> None:
    given = problem(components=components, is_sorted=False)
    found = derivatives(given.kernel, given.inputs, 2)
    assert_close(found, derivatives(given.reference, given.inputs, 2), 1e-12)


def test_float32() -> None:
    exact = problem(edges=300, channels=48)
    given = problem(edges=300, channels=48, dtype=torch.float32)
    found = derivatives(given.kernel, given.inputs, 1)
    expected = derivatives(exact.reference, exact.inputs, 1)
    assert_close([x.double() for x in found], expected, 2e-5)


@pytest.mark.parametrize(("nodes", "edges"), [(0, 0), (1, 0), (4, 0), (1, 1), (2, 1)])
def test_few_or_no_edges(nodes: int, edges: int) -> None:
    given = problem(nodes=nodes, edges=edges, components=3, channels=8)
    found = derivatives(given.kernel, given.inputs, 2)
    assert_close(found, derivatives(given.reference, given.inputs, 2), 1e-12)


def test_isolated_atoms_receive_nothing() -> None:
    given = problem(nodes=9)
    assert given.centers.max() < 8
    assert not given.kernel(*given.inputs)[8].any()


@pytest.mark.parametrize("components", [1, 3, 4])
@pytest.mark.parametrize("channels", [1, 5])
def test_gradients_by_finite_differences(components: int, channels: int) -> None:
    given = problem(nodes=3, edges=5, components=components, channels=channels, rows=(1, 3, 2))
    assert torch.autograd.gradcheck(given.kernel, given.inputs)
    assert torch.autograd.gradgradcheck(given.kernel, given.inputs)


@pytest.mark.parametrize("wanted", [(0,), (1,), (2,), (0, 2), (1, 2)])
def test_only_what_is_wanted_is_computed(wanted: tuple[int, ...]) -> None:
    """Second derivatives where some arguments are constants."""
    given = problem()
    for k, x in enumerate(given.inputs):
        x.requires_grad_(k in wanted)
    results = []
    for f in (given.kernel, given.reference):
        inputs = [given.inputs[k] for k in wanted]
        first = torch.autograd.grad(f(*given.inputs).sin().sum(), inputs, create_graph=True)
        results.append([*first, *torch.autograd.grad(sum(x.sin().sum() for x in first), inputs)])
    assert_close([x.detach() for x in results[0]], [x.detach() for x in results[1]], 1e-12)


def test_some_directions_of_the_second_derivative_may_be_missing() -> None:
    given = problem()
    for k in range(3):
        results = []
        for f in (given.kernel, given.reference):
            out = f(*given.inputs)
            first = torch.autograd.grad(out.sin().sum(), given.inputs[k], create_graph=True)[0]
            results.append(torch.autograd.grad(first.sin().sum(), given.inputs))
        assert_close(results[0], results[1], 1e-12)


def test_slices_and_transposes_need_no_copy_by_the_caller() -> None:
    given = problem(channels=16)
    wide = torch.randn(60, 40 + 6 * 16, dtype=torch.float64)
    radial = wide[:, 40:].unflatten(1, (6, 16))
    coupling = given.coupling.detach().transpose(1, 2).contiguous().transpose(1, 2)
    features = given.features.detach().transpose(0, 1).contiguous().transpose(0, 1)
    inputs = (coupling, features, radial)
    assert not any(x.is_contiguous() for x in inputs)
    assert_close([given.kernel(*inputs)], [given.reference(*inputs)], 1e-12)


@pytest.fixture
def two_threads() -> Iterator[Callable[[], None]]:
    before = torch.get_num_threads()
    yield lambda: torch.set_num_threads(2)
    torch.set_num_threads(before)


def test_same_bits_again_and_with_two_threads(two_threads: Callable[[], None]) -> None:
    given = problem(nodes=60, edges=3000, components=3, channels=32, dtype=torch.float32)
    first = derivatives(given.kernel, given.inputs, 2)
    again = derivatives(given.kernel, given.inputs, 2)
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    direct = given.kernel(*given.inputs)
    gradient = torch.randn_like(direct).detach()
    inputs = [x.detach() for x in given.inputs]
    edges = (given.centers, given.neighbors, given.path_of_row, (True, True, True))
    one = torch.ops.compactmlip.convolve_backward(gradient, *inputs, *edges)
    second = torch.ops.compactmlip.convolve_double_backward(gradient, *inputs, *inputs, *edges)
    two_threads()
    assert torch.equal(direct, given.kernel(*given.inputs))
    two = torch.ops.compactmlip.convolve_backward(gradient, *inputs, *edges)
    assert all(torch.equal(a, b) for a, b in zip(one, two, strict=True))
    two = torch.ops.compactmlip.convolve_double_backward(gradient, *inputs, *inputs, *edges)
    assert all(torch.equal(a, b) for a, b in zip(second, two, strict=True))


def test_torch_knows_the_operators() -> None:
    """Schema, shapes without data, registration of derivatives: what tracing and export rely on."""
    given = problem(channels=4, components=3, rows=(1, 2))
    inputs = [x.detach() for x in given.inputs]
    edges = (given.centers, given.neighbors, given.path_of_row)
    gradient = given.kernel(*inputs)
    tests = ("test_schema", "test_autograd_registration", "test_faketensor")
    op, mask = torch.ops.compactmlip, (True, False, True)
    torch.library.opcheck(op.convolve, (*given.inputs, *edges), test_utils=tests)
    torch.library.opcheck(op.convolve_backward, (gradient, *given.inputs, *edges, mask), test_utils=tests)
    torch.library.opcheck(
        op.convolve_double_backward, (gradient, *inputs, *inputs, *edges, mask), test_utils=tests
    )


def test_wrapper_chooses() -> None:
    given = problem(components=3)
    arguments = (*given.inputs, given.centers, given.neighbors, given.path_of_row)
    assert "Convolve" in convolve(*arguments).grad_fn.name()
    with without_kernels():
        assert "IndexAdd" in convolve(*arguments).grad_fn.name()
    half = [x.detach().to(torch.bfloat16) for x in given.inputs]
    assert convolve(*half, *arguments[3:]).dtype == torch.bfloat16


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"coupling": torch.zeros(60, 22)}, "three axes"),
        ({"coupling": torch.zeros(60, 22, 3)}, "one type"),
        ({"coupling": torch.zeros(60, 22, 5, dtype=torch.float64)}, "5 components and features have 3"),
        ({"coupling": torch.zeros(60, 21, 3, dtype=torch.float64)}, "21 rows"),
        ({"radial": torch.zeros(59, 6, 16, dtype=torch.float64)}, "60, 60, 60 and 59 edges"),
        ({"radial": torch.zeros(60, 6, 8, dtype=torch.float64)}, "8 channels and features have 16"),
        ({"radial": torch.zeros(60, 5, 16, dtype=torch.float64)}, "number of paths"),
        ({"features": torch.zeros(6, 3, 16, dtype=torch.float64)}, "number of nodes"),
        ({"centers": torch.full((60,), -1)}, "number of nodes"),
        ({"neighbors": torch.zeros(60, dtype=torch.int32)}, "int64"),
    ],
)
def test_wrong_arguments(change: dict[str, Tensor], message: str) -> None:
    given = problem(seed=1)
    given.neighbors[0] = 6
    for name, value in change.items():
        setattr(given, name, value)
    with pytest.raises((ValueError, IndexError), match=message):
        given.kernel(*given.inputs)
