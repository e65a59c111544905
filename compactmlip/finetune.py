"""Fine-tune or retrain from files: read and check labels, train, and write model and report into a folder."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import yaml
from ase import Atoms

from compactmlip import __version__, checkpoint
from compactmlip.data.holdout import hold_out
from compactmlip.data.inspect import check_species, inspect_sets, settle
from compactmlip.data.label_keys import LabelledSet, read_set
from compactmlip.data.read import read_structures, split_isolated_atoms, write_labelled
from compactmlip.data.subset import choose_per_group, group_names
from compactmlip.deploy.archive import usable_device
from compactmlip.errors import InputError
from compactmlip.families import load_model
from compactmlip.models import model_spec
from compactmlip.train.finetune import FinetuneData, FinetuneResult, finetune
from compactmlip.train.finetune_options import FinetuneOptions
from compactmlip.train.ranks import current_ranks
from compactmlip.train.state import make_folder
from compactmlip.validate.report.finetuning import build_finetune_report

SUMMARY_FILE, REPORT_FILE, CONFIG_FILE = "summary.json", "report.html", "config.yaml"

Files = Sequence[str | Path]


@dataclass(frozen=True)
class FinetuneFiles:
    """Where labelled structures are; anything that ASE reads.

    Attributes
    ----------
    train
        At least one file.
    valid
        Without any, part of the training set is held out.
    test
        Never used for any choice.
    replay
        Structures on which the parent should not be forgotten; labels are not needed.
    """

    train: Files
    valid: Files = ()
    test: Files = ()
    replay: Files = ()


def finetune_files(
    model: str | Path,
    files: FinetuneFiles,
    options: FinetuneOptions | None = None,
    out_dir: str | Path = "compactmlip-finetuned",
    *,
    modality: str | None = None,
    accept_licence: str | None = None,
    device: str = "cpu",
    progress: bool = True,
    say: Callable[[str], None] = lambda text: None,
) -> dict[str, Any]:
    """Fine-tune or retrain a model on labelled files.

    The folder then holds ``model.safetensors``, ``report.html`` (of a fine-tuning), ``summary.json``,
    ``history.csv``, ``config.yaml`` and, if it was held out here, ``valid.xyz``.  A run that was interrupted
    goes on with the same arguments.

    Parameters
    ----------
    model
        Name, checkpoint or upstream file of the parent.
    files
        The data.
    options
        How to train; :class:`compactmlip.train.retrain.RetrainOptions` to retrain.
    out_dir
        Folder.
    modality, accept_licence
        As in :func:`compactmlip.families.load_model`.
    device
        Where to compute.
    progress
        Show a progress bar.
    say
        Called with lines for people.

    Returns
    -------
    dict
        Content of ``summary.json``.

    Raises
    ------
    CompactMLIPError
        If a model, file or option cannot be used, the data are bad, or the folder holds another run.
    """
    began = time.monotonic()
    options = options or FinetuneOptions()
    parent = load_model(
        model, modality=modality, dtype=None, accept_licence=accept_licence, progress=progress
    )
    read = {name: read_set(getattr(files, name), options.labels) for name in ("test", "valid", "train")}
    for labelled in read.values():
        if labelled.frames:
            say(labelled.describe())
    data, split, notes = _prepare(read, files, parent, options)
    for note in notes:
        say(f"note: {note}")
    say(f"validation: {split}")
    out, first = Path(out_dir), current_ranks().first
    make_folder(out)
    if first and not files.valid:
        write_labelled(out / "valid.xyz", data.valid)
    if first:
        config = yaml.safe_dump(options.model_dump(mode="json"), sort_keys=False)
        checkpoint.atomic_write_text(out / CONFIG_FILE, config)
    result = finetune(parent.to(usable_device(device)), data, options, out, progress, say=say)
    summary = _summary(result, str(model), read, split, notes, options)
    summary["parent_provenance"] = model_spec(parent).provenance.model_dump(mode="json")
    summary["minutes_of_this_part"] = round((time.monotonic() - began) / 60, 3)
    if not first:
        return summary
    if options.action == FinetuneOptions.action:
        checkpoint.atomic_write_text(out / REPORT_FILE, build_finetune_report(summary))
    text = json.dumps(summary, indent=1)
    checkpoint.atomic_write_text(out / SUMMARY_FILE, text)
    return summary


def _prepare(
    read: Mapping[str, LabelledSet], files: FinetuneFiles, parent: Any, options: FinetuneOptions
) -> tuple[FinetuneData, str, list[str]]:
    """Check the data, take out free atoms and hold out a validation set."""
    sets: dict[str, Sequence[Atoms]] = {name: labelled.frames for name, labelled in read.items()}
    spec = model_spec(parent)
    check_species(sets, spec, spec.provenance.name)
    kept, notes = settle(sets, inspect_sets(sets, options.max_force), options.accept, options.drop)
    train, isolated = split_isolated_atoms(kept["train"])
    valid, test = (split_isolated_atoms(kept[name])[0] for name in ("valid", "test"))
    if not train:
        raise InputError("the training set has no frames, apart from isolated atoms and frames left out.")
    split = f"{len(valid)} frames of {', '.join(map(str, files.valid))}"
    if not files.valid:
        held = hold_out(train, options.valid_fraction, options.seed, options.split, options.group_key)
        valid, train, split = [train[k] for k in held.valid], [train[k] for k in held.train], held.how
    if options.group_key is not None and (options.per_group or options.group_share):
        train, note = _subset(train, options, options.group_key)
        notes = [*notes, note]
    replay = read_structures(list(files.replay)) if files.replay else []
    if replay:
        check_species({"replay": replay}, spec, spec.provenance.name)
    return FinetuneData(train, valid, test, isolated, replay), split, notes


def _subset(train: list[Atoms], options: FinetuneOptions, key: str) -> tuple[list[Atoms], str]:
    """Part of each material that is trained on, and what was done."""
    names = group_names(train, key)
    chosen = choose_per_group(names, options.per_group, options.group_share, [options.seed])
    how = f"{len(chosen)} of {len(train)} training frames, of {len(set(names))} different '{key}'"
    if options.resample:
        return train, f"each epoch draws {how}"
    return [train[k] for k in chosen], f"trained on {how}"


def _summary(
    result: FinetuneResult,
    model: str,
    read: Mapping[str, LabelledSet],
    split: str,
    notes: Sequence[str],
    options: FinetuneOptions,
) -> dict[str, Any]:
    """Everything that the report shows, as JSON."""
    made = {
        "compactmlip": __version__,
        "parent": model,
        "species": list(model_spec(result.model).species),
        "removed_species": list(result.removed_species),
        "files": {name: list(labelled.files) for name, labelled in read.items() if labelled.frames},
        "labels": {name: labelled.keys for name, labelled in read.items() if labelled.frames},
        "validation_split": split,
        "notes": [*notes, *result.notes, *([result.reference.note] if result.reference.note else [])],
        "e0": asdict(result.reference),
        "step_zero": {**asdict(result.start), "text": result.start.describe()},
        "parameters": result.parameters,
        "trained_parameters": result.trained_parameters,
        "best_epoch": result.best_epoch,
        "stopped_because": result.stopped_because,
        "sets": {name: asdict(errors) for name, errors in result.sets.items()},
        "forgetting": [asdict(f) for f in result.forgetting],
        "history": result.history,
        "options": options.model_dump(mode="json"),
    }
    cleaned: dict[str, Any] = _without_nan(made)
    return cleaned


def _without_nan(value: Any) -> Any:
    """JSON has no NaN: None stands for what is not known."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {str(k): _without_nan(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [_without_nan(v) for v in value]
    return value
