"""The optimiser: what it is invariant to, and Adam where it has no bases."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from compactmlip.errors import InputError
from compactmlip.train.options import TrainOptions
from compactmlip.train.soap import Soap
from compactmlip.train.state import make_optimizer

LossFunction = Callable[[Tensor], Tensor]


def _rotation(size: int, seed: int) -> Tensor:
    x = torch.randn(size, size, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return torch.linalg.qr(x).Q


def _valley(decades: float) -> LossFunction:
    """Of a (6, 5) matrix: steep and shallow directions that mix rows and columns."""
    left = torch.logspace(0, decades, 6, dtype=torch.float64).diag() @ _rotation(6, 1)
    right = _rotation(5, 2) @ torch.logspace(0, decades, 5, dtype=torch.float64).diag()
    return lambda w: (left @ (w - 1) @ right).square().mean()


def _minimise(
    loss: LossFunction,
    weight: Tensor,
    make: Callable[[list[nn.Parameter]], torch.optim.Optimizer],
    steps: int,
) -> Tensor:
    parameter = nn.Parameter(weight.clone())
    optimizer = make([parameter])
    for _ in range(steps):
        optimizer.zero_grad()
        loss(parameter).backward()
        optimizer.step()
    return parameter.detach()


def _start(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


def test_finds_the_bottom_of_a_valley_that_is_not_along_the_axes() -> None:
    loss, start = _valley(1.5), _start(6, 5)
    soap = _minimise(loss, start, lambda p: Soap(p, 0.02), 400)
    adam = _minimise(loss, start, lambda p: torch.optim.AdamW(p, 0.02, weight_decay=0), 400)
    assert loss(soap) < 0.05 * loss(adam) < 0.05 * loss(start)


def test_hardly_depends_on_the_axes() -> None:
    """It does as well in rotated weights, once its bases have been found; Adam does not."""
    loss, start = _valley(1.0), _start(6, 5)
    left, right = _rotation(6, 1), _rotation(5, 2)  # along the axes of the valley
    ratios = []
    for make in (lambda p: Soap(p, 0.02), lambda p: torch.optim.AdamW(p, 0.02, weight_decay=0)):
        plain = _minimise(loss, start, make, 100)
        turned = _minimise(lambda w: loss(left.T @ w @ right.T), left @ start @ right, make, 100)
        ratios.append(float(loss(left.T @ turned @ right.T) / loss(plain)))
    assert ratios[0] == pytest.approx(1, abs=0.01) and abs(ratios[1] - 1) > 0.5


@pytest.mark.parametrize(
    ("shape", "largest"), [((7,), 256), ((6, 5), 1), ((3, 6, 5), 4), ((1, 1), 256), ((), 256)]
)
@pytest.mark.parametrize("decay", [0.0, 0.1])
def test_is_adam_where_it_has_no_bases(shape: tuple[int, ...], largest: int, decay: float) -> None:
    """But for the first step, in which it only looks."""
    scales = torch.linspace(1, 30, max(int(torch.tensor(shape).prod()), 1), dtype=torch.float64).reshape(
        shape
    )

    def loss(w: Tensor) -> Tensor:
        return (scales * (w - 1).square()).sum()

    start = _start(*shape)
    options = {"betas": (0.9, 0.99), "weight_decay": decay}
    found = _minimise(loss, start, lambda p: Soap(p, 0.01, largest=largest, **options), 21)
    expected = _minimise(loss, start, lambda p: torch.optim.AdamW(p, 0.01, **options), 20)
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)
    assert not torch.equal(found, start)


def test_matrices_in_leading_axes_share_their_bases() -> None:
    """Two equal ones move as one of them does."""
    loss, start = _valley(0.3), _start(6, 5)
    one = _minimise(loss, start, lambda p: Soap(p, 0.02), 30)
    two = _minimise(
        lambda w: loss(w[0]) + loss(w[1]), torch.stack([start, start]), lambda p: Soap(p, 0.02), 30
    )
    torch.testing.assert_close(two[0], two[1], rtol=0, atol=0)
    torch.testing.assert_close(two[0], one, rtol=0, atol=1e-6)


def test_one_side_of_a_long_matrix_has_a_basis() -> None:
    weight = nn.Parameter(_start(4, 30))
    optimizer = Soap([weight], 0.01, largest=10)
    weight.square().sum().backward()
    optimizer.step()
    assert {"left", "left_basis"} <= set(optimizer.state[weight])
    assert not any(name.startswith("right") for name in optimizer.state[weight])


def test_weights_without_gradient_stay() -> None:
    used, unused, zero = (nn.Parameter(_start(4, 3)) for _ in range(3))
    optimizer = Soap([used, unused, zero], 0.01)
    for _ in range(25):
        optimizer.zero_grad()
        (used.square().sum() + 0 * zero.sum()).backward()
        optimizer.step()
    assert torch.equal(unused, _start(4, 3)) and torch.equal(zero, _start(4, 3))
    assert used.isfinite().all() and not torch.equal(used, _start(4, 3))


def test_goes_on_from_its_state() -> None:
    loss, start = _valley(0.3), _start(6, 5)
    whole = _minimise(loss, start, lambda p: Soap(p, 0.02), 33)
    parameter = nn.Parameter(start.clone())
    saved = None
    for part in (14, 19):
        parameter = nn.Parameter(parameter.detach().clone())
        optimizer = Soap([parameter], 0.02)
        if saved is not None:
            optimizer.load_state_dict(saved)
        for _ in range(part):
            optimizer.zero_grad()
            loss(parameter).backward()
            optimizer.step()
        saved = copy.deepcopy(optimizer.state_dict())
    assert torch.equal(parameter, whole)


def test_gradients_that_are_not_finite_do_not_stop_it() -> None:
    """The training loop sees them in the loss, and goes back."""
    weight = nn.Parameter(_start(4, 3))
    optimizer = Soap([weight], 0.01)
    for _ in range(12):
        weight.grad = torch.full_like(weight, torch.nan)
        optimizer.step()
    assert weight.isnan().all()


def test_options_choose_the_optimiser() -> None:
    model = nn.Linear(3, 2)
    assert isinstance(make_optimizer(model, TrainOptions()), Soap)
    assert make_optimizer(model, TrainOptions(weight_decay=0.5)).param_groups[0]["weight_decay"] == 0.5
    adam = make_optimizer(model, TrainOptions(optimizer="adamw", amsgrad=True))
    assert isinstance(adam, torch.optim.AdamW) and adam.param_groups[0]["amsgrad"]
    with pytest.raises(InputError, match="amsgrad is a variant of adamw"):
        TrainOptions.parse(amsgrad=True)
