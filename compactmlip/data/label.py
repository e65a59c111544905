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
from compactmlip.data.hessian import DIRECTIONS, PRODUCTS
from compactmlip.data.perturb import bare
from compactmlip.data.read import ENERGY, FORCES, STRESS, check_xyz_name, full_to_voigt, read_labelled
from compactmlip.data.teacher import MAX_EDGES, Evaluation, check_frames, evaluate, evaluate_hessian
from compactmlip.errors import CheckpointError, InputError
from compactmlip.models import model_spec
from compactmlip.progress import Track

ENERGIES = "REF_energies"
"""Array with the teacher's energy of each atom, eV."""

RUN = "label_run"
"""``info`` entry that ties a labelled frame to the structures and the model it was made from."""

_OWN = frozenset({DIRECTIONS, PRODUCTS, RUN})
_STALE = frozenset({ENERGY, FORCES, STRESS, ENERGIES, "REF_virials", *_OWN, *all_properties})


def label(
    frames: Sequence[Atoms],
    model: nn.Module,
    output: str | Path,
    *,
    hessian: int = 0,
    keep_labels: bool = False,
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
    hessian
        Number of random directions along which each structure's Hessian is labelled too, see
        :mod:`compactmlip.data.hessian`.
    keep_labels
        Add Hessian products only; energies, forces and stresses stay those of the frames, which may come
        from another level of theory.
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
        ``REF_stress`` (Voigt, eV/Angstrom^3; not without a periodic cell) and ``REF_energies`` (eV per atom);
        ``REF_hessian_directions`` and ``REF_hessian_products`` (eV/Angstrom^2) if asked for.

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
    if hessian < 0:
        raise InputError(
            f"cannot label the Hessian along {hessian} directions; give 1 or more, or 0 for none."
        )
    if keep_labels and not hessian:
        raise InputError("keeping the labels of the frames leaves nothing to do without Hessian products.")
    run = fingerprint(frames, model, hessian, keep_labels)
    partial = output.with_name(output.name + ".partial")
    if output.exists() and _is_of(run, output, len(frames), overwrite):
        return read_labelled(output)
    done = _resume(partial, run, overwrite)
    total = sum(map(len, frames[done:]))
    try:
        with Track("Labelling", total, "atoms", enabled=progress) as track, partial.open("ab") as file:
            found = evaluate(frames, model, max_edges, start=done)
            if hessian:
                found = evaluate_hessian(frames, model, hessian, max_edges, start=done)
            for indices, batch in found:
                labelled = [
                    _labelled(frames[k], e, run, keep_labels) for k, e in zip(indices, batch, strict=True)
                ]
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


def fingerprint(
    frames: Sequence[Atoms], model: nn.Module, hessian: int = 0, keep_labels: bool = False
) -> str:
    """Short name of a labelling run: a hash of all structures, of the model, and of what is labelled."""
    digest = hashlib.sha256(model_spec(model).to_json().encode())
    for name, tensor in model.state_dict().items():
        digest.update(name.encode())
        digest.update(tensor.detach().cpu().contiguous().numpy().tobytes())
    update_with_structures(digest, frames)
    if hessian:
        digest.update(f"hessian {hessian}".encode())
    if keep_labels:
        kept = [[a.info.get(ENERGY), a.arrays.get(FORCES), a.info.get(STRESS)] for a in frames]
        digest.update(
            repr([[None if x is None else np.asarray(x).tolist() for x in k] for k in kept]).encode()
        )
    return f"run-{digest.hexdigest()[:20]}"  # the letters keep ASE from reading it as a number


def update_with_structures(digest: hashlib._Hash, frames: Sequence[Atoms]) -> None:
    """Feed species, positions, cells and periodicity of all structures into a hash."""
    for atoms in frames:
        for array in (atoms.numbers, atoms.positions, atoms.cell.array, atoms.pbc):
            digest.update(np.ascontiguousarray(array).tobytes())


def _labelled(atoms: Atoms, result: Evaluation, run: str, keep_labels: bool) -> Atoms:
    out = bare(atoms)
    stale = _OWN if keep_labels else _STALE
    out.info = {key: value for key, value in atoms.info.items() if key not in stale}
    for name, array in atoms.arrays.items():
        if name not in ("numbers", "positions", *stale):
            out.new_array(name, array)
    out.info[RUN] = run
    if not keep_labels:
        put_labels(out, result)
        out.new_array(ENERGIES, result.energies)
    if result.directions is not None and result.products is not None:
        out.new_array(DIRECTIONS, result.directions.reshape(len(atoms), -1))
        out.new_array(PRODUCTS, result.products.reshape(len(atoms), -1))
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
        f"{output} exists and holds other structures, labels of another model or another number of Hessian "
        "products; choose another name, delete it, or ask to overwrite it."
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
                f"{partial} is the unfinished work of another model, other structures or other options; "
                "finish that run first, delete the file, or ask to overwrite it."
            )
        frames = size = 0
    os.truncate(partial, size)
    return frames
