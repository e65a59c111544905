"""Validation: the proof that a compressed model still gives the teacher's physics."""

from __future__ import annotations

from compactmlip.validate.certificate import Certificate, Stage
from compactmlip.validate.checks import Check, Thresholds
from compactmlip.validate.options import ValidateOptions
from compactmlip.validate.run import validate

__all__ = ["Certificate", "Check", "Stage", "Thresholds", "ValidateOptions", "validate"]
