"""Make large equivariant interatomic potentials small, fast and validated for one's own system.

The names below are loaded when they are first used; importing the package alone loads nothing else.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from compactmlip.checkpoint import load, save
    from compactmlip.compress.apply import keep_species, prune
    from compactmlip.compress.compensate import compensate
    from compactmlip.data.label import label
    from compactmlip.data.sample import sample
    from compactmlip.deploy.ase import CompactMLIPCalculator
    from compactmlip.deploy.compile import compile_model
    from compactmlip.families import load_model
    from compactmlip.train.distil import distil

__version__ = "0.1.0"

_WHERE = {
    "CompactMLIPCalculator": "compactmlip.deploy.ase",
    "compensate": "compactmlip.compress.compensate",
    "compile_model": "compactmlip.deploy.compile",
    "distil": "compactmlip.train.distil",
    "keep_species": "compactmlip.compress.apply",
    "label": "compactmlip.data.label",
    "load": "compactmlip.checkpoint",
    "load_model": "compactmlip.families",
    "prune": "compactmlip.compress.apply",
    "sample": "compactmlip.data.sample",
    "save": "compactmlip.checkpoint",
}

__all__ = [
    "CompactMLIPCalculator",
    "__version__",
    "compensate",
    "compile_model",
    "distil",
    "keep_species",
    "label",
    "load",
    "load_model",
    "prune",
    "sample",
    "save",
]


def __getattr__(name: str) -> Any:
    if name not in _WHERE:
        raise AttributeError(f"module 'compactmlip' has no attribute '{name}'")
    value = getattr(importlib.import_module(_WHERE[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
