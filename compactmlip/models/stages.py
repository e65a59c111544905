"""A model's forward pass as a sequence of stages, for closed-form refits.

A stage is one sum of maps that are linear in their weights, for instance ``down(messages) + skip(x)``.
Walking the stages of a model and of its pruned copy side by side lets each stage of the copy be fitted
to the original's output, given the copy's own inputs.  A family offers ``start(model, batch)``, the state
before the first stage, and ``linear_stages(model)``.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Generic, Literal, TypeVar

import torch
from torch import Tensor, nn

from compactmlip.models.linear import EquivariantLinear, ScaledWeight

Features = list[Tensor | None]
"""Per order l: (n_nodes, 2l+1, channels), or None."""

Kind = Literal["shared", "species", "channel"]

StateT = TypeVar("StateT")
"""What one batch carries from stage to stage; its content is the family's business."""


@dataclass(frozen=True)
class Fit(Generic[StateT]):
    """Weights of one order l in a stage that least squares may change.

    With design X, change W of the effective weights and a node's species z, the stage's sum changes by

    ===========  ==================  =====================  ==============================================
    kind         X                   W                      change of the sum
    ===========  ==================  =====================  ==============================================
    "shared"     (n_nodes, 2l+1, p)  (p, q)                 ``X @ W``
    "species"    (n_nodes, 2l+1, p)  (species, p, q)        ``X @ W[z]``
    "channel"    (n, 2l+1, p, q)     (species, p, q)        ``X[..., c] @ W[z, :, c]`` for each channel c
    ===========  ==================  =====================  ==============================================

    Attributes
    ----------
    order
        l.
    kind
        See above.
    parameter
        Name of a parameter of the model whose last axis is the output channels.  Where channels of it
        were cut, the same channels of the original's sum are left out of the goal.
    design
        ``design(state)``: X.  It does not depend on weights that this stage may change.
    apply
        ``apply(W)``: add to the model's weights in place; W is float64.
    inputs
        Names of the parameters whose last axis but one, one after the other, are the columns p of the
        design; empty for kind "channel".
    """

    order: int
    kind: Kind
    parameter: str
    design: Callable[[StateT], Tensor]
    apply: Callable[[Tensor], None]
    inputs: tuple[str, ...] = ()


@dataclass(frozen=True)
class Stage(Generic[StateT]):
    """One sum of maps.  What nobody may refit simply is part of the sum.

    Attributes
    ----------
    name
        For messages.
    fits
        At most one per order.  Two for the same order need two stages, the first of which advances to
        an unchanged state.
    evaluate
        ``evaluate(state)``: the sum that the model computes now.
    advance
        ``advance(state, sum)``: the state before the next stage.
    """

    name: str
    fits: tuple[Fit[StateT], ...]
    evaluate: Callable[[StateT], Features]
    advance: Callable[[StateT, Features], StateT]

    def __post_init__(self) -> None:
        orders = [fit.order for fit in self.fits]
        if len(set(orders)) < len(orders):
            raise ValueError(f"stage '{self.name}' has two fits of one order")


def linear_fits(
    model: nn.Module, maps: Sequence[tuple[str, Callable[[StateT], Features]]]
) -> tuple[Fit[StateT], ...]:
    """Fits of a sum of :class:`EquivariantLinear` maps, one for each order that has weights.

    Parameters
    ----------
    model
        Where the maps are.
    maps
        Name of each map in the model, and a function that gives its input features.  Either all of
        them have weights per species or none.
    """
    modules = {name: _linear_map(model, name) for name, _ in maps}
    per_species = {module.per_species for module in modules.values()}
    assert len(per_species) == 1, f"{list(modules)}: weights per species and shared ones in one fit"
    kind: Kind = "species" if per_species == {True} else "shared"
    orders = sorted({int(key) for module in modules.values() for key in module.orders})
    return tuple(_linear_fit(modules, dict(maps), kind, l) for l in orders)


def _linear_fit(
    modules: dict[str, EquivariantLinear],
    inputs: dict[str, Callable[[StateT], Features]],
    kind: Kind,
    l: int,
) -> Fit[StateT]:
    names = [name for name, module in modules.items() if str(l) in module.orders]
    weights = [_weight(modules[name], l) for name in names]

    def design(state: StateT) -> Tensor:
        features = (inputs[name](state)[l] for name in names)
        return torch.cat([f for f in features if f is not None], dim=-1)

    def apply(change: Tensor) -> None:
        rows = [weight.weight.shape[-2] for weight in weights]
        for weight, part in zip(weights, change.split(rows, dim=-2), strict=True):
            add_to_weight(weight, part)

    parameters = tuple(f"{name}.orders.{l}.weight" for name in names)
    return Fit(l, kind, parameters[0], design, apply, parameters)


@torch.no_grad()
def add_to_weight(block: ScaledWeight, change: Tensor) -> None:
    """Add a change of the effective weight (factor times parameter)."""
    block.weight.add_((change / block.scale.double()).to(block.weight.dtype))


def _linear_map(model: nn.Module, name: str) -> EquivariantLinear:
    module = model.get_submodule(name)
    assert isinstance(module, EquivariantLinear)
    return module


def _weight(linear: EquivariantLinear, l: int) -> ScaledWeight:
    block = linear.orders[str(l)]
    assert isinstance(block, ScaledWeight)
    return block
