"""Segmented polynomials as an operator that TorchScript files call; on NVIDIA GPUs by cuequivariance-torch.

``torch.ops.compactmlip.polynomial`` takes a polynomial as two tensors, so that a file holds all that it
needs.  It is registered from Python when this module is imported: a program without Python cannot run such
files.  On CUDA devices cuequivariance's method "uniform_1d" computes, which makes code for each polynomial;
elsewhere :class:`compactmlip.kernels.polynomial.PlainPolynomial` does, slowly.  The CUDA part has not been
run on a GPU so far.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from compactmlip.errors import KernelError
from compactmlip.kernels.polynomial import PlainPolynomial, Polynomial

INSTALL = "pip install cuequivariance cuequivariance-torch"
INSTALL_CUDA = "pip install cuequivariance-ops-torch-cu13"
"""For a torch built with CUDA 13; -cu12 for CUDA 12."""

AGREEMENT = 1e-10
"""Largest difference to cuequivariance's own evaluation, over the largest value."""


def require(device: torch.device | str = "cpu") -> None:
    """Check that polynomials can be given to cuequivariance, and on a GPU that it has CUDA code.

    Raises
    ------
    KernelError
        If a package is missing or cannot be imported.
    """
    try:
        import cuequivariance
        import cuequivariance_torch

        # What versions that are too old do not have.
        _ = cuequivariance.SegmentedPolynomial, cuequivariance_torch.SegmentedPolynomial
    except (ImportError, AttributeError, OSError) as error:
        raise KernelError(
            f"cuequivariance-torch cannot be used ({error}). Install it: {INSTALL}; on NVIDIA GPUs also "
            f"{INSTALL_CUDA} (-cu12 for CUDA 12)"
        ) from error
    if torch.device(device).type == "cuda" and importlib.util.find_spec("cuequivariance_ops_torch") is None:
        raise KernelError(
            f"cuequivariance has no CUDA code here. Install it: {INSTALL_CUDA} (-cu12 for CUDA 12)"
        )


def method_for(device: torch.device) -> str:
    """Return what computes on a device: a method of cuequivariance, or "plain"."""
    return "uniform_1d" if device.type == "cuda" else "plain"


def to_cuequivariance(polynomial: Polynomial) -> Any:
    """Return the polynomial as ``cuequivariance.SegmentedPolynomial``."""
    import cuequivariance as cue
    from cuequivariance.segmented_polynomials import Path

    operands = [
        cue.SegmentedOperand(ndim=1, segments=[(o.extent,)] * o.segments)
        if o.extent
        else cue.SegmentedOperand(ndim=0, segments=[()] * o.segments)
        for o in polynomial.operands
    ]
    operations = []
    for part in polynomial.products:
        paths = [
            Path(tuple(int(n) for n in row), float(c))
            for row, c in zip(part.segments, part.coefficients, strict=True)
        ]
        factors = [(operands[k], "u" if polynomial.operands[k].extent else "") for k in part.operands]
        operations.append((part.operands, cue.SegmentedTensorProduct(factors, paths=paths)))
    count = len(polynomial.inputs)
    return cue.SegmentedPolynomial(operands[:count], operands[count:], operations)


def check(polynomial: Polynomial) -> None:
    """Compare with cuequivariance's own evaluation on random numbers.

    Raises
    ------
    KernelError
        If the installed version computes something else.
    """
    rng = np.random.default_rng(0)
    inputs = [rng.normal(size=(1, o.size)) for o in polynomial.inputs]
    mine = PlainPolynomial(polynomial)([torch.from_numpy(t) for t in inputs], {}, {}, {})
    theirs = to_cuequivariance(polynomial)(*(t[0] for t in inputs))
    for a, b in zip(mine, theirs, strict=True):
        difference = np.abs(a[0].numpy() - b)
        if not difference.max(initial=0.0) <= AGREEMENT * max(1.0, np.abs(b).max(initial=0.0)):
            raise KernelError(
                "the installed cuequivariance evaluates a polynomial differently, by "
                f"{difference.max():.1e}; version 0.13 is known to work"
            )


@dataclass(frozen=True)
class _Ready:
    """A polynomial on a device, or its gradient.

    Attributes
    ----------
    module
        What computes.
    outputs
        Operand of the original polynomial that each output is, or is the gradient of.
    unused
        By output: shape (segments, columns of each) and segments that no product reaches, which CUDA code
        may leave as it found them.
    """

    module: nn.Module
    outputs: tuple[int, ...]
    unused: dict[int, tuple[tuple[int, int], Tensor]]


_ready: dict[tuple[str, tuple[bool, ...], torch.device], _Ready] = {}


def _prepared(
    plan: Tensor, coefficients: Tensor, digest: str, wanted: tuple[bool, ...], device: torch.device
) -> _Ready:
    """The polynomial, or if any input is wanted the gradient with respect to these; made once."""
    key = (digest, wanted, device)
    if key not in _ready:
        polynomial = Polynomial.decoded(plan, coefficients)
        outputs = [len(polynomial.inputs)]
        if any(wanted):
            outputs = [k for k, w in enumerate(wanted) if w]
            polynomial = polynomial.gradient(wanted)
        name = f"compactmlip_{digest}_{''.join(str(int(w)) for w in wanted)}"
        _ready[key] = _prepare(polynomial, tuple(outputs), device, name)
    return _ready[key]


def _prepare(polynomial: Polynomial, outputs: tuple[int, ...], device: torch.device, name: str) -> _Ready:
    method = method_for(device)
    if method == "plain":
        return _Ready(PlainPolynomial(polynomial).to(device), outputs, {})
    require(device)
    import cuequivariance_torch

    made = to_cuequivariance(polynomial)
    module = cuequivariance_torch.SegmentedPolynomial(made, method=method, name=name).to(device)
    unused = {}
    for n, operand in enumerate(polynomial.outputs):
        number = len(polynomial.inputs) + n
        reached = {int(s) for p in polynomial.products if p.operands[-1] == number for s in p.segments[:, -1]}
        missing = sorted(set(range(operand.segments)) - reached)
        if missing:
            shape = (operand.segments, max(1, operand.extent))
            unused[n] = shape, torch.tensor(missing, device=device)
    return _Ready(module, outputs, unused)


def _evaluate(
    ready: _Ready, inputs: list[Tensor], indices: Sequence[Tensor], where: Sequence[int], rows: Sequence[int]
) -> list[Tensor]:
    """Outputs of a polynomial or gradient; ``where`` and ``rows`` by operand of the original polynomial."""
    inputs = [t.contiguous() for t in inputs]
    gathered = {n: indices[where[n]] for n in range(len(inputs)) if where[n] >= 0}
    summed = {n: indices[where[k]] for n, k in enumerate(ready.outputs) if where[k] >= 0}
    shapes = {n: inputs[0].new_empty((rows[ready.outputs[n]], 1)) for n in summed}
    # The compiled method launches on the current stream of the current device.
    here: AbstractContextManager[Any] = nullcontext()
    if inputs[0].device.type == "cuda":
        here = torch.cuda.device(inputs[0].device)
    with here:
        found: list[Tensor] = ready.module(inputs, gathered, shapes, summed)
    for n, (shape, segments) in ready.unused.items():
        found[n] = found[n].unflatten(1, shape).index_fill(1, segments, 0.0).flatten(1)
    return found


def _batch(tensors: Sequence[Tensor], indices: Sequence[Tensor], where: Sequence[int]) -> int:
    """Rows that are multiplied: those of the indices if there are some, else of the longest input."""
    sizes = [len(t) if w < 0 else len(indices[w]) for t, w in zip(tensors, where, strict=False)]
    return next((size for size in sizes if size != 1), 1)


def _forward(
    inputs: Sequence[Tensor],
    indices: Sequence[Tensor],
    where: Sequence[int],
    like: Tensor,
    plan: Tensor,
    coefficients: Tensor,
    digest: str,
    size: int,
) -> Tensor:
    """``compactmlip::polynomial``, of polynomials with one output.

    Parameters
    ----------
    inputs
        (batch, columns), (1, columns), or (any, columns) where they are gathered.
    indices
        (batch,) each.
    where
        By operand: which of the indices gather it, or into which rows the output is summed; -1 for none.
    like
        Has as many rows as the output.
    plan, coefficients, digest
        Of :meth:`Polynomial.encoded`.
    size
        Columns of the output.
    """
    if like.shape[0] == 0 or _batch(inputs, indices, where) == 0:
        return inputs[0].new_zeros((like.shape[0], size))
    ready = _prepared(plan, coefficients, digest, (False,) * len(inputs), inputs[0].device)
    rows = [*(len(t) for t in inputs), like.shape[0]]
    (found,) = _evaluate(ready, list(inputs), indices, where, rows)
    return found


def _setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    tensors, indices, where, _, plan, coefficients, digest, _ = inputs
    ctx.save_for_backward(*tensors, *indices, plan, coefficients)
    ctx.counts, ctx.where, ctx.digest = (len(tensors), len(indices)), list(where), digest


def _backward(ctx: Any, gradient: Tensor) -> tuple[Any, ...]:
    (first, second), where = ctx.counts, ctx.where
    *saved, plan, coefficients = ctx.saved_tensors
    inputs, indices = saved[:first], saved[first:]
    wanted = tuple(bool(w) for w in ctx.needs_input_grad[0])
    result: list[Tensor | None] = [None] * first
    if len(gradient) == 0 or _batch(inputs, indices, where) == 0:
        result = [torch.zeros_like(t) if w else None for t, w in zip(inputs, wanted, strict=True)]
    elif any(wanted):
        ready = _prepared(plan, coefficients, ctx.digest, wanted, gradient.device)
        tensors = [*inputs, gradient]
        found = _evaluate(ready, tensors, indices, where, [len(t) for t in tensors])
        for k, value in zip(ready.outputs, found, strict=True):
            # An input of one row may have been used for all.
            result[k] = value if len(value) == len(inputs[k]) else value.sum(0, keepdim=True)
    return result, [None] * second, None, None, None, None, None, None


_library = torch.library.Library("compactmlip", "FRAGMENT")
_library.define(
    "polynomial(Tensor[] inputs, Tensor[] indices, int[] where, Tensor like, Tensor plan, "
    "Tensor coefficients, str digest, int size) -> Tensor"
)
_library.impl("polynomial", _forward, "CompositeExplicitAutograd")
torch.library.register_autograd("compactmlip::polynomial", _backward, setup_context=_setup, lib=_library)
