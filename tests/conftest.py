"""Fixtures that several test files share: small random models and structures that test edge cases."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch
from ase import Atoms
from ase.build import bulk, molecule
from torch import nn

from compactmlip.errors import KernelError
from compactmlip.kernels.build import load as load_kernels
from compactmlip.models import build, cast
from compactmlip.models.nequip import NequIPArchitecture, NequIPLayer
from compactmlip.spec import ModelSpec, Provenance

SPECIES = ("H", "C", "O", "Mg", "Si")
CHANNELS = (8, 6, 4, 3)
CUTOFF = 4.0

VARIANTS: dict[str, dict[str, Any]] = {
    "plain": {},
    "xplor-solid": {"envelope": {"kind": "xplor", "onset": 3.2}, "solid_harmonics": True},
    "species-skip": {"self_connection": "species"},
    "no-skip": {"self_connection": "none"},
    "biases": {"biases": True},
}
"""Arguments of ``make_spec`` for every option that imported models use."""


@pytest.fixture(scope="session", autouse=True)
def _threads() -> Iterator[None]:
    """One thread: the models are tiny, and results must not depend on the size of the machine."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def _spec(
    *,
    species: tuple[str, ...] = SPECIES,
    channels: tuple[int, ...] = CHANNELS,
    num_layers: int = 3,
    lmax_edge: int = 3,
    cutoff: float = CUTOFF,
    biases: bool = False,
    **architecture: Any,
) -> ModelSpec:
    layers = []
    for t in range(num_layers):
        up = channels[:1] if t == 0 else channels
        out = channels[:1] if t == num_layers - 1 else channels
        paths = tuple(
            (l1, l2, l3)
            for l1 in range(len(up))
            for l2 in range(lmax_edge + 1)
            for l3 in range(abs(l1 - l2), min(l1 + l2, len(out) - 1) + 1)
        )
        layers.append(
            NequIPLayer(up=up, paths=paths, radial_hidden=(7, 9), out=out, up_bias=biases, down_bias=biases)
        )
    options = {
        "embedding": channels[0],
        "num_basis": 6,
        "envelope": {"kind": "polynomial", "p": 6},
        "lmax_edge": lmax_edge,
        "readout_hidden": 5,
        "readout_bias": biases,
        "layers": layers,
    }
    shape = NequIPArchitecture.model_validate({**options, **architecture})
    return ModelSpec(
        family="nequip",
        species=species,
        cutoff=cutoff,
        dtype="float64",
        num_message_passing_layers=num_layers,
        architecture=shape.model_dump(mode="json"),
        provenance=Provenance(name="small random model", source="tests", licence="MIT"),
    )


def _model(spec: ModelSpec, seed: int = 0, dtype: torch.dtype = torch.float64) -> nn.Module:
    generator = torch.Generator().manual_seed(seed)
    with torch.random.fork_rng(devices=[]):
        model = build(spec)

    def normal(t: torch.Tensor) -> torch.Tensor:
        return torch.randn(t.shape, generator=generator, dtype=torch.float64)

    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name == "basis.wave_numbers":
                parameter *= 1 + 0.02 * normal(parameter)
            else:
                parameter.copy_(normal(parameter) * (0.3 if name.endswith("bias") else 1.0))
        for name, buffer in model.named_buffers():
            if name.endswith("convolution.normalisation"):
                # Strong messages: forces of 0.1 to 1 eV/Angstrom.  Solid harmonics grow as r^l.
                buffer.fill_(0.1 if spec.architecture["solid_harmonics"] else 1.5)
        model.get_buffer("energy_scale").copy_(0.4 + 0.2 * normal(torch.empty(len(spec.species))).abs())
        model.get_buffer("energy_shift").copy_(-4.0 + normal(torch.empty(len(spec.species))))
    return cast(model, dtype)


@pytest.fixture(scope="session")
def make_spec() -> Callable[..., ModelSpec]:
    """``make_spec(species=, channels=, num_layers=, lmax_edge=, cutoff=, biases=, **architecture)``."""
    return _spec


@pytest.fixture(scope="session")
def make_model() -> Callable[..., nn.Module]:
    """``make_model(spec, seed=0, dtype=torch.float64)``: a new model with seeded random parameters."""
    return _model


@pytest.fixture(scope="session")
def small_spec() -> ModelSpec:
    """Three layers of 8x0+6x1+4x2+3x3 for H, C, O, Mg, Si."""
    return _spec()


@pytest.fixture
def small_model(small_spec: ModelSpec) -> nn.Module:
    """A float64 model of ``small_spec``, new for each test."""
    return _model(small_spec)


@pytest.fixture(params=list(VARIANTS))
def model_variant(request: pytest.FixtureRequest) -> nn.Module:
    """A float64 model for each architecture option in turn."""
    return _model(_spec(**VARIANTS[request.param]), seed=1)


def _structures() -> dict[str, Atoms]:
    crystal = bulk("MgO", "rocksalt", a=4.21, cubic=True)
    skewed = Atoms("MgSiO", cell=[[2.9, 0.1, 0.0], [-0.9, 3.1, 0.2], [0.5, 0.7, 3.4]], pbc=True)
    skewed.set_scaled_positions([[0.02, 0.05, 0.01], [0.55, 0.45, 0.52], [0.1, 0.52, 0.48]])
    slab = bulk("MgO", "rocksalt", a=4.21, cubic=True)
    slab.pbc = (True, True, False)
    slab.center(vacuum=6.0, axis=2)
    ethanol = molecule("CH3CH2OH")
    crystal.rattle(0.08, seed=1)
    skewed.rattle(0.03, seed=2)
    slab.rattle(0.08, seed=3)
    ethanol.rattle(0.05, seed=4)
    return {
        "crystal": crystal,
        "smaller than the cutoff": skewed,
        "slab": slab,
        "molecule": ethanol,
        "isolated atom": Atoms("O"),
    }


@pytest.fixture
def structures() -> dict[str, Atoms]:
    """Rattled structures by name: crystal, triclinic cell below the cutoff, slab, molecule, single atom."""
    return _structures()


@pytest.fixture(params=list(_structures()))
def structure(request: pytest.FixtureRequest) -> Atoms:
    """Each of ``structures`` in turn."""
    return _structures()[request.param]


@pytest.fixture
def rng() -> np.random.Generator:
    """A seeded generator, the same for every test."""
    return np.random.default_rng(20240229)


@pytest.fixture(scope="session")
def kernels() -> None:
    """Skip where the operators cannot be built."""
    try:
        if load_kernels():
            return
    except KernelError as error:
        pytest.skip(f"no compiled kernels: {error}")
    pytest.skip("no compiled kernels")
