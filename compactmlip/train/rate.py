"""The peak learning rate that suits a start, and its course over the budget."""

from __future__ import annotations

import math
from dataclasses import dataclass

from compactmlip.train.dataset import Dataset
from compactmlip.train.options import OptimizerName, TrainOptions


@dataclass(frozen=True)
class Rates:
    """Peak rates of one optimiser.

    Attributes
    ----------
    slope
        Of the rate over the relative force error of a start that knows something of the forces.
    smallest, largest
        Bounds for such a start.
    untrained
        Rate of a start that does not, such as random weights.
    """

    slope: float
    smallest: float
    largest: float
    untrained: float


RATES: dict[OptimizerName, Rates] = {
    "soap": Rates(0.05, 3e-3, 7e-3, 0.1),
    "adamw": Rates(0.02, 1e-3, 5e-3, 1e-2),
}
"""From trials with several rates each (benchmarks/results/optimizers.md)."""

UNTRAINED = 0.7
"""Relative force error from which a start counts as untrained; without any forces it is 1."""

WITHOUT_FORCES = 0.1
"""What stands for the relative force error where nothing has force labels."""

FORCES = 0.1
"""eV/Angstrom: force errors are compared with forces of at least this size, near a minimum too."""

SMALLEST_FINAL = 1e-4
"""Smallest last learning rate over the peak of an exponential schedule."""


def peak_rate(options: TrainOptions, errors: dict[str, float], valid: Dataset) -> float:
    """The rate that was asked for, or one that suits the relative force error of the start.

    Weights that know nothing of the forces need much larger ones than those that do.

    Parameters
    ----------
    options
        Of the training.
    errors
        Of the model before the training on ``valid``, as in the first row of the history.
    valid
        Validation set.
    """
    if options.lr is not None:
        return options.lr
    rates = RATES[options.optimizer]
    entries = [s.forces.abs().double() for s in valid.structures if s.forces.numel()]
    relative = WITHOUT_FORCES
    if entries and options.forces_weight > 0:
        mean = sum(float(e.sum()) for e in entries) / sum(e.numel() for e in entries)
        relative = 1e-3 * errors["forces_mae_meV_per_A"] / max(mean, FORCES)
    if relative >= UNTRAINED:
        return rates.untrained
    return min(max(rates.slope * relative, rates.smallest), rates.largest)


def learning_rate(fraction: float, peak: float, options: TrainOptions) -> float:
    """Learning rate when ``fraction`` (0 to 1) of the budget is used: linear warm-up, then the schedule.

    Cosine and linear schedules end at ``final_lr`` times the peak, as does an exponential one, in which the
    rate falls by equal factors in equal times.  "plateau" is constant here: it looks at the validations.
    """
    if fraction < options.warmup:
        return peak * max(fraction / options.warmup, options.final_lr)
    phase = min((fraction - options.warmup) / (1 - options.warmup), 1.0)
    if options.schedule in ("constant", "plateau"):
        return peak
    if options.schedule == "exponential":
        return peak * max(options.final_lr, SMALLEST_FINAL) ** phase
    left = 1 - phase if options.schedule == "linear" else 0.5 * (1 + math.cos(math.pi * phase))
    return peak * (options.final_lr + (1 - options.final_lr) * left)
