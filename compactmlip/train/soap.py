"""SOAP: Adam in the eigenbasis of the gradients.

N. Vyas et al., "SOAP: Improving and stabilizing Shampoo using Adam", arXiv:2409.11321 (2024), algorithm 3.
The weights of an equivariant network are small matrices between channels, for which an eigenbasis costs
little beside a step through the network, and the directions in which the loss is steep mix channels.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn

SIDES = ("left", "right")

SHIFT = 1e-6
"""Of the trace: added to the diagonal of a moment.  Directions in which there is almost no gradient keep
their axes, instead of some that only rounding decides."""

FIRST_REFINEMENTS = 10
"""Of the bases of the first gradient."""


class Soap(torch.optim.Optimizer):
    """Adam of the gradients seen in the eigenbases of their own second moments.

    For a matrix W with gradient G these are moving averages of G G^T (``left``) and G^T G (``right``).
    Matrices that differ in leading axes, as those of the species of MACE, share them.  A side with one
    entry, or with more than ``largest``, keeps its axes; vectors are left to Adam.

    The first step only looks: nothing can be averaged over it.

    Parameters
    ----------
    params
        Weights, or groups of them.
    lr
        Learning rate; like Adam's, the size of a step in each component.
    betas
        Memory of the gradient and of its square.
    beta_basis
        Memory of the second moments that define the bases.
    eps
        Added to the root of the square.
    weight_decay
        Decoupled, per step and learning rate.
    every
        Steps from one refinement of the bases (a step of orthogonal iteration) to the next.
    largest
        Axes longer than this have no basis: it would take time with the third power.
    """

    def __init__(
        self,
        params: Iterable[nn.Parameter],
        lr: float,
        *,
        betas: tuple[float, float] = (0.95, 0.95),
        beta_basis: float = 0.95,
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        every: int = 10,
        largest: int = 256,
    ) -> None:
        options = {"lr": lr, "betas": betas, "beta_basis": beta_basis, "eps": eps}
        super().__init__(
            params, {**options, "weight_decay": weight_decay, "every": every, "largest": largest}
        )

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Move all weights that have a gradient."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            for weight in group["params"]:
                if weight.grad is None:
                    continue
                state = self.state[weight]
                if state:
                    _move(weight, weight.grad, state, group)
                else:
                    _begin(weight.grad, state, group)
        return loss


def _begin(gradient: Tensor, state: dict[str, Any], group: dict[str, Any]) -> None:
    """First bases and empty moments, all contiguous: a copy from a file is, and has to give the same bits."""
    state["step"] = torch.zeros(())
    for name in ("exp_avg", "exp_avg_sq"):
        state[name] = torch.zeros_like(gradient, memory_format=torch.contiguous_format)
    if gradient.ndim < 2:
        return
    for side, size in zip(SIDES, gradient.shape[-2:], strict=True):
        if 1 < size <= group["largest"]:
            state[side] = _moment(gradient, side) * (1 - group["beta_basis"])
            state[f"{side}_basis"] = torch.eye(size, dtype=gradient.dtype, device=gradient.device)
            for _ in range(FIRST_REFINEMENTS):
                _refine(side, state)


def _move(weight: Tensor, gradient: Tensor, state: dict[str, Any], group: dict[str, Any]) -> None:
    """One step of Adam in the present bases, which are then brought up to date."""
    beta1, beta2 = group["betas"]
    state["step"] += 1
    count = float(state["step"])
    seen = _turned(gradient, state)
    state["exp_avg"].lerp_(seen, 1 - beta1)
    state["exp_avg_sq"].mul_(beta2).addcmul_(seen, seen, value=1 - beta2)
    root = (state["exp_avg_sq"] / (1 - beta2**count)).sqrt_().add_(group["eps"])
    if group["weight_decay"]:
        weight.mul_(1 - group["lr"] * group["weight_decay"])
    weight.add_(_turned_back(state["exp_avg"] / root, state), alpha=-group["lr"] / (1 - beta1**count))
    sides = [side for side in SIDES if side in state]
    for side in sides:
        state[side].lerp_(_moment(gradient, side), 1 - group["beta_basis"])
    if sides and count % group["every"] == 0:
        average = _turned_back(state["exp_avg"], state)
        for side in sides:
            _refine(side, state)
        state["exp_avg"] = _turned(average, state).contiguous()


def _moment(gradient: Tensor, side: str) -> Tensor:
    """(m, m) or (n, n) second moment of gradients (..., m, n), summed over all other axes."""
    g = gradient.reshape(-1, *gradient.shape[-2:])
    rows = g.transpose(0, 1).flatten(1) if side == "left" else g.flatten(0, 1).T
    return rows @ rows.T


def _turned(x: Tensor, state: dict[str, Any]) -> Tensor:
    """Components in the bases."""
    left, right = (state.get(f"{side}_basis") for side in SIDES)
    x = x if left is None else left.T @ x
    return x if right is None else x @ right


def _turned_back(x: Tensor, state: dict[str, Any]) -> Tensor:
    """Inverse of :func:`_turned`."""
    left, right = (state.get(f"{side}_basis") for side in SIDES)
    x = x if left is None else left @ x
    return x if right is None else x @ right.T


def _refine(side: str, state: dict[str, Any]) -> None:
    """One step of orthogonal iteration; the squares follow the order of the basis."""
    moment, basis = state[side], state[f"{side}_basis"]
    product = moment @ basis
    order = (basis * product).sum(dim=0).argsort(descending=True)
    axis = -2 if side == "left" else -1
    state["exp_avg_sq"] = state["exp_avg_sq"].index_select(axis, order)
    shifted = product + SHIFT * moment.trace() * basis
    state[f"{side}_basis"] = torch.linalg.qr(shifted[:, order]).Q.contiguous()
