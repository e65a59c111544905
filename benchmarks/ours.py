"""Worker of engine.py for compactmlip.  Requests and answers: see process.py."""

from __future__ import annotations

import os
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import torch
from common import Evaluation, read_structure
from process import TURN_SECONDS, limit_memory, peak_memory, serve, sustained, timed

from compactmlip import CompactMLIPCalculator

STEP = 0.003
"""Angstrom that atoms move between steps, as in molecular dynamics."""


class Calculation:
    """Energies and forces of one structure by one file."""

    def setup(self, model: str, structure: str, threads: int, memory: float) -> dict[str, Any]:
        limit_memory(memory)
        torch.set_num_threads(threads)
        self.path, self.atoms = Path(model), read_structure(Path(structure))
        self.evaluation = Evaluation(self.path)
        self.graph = self.evaluation.graph(self.atoms)
        self.forces = torch.empty(0)
        self.rng = np.random.default_rng(0)
        return {"memory_before": peak_memory(), "edges": len(self.graph.centers)}

    def run(self) -> dict[str, Any]:
        found, times = sustained(lambda: self._evaluate, TURN_SECONDS)
        self.forces = found.forces
        return dict(times)

    def _evaluate(self) -> Any:
        return self.evaluation(self.graph)

    def sustain(self, seconds: float) -> dict[str, Any]:
        """Median of as many calculations as end within ``seconds``, at least three."""
        return dict(sustained(lambda: self._evaluate, seconds, least=3)[1])

    def pin(self, processors: list[int]) -> dict[str, Any]:
        """Stay on these processors from now on (threads that exist stay where they are)."""
        os.sched_setaffinity(0, processors)
        return {}

    def finish(self, forces: str) -> dict[str, Any]:
        np.save(forces, self.forces.double().numpy())
        return {"memory": peak_memory()}

    def step(self) -> dict[str, Any]:
        """A whole step through the calculator: neighbour list, graph, energy, forces and stress."""
        if self.atoms.calc is None:
            self.atoms.calc = CompactMLIPCalculator(self.path)
        self.atoms.positions += self.rng.uniform(-STEP, STEP, self.atoms.positions.shape)
        return dict(timed(self.atoms.get_forces)[1])


def main() -> None:
    warnings.simplefilter("ignore")
    calculation = Calculation()
    serve(
        {
            "pin": calculation.pin,
            "setup": calculation.setup,
            "run": calculation.run,
            "sustain": calculation.sustain,
            "step": calculation.step,
            "finish": calculation.finish,
        }
    )


if __name__ == "__main__":
    main()
