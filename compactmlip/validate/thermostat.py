"""Whether a run at constant temperature samples the canonical distribution of the kinetic energy.

In the canonical ensemble the kinetic energy K of f degrees of freedom follows a gamma distribution of shape
f/2 and scale kB T, whatever the potential: its mean is f kB T / 2, its variance f (kB T)^2 / 2 (Merz and
Shirts, PLoS ONE 13, e0202764 (2018)).  A mean that is off says wrong temperature, mass or forces that do not
conserve energy; a variance that is too small is the mark of thermostats that rescale velocities (Berendsen).
"""

from __future__ import annotations

import math
import time
from collections.abc import Mapping
from typing import Any

import numpy as np
from ase import Atoms, units
from pydantic import BaseModel, ConfigDict
from scipy.stats import gamma, kstest

from compactmlip.errors import CompactMLIPError, InputError
from compactmlip.progress import Track
from compactmlip.validate.nve import EXPLODED, advance, equilibrate, langevin
from compactmlip.validate.parity import Array
from compactmlip.validate.statistics import Estimate, correlation_time, effective_samples, mean, variance

FRICTION = 0.1
"""Per step; strong, so that the kinetic energy forgets itself within ten steps."""

FEWEST_EFFECTIVE = 30.0
"""Independent samples; with fewer the variance is known to a quarter at best, and nothing is judged."""

LONGEST = 1500
"""Steps that are measured where time allows."""

WARM_UP = 150
"""Steps before."""


class KineticEnergy(BaseModel):
    """Kinetic energies of a run beside the canonical distribution.

    Attributes
    ----------
    temperature_K
        Of the thermostat.
    degrees
        Degrees of freedom: 3N with a thermostat that acts on each atom, 3N - 3 if the centre of mass rests.
    steps, effective
        Samples, and how many independent ones they are worth.
    mean_ratio, mean_error
        Mean over that of the canonical distribution, and its standard error.
    variance_ratio, variance_error
        The same for the variance.
    p_value
        Of a Kolmogorov-Smirnov test on samples two correlation times apart; for information.
    by_species, by_species_error
        Mean over the expected one for the atoms of each species: equipartition.
    failure
        What ended the run early, or empty.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", ser_json_inf_nan="strings")
    temperature_K: float
    degrees: int
    steps: int
    effective: float
    mean_ratio: float
    mean_error: float
    variance_ratio: float
    variance_error: float
    p_value: float
    by_species: dict[str, float]
    by_species_error: dict[str, float]
    failure: str = ""

    @property
    def enough(self) -> bool:
        """Whether the run is long enough to be judged."""
        return self.effective >= FEWEST_EFFECTIVE

    @property
    def mean_excess(self) -> float:
        """Percent by which a mean, of all atoms or of a species, is certainly off; the largest."""
        degrees = self.effective - 1
        means = [Estimate(self.mean_ratio, self.mean_error, degrees)]
        means += [Estimate(self.by_species[s], self.by_species_error[s], degrees) for s in self.by_species]
        return 100 * max(found.excess(1.0) for found in means)

    @property
    def variance_excess(self) -> float:
        """Percent by which the variance is certainly off."""
        return 100 * Estimate(self.variance_ratio, self.variance_error, self.effective - 1).excess(1.0)


def compare_kinetic(
    kinetic: Mapping[str, Array], atoms: Mapping[str, int], temperature_K: float, fixed: int = 0
) -> KineticEnergy:
    """Hold kinetic energies of a run against the canonical distribution.

    Parameters
    ----------
    kinetic
        By species, (T,) eV: kinetic energies of all its atoms at equal intervals, without a warm-up.
    atoms
        By species, how many.
    temperature_K
        Of the thermostat.
    fixed
        Degrees of freedom that are taken from the total: 3 where the centre of mass is kept at rest (those of
        a species lose their share by mass, which is left out: it is below 1/N).

    Raises
    ------
    InputError
        If there are fewer than two samples or no atoms.
    """
    number = sum(atoms.values())
    total = np.sum([kinetic[s] for s in kinetic], axis=0) if kinetic else np.zeros(0)
    degrees = 3 * number - fixed
    if np.size(total) < 2 or degrees < 1:
        raise InputError(f"{np.size(total)} kinetic energies of {number} atoms are no distribution.")
    thermal = units.kB * temperature_K
    average, spread = mean(total), variance(total)
    stride = max(1, math.ceil(2 * correlation_time(total)))
    # The share of a species in the fixed degrees of freedom is spread over all.
    share = degrees / (3 * number)
    ratios = {}
    for symbol, count in atoms.items():
        part, expected = mean(kinetic[symbol]), 1.5 * count * share * thermal
        ratios[symbol] = Estimate(part.value / expected, part.error / expected)
    expected_mean, expected_variance = degrees / 2 * thermal, degrees / 2 * thermal**2
    return KineticEnergy(
        temperature_K=temperature_K,
        degrees=degrees,
        steps=len(total),
        effective=effective_samples(total),
        mean_ratio=average.value / expected_mean,
        mean_error=average.error / expected_mean,
        variance_ratio=spread.value / expected_variance,
        # A variance that came out small by chance has a small error as well; not below the canonical one.
        variance_error=max(spread.error / expected_variance, math.sqrt(2 / effective_samples(total))),
        p_value=float(kstest(total[::stride], gamma(degrees / 2, scale=thermal).cdf).pvalue),
        by_species={symbol: ratio.value for symbol, ratio in ratios.items()},
        by_species_error={symbol: ratio.error for symbol, ratio in ratios.items()},
    )


def nvt(
    calculator: Any,
    atoms: Atoms,
    *,
    temperature_K: float = 300.0,
    timestep_fs: float = 1.0,
    steps: int = LONGEST,
    warm_up: int = WARM_UP,
    seed: int = 0,
    max_seconds: float = math.inf,
    progress: bool = False,
) -> KineticEnergy | None:
    """Run Langevin dynamics, which acts on each atom (3N degrees of freedom), and look at the kinetic energy.

    Parameters
    ----------
    calculator
        ASE calculator with energy and forces.
    atoms
        Simulated as it is; not changed.
    steps, warm_up
        Steps that are measured, and those before.
    max_seconds
        The run ends early after this wall time.

    Returns
    -------
    The comparison; None where the run ended before there was anything to compare.
    """
    symbols = np.array(atoms.get_chemical_symbols())
    kinds = sorted(set(symbols.tolist()))
    rows: list[list[float]] = []
    started = time.perf_counter()
    try:
        system = equilibrate(
            calculator, atoms, temperature_K=temperature_K, timestep_fs=timestep_fs, steps=warm_up, seed=seed
        )
    except CompactMLIPError:
        return None  # the NVE run says what went wrong
    system.calc = calculator
    masses = system.get_masses()
    with Track("NVT, model", steps, "steps", enabled=progress) as track:

        def record() -> None:
            each = 0.5 * (system.get_momenta() ** 2).sum(axis=1) / masses
            rows.append([float(each[symbols == kind].sum()) for kind in kinds])
            track.advance(1)

        rng = np.random.default_rng((seed, 1))
        dynamics = langevin(system, temperature_K, timestep_fs, FRICTION / timestep_fs, rng)
        left = max_seconds - (time.perf_counter() - started)
        failure = advance(dynamics, system, steps, EXPLODED * temperature_K, record, left)
    if len(rows) < 2:
        return None
    table = np.array(rows).T
    counts = {kind: int((symbols == kind).sum()) for kind in kinds}
    found = compare_kinetic(dict(zip(kinds, table, strict=True)), counts, temperature_K)
    return found.model_copy(update={"failure": failure})
