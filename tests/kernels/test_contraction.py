"""The compiled symmetric contraction against the same in plain PyTorch, with its derivatives."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import pytest
import torch
from ase.build import bulk, molecule
from mace_models import VARIANTS, make_model, make_spec
from torch import Tensor

from compactmlip.data.graph import build_graph, collate, energy_and_derivatives
from compactmlip.kernels.build import without_kernels
from compactmlip.kernels.contraction import contraction_plan
from compactmlip.models import cast
from compactmlip.models.contraction import Parametrisation, SymmetricContraction

Channels = dict[int, Sequence[int] | None]
Tensors = Sequence[Sequence[Tensor]]


pytestmark = pytest.mark.usefixtures("kernels")


@dataclass
class Case:
    """A contraction with random weights, and random arguments."""

    inputs: Channels
    outputs: Channels
    degree: int = 3
    width: int = 16
    atoms: int = 11
    species: int | None = 3
    parametrisation: Parametrisation = "paths"
    dtype: torch.dtype = torch.float64

    def __post_init__(self) -> None:
        torch.manual_seed(0)
        self.module = SymmetricContraction(
            self.width, self.inputs, self.outputs, self.degree, self.species, self.parametrisation
        )
        cast(self.module, self.dtype)
        self.z = torch.randint(0, self.species or 5, (self.atoms,))
        self.x = self._features(self.inputs)
        self.g = self._features(self.outputs)

    def _features(self, channels: Channels) -> list[Tensor | None]:
        features: list[Tensor | None] = [None] * (max(channels) + 1)
        for l, positions in channels.items():
            size = self.width if positions is None else len(positions)
            features[l] = torch.randn(self.atoms, 2 * l + 1, size, dtype=self.dtype).requires_grad_()
        return features

    def variables(self) -> list[Tensor]:
        return [t for t in (*self.x, *self.module.parameters(), *self.g) if t is not None]

    def values(self) -> list[Tensor]:
        return [y for y in self.module(self.x, self.z) if y is not None]

    def derivatives(self, order: int = 2, *, weights: bool = True) -> list[list[Tensor]]:
        """Values, then gradients of random combinations of what came before."""
        found = [self.values()]
        now = [y * g for y, g in zip(found[0], (g for g in self.g if g is not None), strict=True)]
        generator = torch.Generator().manual_seed(1)
        features = sum(x is not None for x in self.x)
        for _ in range(order):
            total = torch.stack([t.sum() for t in now if t.requires_grad]).sum()
            # What does not depend on a variable any more has a gradient of zero.
            grads = torch.autograd.grad(total, self.variables(), create_graph=True, materialize_grads=True)
            found.append(list(grads))
            mixed = grads if weights else grads[:features]
            now = [g * torch.randn(g.shape, generator=generator, dtype=g.dtype) for g in mixed]
        return found


def all_channels(*orders: int) -> Channels:
    return dict.fromkeys(orders)


def assert_close(found: Tensors, expected: Tensors, rtol: float) -> None:
    """Relative to the largest entry of each tensor."""
    for many, of in zip(found, expected, strict=True):
        for a, b in zip(many, of, strict=True):
            scale = float(b.detach().abs().max()) if b.numel() else 0.0
            torch.testing.assert_close(a, b, rtol=0, atol=rtol * max(scale, 1e-3))


CASES = {
    "scalars and vectors": Case(all_channels(0, 1), all_channels(0, 1)),
    "upstream's smallest": Case(all_channels(0, 1, 2, 3), all_channels(0), width=20, atoms=33),
    "upstream's largest": Case(all_channels(0, 1, 2, 3), all_channels(0, 1, 2), width=10, atoms=9),
    "one factor": Case(all_channels(0, 1, 2), all_channels(0, 2), degree=1),
    "two factors, independent": Case(
        all_channels(0, 1, 2, 3), all_channels(1, 3), degree=2, parametrisation="independent"
    ),
    "four factors": Case(all_channels(0, 1, 2), all_channels(0, 1), degree=4, width=5),
    "no scalars": Case(all_channels(1, 2), all_channels(0, 1), width=7),
    "channel subsets": Case({0: None, 1: (0, 2, 3), 2: (1,)}, {0: (1, 2, 5), 1: None}, width=9),
    "shared weights": Case(all_channels(0, 1, 2), all_channels(0, 1), species=None, width=3),
    "one atom, many species": Case(all_channels(0, 1), all_channels(0, 1), atoms=1, species=50),
    "all atoms different": Case(all_channels(0, 1, 2), all_channels(1), atoms=6, species=40, width=33),
}


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("weights", [False, True], ids=["features", "all"])
def test_values_and_derivatives(name: str, weights: bool) -> None:
    """Second derivatives of what depends on the features' gradient alone (forces), and of everything."""
    case = CASES[name]
    found = case.derivatives(weights=weights)
    with without_kernels():
        expected = case.derivatives(weights=weights)
    assert_close(found, expected, 1e-12)


def test_the_kernel_is_what_runs() -> None:
    case = CASES["scalars and vectors"]

    def origins(t: Tensor) -> str:
        node, names = t.grad_fn, ""
        while node is not None and len(names) < 500:
            names, node = names + node.name(), node.next_functions[0][0] if node.next_functions else None
        return names

    assert "Contract" in origins(case.values()[0])
    with without_kernels():
        assert "Contract" not in origins(case.values()[0])


@pytest.mark.parametrize("weights", [False, True], ids=["features", "all"])
def test_higher_derivatives(weights: bool) -> None:
    case = Case(all_channels(0, 1), all_channels(0, 1), width=3, atoms=5)
    found = case.derivatives(4, weights=weights)
    with without_kernels():
        expected = case.derivatives(4, weights=weights)
    assert_close(found, expected, 1e-12)


def test_gradients_by_finite_differences() -> None:
    case = Case(all_channels(0, 1), all_channels(0, 1), width=2, atoms=3, species=2)
    plan = contraction_plan((0, 1), (0, 1), 3)
    table, terms = torch.tensor(plan.table), torch.tensor(plan.terms)
    x = torch.randn(3, 4, 2, dtype=torch.float64, requires_grad=True)
    weights = torch.randn(2, plan.num_products, 2, dtype=torch.float64, requires_grad=True)

    def f(x: Tensor, weights: Tensor) -> Tensor:
        out: Tensor = torch.ops.compactmlip.contract(x, weights, case.z, table, terms, plan.rows)
        return out

    assert torch.autograd.gradcheck(f, (x, weights))
    assert torch.autograd.gradgradcheck(f, (x, weights))


def test_single_precision() -> None:
    orders = all_channels(0, 1, 2, 3), all_channels(0, 1, 2)
    case = Case(*orders, dtype=torch.float32, parametrisation="independent", atoms=40)
    found = case.derivatives()
    cast(case.module, torch.float64)
    case.x, case.g = ([None if t is None else t.detach().double() for t in ts] for ts in (case.x, case.g))
    for t in (*case.x, *case.g):
        assert t is not None
        t.requires_grad_()
    with without_kernels():
        expected = case.derivatives(0)
    assert_close([[y.double() for y in found[0]]], expected, 1e-5)
    case32 = Case(*orders, dtype=torch.float32, parametrisation="independent", atoms=40)
    with without_kernels():
        assert_close(found, case32.derivatives(), 1e-5)


@pytest.fixture
def threads() -> Iterator[Callable[[int], None]]:
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


@pytest.mark.parametrize("width", [6, 64])
def test_threads(width: int, threads: Callable[[int], None]) -> None:
    """Same bits every time, also where atoms are divided; another number of threads changes only rounding."""
    case = Case(all_channels(0, 1, 2), all_channels(0, 1), width=width, atoms=70)
    threads(1)
    one = case.derivatives()
    for count in (1, 2, 3):
        threads(count)
        found, again = case.derivatives(), case.derivatives()
        for many, of in zip(found, again, strict=True):
            assert all(torch.equal(a, b) for a, b in zip(many, of, strict=True))
        assert_close(found, one, 1e-12)


def test_no_atoms() -> None:
    case = Case(all_channels(0, 1), all_channels(0, 1), atoms=0)
    values, first, second = case.derivatives()
    assert [tuple(y.shape) for y in values] == [(0, 1, 16), (0, 3, 16)]
    assert all(not g.any() for g in (*first, *second))


def test_one_atom_does_not_depend_on_the_others() -> None:
    """Tiles of all sizes, in any order of the species, give the same to rounding."""
    case = Case(all_channels(0, 1, 2), all_channels(0, 1), atoms=23, width=12)
    with torch.no_grad():
        whole = torch.cat(case.values(), dim=1)
        x, z = [f.detach() for f in case.x if f is not None], case.z
        for n in range(1, 23):
            part = torch.cat([y for y in case.module([f[:n] for f in x], z[:n]) if y is not None], dim=1)
            torch.testing.assert_close(part, whole[:n], rtol=0, atol=1e-12 * float(whole.abs().max()))


def test_only_what_is_wanted() -> None:
    """Constant weights or constant features, in first and second derivatives."""
    case = Case(all_channels(0, 1), all_channels(0, 1), width=4)
    for fixed in (list(case.module.parameters()), [x for x in case.x if x is not None]):
        for t in fixed:
            t.requires_grad_(False)
        free = [t for t in case.variables() if t.requires_grad]
        results = []
        for off in (False, True):
            with without_kernels() if off else torch.enable_grad():
                values = case.values()
                first = torch.autograd.grad(sum(y.sin().sum() for y in values), free[:-2], create_graph=True)
                second = torch.autograd.grad(sum(g.sin().sum() for g in first), free[:-2])
            results.append([values, first, second])
        assert_close(*results, 1e-12)
        for t in fixed:
            t.requires_grad_(True)


def _arguments() -> tuple[dict[str, Tensor], int]:
    plan = contraction_plan((0, 1), (0, 1), 2)
    tensors = {
        "x": torch.randn(5, 4, 6, dtype=torch.float64),
        "weights": torch.randn(3, plan.num_products, 6, dtype=torch.float64),
        "species": torch.tensor([0, 2, 2, 0, 1]),
        "table": torch.tensor(plan.table),
        "terms": torch.tensor(plan.terms),
    }
    return tensors, plan.rows


def test_transposed_features() -> None:
    given, rows = _arguments()
    expected = torch.ops.compactmlip.contract(*given.values(), rows)
    given["x"] = given["x"].transpose(0, 2).contiguous().transpose(0, 2)
    assert not given["x"].is_contiguous()
    assert torch.equal(torch.ops.compactmlip.contract(*given.values(), rows), expected)


def test_torch_knows_the_operators() -> None:
    """Schema, shapes without data, registration of derivatives: what tracing and export rely on."""
    given, rows = _arguments()
    constants = [given[name] for name in ("species", "table", "terms")]
    x, weights = given["x"].requires_grad_(), given["weights"].requires_grad_()
    grad = torch.randn(5, rows, 6, dtype=torch.float64)
    tests, op = ("test_schema", "test_autograd_registration", "test_faketensor"), torch.ops.compactmlip
    torch.library.opcheck(op.contract, (x, weights, *constants, rows), test_utils=tests)
    torch.library.opcheck(op.contract_backward, (grad, x, weights, *constants, True, False), test_utils=tests)
    for along in ((x.detach(), None), (x.detach(), weights.detach())):
        torch.library.opcheck(
            op.contract_second, (*along, grad, x, weights, *constants, True), test_utils=tests
        )


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x": torch.zeros(5, 3, 6, dtype=torch.float64)}, "shape .atoms, 4, channels"),
        ({"x": torch.zeros(5, 4, 6)}, "one dtype"),
        ({"weights": torch.zeros(3, 5, 2, dtype=torch.float64)}, "weights must have shape"),
        ({"species": torch.zeros(4, dtype=torch.int64)}, "species must be 5 int64"),
        ({"species": torch.zeros(5, dtype=torch.int32)}, "species must be 5 int64"),
        ({"species": torch.tensor([0, 1, 2, 3, 0])}, "atom 3 has species 3"),
        ({"species": torch.tensor([0, -1, 2, 2, 0])}, "atom 1 has species -1"),
        ({"table": torch.zeros(3, dtype=torch.int32)}, "no header"),
        ({"table": torch.zeros(30, dtype=torch.int32)}, "30 entries"),
        ({"table": torch.zeros(30)}, "int32 vector"),
        ({"terms": torch.zeros(2, dtype=torch.float64)}, "terms, not"),
    ],
)
def test_wrong_arguments(change: dict[str, Tensor], message: str) -> None:
    given, rows = _arguments()
    with pytest.raises((RuntimeError, IndexError), match=message):
        torch.ops.compactmlip.contract(*(given | change).values(), rows)


def test_a_damaged_plan_is_refused_or_harmless() -> None:
    """No entry of the plan makes the operator leave its arrays."""
    given, rows = _arguments()
    good, rng = given["table"], np.random.default_rng(0)
    refused = 0
    for _ in range(300):
        table = good.clone()
        table[rng.integers(len(table))] = int(rng.integers(-5, 400))
        try:
            torch.ops.compactmlip.contract(*(given | {"table": table}).values(), rows)
        except (RuntimeError, IndexError):
            refused += 1
    assert refused > 150


@pytest.mark.parametrize(
    ("outputs", "coefficients", "groups"), [((0,), 94, 38), ((0, 1), 410, 153), ((0, 1, 2), 887, 337)]
)
def test_plan_of_upstream(outputs: tuple[int, ...], coefficients: int, groups: int) -> None:
    """How sparse the polynomials are, and how well they are factored."""
    table = contraction_plan((0, 1, 2, 3), outputs, 3).table
    assert (table[5], table[4]) == (coefficients, groups)


@pytest.mark.parametrize("variant", VARIANTS)
def test_models(variant: str) -> None:
    """Energies, forces, stress and the gradient of a loss with forces are those of plain PyTorch."""
    model = make_model(make_spec(**VARIANTS[variant]))
    crystal = bulk("MgO", "rocksalt", a=4.21, cubic=True)
    crystal.rattle(0.1, seed=3)
    batch = collate([build_graph(a, model.spec, torch.float64) for a in (crystal, molecule("CH3CH2OH"))])

    def evaluate() -> list[list[Tensor]]:
        model.zero_grad()
        found = energy_and_derivatives(model, batch, create_graph=True)
        loss = (found.energies**2).mean() + (found.forces**2).mean()
        loss.backward()
        # The kernel gives outputs that nothing reads a gradient of zero, autograd gives them none.
        gradients = [torch.zeros_like(p) if p.grad is None else p.grad for p in model.parameters()]
        return [[found.node_energies, found.forces, found.stresses[0]], gradients]

    found = evaluate()
    with without_kernels():
        expected = evaluate()
    assert_close(found, expected, 1e-10)
