"""The self-contained HTML report of a validation."""

from __future__ import annotations

from compactmlip.validate.report.build import build_report

__all__ = ["build_report"]
