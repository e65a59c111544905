"""Segmented polynomials: what they are, their gradients, and their values in plain PyTorch.

A segmented polynomial is a sum of products of segments of rows of tensors, each product with a coefficient.
Convolutions and symmetric contractions are such polynomials, and cuequivariance makes CUDA code for any of
them (:mod:`compactmlip.kernels.polynomial_operator`).
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

CHUNK = 2**24
"""Numbers that an intermediate of the evaluation in plain PyTorch may have."""


@dataclass(frozen=True)
class Operand:
    """Rows of an input or output: (batch, segments * extent), or (batch, segments) if extent is 0."""

    segments: int
    extent: int = 0

    @property
    def size(self) -> int:
        """Columns of the tensor."""
        return self.segments * max(1, self.extent)


@dataclass(frozen=True)
class Products:
    """Products of one kind.

    Attributes
    ----------
    operands
        Which operand each factor is from, ascending, and behind them that of the result.
    segments
        (products, operands): segment of each; ascending among factors from one operand, or equal products of
        a gradient are not merged.
    coefficients
        (products,).
    """

    operands: tuple[int, ...]
    segments: NDArray[np.int64]
    coefficients: NDArray[np.float64]


@dataclass(frozen=True)
class Polynomial:
    """Sums of products; operands are the inputs, then the outputs.  Extents above 0 are all the same."""

    inputs: tuple[Operand, ...]
    outputs: tuple[Operand, ...]
    products: tuple[Products, ...]

    def __post_init__(self) -> None:
        extents = {o.extent for o in self.operands if o.extent}
        if len(extents) > 1:
            raise ValueError(f"operands with segments of {sorted(extents)} columns cannot be multiplied")

    @property
    def operands(self) -> tuple[Operand, ...]:
        """Inputs and outputs."""
        return self.inputs + self.outputs

    def encoded(self) -> tuple[Tensor, Tensor, str]:
        """Return the polynomial as numbers: plan (int64), coefficients (float64) and a digest of both."""
        head = [len(self.inputs), len(self.outputs), len(self.products)]
        head += [n for o in self.operands for n in (o.segments, o.extent)]
        for part in self.products:
            head += [len(part.operands), len(part.coefficients), *part.operands]
        flat = [np.array(head), *(part.segments.reshape(-1) for part in self.products)]
        plan = np.concatenate(flat).astype(np.int64)
        coefficients = np.concatenate([part.coefficients for part in self.products]).astype(np.float64)
        digest = hashlib.sha256(plan.tobytes() + coefficients.tobytes()).hexdigest()[:32]
        return torch.from_numpy(plan), torch.from_numpy(coefficients), digest

    @staticmethod
    def decoded(plan: Tensor, coefficients: Tensor) -> Polynomial:
        """Inverse of :meth:`encoded`."""
        numbers, values = plan.cpu().numpy(), coefficients.cpu().numpy()
        position = 0

        def take(count: int) -> list[int]:
            nonlocal position
            position += count
            return [int(n) for n in numbers[position - count : position]]

        num_inputs, num_outputs, kinds = take(3)
        operands = tuple(Operand(*take(2)) for _ in range(num_inputs + num_outputs))
        heads: list[tuple[int, tuple[int, ...]]] = []
        for _ in range(kinds):
            width, length = take(2)
            heads.append((length, tuple(take(width))))
        products, start = [], 0
        for length, used in heads:
            segments = np.array(take(length * len(used)), dtype=np.int64).reshape(length, len(used))
            products.append(Products(used, segments, values[start : start + length]))
            start += length
        return Polynomial(operands[:num_inputs], operands[num_inputs:], tuple(products))

    def gradient(self, wanted: Sequence[bool]) -> Polynomial:
        """Gradient of the contracted outputs with respect to some inputs.

        Its inputs are those of the polynomial and, behind them, what its outputs are contracted with; its
        outputs are the wanted inputs.
        """
        number = {k: len(self.operands) + n for n, k in enumerate(np.flatnonzero(wanted).tolist())}
        parts: dict[tuple[int, ...], list[tuple[NDArray[np.int64], NDArray[np.float64]]]] = {}
        for part in self.products:
            for place, k in enumerate(part.operands[:-1]):
                if k not in number:
                    continue
                others = [p for p in range(len(part.operands)) if p != place]
                operands = (*(part.operands[p] for p in others), number[k])
                segments = part.segments[:, [*others, place]]
                parts.setdefault(operands, []).append((segments, part.coefficients))
        products = []
        for operands, pieces in parts.items():
            rows = np.concatenate([segments for segments, _ in pieces])
            values = np.concatenate([coefficients for _, coefficients in pieces])
            unique, inverse = np.unique(rows, axis=0, return_inverse=True)
            total = np.zeros(len(unique))
            np.add.at(total, inverse.reshape(-1), values)
            products.append(Products(operands, unique, total))
        outputs = tuple(self.inputs[k] for k in number)
        return Polynomial(self.operands, outputs, tuple(products))


class PlainPolynomial(nn.Module):
    """A polynomial in plain PyTorch, on any device; it can be differentiated any number of times.

    Its arguments are those of ``cuequivariance_torch.SegmentedPolynomial``, of which it is the stand-in:
    one gather, product and sum for all products of a kind instead of one operation per product.
    """

    def __init__(self, polynomial: Polynomial) -> None:
        super().__init__()
        self.polynomial = polynomial
        for k, part in enumerate(polynomial.products):
            self.register_buffer(f"segments_{k}", torch.tensor(part.segments.T.copy()))
            self.register_buffer(f"coefficients_{k}", torch.tensor(part.coefficients))

    def forward(
        self,
        inputs: Sequence[Tensor],
        gathered: dict[int, Tensor],
        shapes: dict[int, Tensor],
        summed: dict[int, Tensor],
    ) -> list[Tensor]:
        """Evaluate the polynomial.

        Parameters
        ----------
        inputs
            (batch, columns), (1, columns), or (any, columns) where they are gathered.
        gathered
            By input: (batch,) rows of it.
        shapes
            By output that is summed: a tensor with as many rows.
        summed
            By output: (batch,) rows into which the batch is added.

        Returns
        -------
        list
            Outputs, (batch or rows, columns).
        """
        rows = [t.index_select(0, gathered[k]) if k in gathered else t for k, t in enumerate(inputs)]
        batch = max((len(t) for t in rows if len(t) != 1), default=1)
        split = [
            t.unflatten(1, (o.segments, max(1, o.extent)))
            for t, o in zip(rows, self.polynomial.inputs, strict=True)
        ]
        results: list[Tensor] = []
        for n, operand in enumerate(self.polynomial.outputs):
            shape = (batch, operand.segments, max(1, operand.extent))
            total = rows[0].new_zeros(shape)
            for k, part in enumerate(self.polynomial.products):
                if part.operands[-1] == len(split) + n:
                    total = self._added(total, k, split)
            flat = total.flatten(1)
            if n in summed:
                flat = flat.new_zeros((len(shapes[n]), flat.shape[1])).index_add(0, summed[n], flat)
            results.append(flat)
        return results

    def _added(self, total: Tensor, k: int, split: Sequence[Tensor]) -> Tensor:
        """Total (batch, segments, extent) with the products of one kind."""
        part = self.polynomial.products[k]
        segments: Tensor = getattr(self, f"segments_{k}")
        coefficients: Tensor = getattr(self, f"coefficients_{k}").to(total.dtype)
        extent = max(t.shape[2] for t in split)
        chunk = max(1, CHUNK // max(1, len(total) * extent))
        for start in range(0, len(coefficients), chunk):
            piece = slice(start, start + chunk)
            term = coefficients[piece, None]
            for operand, which in zip(part.operands[:-1], segments[:-1, piece], strict=True):
                term = term * split[operand].index_select(1, which)
            if total.shape[2] == 1 and extent > 1:
                term = term.sum(-1, keepdim=True)
            total = total.index_add(1, segments[-1, piece], term.expand(len(total), -1, total.shape[2]))
        return total
