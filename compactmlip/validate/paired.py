"""Speed and dynamics of model and teacher, from the same start and within budgets of time."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from ase import Atoms

from compactmlip.errors import CompactMLIPError
from compactmlip.validate.nve import (
    NVEResult,
    NVESummary,
    Trace,
    affordable_steps,
    equilibrate,
    nve,
)
from compactmlip.validate.options import ValidateOptions
from compactmlip.validate.speed import Speed, measure_speed
from compactmlip.validate.supercells import MAX_ATOMS, near_size, supercell

TELLING_RUN = {"model": 1000, "teacher": 250}
"""Steps that the NVE runs should have; the cell is chosen so that they fit into the time."""

SHORTEST_RUN = 10
"""Steps; a teacher that cannot do these within its budget is not simulated."""

EQUILIBRATION_SHARE = 0.2
"""Of the time for the model's NVE run, added to it for the equilibration."""

OVERTIME = 1.5
"""A run ends when it takes this many times its budget (something else is using the machine)."""


def compare_speed(
    calculators: dict[str, Any], start: Atoms, options: ValidateOptions, progress: bool
) -> list[Speed]:
    """Atoms per second of both at the sizes asked for; those that the model cannot do are left out."""
    sizes = {len(s): s for s in (near_size(start, n) for n in options.sizes)}
    rows = measure_speed(
        calculators,
        list(sizes.values()),
        repeats=options.repeats,
        max_seconds=options.speed_seconds,
        seed=options.seed,
        progress=progress,
    )
    return [row for row in rows if "model" in row.atoms_per_second]


def dynamics(
    calculators: dict[str, Any],
    start: Atoms,
    speed: Sequence[Speed],
    options: ValidateOptions,
    progress: bool,
) -> tuple[NVEResult, NVEResult | None, Atoms]:
    """NVE of the model, and of the teacher from the same start as far as time allows; and their cell."""
    cell = supercell(start, max_atoms=_affordable_atoms(start, speed, options))
    shared: dict[str, Any] = {"temperature_K": options.temperature_K, "timestep_fs": options.timestep_fs}
    per_step = seconds_per_step("model", calculators, cell, speed)
    longest = max(1, round(options.nve_ps * 1000 / options.timestep_fs))
    steps = affordable_steps(per_step, options.nve_seconds, longest, SHORTEST_RUN)
    warm_up = affordable_steps(per_step, EQUILIBRATION_SHARE * options.nve_seconds, 150, SHORTEST_RUN)
    try:
        ready = equilibrate(calculators["model"], cell, steps=warm_up, seed=options.seed, **shared)
    except CompactMLIPError as error:
        return _unstable(len(cell), options.timestep_fs, str(error)), None, cell
    show = {"progress": progress, **shared}
    limit = OVERTIME * options.nve_seconds
    result = nve(
        calculators["model"], ready, steps=steps, max_seconds=limit, description="NVE, model", **show
    )
    if not options.teacher_nve_seconds:
        return result, None, cell
    per_step = seconds_per_step("teacher", calculators, cell, speed)
    steps = affordable_steps(per_step, options.teacher_nve_seconds, steps)
    if steps < SHORTEST_RUN:
        return result, None, cell
    limit = OVERTIME * options.teacher_nve_seconds
    own = nve(
        calculators["teacher"], ready, steps=steps, max_seconds=limit, description="NVE, teacher", **show
    )
    return result, own, cell


def _affordable_atoms(start: Atoms, speed: Sequence[Speed], options: ValidateOptions) -> int:
    """Largest cell of which both can simulate enough steps for a drift within their budgets.

    A small cell conserves energy no better than a large one, but a run that is too short tells nothing.
    """
    budgets = {"model": options.nve_seconds, "teacher": options.teacher_nve_seconds}
    atoms = float(MAX_ATOMS)
    for name, seconds in budgets.items():
        rates = [row.atoms_per_second[name] for row in speed if name in row.atoms_per_second]
        if rates and seconds:
            atoms = min(atoms, max(rates) * seconds / TELLING_RUN[name])
    return max(len(start), int(atoms))


def seconds_per_step(name: str, calculators: dict[str, Any], cell: Atoms, speed: Sequence[Speed]) -> float:
    """Estimate from the measured speeds, or from one more measurement where there is none."""
    rows = [row for row in speed if name in row.atoms_per_second]
    if not rows:
        rows = measure_speed({name: calculators[name]}, [cell], repeats=1)
    nearest = min(rows, key=lambda row: abs(np.log(row.atoms / len(cell))))
    return len(cell) / nearest.atoms_per_second[name]


def _unstable(atoms: int, timestep_fs: float, reason: str) -> NVEResult:
    empty = np.zeros(0)
    summary = NVESummary(
        atoms=atoms,
        steps=0,
        timestep_fs=timestep_fs,
        mean_temperature_K=float("nan"),
        seconds_per_step=float("nan"),
        stable=False,
        reason=reason,
        drift=None,
    )
    return NVEResult(summary, Trace(empty, empty, empty, empty))
