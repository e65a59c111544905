"""Options of :func:`compactmlip.train.finetune.finetune`."""

from __future__ import annotations

from typing import ClassVar

from pydantic import Field, model_validator

from compactmlip.data.holdout import Method
from compactmlip.data.label_keys import LabelOptions
from compactmlip.train.options import TrainOptions
from compactmlip.train.reference import E0Choice

ALL_SPECIES = "all"
"""Stands for all species of the parent."""


class FinetuneOptions(TrainOptions):
    """How to fine-tune a model on labels of another level of theory.

    Attributes
    ----------
    action
        What the provenance calls it.
    """

    action: ClassVar[str] = "finetune"

    max_epochs: int | None = Field(default=100, ge=1, description="passes over the training frames")
    patience: int | None = Field(
        default=25, ge=1, description="stop after so many epochs without a better validation loss"
    )

    labels: LabelOptions = Field(default=LabelOptions(), description="names and units of the labels")
    e0: E0Choice | dict[str, float] = Field(
        default="auto",
        description="energies of free atoms: auto, isolated, least-squares, parent, or eV by species",
    )
    keep_species: tuple[str, ...] = Field(
        default=(), description="species to keep beyond those in the data, or all"
    )

    valid_fraction: float = Field(
        default=0.1, gt=0, lt=1, description="training frames held out where no validation set is given"
    )
    split: Method = Field(default="auto", description="how to hold out: auto, random, blocks or groups")
    group_key: str | None = Field(default=None, description="info key of frames that stay together")
    per_group: int | None = Field(
        default=None, ge=1, description="training frames of each group at most, chosen at random"
    )
    group_share: float | None = Field(
        default=None, gt=0, le=1, description="share of each group's training frames, chosen at random"
    )
    resample: bool = Field(default=False, description="choose these frames anew in each epoch")

    config_weights: dict[str, float] = Field(default={}, description="loss weights by config_type")
    head_weights: dict[str, float] = Field(default={}, description="loss weights by the info key 'head'")

    freeze: tuple[str, ...] = Field(default=(), description="parameters not to train; wildcards, '!' excepts")
    lora_rank: int | None = Field(
        default=None, ge=1, description="train updates of this rank, merged at the end"
    )
    replay_structures: int = Field(
        default=0, ge=0, description="perturbed structures with the parent's labels to train on as well"
    )
    replay_weight: float = Field(default=0.2, ge=0, description="loss weight of each of these")
    forgetting_structures: int = Field(
        default=16, ge=0, description="perturbed structures on which the result is compared with its parent"
    )

    max_force: float = Field(default=100.0, gt=0, description="eV/Angstrom; larger forces are called absurd")
    accept: tuple[str, ...] = Field(default=(), description="findings about the data to go on with")
    drop: tuple[str, ...] = Field(default=(), description="findings whose frames are left out")

    @model_validator(mode="after")
    def _one_way(self) -> FinetuneOptions:
        if self.lora_rank is not None and self.freeze:
            raise ValueError("give freeze or lora_rank, not both: low-rank updates freeze all weights")
        if self.hessian_weight and self.replay_structures:
            raise ValueError("replayed structures have no Hessian: give hessian_weight or replay_structures")
        if self.per_group is not None and self.group_share is not None:
            raise ValueError("give per_group or group_share, not both")
        drawn = self.per_group is not None or self.group_share is not None
        if drawn and self.group_key is None:
            raise ValueError("per_group and group_share need group_key, the info key that names the material")
        if self.resample and not drawn:
            raise ValueError("resample draws a part anew: give per_group or group_share as well")
        return self
