"""Parameter counts of the paper (Structural Pruning, tables of MACE), to the unit: as built and as pruned."""

from __future__ import annotations

import time
from typing import Any

import numpy as np
import pytest
import torch
from ase.data import chemical_symbols

from compactmlip.channels import Mask
from compactmlip.compress.apply import prune
from compactmlip.models import build, channel_graph, num_parameters, pruned_spec
from compactmlip.models.mace import MACE
from compactmlip.models.mace_architecture import MACEArchitecture, MACEReadout, upstream_layer
from compactmlip.models.radial import AgnesiTransform, PolynomialEnvelope
from compactmlip.models.repulsion import ZBLOptions
from compactmlip.spec import ModelSpec

ALL = tuple(chemical_symbols[1:90])
ORGANIC = ("H", "C", "N", "O", "F", "P", "S", "Cl", "Br", "I")


def make_spec(
    channels: int,
    lmax: int,
    *,
    species: tuple[str, ...] = ALL,
    num_basis: int = 10,
    num_layers: int = 2,
    agnostic_first: bool = False,
    density: bool = False,
    readout: MACEReadout | None = None,
    **architecture: Any,
) -> ModelSpec:
    """MACE with equal channels of all orders, as released."""
    hidden = (channels,) * (lmax + 1)
    into: tuple[int, ...] = (channels,)
    layers = []
    for t in range(num_layers):
        last = t == num_layers - 1
        first = t == 0 and (agnostic_first or density)
        # A model of one layer keeps all orders of it, as the first layer of the deeper one has them.
        out = hidden[:1] if last and t else hidden
        layer = upstream_layer(
            into,
            width=channels,
            out=out,
            lmax_edge=3,
            correlation=3,
            interaction="density" if density else "plain",
            species_map=first,
            skip="none" if first else "species",
            readout=(readout or MACEReadout(kind="nonlinear", hidden=(16,)))
            if last
            else MACEReadout(kind="linear"),
        )
        layers.append(layer)
        into = out
    shape = MACEArchitecture(
        embedding=channels,
        num_basis=num_basis,
        envelope=PolynomialEnvelope(p=5),
        lmax_edge=3,
        layers=tuple(layers),
        **architecture,
    )
    return ModelSpec(
        family="mace",
        species=species,
        cutoff=6.0,
        num_message_passing_layers=num_layers,
        architecture=shape.model_dump(mode="json"),
    )


def count(spec: ModelSpec) -> int:
    with torch.device("meta"):
        return num_parameters(MACE(spec))


LINEAR = MACEReadout(kind="linear")
OMAT: dict[str, Any] = {"density": True, "transform": AgnesiTransform(), "repulsion": ZBLOptions()}
COUNTS: dict[str, tuple[ModelSpec, int]] = {
    "MP C256 L1, 8 Bessel": (make_spec(256, 1, num_basis=8), 15_847_440),
    "MP C128 L2": (make_spec(128, 2), 5_725_072),
    "MP C128 L1": (make_spec(128, 1), 4_688_656),
    "MP C128 L1, 8 Bessel": (make_spec(128, 1, num_basis=8), 4_688_400),
    "MP C128 L0": (make_spec(128, 0), 3_847_696),
    "MP C128, one layer, linear": (make_spec(128, 2, num_layers=1, readout=LINEAR), 3_453_696),
    "MP C128, one layer": (make_spec(128, 2, num_layers=1), 3_455_632),
    "OFF C224 L2": (make_spec(224, 2, species=ORGANIC, num_basis=8, agnostic_first=True), 4_707_312),
    "OFF C128 L1": (make_spec(128, 1, species=ORGANIC, num_basis=8, agnostic_first=True), 1_428_368),
    "OMAT C128 L0": (make_spec(128, 0, **OMAT), 8_222_244),
}


@pytest.mark.parametrize("name", COUNTS)
def test_counts(name: str) -> None:
    spec, expected = COUNTS[name]
    assert count(spec) == expected


def target_masks(spec: ModelSpec, channels: int, lmax: int) -> dict[str, Mask]:
    """Keep the first channels of all spaces but radial and readout units, and the lower orders of the stream.

    The contraction works channel by channel, so all its orders keep the same ones.
    """
    masks = {}
    for name, group in channel_graph(spec).groups.items():
        space = name.partition("/")[0].rpartition(".")[2]
        if space in ("embedding", "up", "inner", "atomic", "product", "out"):
            kept = 0 if space in ("up", "product", "out") and group.order > lmax else channels
            masks[name] = np.arange(group.size) < kept
    return masks


CUTS = [
    ("MP C128 L2", 128, 0, 3_847_696),
    ("MP C128 L2", 128, 1, 4_688_656),
    ("MP C256 L1, 8 Bessel", 128, 1, 4_688_400),
    # The paper's 3,847,696 has 10 Bessel functions; 8 of them save 2 x 64 weights in each layer.
    ("MP C256 L1, 8 Bessel", 128, 0, 3_847_696 - 2 * 2 * 64),
    ("OFF C224 L2", 128, 1, 1_428_368),
]


@pytest.mark.parametrize(("name", "channels", "lmax", "expected"), CUTS)
def test_pruning_gives_the_smaller_released_models(
    name: str, channels: int, lmax: int, expected: int
) -> None:
    spec = COUNTS[name][0]
    smaller = pruned_spec(spec, channel_graph(spec).complete(target_masks(spec, channels, lmax)))
    assert count(smaller) == expected
    same = make_spec(
        channels,
        lmax,
        species=spec.species,
        num_basis=spec.architecture["num_basis"],
        agnostic_first=name.startswith("OFF"),
    )
    assert smaller.architecture == same.architecture
    # Orders of the stream go with the channels that make and read them: naming them all is not needed.
    few = {k: m for k, m in target_masks(spec, channels, lmax).items() if m.any() or ".out/" in k}
    assert pruned_spec(spec, channel_graph(spec).complete(few)) == smaller


def test_pruning_tensors_gives_the_same_count() -> None:
    """The slicing itself, on the smallest of the models above."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = build(COUNTS["OFF C224 L2"][0])
    smaller = prune(model, target_masks(model.spec, 128, 1))
    assert num_parameters(smaller) == 1_428_368
    assert num_parameters(model) == 4_707_312


def test_a_basis_function_more_costs_one_row_per_layer() -> None:
    assert count(make_spec(128, 1)) - count(make_spec(128, 1, num_basis=8)) == 2 * 2 * 64


def test_largest_model_is_built_quickly() -> None:
    """Takes 1 s; 5 s are promised, and a loaded machine is given 20."""
    start = time.perf_counter()
    with torch.random.fork_rng(devices=[]):
        model = build(COUNTS["MP C256 L1, 8 Bessel"][0])
    assert num_parameters(model) == 15_847_440
    assert time.perf_counter() - start < 20
