"""Models on a part of a structure: ghosts that get their features from elsewhere, and send gradients back."""

from __future__ import annotations

import ctypes
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import mace_models
import pytest
import torch
from torch import Tensor

from compactmlip.data.graph import GraphBatch, build_graph, energy_and_derivatives
from compactmlip.deploy.archive import without_profiling
from compactmlip.deploy.compile import trace
from compactmlip.deploy.lower.lower import lower_on_grid
from compactmlip.kernels.build import build

pytestmark = pytest.mark.usefixtures("kernels")


class Rows(ctypes.Structure):
    _fields_ = [("data", ctypes.c_void_p), ("bytes", ctypes.c_int64)]


Forward = ctypes.CFUNCTYPE(None, ctypes.c_void_p, ctypes.POINTER(Rows), ctypes.c_int64)
Reverse = ctypes.CFUNCTYPE(None, ctypes.c_void_p, ctypes.POINTER(Rows), ctypes.c_int64, ctypes.c_int64)


class Exchange(ctypes.Structure):
    _fields_ = [
        ("owned", ctypes.c_int64),
        ("nodes", ctypes.c_int64),
        ("self", ctypes.c_void_p),
        ("forward", Forward),
        ("reverse", Reverse),
    ]


class Ghosts:
    """Copies of owned atoms: ghost k is atom ``owners[k]``."""

    def __init__(self, owned: int, owners: Tensor) -> None:
        self.owned, self.owners, self.nodes = owned, owners, owned + len(owners)
        self.sent: list[int] = []
        self.exchange = Exchange(owned, self.nodes, None, Forward(self._forward), Reverse(self._reverse))

    def _tensors(self, rows: Any, count: int, dtype: torch.dtype) -> Iterator[Tensor]:
        for k in range(count):
            size = rows[k].bytes * self.nodes
            memory = (ctypes.c_char * size).from_address(rows[k].data)
            yield torch.frombuffer(memory, dtype=dtype).view(self.nodes, -1)

    def _forward(self, _: Any, rows: Any, count: int) -> None:
        self.sent.append(sum(rows[k].bytes for k in range(count)))
        for features in self._tensors(rows, count, torch.uint8):
            features[self.owned :] = features[self.owners]

    def _reverse(self, _: Any, rows: Any, count: int, scalar: int) -> None:
        dtype = {4: torch.float32, 8: torch.float64}[scalar]
        for gradient in self._tensors(rows, count, dtype):
            gradient[: self.owned].index_add_(0, self.owners, gradient[self.owned :].clone())


@contextmanager
def installed(ghosts: Ghosts) -> Iterator[None]:
    library = ctypes.CDLL(str(build().path))
    library.compactmlip_set_exchange.restype = ctypes.c_void_p
    library.compactmlip_set_exchange.argtypes = [ctypes.c_void_p]
    assert library.compactmlip_set_exchange(ctypes.addressof(ghosts.exchange)) is None
    try:
        yield
    finally:
        library.compactmlip_set_exchange(None)


def split(graph: GraphBatch) -> tuple[Ghosts, Tensor, Tensor]:
    """Ghosts for two of three edges, two for some atoms; species and neighbours of the new graph."""
    owned = len(graph.species)
    owners = torch.cat([torch.arange(owned), torch.arange(0, owned, 2)])
    place = torch.full((owned,), -1)
    place[::2] = torch.arange(owned, owned + len(place[::2]))
    edge = torch.arange(len(graph.neighbors))
    again = torch.where(place[graph.neighbors] >= 0, place[graph.neighbors] + owned, graph.neighbors + owned)
    neighbors = torch.where(edge % 3 == 0, graph.neighbors, graph.neighbors + owned)
    neighbors = torch.where(edge % 3 == 2, again, neighbors)
    return Ghosts(owned, owners), torch.cat([graph.species, graph.species[owners]]), neighbors


MODELS = {
    "nequip": None,
    "nequip, species skip": {"self_connection": "species"},
    **{f"mace, {name}": options for name, options in mace_models.VARIANTS.items() if "product" not in name},
}


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize(("traced", "dtype"), [(True, torch.float64), (False, torch.float32)])
def test_ghosts_change_nothing(
    name: str, traced: bool, dtype: torch.dtype, make_model: Any, make_spec: Any, structures: Any
) -> None:
    options: Any = MODELS[name] or {}
    if name.startswith("mace"):
        model = mace_models.make_model(mace_models.make_spec(**options))
    else:
        model = make_model(make_spec(num_layers=4, **options))
    lowered: Any = lower_on_grid(model, 81).to(dtype)
    lowered.energy_scale, lowered.energy_shift = lowered.energy_scale.double(), lowered.energy_shift.double()
    graph = build_graph(structures["crystal"], model.spec, dtype)  # type: ignore[arg-type]
    run: Any = without_profiling(trace(lowered, graph)) if traced else lowered
    expected = energy_and_derivatives(run, graph)
    ghosts, species, neighbors = split(graph)
    vectors = graph.vectors.clone().requires_grad_()
    with installed(ghosts):
        energies = run(species, graph.centers, neighbors, vectors)
        (gradient,) = torch.autograd.grad(energies.sum(), vectors)
    energies = energies.detach()
    assert energies.shape == expected.node_energies.shape
    forces = torch.zeros_like(expected.forces)
    forces.index_add_(0, graph.centers, gradient).index_add_(0, graph.neighbors, -gradient)
    tolerance = 1e-12 if dtype == torch.float64 else 2e-5
    assert float((energies - expected.node_energies).abs().max()) < tolerance
    assert float((forces - expected.forces).abs().max()) < tolerance * max(1.0, float(forces.abs().max()))
    assert float(expected.forces.abs().max()) > 1e-2
    layers = model.spec.num_message_passing_layers  # type: ignore[union-attr]
    assert len(ghosts.sent) == layers - 1  # nothing is sent for the first layer
    assert torch.equal(energy_and_derivatives(run, graph).forces, expected.forces)


def test_without_exchange_nothing_is_copied() -> None:
    x = torch.randn(3, 1, 2, requires_grad=True)
    for name in ("ghost_exchange", "owned"):
        operator = getattr(torch.ops.compactmlip, name)
        (same,) = operator([x])
        assert same.data_ptr() == x.data_ptr() and torch.equal(same, x)
        (gradient,) = torch.autograd.grad((same**2).sum(), x)
        assert torch.equal(gradient, 2 * x)
        assert operator([]) == []
        (index,) = operator([torch.arange(3)])
        assert torch.equal(index, torch.arange(3))


def test_wrong_rows_are_refused() -> None:
    with installed(Ghosts(2, torch.tensor([0]))):
        with pytest.raises(ValueError, match=r"ghost_exchange: a tensor has shape \[3, 1\], not 2 rows"):
            torch.ops.compactmlip.ghost_exchange([torch.zeros(3, 1)])
        with pytest.raises(ValueError, match=r"owned: a tensor has shape \[2\], not 3 rows"):
            torch.ops.compactmlip.owned([torch.zeros(2)])


def test_gradient_needs_the_same_exchange() -> None:
    x = torch.ones(2, 1, requires_grad=True)
    with installed(Ghosts(2, torch.tensor([0]))):
        (nodes,) = torch.ops.compactmlip.ghost_exchange([x])
        assert nodes.shape == (3, 1)
    with pytest.raises(RuntimeError, match="must be taken while the exchange of the features is set"):
        torch.autograd.grad(nodes.sum(), x)
