"""Imported MACE models give mace-torch's numbers; the reference is stored, mace-torch is not needed.

``tests/reference/make_mace_reference.py`` writes what is compared with here.
"""

from __future__ import annotations

import json
import os
from functools import cache
from pathlib import Path
from typing import Any

import contract
import mace_upstream
import numpy as np
import pytest
import torch
from ase import Atoms
from torch import Tensor, nn

from compactmlip.errors import CheckpointError, InputError, UnsupportedFeatureError
from compactmlip.families.mace import import_model, load_checkpoint, sorted_columns, upstream_columns
from compactmlip.families.mace_config import from_arguments
from compactmlip.models.mace_architecture import MACEReadout, upstream_layer
from compactmlip.spec import Provenance

FOLDER = Path(__file__).parents[1] / "reference" / "mace"
DESCRIBED = json.loads((FOLDER / "reference.json").read_text())
NAMES = tuple(mace_upstream.CONFIGURATIONS)
TOLERANCE = 1e-10  # relative


@cache
def reference() -> dict[str, np.ndarray]:
    with np.load(FOLDER / "reference.npz") as stored:
        return dict(stored)


def upstream_state(name: str) -> dict[str, Tensor]:
    """State dict as upstream has it: drawn parameters and stored buffers."""
    weights = mace_upstream.draw_weights(name, DESCRIBED[name]["shapes"])
    prefix = f"{name}/state/"
    buffers = {k.removeprefix(prefix): v for k, v in reference().items() if k.startswith(prefix)}
    return {key: torch.tensor(value) for key, value in {**weights, **buffers}.items()}


def imported(name: str, state: dict[str, Tensor] | None = None, head: str | None = None) -> nn.Module:
    config = from_arguments(mace_upstream.CONFIGURATIONS[name], name)
    chosen = mace_upstream.HEADS.get(name) if head is None else head
    return import_model(config, upstream_state(name) if state is None else state, Provenance(), chosen, name)


def assert_parity(name: str, label: str, model: nn.Module, atoms: Atoms) -> None:
    """Compare with what upstream predicts, relative to the largest value of each kind."""
    found = contract.evaluate(model, atoms)
    values = {
        "energy": found.energies[0],
        "node_energy": found.node_energies,
        "forces": found.forces,
        "stress": found.stresses[0],
    }
    compared = set()
    for kind, value in values.items():
        expected = reference().get(f"{name}/{label}/{kind}")
        if expected is None or np.isnan(expected).all():
            continue
        scale = float(np.abs(expected).max())
        error = float(np.abs(value.numpy() - expected).max())
        assert error <= TOLERANCE * scale, (name, label, kind, error, scale)
        compared.add(kind)
    assert {"energy", "node_energy"} <= compared
    assert ("stress" in compared) <= bool(atoms.pbc.all())


@pytest.mark.parametrize("name", NAMES)
def test_parity(name: str) -> None:
    weights = mace_upstream.draw_weights(name, DESCRIBED[name]["shapes"])
    assert mace_upstream.checksum(weights) == pytest.approx(DESCRIBED[name]["checksum"], rel=1e-12), (
        "numpy draws other numbers than the reference was made with: make the reference again"
    )
    model = imported(name)
    for label, atoms in mace_upstream.structures(name).items():
        assert_parity(name, label, model, atoms)


@pytest.mark.parametrize("name", NAMES)
def test_reference_is_not_trivial(name: str) -> None:
    """Every parameter is drawn; forces are of the size of real ones, and stresses are there."""
    weights = mace_upstream.draw_weights(name, DESCRIBED[name]["shapes"])
    assert all(np.count_nonzero(w) == w.size for w in weights.values())
    assert sum(w.size for w in weights.values()) == DESCRIBED[name]["num_parameters"]
    if name == "agnesi-chebyshev":  # upstream cannot differentiate its Chebyshev polynomials
        return
    assert np.abs(reference()[f"{name}/crystal/stress"]).max() > 1e-3
    for label in ("crystal", "slab", "molecule"):
        assert 0.1 < np.abs(reference()[f"{name}/{label}/forces"]).max() < 30


@pytest.mark.parametrize("name", [n for n in NAMES if n not in ("mh", "multihead", "reduced")])
def test_every_parameter_is_imported(name: str) -> None:
    model = imported(name)
    assert sum(p.numel() for p in model.parameters()) == DESCRIBED[name]["num_parameters"]


def test_reduced_couplings_become_independent_products() -> None:
    """Upstream's reduced basis has one tensor per independent product too, but other ones."""
    model = imported("reduced")
    assert model.spec.architecture["contraction"] == "independent"
    assert sum(p.numel() for p in model.parameters()) == DESCRIBED["reduced"]["num_parameters"]


def test_other_couplings_without_their_tensors_are_refused() -> None:
    state = {k: v for k, v in upstream_state("reduced").items() if "U_matrix" not in k}
    with pytest.raises(CheckpointError, match="does not hold the coupling tensors"):
        imported("reduced", state)


def test_stated_reduced_couplings_are_believed() -> None:
    """Even where the number of weights fits the standard paths: numbers alone do not tell."""
    arguments = {**mace_upstream.CONFIGURATIONS["off23-small"], "use_reduced_cg": True}
    config = from_arguments(arguments, "x")
    with pytest.raises(CheckpointError, match="another basis"):
        import_model(config, upstream_state("off23-small"), Provenance(), None, "x")


def test_only_one_head_is_kept() -> None:
    """The other heads' readouts, energies, scale and shift have no effect on the one that is chosen."""
    name, state = "multihead", upstream_state("multihead")
    atoms = mace_upstream.structures(name)["molecule"]
    one, other = imported(name, state, "Default"), imported(name, state, "b")
    assert sum(p.numel() for p in one.parameters()) < DESCRIBED[name]["num_parameters"]
    difference = contract.evaluate(one, atoms).energies - contract.evaluate(other, atoms).energies
    assert abs(float(difference)) > 0.1
    for key in ("atomic_energies_fn.atomic_energies", "scale_shift.scale", "scale_shift.shift"):
        changed = state[key].clone()
        changed[[0, 2]] *= 7.0
        state[key] = changed
    torch.testing.assert_close(
        contract.evaluate(imported(name, state, "Default"), atoms).energies,
        contract.evaluate(one, atoms).energies,
        rtol=0,
        atol=0,
    )


def test_single_precision_files_are_imported_in_double() -> None:
    state = {k: v.float() if v.is_floating_point() else v for k, v in upstream_state("off23-small").items()}
    model = imported("off23-small", state)
    assert {p.dtype for p in model.parameters()} == {torch.float64}
    atoms = mace_upstream.structures("off23-small")["molecule"]
    expected = reference()["off23-small/molecule/energy"]
    assert float(contract.evaluate(model, atoms).energies[0]) == pytest.approx(float(expected), rel=1e-5)


def test_spec_says_what_the_model_is() -> None:
    spec = imported("off23-large").spec
    assert spec.family == "mace"
    assert spec.species == ("H", "C", "N", "O", "F", "P", "S", "Cl", "Br", "I")
    assert (spec.cutoff, spec.num_message_passing_layers) == (5.0, 2)
    assert spec.architecture["layers"][0]["out"] == [14, 14, 14]


def assert_file_parity(fixture: str) -> None:
    model = load_checkpoint(FOLDER / fixture, Provenance())
    labels = {key.split("/")[1] for key in reference() if key.startswith(f"{fixture}/")}
    assert {"crystal", "atom"} <= labels
    for label in labels:
        assert_parity(fixture, label, model, mace_upstream.structures("cuequivariance")[label])


def test_whole_module_file() -> None:
    assert_file_parity("e3nn.model")


@pytest.mark.filterwarnings("default")  # of mace and e3nn
def test_whole_module_file_in_the_reduced_basis_of_cuequivariance() -> None:
    """Only cuequivariance knows this basis; without it the file is refused, and the message says so."""
    try:
        import cuequivariance  # noqa: F401
        import mace.tools.cg  # noqa: F401
    except ImportError:
        with pytest.raises(UnsupportedFeatureError, match="Install cuequivariance"):
            load_checkpoint(FOLDER / "cueq.model", Provenance())
    else:
        assert_file_parity("cueq.model")


def test_whole_module_file_does_not_change_the_process() -> None:
    before = torch.get_default_dtype(), torch.get_num_threads(), dict(os.environ)
    load_checkpoint(FOLDER / "e3nn.model", Provenance())
    assert (torch.get_default_dtype(), torch.get_num_threads(), dict(os.environ)) == before


def test_state_dict_with_config(tmp_path: Path) -> None:
    name = "off23-small"
    arguments: dict[str, Any] = mace_upstream.CONFIGURATIONS[name]
    path = tmp_path / "model.pt"
    torch.save({"config": arguments, "state_dict": upstream_state(name)}, path)
    model = load_checkpoint(path, Provenance())
    for label, atoms in mace_upstream.structures(name).items():
        assert_parity(name, label, model, atoms)


def test_state_dict_without_config_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "model.pt"
    torch.save({"state_dict": upstream_state("off23-small")}, path)
    with pytest.raises(CheckpointError, match="without the constructor's arguments"):
        load_checkpoint(path, Provenance())


@pytest.mark.parametrize(
    "key",
    [
        "node_embedding.linear.weight",
        "interactions.1.skip_tp.weight",
        "products.0.linear.weight",
        "readouts.1.linear_2.weight",
        "atomic_numbers",
        "products.1.symmetric_contractions.contractions.0.weights_max",
        "interactions.0.conv_tp_weights.layer0.weight",
    ],
)
def test_missing_tensors_are_named(key: str) -> None:
    state = upstream_state("off23-small")
    del state[key]
    with pytest.raises(CheckpointError, match=r"off23-small|symmetric contraction"):
        imported("off23-small", state)


@pytest.mark.parametrize(
    "key", ["interactions.0.linear_up.weight", "interactions.1.skip_tp.weight", "products.0.linear.weight"]
)
def test_tensors_of_another_size_are_refused(key: str) -> None:
    state = upstream_state("off23-small")
    state[key] = torch.cat([state[key], state[key]])
    with pytest.raises(CheckpointError, match=key):
        imported("off23-small", state)


def test_heads_have_to_be_chosen() -> None:
    state = upstream_state("mh")
    config = from_arguments(mace_upstream.CONFIGURATIONS["mh"], "mh")
    with pytest.raises(InputError, match=r"several heads \(omat, spice, rgd1\)"):
        import_model(config, state, Provenance(), None, "mh")
    with pytest.raises(InputError, match="unknown head 'spicy'.*omat, spice, rgd1.*'spice'"):
        import_model(config, state, Provenance(), "spicy", "mh")


def test_couplings_that_are_no_symmetric_products_are_refused() -> None:
    state = upstream_state("reduced")
    key = "products.0.symmetric_contractions.contractions.0.U_matrix_2"
    state[key] = state[key] + 0.1
    with pytest.raises(UnsupportedFeatureError, match="not symmetric products"):
        imported("reduced", state)


def test_path_columns_are_only_reordered_and_signed(rng: np.random.Generator) -> None:
    layer = upstream_layer(
        (5, 4, 3), width=6, out=(6,), lmax_edge=3, correlation=2, readout=MACEReadout(kind="linear")
    )
    weight = torch.tensor(rng.normal(size=(7, sum(layer.up[path[0]] for path in layer.paths))))
    native = sorted_columns(weight, layer)
    assert not torch.equal(native, weight)
    assert torch.equal(upstream_columns(native, layer), weight)
