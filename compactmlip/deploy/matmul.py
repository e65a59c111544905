"""Precision of float32 matrix products, which a caller may have lowered for the whole process.

torch can round the operands of float32 products to TF32 (10 bits, NVIDIA GPUs) or bfloat16 (7 bits, some
processors) when a program asks for speed, for instance with ``torch.set_float32_matmul_precision``.  A
model that was compiled and checked in float32 is not computed like that unless its file says so.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch


@contextmanager
def matmul_precision(*, tf32: bool = False) -> Iterator[None]:
    """Compute float32 products in float32, or with ``tf32`` in TF32 on GPUs that have it.

    The caller's settings come back afterwards, whatever happens.  They belong to the process: other
    threads see them change.
    """
    level, before = _level(), [(owner, owner.fp32_precision) for owner in _owners()]
    # The older function, because it keeps the older and the newer settings consistent: torch refuses to
    # multiply matrices where they contradict each other.
    torch.set_float32_matmul_precision("high" if tf32 else "highest")
    if tf32:
        for owner in _owners()[1:]:  # products on the processor stay in float32
            owner.fp32_precision = "ieee"
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(level)
        for owner, value in before:
            owner.fp32_precision = value


def _level() -> str:
    try:
        return torch.get_float32_matmul_precision()
    except RuntimeError:
        # Set through the newer interface to something else than the older one says, which is then the
        # opposite of it.
        return "highest" if torch.backends.cuda.matmul.fp32_precision == "tf32" else "high"


def _owners() -> list[Any]:
    """Objects with a newer setting; torch before 2.9 has none."""
    owners = (torch.backends.cuda.matmul, getattr(torch.backends.mkldnn, "matmul", None))
    return [owner for owner in owners if hasattr(owner, "fp32_precision")]
