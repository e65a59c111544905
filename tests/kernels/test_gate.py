"""The fused gate against the same in plain PyTorch, with its first derivative."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import pytest
import torch
from torch import Tensor

from compactmlip.kernels.build import without_kernels
from compactmlip.kernels.gate import gate
from compactmlip.models.gate import gate_input_channels
from compactmlip.models.linear import SILU_GAIN

pytestmark = pytest.mark.usefixtures("kernels")

OUT = {
    "scalars": (7,),
    "one order": (16, 8),
    "three orders": (128, 64, 33, 5),
    "a gap": (12, 0, 19),
    "no scalars": (0, 4, 3),
}


def make(out: Sequence[int], atoms: int = 9, dtype: torch.dtype = torch.float64) -> list[Tensor | None]:
    torch.manual_seed(1)
    channels = gate_input_channels(out)
    return [
        (3 * torch.randn(atoms, 2 * l + 1, c, dtype=dtype)).requires_grad_() if c else None
        for l, c in enumerate(channels)
    ]


def values_and_gradients(x: Sequence[Tensor | None], out: Sequence[int], sigmoid: bool) -> list[Tensor]:
    values = [y for y in gate(x, out, sigmoid=sigmoid) if y is not None]
    torch.manual_seed(2)
    grads = [torch.randn_like(y) for y in values]
    variables = [t for t in x if t is not None]
    return [*values, *torch.autograd.grad(values, variables, grads)]


def assert_close(found: Sequence[Tensor], expected: Sequence[Tensor], tolerance: float) -> None:
    assert len(found) == len(expected) > 0
    for a, b in zip(found, expected, strict=True):
        scale = float(b.detach().abs().max()) if b.numel() else 1.0
        torch.testing.assert_close(a, b, rtol=0, atol=tolerance * max(scale, 1.0))


@pytest.mark.parametrize("sigmoid", [False, True], ids=["silu", "sigmoid"])
@pytest.mark.parametrize("atoms", [0, 1, 9, 200])
@pytest.mark.parametrize("out", OUT.values(), ids=OUT.keys())
def test_equals_plain_pytorch(out: Sequence[int], atoms: int, sigmoid: bool) -> None:
    for dtype, tolerance in ((torch.float64, 1e-12), (torch.float32, 1e-6)):
        x = make(out, atoms, dtype)
        found = values_and_gradients(x, out, sigmoid)
        with without_kernels():
            expected = values_and_gradients(x, out, sigmoid)
        assert_close(found, expected, tolerance)


def test_the_kernel_is_what_runs() -> None:
    scalars = gate(make((4, 2)), (4, 2))[0]
    assert scalars is not None and scalars.grad_fn is not None and "Gate" in scalars.grad_fn.name()


@pytest.mark.parametrize(
    ("dtype", "rounding", "limit"), [(torch.float32, 1e-6, 88.0), (torch.float64, 1e-12, 700.0)]
)
def test_range_of_the_activation(dtype: torch.dtype, rounding: float, limit: float) -> None:
    """Relative accuracy wherever the result is a normal number, and no infinities or NaN beyond."""
    z = torch.cat([torch.linspace(-90, 90, 40001), torch.linspace(-1e-3, 1e-3, 2001)]).to(dtype)
    z = torch.cat([z, torch.linspace(-limit, limit, 1001, dtype=dtype)]).reshape(1, 1, -1)
    wide = z.to(torch.float64).requires_grad_()
    expected = torch.nn.functional.silu(wide) * SILU_GAIN
    (slope,) = torch.autograd.grad(expected.sum(), wide)
    z.requires_grad_()
    found = gate([z], [z.shape[2]])[0]
    assert found is not None
    (found_slope,) = torch.autograd.grad(found.sum(), z)
    tiny = torch.finfo(dtype).tiny
    torch.testing.assert_close(found.double(), expected, rtol=rounding, atol=tiny)
    torch.testing.assert_close(found_slope.double(), slope, rtol=rounding, atol=rounding)
    far = torch.tensor([-1e30, -1e4, -746.0, -104.0, 104.0, 746.0, 1e4, 1e30], dtype=dtype).reshape(1, 1, 8)
    for sigmoid in (False, True):
        ones = torch.ones(1, 3, 8, dtype=dtype)
        y = gate([far.requires_grad_(), ones], [0, 8], sigmoid=sigmoid)[1]
        assert y is not None
        assert y.isfinite().all() and torch.autograd.grad(y.sum(), far)[0].isfinite().all()
    nan = gate([torch.full((1, 1, 3), torch.nan, dtype=dtype)], [3])[0]
    assert nan is not None and nan.isnan().all()


def test_views_are_not_copied_wrongly() -> None:
    """Rows of a wider tensor, and channels that are not neighbours in memory."""
    out = (5, 3)
    wide = torch.randn(6, 7, 20, dtype=torch.float64)
    expected = [y for y in gate([wide[:, :1, 2:10].clone(), wide[:, 1:4, 4:7].clone()], out) if y is not None]
    for x in (
        [wide[:, :1, 2:10], wide[:, 1:4, 4:7]],
        [
            wide.transpose(0, 2).contiguous().transpose(0, 2)[:, :1, 2:10],
            wide.transpose(1, 2).contiguous().transpose(1, 2)[:, 1:4, 4:7],
        ],
    ):
        found = [y for y in gate(x, out) if y is not None]
        assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


@pytest.mark.parametrize("sigmoid", [False, True])
def test_gradients_by_finite_differences(sigmoid: bool) -> None:
    out = (3, 2, 2)
    x = [t for t in make(out, 3) if t is not None]

    def f(*x: Tensor) -> tuple[Tensor, ...]:
        return tuple(y for y in gate(x, out, sigmoid=sigmoid) if y is not None)

    assert torch.autograd.gradcheck(f, tuple(x))


@pytest.fixture
def threads() -> Iterator[Callable[[int], None]]:
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


def test_threads(threads: Callable[[int], None]) -> None:
    """Same bits with any number of threads."""
    x = make((20, 9, 6), 300)
    threads(1)
    one = values_and_gradients(x, (20, 9, 6), False)
    for count in (2, 3):
        threads(count)
        many = values_and_gradients(x, (20, 9, 6), False)
        assert all(torch.equal(a, b) for a, b in zip(many, one, strict=True))


def test_part_of_the_results() -> None:
    """A gradient that only some of the results have."""
    x, out = make((4, 3)), (4, 3)
    variables = [t for t in x if t is not None]
    for k in (0, 1):
        results = []
        for off in (False, True):
            with without_kernels() if off else torch.enable_grad():
                y = gate(x, out)[k]
                assert y is not None
                grads = torch.autograd.grad(y.sin().sum(), variables, allow_unused=True)
                results.append(
                    [torch.zeros_like(v) if g is None else g for v, g in zip(variables, grads, strict=True)]
                )
        assert_close(*results, 1e-12)


def test_second_derivatives_are_refused() -> None:
    x = [t for t in make((4, 3)) if t is not None]
    y = gate(x, (4, 3))[1]
    assert y is not None
    (first,) = torch.autograd.grad(y.sum(), x[0], create_graph=True)
    with pytest.raises(RuntimeError, match="first derivatives only"):
        torch.autograd.grad(first.sum(), x[0])


def test_tracing_and_registration() -> None:
    x = [t.detach() for t in make((4, 3)) if t is not None]

    def f(a: Tensor, b: Tensor) -> tuple[Tensor, ...]:
        return tuple(y for y in gate([a, b], (4, 3)) if y is not None)

    traced = torch.jit.trace(f, tuple(x))
    assert "compactmlip::gate" in str(traced.graph)
    other = [torch.randn(2, *t.shape[1:], dtype=t.dtype) for t in x]
    assert all(torch.equal(a, b) for a, b in zip(traced(*other), f(*other), strict=True))
    arguments = (x[0].requires_grad_(), [x[1].requires_grad_()], 4, True, 1.5, 1.25)
    tests, op = ("test_schema", "test_autograd_registration", "test_faketensor"), torch.ops.compactmlip
    torch.library.opcheck(op.gate, arguments, test_utils=tests)
    grads = [torch.randn(9, 1, 4, dtype=torch.float64), torch.randn(9, 3, 3, dtype=torch.float64)]
    torch.library.opcheck(op.gate_backward, (grads, *arguments), test_utils=tests)


@pytest.mark.parametrize(
    ("scalars", "features", "message"),
    [
        (torch.zeros(2, 3, 5), [torch.zeros(2, 3, 2)], "scalars must have shape"),
        (torch.zeros(2, 1, 5), [torch.zeros(2, 3, 4)], "are 7 channels, not 5"),
        (torch.zeros(2, 1, 5), [torch.zeros(3, 3, 2)], "features must have shape"),
        (torch.zeros(2, 1, 5), [torch.zeros(2, 3, 2, dtype=torch.float64)], "dtype Float"),
        (torch.zeros(2, 1, 17), [torch.zeros(2, 3, 2)] * 7, "at most 6"),
    ],
)
def test_wrong_arguments(scalars: Tensor, features: list[Tensor], message: str) -> None:
    with pytest.raises(RuntimeError, match=message):
        torch.ops.compactmlip.gate(scalars, features, 3, False, 1.0, 1.0)
