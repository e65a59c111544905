"""Command line.  A command parses, calls one public function and prints; heavy imports come late."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from compactmlip import __version__, cli_compress, cli_deploy, cli_train
from compactmlip.cli_types import (
    AcceptLicence,
    AsJSON,
    Budget,
    Config,
    Cutoffs,
    CutPaths,
    Device,
    Modality,
    Output,
    PlanFile,
    Seed,
    Settings,
    Species,
    Structures,
    Teacher,
    To,
    load_for,
    print_result,
    species_of,
    symbols_in,
)
from compactmlip.errors import CompactMLIPError, InputError

INTERRUPTED = 130
"""Exit status after Ctrl-C, by convention 128 + SIGINT."""

app = typer.Typer(
    name="compactmlip",
    help="Make large equivariant interatomic potentials small, fast and validated for your own system.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    add_completion=False,
)


def main() -> None:
    """Entry point: turn expected errors into one line and an exit status."""
    # OpenMP threads that spin while they wait stop each other on busy cores.  SevenNet-l3i5 on two cores:
    # 90 atoms/s alone but 6 beside another process; 80 and 50 with this bound on the spinning.  It is
    # read when torch is loaded, which comes later.
    if "OMP_WAIT_POLICY" not in os.environ:
        os.environ.setdefault("GOMP_SPINCOUNT", "1000")
    try:
        app()
    except CompactMLIPError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(1)
    except SystemExit as stop:
        if stop.code == INTERRUPTED:
            print("interrupted; the same command continues where it can.", file=sys.stderr)
        raise


def _version(show: bool) -> None:
    if show:
        print(f"compactmlip {__version__}")
        raise typer.Exit()


@app.callback()
def _root(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Show the version.")
    ] = False,
) -> None:
    pass


@app.command()
def info(file: Path, as_json: AsJSON = False) -> None:
    """Show what a checkpoint or a deployed model is."""
    from compactmlip.info import describe

    description = describe(file)
    if as_json:
        print(json.dumps(description))
        return
    width = max(len(key) for key in description)
    for key, value in description.items():
        lines = value if isinstance(value, list) else [value]
        for k, line in enumerate(lines):
            print(f"{key if k == 0 else '':{width}}  {line}")


@app.command()
def models(as_json: AsJSON = False) -> None:
    """List the foundation models that are known by name, with licence and source."""
    from compactmlip.families.names import listing, rows

    print(json.dumps(rows()) if as_json else "\n".join(listing()))


@app.command()
def convert(
    model: Annotated[str, typer.Argument(help="Name (see 'compactmlip models') or upstream file.")],
    output: Output = None,
    species: Species = None,
    modality: Modality = None,
    accept_licence: AcceptLicence = None,
    dtype: Annotated[str, typer.Option(help="float32 or float64.")] = "float32",
    as_json: AsJSON = False,
) -> None:
    """Import a foundation model as a compactmlip checkpoint."""
    from compactmlip import checkpoint
    from compactmlip.compress.apply import keep_species
    from compactmlip.families import load_model

    if dtype not in checkpoint.DTYPES:
        raise InputError(f"unknown dtype '{dtype}'; choose float32 or float64.")
    path = output or Path(f"{Path(model).stem}.safetensors")
    checkpoint.check_name(path)
    native = load_model(
        model,
        modality=modality,
        dtype=checkpoint.DTYPES[dtype],
        accept_licence=accept_licence,
        progress=not as_json,
    )
    symbols = symbols_in(species)
    checkpoint.save(keep_species(native, symbols) if symbols else native, path)
    print_result(as_json, f"wrote {path}", output=path)


@app.command()
def export(
    model: Annotated[str, typer.Argument(help="Name or checkpoint of a MACE model.")],
    output: Output = None,
    modality: Modality = None,
    accept_licence: AcceptLicence = None,
    dtype: Annotated[str | None, typer.Option(help="float32 or float64; the model's own by default.")] = None,
    as_json: AsJSON = False,
) -> None:
    """Write a MACE model as a .model file for mace-torch (needs mace-torch)."""
    from compactmlip import checkpoint
    from compactmlip.families import load_model
    from compactmlip.families.mace_export import export_model

    if dtype is not None and dtype not in checkpoint.DTYPES:
        raise InputError(f"unknown dtype '{dtype}'; choose float32 or float64.")
    path = output or Path(f"{Path(model).stem}.model")
    if path.exists() and Path(model).exists() and path.samefile(model):
        raise InputError(f"{path} would be written over itself; name another file with --output.")
    native = load_model(
        model, modality=modality, dtype=None, accept_licence=accept_licence, progress=not as_json
    )
    export_model(native, path, dtype=checkpoint.DTYPES[dtype] if dtype else None)
    print_result(as_json, f"wrote {path}", output=path)


@app.command()
def sample(
    structures: Structures,
    teacher: Teacher = "7net-l3i5",
    output: Output = None,
    number: Annotated[int | None, typer.Option("-n", help="Number of structures.")] = None,
    modality: Modality = None,
    accept_licence: AcceptLicence = None,
    device: Device = "cpu",
    seed: Seed = None,
    config: Config = None,
    settings: Settings = None,
    as_json: AsJSON = False,
) -> None:
    """Sample diverse structures around the given ones."""
    from compactmlip.config import resolve
    from compactmlip.data.read import check_xyz_name, read_structures, write_labelled
    from compactmlip.data.sample import SampleOptions, sample as run

    path = output or Path("samples.xyz")
    check_xyz_name(path)
    options = resolve(SampleOptions, config, settings or [], n=number, seed=seed)
    frames = read_structures(structures)
    loaded = load_for(teacher, species_of(frames), modality, accept_licence, device, not as_json)
    made = run(frames, loaded, options, progress=not as_json)
    write_labelled(path, made)
    print_result(as_json, f"wrote {len(made)} structures to {path}", output=path, structures=len(made))


@app.command()
def label(
    structures: Structures,
    teacher: Teacher = "7net-l3i5",
    output: Output = None,
    hessian: Annotated[
        int, typer.Option(help="Random directions per structure along which the Hessian is labelled too.")
    ] = 0,
    keep_labels: Annotated[
        bool, typer.Option("--keep-labels", help="With --hessian: keep the energies and forces of the file.")
    ] = False,
    modality: Modality = None,
    accept_licence: AcceptLicence = None,
    device: Device = "cpu",
    as_json: AsJSON = False,
) -> None:
    """Compute teacher energies, forces and stresses; continues after an interruption."""
    from compactmlip.data.label import label as run
    from compactmlip.data.read import check_xyz_name, read_labelled, read_structures

    path = output or Path("labelled.xyz")
    check_xyz_name(path)
    frames = read_structures(structures)
    if keep_labels:
        frames = [a for file in structures for a in read_labelled(file)]
    loaded = load_for(teacher, species_of(frames), modality, accept_licence, device, not as_json)
    done = run(frames, loaded, path, hessian=hessian, keep_labels=keep_labels, progress=not as_json)
    print_result(
        as_json, f"wrote {len(done)} labelled structures to {path}", output=path, structures=len(done)
    )


app.command()(cli_compress.importance)
app.command()(cli_compress.prune)
app.command()(cli_compress.search)


app.command()(cli_train.distil)
app.command()(cli_train.retrain)
app.command()(cli_train.finetune)
app.command("compile")(cli_deploy.compile_)
app.command()(cli_deploy.verify)
app.command()(cli_deploy.build)
app.command("lammps-input")(cli_deploy.lammps_input)


@app.command()
def validate(
    model: Annotated[Path, typer.Argument(help="Deployed file (*.pt) or checkpoint.")],
    teacher: Annotated[Path, typer.Option(help="Teacher's checkpoint (*.safetensors) or deployed file.")],
    structure: Annotated[
        list[Path],
        typer.Option("--structure", help="Held-out labelled structures, or structures to sample from."),
    ],
    checkpoint: Annotated[
        Path | None,
        typer.Option(
            help="Checkpoint that the model was compiled from, to compare in plain PyTorch as well."
        ),
    ] = None,
    scores: Annotated[
        Path | None,
        typer.Option(help="Scores of 'compactmlip importance' on the teacher, shown in the report."),
    ] = None,
    front: Annotated[
        Path | None, typer.Option(help="front.json of the search that chose the model, shown in the report.")
    ] = None,
    output: Output = None,
    device: Annotated[str | None, typer.Option(help="Where to compute: cpu, cuda, ...")] = None,
    seed: Seed = None,
    config: Config = None,
    settings: Settings = None,
    as_json: AsJSON = False,
) -> None:
    """Compare a model with its teacher; writes certificate.json and report.html."""
    from compactmlip.config import resolve
    from compactmlip.data.read import read_structures
    from compactmlip.validate.options import ValidateOptions
    from compactmlip.validate.run import validate as run

    options = resolve(ValidateOptions, config, settings or [], seed=seed, device=device)
    folder = output or Path("validation")
    certificate = run(
        model,
        teacher,
        read_structures(structure),
        options,
        folder,
        source=checkpoint,
        scores=scores,
        front=front,
        progress=not as_json,
    )
    text = f"{certificate.verdict}: see {folder / 'report.html'} and {folder / 'certificate.json'}"
    left_out = {part.name: part.reason for part in certificate.left_out}
    text += "".join(f"\nnot checked: {name}: {reason}" for name, reason in left_out.items())
    print_result(as_json, text, verdict=certificate.verdict, output=folder, left_out=left_out)


@app.command()
def specialize(
    structures: Structures,
    output: Output = None,
    teacher: Annotated[str | None, typer.Option(help="Name or checkpoint file.")] = None,
    modality: Modality = None,
    accept_licence: AcceptLicence = None,
    species: Species = None,
    to: To = None,
    cut_paths: CutPaths = None,
    cutoffs: Cutoffs = None,
    plan: PlanFile = None,
    budget: Budget = None,
    number: Annotated[int | None, typer.Option("-n", help="Number of structures to sample.")] = None,
    minutes: Annotated[float | None, typer.Option(help="Time for everything.")] = None,
    dtype: Annotated[str | None, typer.Option(help="float32 or float64.")] = None,
    device: Annotated[str | None, typer.Option(help="Where to compute: cpu, cuda, ...")] = None,
    seed: Seed = None,
    config: Config = None,
    settings: Settings = None,
    as_json: AsJSON = False,
) -> None:
    """All steps with all options: from structures to a validated compact model."""
    from compactmlip.data.read import read_structures

    options = {
        "teacher": teacher,
        "modality": modality,
        "accept_licence": accept_licence,
        "species": symbols_in(species),
        "to": to,
        "cut_paths": cut_paths,
        "cutoffs": cutoffs,
        "plan": plan,
        "budget": budget,
        "sample__n": number,
        "minutes": minutes,
        "dtype": dtype,
        "device": device,
        "seed": seed,
    }
    _specialize(
        read_structures(structures),
        output or Path("compactmlip-specialized"),
        options,
        config,
        settings,
        as_json,
    )


@app.command()
def quickstart(
    structure: Annotated[
        Path | None, typer.Argument(help="Structure file; rock-salt MgO if none is given.")
    ] = None,
    teacher: Annotated[str | None, typer.Option(help="Name or checkpoint file.")] = None,
    accept_licence: AcceptLicence = None,
    minutes: Annotated[float | None, typer.Option(help="Time for everything.")] = None,
    output: Output = None,
    as_json: AsJSON = False,
) -> None:
    """The whole way with default options; try this first."""
    from ase.build import bulk

    from compactmlip.data.read import read_structures

    atoms = read_structures([structure]) if structure else [bulk("MgO", "rocksalt", a=4.21, cubic=True)]
    options = {"teacher": teacher, "accept_licence": accept_licence, "minutes": minutes}
    _specialize(atoms, output or Path("compactmlip-quickstart"), options, None, None, as_json)


def _specialize(
    structures: list[Any],
    folder: Path,
    options: dict[str, Any],
    config: Path | None,
    settings: list[str] | None,
    as_json: bool,
) -> None:
    from compactmlip.config import resolve
    from compactmlip.specialize import specialize as run
    from compactmlip.specialize_options import SpecializeOptions
    from compactmlip.summary import print_summary

    resolved = resolve(SpecializeOptions, config, settings or [], **options)
    certificate = run(structures, resolved, folder, progress=not as_json)
    if as_json:
        print(certificate.model_dump_json())
    else:
        print_summary(certificate, folder)


if __name__ == "__main__":
    main()
