"""Reading how a MACE model is built: the two sources agree, and what is not supported is named."""

from __future__ import annotations

import copy
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import mace_upstream
import pytest

from compactmlip.errors import CheckpointError, InputError, UnsupportedFeatureError
from compactmlip.families.inert import InertGlobal, InertObject, load_inert, modules as named_modules
from compactmlip.families.mace import load_checkpoint
from compactmlip.families.mace_config import INTERACTIONS, MACEConfig, channels, from_arguments, from_model
from compactmlip.spec import Provenance

FOLDER = Path(__file__).parents[1] / "reference" / "mace"


@pytest.fixture
def root() -> InertObject:
    """A small ScaleShiftMACE; 4x0e+4x1o, two layers."""
    return load_inert(FOLDER / "e3nn.model")


def parts(root: InertObject) -> dict[str, InertObject]:
    return dict(named_modules(root))


def add(root: InertObject, name: str, module: str = "mace.modules.blocks", kind: str = "Other") -> None:
    """Give the root one more submodule."""
    root.state["_modules"][name] = InertObject(module, kind, state={})


def test_file_and_arguments_agree(root: InertObject) -> None:
    """The arguments that ``tests/reference/make_mace_models.py`` made the file with."""
    residual = "RealAgnosticResidualInteractionBlock"
    arguments = {
        "r_max": 4.0,
        "max_ell": 1,
        "interaction_cls": residual,
        "interaction_cls_first": residual,
        "num_interactions": 2,
        "hidden_irreps": "4x0e+4x1o",
        "avg_num_neighbors": 3.5,
        "correlation": 2,
        "gate": "silu",
    }
    expected = from_arguments(arguments, "arguments")
    found = from_model(root, "e3nn.model")
    assert _without_correlation(found) == _without_correlation(expected)
    assert [layer.out for layer in found.layers] == [(4, 4), (4,)]


def _without_correlation(config: MACEConfig) -> tuple[Any, ...]:
    """Files of e3nn tell the correlation by their tensors."""
    layers = [
        (y.interaction, y.channels_in, y.up, y.out, y.width, y.avg_num_neighbors) for y in config.layers
    ]
    return (
        layers,
        config.readouts,
        config.heads,
        config.lmax_edge,
        config.basis,
        config.transform,
        config.envelope_on_basis,
        config.contraction_per_species,
    )


def test_cuequivariance_files_read_alike(root: InertObject) -> None:
    converted = from_model(load_inert(FOLDER / "cueq.model"), "cueq.model")
    assert _without_correlation(converted) == _without_correlation(from_model(root, "e3nn.model"))
    assert [layer.correlation for layer in converted.layers] == [2, 2]


def test_arguments_may_be_classes_and_functions() -> None:
    import torch

    arguments = mace_upstream.CONFIGURATIONS["mp0b3-medium"]
    as_objects = {
        **arguments,
        "gate": torch.nn.functional.silu,
        "interaction_cls": type(arguments["interaction_cls"], (), {}),
    }
    assert from_arguments(as_objects, "x") == from_arguments(arguments, "x")


# Files


def test_another_program_is_no_mace_model() -> None:
    with pytest.raises(CheckpointError, match="not a MACE model"):
        from_model(InertObject("e3nn.nn._fc", "FullyConnectedNet"), "x.model")


@pytest.mark.parametrize("kind", ["AtomicDipolesMACE", "EnergyDipolesMACE", "PolarMACE"])
def test_models_of_other_quantities_are_refused(root: InertObject, kind: str) -> None:
    root.name = kind
    with pytest.raises(UnsupportedFeatureError, match=f"{kind}.*only MACE and ScaleShiftMACE"):
        from_model(root, "x.model")


def _replace(name: str, kind: str) -> Callable[[InertObject], None]:
    def edit(root: InertObject) -> None:
        parts(root)[name].name = kind

    return edit


def _irreps(name: str, attribute: str, text: str) -> Callable[[InertObject], None]:
    def edit(root: InertObject) -> None:
        parts(root)[name].state[attribute] = text

    return edit


def _activation(function: Any) -> Callable[[InertObject], None]:
    def edit(root: InertObject) -> None:
        acts = parts(root)["readouts.1.non_linearity.acts"]
        for key in acts.table("_modules"):
            acts.table("_modules")[key] = function
        acts.state["_modules"] = {key: function for key in acts.table("_modules") or ("0",)}

    return edit


def _so3(root: InertObject) -> None:
    root.state["use_so3"] = True


UNSUPPORTED: dict[str, tuple[Callable[[InertObject], None], str]] = {
    "charge and spin embedding": (lambda root: add(root, "joint_embedding"), "joint_embedding"),
    "readout of global quantities": (lambda root: add(root, "embedding_readout"), "embedding_readout"),
    "long-range electrostatics": (lambda root: add(root, "les"), "latent Ewald"),
    "adapters": (
        lambda root: add(root, "tuned", "mace.modules.lora", "LoRADenseLinear"),
        "tuned is a low-rank",
    ),
    "no parity": (_so3, "use_so3"),
    "attention": (
        _replace("interactions.0", "RealAgnosticAttResidualInteractionBlock"),
        "RealAgnosticAttResidualInteractionBlock is not supported; supported are",
    ),
    "dipole readout": (_replace("readouts.1", "NonLinearDipoleReadoutBlock"), "NonLinearDipoleReadoutBlock"),
    "radial basis": (_replace("radial_embedding.bessel_fn", "LaguerreBasis"), "radial basis LaguerreBasis"),
    "other parity": (_irreps("interactions.1", "node_feats_irreps", "4x0e+4x1e"), "order 1 with parity e"),
    "order twice": (_irreps("interactions.1", "hidden_irreps", "4x0e+2x0e"), "order 0 with parity e"),
    "tanh, named": (_activation(InertGlobal("torch", "tanh")), "activation tanh"),
    "tanh, wrapped": (
        _activation(InertObject("e3nn.math", "normalize2mom", state={"f": InertGlobal("torch", "tanh")})),
        "activation tanh",
    ),
}


@pytest.mark.parametrize("feature", UNSUPPORTED)
def test_unsupported_parts_are_named(root: InertObject, feature: str) -> None:
    edit, named = UNSUPPORTED[feature]
    from_model(root, "x.model")
    edit(root)
    with pytest.raises(UnsupportedFeatureError, match=re.escape(named)) as caught:
        from_model(root, "x.model")
    assert str(caught.value).startswith("x.model")


def test_unsupported_distance_transform_is_named(root: InertObject) -> None:
    for kind in ("AgnesiTransform", "SoftTransform", "LogTransform"):
        add(parts(root)["radial_embedding"], "distance_transform", "mace.modules.radial", kind)
        if kind != "LogTransform":
            assert from_model(root, "x.model").transform == kind.removesuffix("Transform").lower()
    with pytest.raises(UnsupportedFeatureError, match="distance transform LogTransform"):
        from_model(root, "x.model")


@pytest.mark.parametrize("name", ["radial_embedding", "interactions.0", "products.1"])
def test_missing_parts_are_a_damaged_file(root: InertObject, name: str) -> None:
    parent, _, child = name.rpartition(".")
    del parts(root)[parent].state["_modules"][child]
    with pytest.raises(CheckpointError, match="x.model"):
        from_model(root, "x.model")


def test_readouts_must_fit_the_layers(root: InertObject) -> None:
    for name in ("readouts", "interactions", "products"):
        blocks = parts(root)[name].state["_modules"]
        blocks["2"] = copy.deepcopy(blocks["1"])
    assert len(from_model(root, "x.model").readouts) == 3
    del parts(root)["readouts"].state["_modules"]["2"]
    with pytest.raises(CheckpointError, match="2 readouts for 3 interactions"):
        from_model(root, "x.model")


def test_file_with_another_activation_is_refused() -> None:
    """``plain.model`` has a tanh in its readout."""
    with pytest.raises(UnsupportedFeatureError, match="activation tanh is not supported"):
        load_checkpoint(FOLDER / "plain.model", Provenance())


def test_unknown_head_of_a_file() -> None:
    with pytest.raises(InputError, match="unknown head 'pbe'; the model has Default"):
        load_checkpoint(FOLDER / "e3nn.model", Provenance(), head="pbe")


# Arguments


@pytest.mark.parametrize(
    "name", ["r_max", "hidden_irreps", "max_ell", "interaction_cls", "num_interactions", "avg_num_neighbors"]
)
def test_missing_arguments_are_named(name: str) -> None:
    arguments = {k: v for k, v in mace_upstream.CONFIGURATIONS["mp0-medium"].items() if k != name}
    with pytest.raises(CheckpointError, match=f"the config lacks {name}"):
        from_arguments(arguments, "x")


@pytest.mark.parametrize(
    ("changed", "named"),
    [
        ({"embedding_specs": {"total_charge": {"type": "continuous"}}}, "embedding_specs"),
        ({"use_so3": True}, "use_so3"),
        ({"gate": "tanh"}, "activation tanh"),
        ({"gate": "torch.nn.functional.relu"}, "activation relu"),
        ({"interaction_cls": "RealAgnosticAttResidualInteractionBlock"}, "AttResidual"),
        ({"interaction_cls_first": "SomethingNew"}, "interaction block SomethingNew"),
        ({"readout_cls": "GeneralLinearReadoutBlock"}, "readout GeneralLinearReadoutBlock"),
        ({"radial_type": "laguerre"}, "radial basis laguerre"),
        ({"distance_transform": "Log"}, "distance transform Log"),
        ({"hidden_irreps": "8x0e+8x1e"}, "order 1 with parity e"),
        ({"hidden_irreps": "8x0e+8x0o"}, "order 0 with parity o"),
        ({"edge_irreps": "4x0e+4x1e"}, "order 1 with parity e"),
        ({"model": "AtomicDipolesMACE"}, "AtomicDipolesMACE"),
    ],
)
def test_unsupported_arguments_are_named(changed: dict[str, Any], named: str) -> None:
    arguments = {**mace_upstream.CONFIGURATIONS["mp0-medium"], **changed}
    with pytest.raises(UnsupportedFeatureError, match=named):
        from_arguments(arguments, "x")


@pytest.mark.parametrize("block", INTERACTIONS)
def test_every_supported_block_is_read(block: str) -> None:
    arguments = {**mace_upstream.CONFIGURATIONS["mp0-medium"], "interaction_cls": block}
    assert from_arguments(arguments, "x").layers[1].interaction == block


def test_channels_may_leave_out_orders() -> None:
    assert channels("16x0e+4x2e", "x") == (16, 0, 4)
