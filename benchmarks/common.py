"""What all benchmark scripts share: structures, models, a description of the machine, tables in Markdown."""

from __future__ import annotations

import argparse
import math
from collections.abc import Collection, Sequence
from datetime import datetime, timezone
from pathlib import Path

import numpy as np
import torch
from ase import Atoms, units
from ase.build import bulk, molecule
from torch import nn

from compactmlip.checkpoint import load
from compactmlip.data.graph import Derivatives, GraphBatch, build_graph, energy_and_derivatives
from compactmlip.deploy.archive import DTYPES, NodeEnergy, load_deployed, without_profiling
from compactmlip.models import build, cast, model_dtype, model_spec
from compactmlip.validate.certificate import software_versions
from compactmlip.validate.speed import describe_machine

RESULTS = Path(__file__).parent / "results"


def parser(description: str | None) -> argparse.ArgumentParser:
    """Parser with the options that every script has."""
    made = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    made.add_argument("--threads", type=int, default=1)
    made.add_argument("--output", type=Path, help="write the tables here as well (Markdown)")
    return made


def header(title: str, command: str) -> str:
    """Title, command, date, processor and versions."""
    machine = describe_machine()
    versions = ", ".join(f"{name} {version}" for name, version in software_versions().items())
    now = datetime.now(timezone.utc).strftime("%Y-%m-%d")
    return (
        f"# {title}\n\n`{command}`\n\n{now}; {machine.processor}, {torch.get_num_threads()} thread(s) of "
        f"{machine.cores} cores; load average before the run {machine.load_average}; {versions}.\n"
    )


def shown(arguments: Sequence[str]) -> str:
    """Arguments as the header of a report gives them: names of files only, and not where it is written."""
    kept = list(arguments)
    if "--output" in kept:
        del kept[kept.index("--output") : kept.index("--output") + 2]
    return " ".join(Path(a).name if "/" in a else a for a in kept)


def from_random(model: nn.Module, seed: int, keep: Collection[str] = ()) -> nn.Module:
    """The same architecture, factors and energies of atoms, with upstream's random initialisation.

    Parameters named in ``keep`` are the model's.
    """
    torch.manual_seed(seed)
    fresh = cast(build(model_spec(model)), torch.float32)
    state, drawn = model.state_dict(), {name for name, _ in fresh.named_parameters()} - set(keep)
    fresh.load_state_dict({n: t if n in drawn else state[n] for n, t in fresh.state_dict().items()})
    return fresh


def describe_load() -> float | None:
    """Load average of the last minute."""
    return describe_machine().load_average


def table(columns: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    """Markdown table; floats get three significant digits."""
    lines = ["| " + " | ".join(columns) + " |", "|" + " --- |" * len(columns)]
    lines += ["| " + " | ".join(_cell(value) for value in row) + " |" for row in rows]
    return "\n".join(lines) + "\n"


def _cell(value: object) -> str:
    if isinstance(value, float):
        return f"{value:#.3g}".rstrip(".")
    return str(value)


def spread(values: Sequence[float] | np.ndarray) -> str:
    """Mean, and standard deviation from seed to seed."""
    mean = f"{np.mean(values):#.3g}".rstrip(".")
    return mean if len(values) == 1 else f"{mean} ± {np.std(values, ddof=1):.2g}"


def report(text: str, output: Path | None) -> None:
    """Print, and write if asked."""
    print(text, flush=True)
    if output is not None:
        output.parent.mkdir(parents=True, exist_ok=True)
        output.write_text(text)


WATER_DENSITY = 1.0
"""g/cm^3"""


def structure(kind: str, num_atoms: int, rattle: float = 0.05) -> Atoms:
    """Structure of at least so many atoms, rattled by a fixed seed; the cell is as cubic as it can be.

    ``Si`` is diamond, ``MgO`` rock salt; ``water`` are molecules on a grid, each turned at random.
    """
    cells = {
        "Si": lambda: bulk("Si", "diamond", a=5.43, cubic=True),
        "MgO": lambda: bulk("MgO", "rocksalt", a=4.21, cubic=True),
    }
    if kind == "water":
        atoms = _water(_box(math.ceil(num_atoms / 3)))
    elif kind in cells:
        cell = cells[kind]()
        atoms = cell * _box(math.ceil(num_atoms / len(cell)))
    else:
        raise SystemExit(f"unknown structure '{kind}'; known: {', '.join(cells)}, water")
    atoms.rattle(rattle, seed=0)
    return atoms


def _box(count: int) -> tuple[int, int, int]:
    """Sides of a box that holds at least ``count`` units."""
    a = max(1, round(count ** (1 / 3)))
    b = max(1, round(math.sqrt(count / a)))
    return a, b, math.ceil(count / (a * b))


def _water(box: tuple[int, int, int]) -> Atoms:
    rng = np.random.default_rng(0)
    water = molecule("H2O")
    single = water.positions - water.get_center_of_mass()
    grams = water.get_masses().sum() / units.kg * 1e3
    spacing = (grams / WATER_DENSITY * 1e24) ** (1 / 3)  # 1 cm^3 is 1e24 Angstrom^3
    places = spacing * np.stack(np.meshgrid(*map(np.arange, box), indexing="ij"), axis=-1).reshape(-1, 3)
    turned = np.einsum("mij,aj->mai", _rotations(len(places), rng), single)
    positions = (places[:, None] + turned).reshape(-1, 3)
    return Atoms(list(water.symbols) * len(places), positions, cell=spacing * np.array(box), pbc=True)


def _rotations(count: int, rng: np.random.Generator) -> np.ndarray:
    """Random rotations, from random unit quaternions, (count, 3, 3)."""
    quaternions = rng.standard_normal((count, 4))
    w, x, y, z = (quaternions / np.linalg.norm(quaternions, axis=1, keepdims=True)).T
    rows = [
        [1 - 2 * (y * y + z * z), 2 * (x * y - w * z), 2 * (x * z + w * y)],
        [2 * (x * y + w * z), 1 - 2 * (x * x + z * z), 2 * (y * z - w * x)],
        [2 * (x * z - w * y), 2 * (y * z + w * x), 1 - 2 * (x * x + y * y)],
    ]
    return np.moveaxis(np.array(rows), -1, 0)


def write_structure(path: Path, atoms: Atoms) -> None:
    """Array file that environments without compactmlip read as well."""
    np.savez(path, numbers=atoms.numbers, positions=atoms.positions, cell=atoms.cell.array)


def read_structure(path: Path) -> Atoms:
    with np.load(path) as arrays:
        return Atoms(arrays["numbers"], arrays["positions"], cell=arrays["cell"], pbc=True)


class Evaluation:
    """Energies, forces and stress as a calculator computes them, without its neighbour list.

    Parameters
    ----------
    path
        A deployed file, or a checkpoint, which runs as it is in its own dtype.
    """

    def __init__(self, path: Path) -> None:
        self.node_energy: NodeEnergy
        if path.suffix == ".safetensors":
            model = load(path, None).eval().requires_grad_(False)
            self.spec, self.dtype, self.node_energy = model_spec(model), model_dtype(model), model
        else:
            module, self.spec = load_deployed(path)
            self.dtype, self.node_energy = DTYPES[self.spec.dtype], without_profiling(module)

    def graph(self, atoms: Atoms) -> GraphBatch:
        return build_graph(atoms, self.spec, self.dtype)

    def __call__(self, graph: GraphBatch) -> Derivatives:
        return energy_and_derivatives(self.node_energy, graph)
