"""The contraction with constant weights against the trainable one, with its first derivative."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import numpy as np
import pytest
import torch
from torch import Tensor

from compactmlip.deploy.lower.contraction import FoldedContraction
from compactmlip.kernels.build import without_kernels
from compactmlip.kernels.contraction_folded import contract_folded, contract_folded_reference, fold_weights
from compactmlip.kernels.contraction_program import contraction_program
from compactmlip.kernels.contraction_source import COMPILED, compiled_program, programs_source
from compactmlip.models.contraction import SymmetricContraction

pytestmark = pytest.mark.usefixtures("kernels")

Channels = dict[int, Sequence[int] | None]
CASES: dict[str, tuple[Channels, Channels, int, int]] = {
    "scalars of scalars": ({0: None}, {0: None}, 3, 8),
    "scalars and vectors": ({0: None, 1: None}, {0: None, 1: None}, 3, 16),
    "large": (dict.fromkeys(range(4)), dict.fromkeys(range(3)), 3, 32),
    "energy": (dict.fromkeys(range(4)), {0: None}, 3, 21),
    "two factors": (dict.fromkeys(range(3)), {0: None, 1: None}, 2, 5),
    "some channels": ({0: None, 1: [0, 2, 3, 9], 2: [1]}, {0: [4, 5, 9], 1: [0]}, 3, 10),
    "no program: order 2 alone": ({0: None, 2: None}, {0: None, 2: [0, 3]}, 3, 6),
    "no program: four factors": ({0: None, 1: [1, 2]}, {0: None, 1: None}, 4, 4),
}


def module(case: str, species: int | None = 3) -> SymmetricContraction:
    inputs, outputs, degree, width = CASES[case]
    torch.manual_seed(0)
    return SymmetricContraction(width, inputs, outputs, degree, species)


def arguments(
    contraction: SymmetricContraction, atoms: int, dtype: torch.dtype = torch.float64
) -> tuple[list[Tensor | None], Tensor]:
    torch.manual_seed(1)
    x: list[Tensor | None] = [None] * (max(contraction.orders) + 1)
    for l in contraction.orders:
        index = getattr(contraction, f"input_{l}")
        channels = contraction.width if index is None else len(index)
        x[l] = torch.randn(atoms, 2 * l + 1, channels, dtype=dtype).requires_grad_()
    return x, torch.randint(0, 3, (atoms,))


def in_all_channels(contraction: SymmetricContraction, values: Sequence[Tensor | None]) -> Tensor:
    rows = []
    for L in contraction.outputs:
        value, index = values[L], getattr(contraction, f"output_{L}")
        assert value is not None
        wide = value.new_zeros(value.shape[0], 2 * L + 1, contraction.width)
        rows.append(value if index is None else wide.index_copy(2, index, value))
    return torch.cat(rows, dim=1)


def with_gradients(values: Tensor, x: Sequence[Tensor | None]) -> list[Tensor]:
    torch.manual_seed(2)
    grad = torch.randn(values.shape, dtype=torch.float64).to(values.dtype)
    return [values, *torch.autograd.grad(values, [t for t in x if t is not None], grad)]


def assert_close(found: Sequence[Tensor], expected: Sequence[Tensor], tolerance: float) -> None:
    for a, b in zip(found, expected, strict=True):
        scale = float(b.detach().abs().max()) if b.numel() else 1.0
        torch.testing.assert_close(a.double(), b.double(), rtol=0, atol=tolerance * scale)


@pytest.mark.parametrize("atoms", [0, 1, 50])
@pytest.mark.parametrize("species", [None, 3])
@pytest.mark.parametrize("case", CASES)
def test_equals_the_trainable_contraction(case: str, species: int | None, atoms: int) -> None:
    contraction = module(case, species)
    folded = FoldedContraction(contraction)
    assert folded.compiled == ("no program" not in case)
    x, z = arguments(contraction, atoms)
    found = with_gradients(folded(x, z), x)
    with without_kernels():
        expected = with_gradients(in_all_channels(contraction, contraction(x, z)), x)
        plain = with_gradients(folded(x, z), x)
    assert_close(found, expected, 1e-12)
    assert_close(plain, expected, 1e-12)
    assert found[0].shape == (atoms, folded.rows, folded.width)


@pytest.mark.parametrize("key", COMPILED, ids=str)
def test_every_program_of_the_library(key: tuple[tuple[int, ...], tuple[int, ...], int]) -> None:
    """Values, the gradient and single precision, with channels that leave a part of a vector."""
    orders, outputs, degree = key
    contraction = SymmetricContraction(19, dict.fromkeys(orders), dict.fromkeys(outputs), degree, 3)
    x, z = arguments(contraction, 6)
    with without_kernels():
        expected = with_gradients(in_all_channels(contraction, contraction(x, z)), x)
    folded = FoldedContraction(contraction)
    assert folded.compiled
    assert_close(with_gradients(folded(x, z), x), expected, 1e-12)
    single = [None if t is None else t.detach().float().requires_grad_() for t in x]
    assert_close(with_gradients(folded.float()(single, z), single), expected, 1e-5)


def test_the_kernel_is_what_runs() -> None:
    contraction = module("energy")
    x, z = arguments(contraction, 2)
    node = FoldedContraction(contraction)(x, z).grad_fn
    assert node is not None and "Folded" in node.name()


def test_one_tensor_or_one_per_order() -> None:
    """Stacked features, views of a wider tensor and transposed ones give the same bits."""
    contraction = module("large")
    folded = FoldedContraction(contraction)
    x, z = arguments(contraction, 7)
    expected = folded(x, z)
    stacked = torch.cat([t for t in x if t is not None], dim=1).detach()
    wide = torch.zeros(9, 20, 40, dtype=torch.float64)
    wide[1:8, 2:18, 3:35] = stacked
    for given in (stacked, wide[1:8, 2:18, 3:35], stacked.transpose(0, 2).contiguous().transpose(0, 2)):
        given.requires_grad_() if given.is_leaf else None
        assert torch.equal(folded(given, z), expected)
    stacked.requires_grad_()
    whole = with_gradients(folded(stacked, z), [stacked])[1]
    parts = with_gradients(folded(x, z), x)[1:]
    assert torch.equal(whole, torch.cat(parts, dim=1))


def test_gradients_by_finite_differences() -> None:
    contraction = SymmetricContraction(3, {0: None, 1: None}, {0: None, 1: None}, 3, 2)
    folded, z = FoldedContraction(contraction), torch.tensor([1, 0, 1])
    x = [torch.randn(3, 2 * l + 1, 3, dtype=torch.float64).requires_grad_() for l in (0, 1)]
    assert torch.autograd.gradcheck(lambda *x: folded(x, z), tuple(x))


@pytest.fixture
def threads() -> Iterator[Callable[[int], None]]:
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


def test_threads_and_other_atoms(threads: Callable[[int], None]) -> None:
    """Bits depend neither on the number of threads nor on the other atoms."""
    contraction = module("energy")
    folded = FoldedContraction(contraction)
    x, z = arguments(contraction, 61)
    threads(1)
    one = with_gradients(folded(x, z), x)
    for count in (1, 2, 3):
        threads(count)
        many = with_gradients(folded(x, z), x)
        assert all(torch.equal(a, b) for a, b in zip(many, one, strict=True))
    few = folded([None if t is None else t[40:43] for t in x], z[40:43])
    assert torch.equal(few, one[0][40:43])


def test_second_derivatives_and_weights_are_refused() -> None:
    contraction = module("scalars and vectors")
    folded = FoldedContraction(contraction)
    x, z = arguments(contraction, 4)
    assert x[0] is not None
    (first,) = torch.autograd.grad(folded(x, z).sum(), x[0], create_graph=True)
    with pytest.raises(RuntimeError, match="first derivatives only"):
        torch.autograd.grad(first.sum(), x[0])
    folded.weights.requires_grad_()
    with pytest.raises(RuntimeError, match="no derivatives for its weights"):
        folded(x, z)


def test_tracing_and_registration() -> None:
    contraction = module("scalars and vectors")
    folded = FoldedContraction(contraction)
    x, z = arguments(contraction, 5)
    given = [t.detach() for t in x if t is not None]
    traced = torch.jit.trace(lambda a, b, z: folded([a, b], z), (*given, z))
    assert "compactmlip::contract_folded" in str(traced.graph)
    more, other = arguments(contraction, 9)
    assert torch.equal(traced(*more, other), folded(more, other))
    tests, op = ("test_schema", "test_autograd_registration", "test_faketensor"), torch.ops.compactmlip
    program = folded.program
    assert program is not None
    leaves = [t.requires_grad_() for t in given]
    last = (folded.weights, z, program.identity)
    torch.library.opcheck(op.contract_folded, (leaves, *last, program.rows), test_utils=tests)
    grad = torch.randn(5, program.rows, 16, dtype=torch.float64)
    torch.library.opcheck(op.contract_folded_backward, (grad, leaves, *last), test_utils=tests)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x": []}, "1 to 6 tensors|must be tensors"),
        ({"x": [torch.zeros(5, 3, 6, dtype=torch.float64)]}, "4 components, not 3"),
        ({"x": [torch.zeros(5, 4, 6)]}, "the weights' dtype Double"),
        ({"x": [torch.zeros(5, 1, 1, dtype=torch.float64)] * 7}, "at most 6"),
        ({"weights": torch.zeros(3, 1, 2, 16, dtype=torch.float64)}, "weights must have shape"),
        ({"species": torch.zeros(4, dtype=torch.int64)}, "species must be 5 int64"),
        ({"species": torch.tensor([0, 1, 2, 3, 0])}, "atom 3 has species 3"),
        ({"program": 5}, "no program 5"),
        ({"rows": 3}, "4 rows, not 3"),
    ],
)
def test_wrong_arguments(change: dict[str, object], message: str) -> None:
    program = contraction_program((0, 1), (0, 1), 3)
    assert program is not None
    given: dict[str, object] = {
        "x": [torch.zeros(5, 4, 6, dtype=torch.float64)],
        "weights": torch.zeros(3, 1, program.mixing.shape[1], 16, dtype=torch.float64),
        "species": torch.zeros(5, dtype=torch.int64),
        "program": program.identity,
        "rows": program.rows,
    }
    with pytest.raises((RuntimeError, IndexError), match=message):
        torch.ops.compactmlip.contract_folded(*(given | change).values())


def test_programs_do_not_change_unnoticed() -> None:
    """Their identities differ, and they are the same in every process: files name them."""

    def found() -> list[int]:
        return [program.identity for key in COMPILED if (program := contraction_program(*key))]

    identities = found()
    assert len(set(identities)) == len(COMPILED)
    contraction_program.cache_clear()
    assert found() == identities
    source = programs_source()
    assert all(f"{{{identity}LL" in source for identity in identities)


@pytest.mark.parametrize(
    ("outputs", "values", "gradient"), [((0,), 300, 680), ((0, 1), 600, 1200), ((0, 1, 2), 950, 1750)]
)
def test_operations(outputs: tuple[int, ...], values: int, gradient: int) -> None:
    """What the speed rests on; sparse polynomials need 302, 1279, 2785 and 754, 2760, 5136."""
    program = compiled_program((0, 1, 2, 3), outputs, 3)
    assert program is not None
    assert program.forward.operations <= values and program.gradient.operations <= gradient
    assert np.linalg.cond(program.mixing) < 100


def test_reference_on_its_own() -> None:
    program = compiled_program((0, 1), (0, 1), 3)
    assert program is not None
    weights = fold_weights(program, torch.randn(2, program.mixing.shape[0], 20, dtype=torch.float64))
    assert weights.shape == (2, 2, program.mixing.shape[1], 16) and not weights[:, 1, :, 4:].any()
    x, z = torch.randn(4, 4, 20, dtype=torch.float64), torch.tensor([0, 1, 1, 0])
    expected = contract_folded_reference([x], weights, z, program)
    assert_close([contract_folded([x], weights, z, program)], [expected], 1e-13)
