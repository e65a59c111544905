"""How often the certificate's checks of dynamics object to runs of one and the same potential.

Runs differ in the seed of their velocities only.  Every pair of them is judged as model and teacher are by
``compactmlip validate``, where both use the same random numbers; independent ones are the worst case.  Checks
of a single run (drift, thermostat) are judged for each.  A potential that is really different is judged
beside it, with the same random numbers and with others, to show that the checks see something: the same forces
times a factor.

    python benchmarks/false_alarms.py compactmlip-quickstart/model.pt --runs 24
"""

from __future__ import annotations

import argparse
import itertools
import sys
import time
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ase import Atoms
from ase.build import bulk
from ase.calculators.calculator import Calculator, all_changes
from ase.calculators.lj import LennardJones
from common import header, report, shown, table

from compactmlip import CompactMLIPCalculator
from compactmlip.validate.checks import Check, Thresholds, nve_checks, structure_checks
from compactmlip.validate.checks_dynamics import (
    density_checks,
    motion_checks,
    thermostat_checks,
    vibration_checks,
)
from compactmlip.validate.density import Density, DensityComparison, npt
from compactmlip.validate.ensemble import RUNS, compare_ensembles
from compactmlip.validate.motion import compare_motion
from compactmlip.validate.nve import SAMPLE_EVERY, NVEResult, equilibrate, nve
from compactmlip.validate.parity import Array
from compactmlip.validate.structure import compare_structure
from compactmlip.validate.thermostat import KineticEnergy, nvt
from compactmlip.validate.vibration import compare_vibrations

COLUMNS = ("system", "check", "judged", "pass", "warn", "fail", "warn or fail (%)")


class Scaled(Calculator):
    """Energies, forces and stresses of another calculator times a factor: softer or stiffer, all through."""

    implemented_properties = ["energy", "forces", "stress"]  # noqa: RUF012

    def __init__(self, calculator: Any, factor: float) -> None:
        super().__init__()
        self.calculator, self.factor = calculator, factor

    def calculate(self, atoms: Any = None, properties: Any = ("energy",), changes: Any = all_changes) -> None:
        super().calculate(atoms, properties, changes)
        wanted = ("energy", "forces", "stress") if self.atoms.pbc.all() else ("energy", "forces")
        for name in wanted:
            value = self.calculator.get_property(name, self.atoms)
            self.results[name] = self.factor * value


@dataclass(frozen=True)
class System:
    """What is simulated."""

    name: str
    calculator: Any
    cell: Atoms
    temperature_K: float
    timestep_fs: float
    steps: int
    npt_steps: int
    ensemble_steps: int
    bulk_modulus: float

    @property
    def state(self) -> dict[str, float]:
        """Temperature and time step."""
        return {"temperature_K": self.temperature_K, "timestep_fs": self.timestep_fs}


def argon() -> System:
    """Liquid argon near its triple point, 108 atoms."""
    calculator = LennardJones(sigma=3.405, epsilon=0.010323, rc=8.0, smooth=True)
    cell = bulk("Ar", cubic=True, a=5.73).repeat(3)
    return System("liquid argon", calculator, cell, 95.0, 5.0, 1000, 600, 200, 1.0)


def crystal(model: Path) -> System:
    """MgO at 300 K, 64 atoms."""
    cell = bulk("MgO", "rocksalt", a=4.21, cubic=True).repeat(2)
    return System("MgO, 300 K", CompactMLIPCalculator(model), cell, 300.0, 1.0, 1000, 600, 100, 160.0)


@dataclass(frozen=True)
class Runs:
    """All runs of one potential; an ensemble is several runs with a thermostat, (runs, frames, N, 3)."""

    ensembles: list[Array]
    energy: list[NVEResult]
    kinetic: list[KineticEnergy]
    density: list[Density]


def simulate(system: System, calculator: Any, seeds: Sequence[int], ensembles: list[Array]) -> Runs:
    """Run everything else once for each seed."""
    done = Runs(ensembles, [], [], [])
    for seed in seeds:
        start = equilibrate(calculator, system.cell, steps=300, seed=seed, **system.state)
        done.energy.append(nve(calculator, start, steps=system.steps, **system.state))
        done.kinetic.append(nvt(calculator, system.cell, steps=system.steps, seed=seed, **system.state))
        found = npt(
            calculator,
            start,
            steps=system.npt_steps,
            seed=seed,
            bulk_modulus=system.bulk_modulus,
            **system.state,
        )
        done.density.append(found)
    return done


def sample(system: System, other: Any, number: int) -> tuple[list[Array], list[Array]]:
    """Ensembles of the potential and of another one, which use the same random numbers."""
    same, changed = [], []
    for seed in range(number):
        found = compare_ensembles(
            system.calculator, other, system.cell, steps=system.ensemble_steps, seed=seed, **system.state
        )
        assert found is not None and found.complete
        same.append(found.model)
        changed.append(found.teacher)
    return same, changed


def judged_ensembles(system: System, model: Array, teacher: Array) -> Iterator[Check]:
    """Verdicts on what is averaged over several runs."""
    structure = compare_structure(system.cell, model, teacher)
    yield from structure_checks(structure[0] if structure else (), Thresholds())
    yield from vibration_checks(compare_vibrations(system.cell, model, teacher), Thresholds())


def judged_pair(system: System, pair: tuple[int, int], model: Runs, teacher: Runs) -> Iterator[Check]:
    """Verdicts on one run of the model beside one of the teacher."""
    k, j = pair
    yield from judged_ensembles(system, model.ensembles[k], teacher.ensembles[j])
    own, other = model.energy[k].positions, teacher.energy[j].positions
    limits = Thresholds()
    moves = compare_motion(system.cell, own, other, SAMPLE_EVERY * system.timestep_fs / 1000)
    yield from motion_checks(moves[0] if moves else (), limits)
    densities = DensityComparison(
        atoms=len(system.cell),
        target_K=system.temperature_K,
        target_GPa=0.0,
        model=model.density[k],
        teacher=teacher.density[j],
    )
    yield from density_checks(densities, limits)


def judged_alone(runs: Runs) -> Iterator[Check]:
    """Verdicts on single runs."""
    for run, kinetic in zip(runs.energy, runs.kinetic, strict=True):
        yield from nve_checks(run.summary, Thresholds())
        yield from thermostat_checks(kinetic, Thresholds())


def rows(name: str, checks: Iterable[Check]) -> list[list[object]]:
    """One row per kind of check; that of a species or pair counts for the kind."""
    counts: dict[str, Counter[str]] = defaultdict(Counter)
    for check in checks:
        counts[check.name.partition(" (")[0]][check.verdict] += 1
    found = []
    for kind, count in counts.items():
        total = sum(count.values())
        share = 100 * (count["warn"] + count["fail"]) / total
        found.append([name, kind, total, count["pass"], count["warn"], count["fail"], f"{share:.1f}"])
    return found


def study(system: System, number: int, factor: float) -> tuple[list[list[object]], ...]:
    """Rows of one potential with itself, and with the scaled one: independent, and with the same numbers."""
    begin = time.monotonic()
    other_potential = Scaled(system.calculator, factor)
    ensembles = sample(system, other_potential, number)
    print(f"{system.name}: ensembles after {time.monotonic() - begin:.0f} s", file=sys.stderr)
    same = simulate(system, system.calculator, range(number), ensembles[0])
    # The first ensembles of both use the same random numbers: only others are judged as independent.
    scaled = simulate(system, other_potential, range(100, 100 + number // 2), ensembles[1][number // 2 :])
    print(f"{system.name}: {time.monotonic() - begin:.0f} s", file=sys.stderr)
    pairs = list(itertools.combinations(range(number), 2))
    alike = rows(
        system.name, itertools.chain.from_iterable(judged_pair(system, p, same, same) for p in pairs)
    )
    alike += rows(system.name, judged_alone(same))
    crossed = itertools.product(range(number // 2), range(number // 2))
    other = rows(
        system.name, itertools.chain.from_iterable(judged_pair(system, p, scaled, same) for p in crossed)
    )
    paired = (judged_ensembles(system, b, a) for a, b in zip(*ensembles, strict=True))
    return alike, other, rows(system.name, itertools.chain.from_iterable(paired))


def main() -> None:
    """Simulate, judge, report."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model", type=Path, help="deployed file for MgO")
    parser.add_argument("--runs", type=int, default=24)
    parser.add_argument("--factor", type=float, default=0.8, help="of the forces of the other potential")
    parser.add_argument("--output", type=Path)
    options = parser.parse_args()
    text = header("False alarms", f"python benchmarks/false_alarms.py {shown(sys.argv[1:])}")
    same, different, together = [], [], []
    for system in (argon(), crystal(options.model)):
        found = study(system, options.runs, options.factor)
        for into, part in zip((same, different, together), found, strict=True):
            into += part
    text += (
        f"\n{options.runs} times for each system, with seeds of their own: {RUNS} runs with a thermostat "
        "(liquid argon 200 steps each, MgO 100), for radial distributions and amplitudes; "
        f"{argon().steps} steps at constant energy, as many with a thermostat for the kinetic energy, 600 at "
        "constant pressure. Pairs share runs, so that the shares are right on average but scatter more than "
        "so many independent pairs would.\n\n"
    )
    text += "## The same potential\n\n" + table(COLUMNS, same)
    text += f"\n## Forces times {options.factor:g}\n\nWhat the checks should notice.\n\n"
    text += table(COLUMNS, different)
    text += "\nWith the same random numbers in both, as `validate` has them:\n\n"
    report(text + table(COLUMNS, together), options.output)


if __name__ == "__main__":
    main()
