"""Errors of a model against a reference on held-out structures.

The statistics are pure functions of arrays.  Energies are compared per atom, forces and stresses per
Cartesian component; numbers for people are in meV/atom, meV/Angstrom and meV/Angstrom^3.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from ase import Atoms
from ase.calculators.calculator import PropertyNotImplementedError
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict
from torch import nn

from compactmlip.data.config_types import grouped
from compactmlip.data.teacher import evaluate
from compactmlip.errors import InputError
from compactmlip.progress import Track

Array = NDArray[np.float64]

MILLI = 1000.0
"""meV per eV."""

VOIGT = ((0, 0), (1, 1), (2, 2), (1, 2), (0, 2), (0, 1))
"""ASE's order of the six stress components."""


@dataclass(frozen=True)
class Labels:
    """Energies, forces and stresses of a list of structures.

    Attributes
    ----------
    energies
        (S,) eV.
    forces
        One (N, 3) array per structure, eV/Angstrom.
    stresses
        (S, 6) Voigt, eV/Angstrom^3; NaN where a structure is not periodic in three directions or the
        stress is not known.
    """

    energies: Array
    forces: tuple[Array, ...]
    stresses: Array


class ErrorStats(BaseModel):
    """Errors of one quantity, all in ``unit`` except ``r2``.

    ``reference_mean_abs`` is the mean absolute reference value (for energies: deviation from the mean),
    the size that an error should be held against.  ``r2`` is None where the reference does not vary.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", ser_json_inf_nan="strings")

    unit: str
    count: int
    mae: float
    rmse: float
    maximum: float
    bias: float
    reference_mean_abs: float
    r2: float | None


class KindErrors(BaseModel):
    """Mean absolute errors on structures of one kind, meV/atom and meV/Angstrom.

    ``mean_force`` is the mean length of the reference force on an atom, meV/Angstrom.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", ser_json_inf_nan="strings")

    frames: int
    energy: float
    forces: float
    mean_force: float


class ParityReport(BaseModel):
    """Errors of energies, forces (all, and per species) and stresses on ``frames`` structures.

    ``by_kind`` has a row for each ``config_type`` of the structures, if there are several.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", ser_json_inf_nan="strings")

    frames: int
    atoms: int
    mean_force: float
    """Mean length of the reference force on an atom, meV/Angstrom."""
    energy: ErrorStats
    forces: ErrorStats
    forces_by_species: dict[str, ErrorStats]
    stress: ErrorStats | None
    by_kind: dict[str, KindErrors] = {}


def error_stats(reference: Array, predicted: Array, unit: str, *, centered: bool = False) -> ErrorStats:
    """Compare two arrays of the same shape, given in eV-based units, and report in milli of them.

    Parameters
    ----------
    reference, predicted
        Values of any equal shape, at least one.
    unit
        Name of the reported (milli) unit.
    centered
        Measure the size of the reference from its mean (energies have an arbitrary zero).

    Raises
    ------
    InputError
        If the shapes differ or there is no value.
    """
    if np.shape(reference) != np.shape(predicted) or np.size(reference) == 0:
        raise InputError(f"cannot compare arrays of shapes {np.shape(reference)} and {np.shape(predicted)}.")
    target = np.ravel(reference).astype(float) * MILLI
    error = np.ravel(predicted).astype(float) * MILLI - target
    variance = float(np.mean((target - target.mean()) ** 2))
    size = target - target.mean() if centered else target
    mean_square = float(np.mean(error**2))
    return ErrorStats(
        unit=unit,
        count=target.size,
        mae=float(np.mean(np.abs(error))),
        rmse=float(np.sqrt(mean_square)),
        maximum=float(np.max(np.abs(error))),
        bias=float(np.mean(error)),
        reference_mean_abs=float(np.mean(np.abs(size))),
        r2=1.0 - mean_square / variance if variance > 1e-12 else None,
    )


def parity(frames: Sequence[Atoms], reference: Labels, predicted: Labels) -> ParityReport:
    """Compare predictions with reference labels of the same structures.

    Raises
    ------
    InputError
        If there is no structure, or the labels do not belong to these structures.
    """
    for name, labels in (("reference", reference), ("prediction", predicted)):
        shapes = [np.shape(f) for f in labels.forces]
        if not frames or shapes != [(len(a), 3) for a in frames] or len(labels.energies) != len(frames):
            raise InputError(f"the {name} does not belong to these {len(frames)} structures.")
    sizes = np.array([len(a) for a in frames], dtype=float)
    symbols = np.array([s for a in frames for s in a.get_chemical_symbols()])
    true_forces, forces = np.concatenate(reference.forces), np.concatenate(predicted.forces)
    known = np.isfinite(reference.stresses).all(axis=1)
    return ParityReport(
        frames=len(frames),
        atoms=int(sizes.sum()),
        mean_force=float(np.linalg.norm(true_forces, axis=1).mean() * MILLI),
        energy=error_stats(reference.energies / sizes, predicted.energies / sizes, "meV/atom", centered=True),
        forces=error_stats(true_forces, forces, "meV/A"),
        forces_by_species={
            str(s): error_stats(true_forces[symbols == s], forces[symbols == s], "meV/A")
            for s in sorted(set(symbols))
        },
        stress=error_stats(reference.stresses[known], predicted.stresses[known], "meV/A^3")
        if known.any()
        else None,
        by_kind=_by_kind(frames, reference, predicted),
    )


def _by_kind(frames: Sequence[Atoms], reference: Labels, predicted: Labels) -> dict[str, KindErrors]:
    found = {}
    for kind, members in sorted(grouped(frames, unnamed="other").items()):
        errors = [(predicted.energies[k] - reference.energies[k]) / len(frames[k]) for k in members]
        true = np.concatenate([reference.forces[k] for k in members])
        difference = np.concatenate([predicted.forces[k] for k in members]) - true
        found[kind] = KindErrors(
            frames=len(members),
            energy=float(MILLI * np.abs(errors).mean()),
            forces=float(MILLI * np.abs(difference).mean()),
            mean_force=float(MILLI * np.linalg.norm(true, axis=1).mean()),
        )
    return found


def has_labels(frames: Sequence[Atoms]) -> bool:
    """Tell whether the structures carry REF_energy and REF_forces.

    Raises
    ------
    InputError
        If only some of them do: two kinds of reference in one set would mean nothing.
    """
    labelled = ["REF_energy" in a.info and "REF_forces" in a.arrays for a in frames]
    if any(labelled) and not all(labelled):
        raise InputError(
            f"structure {labelled.index(False)} has no REF_energy and REF_forces but others have; "
            "give labels for all held-out structures or for none."
        )
    return bool(frames) and all(labelled)


def labels_of(frames: Sequence[Atoms]) -> Labels:
    """Collect REF_energy, REF_forces and, where it is there, REF_stress.

    Raises
    ------
    InputError
        If a label is missing, not finite, or has the wrong shape.
    """
    if not has_labels(frames):
        raise InputError("the structures have no REF_energy and REF_forces.")
    energies = np.array([float(a.info["REF_energy"]) for a in frames])
    forces = tuple(np.asarray(a.arrays["REF_forces"], dtype=float) for a in frames)
    for k, (energy, force) in enumerate(zip(energies, forces, strict=True)):
        if not (np.isfinite(energy) and np.isfinite(force).all()):
            raise InputError(f"structure {k}: REF_energy or REF_forces is not finite.")
    stresses = [
        _voigt(a.info["REF_stress"], f"structure {k}") if "REF_stress" in a.info else np.full(6, np.nan)
        for k, a in enumerate(frames)
    ]
    return Labels(energies, forces, np.array(stresses))


def evaluate_frames(
    model: Any, frames: Sequence[Atoms], *, progress: bool = False, description: str = "Evaluating"
) -> Labels:
    """Energies, forces and stresses from an ASE calculator or a native model.

    Parameters
    ----------
    model
        An ASE calculator, or an ``nn.Module`` with a ``spec`` (it is used as it is, in its own dtype).
    frames
        Structures; they are not changed, constraints are ignored.
    progress, description
        Whether to show a progress bar, and its title.
    """
    rows: list[tuple[float, Array, Array]] = []
    with Track(description, sum(len(a) for a in frames), enabled=progress) as track:
        evaluated = _from_model if isinstance(model, nn.Module) else _from_calculator
        for row in evaluated(model, frames):
            rows.append(row)
            track.advance(len(row[1]))
    energies, forces, stresses = zip(*rows, strict=True) if rows else ((), (), ())
    return Labels(np.array(energies, dtype=float), tuple(forces), np.array(stresses).reshape(-1, 6))


def _from_calculator(calculator: Any, frames: Sequence[Atoms]) -> Iterator[tuple[float, Array, Array]]:
    for atoms in frames:
        system = atoms.copy()
        system.set_constraint()
        system.calc = calculator
        energy, forces = float(system.get_potential_energy()), np.array(system.get_forces(), dtype=float)
        stress = np.full(6, np.nan)
        if system.pbc.all():
            with contextlib.suppress(PropertyNotImplementedError):
                stress = np.array(system.get_stress(), dtype=float)
        yield energy, forces, stress


def _from_model(model: nn.Module, frames: Sequence[Atoms]) -> Iterator[tuple[float, Array, Array]]:
    for indices, results in evaluate(frames, model):
        for k, result in zip(indices, results, strict=True):
            stress = _voigt(result.stress, "model") if frames[k].pbc.all() else np.full(6, np.nan)
            yield result.energy, result.forces, stress


def _voigt(stress: Any, where: str) -> Array:
    """Return six Voigt components from (6,), (3, 3) or (9,)."""
    values = np.asarray(stress, dtype=float)
    if values.size == 9:
        tensor = values.reshape(3, 3)
        values = np.array([0.5 * (tensor[i, j] + tensor[j, i]) for i, j in VOIGT])
    if values.shape != (6,):
        raise InputError(f"{where}: REF_stress has shape {np.shape(stress)}, expected (6,) or (3, 3).")
    return values
