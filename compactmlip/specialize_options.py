"""What :func:`compactmlip.specialize.specialize` makes, and how long it may take."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

from compactmlip.compress.cost import Budget
from compactmlip.compress.plan_file import Plan
from compactmlip.data.sample import SampleOptions
from compactmlip.spec import DTypeName
from compactmlip.train.distil import DistilOptions
from compactmlip.validate.options import ValidateOptions

VALIDATION_SHARE = 0.42
"""Share of the time budget that is kept for compiling and validating."""

VALIDATION_BUDGETS = {
    "nve_seconds": 0.07,
    "teacher_nve_seconds": 0.03,
    "ensemble_seconds": 0.15,
    "nvt_seconds": 0.015,
    "ladder_seconds": 0.055,
    "npt_seconds": 0.055,
    "defect_seconds": 0.025,
    "speed_seconds": 0.012,
}
"""Shares of the time budget for parts of the validation, where the options do not say otherwise."""

PARTS = ("radial_hidden", "readout_hidden", "odd_paths", "edge_order")
"""Options about what is kept besides channels and paths."""


class SpecializeOptions(BaseModel):
    """What to make and how long it may take; nested options belong to the single steps."""

    model_config = ConfigDict(frozen=True, extra="forbid")
    teacher: str = Field("7net-l3i5", description="known name, or path of a checkpoint")
    modality: str | None = Field(None, description="level of theory, for teachers that have several")
    accept_licence: str | None = Field(None, description="restricted licence of the teacher that is accepted")
    species: tuple[str, ...] | None = Field(None, description="species to keep; by default the structures'")
    to: str | None = Field(
        None, description="channels per order to keep, for all layers or each; by default the family's"
    )
    cut_paths: float | None = Field(
        None, ge=0, le=1, description="share of the tensor products' paths to cut; without 'to' the family's"
    )
    cutoffs: str | None = Field(
        None, description="of the layers, such as -,4.5 or -,80%; without 'to' the family's"
    )
    plan: Plan | None = Field(None, description="what to keep, instead: a plan, or the JSON file of one")
    budget: str | None = Field(
        None, description="what the model may cost, such as latency=8x; 'to' is what paths are cut of, then"
    )
    radial_hidden: int | None = Field(None, ge=1, description="units to keep in the radial networks")
    readout_hidden: int | None = Field(None, ge=1, description="units to keep in the readout")
    odd_paths: bool = Field(False, description="keep paths that break inversion symmetry")
    edge_order: int | None = Field(None, ge=0, description="largest order of the harmonics of edges to keep")
    compensate: bool = Field(True, description="refit linear maps in closed form after cutting")
    minutes: float = Field(12.0, gt=0, description="time for everything; training gets what is left")
    dtype: DTypeName = Field("float32", description="precision of the deployed file")
    device: str = Field("cpu", description="where to compute: cpu, cuda, cuda:1, ...")
    seed: int = Field(0, ge=0)
    sample: SampleOptions = SampleOptions()
    distil: DistilOptions = DistilOptions(max_epochs=None, max_minutes=5.0)
    validation: ValidateOptions = ValidateOptions()

    @field_validator("plan", mode="before")
    @classmethod
    def _read(cls, value: Any) -> Any:
        return Plan.load(value) if isinstance(value, str | Path) else value

    @field_validator("budget")
    @classmethod
    def _readable(cls, value: str | None) -> str | None:
        if value is not None:
            Budget.parse(value)
        return value

    @model_validator(mode="after")
    def _one_target(self) -> SpecializeOptions:
        """A plan says all that is kept; a budget decides about paths."""
        names = ("to", "cut_paths", "cutoffs", "budget", *PARTS)
        others = {name for name in names if getattr(self, name) not in (None, False)}
        if self.plan is not None and others:
            raise ValueError(f"the plan says what is kept: leave out {', '.join(sorted(others))}")
        if self.budget is not None and self.cut_paths is not None:
            raise ValueError("the budget says how many paths are cut: leave out cut_paths")
        return self


def with_budgets(options: SpecializeOptions) -> SpecializeOptions:
    """Fill in the times of the validation that were not given."""
    given = options.validation.model_fields_set
    budgets = {
        name: max(1.0, round(60 * share * options.minutes, 1))
        for name, share in VALIDATION_BUDGETS.items()
        if name not in given
    }
    return options.model_copy(update={"validation": options.validation.model_copy(update=budgets)})
