"""The files that a validation leaves behind."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
from ase import Atoms

from compactmlip.checkpoint import atomic_write, atomic_write_text, sha256
from compactmlip.data.extxyz import write_frames
from compactmlip.validate.certificate import Certificate
from compactmlip.validate.making import Making
from compactmlip.validate.motion import Displacements
from compactmlip.validate.nve import Trace
from compactmlip.validate.parity import Labels
from compactmlip.validate.phonons import Spectra
from compactmlip.validate.short_range import Curve
from compactmlip.validate.structure import Functions

FRAMES, ARRAYS, REPORT, CERTIFICATE = "heldout.extxyz", "validation.npz", "report.html", "certificate.json"


@dataclass(frozen=True)
class ValidationData:
    """Arrays behind a certificate: what the figures show and ``validation.npz`` holds."""

    frames: tuple[Atoms, ...]
    reference: Labels
    predicted: Labels
    trace: Trace
    teacher_trace: Trace | None
    curves: tuple[Curve, ...] = ()
    spectra: Spectra | None = None
    functions: Functions | None = None
    displacements: Displacements | None = None
    making: Making | None = None


def write_all(out: Path, certificate: Certificate, data: ValidationData, report: str) -> Certificate:
    """Write the four files; the certificate comes last, so that its presence means all is there.

    Returns
    -------
    The certificate with the hashes of structures and arrays.
    """
    atomic_write(out / FRAMES, lambda p: write_frames(p, _labelled(data)))
    atomic_write(out / ARRAYS, lambda p: _write_arrays(p, data))
    atomic_write_text(out / REPORT, report)
    hashes = {name: sha256(out / name) for name in (FRAMES, ARRAYS)}
    complete = certificate.model_copy(update={"files": hashes})
    complete.save(out / CERTIFICATE)
    return complete


def _labelled(data: ValidationData) -> list[Atoms]:
    """Structures with the reference as labels and their kind, and nothing else."""
    labelled = []
    for k, atoms in enumerate(data.frames):
        frame = Atoms(atoms.numbers, atoms.positions, cell=atoms.cell, pbc=atoms.pbc)
        frame.info["REF_energy"] = float(data.reference.energies[k])
        frame.arrays["REF_forces"] = data.reference.forces[k]
        if np.isfinite(data.reference.stresses[k]).all():
            frame.info["REF_stress"] = data.reference.stresses[k]
        if "config_type" in atoms.info:
            frame.info["config_type"] = atoms.info["config_type"]
        labelled.append(frame)
    return labelled


def _write_arrays(path: Path, data: ValidationData) -> None:
    arrays = {
        "reference_energies_eV": data.reference.energies,
        "model_energies_eV": data.predicted.energies,
        "reference_forces_eV_per_A": np.concatenate(data.reference.forces),
        "model_forces_eV_per_A": np.concatenate(data.predicted.forces),
        "reference_stresses_eV_per_A3": data.reference.stresses,
        "model_stresses_eV_per_A3": data.predicted.stresses,
        "atoms_per_structure": np.array([len(a) for a in data.frames]),
        "atomic_numbers": np.concatenate([a.numbers for a in data.frames]),
    }
    for name, trace in (("model", data.trace), ("teacher", data.teacher_trace)):
        if trace is not None:
            arrays[f"nve_{name}_time_ps"] = trace.time_ps
            arrays[f"nve_{name}_total_eV"] = trace.total
            arrays[f"nve_{name}_potential_eV"] = trace.potential
            arrays[f"nve_{name}_temperature_K"] = trace.temperature_K
    for curve in data.curves:
        arrays[f"approach_{curve.pair}_distance_A"] = curve.distances
        for name, energies in curve.energies.items():
            arrays[f"approach_{curve.pair}_{name}_eV"] = energies
    if data.spectra is not None:
        arrays["phonons_model_THz"] = data.spectra.model
        arrays["phonons_teacher_THz"] = data.spectra.teacher
        if data.spectra.bands is not None:
            arrays["phonon_bands_distance_per_A"] = data.spectra.bands.distances
            arrays["phonon_bands_model_THz"] = data.spectra.bands.model
            arrays["phonon_bands_teacher_THz"] = data.spectra.bands.teacher
    if data.functions is not None:
        arrays["rdf_distance_A"] = data.functions.distances
        for name, table in (("model", data.functions.model), ("teacher", data.functions.teacher)):
            arrays |= {f"rdf_{name}_{pair}": values for pair, values in table.items()}
    if data.displacements is not None:
        arrays["msd_time_ps"] = data.displacements.times_ps
        for name, table in (("model", data.displacements.model), ("teacher", data.displacements.teacher)):
            arrays |= {f"msd_{name}_{symbol}": values for symbol, values in table.items()}
    with path.open("wb") as file:
        np.savez_compressed(file, **arrays)  # type: ignore[arg-type]
