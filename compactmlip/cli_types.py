"""Arguments and options that several commands share, and how they print their result."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Annotated, Any

import typer

Output = Annotated[Path | None, typer.Option("-o", "--output", help="File or folder to write.")]
Config = Annotated[Path | None, typer.Option("--config", help="YAML file with options; flags override it.")]
Settings = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="KEY=VALUE", help="Any other option, for instance distil.lr=0.003."),
]
Seed = Annotated[int | None, typer.Option(help="Seed of all random numbers.")]
Device = Annotated[str, typer.Option(help="Where to compute: cpu, cuda, cuda:1, ...")]
AsJSON = Annotated[bool, typer.Option("--json", help="Print the result as JSON, and no progress.")]
Structures = Annotated[list[Path], typer.Argument(help="Structure files, anything that ASE reads.")]
Teacher = Annotated[str, typer.Option(help="Name (see 'compactmlip models') or checkpoint file.")]
Modality = Annotated[
    str | None, typer.Option(help="Level of theory (or MACE head), for models that have several.")
]
AcceptLicence = Annotated[
    str | None,
    typer.Option(
        "--accept-licence",
        "--accept-license",
        metavar="NAME",
        help="Accept the restricted licence of a model's weights, for instance ASL.",
    ),
]
Species = Annotated[str | None, typer.Option(help="Species to keep, for instance Mg,O.")]
To = Annotated[
    str | None,
    typer.Option("--to", help="Channels per order, for instance 64x0+32x1+16x2; per layer with commas."),
]
CutPaths = Annotated[
    float | None,
    typer.Option(
        help="Share of the tensor products' paths to cut, for instance 0.7: those worth least for their work."
    ),
]
Cutoffs = Annotated[
    str | None,
    typer.Option(
        help="Cutoffs of the layers in Angstrom (SevenNet), shares of the model's (80%), or - for its own; "
        "the last one holds for all that follow: -,4.5 shortens those of all layers but the first."
    ),
]
Keys = Annotated[str | None, typer.Option(metavar="KEY", help="Label name in the file.")]
KeptLayers = Annotated[
    int | None,
    typer.Option(help="Message-passing layers to keep (MACE); with --to, channels are cut as well."),
]
Backend = Annotated[
    str | None,
    typer.Option(
        help="kernels (fastest; CPU, needs a C++ compiler; the default where they can be used), torch (runs "
        "anywhere), cueq (NVIDIA GPUs with cuequivariance; not yet tested on one; slow on the CPU) or aoti "
        "(machine code, *.pt2, for this torch and processors like this one)."
    ),
]
Precision = Annotated[
    str,
    typer.Option(
        help="float32, float64, mixed (float32; geometry and energy readouts in float64) or bf16 (float32; "
        "operands of dense products rounded to bfloat16)."
    ),
]
TF32 = Annotated[
    bool, typer.Option("--tf32", help="Allow TF32 products on NVIDIA GPUs; never used otherwise.")
]
MeasuredOn = Annotated[
    list[Path] | None,
    typer.Option(
        "--calibration",
        help="Structures on which the error against float64 is measured, and which span the trust region of "
        "the file; labels are not needed.",
    ),
]
Calibration = Annotated[list[Path], typer.Option("--calibration", help="Structures; labels are not needed.")]
OddPaths = Annotated[bool, typer.Option(help="Keep tensor-product paths that break inversion symmetry.")]
EdgeOrder = Annotated[
    int | None,
    typer.Option(
        min=0, help="Largest order of the harmonics of edges to keep (SevenNet); by default the target's."
    ),
]
Importance = Annotated[
    str,
    typer.Option(
        help="Ranks channels: taylor, taylor-atom, fisher, hessian, reconstruction, activation, magnitude or "
        "random; or a file of 'compactmlip importance'."
    ),
]
PlanFile = Annotated[
    Path | None, typer.Option("--plan", help="JSON file that says what to keep, as 'search' writes it.")
]
Budget = Annotated[
    str | None,
    typer.Option(
        help="Ranks all channels together and keeps the best within parameters=, memory=, flops= or "
        "(measured) latency=; a share (20%) or factor (8x) of the uncut model, or a number with a unit."
    ),
]
RoundTo = Annotated[int, typer.Option(help="With --budget: numbers of channels are multiples of this.")]
GroupKey = Annotated[
    str | None,
    typer.Option(help="info key naming the material of a frame; validates the refit across materials."),
]
NumBasis = Annotated[int | None, typer.Option(help="Radial functions to have in the end (MACE).")]
BasisStart = Annotated[
    str, typer.Option(help="Start of --num-basis: inherited, or random, which has to be trained.")
]


def symbols_in(text: str | None) -> tuple[str, ...] | None:
    """Species of a list such as ``Mg,O``."""
    return None if text is None else tuple(s.strip() for s in text.split(",") if s.strip())


def species_of(frames: Iterable[Any]) -> tuple[str, ...]:
    """Species of structures, sorted."""
    return tuple(sorted({s for a in frames for s in a.get_chemical_symbols()}))


def load_for(
    name: str,
    species: tuple[str, ...],
    modality: str | None,
    accept_licence: str | None,
    device: str,
    progress: bool,
) -> Any:
    """Load a model by name or file, with these species only."""
    from compactmlip.compress.apply import keep_species
    from compactmlip.deploy.archive import usable_device
    from compactmlip.families import load_model

    loaded = load_model(name, modality=modality, dtype=None, accept_licence=accept_licence, progress=progress)
    return keep_species(loaded, species).to(usable_device(device))


def until(minutes: float | None, epochs: int | None, settings: list[str] | None) -> list[str]:
    """Settings of a training: a time alone ends it, however many epochs that are."""
    by_time = minutes is not None and epochs is None
    return [*(["max_epochs=null"] if by_time else []), *(settings or [])]


def print_result(as_json: bool, text: str, **values: Any) -> None:
    """Print the last line of a command: for people, or with ``--json`` for scripts."""
    print(json.dumps(values, default=str) if as_json else text)
