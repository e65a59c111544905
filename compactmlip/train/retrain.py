"""Options of retraining: let a pruned model adapt to its smaller size, on data of its first training.

The third stage of "Structural pruning of SO(3)-equivariant atomistic foundation models": a part of the
pre-training data, the settings of the original training, the same number of epochs.  The work is done by
:func:`compactmlip.train.finetune.finetune`; what differs is that all species and reference energies stay.
"""

from __future__ import annotations

from typing import Any, ClassVar, Literal

from pydantic import Field, model_validator

from compactmlip.train.finetune_options import ALL_SPECIES, FinetuneOptions
from compactmlip.train.reference import E0Choice

Preset = Literal["mace-mp", "mace-off", "sevennet"]

KBAR = 1602.1766208
"""kbar in an eV/Angstrom^3, as SevenNet converts."""

MACE_MP: dict[str, Any] = {
    "max_epochs": 200,
    "loss": "universal",
    "energy_weight": 1e-4,
    "forces_weight": 10e-4,
    "stress_weight": 100e-4,
    "energy_delta": 0.01,
    "forces_delta": 0.01,
    "stress_delta": 0.01,
    "lr": 0.005,
    "optimizer": "adamw",
    "weight_decay": 1e-8,
    "amsgrad": True,
    "ema_decay": 0.995,
    "clip": 100.0,
    "schedule": "plateau",
    "plateau_patience": 5,
    "plateau_factor": 0.8,
    "warmup": 0.0,
    "patience": None,
}
"""MACE-MP.

Epochs, loss, weights (1, 10, 100), learning rate, weight decay, patience, average and clip: table 14 of the
paper above.  The patience is that of the learning rate, as in MACE's published training scripts.  delta 0.01,
AMSGrad and the factor 0.8: defaults of mace-torch 0.3.16, which has no warm-up.  mace-torch's Huber function
is delta^2 times ours: with the factor 1e-4 in the weights the loss, and what the clip means, are the same.
Not taken over: its batches, the nine components over which it averages the stress (six here), and that its
weight decay enters the gradient."""

MACE_OFF: dict[str, Any] = {
    "max_epochs": 190,
    "loss": "mse",
    "energy_weight": 80.0,
    "forces_weight": 2000.0,
    "stress_weight": 0.0,
    "energy_delta": 1.0,
    "forces_delta": 1.0,
    "lr": 0.01,
    "optimizer": "adamw",
    "weight_decay": 5e-10,
    "amsgrad": True,
    "ema_decay": 0.99,
    "clip": 1.0,
    "schedule": "plateau",
    "plateau_patience": 20,
    "plateau_factor": 0.8,
    "warmup": 0.0,
    "patience": None,
}
"""MACE-OFF; sources as for MACE-MP.  Weights 40 and 1000 of mean squares, twice as much of half of them."""

SEVENNET: dict[str, Any] = {
    "max_epochs": 600,
    "loss": "huber",
    "energy_weight": 1e-4,
    "forces_weight": 1e-4,
    "stress_weight": 1e-6,
    "energy_delta": 0.01,
    "forces_delta": 0.01,
    "stress_delta": 0.01 / KBAR,
    "lr": 0.01,
    "optimizer": "adamw",
    "schedule": "linear",
    "final_lr": 1e-4,
    "warmup": 0.0,
    "patience": None,
}
"""SevenNet-l3i5: the training part of ``sevenn/presets/sevennet-l3i5.yaml`` in SevenNet's repository.

600 epochs, Huber with delta 0.01 for energies per atom, forces and stresses in kbar, weights 1, 1 and 0.01
(here with the factor delta^2, as for MACE-MP), Adam at 0.01, falling linearly to 1e-4 of it.  Not taken over:
its batches of 1024 structures."""

PRESETS: dict[str, dict[str, Any]] = {"mace-mp": MACE_MP, "mace-off": MACE_OFF, "sevennet": SEVENNET}


class RetrainOptions(FinetuneOptions):
    """How to retrain a pruned model."""

    action: ClassVar[str] = "retrain"

    preset: Preset | None = Field(
        default=None, description="published settings, which other options override: " + ", ".join(PRESETS)
    )
    max_epochs: int | None = Field(default=200, ge=1, description="passes over the training frames")
    patience: int | None = Field(
        default=None, ge=1, description="stop after so many epochs without a better validation loss"
    )
    e0: E0Choice | dict[str, float] = Field(
        default="parent",
        description="energies of free atoms: auto, isolated, least-squares, parent, or eV by species",
    )
    keep_species: tuple[str, ...] = Field(
        default=(ALL_SPECIES,), description="species to keep beyond those in the data, or all"
    )
    forgetting_structures: int = Field(
        default=0, ge=0, description="perturbed structures on which the result is compared with its parent"
    )

    @model_validator(mode="before")
    @classmethod
    def _with_preset(cls, data: Any) -> Any:
        """Fill in what the preset says and nothing else does."""
        if isinstance(data, dict) and data.get("preset") in PRESETS:
            return {**PRESETS[data["preset"]], **data}
        return data
