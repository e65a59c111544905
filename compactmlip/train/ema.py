"""Exponential moving average of weights."""

from __future__ import annotations

import copy

import torch
from torch import nn


class WeightAverage:
    """A copy of a model that follows its weights with memory.

    After step n: ``average = d * average + (1 - d) * weights`` with ``d = min(decay, n / (n + 10))``,
    so that early steps, far from the end, are forgotten soon.

    Attributes
    ----------
    model
        The copy; its weights are the average and need no gradient.
    steps
        Updates so far.
    """

    def __init__(self, model: nn.Module, decay: float) -> None:
        self.decay = decay
        self.steps = 0
        self.model = copy.deepcopy(model).requires_grad_(False)

    @torch.no_grad()
    def update(self, model: nn.Module) -> None:
        """Take one step towards the present weights of ``model``."""
        self.steps += 1
        decay = min(self.decay, self.steps / (self.steps + 10))
        for average, weight in zip(self.model.parameters(), model.parameters(), strict=True):
            average.lerp_(weight, 1 - decay)
