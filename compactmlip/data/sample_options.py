"""Options of :func:`compactmlip.data.sample.sample`."""

from __future__ import annotations

from typing import Any

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

from compactmlip.data.teacher import MAX_EDGES


class SampleOptions(BaseModel):
    """What to sample.

    For a small crystal the defaults cost about 3700 atom-evaluations of forces (MD, force constants,
    defects) and 5600 of energies alone.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")
    n: int = Field(200, ge=1, description="number of structures")
    temperature: tuple[float, ...] = Field(
        (300.0, 600.0, 1000.0), description="K; one or several, for thermal displacements and MD"
    )
    strain: float = Field(
        0.04, ge=0, le=0.3, description="largest linear strain, the same along all periodic directions"
    )
    shear: float = Field(
        0.03, ge=0, le=0.3, description="largest element of the traceless part of the strain"
    )
    max_atoms: int = Field(
        24, ge=1, description="largest supercell, atoms; larger inputs are used as they are"
    )
    vacancies: float | None = Field(
        None,
        ge=0,
        le=1,
        description="fraction of structures with one vacancy; default: 0.14 in crystals whose bonds connect "
        "each atom with its images in all directions, none elsewhere",
    )
    vacancy_atoms: int = Field(
        64,
        ge=1,
        description="largest supercell with a vacancy, atoms, where that is more than max_atoms: vacancies "
        "and their images should not see each other",
    )
    surfaces: float | None = Field(
        None,
        ge=0,
        le=1,
        description="fraction of slabs cut from the crystal; default: 0.08 in such crystals",
    )
    md_fraction: float = Field(0.25, ge=0, le=1, description="largest fraction of structures from teacher MD")
    md_steps: int = Field(60, ge=1, description="steps per MD run (2 fs, or 1 fs with hydrogen)")
    md_interval: int = Field(6, ge=1, description="steps between snapshots")
    md_evaluations: int | None = Field(
        None,
        ge=0,
        description="atoms x steps of MD; default: a fifth of the candidates' atoms, at least 1500",
    )
    oversample: float = Field(2.0, ge=1, description="candidates per structure that is kept")
    max_edges: int = Field(
        MAX_EDGES, ge=1, description="edges per batch of the teacher; lower it to save memory"
    )
    seed: int = Field(0, ge=0, description="seed of all random numbers")

    @model_validator(mode="after")
    def _not_more_than_all(self) -> SampleOptions:
        if (self.vacancies or 0.0) + (self.surfaces or 0.0) > 1:
            raise ValueError("vacancies and surfaces are more than all structures")
        return self

    @field_validator("temperature", mode="before")
    @classmethod
    def _one_or_several(cls, value: Any) -> Any:
        return (value,) if isinstance(value, (int, float)) else value

    @field_validator("temperature")
    @classmethod
    def _positive(cls, value: tuple[float, ...]) -> tuple[float, ...]:
        if not value or min(value) <= 0:
            raise ValueError("give at least one temperature above 0 K")
        return value
