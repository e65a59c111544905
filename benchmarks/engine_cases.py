"""What engine.py compares: upstream models, the forms of them that we run, and the files of each."""

from __future__ import annotations

import copy
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from process import Worker, WorkerFailed
from torch import nn

from compactmlip.checkpoint import save
from compactmlip.compress.apply import keep_species, prune
from compactmlip.compress.compress import checked_targets
from compactmlip.compress.plan import top_channels
from compactmlip.deploy.compile import compile_model
from compactmlip.errors import CompactMLIPError
from compactmlip.families import load_model
from compactmlip.models import cast, channel_graph, model_spec

HERE = Path(__file__).parent
UPSTREAM, OURS = HERE / "upstream.py", HERE / "ours.py"


@dataclass(frozen=True)
class Form:
    """A model of ours.

    Attributes
    ----------
    label
        What makes it differ from the upstream model; empty for nothing.
    target
        Channels that are kept of each order, None for all.
    all_species
        Whether it keeps the species that the structure does not have.
    """

    label: str = ""
    target: str | None = None
    all_species: bool = False


@dataclass(frozen=True)
class Model:
    """An upstream model and its forms; ``settings`` are those of ``upstream.mace_model``."""

    package: Literal["mace", "sevenn"]
    forms: tuple[Form, ...] = (Form(),)
    settings: dict[str, Any] = field(default_factory=dict)


def _pruned(target: str) -> Form:
    return Form(f"pruned to {target}", target)


MODELS = {
    "MACE small": Model("mace", (Form(), Form("all species", all_species=True)), {"hidden_irreps": "128x0e"}),
    "MACE medium": Model("mace", (Form(), _pruned("64x0+64x1")), {"hidden_irreps": "128x0e+128x1o"}),
    "MACE large": Model(
        "mace", (Form(), _pruned("128x0"), _pruned("64x0+64x1")), {"hidden_irreps": "128x0e+128x1o+128x2e"}
    ),
    "MACE 64x0+64x1": Model("mace", settings={"hidden_irreps": "64x0e+64x1o"}),
    "7net-l3i5": Model("sevenn"),
    "7net-0": Model("sevenn"),
}
"""MACE-MP-0 architectures with random weights; SevenNet with its own.  The fourth is what upstream runs
after pruning to 64x0+64x1; after pruning to 128x0 it is the first."""

SYSTEMS = ("Si 64", "Si 512", "water 192", "water 1536", "MgO 512")

VARIANTS = ("eager", "torch", "kernels64", "kernels32")
"""Our native model with kernels (float32), the deployed file without them (float32), and with them."""


class Files:
    """Files of the models in one folder; made when they are asked for.

    Parameters
    ----------
    folder
        Where they are kept.
    pythons
        Interpreter of each upstream package.
    """

    def __init__(self, folder: Path, pythons: dict[str, str | None]) -> None:
        self.folder, self.pythons = folder, pythons
        self._native: tuple[str, nn.Module] | None = None
        folder.mkdir(parents=True, exist_ok=True)

    def upstream_command(self, package: str) -> list[str]:
        python = self.pythons[package]
        if python is None:
            raise SystemExit(f"--{package}-python is needed for this model.")
        return [python, str(UPSTREAM)]

    def upstream(self, name: str) -> str:
        """What upstream loads: a file with random weights, or the name of a model that it knows."""
        model = MODELS[name]
        if model.package == "sevenn":
            return name
        path = self.folder / f"{name.replace(' ', '-')}.model"
        if not path.is_file():
            with Worker(self.upstream_command("mace"), 1) as worker:
                worker.ask("make_mace", path=str(path.with_suffix(".part")), **model.settings)
            path.with_suffix(".part").replace(path)
        return str(path)

    def ours(self, name: str, form: Form, symbols: set[str], variants: list[str]) -> Iterator[Compiled]:
        """The file of each variant of a form, newly made."""
        model = self._form(name, form, symbols)
        stem = self.folder / "-".join([name, form.label or "as-it-is", *sorted(symbols)]).replace(" ", "-")
        for variant in variants:
            path = stem.with_name(f"{stem.name}.{variant}.{'safetensors' if variant == 'eager' else 'pt'}")
            try:
                _write(model, variant, path)
            except CompactMLIPError as error:
                yield Compiled(variant, None, str(error))
            else:
                yield Compiled(variant, path)

    def _form(self, name: str, form: Form, symbols: set[str]) -> nn.Module:
        if self._native is None or self._native[0] != name:
            source = self.upstream(name)
            self._native = name, load_model(source, dtype=torch.float64, progress=False)
        model = self._native[1]
        if not form.all_species:
            model = keep_species(model, symbols)
        return model if form.target is None else sliced(model, form.target)


@dataclass(frozen=True)
class Compiled:
    """A file to measure, or why there is none."""

    variant: str
    path: Path | None
    reason: str = ""

    def worker(self, threads: int) -> Worker:
        if self.path is None:
            raise WorkerFailed(self.reason)
        return Worker([sys.executable, str(OURS)], threads)


def sliced(model: nn.Module, target: str) -> nn.Module:
    """The first channels of each order: as fast as the most important ones, without calibration."""
    spec = model_spec(model)
    scores = {name: np.zeros(group.size) for name, group in channel_graph(spec).groups.items()}
    return prune(model, top_channels(spec, checked_targets(spec, target), scores))


def _write(model: nn.Module, variant: str, path: Path) -> None:
    if variant == "eager":
        save(cast(copy.deepcopy(model), torch.float32), path)
    elif variant == "torch":
        compile_model(model, path, dtype="float32", backend="torch")
    else:
        dtype = "float64" if variant.endswith("64") else "float32"
        compile_model(model, path, dtype=dtype, backend="kernels")
