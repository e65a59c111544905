"""From a foundation model and the user's structures to a validated compact model, in one folder.

Every step writes its result into the folder before the next begins, so that a run that was stopped
continues where it was.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from ase import Atoms
from torch import nn

from compactmlip import checkpoint
from compactmlip.channels import format_channels
from compactmlip.compress.apply import keep_species
from compactmlip.compress.compress import checked_targets, compress
from compactmlip.compress.cost import Budget
from compactmlip.compress.defaults import Cut, default_cuts
from compactmlip.compress.plan import parse_cutoffs
from compactmlip.compress.plan_file import Plan
from compactmlip.compress.scores_file import save_scores
from compactmlip.compress.tapped import Scores
from compactmlip.data.graph import GraphBatch, build_graph
from compactmlip.data.label import label
from compactmlip.data.read import read_labelled, read_structures, write_labelled
from compactmlip.data.sample import sample
from compactmlip.data.select import split
from compactmlip.deploy.archive import usable_device
from compactmlip.deploy.compile import compile_model, default_backend
from compactmlip.errors import InputError
from compactmlip.families import load_model
from compactmlip.models import model_dtype, model_spec, num_parameters
from compactmlip.search.within import Planner, cuts_paths
from compactmlip.specialize_folder import Folder
from compactmlip.specialize_options import PARTS, VALIDATION_SHARE, SpecializeOptions, with_budgets
from compactmlip.train.dataset import Dataset
from compactmlip.train.distil import DistilResult, distil
from compactmlip.train.metrics import evaluate
from compactmlip.validate.certificate import Certificate, Stage
from compactmlip.validate.run import validate

SCORES = "importance.safetensors"
"""Importance of the teacher's channels, in the folder."""

CANDIDATES = "candidates"
"""Folder of the models that may become the result."""

SHORTEST_TRAINING = 0.5
"""Minutes of training that are done even when the budget is used up."""

TRIAL_SHARE, SHORTEST_TRIAL = 0.09, 0.2
"""Share of the time for training that each candidate gets before one is chosen; minutes below which the first
one is taken."""

FIRST_STAYS = 0.9
"""Validation loss over that of the first candidate from which on another one takes its place.  As good after
a short training, the first one is better after a long one: it has more channels."""


def specialize(
    structures: Sequence[Atoms],
    options: SpecializeOptions | None = None,
    out_dir: str | Path = "compactmlip-specialized",
    *,
    progress: bool = True,
) -> Certificate:
    """Make a compact model for the user's structures and prove what it is worth.

    Steps: import the teacher and keep only the species needed; sample structures; label them with
    the teacher; prune with compensation (where nothing says what to keep, in several ways, of which a short
    training of each chooses); distil; compile; validate.  The folder then holds each
    intermediate model and data set, ``model.pt``, ``certificate.json`` and ``report.html``.

    Parameters
    ----------
    structures
        The user's structures.
    options
        See :class:`SpecializeOptions`.
    out_dir
        Folder; an unfinished run with the same options is continued.
    progress
        Show progress bars.

    Raises
    ------
    CompactMLIPError
        If a structure, option or file cannot be used, or the folder holds another run.
    """
    if not structures:
        raise InputError("no structure given.")
    options = with_budgets(options or SpecializeOptions())
    folder = Folder(Path(out_dir), options, structures)
    run = _Run(folder, options, list(structures), progress)
    for name in ("teacher", "sample", "label", "prune", "choose", "distil", "compile", "validate"):
        folder.step(name, getattr(run, name))
    return Certificate.load(folder / "certificate.json")


class _Run:
    """The steps; each reads the files of earlier steps and returns numbers to remember."""

    def __init__(
        self, folder: Folder, options: SpecializeOptions, structures: list[Atoms], progress: bool
    ) -> None:
        self.folder, self.options, self.structures, self.progress = folder, options, structures, progress

    def teacher(self) -> dict[str, Any]:
        """Import the teacher, remove the weights of absent species, and check the target against it."""
        full = load_model(
            self.options.teacher,
            modality=self.options.modality,
            accept_licence=self.options.accept_licence,
            progress=self.progress,
        )
        present = {s for atoms in self.structures for s in atoms.get_chemical_symbols()}
        wanted = set(self.options.species or present)
        if not present <= wanted:
            raise InputError(
                f"the structures hold {', '.join(sorted(present - wanted))}, which are not among the species "
                f"to keep ({', '.join(sorted(wanted))})."
            )
        model = keep_species(full, wanted)
        self._check_targets(model)
        checkpoint.save(model, self.folder / "teacher.safetensors")
        return {"full_parameters": num_parameters(full), "parameters": num_parameters(model)}

    def sample(self) -> dict[str, Any]:
        """Structures around the user's."""
        frames = sample(
            self.structures, self._load("teacher"), self._seeded(self.options.sample), self.progress
        )
        write_labelled(self.folder / "samples.xyz", frames)
        return {"frames": len(frames), "atoms": sum(len(a) for a in frames)}

    def label(self) -> dict[str, Any]:
        """Teacher energies, forces and stresses; split into training, validation and test."""
        frames = read_structures([self.folder / "samples.xyz"])
        labelled = label(frames, self._load("teacher"), self.folder / "labelled.xyz", progress=self.progress)
        parts = dict(zip(("train", "valid", "test"), split(labelled, seed=self.options.seed), strict=True))
        for name, part in parts.items():
            write_labelled(self.folder / f"{name}.xyz", part)
        forces = np.concatenate([np.linalg.norm(a.arrays["REF_forces"], axis=1) for a in parts["test"]])
        return {"mean_force_eV_per_A": float(forces.mean()), **{k: len(v) for k, v in parts.items()}}

    def prune(self) -> dict[str, Any]:
        """Cut and refit; several candidates where nothing says what to keep."""
        teacher = self._load("teacher")
        frames = self._frames("train")
        graphs = [build_graph(a, model_spec(teacher), model_dtype(teacher)) for a in frames]
        (self.folder / CANDIDATES).mkdir(exist_ok=True)
        targets = self._targets(teacher, graphs)
        scores: Scores | None = None
        for k, (target, options) in enumerate(targets):
            made = compress(
                teacher,
                graphs,
                target,
                scores=scores,
                with_compensation=self.options.compensate,
                seed=self.options.seed,
                progress=self.progress,
                **options,
                **self._parts(),
            )
            checkpoint.save(made.sliced, self.folder / CANDIDATES / f"pruned-{k}.safetensors")
            checkpoint.save(made.model, self.folder / CANDIDATES / f"compensated-{k}.safetensors")
            if scores is None:
                scores = made.scores
                criterion = target.importance if isinstance(target, Plan) else "taylor"
                save_scores(self.folder / SCORES, scores, teacher, criterion=criterion)
        return {"candidates": len(targets)}

    def choose(self) -> dict[str, Any]:
        """Train each of several candidates for a short time; the best of them goes on, the first if in doubt.

        Errors before a training say little about what it makes of a model.
        """
        number = self.folder.record["results"]["prune"]["candidates"]
        chosen, tried = 0, []
        minutes = TRIAL_SHARE * self._minutes("trials")
        if number > 1 and minutes >= SHORTEST_TRIAL:
            results = [
                self._trained(f"{CANDIDATES}/compensated-{k}", minutes, f"{CANDIDATES}/trial-{k}")
                for k in range(number)
            ]
            losses = [min(row["valid_loss"] for row in result.history) for result in results]
            chosen = int(np.argmin(losses))
            chosen = chosen if losses[chosen] < FIRST_STAYS * losses[0] else 0
            tried = [result.errors.forces.mae for result in results]
            checkpoint.save(results[chosen].model, self.folder / "started.safetensors")
        for name in ("pruned", "compensated"):
            model = self._load(f"{CANDIDATES}/{name}-{chosen}")
            checkpoint.save(model, self.folder / f"{name}.safetensors")
        plan = self.folder / CANDIDATES / f"plan-{chosen}.json"
        if plan.is_file():
            Plan.load(plan).save(self.folder / "plan.json")
        return {"chosen": chosen, "forces_mae": tried, "minutes": minutes if tried else 0.0}

    def _targets(
        self, teacher: nn.Module, graphs: Sequence[GraphBatch]
    ) -> list[tuple[str | Plan, dict[str, Any]]]:
        """What to keep, and options about it: one or several candidates."""
        if self.options.plan is not None:
            return [(self.options.plan, {})]
        if self.options.budget is None:
            return [(c.to, {"cut_paths": c.cut_paths, "cutoffs": c.cutoffs}) for c in self._cuts(teacher)]
        planner = Planner(
            self.options.budget,
            teacher,
            graphs,
            Plan(layers=("1x0",), **self._parts()),
            cutoffs=self.options.cutoffs,
            seed=self.options.seed,
            progress=self.progress,
        )
        plans: list[tuple[str | Plan, dict[str, Any]]] = []
        for to in self._starts(teacher):
            plan = planner.plan(to)
            plan.save(self.folder / CANDIDATES / f"plan-{len(plans)}.json")
            plans.append((plan, {}))
        return plans

    def _cuts(self, teacher: nn.Module) -> list[Cut]:
        """What to cut without a plan or a budget."""
        names = ("to", "cut_paths", "cutoffs")
        given = {name: value for name in names if (value := getattr(self.options, name)) is not None}
        if "to" in given:
            return [Cut(**given)]
        defaults = default_cuts(model_spec(teacher))
        return [replace(cut, **given) for cut in defaults[: 1 if "cut_paths" in given else None]]

    def _starts(self, teacher: nn.Module) -> list[str | None]:
        """Channels that a budget begins with; None where it ranks all."""
        assert self.options.budget is not None
        spec, to = model_spec(teacher), self.options.to
        if to is not None or not cuts_paths(Budget.parse(self.options.budget), spec, to):
            return [to]
        return [cut.to for cut in default_cuts(spec)]

    def _check_targets(self, model: nn.Module) -> None:
        """Refuse a target that cannot be met now, not after sampling and labelling."""
        spec = model_spec(model)
        if (plan := self.options.plan) is not None:
            checked_targets(spec, plan.target, **plan.options, cutoffs=plan.cutoffs)
            return
        if self.options.budget is not None:
            cuts_paths(Budget.parse(self.options.budget), spec, self.options.to)
        for cut in self._cuts(model):
            cutoffs = parse_cutoffs(cut.cutoffs, spec)
            may_stay = cut.cut_paths > 0 or self.options.budget is not None
            checked_targets(spec, cut.to, cutoffs=cutoffs, all_may_stay=may_stay, **self._parts())

    def _parts(self) -> dict[str, Any]:
        """Options about what is kept besides channels and paths."""
        return {name: getattr(self.options, name) for name in PARTS}

    def distil(self) -> dict[str, Any]:
        """Train for the time that is left."""
        minutes = self._minutes("distil")
        start = "started" if self.folder.record["results"]["choose"]["forces_mae"] else "compensated"
        result = self._trained(start, minutes, "distil")
        checkpoint.save(result.model, self.folder / "distilled.safetensors")
        return {
            "epochs": result.history[-1].get("epoch"),
            "minutes": minutes,
            "stopped": result.stopped_because,
        }

    def _minutes(self, name: str) -> float:
        """Minutes that are left for training; a continued run keeps what a step began with."""
        file = self.folder / f"{name}-minutes.json"
        if not file.is_file():
            left = self.options.minutes * (1 - VALIDATION_SHARE) - self.folder.seconds / 60
            checkpoint.atomic_write_text(file, json.dumps(max(left, SHORTEST_TRAINING)))
        return float(json.loads(file.read_text()))

    def _trained(self, start: str, minutes: float, name: str) -> DistilResult:
        """Distil a model of the folder; the folder of the training knows how much of its time is used."""
        options = self.options.distil.model_copy(update={"max_minutes": minutes, "seed": self.options.seed})
        return distil(
            self._load(start),
            self._frames("train"),
            self._frames("valid"),
            options,
            self.folder / name,
            self.progress,
        )

    def compile(self) -> dict[str, Any]:
        """Write the deployed file."""
        path = self.folder / "model.pt"
        compile_model(
            self.folder / "distilled.safetensors",
            path,
            dtype=self.options.dtype,
            backend=default_backend(self.options.device),
            check_structures=self._frames("test")[:4],
            trust_structures=self._frames("train"),
        )
        return {"bytes": path.stat().st_size}

    def validate(self) -> dict[str, Any]:
        """Certificate and report."""
        certificate = validate(
            self.folder / "model.pt",
            self.folder / "teacher.safetensors",
            self._frames("test"),
            self._seeded(self.options.validation).model_copy(update={"device": self.options.device}),
            self.folder.path,
            self._stages(),
            source=self.folder / "distilled.safetensors",
            scores=self.folder / SCORES if (self.folder / SCORES).is_file() else None,
            progress=self.progress,
        )
        return {"verdict": certificate.verdict}

    def _stages(self) -> list[Stage]:
        """One row per model on the way."""
        results = self.folder.record["results"]
        rows = [
            Stage(
                name=f"{self.options.teacher}, all species", parameters=results["teacher"]["full_parameters"]
            ),
            Stage(
                name="teacher, species needed",
                parameters=results["teacher"]["parameters"],
                file_bytes=(self.folder / "teacher.safetensors").stat().st_size,
                energy_mae=0.0,
                forces_mae=0.0,
                stress_mae=0.0,
                note="reference",
            ),
        ]
        titles = {"pruned": "pruned", "compensated": "pruned, compensated", "distilled": "distilled"}
        for name, title in titles.items():
            rows.append(self._stage(name, title))
        return rows

    def _stage(self, name: str, title: str) -> Stage:
        path = self.folder / f"{name}.safetensors"
        model = checkpoint.load(path)
        spec = model_spec(model)
        errors = evaluate(
            model, Dataset.from_frames(self._frames("test"), spec, model_dtype(model), "test set")
        )
        stress = errors.stress.mae
        layers = spec.architecture["layers"]
        note = f"{format_channels(layers[0]['out'])}, {sum(len(layer['paths']) for layer in layers)} paths"
        return Stage(
            name=title,
            parameters=num_parameters(model),
            file_bytes=path.stat().st_size,
            energy_mae=errors.energy.mae,
            forces_mae=errors.forces.mae,
            stress_mae=None if stress != stress else stress,
            note=f"{note}{self._rivals()}" if name == "distilled" else note,
        )

    def _rivals(self) -> str:
        """What the result was chosen from, if it was."""
        found = self.folder.record["results"]["choose"]
        errors = " and ".join(f"{error:.1f}" for error in found["forces_mae"])
        if not errors:
            return ""
        return f"; chosen among force errors of {errors} meV/A on validation structures after short trainings"

    def _load(self, name: str) -> nn.Module:
        return checkpoint.load(self.folder / f"{name}.safetensors").to(usable_device(self.options.device))

    def _frames(self, name: str) -> list[Atoms]:
        return read_labelled(self.folder / f"{name}.xyz")

    def _seeded(self, options: Any) -> Any:
        return options.model_copy(update={"seed": self.options.seed})
