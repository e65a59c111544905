"""Cutoffs that end in a step, in a kink, and smoothly."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from ase.calculators.calculator import Calculator, all_changes

from compactmlip.validate.checks import Thresholds, cutoff_checks
from compactmlip.validate.cutoff import INSIDE, CutoffStep, cutoff_step

CUTOFF = 5.0


class Truncated(Calculator):
    """-c / r^6 between two atoms, up to the cutoff, in three ways."""

    implemented_properties = ["energy", "forces"]  # noqa: RUF012

    def __init__(self, kind: str, c: float = 500.0) -> None:
        super().__init__()
        self.kind, self.c = kind, c

    def value(self, r: float) -> float:
        if r >= CUTOFF:
            return 0.0
        bare, end = -self.c / r**6, -self.c / CUTOFF**6
        if self.kind == "step":
            return bare
        if self.kind == "kink":
            return bare - end
        return bare * (1 - (r / CUTOFF) ** 2) ** 3

    def calculate(self, atoms: Any = None, properties: Any = ("energy",), changes: Any = all_changes) -> None:
        super().calculate(atoms, properties, changes)
        vector = self.atoms.positions[1] - self.atoms.positions[0]
        r = float(np.linalg.norm(vector))
        h = 1e-6
        slope = (self.value(r + h) - self.value(r - h)) / (2 * h)
        self.results = {
            "energy": self.value(r),
            "forces": np.array([slope * vector / r, -slope * vector / r]),
        }


def judged(kind: str) -> tuple[CutoffStep, dict[str, str]]:
    found = cutoff_step(Truncated(kind), ["O", "Mg"], [CUTOFF])
    return found, {c.name.split(" at")[0]: c.verdict for c in cutoff_checks(found, Thresholds())}


def test_step() -> None:
    found, verdicts = judged("step")
    assert found.energy == pytest.approx(1000 * 500 / CUTOFF**6, rel=1e-5)
    assert verdicts == {"step of the energy": "fail", "step of the force": "fail"}


def test_kink() -> None:
    found, verdicts = judged("kink")
    assert found.force == pytest.approx(1000 * 6 * 500 / CUTOFF**7, rel=1e-4)
    assert found.energy < 1e-2 * found.force * INSIDE, "the force accounts for it"
    assert verdicts == {"step of the energy": "pass", "step of the force": "fail"}


def test_smooth() -> None:
    found, verdicts = judged("smooth")
    assert found.force < 0.01 and set(verdicts.values()) == {"pass"}


@pytest.mark.parametrize("kind", ["step", "kink", "smooth"])
def test_atoms_that_see_each_other_on_both_sides(kind: str) -> None:
    """A layer's cutoff within the model's: the slope there is no step."""
    outer = Truncated("smooth")

    class Layers(Truncated):
        def value(self, r: float) -> float:
            return 20 * outer.value(r) + super().value(r * CUTOFF / 4.0)

    found = cutoff_step(Layers(kind), ["O", "Mg"], [CUTOFF, 4.0])
    bare = 500 / CUTOFF**6, 6 * 500 / CUTOFF**7 * CUTOFF / 4.0
    assert found.cutoff == 4.0
    verdicts = [c.verdict for c in cutoff_checks(found, Thresholds())]
    if kind == "step":
        assert found.energy == pytest.approx(1000 * bare[0], rel=1e-3) and verdicts == ["fail", "fail"]
    elif kind == "kink":
        assert found.force == pytest.approx(1000 * bare[1], rel=1e-2) and verdicts == ["pass", "fail"]
    else:
        assert verdicts == ["pass", "pass"] and found.force < 1e-3


def test_all_pairs_are_tried() -> None:
    class Oxygen(Truncated):
        def value(self, r: float) -> float:
            return super().value(r) if set(self.atoms.get_chemical_symbols()) == {"O"} else 0.0

    assert cutoff_step(Oxygen("step"), ["O", "Mg", "O"], [CUTOFF]).pair == "O-O"
    assert cutoff_step(Truncated("step"), ["Mg"], [CUTOFF]).pair == "Mg-Mg"
    assert cutoff_checks(None, Thresholds()) == []
