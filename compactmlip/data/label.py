"""Label structures with a teacher; an interrupted run goes on where it stopped."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from ase import Atoms
from ase.calculators.calculator import all_properties
from torch import nn

from compactmlip.data.extxyz import complete_prefix, format_frame
from compactmlip.data.perturb import bare
from compactmlip.data.read import ENERGY, FORCES, STRESS, check_xyz_name, full_to_voigt, read_labelled
from compactmlip.data.teacher import MAX_EDGES, Evaluation, check_frames, evaluate
from compactmlip.errors import CheckpointError, InputError
from compactmlip.models import model_spec
from compactmlip.progress import Track

ENERGIES = "REF_energies"
"""Array with the teacher's energy of each atom, eV."""

RUN = "label_run"
"""``info`` entry that ties a labelled frame to the structures and the model it was made from."""

_STALE = frozenset({ENERGY, FORCES, STRESS, ENERGIES, "REF_virials", RUN, *all_properties})


def label(
    frames: Sequence[Atoms],
    model: nn.Module,
    output: str | Path,
    *,
    max_edges: int = MAX_EDGES,
    overwrite: bool = False,
    progress: bool = True,
) -> list[Atoms]:
    """Compute energies, forces, stresses and per-atom energies, and write them as extended XYZ.

    Finished batches are appended to ``<output>.partial``, which becomes ``output`` when all is done; a run
    that was interrupted goes on after the last complete frame.  If ``output`` already holds the labels
    of these frames by this model, it is read and nothing is computed.

    Parameters
    ----------
    frames
        Structures; ``info`` and extra arrays are kept, older labels, calculators and constraints are not.
    model
        A native model that covers their species.
    output
        ``*.extxyz`` or ``*.xyz``.
    max_edges
        Directed edges per batch; lower it to save memory.
    overwrite
        Replace files of another run instead of refusing.
    progress
        Show progress on stderr.

    Returns
    -------
    list[Atoms]
        The labelled frames as read back from ``output``: ``REF_energy`` (eV), ``REF_forces`` (eV/Angstrom),
        ``REF_stress`` (Voigt, eV/Angstrom^3; not without a periodic cell) and ``REF_energies`` (eV per atom).

    Raises
    ------
    SpeciesError, InputError
        If a frame cannot be used (the message names it), or the files belong to other frames or another
        model.
    CheckpointError
        If the output cannot be written; finished frames stay in the partial file.
    """
    output = Path(output)
    check_xyz_name(output)
    if not output.parent.is_dir():
        raise InputError(f"{output}: the folder {output.parent} does not exist; create it first.")
    check_frames(frames, model_spec(model))
    run = fingerprint(frames, model)
    partial = output.with_name(output.name + ".partial")
    if output.exists() and _is_of(run, output, len(frames), overwrite):
        return read_labelled(output)
    done = _resume(partial, run, overwrite)
    total = sum(map(len, frames[done:]))
    try:
        with Track("Labelling", total, "atoms", enabled=progress) as track, partial.open("ab") as file:
            for indices, batch in evaluate(frames, model, max_edges, start=done):
                labelled = [_labelled(frames[k], e, run) for k, e in zip(indices, batch, strict=True)]
                file.write("".join(map(format_frame, labelled)).encode())
                file.flush()
                os.fsync(file.fileno())
                track.advance(sum(map(len, labelled)))
        partial.replace(output)
    except OSError as error:
        raise CheckpointError(
            f"cannot write {error.filename or partial}: {error.strerror or error}. Finished frames are kept "
            f"in {partial}; run the same again to go on."
        ) from error
    return read_labelled(output)


def fingerprint(frames: Sequence[Atoms], model: nn.Module) -> str:
    """Short name of a labelling run: a hash of all structures and of the model's spec and numbers."""
    digest = hashlib.sha256(model_spec(model).to_json().encode())
    for name, tensor in model.state_dict().items():
        digest.update(name.encode())
        digest.update(tensor.detach().cpu().contiguous().numpy().tobytes())
    update_with_structures(digest, frames)
    return f"run-{digest.hexdigest()[:20]}"  # the letters keep ASE from reading it as a number


def update_with_structures(digest: hashlib._Hash, frames: Sequence[Atoms]) -> None:
    """Feed species, positions, cells and periodicity of all structures into a hash."""
    for atoms in frames:
        for array in (atoms.numbers, atoms.positions, atoms.cell.array, atoms.pbc):
            digest.update(np.ascontiguousarray(array).tobytes())


def _labelled(atoms: Atoms, result: Evaluation, run: str) -> Atoms:
    out = bare(atoms)
    out.info = {key: value for key, value in atoms.info.items() if key not in _STALE}
    for name, array in atoms.arrays.items():
        if name not in ("numbers", "positions", *_STALE):
            out.new_array(name, array)
    out.info[RUN] = run
    put_labels(out, result)
    out.new_array(ENERGIES, result.energies)
    return out


def put_labels(atoms: Atoms, result: Evaluation) -> None:
    """Give a structure without labels ``REF_energy``, ``REF_forces`` and, if it is finite, ``REF_stress``."""
    atoms.info[ENERGY] = result.energy
    atoms.new_array(FORCES, result.forces)
    if np.isfinite(result.stress).all():
        atoms.info[STRESS] = full_to_voigt(result.stress)


def _is_of(run: str, output: Path, number: int, overwrite: bool) -> bool:
    """Whether a finished file holds this run's labels.  Raise if it holds others and is to be kept."""
    try:
        known = read_labelled(output, require=())
    except InputError:
        if not overwrite:
            raise
        return False
    if {atoms.info.get(RUN) for atoms in known} == {run} and len(known) == number:
        return True
    if overwrite:
        return False
    raise InputError(
        f"{output} exists and holds other structures or labels of another model; choose another name, "
        "delete it, or ask to overwrite it."
    )


def _resume(partial: Path, run: str, overwrite: bool) -> int:
    """Cut a torn frame off the partial file and return the number of frames that are done."""
    if not partial.exists():
        return 0
    with partial.open("rb") as file:
        lines = file.readlines()
    frames, size = complete_prefix(lines)
    if frames and f"{RUN}={run}".encode() not in lines[1].split():
        if not overwrite:
            raise InputError(
                f"{partial} is the unfinished work of another model or other structures; finish that run "
                "first, delete the file, or ask to overwrite it."
            )
        frames = size = 0
    os.truncate(partial, size)
    return frames
