"""The gate as one operator, for evaluation; its reference is :func:`compactmlip.models.gate.gate`."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from compactmlip.kernels.build import usable
from compactmlip.models.gate import SIGMOID_GAIN, gate as gate_reference, normalised_sigmoid
from compactmlip.models.linear import SILU_GAIN, normalised_silu


def gate(x: Sequence[Tensor | None], out: Sequence[int], *, sigmoid: bool = False) -> list[Tensor | None]:
    """Activate scalars, and multiply channels of order > 0 by their activated gate scalar.

    Parameters
    ----------
    x
        Per order (N, 2l+1, channels), which may be views whose channels are neighbours in memory:
        the scalars followed by the gates of order 1, 2, ..., then the features of those orders.
    out
        Channels of the result, per order.
    sigmoid
        Activate gates with a sigmoid instead of SiLU; both have unit second moment.

    Returns
    -------
    list
        Per order (N, 2l+1, channels), None where there are none.  The compiled operator can be
        differentiated once; it takes at most six orders above 0.

    Raises
    ------
    RuntimeError
        If shapes do not fit, or a second derivative is asked for.
    """
    scalars = x[0]
    assert scalars is not None
    present = [l for l in range(1, len(out)) if out[l] and l < len(x) and x[l] is not None]
    features = [part for l in present if (part := x[l]) is not None]
    if not usable(scalars, *features):
        return gate_reference(x, out, normalised_sigmoid if sigmoid else normalised_silu)
    # The reference passes over orders without features and over scalars that nothing reads.
    needed = out[0] + sum(out[l] for l in present)
    gain = SIGMOID_GAIN if sigmoid else SILU_GAIN
    values = torch.ops.compactmlip.gate(scalars[..., :needed], features, out[0], sigmoid, SILU_GAIN, gain)
    result: list[Tensor | None] = [None] * len(out)
    result[0] = values[0] if out[0] else None
    for l, value in zip(present, values[1:], strict=True):
        result[l] = value
    return result
