"""Options of a validation."""

from __future__ import annotations

from pydantic import Field

from compactmlip.validate.checks import Thresholds
from compactmlip.validate.heldout import HeldoutOptions


class ValidateOptions(HeldoutOptions):
    """Options of :func:`compactmlip.validate.validate`.  Times are budgets: measured speeds decide."""

    teacher_frames: int = Field(
        4, ge=0, description="labelled structures that the teacher is compared on as well"
    )
    temperature_K: float = Field(300.0, gt=0)
    timestep_fs: float = Field(1.0, gt=0)
    nve_ps: float = Field(4.0, gt=0, description="longest NVE run of the model, ps")
    nve_seconds: float = Field(60.0, gt=0, description="time for the model's NVE run, s")
    teacher_nve_seconds: float = Field(40.0, ge=0, description="time for the teacher's NVE run, s; 0: none")
    ensemble_seconds: float = Field(
        150.0, ge=0, description="time for several runs of both with a thermostat, s; 0: none"
    )
    approach_points: int = Field(
        40, ge=0, description="energies while two atoms come together, for each pair of species; 0: none"
    )
    crystal_seconds: float = Field(
        30.0,
        ge=0,
        description="time for elastic constants, and again for phonons, of periodic structures, s",
    )
    nvt_seconds: float = Field(
        15.0, ge=0, description="time for the model's run with a thermostat, s; 0: none"
    )
    ladder_seconds: float = Field(
        60.0, ge=0, description="time for rising temperatures until something breaks, s; 0: none"
    )
    npt_seconds: float = Field(
        90.0, ge=0, description="time for model and teacher at constant pressure, s; 0: none"
    )
    pressure_GPa: float = Field(0.0, description="pressure of these runs, GPa")
    defect_seconds: float = Field(30.0, ge=0, description="time for vacancies and surfaces, s; 0: none")
    speed_seconds: float = Field(12.0, gt=0, description="time for each size of the speed comparison, s")
    sizes: tuple[int, ...] = Field((64, 216), description="about how many atoms speed is measured on")
    repeats: int = Field(5, ge=1)
    device: str = "cpu"
    thresholds: Thresholds = Thresholds()
