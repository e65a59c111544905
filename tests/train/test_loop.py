"""Training: it learns, it resumes to the same result, it stops when it should, and it survives NaN."""

from __future__ import annotations

import csv
import itertools
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from ase import Atoms
from torch import nn

from compactmlip import checkpoint
from compactmlip.errors import CheckpointError, CompactMLIPError, InputError
from compactmlip.train import loop
from compactmlip.train.dataset import Dataset
from compactmlip.train.distil import BEST_FILE, DistilOptions, DistilResult, distil
from compactmlip.train.ema import WeightAverage
from compactmlip.train.metrics import evaluate
from compactmlip.train.options import TrainOptions
from compactmlip.train.rate import learning_rate
from compactmlip.train.state import HISTORY_FILE, STATE_FILE


def options(**changes: Any) -> DistilOptions:
    defaults = {"max_epochs": 4, "batch_atoms": 8, "lr": 0.01, "dtype": "float64"}
    return DistilOptions.parse(**{**defaults, **changes})


def weights(model: nn.Module) -> torch.Tensor:
    return torch.cat([p.detach().flatten() for p in model.parameters()])


@pytest.fixture
def train(student: nn.Module, frames: list[Atoms], tmp_path: Path) -> Callable[..., DistilResult]:
    """``train(folder="run", clock=..., **options)`` on four frames, validated on the other two."""

    def run(folder: str = "run", clock: Callable[[], float] | None = None, **changes: Any) -> DistilResult:
        more = {} if clock is None else {"clock": clock}
        return distil(
            student, frames[:4], frames[4:], options(**changes), tmp_path / folder, progress=False, **more
        )

    return run


class Interrupt:
    """Stands for a function and raises once, at the given call."""

    def __init__(self, function: Callable[..., Any], at: int, error: BaseException) -> None:
        self.function, self.left, self.error = function, at, error

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        self.left -= 1
        if self.left == 0:
            raise self.error
        return self.function(*args, **kwargs)


def test_tiny_student_overfits_four_structures(
    student: nn.Module, frames: list[Atoms], tmp_path: Path
) -> None:
    four = frames[:4]
    before = evaluate(student, Dataset.from_frames(four, student.spec, torch.float64))
    result = distil(
        student,
        four,
        four,
        options(max_epochs=60, batch_atoms=16, dtype="float32", lr=0.03),
        tmp_path,
        progress=False,
    )
    assert result.errors.forces.mae < before.forces.mae / 5
    assert result.errors.energy.mae < before.energy.mae / 5
    assert result.errors.stress.mae < before.stress.mae / 3


def test_result_is_the_best_average_and_is_saved_with_its_history(
    train: Callable[..., DistilResult], student: nn.Module, frames: list[Atoms], tmp_path: Path
) -> None:
    original = weights(student)
    result = train()
    losses = [row["valid_loss"] for row in result.history]
    best = losses.index(min(losses))
    assert result.best_epoch == result.history[best]["epoch"] and result.best_epoch > 0
    assert result.stopped_because == "all 4 epochs done"
    valid = Dataset.from_frames(frames[4:], student.spec, torch.float64)
    assert evaluate(result.model, valid).forces.mae == pytest.approx(
        result.history[best]["forces_mae_meV_per_A"], rel=1e-12
    )
    assert torch.equal(weights(student), original)

    saved = checkpoint.load(tmp_path / "run" / BEST_FILE)
    assert torch.equal(weights(saved), weights(result.model))
    step = saved.spec.provenance.steps[-1]
    assert step.action == "distil" and step.options["lr"] == 0.01 and step.options["train_frames"] == 4
    with (tmp_path / "run" / HISTORY_FILE).open() as file:
        rows = list(csv.DictReader(file))
    assert [int(row["epoch"]) for row in rows] == [0, 1, 2, 3, 4]
    assert float(rows[-1]["valid_loss"]) == result.history[-1]["valid_loss"]


def test_average_is_returned_not_the_last_weights(
    train: Callable[..., DistilResult], monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[torch.Tensor] = []
    update = WeightAverage.update

    def watched(self: WeightAverage, model: nn.Module) -> None:
        update(self, model)
        seen.append(weights(model))

    monkeypatch.setattr(WeightAverage, "update", watched)
    result = train(ema_decay=0.9)
    steps = int(next(row["steps"] for row in result.history if row["epoch"] == result.best_epoch))
    decay = [min(0.9, n / (n + 10)) for n in range(1, steps + 1)]
    # Average over weights by hand; the start counts with the product of all decays.
    shares = [(1 - decay[k]) * math.prod(decay[k + 1 :]) for k in range(steps)]
    moved = sum(share * w for share, w in zip(shares, seen, strict=False))
    start_share = math.prod(decay)
    start = (weights(result.model) - moved) / start_share
    again = train(folder="none", lr=1e-300, max_epochs=1)
    torch.testing.assert_close(start, weights(again.model), rtol=0, atol=1e-9 / start_share)
    assert not torch.equal(weights(result.model), seen[steps - 1])


def test_same_seed_same_result(train: Callable[..., DistilResult]) -> None:
    first, again, other = train("a"), train("b"), train("c", seed=1)
    assert torch.equal(weights(first.model), weights(again.model))
    assert not torch.equal(weights(first.model), weights(other.model))


@pytest.mark.parametrize("where", ["amid an epoch", "amid an update", "amid a validation"])
@pytest.mark.parametrize("options", [{"optimizer": "soap"}, {"optimizer": "adamw", "amsgrad": True}])
def test_interrupted_run_resumes_to_the_same_weights(
    train: Callable[..., DistilResult], monkeypatch: pytest.MonkeyPatch, where: str, options: dict[str, Any]
) -> None:
    whole = train("whole", **options)
    with monkeypatch.context() as patch:
        if where == "amid an epoch":
            patch.setattr(loop, "residuals", Interrupt(loop.residuals, 6, KeyboardInterrupt()))
        elif where == "amid an update":
            patch.setattr(WeightAverage, "update", Interrupt(lambda *_: None, 1, KeyboardInterrupt()))
        else:
            last = Interrupt(loop.dataset_residuals, 5, KeyboardInterrupt())
            patch.setattr(loop, "dataset_residuals", last)
        with pytest.raises(KeyboardInterrupt):
            train("parts", **options)
    resumed = train("parts", **options)
    assert torch.equal(weights(resumed.model), weights(whole.model))
    keys = set(whole.history[0]) - {"minutes", "atoms_per_s"}
    for a, b in zip(resumed.history, whole.history, strict=True):
        assert {k: a[k] for k in keys} == pytest.approx({k: b[k] for k in keys}, rel=1e-14, nan_ok=True)


def test_lost_process_resumes_from_the_last_checkpoint(
    train: Callable[..., DistilResult], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    whole = train("whole")
    with monkeypatch.context() as patch:
        patch.setattr(loop, "residuals", Interrupt(loop.residuals, 10, MemoryError()))
        with pytest.raises(MemoryError):
            train("parts", checkpoint_minutes=0)
    assert (tmp_path / "parts" / STATE_FILE).exists()
    assert torch.equal(weights(train("parts").model), weights(whole.model))


def test_finished_run_returns_at_once(
    train: Callable[..., DistilResult], monkeypatch: pytest.MonkeyPatch
) -> None:
    first = train()
    monkeypatch.setattr(loop, "residuals", Interrupt(loop.residuals, 1, AssertionError("trained again")))
    again = train()
    assert torch.equal(weights(first.model), weights(again.model))
    assert again.stopped_because == first.stopped_because


@pytest.mark.parametrize("change", [{"lr": 0.02}, {"seed": 3}, {"max_epochs": 5}])
def test_folder_of_another_run_is_refused(train: Callable[..., DistilResult], change: dict[str, Any]) -> None:
    train(max_epochs=1)
    with pytest.raises(InputError, match=r"another model, other frames or other options.*delete"):
        train(**{"max_epochs": 1, **change})


def test_other_frames_are_another_run(train: Callable[..., DistilResult], frames: list[Atoms]) -> None:
    train(max_epochs=1)
    frames[0].arrays["REF_forces"] = frames[0].arrays["REF_forces"] + 0.1
    with pytest.raises(InputError, match="other frames"):
        train(max_epochs=1)


def test_damaged_state_is_reported(train: Callable[..., DistilResult], tmp_path: Path) -> None:
    train(max_epochs=1)
    path = tmp_path / "run" / STATE_FILE
    path.write_bytes(path.read_bytes()[:-10])
    with pytest.raises(CheckpointError, match="not a readable training state"):
        train(max_epochs=1)


def test_early_stopping(train: Callable[..., DistilResult]) -> None:
    result = train(lr=1e-300, max_epochs=50, patience=3)
    assert result.stopped_because == "no better validation loss for 3 epochs"
    assert result.best_epoch == 0 and result.history[-1]["epoch"] == 3


def test_minutes_budget_drives_the_learning_rate_and_survives_an_interruption(
    train: Callable[..., DistilResult], monkeypatch: pytest.MonkeyPatch
) -> None:
    class Clock:
        now = 1000.0

        def __call__(self) -> float:
            self.now += 1.0
            return self.now

    changes = {"max_epochs": None, "max_minutes": 2.0, "checkpoint_minutes": 60.0}
    whole = train("whole", clock=Clock(), **changes)
    assert whole.stopped_because == "the 2 minutes are used"
    assert 2.0 <= whole.history[-1]["minutes"] < 2.4
    rates = [row["lr"] for row in whole.history[1:]]
    assert rates == sorted(rates, reverse=True)
    assert rates[-1] == pytest.approx(0.01 * 0.01, rel=0.5)

    with monkeypatch.context() as patch:
        patch.setattr(loop, "residuals", Interrupt(loop.residuals, 12, KeyboardInterrupt()))
        with pytest.raises(KeyboardInterrupt):
            train("parts", clock=Clock(), **changes)
    resumed = train("parts", clock=Clock(), **changes)
    assert 2.0 <= resumed.history[-1]["minutes"] < 2.4
    assert abs(resumed.history[-1]["steps"] - whole.history[-1]["steps"]) <= 3


def test_budget_that_is_too_short_returns_the_student(
    train: Callable[..., DistilResult], student: nn.Module
) -> None:
    ticks = itertools.count()
    result = train(clock=lambda: float(next(ticks)), max_minutes=0.01)
    assert result.stopped_because == "the 0.01 minutes are used" and result.best_epoch == 0
    assert torch.equal(weights(result.model), weights(student))


def test_schedule() -> None:
    plan = TrainOptions(warmup=0.1, final_lr=0.01)
    assert learning_rate(0.0, 2.0, plan) == pytest.approx(0.02)
    assert learning_rate(0.05, 2.0, plan) == pytest.approx(1.0)
    assert learning_rate(0.1, 2.0, plan) == pytest.approx(2.0)
    assert learning_rate(0.55, 2.0, plan) == pytest.approx(2.0 * 0.505)
    assert learning_rate(1.0, 2.0, plan) == learning_rate(1.5, 2.0, plan) == pytest.approx(0.02)


@pytest.mark.parametrize(
    ("schedule", "middle", "end"), [("linear", 0.505, 0.01), ("exponential", 0.1, 0.01), ("constant", 1, 1)]
)
def test_other_schedules(schedule: Any, middle: float, end: float) -> None:
    plan = TrainOptions(warmup=0.1, final_lr=0.01, schedule=schedule)
    assert learning_rate(0.05, 2.0, plan) == pytest.approx(1.0)
    assert learning_rate(0.1, 2.0, plan) == pytest.approx(2.0)
    assert learning_rate(0.55, 2.0, plan) == pytest.approx(2.0 * middle)
    assert learning_rate(1.0, 2.0, plan) == pytest.approx(2.0 * end)


def test_nan_goes_back_with_half_the_learning_rate(
    train: Callable[..., DistilResult], monkeypatch: pytest.MonkeyPatch
) -> None:
    smooth = train("smooth")
    original, calls = loop.residuals, 0

    def sometimes_nan(*args: Any, **kwargs: Any) -> Any:
        nonlocal calls
        calls += 1
        found = original(*args, **kwargs)
        return type(found)(found.energies * math.nan, found.forces, found.stresses) if calls == 7 else found

    monkeypatch.setattr(loop, "residuals", sometimes_nan)
    result = train("rough")
    assert result.stopped_because == "all 4 epochs done"
    assert weights(result.model).isfinite().all()
    # From the restart on, the rates are half of those of the undisturbed run.
    assert result.history[1]["lr"] == smooth.history[1]["lr"]
    assert result.history[-1]["lr"] == pytest.approx(smooth.history[-1]["lr"] / 2)


def test_divergence_is_an_error(train: Callable[..., DistilResult]) -> None:
    with pytest.raises(CompactMLIPError, match=r"infinite or NaN .* after 2 restarts"):
        train(lr=1e200, retries=2)


def test_broken_student_is_an_error(train: Callable[..., DistilResult], student: nn.Module) -> None:
    with torch.no_grad():
        student.readout.weight.fill_(math.nan)
    with pytest.raises(CompactMLIPError, match="not finite"):
        train()


def test_options_are_checked() -> None:
    with pytest.raises(InputError, match=r"lr: .*; learning_rate: "):
        DistilOptions.parse(learning_rate=1.0, lr=-1.0)
    with pytest.raises(InputError, match="needs an end"):
        DistilOptions.parse(max_epochs=None)
