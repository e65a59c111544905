"""Models for LAMMPS, and all structures on 1, 2 and 4 ranks, each in one run of LAMMPS."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import mace_models
import pytest
from lammps_runs import Lammps, program
from torch import nn
from trust_structures import crystals

from compactmlip.compress.apply import keep_species, with_layer_cutoffs
from compactmlip.deploy.compile import compile_model
from compactmlip.lammps.build import build, installed
from compactmlip.models import model_spec

Models = Callable[..., Path]


@pytest.fixture(scope="session")
def lammps(kernels: None) -> Lammps:
    """LAMMPS with the plugin; skip where there is none."""
    installation = installed()
    if installation is None or program("lmp") is None or program("mpirun") is None:
        pytest.skip("LAMMPS and mpich are not installed")
    return Lammps(build(installation))


@pytest.fixture(scope="session")
def models(
    make_model: Any, make_spec: Any, kernels: None, tmp_path_factory: pytest.TempPathFactory
) -> Models:
    """``models("mace", dtype="float64", backend="kernels")``: a deployed file, made once.

    "mace" has two layers and five species; "sevennet" five layers, reduced to Mg and O, of which those of
    "short" have cutoffs of their own; "trusted" two layers and a trust region, of rattled MgO; "other" a
    shorter cutoff and Mg and O in another order.
    """
    folder = tmp_path_factory.mktemp("models")
    native: dict[str, nn.Module] = {}

    def make(name: str) -> nn.Module:
        if name == "mace":
            return mace_models.make_model(mace_models.make_spec())
        if name == "trusted":
            return make_model(make_spec(channels=(6, 4), num_layers=2, lmax_edge=2), seed=3)
        if name == "other":
            return make_model(make_spec(species=("O", "Mg"), cutoff=3.3, num_layers=2, lmax_edge=1), seed=5)
        made = keep_species(make_model(make_spec(num_layers=5)), ("Mg", "O"))
        if name == "short":
            cutoff = model_spec(made).cutoff
            return with_layer_cutoffs(made, (None, 0.9 * cutoff, None, 0.8 * cutoff, 0.7 * cutoff))
        return made

    def file(name: str, *, dtype: str = "float64", backend: str = "kernels") -> Path:
        path = folder / f"{name}-{dtype}-{backend}.pt"
        if not path.exists():
            if name not in native:
                native[name] = make(name)
            known = crystals(30) if name == "trusted" else None
            options = {"dtype": dtype, "backend": backend, "trust_structures": known}
            compile_model(native[name], path, **options)  # type: ignore[arg-type]
        return path

    return file
