"""What a search is asked for and how long it may take."""

from __future__ import annotations

import re

from pydantic import BaseModel, ConfigDict, Field, field_validator

from compactmlip.compress.cost import Budget
from compactmlip.compress.importance import CRITERIA


class SearchOptions(BaseModel):
    """Targets, budget and details of a search."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    speedup: str | None = Field(None, description="how much faster than the deployed model itself, e.g. 8x")
    force_mae: float | None = Field(None, gt=0, description="largest force error, meV/Angstrom")
    memory: str | None = Field(None, description="largest memory of a calculation, e.g. 2GB")
    minutes: float = Field(25.0, gt=0, description="time for the candidates")
    candidates: int | None = Field(None, ge=1, description="number of candidates, if that ends it sooner")
    importance: str = Field(
        "taylor,taylor-atom,fisher", description="criteria that rank channels, of which plans choose one"
    )
    atoms: int = Field(512, ge=1, description="size of the structure whose speed and memory count")
    round_to: int = Field(8, ge=1, description="numbers of channels are multiples of this")
    odd_paths: bool = Field(False, description="keep paths that break inversion symmetry")
    fit_atoms: int = Field(2000, ge=2, description="atoms that candidates are refitted on")
    held_out_atoms: int = Field(1200, ge=1, description="atoms that their errors are measured on")
    checked: int = Field(12, ge=1, description="best candidates, measured in all divisions in the end")
    splits: int = Field(3, ge=1, description="divisions of the structures that errors are means over")
    workers: int = Field(1, ge=1, description="processes that evaluate candidates, with one thread each")
    damping: float = Field(1.0, gt=0, description="factor on the penalties of the refits")
    finalists: int | None = Field(
        None,
        ge=1,
        description="plans whose speed is measured again in the end; by default 4, or 8 if they are trained",
    )
    repeats: int = Field(5, ge=1, description="timed calculations of each model; medians count")
    distil_minutes: float | None = Field(None, gt=0, description="time to train the finalists")
    seed: int = Field(0, ge=0)

    @field_validator("speedup")
    @classmethod
    def _factor(cls, value: str | None) -> str | None:
        if value is not None and not (re.fullmatch(r"\d+(\.\d+)?x?", value) and float(value.rstrip("x")) > 0):
            raise ValueError("expected a factor such as 8x")
        return value

    @field_validator("memory")
    @classmethod
    def _amount(cls, value: str | None) -> str | None:
        if value is not None:
            Budget.parse(f"memory={value}")
        return value

    @field_validator("importance")
    @classmethod
    def _known(cls, value: str) -> str:
        names = value.split(",")
        if len(set(names)) < len(names) or not set(names) <= set(CRITERIA):
            raise ValueError(f"choose some of {', '.join(CRITERIA)}, separated by commas")
        return value

    @property
    def criteria(self) -> tuple[str, ...]:
        """The criteria."""
        return tuple(self.importance.split(","))

    @property
    def factor(self) -> float | None:
        """The wanted speed-up."""
        return None if self.speedup is None else float(self.speedup.rstrip("x"))

    @property
    def num_finalists(self) -> int:
        """How many plans are measured again, and trained where that was asked for.

        A short training tells kinds of plans apart that look the same before it, so that it pays to train
        more of them than could be trained for long.
        """
        if self.finalists is not None:
            return self.finalists
        return 4 if self.distil_minutes is None else 8

    @property
    def memory_limit(self) -> float | None:
        """The largest memory, in bytes."""
        return None if self.memory is None else Budget.parse(f"memory={self.memory}").value
