"""A stand-in for the CUDA code of cuequivariance, to test on the CPU what would be given to it."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from compactmlip.kernels import polynomial_operator as operator


def emulate_uniform_1d(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Let cuequivariance-torch think that its CUDA code is there; returns the names of its calls.

    The stand-in follows the arguments of ``torch.ops.cuequivariance.uniform_1d`` of version 0.13.  Like that,
    it sets outputs to zero only if they are indexed or shared; else what no product reaches stays undefined.
    """
    from cuequivariance_torch.primitives import (
        segmented_polynomial,
        segmented_polynomial_uniform_1d as method,
    )

    calls: list[str] = []

    def run(name: str, *arguments: Any) -> list[Tensor]:
        calls.append(name)
        return _uniform_1d(*arguments)

    monkeypatch.setattr(segmented_polynomial, "HAS_CUE_OPS", True)
    monkeypatch.setattr(method, "uniform_1d", run)
    for name, value in (("SHARED", 0), ("BATCHED", 1), ("INDEXED", -1), ("AUTO", -2)):
        monkeypatch.setattr(method, f"BATCH_DIM_{name}", value, raising=False)
    monkeypatch.setattr(operator, "_ready", {})
    monkeypatch.setattr(operator, "method_for", lambda device: "uniform_1d")
    return calls


def _uniform_1d(
    math_dtype: torch.dtype,
    extent: int,
    num_inputs: int,
    num_outputs: int,
    num_index: int,
    dims: list[int],
    segments: list[int],
    batch_dims: list[int],
    index_buffer: list[int],
    dtypes: list[int],
    num_operations: int,
    num_operands: list[int],
    operations: list[int],
    num_paths: list[int],
    path_starts: list[int],
    coefficient_starts: list[int],
    path_indices: list[int],
    path_coefficients: list[float],
    batch_size: int,
    given: list[Tensor],
) -> list[Tensor]:
    inputs, indices, count = given[:num_inputs], given[num_inputs:], num_inputs + num_outputs
    assert batch_size == -2 and len(indices) == num_index and math_dtype == inputs[0].dtype
    sizes = [len(i) for i in indices]
    sizes += [len(t) for t, kind in zip(inputs, batch_dims, strict=False) if kind == -2 and len(t) != 1]
    assert len(set(sizes)) <= 1
    (batch,) = set(sizes) or {1}
    rows = []
    for t, kind, where, dim, number in zip(inputs, batch_dims, index_buffer, dims, segments, strict=False):
        t = t[indices[where]] if kind == -1 else t.expand(batch, -1)
        assert t.shape == (batch, number * (extent if dim else 1))
        rows.append(t.reshape(batch, number, -1))
    outputs = []
    for k in range(num_inputs, count):
        width = extent if dims[k] else 1
        edge = torch.full((batch, segments[k], width), float("nan"), dtype=inputs[dtypes[k]].dtype)
        if batch_dims[k] == -1:
            edge.zero_()
        outputs.append(edge)
    start = 0
    for n in range(num_operations):
        used, start = operations[start : start + num_operands[n]], start + num_operands[n]
        for path in range(num_paths[n]):
            first = path_starts[n] + path * len(used)
            chosen = path_indices[first : first + len(used)]
            term = torch.tensor(path_coefficients[coefficient_starts[n] + path], dtype=torch.float64)
            for buffer, segment in zip(used, chosen, strict=True):
                if buffer < num_inputs:
                    term = term * rows[buffer][:, segment]
            (place,) = (p for p, buffer in enumerate(used) if buffer >= num_inputs)
            target = outputs[used[place] - num_inputs][:, chosen[place]]
            if target.shape[1] == 1:
                term = term.sum(1, keepdim=True)
            target.copy_(torch.where(target.isnan(), term, target + term))
    results = []
    for k, edge in zip(range(num_inputs, count), outputs, strict=True):
        flat = edge.flatten(1)
        if batch_dims[k] == -1:
            where = index_buffer[k]
            flat = flat.new_zeros(index_buffer[count + where], flat.shape[1]).index_add(
                0, indices[where], flat
            )
        results.append(flat)
    return results
