"""Energies of free atoms (E0): shift a model's energy per species to another level of theory.

A shift per species changes no force and no stress.  It is all that has to change when the labels only
count energies from another zero.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

import numpy as np
import torch
from torch import Tensor, nn

from compactmlip.errors import InputError
from compactmlip.models import model_device, model_dtype, model_spec

E0Choice = Literal["auto", "parent", "isolated", "least-squares"]

MUCH_WORSE, NEGLIGIBLE = 1.5, 0.005
"""Isolated atoms are not used by "auto" if they leave an error this many times that of least squares, and so
much more (eV/atom)."""


@dataclass(frozen=True)
class ReferenceEnergies:
    """Shifts of the energy of each species.

    Attributes
    ----------
    shifts
        eV per atom, added to the model's energy; zero for species that are not named.
    source
        "parent", "isolated", "least-squares" or "given".
    mae
        eV/atom that each possible choice leaves, by name.
    note
        What people should know, or an empty text.
    """

    shifts: dict[str, float]
    source: str
    mae: dict[str, float] = field(default_factory=dict)
    note: str = ""


def fit_reference(
    choice: E0Choice | Mapping[str, float],
    species: Sequence[str],
    counts: np.ndarray,
    missing: np.ndarray,
    isolated: Mapping[str, float],
    parent_isolated: Mapping[str, float],
) -> ReferenceEnergies:
    """Find the shifts.

    "least-squares" fits ``missing`` per atom by a constant per species; of equally good fits, it is the one
    with the smallest shifts.  "isolated" makes the energy of a free atom what its label says.  "auto" is
    "isolated" where all species have such a label and it leaves an error that is not much above that of
    least squares, else "least-squares".  A mapping gives energies of free atoms.

    Parameters
    ----------
    choice
        How.
    species
        Of the model.
    counts
        (S, species) atoms of each species in each structure.
    missing
        (S,) label minus prediction, eV.
    isolated, parent_isolated
        Energies of free atoms, eV: labels, and the model's.

    Raises
    ------
    InputError
        If a species has no energy of its free atom where one is needed.
    """
    present = [s for k, s in enumerate(species) if counts[:, k].any()]
    shifts = {"parent": dict.fromkeys(species, 0.0)}
    sizes = counts.sum(axis=1)
    fit, _, rank, _ = np.linalg.lstsq(counts / sizes[:, None], missing / sizes, rcond=None)
    shifts["least-squares"] = {s: float(x) for s, x in zip(species, fit, strict=True)}
    lacking = [s for s in present if s not in isolated]
    if not isinstance(choice, str):
        _require([s for s in present if s not in choice], "the given energies of free atoms")
        shifts["given"] = _from_atoms(species, choice, parent_isolated)
        choice = "given"  # type: ignore[assignment]
    elif choice == "isolated":
        _require(lacking, "the frames with config_type=IsolatedAtom")
    if not lacking:
        shifts["isolated"] = _from_atoms(species, isolated, parent_isolated)
    mae = {name: _mae(counts, missing, species, s) for name, s in shifts.items()}
    note = ""
    if choice == "auto":
        choice = "least-squares"
        allowed = max(MUCH_WORSE * mae["least-squares"], mae["least-squares"] + NEGLIGIBLE)
        if "isolated" in mae and mae["isolated"] <= allowed:
            choice = "isolated"
        elif "isolated" in mae:
            note = (
                f"isolated atoms would leave {1e3 * mae['isolated']:.3g} meV/atom, least squares leave "
                f"{1e3 * mae['least-squares']:.3g}; --e0 isolated uses the isolated atoms all the same"
            )
    absent = [s for s in species if s not in present and not shifts[str(choice)][s]]
    if absent and choice != "parent":
        note += (
            f"{'; ' if note else ''}{', '.join(absent)} are not in the data and keep the parent's energies"
        )
    if choice == "least-squares" and rank < len(present):
        note += ("; " if note else "") + (
            f"the data determine only {rank} combinations of the energies of {len(present)} species: "
            "other compositions may be off by a constant per formula unit"
        )
    return ReferenceEnergies(shifts[str(choice)], str(choice), mae, note)


def _require(lacking: Sequence[str], where: str) -> None:
    if lacking:
        raise InputError(
            f"{where} do not name {', '.join(lacking)}; add {'it' if len(lacking) == 1 else 'them'}, or use "
            "--e0 least-squares."
        )


def _from_atoms(
    species: Sequence[str], wanted: Mapping[str, float], found: Mapping[str, float]
) -> dict[str, float]:
    return {s: float(wanted[s] - found[s]) if s in wanted else 0.0 for s in species}


def _mae(
    counts: np.ndarray, missing: np.ndarray, species: Sequence[str], shifts: Mapping[str, float]
) -> float:
    left = missing - counts @ np.array([shifts[s] for s in species])
    return float(np.abs(left / counts.sum(axis=1)).mean())


@torch.no_grad()
def isolated_energies(model: nn.Module) -> dict[str, float]:
    """Energy in eV that a model gives a free atom of each of its species."""
    spec, device = model_spec(model), model_device(model)
    index = torch.arange(len(spec.species), device=device)
    nothing = torch.zeros(0, dtype=torch.long, device=device)
    vectors = torch.zeros(0, 3, dtype=model_dtype(model), device=device)
    energies: Tensor = model(index, nothing, nothing, vectors)
    return dict(zip(spec.species, energies.double().tolist(), strict=True))


def shifted(model: nn.Module, shifts: Mapping[str, float]) -> nn.Module:
    """Copy of a model with ``shifts`` (eV) added to the energy of each species."""
    result = copy.deepcopy(model)
    buffer = result.get_buffer("energy_shift")
    values = [shifts.get(s, 0.0) for s in model_spec(model).species]
    buffer.add_(torch.tensor(values, dtype=buffer.dtype, device=buffer.device))
    return result
