"""What the precisions of a deployed file mean, as a change of the module before it is traced.

``float32``, ``float64``
    Everything in that precision.
``mixed``
    float32, but what is made from distances and directions alone (lengths, radial basis, spherical
    harmonics, repulsion) and the readouts of the energy are computed in float64.  The geometry is where
    float32 loses most digits, and force errors are halved; they are so small in float32 that dynamics
    does not see it (benchmarks/results/precision.md).  Edge vectors are still float32.
``bf16``
    float32, but both operands of every dense product (linear maps, radial networks, readouts) are rounded
    to bfloat16; sums and results are float32.  Gradients pass the rounding as if it were not there, so
    forces are not the derivative of the energy, and dynamics gains energy (0.2 meV/atom/ps in MgO).

In each of them the energies of atoms are scaled, shifted and summed in float64.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import nn

from compactmlip.deploy.archive import DTYPES, Precision
from compactmlip.deploy.lower.dense import Dense, SpeciesDense
from compactmlip.errors import UnsupportedFeatureError
from compactmlip.models import FLOAT64_BUFFERS
from compactmlip.models.linear import NormedMLP, Weight

DENSE: list[type[nn.Module]] = [Weight, NormedMLP, Dense, SpeciesDense]
"""Classes whose products obey an attribute ``precision``: None, "bf16" or "float64"."""

GEOMETRY = ("basis", "radial", "harmonics", "repulsion")
"""Children of a model that see distances and directions only."""

HEADS = ("readout", "readout_hidden")
"""Names of modules that turn features into energies."""


def in_precision(model: nn.Module, precision: Precision) -> nn.Module:
    """Change a float64 model without trainable parameters, in place, to compute in a precision.

    Raises
    ------
    UnsupportedFeatureError
        If the model has nothing that the precision could apply to.
    """
    wide: set[nn.Module] = set()
    if precision == "bf16":
        _require(model, set_precision(model, "bf16") > 0, precision)
    if precision == "mixed":
        _require(model, hasattr(model, "wide_geometry"), precision)
        setattr(model, "wide_geometry", True)  # noqa: B010
        for part in (*_children(model, GEOMETRY), *_heads(model)):
            wide.update(part.modules())
        for head in _heads(model):
            set_precision(head, "float64")
    dtype = torch.float64 if precision == "float64" else torch.float32
    for module in model.modules():
        if module not in wide:
            _cast_buffers(module, dtype)
    return model.eval()


def set_precision(model: nn.Module, precision: str | None) -> int:
    """Set the precision of all dense products; returns how many modules have some."""
    found = [m for m in model.modules() if isinstance(m, tuple(DENSE))]
    for module in found:
        setattr(module, "precision", precision)  # noqa: B010
    return len(found)


def input_dtype(precision: Precision) -> torch.dtype:
    """Dtype of the edge vectors that a module in this precision takes."""
    return DTYPES["float64" if precision == "float64" else "float32"]


def _require(model: nn.Module, there: bool, precision: Precision) -> None:
    if not there:
        raise UnsupportedFeatureError(
            f"{type(model).__name__} has no parts that --dtype {precision} applies to; choose float32 or "
            "float64."
        )


def _children(model: nn.Module, names: tuple[str, ...]) -> Iterator[nn.Module]:
    for name in names:
        child = getattr(model, name, None)
        if isinstance(child, nn.Module):
            yield child


def _heads(model: nn.Module) -> list[nn.Module]:
    return [m for name, m in model.named_modules() if name.rpartition(".")[2] in HEADS]


def _cast_buffers(module: nn.Module, dtype: torch.dtype) -> None:
    for name, buffer in module.named_buffers(recurse=False):
        if buffer.is_floating_point() and name not in FLOAT64_BUFFERS:
            setattr(module, name, buffer.to(dtype))
