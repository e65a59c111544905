"""Write the golden checkpoints of format version 1.  Run once per format version, never again.

python tests/reference/make_golden_checkpoints.py
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch

TESTS = Path(__file__).parents[1]
sys.path.insert(0, str(TESTS))

import conftest  # noqa: E402

from compactmlip import checkpoint  # noqa: E402
from compactmlip.data.graph import build_graph, energy_and_derivatives  # noqa: E402


def main() -> None:
    folder = TESTS / "data" / "golden"
    folder.mkdir(parents=True, exist_ok=True)
    for variant, name in (("plain", "nequip-v1"), ("species-skip", "nequip-species-skip-v1")):
        spec = conftest._spec(channels=(4, 3, 2), num_layers=2, lmax_edge=2, **conftest.VARIANTS[variant])
        model = conftest._model(spec, seed=11)
        path = checkpoint.save(model, folder / f"{name}.safetensors")
        energies = {}
        for title, atoms in conftest._structures().items():
            found = energy_and_derivatives(model, build_graph(atoms, spec, torch.float64))
            energies[title] = float(found.energies)
        path.with_suffix(".json").write_text(json.dumps({"energies": energies}, indent=1) + "\n")


if __name__ == "__main__":
    main()
