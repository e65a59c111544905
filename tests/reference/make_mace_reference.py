"""Reference numbers for the MACE import and its symmetric products, computed by mace-torch.

Run with the Python of an environment that has mace-torch 0.3.16, e3nn 0.4.4, cuequivariance-torch:

    python tests/reference/make_mace_reference.py

``mace/reference.json``, by model of ``tests/mace_upstream.py``: ``shapes`` of the parameters, whose values
are drawn by name and not stored, their ``checksum``, and ``num_parameters``.  ``mace/reference.npz``:

* ``<model>/state/<name>``: buffers that an import reads (float64; constants of transforms, radii and
  repulsion are perturbed, so that they have to be read and not assumed)
* ``<model>/<structure>/energy``, ``node_energy`` (eV), ``forces`` (eV/A), ``stress`` (eV/A^3, 3 x 3, only
  where all directions are periodic)
* ``<fixture>.model/...``: the same for a stored whole-module file

``mace/products.npz``: values of upstream's dense couplings, ``<lmax>_<degree>_<L>`` (points, 2L+1, K), for
the features ``x_<lmax>`` (points, (lmax+1)^2); odd coupling phases are those of e3nn 0.4.
"""

from __future__ import annotations

import json
import os
import sys
import warnings
from pathlib import Path
from typing import Any

os.environ["TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD"] = "1"  # e3nn 0.4.4 reads its own tables as a pickle
import numpy as np
import torch
from ase import Atoms
from e3nn import o3
from mace import data, modules
from mace.cli import convert_e3nn_cueq
from mace.tools import AtomicNumberTable, torch_geometric
from mace.tools.cg import U_matrix_real

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from mace_upstream import CONFIGURATIONS, HEADS, checksum, draw_weights, structures

warnings.filterwarnings("ignore")
OUT = Path(__file__).resolve().parent / "mace"
CLASSES = {"readout_cls": "NonLinearReadoutBlock", "interaction_cls": None, "interaction_cls_first": None}
PERTURBED = (
    "bessel_fn.bessel_weights",
    "gaussian_weights",
    "covalent_radii",
    "distance_transform.",
    "_fn.c",
    "_fn.a_",
)
LARGEST_FORCE = 3.0  # eV/A, in the crystal
PRODUCTS = [(1, 1), (1, 2), (1, 3), (2, 2), (2, 3), (3, 2), (3, 3), (2, 4)]  # lmax, degree


def build(name: str) -> torch.nn.Module:
    """Model of upstream with drawn parameters, perturbed constants and forces of a few eV/A."""
    arguments = dict(CONFIGURATIONS[name])
    heads, numbers = arguments.get("heads", ["Default"]), arguments["atomic_numbers"]
    rng = np.random.default_rng(len(name))
    energies = rng.normal(size=(len(heads), len(numbers))) * 3
    arguments["atomic_energies"] = energies if len(heads) > 1 else energies[0]
    arguments["num_elements"] = len(numbers)
    kind = arguments.pop("model")
    if kind == "ScaleShiftMACE":
        arguments["atomic_inter_scale"] = (
            [1.0 + 0.1 * k for k in range(len(heads))] if len(heads) > 1 else 1.0
        )
        arguments["atomic_inter_shift"] = (
            [0.1 + 0.1 * k for k in range(len(heads))] if len(heads) > 1 else 0.2
        )
    for key in ("interaction_cls", "interaction_cls_first"):
        arguments[key] = modules.interaction_classes[arguments[key]]
    if "readout_cls" in arguments:
        arguments["readout_cls"] = getattr(modules, arguments["readout_cls"])
    for key in ("hidden_irreps", "MLP_irreps", "edge_irreps"):
        if key in arguments:
            arguments[key] = o3.Irreps(arguments[key])
    arguments["gate"] = torch.nn.functional.silu
    model = getattr(modules, kind)(**arguments)
    if name.startswith("cuequivariance"):
        model = convert_e3nn_cueq.run(model, device="cpu", return_model=True)
    weights = draw_weights(name, {key: p.shape for key, p in model.named_parameters()})
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            parameter.copy_(torch.as_tensor(weights[key]))
        for key, buffer in model.named_buffers():
            if key.endswith("exp") or any(part in key for part in PERTURBED):
                spread = 0.02 * torch.as_tensor(rng.normal(size=buffer.shape))
                # Larger radii: the repulsion reaches the bonds of the test structures.
                buffer *= (1.15 if "pair_repulsion_fn.covalent" in key else 1.0) + spread
    if kind == "ScaleShiftMACE" and arguments.get("radial_type") != "chebyshev":
        largest = evaluate(model, structures(name)["crystal"], HEADS.get(name))["forces"]
        model.scale_shift.scale *= LARGEST_FORCE / np.abs(largest).max()
    return model


def evaluate(model: torch.nn.Module, atoms: Atoms, head: str | None = None) -> dict[str, np.ndarray]:
    """What upstream predicts, in float64."""
    table = AtomicNumberTable([int(z) for z in model.atomic_numbers])
    if head is None:
        head = "Default" if "Default" in model.heads else model.heads[0]
    item = data.AtomicData.from_config(
        data.config_from_atoms(atoms, head_name=head),
        z_table=table,
        cutoff=float(model.r_max),
        heads=model.heads,
    )
    batch = next(iter(torch_geometric.dataloader.DataLoader([item], batch_size=1, shuffle=False)))
    periodic = bool(atoms.pbc.all())
    # torch has no derivative of the Chebyshev polynomials that upstream uses.
    forces = type(model.radial_embedding.bessel_fn).__name__ != "ChebychevBasis"
    found = model(batch.to_dict(), compute_force=forces, compute_stress=periodic and forces)
    results = {"energy": found["energy"][0], "node_energy": found["node_energy"]}
    if forces:
        results["forces"] = found["forces"]
    else:
        results["forces"] = torch.ones_like(batch.positions) * float("nan")
    if periodic and forces:
        results["stress"] = found["stress"][0]
    return {key: value.detach().numpy() for key, value in results.items()}


def is_stored(name: str, key: str, buffer: torch.Tensor) -> bool:
    """Whether an import reads a buffer: not the dense couplings, except where only they tell the basis."""
    if "U_matrix" in key:
        return name == "reduced"
    return buffer.numel() <= 300 and not key.startswith(("interactions", "products", "readouts"))


def reference(name: str) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    model = build(name)
    weights = {key: p.detach().numpy() for key, p in model.named_parameters()}
    described = {
        "shapes": {key: list(w.shape) for key, w in weights.items()},
        "checksum": checksum(weights),
        "num_parameters": sum(w.size for w in weights.values()),
    }
    arrays = {
        f"state/{key}": b.numpy().copy()
        for key, b in model.state_dict().items()
        if key not in weights and is_stored(name, key, b)
    }
    for label, atoms in structures(name).items():
        arrays |= {f"{label}/{key}": value for key, value in evaluate(model, atoms, HEADS.get(name)).items()}
    if "pair_repulsion" in CONFIGURATIONS[name]:
        model.pair_repulsion_fn.c.zero_()
        without = evaluate(model, structures(name)["crystal"], HEADS.get(name))["energy"]
        assert abs(without - arrays["crystal/energy"]) > 1e-3, "the repulsion reaches no bond"
    return described, arrays


def fixture(name: str) -> dict[str, np.ndarray]:
    """Predictions of a stored whole-module file, for structures of its species."""
    model = torch.load(OUT / name, weights_only=False)
    arrays = {}
    for label, atoms in structures("cuequivariance").items():
        if set(atoms.numbers) <= {int(z) for z in model.atomic_numbers}:
            arrays |= {f"{label}/{key}": value for key, value in evaluate(model, atoms).items()}
    return arrays


def products() -> dict[str, np.ndarray]:
    """Upstream's couplings, contracted with random features."""
    rng = np.random.default_rng(3)
    arrays = {f"x_{lmax}": rng.normal(size=(6, (lmax + 1) ** 2)) for lmax in (1, 2, 3)}
    for lmax, degree in PRODUCTS:
        inputs = o3.Irreps([(1, (l, (-1) ** l)) for l in range(lmax + 1)])
        for L in range(min(lmax, 2) + 1):
            output = o3.Irreps([(1, (L, (-1) ** L))])
            coupling = U_matrix_real(inputs, output, degree, use_cueq_cg=False, dtype=torch.float64)[
                -1
            ].numpy()
            values = []
            for x in arrays[f"x_{lmax}"]:
                value = coupling if L else coupling[None]
                for _ in range(degree):
                    value = np.tensordot(value, x, axes=(1, 0))
                values.append(value)
            arrays[f"{lmax}_{degree}_{L}"] = np.stack(values)
    return arrays


def main() -> None:
    torch.set_num_threads(1)
    torch.set_default_dtype(torch.float64)
    OUT.mkdir(exist_ok=True)
    described, arrays = {}, {}
    for name in CONFIGURATIONS:
        described[name], found = reference(name)
        arrays |= {f"{name}/{key}": value for key, value in found.items()}
        largest = {k.split("/")[0]: np.abs(v).max() for k, v in found.items() if k.endswith("/forces")}
        print(
            name, described[name]["num_parameters"], {k: f"{v:.2g}" for k, v in largest.items()}, flush=True
        )
    for name in ("e3nn.model", "cueq.model"):
        arrays |= {f"{name}/{key}": value for key, value in fixture(name).items()}
    np.savez_compressed(OUT / "reference.npz", **arrays)
    (OUT / "reference.json").write_text(json.dumps(described, indent=0) + "\n")
    np.savez_compressed(OUT / "products.npz", **products())


if __name__ == "__main__":
    main()
