"""The structures that a model is validated on, and their reference."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from ase import Atoms
from pydantic import BaseModel, ConfigDict, Field

from compactmlip import checkpoint
from compactmlip.data.sample import SampleOptions, sample
from compactmlip.errors import InputError
from compactmlip.validate.certificate import Heldout
from compactmlip.validate.parity import Labels, evaluate_frames, has_labels, labels_of

HELDOUT_STREAM = 0x68656C64
"""Mixed into the seed, so that held-out structures never repeat a training set sampled with that seed."""

MD_PER_STRUCTURE = 40
"""Atoms x steps of teacher MD spent per held-out structure, so that a slow teacher takes seconds."""

SMALL_FORCE, SMALL_DISPLACEMENT = 0.05, 0.05
"""eV/Angstrom (RMS) and Angstrom: structures with smaller forces are displaced for the consistency checks."""


class HeldoutOptions(BaseModel):
    """How many structures are sampled, and how."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    n_heldout: int = Field(16, ge=1, description="held-out structures, where they are sampled")
    sample: SampleOptions | None = Field(
        None, description="how held-out structures are sampled; their number and seed come from here"
    )
    seed: int = Field(0, ge=0)


def heldout_structures(
    frames: Sequence[Atoms],
    calculators: dict[str, Any],
    teacher_path: Path,
    options: HeldoutOptions,
    progress: bool,
) -> tuple[list[Atoms], Labels, Heldout]:
    """Held-out structures, their reference and where both come from."""
    if has_labels(frames):
        unseen = _unseen(calculators["model"], frames)
        given = Heldout(origin="given", reference="labels", species_not_seen=unseen)
        return list(frames), labels_of(frames), given
    if teacher_path.suffix != ".safetensors":
        raise InputError(
            f"{teacher_path}: held-out structures can only be sampled with the teacher's checkpoint "
            "(*.safetensors); give that, or structures with REF_energy and REF_forces."
        )
    seed = int(np.random.SeedSequence((options.seed, HELDOUT_STREAM)).generate_state(1)[0])
    native = checkpoint.load(teacher_path)
    how = options.sample or SampleOptions(md_evaluations=MD_PER_STRUCTURE * options.n_heldout)
    how = how.model_copy(update={"n": options.n_heldout, "seed": seed})
    heldout = sample(frames, native, how, progress=progress)
    reference = evaluate_frames(
        calculators["teacher"], heldout, progress=progress, description="Teacher on held-out"
    )
    unseen = _unseen(calculators["model"], heldout)
    sampled = Heldout(origin="sampled", reference="teacher", seed=seed, species_not_seen=unseen)
    return heldout, reference, sampled


def _unseen(calculator: Any, frames: Sequence[Atoms]) -> tuple[str, ...]:
    """Species that are covered but do not occur."""
    seen = {s for a in frames for s in a.get_chemical_symbols()}
    return tuple(s for s in calculator.spec.species if s not in seen)


def calmest(frames: Sequence[Atoms], reference: Labels) -> Atoms:
    """Return the structure with the smallest forces: nearest to where dynamics can start.

    Sampled defects (:func:`compactmlip.data.sample.sample`) stand for no phase; any other is preferred.
    """
    largest = [float(np.abs(f).max()) if len(f) > 1 else np.inf for f in reference.forces]
    defective = [atoms.info.get("config_type") in ("vacancy", "surface") for atoms in frames]
    return frames[min(range(len(frames)), key=lambda k: (defective[k], largest[k]))]


def typical(frames: Sequence[Atoms], reference: Labels, seed: int) -> Atoms:
    """Return a structure with typical forces, displaced where it has none: symmetry would hide errors."""
    species = [len(set(a.numbers)) for a in frames]
    sizes = [float(np.sqrt(np.mean(f**2))) for f in reference.forces]
    richest = [k for k in range(len(frames)) if species[k] == max(species)]
    chosen = sorted(richest, key=lambda k: sizes[k])[len(richest) // 2]
    atoms = frames[chosen].copy()
    if sizes[chosen] < SMALL_FORCE:
        atoms.set_constraint()
        atoms.rattle(SMALL_DISPLACEMENT, rng=np.random.default_rng(seed))
    return atoms
