"""Commands that train, on the teacher's labels or the user's own; see :mod:`compactmlip.cli`."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from compactmlip.cli_types import (
    AcceptLicence,
    AsJSON,
    Config,
    Device,
    Keys,
    Modality,
    Output,
    Seed,
    Settings,
    print_result,
    symbols_in,
    until,
)
from compactmlip.errors import InputError

if TYPE_CHECKING:
    from compactmlip.train.finetune_options import FinetuneOptions

_Labelled = Annotated[
    list[Path], typer.Option("--train", help="Labelled structures, anything that ASE reads.")
]
_Some = list[Path] | None
_Rate = Annotated[
    float | None, typer.Option(help="Peak learning rate; by default from the force error of the start.")
]


def distil(
    student: Annotated[Path, typer.Argument(help="Checkpoint of the pruned model.")],
    train: Annotated[Path, typer.Option(help="Labelled training structures.")],
    valid: Annotated[Path, typer.Option(help="Labelled validation structures.")],
    output: Output = None,
    minutes: Annotated[float | None, typer.Option(help="Wall-clock budget.")] = None,
    epochs: Annotated[int | None, typer.Option(help="Passes over the training structures.")] = None,
    hessian: Annotated[
        float | None, typer.Option(help="Weight of the Hessian; needs structures of 'label --hessian'.")
    ] = None,
    teacher: Annotated[
        Path | None, typer.Option(help="Checkpoint of the teacher, which labels what --rounds finds.")
    ] = None,
    rounds: Annotated[
        int | None,
        typer.Option(
            help="Explorations by the student's dynamics, each followed by a training; needs --teacher."
        ),
    ] = None,
    energy_key: Keys = None,
    forces_key: Keys = None,
    stress_key: Keys = None,
    device: Device = "cpu",
    seed: Seed = None,
    config: Config = None,
    settings: Settings = None,
    as_json: AsJSON = False,
) -> None:
    """Train a pruned model on its teacher's labels; continues after an interruption."""
    from compactmlip import checkpoint
    from compactmlip.config import resolve
    from compactmlip.data.read import read_labelled
    from compactmlip.deploy.archive import usable_device
    from compactmlip.train.active import ActiveOptions, distil_actively
    from compactmlip.train.distil import DistilOptions, distil as run
    from compactmlip.train.ranks import current_ranks, own_device

    path = output or Path("distilled.safetensors")
    checkpoint.check_name(path)
    if (rounds is None) != (teacher is None):
        raise InputError("--rounds and --teacher belong together: the teacher labels what the rounds find.")
    given: dict[str, Any] = {"max_minutes": minutes, "max_epochs": epochs, "hessian_weight": hessian}
    kind = DistilOptions if rounds is None else ActiveOptions
    given |= {} if rounds is None else {"rounds": rounds}
    options = resolve(kind, config, until(minutes, epochs, settings), seed=seed, **given)
    names = {"energy_key": energy_key, "forces_key": forces_key, "stress_key": stress_key}
    keys: dict[str, Any] = {k: v for k, v in names.items() if v is not None}
    frames = [read_labelled(path, **keys) for path in (train, valid)]
    folder = path.with_suffix(".training")
    model = checkpoint.load(student).to(usable_device(own_device(device)))
    if teacher is None or not isinstance(options, ActiveOptions):
        result = run(model, frames[0], frames[1], options, folder, not as_json)
    else:
        labels = checkpoint.load(teacher).to(usable_device(own_device(device)))
        result = distil_actively(model, labels, frames[0], frames[1], options, folder, not as_json)
    if not current_ranks().first:
        return
    checkpoint.save(result.model, path)
    print_result(as_json, f"wrote {path}: {result.errors} on {valid}", output=path, **result.errors.row())


def finetune(
    model: Annotated[str, typer.Argument(help="Name (see 'compactmlip models') or file of the parent.")],
    train: _Labelled,
    valid: Annotated[_Some, typer.Option(help="Validation set; else part of --train is held out.")] = None,
    test: Annotated[_Some, typer.Option(help="Test set, for the report only.")] = None,
    replay: Annotated[
        _Some, typer.Option(help="Structures on which the parent should not be forgotten, for the report.")
    ] = None,
    output: Output = None,
    minutes: Annotated[float | None, typer.Option(help="Wall-clock budget of the training.")] = None,
    epochs: Annotated[int | None, typer.Option(help="Passes over the training structures.")] = None,
    lr: _Rate = None,
    e0: Annotated[
        str | None,
        typer.Option(help="auto, isolated, least-squares, parent, or energies such as Si=-0.8,O=-1.5 (eV)."),
    ] = None,
    energy_key: Keys = None,
    forces_key: Keys = None,
    stress_key: Keys = None,
    virials_key: Keys = None,
    energy_unit: Annotated[str | None, typer.Option(help="eV, Hartree, kcal/mol, ...")] = None,
    forces_unit: Annotated[str | None, typer.Option(help="eV/Angstrom, Hartree/Bohr, ...")] = None,
    stress_unit: Annotated[str | None, typer.Option(help="eV/Angstrom^3, GPa, kbar, ...")] = None,
    keep_species: Annotated[
        str | None, typer.Option(help="Species to keep beyond those in the data, for instance Mg,O; or all.")
    ] = None,
    freeze: Annotated[
        list[str] | None, typer.Option(help="Parameters that are not trained, for instance 'layers.0'.")
    ] = None,
    lora: Annotated[int | None, typer.Option(help="Train updates of this rank; merged at the end.")] = None,
    group_key: Annotated[
        str | None, typer.Option(help="info key of frames that are held out together.")
    ] = None,
    accept: Annotated[list[str] | None, typer.Option(help="Finding about the data to go on with.")] = None,
    drop: Annotated[list[str] | None, typer.Option(help="Finding whose frames are left out.")] = None,
    dtype: Annotated[str | None, typer.Option(help="float32 or float64.")] = None,
    modality: Modality = None,
    accept_licence: AcceptLicence = None,
    device: Device = "cpu",
    seed: Seed = None,
    config: Config = None,
    settings: Settings = None,
    as_json: AsJSON = False,
) -> None:
    """Train a model on your own labels, starting exactly where it is; continues after an interruption."""
    from compactmlip.config import resolve
    from compactmlip.train.finetune_options import FinetuneOptions

    given: dict[str, Any] = {
        "max_minutes": minutes,
        "max_epochs": epochs,
        "lr": lr,
        "e0": _energies(e0),
        "labels__energy_key": energy_key,
        "labels__forces_key": forces_key,
        "labels__stress_key": stress_key,
        "labels__virials_key": virials_key,
        "labels__energy_unit": energy_unit,
        "labels__forces_unit": forces_unit,
        "labels__stress_unit": stress_unit,
        "keep_species": symbols_in(keep_species),
        "freeze": freeze or None,
        "lora_rank": lora,
        "group_key": group_key,
        "accept": accept or None,
        "drop": drop or None,
        "dtype": dtype,
        "seed": seed,
    }
    options = resolve(FinetuneOptions, config, until(minutes, epochs, settings), **given)
    files = (train, valid or (), test or (), replay or ())
    folder = output or Path("compactmlip-finetuned")
    source = {"modality": modality, "accept_licence": accept_licence}
    _train(model, files, options, folder, device, as_json, "report.html", **source)


def retrain(
    model: Annotated[str, typer.Argument(help="Checkpoint of the pruned model.")],
    train: _Labelled,
    valid: Annotated[_Some, typer.Option(help="Validation set; else part of --train is held out.")] = None,
    test: Annotated[_Some, typer.Option(help="Test set; its errors are written, nothing else.")] = None,
    output: Output = None,
    preset: Annotated[
        str | None,
        typer.Option(help="Published settings: mace-mp, mace-off or sevennet; other options override them."),
    ] = None,
    per_group: Annotated[
        int | None, typer.Option(help="Random training structures of each material at most.")
    ] = None,
    group_share: Annotated[
        float | None, typer.Option(help="Or a random share of each material's, for instance 0.25.")
    ] = None,
    group_key: Annotated[
        str | None, typer.Option(help="info key that names the material, for instance mp_id.")
    ] = None,
    resample: Annotated[
        bool | None, typer.Option("--resample", help="Draw these structures anew in each epoch.")
    ] = None,
    minutes: Annotated[float | None, typer.Option(help="Wall-clock budget of the training.")] = None,
    epochs: Annotated[int | None, typer.Option(help="Passes over the training structures.")] = None,
    lr: _Rate = None,
    hessian: Annotated[
        float | None, typer.Option(help="Weight of the teacher's Hessian; needs 'label --hessian'.")
    ] = None,
    energy_key: Keys = None,
    forces_key: Keys = None,
    stress_key: Keys = None,
    virials_key: Keys = None,
    accept: Annotated[list[str] | None, typer.Option(help="Finding about the data to go on with.")] = None,
    drop: Annotated[list[str] | None, typer.Option(help="Finding whose frames are left out.")] = None,
    dtype: Annotated[str | None, typer.Option(help="float32 or float64.")] = None,
    device: Device = "cpu",
    seed: Seed = None,
    config: Config = None,
    settings: Settings = None,
    as_json: AsJSON = False,
) -> None:
    """Train a pruned model on data of its first training; continues after an interruption."""
    from compactmlip.config import resolve
    from compactmlip.train.retrain import RetrainOptions

    given: dict[str, Any] = {
        "preset": preset,
        "per_group": per_group,
        "group_share": group_share,
        "group_key": group_key,
        "resample": resample,
        "max_minutes": minutes,
        "max_epochs": epochs,
        "lr": lr,
        "hessian_weight": hessian,
        "labels__energy_key": energy_key,
        "labels__forces_key": forces_key,
        "labels__stress_key": stress_key,
        "labels__virials_key": virials_key,
        "accept": accept or None,
        "drop": drop or None,
        "dtype": dtype,
        "seed": seed,
    }
    options = resolve(RetrainOptions, config, until(minutes, epochs, settings), **given)
    folder = output or Path("compactmlip-retrained")
    _train(model, (train, valid or (), test or ()), options, folder, device, as_json, "summary.json")


def _train(
    model: str,
    files: tuple[Sequence[Path], ...],
    options: FinetuneOptions,
    folder: Path,
    device: str,
    as_json: bool,
    report: str,
    **source: str | None,
) -> None:
    """Train, and print what came of it; of several processes the first one talks."""
    from compactmlip.finetune import FinetuneFiles, finetune_files
    from compactmlip.train.ranks import current_ranks, own_device

    first = current_ranks().first
    summary = finetune_files(
        model,
        FinetuneFiles(*files),
        options,
        folder,
        device=own_device(device),
        progress=not as_json and first,
        say=lambda text: _say(text, as_json) if first else None,
        **source,
    )
    if first:
        _print(summary, folder, as_json, report)


def _say(text: str, as_json: bool) -> None:
    print(text, file=sys.stderr if as_json else sys.stdout, flush=True)


def _energies(text: str | None) -> Any:
    """A word, or energies by species."""
    if text is None or "=" not in text:
        return text
    try:
        return {s.strip(): float(x) for s, x in (pair.split("=") for pair in text.split(","))}
    except ValueError:
        raise InputError(f"--e0 {text}: expected energies such as Si=-0.8,O=-1.5 (eV).") from None


def _print(summary: dict[str, Any], folder: Path, as_json: bool, report: str) -> None:
    lines = []
    values: dict[str, Any] = {"output": folder / "model.safetensors", "report": folder / report}
    for name, errors in summary["sets"].items():
        before, after = errors["before"], errors["after"]
        lines.append(
            f"{name}: energy {before['energy']['mae']:.3g} -> {after['energy']['mae']:.3g} meV/atom, "
            f"forces {_mae(before)} -> {_mae(after)} meV/A"
        )
        values[name] = {
            f"{quantity}_mae_{when}": found[quantity]["mae"]
            for when, found in (("before", before), ("after", after))
            for quantity in ("energy", "forces", "stress")
        }
    for kind in summary["forgetting"]:
        found = kind["errors"]
        lines.append(
            f"against the parent, {kind['name']}: energy {found['energy']['mae']:.3g} meV/atom, forces "
            f"{found['forces']['mae']:.3g} of {kind['mean_force']:.3g} meV/A"
        )
    lines.append(
        f"wrote {folder / 'model.safetensors'} (best epoch {summary['best_epoch']}); see {values['report']}"
    )
    print_result(as_json, "\n".join(lines), **values)


def _mae(errors: dict[str, Any]) -> str:
    mae = errors["forces"]["mae"]
    return "-" if mae is None else f"{mae:.3g}"
