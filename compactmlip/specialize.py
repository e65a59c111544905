"""From a foundation model and the user's structures to a validated compact model, in one folder.

Every step writes its result into the folder before the next begins, so that a run that was stopped
continues where it was.
"""

from __future__ import annotations

import hashlib
import json
import resource
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from ase import Atoms
from torch import nn

from compactmlip import checkpoint
from compactmlip.channels import format_channels
from compactmlip.compress.apply import keep_species
from compactmlip.compress.compress import checked_targets, compress, default_target
from compactmlip.compress.cost import Budget
from compactmlip.compress.plan_file import Plan
from compactmlip.compress.scores_file import save_scores
from compactmlip.data.graph import GraphBatch, build_graph
from compactmlip.data.label import label, update_with_structures
from compactmlip.data.read import read_labelled, read_structures, write_labelled
from compactmlip.data.sample import sample
from compactmlip.data.select import split
from compactmlip.deploy.archive import usable_device
from compactmlip.deploy.compile import compile_model, default_backend
from compactmlip.errors import InputError
from compactmlip.families import load_model
from compactmlip.models import model_dtype, model_spec, num_parameters
from compactmlip.search.within import cuts_paths, plan_within
from compactmlip.specialize_options import PARTS, VALIDATION_SHARE, SpecializeOptions, with_budgets
from compactmlip.train.dataset import Dataset
from compactmlip.train.distil import distil
from compactmlip.train.metrics import evaluate
from compactmlip.validate.certificate import Certificate, Stage
from compactmlip.validate.run import validate

SCORES = "importance.safetensors"
"""Importance of the teacher's channels, in the folder."""

SHORTEST_TRAINING = 0.5
"""Minutes of training that are done even when the budget is used up."""


class Folder:
    """The output folder: which steps are done and how long they took."""

    def __init__(self, path: Path, options: SpecializeOptions, structures: Sequence[Atoms]) -> None:
        self.path = path
        resolved = options.model_dump(mode="json")
        digest = hashlib.sha256()
        update_with_structures(digest, structures)
        # Accepting a licence changes no result; it is asked for once, before the teacher is imported.
        results = {key: value for key, value in resolved.items() if key != "accept_licence"}
        identity = json.dumps([results, digest.hexdigest()], sort_keys=True)
        self.identity = hashlib.sha256(identity.encode()).hexdigest()
        self.record: dict[str, Any] = {"identity": self.identity, "seconds": {}, "results": {}}
        path.mkdir(parents=True, exist_ok=True)
        state = self / "state.json"
        if state.is_file():
            found = json.loads(state.read_text())
            same = found.get("identity") == self.identity
            # A run that finished no step, as one with a wrong option, leaves nothing to protect.
            if not same and found.get("results"):
                raise InputError(
                    f"{path} holds a run with other options or structures (see {path / 'config.yaml'}); "
                    "give another folder with -o, or delete this one."
                )
            self.record = found if same else self.record
        text = yaml.safe_dump(resolved, sort_keys=False)
        checkpoint.atomic_write_text(self / "config.yaml", text)

    def __truediv__(self, name: str) -> Path:
        return self.path / name

    @property
    def seconds(self) -> float:
        """Time spent so far, over all parts of the run."""
        return float(sum(self.record["seconds"].values()))

    def step(self, name: str, run: Callable[[], dict[str, Any] | None]) -> dict[str, Any]:
        """Run a step unless it is done; time that an interrupted attempt took counts too."""
        if name not in self.record["results"]:
            begin = time.monotonic()
            try:
                self.record["results"][name] = run() or {}
            finally:
                spent = self.record["seconds"].get(name, 0.0) + time.monotonic() - begin
                self.record["seconds"][name] = spent
                self.record["peak_memory_GB"] = max(self.record.get("peak_memory_GB", 0.0), _peak_memory())
                text = json.dumps(self.record, indent=1)
                checkpoint.atomic_write_text(self / "state.json", text)
        result: dict[str, Any] = self.record["results"][name]
        return result


def specialize(
    structures: Sequence[Atoms],
    options: SpecializeOptions | None = None,
    out_dir: str | Path = "compactmlip-specialized",
    *,
    progress: bool = True,
) -> Certificate:
    """Make a compact model for the user's structures and prove what it is worth.

    Steps: import the teacher and keep only the species needed; sample structures; label them with
    the teacher; prune with compensation; distil; compile; validate.  The folder then holds each
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
    for name in ("teacher", "sample", "label", "prune", "distil", "compile", "validate"):
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
        # A target that cannot be met is refused now, not after sampling and labelling.
        if self.options.plan is not None:
            checked_targets(model_spec(model), self.options.plan.target, **self.options.plan.options)
        else:
            target, cut_paths = self._target(model)
            budget = self.options.budget
            if budget is not None:
                cuts_paths(Budget.parse(budget), model_spec(model), self.options.to)
            may_stay = cut_paths > 0 or budget is not None
            checked_targets(model_spec(model), target, all_may_stay=may_stay, **self._parts())
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
        """Cut and refit."""
        teacher = self._load("teacher")
        frames = self._frames("train")
        graphs = [build_graph(a, model_spec(teacher), model_dtype(teacher)) for a in frames]
        plan = self._plan(teacher, graphs)
        target, cut_paths = (plan, 0.0) if plan is not None else self._target(teacher)
        result = compress(
            teacher,
            graphs,
            target,
            cut_paths=cut_paths,
            with_compensation=self.options.compensate,
            seed=self.options.seed,
            progress=self.progress,
            **self._parts(),
        )
        if result.scores:
            save_scores(
                self.folder / SCORES, result.scores, teacher, criterion=plan.importance if plan else "taylor"
            )
        checkpoint.save(result.sliced, self.folder / "pruned.safetensors")
        checkpoint.save(result.model, self.folder / "compensated.safetensors")
        return {"parameters": num_parameters(result.model)}

    def _plan(self, teacher: nn.Module, graphs: Sequence[GraphBatch]) -> Plan | None:
        """The plan that was given, or one within the budget, if there is either."""
        if self.options.budget is None:
            return self.options.plan
        plan, _ = plan_within(
            self.options.budget,
            teacher,
            graphs,
            Plan(layers=("1x0",), **self._parts()),
            to=self.options.to,
            seed=self.options.seed,
            progress=self.progress,
        )
        plan.save(self.folder / "plan.json")
        return plan

    def _parts(self) -> dict[str, Any]:
        """Options about what is kept besides channels and paths."""
        return {name: getattr(self.options, name) for name in PARTS}

    def _target(self, teacher: nn.Module) -> tuple[str, float]:
        """Channels to keep and share of the paths to cut."""
        to, cut_paths = (self.options.to, 0.0) if self.options.to else default_target(model_spec(teacher))
        return to, cut_paths if self.options.cut_paths is None else self.options.cut_paths

    def distil(self) -> dict[str, Any]:
        """Train for the time that is left."""
        # A continued run keeps its first budget: the folder of the training knows what is used.
        plan = self.folder / "distil" / "minutes.json"
        if not plan.is_file():
            left = self.options.minutes * (1 - VALIDATION_SHARE) - self.folder.seconds / 60
            plan.parent.mkdir(exist_ok=True)
            text = json.dumps(max(left, SHORTEST_TRAINING))
            checkpoint.atomic_write_text(plan, text)
        minutes = float(json.loads(plan.read_text()))
        options = self.options.distil.model_copy(update={"max_minutes": minutes, "seed": self.options.seed})
        result = distil(
            self._load("compensated"),
            self._frames("train"),
            self._frames("valid"),
            options,
            self.folder / "distil",
            self.progress,
        )
        checkpoint.save(result.model, self.folder / "distilled.safetensors")
        return {
            "epochs": result.history[-1].get("epoch"),
            "minutes": minutes,
            "stopped": result.stopped_because,
        }

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
        return Stage(
            name=title,
            parameters=num_parameters(model),
            file_bytes=path.stat().st_size,
            energy_mae=errors.energy.mae,
            forces_mae=errors.forces.mae,
            stress_mae=None if stress != stress else stress,
            note=f"{format_channels(layers[0]['out'])}, {sum(len(layer['paths']) for layer in layers)} paths",
        )

    def _load(self, name: str) -> nn.Module:
        return checkpoint.load(self.folder / f"{name}.safetensors").to(usable_device(self.options.device))

    def _frames(self, name: str) -> list[Atoms]:
        return read_labelled(self.folder / f"{name}.xyz")

    def _seeded(self, options: Any) -> Any:
        return options.model_copy(update={"seed": self.options.seed})


def _peak_memory() -> float:
    """Largest resident memory of this process so far, in GB (Linux counts it in kB)."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6
