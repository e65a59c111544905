"""Small random SevenNet models with options that no released checkpoint has, and sevenn's results.

Released checkpoints are from before SevenNet 0.11 and have linear self-connections.  These have weights
per species and today's order of the radial weights.  Run with the Python of the environment that
``make_sevennet_reference.py --venv DIR`` makes:

    DIR/bin/python tests/reference/make_sevennet_toys.py

Writes ``sevennet/toy-<name>.pth`` and ``.npz`` (``energy``, ``forces``, ``stress``, in float64) for the
crystal and the molecule of ``structures()``.
"""

import copy
import functools
import sys
from pathlib import Path

import numpy as np
import sevenn._keys as KEY
import sevenn.util
import torch
from ase.build import bulk, molecule
from e3nn.o3 import wigner_3j
from sevenn import __version__, _const
from sevenn.calculator import SevenNetCalculator
from sevenn.model_build import build_E3_equivariant_model

sys.argv.append("--worker")  # we are inside the environment: let that script import sevenn
from make_sevennet_reference import to_double  # noqa: E402

OUT = Path(__file__).resolve().parent / "sevennet"
NUMBERS = {1: 0, 6: 1, 8: 2, 12: 3}
TOYS = {
    "species-skip": {"self_connection_type": "nequip", "lmax": 2},
    "linear-lmax-edge": {"self_connection_type": "linear", "lmax": 2, "lmax_edge": 1, "lmax_node": 2},
}


def config(options):
    made = copy.deepcopy(_const.DEFAULT_E3_EQUIVARIANT_MODEL_CONFIG)
    made.update(
        {
            "cutoff": 4.0,
            "channel": 4,
            "is_parity": False,
            "num_convolution_layer": 3,
            "weight_nn_hidden_neurons": [5, 6],
            "radial_basis": {"radial_basis_name": "bessel", "bessel_basis_num": 6},
            "cutoff_function": {"cutoff_function_name": "poly_cut", "poly_cut_p_value": 5},
            "conv_denominator": [1.5, 2.0, 2.5],
            "shift": [-1.0, -2.0, -3.0, -0.5],
            "scale": [0.5, 0.6, 0.7, 0.8],
            KEY.TYPE_MAP: NUMBERS,
            KEY.NUM_SPECIES: len(NUMBERS),
            KEY.CHEMICAL_SPECIES: ["H", "C", "O", "Mg"],
            "version": __version__,
        }
    )
    return {**made, **options}


def structures():
    crystal, ethanol = bulk("MgO", "rocksalt", a=4.2, cubic=True), molecule("CH3CH2OH")
    crystal.rattle(0.1, seed=1)
    ethanol.rattle(0.1, seed=2)
    return crystal, ethanol


def main():
    torch.set_num_threads(1)
    sevenn.util.dtype_correct = functools.partial(sevenn.util.dtype_correct, float_dtype=torch.float64)
    for name, options in TOYS.items():
        torch.manual_seed(3)
        settings = config(options)
        model = build_E3_equivariant_model(copy.deepcopy(settings))
        for parameter in model.parameters():
            parameter.requires_grad_(True)
        path = OUT / f"toy-{name}.pth"
        torch.save({"model_state_dict": model.state_dict(), "config": settings}, path)
        calculator = SevenNetCalculator(str(path), device="cpu")
        for key, symbol in to_double(calculator.model).items():
            symbol.copy_(wigner_3j(*map(int, key.split("_")[-3:]), dtype=torch.float64))
        arrays = {}
        for k, atoms in enumerate(structures()):
            calculator.calculate(atoms)
            for what in ("energy", "forces", "stress"):
                arrays[f"{what}_{k}"] = np.array(calculator.results[what])
            print(name, calculator.results["energy"], np.abs(calculator.results["forces"]).max())
        np.savez_compressed(OUT / f"toy-{name}.npz", **arrays)


if __name__ == "__main__":
    main()
