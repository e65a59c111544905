"""What the library of compiled operators is made from; torch is not imported here."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from compactmlip.kernels.cached import file_digest

GENERATED = "contraction_folded.cpp"
"""The file that includes a header which is made by these modules:"""
GENERATORS = (
    "kernels/contraction_program.py",
    "kernels/contraction_source.py",
    "models/angular.py",
    "models/products.py",
)


def sources() -> list[Path]:
    """Files that are compiled."""
    return sorted(Path(__file__).parent.glob("*.cpp"))


def digests(compiled: Sequence[Path]) -> list[str]:
    """Names and SHA-256 of compiled files, and of all that they include."""
    headers = sorted(Path(__file__).parent.glob("*.h"))
    generators = [Path(__file__).parents[1] / name for name in GENERATORS]
    return [f"{path.name}\n{file_digest(path)}" for path in (*compiled, *headers, *generators)]
