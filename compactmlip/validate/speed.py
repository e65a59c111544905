"""Speed of two calculators, measured alternately on the same machine in one run."""

from __future__ import annotations

import os
import platform
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from ase import Atoms
from pydantic import BaseModel, ConfigDict

from compactmlip.progress import Track

WARM_UP = 2
"""Evaluations before the clock starts: TorchScript compiles during the first ones."""

STEP = 0.003
"""Angstrom; atoms move this much between evaluations, as in molecular dynamics, so that no calculator can
answer from its cache."""


class Speed(BaseModel):
    """Energies and forces of one structure size.

    ``atoms_per_second`` and ``seconds`` (median of one evaluation) are given for each calculator by name;
    one that was too slow for the time budget is left out.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    atoms: int
    repeats: int
    seconds: dict[str, float]
    atoms_per_second: dict[str, float]

    def ratio(self, fast: str = "model", slow: str = "teacher") -> float | None:
        """How many times faster, or None if one of them was not measured."""
        speeds = self.atoms_per_second
        return speeds[fast] / speeds[slow] if fast in speeds and slow in speeds else None


class Machine(BaseModel):
    """Where the numbers were measured."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    processor: str
    cores: int
    threads: int
    system: str
    load_average: float | None
    """Runnable processes in the last minute before the run; far above 1, others were using the machine."""


def describe_machine() -> Machine:
    """Describe this machine and torch's thread count."""
    load = os.getloadavg()[0] if hasattr(os, "getloadavg") else None
    return Machine(
        processor=_processor(),
        cores=os.cpu_count() or 1,
        threads=torch.get_num_threads(),
        system=f"{platform.system()} {platform.machine()}",
        load_average=load,
    )


def _processor() -> str:
    info = Path("/proc/cpuinfo")
    if info.is_file():
        for line in info.read_text(errors="replace").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine() or "unknown"


def measure_speed(
    calculators: Mapping[str, Any],
    structures: Sequence[Atoms],
    *,
    repeats: int = 5,
    max_seconds: float = 20.0,
    seed: int = 0,
    progress: bool = False,
) -> list[Speed]:
    """Time energies and forces of every calculator on every structure.

    The calculators take turns, so that a disturbance of the machine meets all of them.

    Parameters
    ----------
    calculators
        ASE calculators by name.
    structures
        What to evaluate; each size is one row of the result.
    repeats
        Timed evaluations of each.
    max_seconds
        Budget per structure: fewer repeats (but at least one) where it would not suffice, and a
        calculator whose speed on the smaller sizes predicts that it cannot keep it is left out.
    """
    rng = np.random.default_rng(seed)
    rows: list[Speed] = []
    slow: dict[str, float] = {}
    with Track("Speed", len(structures), "sizes", enabled=progress) as track:
        for atoms in sorted(structures, key=len):
            used = {
                name: calculator
                for name, calculator in calculators.items()
                if 2 * slow.get(name, 0.0) * len(atoms) <= max_seconds
            }
            row = _time_one_size(used, atoms, repeats, max_seconds, rng) if used else None
            if row is not None:
                rows.append(row)
                slow |= {name: 1.0 / rate for name, rate in row.atoms_per_second.items()}
            track.advance(1)
    return rows


def _time_one_size(
    calculators: Mapping[str, Any], atoms: Atoms, repeats: int, max_seconds: float, rng: np.random.Generator
) -> Speed:
    started = time.perf_counter()
    warm = {name: _warm_up(c, atoms, max_seconds / 4, rng) for name, c in calculators.items()}
    left = max_seconds - (time.perf_counter() - started)
    repeats = int(np.clip(left / max(sum(warm.values()), 1e-9), 1, repeats))
    times: dict[str, list[float]] = {name: [] for name in calculators}
    for _ in range(repeats):
        for name, calculator in calculators.items():
            times[name].append(_evaluate(calculator, atoms, rng))
    seconds = {name: float(np.median(t)) for name, t in times.items()}
    return Speed(
        atoms=len(atoms),
        repeats=repeats,
        seconds=seconds,
        atoms_per_second={name: len(atoms) / t for name, t in seconds.items()},
    )


def _warm_up(calculator: Any, atoms: Atoms, slow: float, rng: np.random.Generator) -> float:
    """Evaluate before the clock starts, once if that takes longer than ``slow`` seconds; time of the last."""
    seconds = 0.0
    for _ in range(WARM_UP):
        seconds = _evaluate(calculator, atoms, rng)
        if seconds > slow:
            break
    return seconds


def _evaluate(calculator: Any, atoms: Atoms, rng: np.random.Generator) -> float:
    """Seconds for energy and forces of slightly displaced atoms."""
    system = atoms.copy()
    system.positions += rng.uniform(-STEP, STEP, size=(len(system), 3))
    system.calc = calculator
    start = time.perf_counter()
    system.get_potential_energy()
    system.get_forces()
    return time.perf_counter() - start
