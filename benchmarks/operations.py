"""Operations and memory traffic of every operator that a calculation calls, and what the machine can do."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from process import timed
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

from compactmlip.kernels.contraction import contraction_plan
from compactmlip.kernels.contraction_source import COMPILED, compiled_program
from compactmlip.kernels.spline_convolution import flops
from compactmlip.models.mace_architecture import MACEArchitecture
from compactmlip.spec import ModelSpec

FREE = frozenset({"aten::_unsafe_view", "aten::detach"})
"""Operators that move nothing and are not declared as views."""


@dataclass
class Work:
    """Calls of one operator, floating-point operations (None: not counted) and bytes.

    Every tensor that goes in or comes out counts once, so that ``bytes`` is the least possible traffic.
    """

    calls: int = 0
    flops: float | None = None
    bytes: float = 0.0


class Counter(TorchDispatchMode):
    """Counts the work of all operators while it is active, in TorchScript and in backward passes too.

    Parameters
    ----------
    spec
        Of the model that runs.
    """

    def __init__(self, spec: ModelSpec) -> None:
        super().__init__()
        self.work: dict[str, Work] = {}
        self.plans = _contraction_plans(spec)
        self.programs = {p.identity: p for key in COMPILED if (p := compiled_program(*key)) is not None}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        name = func.name().partition(".")[0]
        work = self.work.setdefault(name, Work())
        work.calls += 1
        if not func.is_view and name not in FREE:
            work.bytes += sum(t.numel() * t.element_size() for t in _tensors((args, kwargs, out)))
        flops = self._flops(func, name, args, kwargs or {}, out)
        if flops is not None:
            work.flops = (work.flops or 0.0) + flops
        return out

    def _flops(self, func: Any, name: str, args: Sequence[Any], kwargs: Any, out: Any) -> float | None:
        if func.overloadpacket in flop_registry:
            return float(flop_registry[func.overloadpacket](*args, **kwargs, out_val=out))
        if name == "compactmlip::convolve":
            return _convolve(args[0], args[1])
        if name == "compactmlip::convolve_backward":
            return _convolve_backward(args[1], args[2], mask=args[7])
        if name in ("compactmlip::contract", "compactmlip::contract_backward"):
            backward = name.endswith("backward")
            return self._contract(args, args[1 if backward else 0], int(backward))
        if name in ("compactmlip::contract_folded", "compactmlip::contract_folded_backward"):
            return self._folded(args, backward=name.endswith("backward"))
        return flops(name, args)

    def _folded(self, args: Sequence[Any], *, backward: bool) -> float | None:
        """The program is known by its number; weights are (species, blocks, trees, 16)."""
        (identity,) = [a for a in args if isinstance(a, int) and a in self.programs]
        (weights,) = [a for a in args if isinstance(a, Tensor) and a.dim() == 4]
        (species,) = [a for a in args if isinstance(a, Tensor) and a.dtype == torch.int64]
        program = self.programs[identity]
        sweep = program.gradient if backward else program.forward
        return float(sweep.operations) * species.shape[0] * weights.shape[1] * weights.shape[3]

    def _contract(self, args: Sequence[Any], features: Tensor, direction: int) -> float | None:
        """The plan of the contraction is known by its table."""
        tables = [a for a in args if isinstance(a, Tensor) and a.dtype == torch.int32]
        known = [self.plans[key] for t in tables if (key := t.numpy().tobytes()) in self.plans]
        return known[0][direction] * features.shape[0] * features.shape[-1] if known else None


def _tensors(values: Any) -> Iterable[Tensor]:
    if isinstance(values, Tensor):
        yield values
    elif isinstance(values, dict):
        yield from _tensors(tuple(values.values()))
    elif isinstance(values, (list, tuple)):
        for value in values:
            yield from _tensors(value)


def _convolve(coupling: Tensor, features: Tensor) -> float:
    edges, rows, components = coupling.shape
    return float(edges * rows * features.shape[-1] * (2 * components + 2))


def _convolve_backward(coupling: Tensor, features: Tensor, mask: Sequence[bool]) -> float:
    edges, rows, components = coupling.shape
    each = 1 + 2 * components * sum(mask) + (2 if mask[2] else 0)
    return float(edges * rows * features.shape[-1] * each)


def _contraction_plans(spec: ModelSpec) -> dict[bytes, tuple[int, int]]:
    """Operations per atom and channel of each contraction of a model, by the bytes of its table."""
    if spec.family != "mace":
        return {}
    plans = {}
    for layer in MACEArchitecture.model_validate(spec.architecture).layers:
        orders, outputs = (
            tuple(l for l, size in enumerate(channels) if size) for channels in (layer.atomic, layer.product)
        )
        plan = contraction_plan(orders, outputs, layer.correlation)
        plans[plan.table.astype(np.int32).tobytes()] = plan.operations
    return plans


def peak_flops(dtype: torch.dtype, size: int = 1536, repeats: int = 5) -> float:
    """Operations per second of a matrix product, the best of several."""
    a, b = (torch.rand(size, size, dtype=dtype) for _ in range(2))
    out = torch.empty_like(a)
    return 2.0 * size**3 / _fastest(lambda: torch.mm(a, b, out=out), repeats)


def peak_bandwidth(size: int = 25_000_000, repeats: int = 5) -> float:
    """Bytes per second of ``a = b + s c`` on arrays that no cache holds, the best of several."""
    b, c = (torch.rand(size, dtype=torch.float64) for _ in range(2))
    out = torch.empty_like(b)
    return 3.0 * 8 * size / _fastest(lambda: torch.add(b, c, alpha=0.5, out=out), repeats)


def _fastest(function: Callable[[], Any], repeats: int) -> float:
    function()
    return min(timed(function)[1]["seconds"] for _ in range(repeats))
