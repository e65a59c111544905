"""Make mace-torch's own models, and leave the process as it was."""

from __future__ import annotations

import importlib
import os
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from compactmlip.errors import UnsupportedFeatureError

_CLASSES = ("interaction_cls", "interaction_cls_first")
_IRREPS = ("hidden_irreps", "MLP_irreps", "edge_irreps")


@contextmanager
def environment_kept() -> Iterator[None]:
    """Switch off torch's safe loading, as e3nn needs it while it is imported, and switch it on again.

    mace switches it off for the rest of the process when it is imported.
    """
    key = "TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD"
    before = os.environ.get(key)
    os.environ[key] = "1"
    try:
        yield
    finally:
        if before is None:
            os.environ.pop(key, None)
        else:
            os.environ[key] = before


@contextmanager
def upstream_state(dtype: torch.dtype) -> Iterator[None]:
    """Run upstream's code, which reads torch's default dtype, draws random weights and warns a lot.

    Default dtype, random numbers, environment and warning filters are restored, also after errors.
    """
    before = torch.get_default_dtype()
    with environment_kept(), warnings.catch_warnings(), torch.random.fork_rng(devices=[]):
        # Deprecations inside of mace and e3nn; nobody who exports a model can act on them.
        warnings.simplefilter("ignore")
        try:
            torch.set_default_dtype(dtype)
            yield
        finally:
            torch.set_default_dtype(before)


def build(arguments: Mapping[str, Any]) -> nn.Module:
    """Build an upstream model with random weights; call it inside of :func:`upstream_state`.

    Parameters
    ----------
    arguments
        Of the constructor, classes by name and irreps as text; ``model`` is the class to build.

    Raises
    ------
    UnsupportedFeatureError
        If mace-torch is not installed.
    """
    try:
        modules, o3 = importlib.import_module("mace.modules"), importlib.import_module("e3nn.o3")
    except ImportError as error:
        raise UnsupportedFeatureError(
            f"writing upstream MACE files needs mace-torch ({error}). "
            "Install it: pip install 'compactmlip[mace]'."
        ) from error
    made = dict(arguments)
    upstream_class = getattr(modules, made.pop("model"))
    for name in _CLASSES:
        made[name] = modules.interaction_classes[made[name]]
    for name in _IRREPS:
        made[name] = None if made[name] is None else o3.Irreps(made[name])
    made["readout_cls"] = getattr(modules, made["readout_cls"])
    made["gate"] = modules.gate_dict[made["gate"]]
    model: nn.Module = upstream_class(**made)
    return model


def evaluate(
    model: nn.Module, species: Tensor, centers: Tensor, neighbors: Tensor, positions: Tensor, num_species: int
) -> tuple[Tensor, Tensor]:
    """Energy of each atom, (N,) in eV, and forces, (N, 3) in eV/Angstrom, of a molecule."""
    count = len(species)
    zeros = positions.new_zeros(len(centers), 3)
    result = model(
        {
            "positions": positions.clone(),
            "node_attrs": nn.functional.one_hot(species, num_species).to(positions.dtype),
            # Upstream's edges point to the centre.
            "edge_index": torch.stack([neighbors, centers]),
            "shifts": zeros,
            "unit_shifts": zeros,
            "cell": positions.new_zeros(3, 3),
            "batch": torch.zeros(count, dtype=torch.long),
            "ptr": torch.tensor([0, count]),
            "head": torch.zeros(1, dtype=torch.long),
        }
    )
    return result["node_energy"].detach(), result["forces"].detach()
