"""Commands that make deployed files and compiled operators; see :mod:`compactmlip.cli`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from compactmlip.cli_types import TF32, AsJSON, Backend, MeasuredOn, Output, Precision, print_result
from compactmlip.errors import InputError


def compile_(
    model: Annotated[Path, typer.Argument(help="Checkpoint (*.safetensors).")],
    output: Output = None,
    dtype: Precision = "float32",
    backend: Backend = None,
    calibration: MeasuredOn = None,
    tf32: TF32 = False,
    static_shapes: Annotated[
        bool,
        typer.Option(
            "--static-shapes",
            help="Let no shape depend on distances or species, as CUDA graphs need it (torch, cueq).",
        ),
    ] = False,
    require_certificate: Annotated[
        Path | None,
        typer.Option(help="Compile only if this certificate is the checkpoint's and no check failed."),
    ] = None,
    as_json: AsJSON = False,
) -> None:
    """Write the deployed file that the ASE calculator loads."""
    from compactmlip.data.read import read_structures
    from compactmlip.deploy.archive import SUFFIXES
    from compactmlip.deploy.compile import compile_model, default_backend
    from compactmlip.info import accuracy_text, tables_text, trust_text

    if require_certificate:
        from compactmlip.validate.verify import require

        require(model, require_certificate)
    backend = backend or ("torch" if tf32 or static_shapes else default_backend())
    path = output or model.with_suffix(SUFFIXES.get(backend, ".pt"))  # type: ignore[call-overload]
    report = compile_model(
        model,
        path,
        dtype=dtype,  # type: ignore[arg-type]
        backend=backend,  # type: ignore[arg-type]
        calibration=read_structures(calibration) if calibration else (),
        tf32=tf32,
        static_shapes=static_shapes,
    )
    lines = [f"wrote {path} ({backend}, {dtype}, {report.num_bytes / 1e6:.2f} MB); errors against float64:"]
    text = "\n  ".join([*lines, *(accuracy_text(a) for a in report.accuracy)])
    if report.tables is not None:
        text += f"\n  radial tables: {tables_text(report.tables)}"
    if report.trust is not None:
        text += f"\n  trust region: {trust_text(report.trust)[0]}"
    if report.note:
        text += f"\n  {report.note}"
    accuracy = [a.model_dump() for a in report.accuracy]
    trust = report.trust and report.trust.model_dump()
    print_result(
        as_json, text, output=path, dtype=dtype, backend=backend, accuracy=accuracy, trust_region=trust
    )


def verify(
    model: Annotated[Path, typer.Argument(help="Deployed file or checkpoint.")],
    certificate: Annotated[Path, typer.Argument(help="certificate.json, with its files beside it.")],
    frames: Annotated[int, typer.Option(help="Structures to compute again; 0 for all.")] = 8,
    device: Annotated[str, typer.Option(help="Where to compute: cpu, cuda, ...")] = "cpu",
    as_json: AsJSON = False,
) -> None:
    """Check that a certificate is this model's and that its numbers can be reproduced."""
    from compactmlip.errors import CertificateError
    from compactmlip.validate.verify import verify as run

    if frames < 0:
        raise InputError(f"--frames must be at least 0, not {frames}.")
    found = run(model, certificate, frames=frames, device=device)
    lines = [f"{'yes' if f.agrees else 'NO':4}{f.what} ({f.detail})" for f in found]
    print_result(as_json, "\n".join(lines), findings=[vars(f) for f in found])
    wrong = [f.what for f in found if not f.agrees]
    if wrong:
        raise CertificateError(f"{certificate} does not hold for {model}: not true that {'; '.join(wrong)}.")


def build(
    force: Annotated[bool, typer.Option("--force", help="Build even if there is a library already.")] = False,
    lammps_include: Annotated[
        Path | None,
        typer.Option(help="Folder 'src' or installed headers of a LAMMPS that you built, for its plugin."),
    ] = None,
    bigbig: Annotated[bool, typer.Option("--bigbig", help="That LAMMPS has LAMMPS_BIGBIG.")] = False,
    as_json: AsJSON = False,
) -> None:
    """Compile the fast operators, and the plugin for LAMMPS; the first use of each does so by itself."""
    from compactmlip.kernels.build import build as run, check
    from compactmlip.lammps.build import build as build_plugin, installed, load_command, self_built

    lammps = self_built(lammps_include, bigbig=bigbig) if lammps_include else installed()
    report = run(force=force)
    check(report)
    done = f"built in {report.seconds:.0f} s" if report.built else "already there"
    text = f"{report.path}: {done}, {report.compiler}, {report.flags}"
    command = None
    if lammps is not None:
        command = load_command(build_plugin(lammps, force=force))
        # The LAMMPS of this environment finds its plugin; for others the line goes into the input.
        text += f"\nLAMMPS: {command}"
    print_result(as_json, text, **vars(report), lammps=command)


def lammps_input(
    structure: Annotated[Path, typer.Argument(help="Any file that ASE reads.")],
    model: Annotated[Path, typer.Option(help="Deployed file (*.pt).")],
    output: Output = None,
    ensemble: Annotated[str, typer.Option(help="nve, nvt or npt.")] = "nvt",
    temperature: Annotated[float, typer.Option(help="In K.")] = 300.0,
    repeat: Annotated[int, typer.Option(help="Cells along each periodic direction.")] = 1,
    as_json: AsJSON = False,
) -> None:
    """Write a script and a data file for LAMMPS."""
    from compactmlip.data.read import read_structures
    from compactmlip.lammps.input import write_input

    if repeat < 1:
        raise InputError(f"--repeat must be at least 1, not {repeat}.")
    atoms = read_structures([structure])[-1]
    atoms = atoms.repeat([repeat if periodic else 1 for periodic in atoms.pbc])
    folder = output or Path(f"{structure.stem}-lammps")
    made = write_input(atoms, model, folder, ensemble=ensemble, temperature=temperature)  # type: ignore[arg-type]
    text = f"wrote {made.script} and {made.data}; run: cd {folder} && lmp -in {made.script.name}"
    print_result(as_json, text, script=made.script, data=made.data)
