"""Gated non-linearity: scalars pass through SiLU, other orders are multiplied by activated scalars."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from compactmlip.channels import Channels
from compactmlip.models.linear import normalised_silu

SIGMOID_GAIN = 1.8467055342154763
"""1 / sqrt(E[sigmoid(z)^2]) for standard normal z, as upstream samples it."""


def normalised_sigmoid(x: Tensor) -> Tensor:
    """Sigmoid with unit second moment under a standard normal input."""
    return torch.sigmoid(x) * SIGMOID_GAIN


def gate_input_channels(out: Sequence[int]) -> Channels:
    """Channels that the gate reads: scalars, then one gate scalar per channel of order > 0."""
    if not out:
        return ()
    return (sum(out), *out[1:])


def gate(
    x: Sequence[Tensor | None],
    out: Sequence[int],
    gate_activation: Callable[[Tensor], Tensor] = normalised_silu,
) -> list[Tensor | None]:
    """SiLU on scalars; channels of order > 0 are multiplied by their activated gate scalar.

    ``x[0]`` holds the scalars followed by the gates of order 1, 2, ...  The SiLU has unit second moment.
    """
    scalars = x[0]
    assert scalars is not None
    result: list[Tensor | None] = [normalised_silu(scalars[..., : out[0]]) if out[0] else None]
    start = out[0]
    for l in range(1, len(out)):
        features = x[l] if l < len(x) else None
        if not out[l] or features is None:
            result.append(None)
            continue
        result.append(features * gate_activation(scalars[..., start : start + out[l]]))
        start += out[l]
    return result
