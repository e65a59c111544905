"""Fine-tuning: train a model on labels of another level of theory, starting exactly where it is.

Species that the data do not need are removed without loss, energies are shifted per species, and no
parameter is initialised anew: before the first step the model is its parent, up to that shift.
"""

from __future__ import annotations

import copy
import json
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import torch
from ase import Atoms
from torch import nn

from compactmlip import checkpoint
from compactmlip.compress.apply import keep_species
from compactmlip.data.inspect import settle
from compactmlip.data.label_keys import group_weights
from compactmlip.data.subset import group_names
from compactmlip.data.suspect import suspected_energies, suspected_forces, suspected_stresses
from compactmlip.errors import CheckpointError, InputError
from compactmlip.models import cast, model_spec, record_step
from compactmlip.train.breakdown import Row, by_config_type
from compactmlip.train.dataset import Dataset, Draw
from compactmlip.train.distil import best_model, record_training
from compactmlip.train.finetune_options import ALL_SPECIES, FinetuneOptions
from compactmlip.train.forgetting import Forgetting, labelled_by, measure_forgetting, replay_structures
from compactmlip.train.loop import fit
from compactmlip.train.loss import Residuals
from compactmlip.train.metrics import Errors, dataset_residuals, summarise
from compactmlip.train.ranks import current_ranks
from compactmlip.train.reference import ReferenceEnergies, fit_reference, isolated_energies, shifted
from compactmlip.train.start import StepZero, compare_with_parent
from compactmlip.train.state import RunFolder, TrainingState, fingerprint
from compactmlip.train.trainable import add_low_rank, freeze, merge_low_rank

MODEL_FILE, START_FILE = "model.safetensors", "start.json"

NOTHING_BETTER = (
    "no epoch had a lower validation loss than the start, so the model is its parent with shifted energies; "
    "try a smaller lr, or more time"
)

Say = Callable[[str], None]


@dataclass(frozen=True)
class FinetuneData:
    """Frames with ``REF_*`` labels in eV and Angstrom.

    Attributes
    ----------
    train, valid, test
        Frames without isolated atoms; the test set may be empty.
    isolated
        Labels of free atoms, eV.
    replay
        Structures, without labels, on which the parent should not be forgotten; may be empty.
    """

    train: Sequence[Atoms]
    valid: Sequence[Atoms]
    test: Sequence[Atoms] = ()
    isolated: Mapping[str, float] = field(default_factory=dict)
    replay: Sequence[Atoms] = ()


@dataclass(frozen=True)
class SetErrors:
    """Errors on one set: of the parent (with shifted energies), and after the training."""

    frames: int
    atoms: int
    before: Errors
    after: Errors
    rows_before: list[Row]
    rows_after: list[Row]


@dataclass(frozen=True)
class FinetuneResult:
    """A fine-tuned model and what is known about it.

    Attributes
    ----------
    model
        Averaged weights at the lowest validation loss; low-rank updates are merged.
    removed_species
        Species of the parent that the model no longer covers.
    reference
        Shifts of the energy of each species.
    start
        How the model before the training compares with its parent.
    history
        One row per validation; row 0 is before the training.
    best_epoch, stopped_because
        As in :class:`compactmlip.train.distil.DistilResult`.
    trained_parameters, parameters
        Numbers that the training could change, and all.
    sets
        Errors by set ("valid", "test").
    forgetting
        One entry per kind of structures.
    notes
        What people should know.
    """

    model: nn.Module
    removed_species: tuple[str, ...]
    reference: ReferenceEnergies
    start: StepZero
    history: list[dict[str, float]]
    best_epoch: int
    stopped_because: str
    trained_parameters: int
    parameters: int
    sets: dict[str, SetErrors]
    forgetting: list[Forgetting]
    notes: list[str]


def finetune(
    parent: nn.Module,
    data: FinetuneData,
    options: FinetuneOptions,
    out_dir: str | Path,
    progress: bool = True,
    *,
    say: Say = lambda text: None,
    clock: Callable[[], float] = time.monotonic,
) -> FinetuneResult:
    """Fine-tune a copy of ``parent``.

    Writes into ``out_dir``: ``history.csv``, the resume file, ``start.json`` and, at the end,
    ``model.safetensors``.  Called again with the same arguments after an interruption, it continues.

    Parameters
    ----------
    parent
        A native model that covers the species of the data; it is not changed.
    data
        The labelled frames; see :mod:`compactmlip.data.inspect` for checks that come before.
    options
        How to train.
    out_dir
        Folder of this run.
    progress
        Show a progress bar.
    say
        Called with lines for people.
    clock
        Seconds, for the wall-clock budget.

    Raises
    ------
    InputError
        If labels are missing or look like another unit, an option does not fit the model, or the folder
        holds another run.
    SelfCheckError
        If the model before the training is not its parent up to the shift of energies.
    CompactMLIPError
        If the loss stays infinite or NaN.
    KeyboardInterrupt
        After the state has been saved.
    """
    dtype = checkpoint.DTYPES[options.dtype]
    full = cast(copy.deepcopy(parent), dtype)
    slim = keep_species(full, _species(full, data, options))
    _choose_trained(copy.deepcopy(slim), options)  # options that do not fit are refused before any work
    removed = tuple(s for s in model_spec(full).species if s not in model_spec(slim).species)
    train = _dataset(data.train, slim, dtype, "the training set", options, weighted=True)
    valid = _dataset(data.valid, slim, dtype, "the validation set", options, weighted=True)
    folder = RunFolder(out_dir, fingerprint(slim, (train, valid), options, options.action))
    found = dataset_residuals(slim, train)
    notes = _check_units(found, train, options)
    reference = _reference(slim, found, train, data, options, folder)
    start = shifted(slim, reference.shifts)
    step_zero = compare_with_parent(full, start, data.valid, reference.shifts)
    say(_introduction(removed, slim, reference, step_zero))
    for note in [*notes, *([f"E0: {reference.note}."] if reference.note else [])]:
        say(f"note: {note}")
    if options.replay_structures:
        train = _with_replay(train, start, data, dtype, options)
    state = _prepared(start, options, removed)
    saved = current_ranks().from_first(folder.load)
    if saved is not None:
        state.restore(saved)
    fit(state, train, valid, options, folder, title=options.action, progress=progress, clock=clock)
    best = merge_low_rank(best_model(state)).requires_grad_(True)
    if state.counters.best_epoch == 0:
        notes.append(NOTHING_BETTER)
        say(f"note: {NOTHING_BETTER}")
    sets = {"valid": _errors(start, best, valid, data.valid)}
    if data.test:
        test = _dataset(data.test, slim, dtype, "the test set", options)
        sets["test"] = _errors(start, best, test, data.test)
    counters = state.counters
    number = (len(data.train), len(data.valid))
    record_training(
        best, options.action, state, options, *number, sets["valid"].after, e0_shifts=reference.shifts
    )
    if current_ranks().first:
        checkpoint.save(best, folder.path / MODEL_FILE)
    return FinetuneResult(
        best,
        removed,
        reference,
        step_zero,
        counters.history,
        counters.best_epoch,
        str(counters.stopped),
        sum(p.numel() for p in state.model.parameters() if p.requires_grad),
        sum(p.numel() for p in best.parameters()),
        sets,
        _forgetting(start, best, data, dtype, options),
        notes,
    )


def _species(full: nn.Module, data: FinetuneData, options: FinetuneOptions) -> set[str]:
    if ALL_SPECIES in options.keep_species:
        return set(model_spec(full).species)
    frames = [*data.train, *data.valid, *data.test, *data.replay]
    return {s for a in frames for s in a.get_chemical_symbols()} | set(options.keep_species)


def _dataset(
    frames: Sequence[Atoms],
    model: nn.Module,
    dtype: torch.dtype,
    name: str,
    options: FinetuneOptions,
    *,
    weighted: bool = False,
) -> Dataset:
    weights, directions, draw = None, 0, None
    training = name == "the training set"
    if weighted:
        weights = group_weights(frames, options.config_weights, options.head_weights, strict=training)
        if options.hessian_weight:
            directions = sys.maxsize if training else options.hessian_directions
    made = Dataset.from_frames(
        frames,
        model_spec(model),
        dtype,
        name,
        weights=weights,
        need_forces="missing-forces" not in options.accept,
        hessian=directions,
    )
    if training and options.resample and options.group_key is not None:
        names = tuple(group_names(frames, options.group_key))
        draw = Draw(names, options.per_group, options.group_share)
    return replace(made, draw=draw)


def _counts(dataset: Dataset) -> np.ndarray:
    """Atoms of each species in each structure, (S, species)."""
    number = len(dataset.species)
    return np.stack([np.bincount(s.graph.species.numpy(), minlength=number) for s in dataset.structures])


def _check_units(found: Residuals, train: Dataset, options: FinetuneOptions) -> list[str]:
    """Compare labels with the parent's predictions; return notes."""
    counts = _counts(train).astype(float)
    labels = torch.cat([s.energies for s in train.structures]).numpy()
    predictions = labels + found.energies.double().numpy() * counts.sum(axis=1)
    forces = torch.cat([s.forces for s in train.structures]).double().numpy()
    stresses = torch.cat([s.stresses for s in train.structures]).double().numpy()
    findings = [
        *suspected_energies(labels, predictions, counts[:, counts.any(axis=0)]),
        *suspected_forces(forces, forces + found.forces.double().numpy()),
        *suspected_stresses(stresses, stresses + found.stresses.double().numpy()),
    ]
    return settle({}, findings, options.accept, options.drop)[1]


def _reference(
    slim: nn.Module,
    found: Residuals,
    train: Dataset,
    data: FinetuneData,
    options: FinetuneOptions,
    folder: RunFolder,
) -> ReferenceEnergies:
    """Shifts of energies; those of an earlier part of the run are kept to the last bit."""
    counts = _counts(train)
    missing = -found.energies.double().numpy() * counts.sum(axis=1)
    species = model_spec(slim).species
    fitted = fit_reference(options.e0, species, counts, missing, data.isolated, isolated_energies(slim))
    path = folder.path / START_FILE
    if path.is_file():
        try:
            known = json.loads(path.read_text())
            shifts = {str(s): float(x) for s, x in known["e0_shifts"].items()}
            same = known["identity"] == folder.identity
        except (OSError, ValueError, KeyError, AttributeError, TypeError) as error:
            raise CheckpointError(f"{path}: not readable ({error}). Delete it.") from error
        if same:
            return ReferenceEnergies(shifts, fitted.source, fitted.mae, fitted.note)
        if (folder.path / MODEL_FILE).exists() or folder.load() is not None:
            raise InputError(
                f"{folder.path} holds a fine-tuning run with another model, other frames or other options. "
                "Choose another folder, or delete this one."
            )
    text = json.dumps({"identity": folder.identity, "e0_shifts": fitted.shifts, "e0": fitted.source})
    checkpoint.atomic_write_text(path, text)
    return fitted


def _introduction(
    removed: Sequence[str], slim: nn.Module, reference: ReferenceEnergies, step_zero: StepZero
) -> str:
    kept = " ".join(model_spec(slim).species)
    lines = [
        f"species: {kept}; weights of {len(removed)} others removed without loss"
        if removed
        else f"species: {kept}"
    ]
    shifts = ", ".join(f"{s} {x:+.4f}" for s, x in reference.shifts.items())
    before, after = (1e3 * reference.mae[name] for name in ("parent", reference.source))
    lines.append(
        f"E0 ({reference.source}): shifts {shifts} eV; energy error on the training set {before:.4g} -> "
        f"{after:.4g} meV/atom"
    )
    return "\n".join([*lines, step_zero.describe()])


def _with_replay(
    train: Dataset, start: nn.Module, data: FinetuneData, dtype: torch.dtype, options: FinetuneOptions
) -> Dataset:
    """Add structures with the parent's labels."""
    drawn = replay_structures(
        data.train, model_spec(start).species, options.replay_structures, options.seed + 1
    )
    frames = labelled_by(start, [*drawn.perturbed, *drawn.substituted])
    weights = np.full((len(frames), 3), options.replay_weight)
    more = Dataset.from_frames(frames, model_spec(start), dtype, "the replay set", weights=weights)
    draw = train.draw
    if draw is not None:  # each replayed structure is a group of its own, in every epoch
        names = [f"replay {k}" for k in range(len(more.structures))]
        draw = replace(draw, groups=(*draw.groups, *names))
    return Dataset((*train.structures, *more.structures), train.species, draw)


def _prepared(start: nn.Module, options: FinetuneOptions, removed: Sequence[str]) -> TrainingState:
    """State before the first step: a copy of the model, partly frozen."""
    model = copy.deepcopy(start)
    if removed:
        record_step(model, "keep species", species=list(model_spec(model).species))
    return TrainingState(_choose_trained(model, options), options)


def _choose_trained(model: nn.Module, options: FinetuneOptions) -> nn.Module:
    """Freeze what is not trained, in place, and return the model."""
    model.requires_grad_(True)
    if options.lora_rank is not None:
        add_low_rank(model, options.lora_rank, options.seed)
    else:
        freeze(model, options.freeze)
    return model


def _errors(start: nn.Module, best: nn.Module, dataset: Dataset, frames: Sequence[Atoms]) -> SetErrors:
    before, after = (dataset_residuals(m, dataset) for m in (start, best))
    return SetErrors(
        len(frames),
        dataset.num_atoms,
        summarise(before, dataset),
        summarise(after, dataset),
        by_config_type(before, dataset, frames),
        by_config_type(after, dataset, frames),
    )


def _forgetting(
    start: nn.Module, best: nn.Module, data: FinetuneData, dtype: torch.dtype, options: FinetuneOptions
) -> list[Forgetting]:
    """Compare with the parent on structures that were not trained on."""
    number = options.forgetting_structures
    kinds: dict[str, Sequence[Atoms]] = {}
    if number:
        drawn = replay_structures(data.train, model_spec(start).species, number, options.seed)
        kinds |= {"perturbed training structures": drawn.perturbed}
        kinds |= {"the same with other species": drawn.substituted}
    kinds["the replay set given"] = data.replay
    return [measure_forgetting(start, best, name, s, dtype) for name, s in kinds.items() if s]
