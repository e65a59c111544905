"""Options that every kind of training shares; each kind adds its own."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from compactmlip.errors import InputError
from compactmlip.spec import DTypeName

Schedule = Literal["cosine", "linear", "exponential", "constant", "plateau"]
Loss = Literal["huber", "universal", "mse"]
OptimizerName = Literal["soap", "adamw"]

BOOKKEEPING = frozenset(
    {"checkpoint_minutes", "tensorboard", "labels", "accept", "drop", "forgetting_structures"}
)
"""Options that do not change the training (what they do to the frames shows in the frames): a run may be
resumed with others."""


class TrainOptions(BaseModel):
    """How to train.

    The learning rate rises linearly during the warm-up, then falls along the schedule; its peak follows from
    the start where none is given (:func:`compactmlip.train.rate.peak_rate`).  Both follow the fraction of
    the budget that is used: of ``max_epochs``, or of ``max_minutes`` of wall-clock time (validation included,
    over all resumed parts), whichever is further.  The schedule "plateau" multiplies the rate with
    ``plateau_factor`` whenever more than ``plateau_patience`` epochs brought no better validation loss.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    lr: float | None = Field(
        default=None,
        gt=0,
        description="peak learning rate; by default in proportion to the force error of the start",
    )
    schedule: Schedule = Field(
        default="cosine", description="cosine, linear, exponential, constant or plateau"
    )
    warmup: float = Field(default=0.02, ge=0, lt=1, description="share of the budget to reach the peak")
    final_lr: float = Field(default=0.01, ge=0, le=1, description="last learning rate over the peak")
    plateau_patience: int = Field(default=10, ge=0, description="epochs before the rate falls on a plateau")
    plateau_factor: float = Field(default=0.8, gt=0, lt=1, description="factor of the rate on a plateau")
    optimizer: OptimizerName = Field(
        default="soap", description="soap (Adam in the gradients' eigenbasis) or adamw"
    )
    weight_decay: float = Field(default=0.0, ge=0, description="decoupled weight decay")
    amsgrad: bool = Field(default=False, description="AMSGrad variant of adamw")
    clip: float = Field(default=10.0, gt=0, description="largest norm of the gradient of the loss")
    ema_decay: float = Field(default=0.99, ge=0, lt=1, description="decay per step of the weight average")

    batch_atoms: int = Field(default=16, ge=1, description="atoms per batch at most (or one structure)")
    batch_edges: int = Field(default=8192, ge=1, description="edges per batch at most; bounds the memory")
    max_epochs: int | None = Field(default=200, ge=1, description="passes over the training frames")
    max_minutes: float | None = Field(default=None, gt=0, description="wall-clock budget, minutes")
    patience: int | None = Field(
        default=None, ge=1, description="stop after so many epochs without a better validation loss"
    )

    loss: Loss = Field(default="huber", description="huber, universal (MACE-MP's) or mse")
    energy_weight: float = Field(default=1.0, ge=0, description="weight of the energy term")
    forces_weight: float = Field(default=1.0, ge=0, description="weight of the force term")
    stress_weight: float = Field(default=0.2, ge=0, description="weight of the stress term")
    energy_delta: float = Field(default=0.02, gt=0, description="eV/atom where the loss turns linear")
    forces_delta: float = Field(default=0.02, gt=0, description="eV/Angstrom where the loss turns linear")
    stress_delta: float = Field(default=0.001, gt=0, description="eV/Angstrom^3 where the loss turns linear")
    hessian_weight: float = Field(default=0.0, ge=0, description="weight of the Hessian products; 0 for none")
    hessian_delta: float = Field(default=0.2, gt=0, description="eV/Angstrom^2 where the loss turns linear")
    hessian_directions: int = Field(
        default=1, ge=1, description="labelled directions used in a step; others follow in later epochs"
    )
    hessian_every: int = Field(default=1, ge=1, description="steps from one use of the Hessian to the next")

    checkpoint_minutes: float = Field(default=5.0, ge=0, description="minutes between resume files")
    tensorboard: bool = Field(
        default=False, description="write the numbers of history.csv for TensorBoard as well"
    )
    retries: int = Field(default=3, ge=0, description="halvings of the learning rate after NaN or infinity")
    seed: int = Field(default=0, ge=0, description="seed of the order of the batches")
    dtype: DTypeName = Field(default="float32", description="precision of the training")

    @model_validator(mode="after")
    def _has_budget(self) -> TrainOptions:
        if self.max_epochs is None and self.max_minutes is None:
            raise ValueError("training needs an end: give max_epochs, max_minutes or both")
        if self.amsgrad and self.optimizer != "adamw":
            raise ValueError("amsgrad is a variant of adamw: give optimizer=adamw as well")
        if self.energy_weight == self.forces_weight == self.stress_weight == self.hessian_weight == 0:
            raise ValueError("all weights are zero: there is nothing to train on")
        return self

    @classmethod
    def parse(cls, **options: Any) -> TrainOptions:
        """Build the options from keywords.

        Raises
        ------
        InputError
            If an option is unknown or out of range; the message names every such option.
        """
        try:
            return cls(**options)
        except ValidationError as error:
            lines = [f"{'.'.join(map(str, e['loc'])) or 'options'}: {e['msg']}" for e in error.errors()]
            raise InputError("training options: " + "; ".join(lines)) from error
