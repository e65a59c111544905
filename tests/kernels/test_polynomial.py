"""Segmented polynomials: values, gradients, cuequivariance's own evaluation, its CUDA interface."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch
from cueq_standin import emulate_uniform_1d
from torch import Tensor

from compactmlip.errors import KernelError
from compactmlip.kernels import polynomial as plain, polynomial_operator as operator
from compactmlip.kernels.polynomial import Operand, PlainPolynomial, Polynomial, Products

N, E = 5, 11
CENTERS, NEIGHBORS = torch.arange(E) * 3 % N, torch.arange(E) * 2 % N


def coupled() -> Polynomial:
    """Two segments of features, three harmonics, one radial weight; three segments of messages."""
    rows = np.array([[0, 0, 0, 1], [1, 2, 0, 1], [1, 1, 0, 0], [0, 1, 0, 2]])
    products = Products((0, 1, 2, 3), rows, np.array([0.5, 1.5, -1.0, 2.0]))
    return Polynomial((Operand(2, 4), Operand(3), Operand(1, 4)), (Operand(3, 4),), (products,))


def powers() -> Polynomial:
    """Weights times products of one to three of the same features; the last segment of each is not used."""
    cubic = np.array([[0, 0, 0, 1, 0], [0, 1, 1, 1, 1], [1, 0, 1, 2, 1]])
    square, linear = np.array([[1, 0, 0, 1], [2, 1, 2, 0]]), np.array([[2, 2, 1]])
    return Polynomial(
        (Operand(4, 3), Operand(4, 3)),
        (Operand(3, 3),),
        (
            Products((0, 1, 2), linear, np.array([0.7])),
            Products((0, 1, 1, 2), square, np.array([1.1, -0.4])),
            Products((0, 1, 1, 1, 2), cubic, np.array([1.0, 0.3, -2.0])),
        ),
    )


def tensors(polynomial: Polynomial, rows: Sequence[int], seed: int = 0) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [
        torch.randn(n, o.size, generator=generator, dtype=torch.float64).requires_grad_()
        for n, o in zip(rows, polynomial.inputs, strict=True)
    ]


def call(
    polynomial: Polynomial, inputs: list[Tensor], indices: list[Tensor], where: list[int], rows: int
) -> Tensor:
    (size,) = (o.size for o in polynomial.outputs)
    like = torch.empty(rows, 0)
    found: Tensor = torch.ops.compactmlip.polynomial(
        inputs, indices, where, like, *polynomial.encoded(), size
    )
    return found


def messages(x: Tensor, y: Tensor, w: Tensor) -> Tensor:
    return call(coupled(), [x, y, w], [CENTERS, NEIGHBORS], [1, -1, -1, 0], N)


SPECIES = torch.tensor([0, 2, 1, 2, 0])


def contracted(w: Tensor, x: Tensor) -> Tensor:
    return call(powers(), [w, x], [SPECIES], [0, -1, -1], N)


def test_values_written_out() -> None:
    x, y, w = tensors(coupled(), (N, E, E))
    sent = x.view(N, 2, 4)[NEIGHBORS]
    edges = [
        -sent[:, 1] * y[:, 1:2] * w,
        0.5 * sent[:, 0] * y[:, :1] * w + 1.5 * sent[:, 1] * y[:, 2:] * w,
        2 * sent[:, 0] * y[:, 1:2] * w,
    ]
    expected = torch.zeros(N, 3, 4, dtype=torch.float64).index_add(0, CENTERS, torch.stack(edges, 1))
    torch.testing.assert_close(messages(x, y, w), expected.flatten(1), rtol=1e-13, atol=1e-13)
    v, z = tensors(powers(), (3, N), seed=1)
    a, b, c, _ = z.view(N, 4, 3).unbind(1)
    u = v.view(3, 4, 3)[SPECIES]
    out = torch.stack(
        [
            u[:, 0] * a * a * b - 0.4 * u[:, 2] * b * c,
            0.7 * u[:, 2] * c + 1.1 * u[:, 1] * a * a + 0.3 * u[:, 0] * b**3 - 2 * u[:, 1] * a * b * c,
            torch.zeros_like(a),
        ],
        dim=1,
    )
    torch.testing.assert_close(contracted(v, z), out.flatten(1), rtol=1e-13, atol=1e-13)


def test_derivatives() -> None:
    edges = tuple(tensors(coupled(), (N, E, E)))
    atoms = tuple(tensors(powers(), (3, N)))
    for function, inputs in ((messages, edges), (contracted, atoms)):
        assert torch.autograd.gradcheck(function, inputs)
        assert torch.autograd.gradgradcheck(function, inputs)
    # The features alone, as in a deployed file.
    weights = atoms[0].detach()
    assert torch.autograd.gradcheck(lambda x: contracted(weights, x), atoms[1:])


def test_gradients_have_no_product_twice() -> None:
    """The three derivatives of a a b by its factors are two products: 2 a b and a a."""
    gradient = powers().gradient([False, True])
    (cubic,) = (part for part in gradient.products if len(part.operands) == 5)
    found = {tuple(row): float(c) for row, c in zip(cubic.segments, cubic.coefficients, strict=True)}
    expected = {(0, 0, 1, 0, 0): 2.0, (0, 0, 0, 0, 1): 1.0, (0, 1, 1, 1, 1): 0.9}
    expected |= {(1, 1, 2, 1, 0): -2.0, (1, 0, 2, 1, 1): -2.0, (1, 0, 1, 1, 2): -2.0}
    assert found == pytest.approx(expected)


def test_one_row_for_all() -> None:
    w, x = tensors(powers(), (1, N))

    def function(w: Tensor, x: Tensor) -> Tensor:
        return call(powers(), [w, x], [], [-1, -1, -1], N)

    expected = call(powers(), [w.expand(N, -1), x], [], [-1, -1, -1], N)
    torch.testing.assert_close(function(w, x), expected, rtol=1e-14, atol=1e-14)
    assert torch.autograd.gradcheck(function, (w, x))


@pytest.mark.parametrize(("atoms", "edges"), [(4, 0), (1, 1), (1, 3), (0, 0)])
def test_few_rows(atoms: int, edges: int) -> None:
    x, y, w = tensors(coupled(), (atoms, edges, edges))
    ends = torch.zeros(edges, dtype=torch.long)
    out = call(coupled(), [x, y, w], [ends, ends], [1, -1, -1, 0], atoms)
    assert out.shape == (atoms, 12)
    expected = torch.zeros(atoms, 12, dtype=torch.float64)
    for e in range(edges):
        one = call(coupled(), [x[:1], y[e : e + 1], w[e : e + 1]], [], [-1] * 4, 1)
        expected = expected + one
    torch.testing.assert_close(out, expected, rtol=1e-13, atol=1e-13)
    gradients = torch.autograd.grad(out.sum(), (x, y, w), allow_unused=False)
    assert [g.shape for g in gradients] == [t.shape for t in (x, y, w)]
    assert bool(edges) == any(bool(g.abs().max() > 0) for g in gradients if g.numel())


def test_pieces_of_any_size(monkeypatch: pytest.MonkeyPatch) -> None:
    """What does not fit an intermediate is added piece by piece."""
    w, x = tensors(powers(), (3, N))
    rows = [w[SPECIES], x]
    whole = PlainPolynomial(powers())(rows, {}, {}, {})[0]
    monkeypatch.setattr(plain, "CHUNK", 1)
    torch.testing.assert_close(PlainPolynomial(powers())(rows, {}, {}, {})[0], whole, rtol=1e-14, atol=1e-14)


def test_numbers_describe_a_polynomial() -> None:
    plan, coefficients, digest = powers().encoded()
    again = Polynomial.decoded(plan, coefficients)
    assert again.encoded()[2] == digest != coupled().encoded()[2]
    assert (again.inputs, again.outputs) == (powers().inputs, powers().outputs)
    other = coefficients.clone()
    other[0] += 1e-15
    assert Polynomial.decoded(plan, other).encoded()[2] != digest
    with pytest.raises(ValueError, match=r"segments of \[3, 4\] columns"):
        Polynomial((Operand(1, 3), Operand(1, 4)), (Operand(1, 4),), ())


def test_operator_needs_no_other_package() -> None:
    code = "import sys; import compactmlip.kernels.polynomial_operator; print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "compactmlip.kernels.polynomial_operator" in done.stdout
    assert not {"cuequivariance", "sympy", "compactmlip.models"} & set(done.stdout.split())


class TestCuequivariance:
    """With cuequivariance, which needs no GPU for this."""

    @pytest.fixture(autouse=True)
    def _package(self) -> None:
        pytest.importorskip("cuequivariance_torch")

    @pytest.mark.parametrize("make", [coupled, powers])
    def test_same_numbers(self, make: Any) -> None:
        """A polynomial, its gradient and the gradient's gradient."""
        polynomial = make()
        for _ in range(3):
            operator.check(polynomial)
            polynomial = polynomial.gradient([True] * len(polynomial.inputs))

    def test_other_numbers_are_an_error(self, monkeypatch: pytest.MonkeyPatch) -> None:
        wrong = operator.to_cuequivariance(coupled()) * (1 + 1e-8)
        monkeypatch.setattr(operator, "to_cuequivariance", lambda _: wrong)
        with pytest.raises(KernelError, match=r"differently, by \d.*0\.13"):
            operator.check(coupled())

    @pytest.mark.filterwarnings("ignore::DeprecationWarning")
    def test_its_own_fallback(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """The method "naive" of cuequivariance-torch takes the same calls and gives the same numbers."""
        edges, atoms = tensors(coupled(), (N, E, E)), tensors(powers(), (3, N))
        expected = [f(*t) for f, t in ((messages, edges), (contracted, atoms))]
        slopes = [
            torch.autograd.grad((f * f).sum(), t) for f, t in zip(expected, (edges, atoms), strict=True)
        ]
        monkeypatch.setattr(operator, "_ready", {})
        monkeypatch.setattr(operator, "method_for", lambda device: "naive")
        for function, inputs, value, slope in zip(
            (messages, contracted), (edges, atoms), expected, slopes, strict=True
        ):
            found = function(*inputs)
            torch.testing.assert_close(found, value, rtol=1e-13, atol=1e-13)
            gradients = torch.autograd.grad((found * found).sum(), inputs)
            torch.testing.assert_close(gradients, slope, rtol=1e-12, atol=1e-12)

    def test_interface_of_the_cuda_code(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """The method "uniform_1d" accepts the polynomials, and its arguments mean what is meant."""
        edges, atoms = tensors(coupled(), (N, E, E)), tensors(powers(), (3, N))
        weights = atoms[0].detach()
        cases = ((messages, edges), (lambda x: contracted(weights, x), atoms[1:]))
        expected = []
        for function, inputs in cases:
            value = function(*inputs)
            expected.append((value.detach(), torch.autograd.grad((value * value).sum(), inputs)))
        calls = emulate_uniform_1d(monkeypatch)
        for (function, inputs), (value, slope) in zip(cases, expected, strict=True):
            found = function(*inputs)
            torch.testing.assert_close(found, value, rtol=1e-13, atol=1e-13)
            gradients = torch.autograd.grad((found * found).sum(), inputs)
            torch.testing.assert_close(gradients, slope, rtol=1e-12, atol=1e-12)
        assert len(calls) == 4 and len(set(calls)) == 4


def test_missing_packages(monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as hidden:
        hidden.setitem(sys.modules, "cuequivariance", None)
        with pytest.raises(KernelError, match="pip install cuequivariance cuequivariance-torch; on NVIDIA"):
            operator.require()
    pytest.importorskip("cuequivariance_torch")
    operator.require()
    with pytest.raises(KernelError, match="pip install cuequivariance-ops-torch-cu13"):
        operator.require("cuda")
