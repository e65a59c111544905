"""The peak learning rate that suits a start, and its course over the budget."""

from __future__ import annotations

import math

from compactmlip.train.dataset import Dataset
from compactmlip.train.options import OptimizerName, TrainOptions

RATES: dict[OptimizerName, tuple[float, float, float]] = {
    "soap": (0.1, 3e-3, 1e-1),
    "adamw": (0.02, 1e-3, 1e-2),
}
"""Peak rate of a start whose force errors are as large as the forces; the smallest and the largest rate.

From trials with several rates each (benchmarks/results/optimizers.md): the worse the start, the larger the
best rate, from 0.003 after a good compensation to 0.1 with random weights (SOAP).  Factors of two hardly
matter.
"""

WITHOUT_FORCES = 0.05
"""What stands for the relative force error where nothing has force labels."""

FORCES = 0.05
"""eV/Angstrom: force errors are compared with forces of at least this size, near a minimum too."""

SMALLEST_FINAL = 1e-4
"""Smallest last learning rate over the peak of an exponential schedule."""


def peak_rate(options: TrainOptions, errors: dict[str, float], valid: Dataset) -> float:
    """The rate that was asked for, or one in proportion to the force error of the start.

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
    scale, smallest, largest = RATES[options.optimizer]
    entries = [s.forces.abs().double() for s in valid.structures if s.forces.numel()]
    relative = WITHOUT_FORCES
    if entries and options.forces_weight > 0:
        mean = sum(float(e.sum()) for e in entries) / sum(e.numel() for e in entries)
        relative = 1e-3 * errors["forces_mae_meV_per_A"] / max(mean, FORCES)
    return min(max(scale * relative, smallest), largest)


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
