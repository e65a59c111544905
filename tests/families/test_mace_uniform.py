"""Which shapes of MACE models upstream can build, and the nearest plan for the others."""

from __future__ import annotations

import re
from typing import Any

import pytest
from mace_native import cut_to, native_model, native_spec

from compactmlip.errors import UnsupportedFeatureError
from compactmlip.families.mace_config import from_arguments
from compactmlip.families.mace_uniform import constructor_arguments, nearest_uniform_target
from compactmlip.models.mace_architecture import MACEArchitecture, MACEReadout, upstream_layer

RESIDUAL = "RealAgnosticResidualInteractionBlock"
SCALAR_PATHS = ((0, 0, 0), (0, 1, 1), (0, 2, 2))


@pytest.mark.parametrize(
    ("own", "layers"),
    [
        ({}, [{}, {}]),
        ({"contraction": "independent"}, [{}, {}]),
        ({"contraction_per_species": False, "envelope_on_basis": False}, [{}, {}]),
        ({"hidden": (6, 0, 6)}, [{}, {}]),
        ({"basis": "gaussian", "transform": {"kind": "soft"}, "repulsion": {}}, [{}, {}]),
        ({}, [{"correlation": 3}, {"correlation": 1}]),
        ({}, [{"readout": None}, {}]),
        ({}, [{}, {"up": (6,), "paths": SCALAR_PATHS}]),
        ({}, [{"up": (3,)}, {"up": (3,), "paths": SCALAR_PATHS}]),
    ],
)
def test_arguments_describe_the_model(own: dict[str, Any], layers: list[dict[str, Any]]) -> None:
    spec = native_spec(layers=layers, **own)
    arch = MACEArchitecture.model_validate(spec.architecture)
    arguments = constructor_arguments(spec, 11.3)
    config = from_arguments(arguments, "arguments")
    assert arguments["atomic_numbers"] == [1, 6, 8, 12] and arguments["num_bessel"] == 5
    assert arguments["radial_MLP"] == [7, 9] and arguments["MLP_irreps"] == "5x0e"
    assert (config.basis, config.transform) == (arch.basis, arch.transform and arch.transform.kind)
    assert config.envelope_on_basis == arch.envelope_on_basis
    assert config.contraction_per_species == arch.contraction_per_species
    assert arguments["pair_repulsion"] == (arch.repulsion is not None)
    for t, (found, layer) in enumerate(zip(config.layers, arch.layers, strict=True)):
        assert (found.channels_in, found.up) == (arch.channels_in(t), layer.up)
        assert (found.out, found.width, found.correlation) == (layer.out, layer.width, layer.correlation)
        assert found.interaction == RESIDUAL and found.avg_num_neighbors == 11.3
        assert (config.readouts[t] is None) == (layer.readout is None)


@pytest.mark.parametrize(
    ("own", "layers", "reason"),
    [
        ({"embedding": 5}, [{}, {}], r"embedding: 5 channels instead of 6"),
        ({}, [{"out": (6, 4)}, {}], r"layer 0, channels of the output: 6x0\+4x1 instead of 6x0\+6x1"),
        ({}, [{}, {"out": (3,)}], r"layer 1, channels of the output: 3x0 instead of 6x0"),
        ({}, [{"up": (4,)}, {}], r"layer 0, channels that neighbours send: 4x0 instead of 6x0"),
        ({}, [{}, {"radial_hidden": (7, 8)}], r"layer 1, hidden units .*\(7, 8\) instead of \(7, 9\)"),
        (
            {},
            [{"atomic": (6, 6), "paths": ((0, 1, 1),)}, {}],
            r"layer 0, channels that enter the contraction: 6x0\+6x1 instead",
        ),
        ({}, [{"paths": ((0, 0, 0), (0, 2, 2))}, {}], r"layer 0, paths .*: lacks \[\(0, 1, 1\)\]"),
        ({"lmax_edge": 3}, [{}, {}], r"layer 0, paths .*: lacks \[\(0, 3, 3\)\]"),
        (
            {},
            [
                {
                    "width": 8,
                    "product": (8, 5),
                    "product_positions": {1: (0, 1, 2, 4, 7)},
                    "atomic": (8, 8, 8),
                },
                {},
            ],
            r"layer 0, width of the contraction: 8 instead of 6",
        ),
        ({"envelope": {"kind": "xplor", "onset": 3.0}}, [{}, {}], "cutoff function is xplor"),
        ({"basis": "chebyshev"}, [{}, {}], "Chebyshev polynomials: .* forces are wrong"),
        ({}, [{"skip": "linear"}, {}], "layer 0: upstream has no interaction block of this kind"),
        ({}, [{}, {"readout": MACEReadout(kind="linear")}], "has a linear readout instead of a nonlinear or"),
        (
            {},
            [{"readout": MACEReadout(kind="nonlinear", hidden=(4,))}, {}],
            "layers before the last have readouts",
        ),
    ],
)
def test_refusals_name_the_reason(own: dict[str, Any], layers: list[dict[str, Any]], reason: str) -> None:
    with pytest.raises(UnsupportedFeatureError, match=reason):
        constructor_arguments(native_spec(layers=layers, **own), 1.0)


def test_every_reason_is_listed_with_the_plan() -> None:
    spec = native_spec((8, 8), [{"out": (8, 5)}, {"radial_hidden": (4, 9)}])
    with pytest.raises(UnsupportedFeatureError) as raised:
        constructor_arguments(spec, 1.0)
    lines = str(raised.value).splitlines()
    assert [line[:11] for line in lines[1:-1]] == ["  - layer 0", "  - layer 1"]
    assert "compactmlip prune MODEL --to 5x0+5x1 --radial-hidden 4 --calibration STRUCTURES" in lines[-1]


def test_no_plan_where_cutting_does_not_help() -> None:
    spec = native_spec(layers=[{"out": (6, 4)}, {}], envelope={"kind": "xplor", "onset": 3.0})
    with pytest.raises(UnsupportedFeatureError, match=r"xplor") as raised:
        constructor_arguments(spec, 1.0)
    assert "--to" not in str(raised.value)


def test_features_above_the_harmonics_are_refused() -> None:
    """Upstream switches off the wrong weights there."""
    layers = [
        upstream_layer(into, width=4, out=out, lmax_edge=1, correlation=2)
        for into, out in (((4,), (4, 4, 4)), ((4, 4, 4), (4,)))
    ]
    spec = native_spec(
        (4, 4, 4),
        [
            dict(layer) | {"readout": r}
            for layer, r in zip(layers, (None, MACEReadout(kind="nonlinear", hidden=(5,))), strict=True)
        ],
        lmax_edge=1,
    )
    with pytest.raises(UnsupportedFeatureError, match="orders above those of the spherical harmonics"):
        constructor_arguments(spec, 1.0)


@pytest.mark.parametrize(
    ("target", "nearest"),
    [
        ("6x0+6x1", "6x0+6x1"),
        ("6x0+4x1,6x0", "4x0+4x1"),
        ("6x0+4x1,3x0", "3x0+3x1"),
        ("5x0,6x0", "5x0"),
    ],
)
def test_nearest_uniform_plan_can_be_exported(target: str, nearest: str) -> None:
    model = native_model(native_spec())
    heterogeneous = cut_to(model, target)
    assert nearest_uniform_target(heterogeneous.spec) == nearest
    constructor_arguments(cut_to(model, nearest).spec, 1.0)
    if target != nearest:
        with pytest.raises(UnsupportedFeatureError, match=re.escape(f"--to {nearest} ")):
            constructor_arguments(heterogeneous.spec, 1.0)
