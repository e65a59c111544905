"""Very small random MACE models, saved as mace-torch saves them, for the reader of ``.model`` files.

Run with the Python of an environment that has mace-torch 0.3.16 and cuequivariance-torch:

    python tests/reference/make_mace_models.py

Writes into ``mace/``: ``e3nn.model`` (ScaleShiftMACE), ``cueq.model`` (the same one converted to
cuequivariance), ``plain.model`` (MACE, max_ell 2, tanh readout, two heads, ZBL, Agnesi), ``state-dict.pt``
(no module, only names and tensors) and ``state-dicts.npz``: ``state_dict()`` of each saved module.
"""

from __future__ import annotations

import io
import os
import zipfile
from pathlib import Path

os.environ["TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD"] = "1"  # e3nn 0.4.4 reads its own tables as a pickle

import numpy as np
import torch
from e3nn import o3
from mace import modules
from mace.cli import convert_e3nn_cueq

OUT = Path(__file__).resolve().parent / "mace"
CONFIG = {
    "r_max": 4.0,
    "num_bessel": 4,
    "num_polynomial_cutoff": 5,
    "max_ell": 1,
    "interaction_cls": modules.interaction_classes["RealAgnosticResidualInteractionBlock"],
    "interaction_cls_first": modules.interaction_classes["RealAgnosticResidualInteractionBlock"],
    "num_interactions": 2,
    "num_elements": 2,
    "hidden_irreps": o3.Irreps("4x0e+4x1o"),
    "MLP_irreps": o3.Irreps("4x0e"),
    "atomic_energies": np.array([-1.5, -2.5]),
    "avg_num_neighbors": np.float64(3.5),
    "atomic_numbers": [1, 8],
    "correlation": 2,
    "gate": torch.nn.functional.silu,
    "radial_MLP": [8],
}
SCALE_SHIFT = {"atomic_inter_scale": 0.8, "atomic_inter_shift": 0.1}


def without_debug_files(save):
    """Have TorchScript saved without the paths of this machine's sources, which serve its error messages."""

    def saving(module, buffer):
        whole = io.BytesIO()
        save(module, whole)
        with zipfile.ZipFile(whole) as source, zipfile.ZipFile(buffer, "w") as target:
            for entry in source.infolist():
                if not entry.filename.endswith(".debug_pkl"):
                    target.writestr(entry, source.read(entry))

    return saving


def models() -> dict[str, torch.nn.Module]:
    torch.manual_seed(5)
    scaled = modules.ScaleShiftMACE(**CONFIG, **SCALE_SHIFT)
    plain = modules.MACE(
        **{
            **CONFIG,
            "interaction_cls_first": modules.interaction_classes["RealAgnosticInteractionBlock"],
            "max_ell": 2,
            "gate": torch.tanh,
            "heads": ["pbe", "r2scan"],
            "atomic_energies": np.array([[-1.5, -2.5], [-1.6, -2.6]]),
            "pair_repulsion": True,
            "distance_transform": "Agnesi",
        }
    )
    for model in (scaled, plain):
        for parameter in model.parameters():
            torch.nn.init.normal_(parameter)
    return {"e3nn": scaled, "plain": plain}


def main() -> None:
    torch.set_num_threads(1)
    torch.set_default_dtype(torch.float64)
    torch.jit.save = without_debug_files(torch.jit.save)
    OUT.mkdir(exist_ok=True)
    made = models()
    torch.save(made["e3nn"], OUT / "e3nn.model")
    made["cueq"] = convert_e3nn_cueq.run(str(OUT / "e3nn.model"), device="cpu", return_model=True)
    for name, model in made.items():
        torch.save(model, OUT / f"{name}.model")
    torch.save(made["e3nn"].state_dict(), OUT / "state-dict.pt")
    arrays = {}
    for name, model in made.items():
        saved = model.state_dict()
        loaded = torch.load(OUT / f"{name}.model", weights_only=False).state_dict()
        # Constants of graphs that torch.load traces again; see state_dict() of the reader.
        loaded = {key: tensor for key, tensor in loaded.items() if "._tensor_constant" not in key}
        assert list(saved) == list(loaded) and all(torch.equal(saved[key], loaded[key]) for key in saved)
        arrays.update({f"{name}/{key}": tensor.numpy() for key, tensor in saved.items()})
        print(name, (OUT / f"{name}.model").stat().st_size, len(saved))
    np.savez_compressed(OUT / "state-dicts.npz", **arrays)


if __name__ == "__main__":
    main()
