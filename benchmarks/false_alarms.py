"""How often the certificate's checks of dynamics object to runs of one and the same potential.

Runs differ in the seed of their velocities only.  Every pair of them is judged as model and teacher are by
``compactmlip validate``, where both use the same random numbers; independent ones are the worst case.  Checks
of a single run (drift, thermostat) are judged for each.  To show that the checks see something, a potential
that is really different is judged beside it, with the same random numbers and with others: the same forces
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
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from ase import Atoms, units
from ase.build import bulk
from ase.calculators.calculator import Calculator, all_changes
from ase.calculators.lj import LennardJones
from common import header, report, shown, table

from compactmlip import CompactMLIPCalculator
from compactmlip.validate.checks import Check, Thresholds, nve_checks, structure_checks
from compactmlip.validate.checks_dynamics import (
    density_checks,
    motion_checks,
    sampling_checks,
    thermostat_checks,
    vibration_checks,
)
from compactmlip.validate.density import RUNS as NPT_RUNS, SHORTEST as NPT_STEPS, Run, compare_runs, npt
from compactmlip.validate.ensemble import RUNS, Ensembles, compare_ensembles
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
    return System("liquid argon", calculator, cell, 95.0, 5.0, 1000, 200, 1.0)


def crystal(model: Path) -> System:
    """MgO at 300 K, 64 atoms."""
    cell = bulk("MgO", "rocksalt", a=4.21, cubic=True).repeat(2)
    return System("MgO, 300 K", CompactMLIPCalculator(model), cell, 300.0, 1.0, 1000, 100, 160.0)


@dataclass(frozen=True)
class Runs:
    """All runs of one potential: several with a thermostat (whose teacher is the true one), single ones."""

    ensembles: list[Ensembles]
    states: list[Array]
    energy: list[NVEResult]
    kinetic: list[KineticEnergy]
    density: list[list[Run]]


def simulate(
    system: System, calculator: Any, seeds: Sequence[int], ensembles: list[Ensembles], states: list[Any]
) -> Runs:
    """Run everything else once for each seed."""
    done = Runs(ensembles, states, [], [], [])
    for seed in seeds:
        start = equilibrate(calculator, system.cell, steps=300, seed=seed, **system.state)
        done.energy.append(nve(calculator, start, steps=system.steps, **system.state))
        done.kinetic.append(nvt(calculator, system.cell, steps=system.steps, seed=seed, **system.state))
        done.density.append(at_pressure(system, calculator, start, seed))
    return done


def at_pressure(system: System, calculator: Any, start: Atoms, seed: int) -> list[Run]:
    """Runs at constant pressure, as one comparison has them."""
    how = {"steps": NPT_STEPS, "bulk_modulus": system.bulk_modulus, **system.state}
    return [npt(calculator, start, seed=(seed, run), **how) for run in range(NPT_RUNS)]


def sample(system: System, other: Any, number: int) -> list[Ensembles]:
    """Ensembles of another potential and of the true one, which use the same random numbers."""
    found = []
    for seed in range(number):
        both = compare_ensembles(
            other, system.calculator, system.cell, steps=system.ensemble_steps, seed=seed, **system.state
        )
        assert both is not None and both.sampling.comparable
        found.append(both)
    return found


def judged_ensembles(model: Array, teacher: Ensembles) -> Iterator[Check]:
    """Verdicts on what is averaged over several runs, of states of another model beside the teacher's."""
    both = replace(teacher, model=model)
    structure = compare_structure(both)
    yield from structure_checks(structure[0] if structure else (), Thresholds())
    yield from vibration_checks(compare_vibrations(both), Thresholds())


def judged_by_energies(system: System, other: Any, states: Ensembles) -> Iterator[Check]:
    """Verdicts on runs of the other potential, of which the true one only tells the energies."""
    assert states.teacher is not None
    system_of = system.cell.copy()
    energies: dict[str, list[float]] = {"own": [], "true": []}
    for name, calculator in (("own", other), ("true", system.calculator)):
        system_of.calc = calculator
        for frame in states.model.reshape(-1, len(system_of), 3):
            system_of.positions = frame
            energies[name].append(float(system_of.get_potential_energy()))
    shape = states.model.shape[:2]
    differences = (np.array(energies["true"]) - np.array(energies["own"])).reshape(shape)
    spread = float(differences.std()) / (units.kB * system.temperature_K)
    sampling = states.sampling.model_copy(update={"method": "energies", "spread": spread})
    yield from sampling_checks(sampling)
    if sampling.comparable:
        known = replace(states, sampling=sampling, teacher=None, differences=differences)
        structure = compare_structure(known)
        yield from structure_checks(structure[0] if structure else (), Thresholds())
        yield from vibration_checks(compare_vibrations(known), Thresholds())


def judged_pair(system: System, pair: tuple[int, int], model: Runs, teacher: Runs) -> Iterator[Check]:
    """Verdicts on one run of the model beside one of the teacher."""
    k, j = pair
    yield from judged_ensembles(model.states[k], teacher.ensembles[j])
    own, other = model.energy[k].positions, teacher.energy[j].positions
    limits = Thresholds()
    moves = compare_motion(system.cell, own, other, SAMPLE_EVERY * system.timestep_fs / 1000)
    yield from motion_checks(moves[0] if moves else (), limits)
    yield from judged_density(system, model.density[k], teacher.density[j])


def judged_density(system: System, model: Sequence[Run], teacher: Sequence[Run]) -> Iterator[Check]:
    """Verdict on runs at constant pressure."""
    found = compare_runs(system.cell, model, teacher, temperature_K=system.temperature_K, pressure_GPa=0.0)
    yield from density_checks(found, Thresholds())


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
    true = [e.teacher for e in ensembles]
    same = simulate(system, system.calculator, range(number), ensembles, true)
    # Those of the same seed use the same random numbers: only others are judged as independent.
    late = ensembles[number // 2 :]
    changed = [e.model for e in late]
    scaled = simulate(system, other_potential, range(100, 100 + number // 2), late, changed)
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
    paired = (judged_ensembles(e.model, e) for e in ensembles)
    together = rows(system.name, itertools.chain.from_iterable(paired))
    by_energy = (judged_by_energies(system, other_potential, e) for e in ensembles)
    return alike, other, together, rows(system.name, itertools.chain.from_iterable(by_energy))


def density_study(system: System, number: int, factor: float) -> tuple[list[list[object]], ...]:
    """The first three tables of :func:`study`, of densities alone.

    Independent runs have starts and seeds of their own.  With the same random numbers both begin in the same
    state, as in ``validate``.
    """
    other = Scaled(system.calculator, factor)
    same, scaled, late = [], [], []
    for seed in range(number):
        start = equilibrate(system.calculator, system.cell, steps=300, seed=seed, **system.state)
        same.append(at_pressure(system, system.calculator, start, seed))
        scaled.append(at_pressure(system, other, start, seed))
        late.append(at_pressure(system, other, start, 1000 + seed))
    pairs = itertools.combinations(range(number), 2)
    alike = (judged_density(system, same[k], same[j]) for k, j in pairs)
    apart = (judged_density(system, late[k], same[j]) for k, j in itertools.permutations(range(number), 2))
    together = (judged_density(system, a, b) for a, b in zip(scaled, same, strict=True))
    chain = itertools.chain.from_iterable
    return tuple(rows(system.name, chain(checks)) for checks in (alike, apart, together))


def main() -> None:
    """Simulate, judge, report."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model", type=Path, help="deployed file for MgO")
    parser.add_argument("--runs", type=int, default=24)
    parser.add_argument("--factor", type=float, default=0.8, help="of the forces of the other potential")
    parser.add_argument("--density-only", action="store_true", help="runs at constant pressure alone")
    parser.add_argument("--output", type=Path)
    options = parser.parse_args()
    text = header("False alarms", f"python benchmarks/false_alarms.py {shown(sys.argv[1:])}")
    same, different, together, by_energy = [], [], [], []
    for system in (argon(), crystal(options.model)):
        found = (density_study if options.density_only else study)(system, options.runs, options.factor)
        for into, part in zip((same, different, together, by_energy), found, strict=False):
            into += part
    others = (
        f"{RUNS} runs with a thermostat (liquid argon 200 steps each, MgO 100), for radial distributions and "
        f"amplitudes; {argon().steps} steps at constant energy, as many with a thermostat for the kinetic "
        "energy, "
    )
    text += (
        f"\n{options.runs} times for each system, with seeds of their own: "
        f"{'' if options.density_only else others}"
        f"{NPT_RUNS} runs of {NPT_STEPS} steps at constant pressure. Pairs share runs, so that shares are "
        "right on average but scatter more than so many independent pairs would.\n\n"
    )
    text += "## The same potential\n\n" + table(COLUMNS, same)
    text += f"\n## Forces times {options.factor:g}\n\nWhat the checks should notice.\n\n"
    text += table(COLUMNS, different)
    text += "\nWith the same random numbers in both, as `validate` has them:\n\n"
    text += table(COLUMNS, together)
    if by_energy:
        text += "\nWhere the true potential only tells energies of states of the other one's runs:\n\n"
        text += table(COLUMNS, by_energy)
    report(text, options.output)


if __name__ == "__main__":
    main()
