"""Upstream MACE models for parity tests, described without mace-torch: arguments, weights, structures.

``tests/reference/make_mace_reference.py`` builds them with mace-torch and stores what they predict;
``tests/families/test_mace.py`` rebuilds their state dicts by name and shape and imports those.
"""

from __future__ import annotations

import zlib
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from ase import Atoms
from ase.build import bulk, molecule
from numpy.typing import NDArray

_PLAIN = "RealAgnosticInteractionBlock"
_RESIDUAL = "RealAgnosticResidualInteractionBlock"
_DENSITY = "RealAgnosticDensityInteractionBlock"
_DENSITY_RESIDUAL = "RealAgnosticDensityResidualInteractionBlock"
_NONLINEAR = "RealAgnosticResidualNonLinearInteractionBlock"

_ORGANIC = [1, 6, 7, 8, 9, 15, 16, 17, 35, 53]
_BASE: dict[str, Any] = {
    "model": "ScaleShiftMACE",
    "r_max": 6.0,
    "num_bessel": 10,
    "num_polynomial_cutoff": 5,
    "max_ell": 3,
    "interaction_cls": _RESIDUAL,
    "interaction_cls_first": _RESIDUAL,
    "num_interactions": 2,
    "MLP_irreps": "16x0e",
    "correlation": 3,
    "gate": "silu",
    "radial_MLP": [64, 64, 64],
    "avg_num_neighbors": 61.964672446250916,
    "atomic_numbers": list(range(1, 90)),
    "use_reduced_cg": False,
}
_DENSE = {"interaction_cls": _DENSITY_RESIDUAL, "interaction_cls_first": _DENSITY}
_AGNESI_ZBL = {"distance_transform": "Agnesi", "pair_repulsion": True}
_OFF = {
    "num_bessel": 8,
    "interaction_cls_first": _PLAIN,
    "atomic_numbers": _ORGANIC,
    "avg_num_neighbors": 17.2,
}


def _hidden(lmax: int, channels: int = 8) -> str:
    return "+".join(f"{channels}x{l}{'eo'[l % 2]}" for l in range(lmax + 1))


_SPECIFIC: dict[str, dict[str, Any]] = {
    "mp0-small": {"hidden_irreps": _hidden(0)},
    "mp0-medium": {"hidden_irreps": _hidden(1, 128)},
    "mp0-large": {"hidden_irreps": _hidden(2)},
    "mp0b-medium": {"hidden_irreps": _hidden(1), **_AGNESI_ZBL},
    "mp0b3-medium": {"hidden_irreps": _hidden(1), "num_polynomial_cutoff": 6, **_AGNESI_ZBL, **_DENSE},
    "omat-small": {"hidden_irreps": _hidden(0, 128), **_AGNESI_ZBL, **_DENSE},
    # MPA-0, OMAT-0 and MATPES medium are alike.
    "omat-medium": {"hidden_irreps": _hidden(1), **_AGNESI_ZBL, **_DENSE},
    "off23-small": {"hidden_irreps": _hidden(0, 12), "r_max": 4.5, **_OFF},
    "off23-medium": {"hidden_irreps": _hidden(1, 128), "r_max": 5.0, **_OFF},
    "off23-large": {"hidden_irreps": _hidden(2, 14), "r_max": 5.0, **_OFF},
    "off24-medium": {"hidden_irreps": _hidden(1), **_OFF, "num_bessel": 10},
    # The blocks of MACE-MH: species embeddings on edges, gates, biases, one contraction for all species.
    "mh": {
        "hidden_irreps": _hidden(1),
        "edge_irreps": _hidden(1, 4),
        "interaction_cls": _NONLINEAR,
        "interaction_cls_first": _NONLINEAR,
        "readout_cls": "NonLinearBiasReadoutBlock",
        "heads": ["omat", "spice", "rgd1"],
        "use_agnostic_product": True,
        "apply_cutoff": False,
        **_AGNESI_ZBL,
    },
    "multihead": {"hidden_irreps": _hidden(1), "heads": ["a", "Default", "b"], **_DENSE},
    "soft-gaussian": {
        "hidden_irreps": _hidden(1),
        "distance_transform": "Soft",
        "radial_type": "gaussian",
        "interaction_cls_first": _PLAIN,
    },
    "agnesi-chebyshev": {
        "hidden_irreps": _hidden(0),
        "distance_transform": "Agnesi",
        "radial_type": "chebyshev",
    },
    "last-readout": {
        "hidden_irreps": _hidden(1),
        "correlation": [2, 3],
        "use_last_readout_only": True,
        "keep_last_layer_irreps": True,
    },
    "one-layer": {"model": "MACE", "hidden_irreps": _hidden(2), "num_interactions": 1, "correlation": 2},
    "three-layers": {"hidden_irreps": _hidden(1), "num_interactions": 3, "max_ell": 2, "correlation": 4},
    # Reduced Clebsch-Gordan tensors: another basis of couplings, which has to be in the state dict.
    "reduced": {
        "hidden_irreps": _hidden(1, 4),
        "max_ell": 2,
        "use_reduced_cg": True,
        "atomic_numbers": _ORGANIC[:4],
        "radial_MLP": [8],
    },
    # Converted by upstream to cuequivariance, whose layout of the contraction's weights differs.
    "cuequivariance": {"hidden_irreps": _hidden(1, 4), "radial_MLP": [8], "atomic_numbers": _ORGANIC},
    "cuequivariance-organic": {"hidden_irreps": _hidden(2, 4), "radial_MLP": [8], **_OFF},
}
CONFIGURATIONS: dict[str, dict[str, Any]] = {name: {**_BASE, **own} for name, own in _SPECIFIC.items()}
"""Constructor arguments by name, as plain values; at most 128 channels, the others narrowed."""

HEADS = {"mh": "spice", "multihead": None}
"""Head to choose at import; None takes the one named Default."""

READOUT_GAIN = {"one-layer": 300.0}
"""Brings the forces of a model without energy scale to the size of the others."""

Shapes = Mapping[str, Sequence[int]]


def draw_weights(name: str, shapes: Shapes, seed: int = 0) -> dict[str, NDArray[np.float64]]:
    """Parameters of model ``name`` by parameter name and shape: none is zero, all have an effect."""
    weights = {key: _draw(key, tuple(shape), f"{name}/{key}/{seed}") for key, shape in shapes.items()}
    gain = READOUT_GAIN.get(name, 1.0)
    return {key: w * gain if key.startswith("readouts.") else w for key, w in weights.items()}


def _draw(key: str, shape: tuple[int, ...], seed: str) -> NDArray[np.float64]:
    normal = np.random.default_rng(zlib.crc32(seed.encode())).normal(size=shape)
    if key.endswith((".alpha", ".beta")):  # divisor alpha + beta * density
        return np.asarray((12.0 if key.endswith("alpha") else 0.4) + 0.05 * normal)
    if "symmetric_contractions" in key:
        return normal / shape[1]
    if "_embedding.weight" in key and "node" not in key:
        return 3.0 * normal
    norm = "conv_tp_weights.net." in key or "density_fn.net." in key
    if norm and len(shape) == 1 and key.endswith("weight"):  # gain of a layer norm
        return 1.0 + 0.3 * normal
    return normal


def checksum(weights: Mapping[str, NDArray[np.float64]]) -> float:
    """One number that tells whether numpy still draws what the reference was made with."""
    return float(sum(w.reshape(-1)[:5].sum() for w in weights.values()))


def structures(name: str) -> dict[str, Atoms]:
    """Rattled crystal, slab, molecule and (of three) a skewed cell, and a lone atom."""
    if CONFIGURATIONS[name]["atomic_numbers"][-1] < 89:
        return _organic(CONFIGURATIONS[name]["atomic_numbers"])
    crystal = bulk("MgO", "rocksalt", a=4.0, cubic=True)
    slab = bulk("SiC", "zincblende", a=4.36, cubic=True)
    slab.pbc = (True, True, False)
    slab.center(vacuum=6.0, axis=2)
    skewed = Atoms("FeLaOPb", cell=[[3.9, 0.1, 0], [-0.9, 4.1, 0.2], [0.5, 0.7, 4.4]], pbc=True)
    skewed.set_scaled_positions([[0.02, 0.05, 0.01], [0.55, 0.45, 0.52], [0.1, 0.52, 0.48], [0.6, 0.02, 0.9]])
    ethanol = molecule("CH3CH2OH")
    crystal.rattle(0.08, seed=1)
    slab.rattle(0.08, seed=3)
    ethanol.rattle(0.05, seed=4)
    return {"crystal": crystal, "slab": slab, "skewed": skewed, "molecule": ethanol, "atom": Atoms("O")}


def _organic(numbers: Sequence[int]) -> dict[str, Atoms]:
    ice = molecule("H2O")
    ice.cell, ice.pbc = [[4.0, 0.2, 0], [0, 4.2, -0.3], [0.1, 0, 3.9]], True
    slab = molecule("CH3Cl" if 17 in numbers else "HCN")
    slab.cell, slab.pbc = [5.0, 5.0, 20.0], (True, True, False)
    ethanol = molecule("CH3CH2OH")
    ice.rattle(0.05, seed=1)
    slab.rattle(0.03, seed=3)
    ethanol.rattle(0.05, seed=4)
    return {"crystal": ice, "slab": slab, "molecule": ethanol, "atom": Atoms("O")}
