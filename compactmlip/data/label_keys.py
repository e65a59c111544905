"""Read the user's own labels: find their names in the file, and convert their units."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
from ase import Atoms, units
from pydantic import BaseModel, ConfigDict, Field

from compactmlip.data.read import (
    ENERGY,
    FORCES,
    STRESS,
    is_isolated_atom,
    normalised,
    read_for_labels,
)
from compactmlip.errors import InputError

CANDIDATES: dict[str, tuple[str, ...]] = {
    "energy": (ENERGY, "energy", "dft_energy", "DFT_energy", "Energy", "free_energy"),
    "forces": (FORCES, "forces", "force", "dft_forces", "dft_force", "DFT_forces", "DFT_force", "Forces"),
    "stress": (STRESS, "stress", "dft_stress", "DFT_stress"),
    "virials": ("REF_virials", "virials", "virial", "dft_virials", "dft_virial", "DFT_virials"),
}
"""Names that are tried in this order where none is given."""

_MOLAR = units.mol
ENERGY_UNITS = {
    "eV": 1.0,
    "meV": 1e-3,
    "Hartree": units.Hartree,
    "Rydberg": units.Rydberg,
    "kcal/mol": units.kcal / _MOLAR,
    "kJ/mol": units.kJ / _MOLAR,
}
"""Size of each unit in eV."""

FORCES_UNITS = {
    "eV/Angstrom": 1.0,
    "meV/Angstrom": 1e-3,
    "Hartree/Bohr": units.Hartree / units.Bohr,
    "Hartree/Angstrom": units.Hartree,
    "Rydberg/Bohr": units.Rydberg / units.Bohr,
    "kcal/mol/Angstrom": units.kcal / _MOLAR,
    "kJ/mol/Angstrom": units.kJ / _MOLAR,
    "kJ/mol/nm": units.kJ / _MOLAR / units.nm,
}
"""Size of each unit in eV/Angstrom."""

STRESS_UNITS = {
    "eV/Angstrom^3": 1.0,
    "GPa": units.GPa,
    "kbar": 0.1 * units.GPa,
    "Hartree/Bohr^3": units.Hartree / units.Bohr**3,
}
"""Size of each unit in eV/Angstrom^3."""

EnergyUnit = Literal["eV", "meV", "Hartree", "Rydberg", "kcal/mol", "kJ/mol"]
ForcesUnit = Literal[
    "eV/Angstrom",
    "meV/Angstrom",
    "Hartree/Bohr",
    "Hartree/Angstrom",
    "Rydberg/Bohr",
    "kcal/mol/Angstrom",
    "kJ/mol/Angstrom",
    "kJ/mol/nm",
]
StressUnit = Literal["eV/Angstrom^3", "GPa", "kbar", "Hartree/Bohr^3"]


class LabelOptions(BaseModel):
    """How labels are called and which units they have."""

    model_config = ConfigDict(frozen=True, extra="forbid")
    energy_key: str | None = Field(None, description="name of the energy; REF_energy, energy, ... by default")
    forces_key: str | None = Field(None, description="name of the forces; REF_forces, forces, ... by default")
    stress_key: str | None = Field(None, description="name of the stress; REF_stress, stress, ... by default")
    virials_key: str | None = Field(None, description="name of the virials, used where there is no stress")
    energy_unit: EnergyUnit = Field("eV", description=", ".join(ENERGY_UNITS))
    energy_per_atom: bool = Field(False, description="energies are per atom, not of the whole structure")
    forces_unit: ForcesUnit = Field("eV/Angstrom", description=", ".join(FORCES_UNITS))
    gradients: bool = Field(False, description="the forces are gradients: their sign is reversed")
    stress_unit: StressUnit = Field("eV/Angstrom^3", description=", ".join(STRESS_UNITS))
    compression_positive: bool = Field(False, description="stress is positive in compression, as VASP's")


@dataclass(frozen=True)
class LabelledSet:
    """Labelled frames of one or several files, in eV and Angstrom, with ``REF_*`` names.

    Attributes
    ----------
    frames
        Labels may still be missing or not finite; see :mod:`compactmlip.data.inspect`.
    keys
        Names that the labels had; without an entry where there was none.
    files
        Where the frames come from.
    """

    frames: tuple[Atoms, ...]
    keys: dict[str, str]
    files: tuple[str, ...]

    def describe(self) -> str:
        """One line for people."""
        names = ", ".join(f"{label} from '{key}'" for label, key in self.keys.items())
        return f"{', '.join(self.files)}: {len(self.frames)} frames, {names}"


def read_set(paths: Sequence[str | Path], options: LabelOptions) -> LabelledSet:
    """Read labelled frames from files of any format that ASE reads.

    Raises
    ------
    InputError
        If a file cannot be used, a frame has no energy, or no frame has forces; the message lists the
        names that are there.
    """
    frames: list[Atoms] = []
    used: dict[str, str] = {}
    for path in paths:
        raw = read_for_labels(path)
        keys = _choose(raw, options, str(path))
        # What a file lacks is searched under a name that no file has.
        names = {label: keys.get(label, f"no {label}") for label in CANDIDATES}
        read = normalised(raw, names, ("energy",), str(path), finite=False)
        frames += [_converted(atoms, options, "virials" in keys and "stress" not in keys) for atoms in read]
        used |= keys
    return LabelledSet(tuple(frames), used, tuple(str(p) for p in paths))


def _choose(frames: Sequence[Atoms], options: LabelOptions, where: str) -> dict[str, str]:
    """Names of the labels in one file."""
    bulk = [a for a in frames if not is_isolated_atom(a)] or list(frames)
    there = {key for atoms in bulk for key in _names(atoms)}
    chosen: dict[str, str] = {}
    for label, candidates in CANDIDATES.items():
        given = getattr(options, f"{label}_key")
        found = [key for key in ([given] if given else candidates) if key in there]
        if found:
            chosen[label] = found[0]
        elif given or label in ("energy", "forces"):
            raise InputError(_nothing_found(bulk, label, given, where))
    return chosen


def _names(atoms: Atoms) -> Iterable[str]:
    results = getattr(atoms.calc, "results", None) or {}
    yield from atoms.info
    yield from atoms.arrays
    yield from (key for key, value in results.items() if value is not None)


def _nothing_found(frames: Sequence[Atoms], label: str, given: str | None, where: str) -> str:
    shaped = {"forces": _vectors, "energy": _scalars}.get(label, _scalars)
    likely = sorted({name for atoms in frames for name in shaped(atoms)})
    info = sorted({key for a in frames for key in a.info})
    arrays = sorted({key for a in frames for key in a.arrays} - {"numbers", "positions"})
    results = sorted({k for a in frames for k in (getattr(a.calc, "results", None) or {})})
    tried = f"'{given}'" if given else " or ".join(f"'{key}'" for key in CANDIDATES[label])
    text = f"{where}: no frame has {label} labels under {tried}. "
    listed = (("info keys", info), ("arrays", arrays), ("results", results))
    text += (
        "There are " + "; ".join(f"{kind}: {', '.join(names) or '(none)'}" for kind, names in listed) + "."
    )
    if likely:
        text += f" Name the right one, for instance --{label}-key {likely[0]}."
    return text


def _vectors(atoms: Atoms) -> list[str]:
    return [
        name
        for name, array in atoms.arrays.items()
        if name not in ("positions", "momenta") and array.dtype.kind == "f" and array.shape == (len(atoms), 3)
    ]


def _scalars(atoms: Atoms) -> list[str]:
    return [name for name, value in atoms.info.items() if isinstance(value, float | np.floating)]


def _converted(atoms: Atoms, options: LabelOptions, from_virials: bool) -> Atoms:
    """Convert the labels of a frame, in place; virials are energies."""
    if ENERGY in atoms.info:
        per_atom = len(atoms) if options.energy_per_atom and not is_isolated_atom(atoms) else 1
        atoms.info[ENERGY] *= ENERGY_UNITS[options.energy_unit] * per_atom
    if FORCES in atoms.arrays:
        sign = -1.0 if options.gradients else 1.0
        atoms.arrays[FORCES] *= sign * FORCES_UNITS[options.forces_unit]
    if STRESS in atoms.info:
        unit = ENERGY_UNITS[options.energy_unit] if from_virials else STRESS_UNITS[options.stress_unit]
        atoms.info[STRESS] *= unit * (-1.0 if options.compression_positive else 1.0)
    return atoms


def group_weights(
    frames: Sequence[Atoms],
    by_config: Mapping[str, float],
    by_head: Mapping[str, float],
    *,
    strict: bool = True,
) -> np.ndarray | None:
    """Weights (frames, 3) of energy, forces and stress in the loss; None if all are one.

    A frame's weight is the product of its configuration type's, its head's and its own
    ``config_weight``; ``config_energy_weight``, ``config_forces_weight`` and ``config_stress_weight``
    multiply one quantity.

    Raises
    ------
    InputError
        If a name in the mappings occurs in no frame (only if ``strict``), or a weight is negative or not a
        number.
    """
    for key, mapping in (("config_type", by_config), ("head", by_head)):
        there = {str(a.info.get(key, "Default")) for a in frames}
        missing = sorted(set(mapping) - there)
        if missing and strict:
            raise InputError(
                f"weight for {key} '{missing[0]}', but the training frames have only "
                f"{', '.join(sorted(there))}."
            )
    weights = np.array([_own_weights(a.info, by_config, by_head, k) for k, a in enumerate(frames)])
    return None if (weights == 1.0).all() else weights


def _own_weights(
    info: Mapping[str, Any], by_config: Mapping[str, float], by_head: Mapping[str, float], k: int
) -> list[float]:
    common = by_config.get(str(info.get("config_type", "Default")), 1.0)
    common *= by_head.get(str(info.get("head", "Default")), 1.0)
    try:
        common *= float(info.get("config_weight", 1.0))
        row = [
            common * float(info.get(f"config_{label}_weight", 1.0))
            for label in ("energy", "forces", "stress")
        ]
    except (TypeError, ValueError) as error:
        raise InputError(f"training frame {k}: a config weight is not a number ({error}).") from error
    if not np.isfinite(row).all() or min(row) < 0:
        raise InputError(f"training frame {k}: weights must be finite and not negative, not {row}.")
    return row
