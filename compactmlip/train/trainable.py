"""What is trained: frozen parameters, and low-rank updates of frozen weights."""

from __future__ import annotations

from collections.abc import Sequence
from fnmatch import fnmatchcase

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from compactmlip.errors import InputError, did_you_mean
from compactmlip.models.linear import ScaledWeight


def freeze(model: nn.Module, patterns: Sequence[str]) -> list[str]:
    """Let only those parameters be trained that no pattern names; return the names of the frozen ones.

    Patterns are names of parameters or of modules, with the wildcards of file names ("layers.0",
    "layers.*.radial*"); "!" before a pattern lets train what it names after all, and later patterns win.

    Raises
    ------
    InputError
        If a pattern names nothing, or nothing is left to train.
    """
    names = [name for name, _ in model.named_parameters()]
    frozen: set[str] = set()
    for pattern in patterns:
        wanted = pattern.removeprefix("!")
        hit = {n for n in names if fnmatchcase(n, wanted) or fnmatchcase(n, f"{wanted}.*")}
        if not hit:
            tops = sorted({".".join(n.split(".")[:2]) for n in names})
            raise InputError(
                f"--freeze {pattern}: no parameter is called so. The model has {', '.join(tops)}."
                f"{did_you_mean(wanted, tops)}"
            )
        frozen = frozen - hit if pattern.startswith("!") else frozen | hit
    if len(frozen) == len(names):
        raise InputError("--freeze leaves nothing to train; let a part of the model train with '!pattern'.")
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name not in frozen)
    return sorted(frozen)


class LowRank(nn.Module):
    """Adds the product of two thin matrices to a weight (..., in, out), for each of its leading axes.

    The second one begins as zero, so that nothing changes before the training (LoRA, Hu et al.,
    arXiv:2106.09685).
    """

    def __init__(self, weight: Tensor, rank: int, generator: torch.Generator) -> None:
        super().__init__()
        *lead, fan_in, fan_out = weight.shape
        start = torch.randn(*lead, fan_in, rank, generator=generator, dtype=torch.float64) * rank**-0.5
        self.inner = nn.Parameter(start.to(weight))
        self.outer = nn.Parameter(weight.new_zeros(*lead, rank, fan_out))

    def forward(self, weight: Tensor) -> Tensor:
        """Return the changed weight."""
        return weight + self.inner @ self.outer


def add_low_rank(model: nn.Module, rank: int, seed: int = 0) -> int:
    """Freeze a model and give each of its dense weights a trainable update of a low rank, in place.

    Weights on which such an update would not have fewer numbers than the weight itself train as they are.

    Returns
    -------
    int
        Number of trained parameters.

    Raises
    ------
    InputError
        If no weight is large enough for this rank.
    """
    generator = torch.Generator().manual_seed(seed)
    model.requires_grad_(False)
    changed = 0
    for module in list(model.modules()):
        if not isinstance(module, ScaledWeight) or module.weight.ndim < 2:
            continue
        fan_in, fan_out = module.weight.shape[-2:]
        if rank * (fan_in + fan_out) < fan_in * fan_out:
            update = LowRank(module.weight, rank, generator)
            parametrize.register_parametrization(module, "weight", update, unsafe=True)
            changed += 1
        else:
            module.weight.requires_grad_(True)
    if not changed:
        raise InputError(f"no weight of the model is large enough for updates of rank {rank}; lower --lora.")
    return sum(p.numel() for p in model.parameters() if p.requires_grad)


def merge_low_rank(model: nn.Module) -> nn.Module:
    """Write low-rank updates into the weights, in place, and return the model."""
    for module in list(model.modules()):
        if parametrize.is_parametrized(module, "weight"):
            parametrize.remove_parametrizations(module, "weight", leave_parametrized=True)
    return model
