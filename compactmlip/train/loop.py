"""The training loop."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn.utils import clip_grad_norm_

from compactmlip.errors import CompactMLIPError
from compactmlip.progress import Track
from compactmlip.train.board import Board
from compactmlip.train.dataset import Dataset, LabelledBatch
from compactmlip.train.loss import loss_terms, number_of_entries, residuals
from compactmlip.train.metrics import dataset_residuals, summarise
from compactmlip.train.options import TrainOptions
from compactmlip.train.ranks import current_ranks
from compactmlip.train.rate import learning_rate, peak_rate
from compactmlip.train.state import RunFolder, TrainingState

CHECK_EVERY = 16
"""Steps between looks at the loss: each look waits for the device."""

TRAINING_COST, VALIDATION_SHARE = 5.0, 0.1
"""Cost of a training step over an evaluation; share of the time that validations may take."""


def fit(
    state: TrainingState,
    train: Dataset,
    valid: Dataset,
    options: TrainOptions,
    folder: RunFolder,
    *,
    title: str = "train",
    progress: bool = True,
    clock: Callable[[], float] = time.monotonic,
) -> None:
    """Train until the budget is used or the validation loss stops improving.

    Under ``torchrun`` the processes share the work (:mod:`compactmlip.train.ranks`).

    ``state`` is changed in place and saved in ``folder``; ``state.counters.stopped`` says why the
    training ended, and a state that has ended is left alone.  Each epoch is one pass over shuffled
    batches, followed by a validation of the averaged weights.  When the loss is no longer finite, the
    training goes back to the last validation with half the learning rate.

    Raises
    ------
    CompactMLIPError
        If the loss is not finite at the start, or again after ``options.retries`` such attempts.
    KeyboardInterrupt
        After the state has been saved.
    """
    if state.counters.stopped is not None:
        return
    run = _Run(state, train, valid, options, folder, clock)
    with run.board:
        _train(run, title, progress)
    run.save()


def _train(run: _Run, title: str, progress: bool) -> None:
    state = run.state
    begin = run.used()
    with Track(title, 100 * (1 - begin), "%", enabled=progress and run.ranks.first) as track:
        run.report = lambda note: track.advance(100 * (run.used() - begin) - track.done, note)
        try:
            if not state.counters.history and not run.validate(run.new_meter()):
                raise CompactMLIPError("the model to train gives energies or forces that are not finite.")
            while state.counters.stopped is None:
                if run.epoch():
                    state.counters.stopped = run.reason_to_stop()
                else:
                    run.go_back()
        except KeyboardInterrupt:
            run.save_interrupted()
            raise


@dataclass
class _Meter:
    """Speed of the training since the last validation."""

    began: float
    atoms: int = 0

    def rate(self, now: float) -> float:
        """Atoms per second."""
        return self.atoms / max(now - self.began, 1e-9)


class _Run:
    """What one call of :func:`fit` shares between its steps."""

    def __init__(
        self,
        state: TrainingState,
        train: Dataset,
        valid: Dataset,
        options: TrainOptions,
        folder: RunFolder,
        clock: Callable[[], float],
    ) -> None:
        self.state, self.train, self.valid = state, train, valid
        self.options, self.folder, self.ranks = options, folder, current_ranks()
        self.board = Board(folder.path if options.tensorboard and self.ranks.first else None)
        self.own_clock, self.clock = clock, self.ranks.agreed(clock)
        self.report: Callable[[str], None] = lambda note: None
        self.device = next(state.model.parameters()).device
        self.own_start = clock() - state.counters.elapsed
        self.start = self.last_save = self.clock()
        self.start -= state.counters.elapsed
        self.updating, self.errors = False, ""
        self.good = state.snapshot()
        self.plan = self.shuffled()
        edges = sum(len(train.structures[k].graph.centers) for batch in self.plan for k in batch)
        share = valid.num_edges / max(TRAINING_COST * edges, 1)
        self.validate_every = max(1, math.ceil(share / VALIDATION_SHARE))

    def shuffled(self) -> list[NDArray[np.int64]]:
        """Batches of the present epoch."""
        options = self.options
        seed = (options.seed, self.state.counters.epoch)
        return self.train.batches(options.batch_atoms, options.batch_edges, seed)

    def new_meter(self) -> _Meter:
        """Start to measure the speed."""
        return _Meter(self.clock())

    def used(self) -> float:
        """Fraction of the budget that is used, 0 to 1."""
        now, options = self.state.counters, self.options
        epochs = (now.epoch + now.batch / len(self.plan)) / (options.max_epochs or math.inf)
        minutes = (self.clock() - self.start) / 60 / (options.max_minutes or math.inf)
        return min(max(epochs, minutes), 1.0)

    def epoch(self) -> bool:
        """Train to the end of the present epoch or of the budget; false if the loss diverged."""
        now = self.state.counters
        self.plan, meter = self.shuffled(), self.new_meter()
        while now.batch < len(self.plan) and self.used() < 1:
            indices = self.plan[now.batch]
            self.step(indices, self.rate())
            meter.atoms += sum(self.train.structures[k].num_atoms for k in indices)
            if now.batch % CHECK_EVERY == 0 and not self.look(meter):
                return False
        if not self.look(meter):
            return False
        if self.used() >= 1 or (now.epoch + 1) % self.validate_every == 0:
            return self.validate(meter)
        self.next_epoch()
        return True

    def rate(self) -> float:
        """Learning rate of the present step."""
        now = self.state.counters
        now.peak_lr = now.peak_lr or peak_rate(self.options, now.history[0], self.valid)
        return learning_rate(self.used(), now.peak_lr, self.options) * now.lr_factor * now.plateau_factor

    def with_hessian(self, batch: LabelledBatch) -> LabelledBatch:
        """Leave those Hessian labels in a batch that the present step uses."""
        now, number = self.state.counters, self.options.hessian_directions
        due = now.steps % self.options.hessian_every == 0
        return batch.with_hessian(now.epoch * number, number if due else 0)

    def next_epoch(self) -> None:
        """Count an epoch."""
        now = self.state.counters
        self.updating = True
        now.epoch, now.batch = now.epoch + 1, 0
        self.updating = False

    def step(self, indices: NDArray[np.int64], lr: float) -> None:
        """Take one step of the optimiser on some structures."""
        state = self.state
        parameters = [p for p in state.model.parameters() if p.requires_grad]
        state.optimizer.zero_grad(set_to_none=True)
        terms = self.gradients(indices, parameters)
        norm = clip_grad_norm_(parameters, self.options.clip, foreach=True)
        for group in state.optimizer.param_groups:
            group["lr"] = lr
        self.updating = True
        state.optimizer.step()
        state.average.update(state.model)
        state.add(terms, norm, lr)
        self.updating = False

    def gradients(self, indices: NDArray[np.int64], parameters: Sequence[nn.Parameter]) -> Tensor:
        """Leave the gradient of the loss in the parameters, and return its terms."""
        whole = [self.train.structures[k] for k in indices]
        numbers: list[int] | None = None
        own: Sequence[int] = range(len(indices))
        if self.ranks.size > 1:
            counts = [number_of_entries(self.with_hessian(s)) for s in whole]
            numbers = [sum(column) for column in zip(*counts, strict=True)]
            own = self.ranks.share([s.num_atoms for s in whole])
        found = torch.zeros(4, dtype=torch.float64, device=self.device)
        if own:
            batch = self.with_hessian(self.train.batch(indices[list(own)])).to(self.device)
            errors = residuals(self.state.model, batch, create_graph=True)
            terms = loss_terms(errors, self.options, numbers)
            # Not towards the edge vectors, which the forces were derivatives of.
            terms.total.backward(inputs=list(parameters))
            found = terms.stacked()
        return self.ranks.sum_gradients(parameters, found)

    def look(self, meter: _Meter) -> bool:
        """Show the progress, save when it is time; false if the loss is not finite."""
        if not bool(self.state.sums.isfinite().all()):
            return False
        now = self.state.counters
        loss, rate = self.state.means()[0], meter.rate(self.clock())
        last = f", valid. {now.history[-1]['valid_loss']:.3g}" if now.history else ""
        self.report(f"epoch {now.epoch + 1}, loss {loss:.3g}{last}, {rate:.0f} atoms/s {self.errors}")
        if self.clock() - self.last_save >= 60 * self.options.checkpoint_minutes:
            self.save()
        return True

    def validate(self, meter: _Meter) -> bool:
        """Validate the averaged weights, which ends the epoch; false if they diverged."""
        state, now = self.state, self.state.counters
        rate = meter.rate(self.clock())
        found = dataset_residuals(state.average.model, self.valid, ranks=self.ranks)
        terms = loss_terms(found, self.options).stacked().tolist()
        if not math.isfinite(sum(terms)):
            return False
        errors = summarise(found, self.valid)
        loss, norm = state.means()
        self.updating = True
        if now.history:
            now.epoch, now.batch = now.epoch + 1, 0
        now.elapsed = self.clock() - self.start
        row = {"epoch": now.epoch, "steps": now.steps, "minutes": round(now.elapsed / 60, 4)}
        row |= {"lr": now.lr, "atoms_per_s": round(rate, 2)}
        row |= {"loss": loss, "gradient_norm": norm, "valid_loss": sum(terms)}
        names = ("valid_energy", "valid_forces", "valid_stress", "valid_hessian")
        row |= dict(zip(names[: len(found.parts)], terms, strict=False))
        now.history.append(row | errors.row())
        if now.best_loss is None or sum(terms) < now.best_loss:
            state.keep_best(sum(terms))
        elif self.on_plateau():
            now.plateau_factor, now.plateau_epoch = (
                now.plateau_factor * self.options.plateau_factor,
                now.epoch,
            )
        state.forget_means()
        self.good = state.snapshot()
        self.updating = False
        self.errors = str(errors)
        if self.ranks.first:
            self.folder.write_history(now.history)
        self.board.add(now.history[-1])
        return True

    def on_plateau(self) -> bool:
        """Whether it is time for a smaller learning rate."""
        now, options = self.state.counters, self.options
        since = now.epoch - max(now.best_epoch, now.plateau_epoch)
        return options.schedule == "plateau" and since > options.plateau_patience

    def reason_to_stop(self) -> str | None:
        """Why the training ends here, if it does."""
        now, options = self.state.counters, self.options
        if options.max_epochs is not None and now.epoch >= options.max_epochs:
            return f"all {options.max_epochs} epochs done"
        if self.used() >= 1:
            return f"the {options.max_minutes:g} minutes are used"
        if options.patience is not None and now.epoch - now.best_epoch >= options.patience:
            return f"no better validation loss for {options.patience} epochs"
        return None

    def go_back(self) -> None:
        """Return to the last validation with half the learning rate."""
        retries, factor = self.state.counters.retries + 1, self.state.counters.lr_factor / 2
        if retries > self.options.retries:
            raise CompactMLIPError(
                f"the loss became infinite or NaN in epoch {self.state.counters.epoch + 1}, again after "
                f"{self.options.retries} restarts with half the learning rate. Use a smaller lr or clip, "
                "and look for frames with extreme forces."
            )
        self.state.restore(self.good)
        self.state.counters.retries, self.state.counters.lr_factor = retries, factor

    def save(self) -> None:
        """Write the resume file and the history."""
        self.state.counters.elapsed = self.clock() - self.start
        self.last_save = self.clock()
        if self.ranks.first:
            self.folder.save(self.state.snapshot())

    def save_interrupted(self) -> None:
        """Save after an interruption; one amid an update would leave half-updated weights."""
        if self.updating:
            self.state.restore(self.good)
        # Other processes may be gone: their agreement cannot be waited for.
        self.state.counters.elapsed = self.own_clock() - self.own_start
        if self.ranks.first:
            self.folder.save(self.state.snapshot())
