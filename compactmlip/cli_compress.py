"""Commands that score, cut and search; like those of :mod:`compactmlip.cli`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from compactmlip.cli_types import (
    AcceptLicence,
    AsJSON,
    BasisStart,
    Budget,
    Calibration,
    Config,
    Cutoffs,
    CutPaths,
    Device,
    EdgeOrder,
    GroupKey,
    Importance,
    KeptLayers,
    Modality,
    NumBasis,
    OddPaths,
    Output,
    PlanFile,
    RoundTo,
    Seed,
    Settings,
    Species,
    To,
    load_for,
    print_result,
    species_of,
    symbols_in,
)
from compactmlip.errors import InputError

if TYPE_CHECKING:
    from torch import nn

    from compactmlip.compress.plan_file import Plan
    from compactmlip.compress.tapped import Scores
    from compactmlip.data.graph import GraphBatch

Model = Annotated[str, typer.Argument(help="Name or checkpoint of the model to cut.")]


def _graphs(frames: list[Any], teacher: nn.Module) -> list[GraphBatch]:
    """Structures as a model reads them."""
    from compactmlip.data.graph import build_graph
    from compactmlip.models import model_dtype, model_spec

    return [build_graph(a, model_spec(teacher), model_dtype(teacher)) for a in frames]


def importance(
    model: Annotated[str, typer.Argument(help="Name or checkpoint of the model to score.")],
    calibration: Calibration,
    criterion: Importance = "taylor",
    output: Output = None,
    species: Species = None,
    modality: Modality = None,
    accept_licence: AcceptLicence = None,
    resamples: Annotated[
        int, typer.Option(help="Ways to halve the structures for the stability of the ranking; 0 for none.")
    ] = 0,
    device: Device = "cpu",
    seed: int = 0,
    as_json: AsJSON = False,
) -> None:
    """Score channels and layers; writes the scores, a picture and the ranking's stability."""
    import json

    from compactmlip.checkpoint import atomic_write_text, check_name
    from compactmlip.compress.compress import some_structures
    from compactmlip.compress.importance import importance as run
    from compactmlip.compress.relevance import layer_relevance
    from compactmlip.compress.scores_file import save_scores
    from compactmlip.compress.scores_plot import plot_scores
    from compactmlip.compress.stability import stability, summary
    from compactmlip.data.read import read_structures

    path = output or Path("scores.safetensors")
    check_name(path, "scores are")
    frames = read_structures(calibration)
    kept = symbols_in(species) or species_of(frames)
    teacher = load_for(model, kept, modality, accept_licence, device, not as_json)
    graphs = _graphs(frames, teacher)
    used = some_structures(graphs, seed)
    scores = run(teacher, used, criterion, seed=seed, progress=not as_json)
    relevance = layer_relevance(teacher, used)
    save_scores(path, scores, teacher, criterion=criterion, structures=len(used), layer_relevance=relevance)
    picture = plot_scores(path.with_suffix(".png"), scores, f"importance ({criterion})", relevance)
    values: dict[str, Any] = {"output": path, "picture": picture, "layer_relevance": relevance}
    text = f"wrote {path} and {picture}; relevance of layers " + ", ".join(f"{r:.2f}" for r in relevance)
    if resamples:
        found = stability(teacher, used, criterion, resamples=resamples, seed=seed, progress=not as_json)
        mean = summary(found)
        groups = {
            name: {"spearman": round(a.spearman, 4), "overlap": round(a.overlap, 4)}
            for name, a in found.items()
        }
        report = json.dumps({"criterion": criterion, "resamples": resamples, "groups": groups}, indent=1)

        atomic_write_text(path.with_suffix(".stability.json"), report + "\n")
        values |= {"spearman": mean.spearman, "overlap": mean.overlap}
        text += f"; two halves of the structures agree: Spearman {mean.spearman:.2f}, "
        text += f"{100 * mean.overlap:.0f} % of the upper half the same"
    print_result(as_json, text, **values)


def prune(
    model: Model,
    calibration: Calibration,
    to: To = None,
    cut_paths: CutPaths = None,
    cutoffs: Cutoffs = None,
    plan: PlanFile = None,
    budget: Budget = None,
    first: Annotated[
        Literal["paths", "channels"] | None,
        typer.Option(
            help="What a budget cuts first: paths of the tensor products (of the channels that --to names; "
            "the default of SevenNet models for latency and flops), or channels by a ranking of all."
        ),
    ] = None,
    round_to: RoundTo = 8,
    output: Output = None,
    species: Species = None,
    modality: Modality = None,
    accept_licence: AcceptLicence = None,
    layers: KeptLayers = None,
    compensate: Annotated[bool, typer.Option(help="Refit linear maps in closed form.")] = True,
    radial_hidden: Annotated[int | None, typer.Option(help="Units to keep in the radial networks.")] = None,
    readout_hidden: Annotated[int | None, typer.Option(help="Units to keep in the readout.")] = None,
    odd_paths: OddPaths = False,
    edge_order: EdgeOrder = None,
    num_basis: NumBasis = None,
    basis_start: BasisStart = "inherited",
    importance: Importance = "taylor",
    group_key: GroupKey = None,
    device: Device = "cpu",
    seed: int = 0,
    as_json: AsJSON = False,
) -> None:
    """Cut channels, orders and layers, then refit what is left."""
    from compactmlip import checkpoint
    from compactmlip.compress.compress import compress
    from compactmlip.compress.defaults import default_cut
    from compactmlip.compress.plan_file import Plan
    from compactmlip.data.read import read_structures
    from compactmlip.models import model_spec, num_parameters
    from compactmlip.search.within import Planner

    path = output or Path("pruned.safetensors")
    checkpoint.check_name(path)
    _one_of(to=to, plan=plan)
    _one_of(plan=plan, budget=budget, cut_paths=cut_paths)
    _one_of(plan=plan, cutoffs=cutoffs)
    if first and budget is None:
        raise InputError("--first says what a budget cuts first: give --budget as well.")
    if layers and budget:
        raise InputError("give --layers or --budget; to have both, cut layers first and prune the result.")
    frames = read_structures(calibration)
    kept = symbols_in(species) or species_of(frames)
    teacher = load_for(model, kept, modality, accept_licence, device, not as_json)
    graphs = _graphs(frames, teacher)
    options: dict[str, Any] = {"radial_hidden": radial_hidden, "readout_hidden": readout_hidden}
    options |= {"odd_paths": odd_paths, "edge_order": edge_order}
    target: str | Plan | None = to
    if target is None and budget is None and not layers and not num_basis:
        usual = default_cut(model_spec(teacher))
        target = usual.to
        cut_paths = usual.cut_paths if cut_paths is None else cut_paths
        cutoffs = usual.cutoffs if cutoffs is None else cutoffs
    scores = None
    if importance.endswith(".safetensors"):
        scores, importance = _read_scores(importance, teacher)
    if plan is not None:
        target = Plan.load(plan)
        target = target if scores is None else target.model_copy(update={"importance": importance})
    elif budget is not None:
        template = Plan(layers=("1x0",), importance=importance, **options)
        planner = Planner(
            budget,
            teacher,
            graphs,
            template,
            first=first,
            cutoffs=cutoffs,
            scores=scores,
            round_to=round_to,
            seed=seed,
            progress=not as_json,
        )
        target, scores = planner.plan(to), planner.known
        target.save(path.with_suffix(".plan.json"))
    made = compress(
        teacher,
        graphs,
        target,
        cut_paths=cut_paths or 0.0,
        cutoffs=cutoffs,
        layers=layers,
        num_basis=num_basis,
        basis_start=basis_start,  # type: ignore[arg-type]
        criterion=importance,
        scores=scores,
        with_compensation=compensate,
        groups=_groups(frames, group_key),
        seed=seed,
        progress=not as_json,
        **options,
    )
    checkpoint.save(made.model, path)
    before, after = (num_parameters(m) for m in (teacher, made.model))
    text = f"wrote {path}: {before} -> {after} parameters"
    values: dict[str, Any] = {"output": path, "parameters_before": before, "parameters": after}
    if isinstance(target, Plan):
        text += f", channels {target.summary}"
        values |= {"channels": target.target, "without_paths": list(target.without_paths)}
        values |= {"cutoffs": target.cutoffs}
    if made.compensation is not None:
        refit = made.compensation
        before_after = f"{1e3 * refit.before.forces:.0f} -> {1e3 * refit.after.forces:.0f}"
        text += f"; held-out force MAE {before_after} meV/A by compensation"
        values |= {"force_mae_plain": refit.before.forces, "force_mae": refit.after.forces}
    print_result(as_json, text, **values)


def _one_of(**options: object) -> None:
    given = [f"--{name.replace('_', '-')}" for name, value in options.items() if value is not None]
    if len(given) > 1:
        raise InputError(f"give only one of {' and '.join(given)}: each says what is kept.")


def _groups(frames: list[Any], key: str | None) -> list[str] | None:
    if key is None:
        return None
    if any(key not in a.info for a in frames):
        raise InputError(f"--group-key {key}: not every calibration structure has this info key.")
    return [str(a.info[key]) for a in frames]


def _read_scores(path: str, model: nn.Module) -> tuple[Scores, str]:
    from compactmlip.compress.scores_file import load_scores

    scores, header = load_scores(path, model)
    return scores, str(header.get("criterion", "taylor"))


def search(
    model: Model,
    data: Annotated[
        list[Path],
        typer.Option(
            "--data", help="Structures for the refits and, held out, for the errors; no labels needed."
        ),
    ],
    speedup: Annotated[
        str | None, typer.Option(help="How much faster than the deployed model itself, for instance 8x.")
    ] = None,
    force_mae: Annotated[
        float | None, typer.Option(help="Largest mean error of force components, meV/Angstrom.")
    ] = None,
    memory: Annotated[
        str | None, typer.Option(help="Largest memory of a calculation (an estimate), for instance 2GB.")
    ] = None,
    output: Output = None,
    minutes: Annotated[float | None, typer.Option(help="Time for the search.")] = None,
    candidates: Annotated[int | None, typer.Option(help="Number of candidates.")] = None,
    workers: Annotated[int | None, typer.Option(help="Processes that evaluate candidates.")] = None,
    distil_minutes: Annotated[
        float | None, typer.Option(help="Then train the best few, by successive halving, for so long.")
    ] = None,
    species: Species = None,
    modality: Modality = None,
    accept_licence: AcceptLicence = None,
    seed: Seed = None,
    config: Config = None,
    settings: Settings = None,
    as_json: AsJSON = False,
) -> None:
    """Find the channels per layer and order for a speed, an error or a memory on this machine."""
    from compactmlip.config import resolve
    from compactmlip.data.read import read_structures
    from compactmlip.search.options import SearchOptions
    from compactmlip.search.run import search as run

    options = resolve(
        SearchOptions,
        config,
        settings or [],
        speedup=speedup,
        force_mae=force_mae,
        memory=memory,
        minutes=minutes,
        candidates=candidates,
        workers=workers,
        distil_minutes=distil_minutes,
        seed=seed,
    )
    frames = read_structures(data)
    kept = symbols_in(species) or species_of(frames)
    teacher = load_for(model, kept, modality, accept_licence, "cpu", not as_json)
    folder = output or Path("search")
    found = run(teacher, frames, options, folder, progress=not as_json)
    print_result(as_json, found.text(folder), **found.values(folder))
