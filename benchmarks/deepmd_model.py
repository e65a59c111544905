"""Make a DeePMD model for timings, in an environment with ``deepmd-kit[lmp,cpu]`` (imports nothing of ours).

benchmarks/lammps.py starts it.

The descriptor and networks are the usual ones (se_e2_a, 6 Angstrom, 25-50-100, 3 x 240), compressed
as for production.  Weights are those of two steps of training on noise: its speed is that of a trained
model, its energies mean nothing.

    ENV/bin/python benchmarks/deepmd_model.py FOLDER structure.npz
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np

COMPRESSED = "compressed.pb"
FRAMES = 2
MODEL = {
    "descriptor": {
        "type": "se_e2_a",
        "sel": "auto",
        "rcut": 6.0,
        "rcut_smth": 0.5,
        "neuron": [25, 50, 100],
        "axis_neuron": 16,
        "seed": 1,
    },
    "fitting_net": {"neuron": [240, 240, 240], "resnet_dt": True, "seed": 1},
}


def main() -> None:
    folder, structure = Path(sys.argv[1]).absolute(), np.load(sys.argv[2])
    symbols = sorted({str(s) for s in structure["symbols"]})
    data = folder / "data"
    _write_data(data, structure, symbols)
    inputs = {
        "model": {"type_map": symbols, **MODEL},
        "learning_rate": {"type": "exp", "decay_steps": 50, "start_lr": 1e-8, "stop_lr": 1e-9},
        "loss": {"start_pref_e": 0.02, "limit_pref_e": 1, "start_pref_f": 1000, "limit_pref_f": 1},
        "training": {
            "training_data": {"systems": [str(data)], "batch_size": 1},
            "numb_steps": 2,
            "save_freq": 1,
            "disp_freq": 1,
            "seed": 1,
        },
    }
    (folder / "input.json").write_text(json.dumps(inputs))
    dp = str(Path(sys.executable).with_name("dp"))
    for words in (
        ["train", "input.json"],
        ["freeze", "-o", "frozen.pb"],
        ["compress", "-i", "frozen.pb", "-o", COMPRESSED],
    ):
        subprocess.run(
            [dp, *words],
            cwd=folder,
            check=True,
            capture_output=True,
            env=os.environ | {"OMP_NUM_THREADS": "1"},
        )


def _write_data(data: Path, structure: np.lib.npyio.NpzFile, symbols: list[str]) -> None:
    """Displaced copies of the structure with random labels, in DeePMD's format."""
    random = np.random.default_rng(0)
    frames = data / "set.000"
    frames.mkdir(parents=True)
    positions, cell = structure["positions"], structure["cell"]
    kinds = np.array([symbols.index(str(s)) for s in structure["symbols"]])
    np.savetxt(data / "type.raw", kinds, fmt="%d")
    (data / "type_map.raw").write_text("\n".join(symbols))
    moved = [(positions + random.normal(0, 0.05, positions.shape)).ravel() for _ in range(FRAMES)]
    np.save(frames / "coord.npy", np.array(moved))
    np.save(frames / "box.npy", np.tile(cell.ravel(), (FRAMES, 1)))
    np.save(frames / "energy.npy", random.normal(0, 1, FRAMES))
    np.save(frames / "force.npy", random.normal(0, 1, (FRAMES, positions.size)))


if __name__ == "__main__":
    main()
