"""State of a training run, and the folder where it is kept between interruptions.

The order of the batches is a function of seed and epoch, and nothing else in the training is random,
so weights, averages, optimiser moments and a few counters are the whole state.
"""

from __future__ import annotations

import copy
import csv
import hashlib
import json
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from compactmlip.checkpoint import atomic_write
from compactmlip.errors import CheckpointError, InputError
from compactmlip.models import model_spec
from compactmlip.train.dataset import Dataset
from compactmlip.train.ema import WeightAverage
from compactmlip.train.options import BOOKKEEPING, TrainOptions
from compactmlip.train.soap import Soap

STATE_FILE, HISTORY_FILE = "last.state.safetensors", "history.csv"
HEADER_KEY, STATE_VERSION = "compactmlip_training", 2


@dataclass
class Counters:
    """Where a run stands, apart from tensors; stored as JSON."""

    epoch: int = 0
    batch: int = 0
    steps: int = 0
    elapsed: float = 0.0
    lr: float = 0.0
    peak_lr: float = 0.0
    lr_factor: float = 1.0
    retries: int = 0
    best_loss: float | None = None
    best_epoch: int = 0
    plateau_factor: float = 1.0
    plateau_epoch: int = 0
    history: list[dict[str, float]] = field(default_factory=list)
    stopped: str | None = None


@dataclass(frozen=True)
class Snapshot:
    """A copy of a state."""

    tensors: dict[str, Tensor]
    average_steps: int
    counters: Counters


class TrainingState:
    """Everything that changes during training.

    Attributes
    ----------
    model
        What is trained.
    average
        Moving average of its weights.
    best
        Averaged weights at the lowest validation loss.
    optimizer
        As the options say: :class:`compactmlip.train.soap.Soap` or AdamW.
    counters
        See :class:`Counters`.
    sums
        (6,) loss terms, gradient norm and one, added up over the steps since the last validation.
    """

    def __init__(self, model: nn.Module, options: TrainOptions) -> None:
        self.model = model
        self.average = WeightAverage(model, options.ema_decay)
        self.best = _copies(self.average.model)
        self.optimizer = make_optimizer(model, options)
        self.counters = Counters()
        self.sums = torch.zeros(6, dtype=torch.float64, device=next(model.parameters()).device)

    def add(self, terms: Tensor, gradient_norm: Tensor, lr: float) -> None:
        """Count one finished step with these loss terms (4,)."""
        norm = gradient_norm.detach().double().reshape(1)
        self.sums = self.sums + torch.cat([terms, norm, torch.ones_like(norm)])
        self.counters.batch += 1
        self.counters.steps += 1
        self.counters.lr = lr

    def means(self) -> tuple[float, float]:
        """Loss and gradient norm, averaged since the last validation."""
        *terms, norm, count = self.sums.tolist()
        return (sum(terms) / count, norm / count) if count else (math.nan, math.nan)

    def forget_means(self) -> None:
        """Begin new averages."""
        self.sums = torch.zeros_like(self.sums)

    def keep_best(self, loss: float) -> None:
        """Remember the averaged weights and their validation loss."""
        self.best = _copies(self.average.model)
        self.counters.best_loss, self.counters.best_epoch = loss, self.counters.epoch

    def snapshot(self) -> Snapshot:
        """Copy everything."""
        tensors = {f"model/{name}": t for name, t in _copies(self.model).items()}
        tensors |= {f"average/{name}": t for name, t in _copies(self.average.model).items()}
        tensors |= {f"best/{name}": t.clone() for name, t in self.best.items()}
        for k, moments in self.optimizer.state_dict()["state"].items():
            tensors |= {f"optimizer/{k}/{name}": t.detach().clone() for name, t in moments.items()}
        tensors["sums"] = self.sums.clone()
        return Snapshot(tensors, self.average.steps, copy.deepcopy(self.counters))

    @torch.no_grad()
    def restore(self, snapshot: Snapshot) -> None:
        """Go back to a snapshot, which is not changed by what follows."""
        moments: dict[int, dict[str, Tensor]] = {}
        for name, parameter in self.model.named_parameters():
            parameter.copy_(snapshot.tensors[f"model/{name}"])
        for name, parameter in self.average.model.named_parameters():
            parameter.copy_(snapshot.tensors[f"average/{name}"])
            self.best[name] = snapshot.tensors[f"best/{name}"].to(parameter.device, copy=True)
        for name, tensor in snapshot.tensors.items():
            kind, _, rest = name.partition("/")
            if kind == "optimizer":
                k, _, moment = rest.partition("/")
                moments.setdefault(int(k), {})[moment] = tensor.clone()
        groups = self.optimizer.state_dict()["param_groups"]
        self.optimizer.load_state_dict({"state": moments, "param_groups": groups})
        self.average.steps = snapshot.average_steps
        self.sums = snapshot.tensors["sums"].to(self.sums.device, copy=True)
        self.counters = copy.deepcopy(snapshot.counters)


def make_optimizer(model: nn.Module, options: TrainOptions) -> torch.optim.Optimizer:
    """Optimiser of all weights of a model."""
    weights, decay = model.parameters(), options.weight_decay
    lr = options.lr or 1.0  # the loop sets it in each step
    if options.optimizer == "soap":
        return Soap(weights, lr, weight_decay=decay)
    return torch.optim.AdamW(weights, lr, weight_decay=decay, amsgrad=options.amsgrad, foreach=True)


def make_folder(path: Path) -> None:
    """Make the folder of a run.

    Raises
    ------
    InputError
        If that is not possible.
    """
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"cannot create the folder {path}: {error.strerror or error}.") from error


class RunFolder:
    """Folder of a run: the resume file and the history.

    Parameters
    ----------
    path
        Created if it does not exist.
    identity
        Digest of all that determines the result, see :func:`fingerprint`.
    """

    def __init__(self, path: str | Path, identity: str) -> None:
        self.path, self.identity = Path(path), identity
        make_folder(self.path)

    def save(self, snapshot: Snapshot) -> None:
        """Write the resume file and the history, each atomically."""
        header = {
            "version": STATE_VERSION,
            "fingerprint": self.identity,
            "average_steps": snapshot.average_steps,
            "counters": asdict(snapshot.counters),
        }
        tensors = {name: t.cpu().contiguous() for name, t in snapshot.tensors.items()}
        metadata = {HEADER_KEY: json.dumps(header)}
        atomic_write(self.path / STATE_FILE, lambda p: save_file(tensors, str(p), metadata=metadata))
        self.write_history(snapshot.counters.history)

    def load(self) -> Snapshot | None:
        """Read the resume file; None if there is none.

        Raises
        ------
        InputError
            If the folder holds another run.
        CheckpointError
            If the file is damaged or of a newer version.
        """
        path = self.path / STATE_FILE
        if not path.exists():
            return None
        try:
            with safe_open(str(path), framework="pt") as file:
                header = json.loads((file.metadata() or {})[HEADER_KEY])
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
            version = header["version"]
            if version == STATE_VERSION:
                counters = Counters(**header["counters"])
        except (SafetensorError, OSError, KeyError, ValueError, TypeError) as error:
            raise CheckpointError(f"{path}: not a readable training state ({error}). Delete it.") from error
        if version != STATE_VERSION:
            raise CheckpointError(
                f"{path}: training state of version {version}; this release reads "
                f"version {STATE_VERSION}. Finish the run with the release that began it."
            )
        if header["fingerprint"] != self.identity:
            raise InputError(
                f"{self.path} holds a training run with another model, other frames or other options. "
                f"Choose another folder, or delete {STATE_FILE} there to start anew."
            )
        return Snapshot(tensors, header["average_steps"], counters)

    def write_history(self, rows: Sequence[dict[str, float]]) -> None:
        """Write one line per validation."""

        def write(path: Path) -> None:
            with path.open("w", newline="") as file:
                writer = csv.DictWriter(file, list(rows[0]) if rows else [])
                writer.writeheader()
                writer.writerows(rows)

        atomic_write(self.path / HISTORY_FILE, write)


def fingerprint(model: nn.Module, datasets: Sequence[Dataset], options: TrainOptions, *more: Any) -> str:
    """Digest of model, data, options and whatever else counts: the same digest means the same run."""
    spec = model_spec(model)
    settings = options.model_dump(mode="json", exclude=set(BOOKKEEPING))
    digest = hashlib.sha256(json.dumps([spec.to_json(), settings, *more], sort_keys=True).encode())
    tensors = list(model.state_dict().values())
    for dataset in datasets:
        if dataset.draw is not None:
            digest.update(json.dumps(dataset.draw.groups).encode())
        for s in dataset.structures:
            graph = (s.graph.species, s.graph.centers, s.graph.neighbors, s.graph.vectors, s.graph.volumes)
            tensors += [*graph, s.energies, s.forces, s.stresses]
            tensors += [t for t in (s.with_forces, s.weights) if t is not None]
            tensors += [] if s.hessian is None else [s.hessian.directions, s.hessian.products]
    for tensor in tensors:
        digest.update(str(tuple(tensor.shape)).encode())
        digest.update(tensor.detach().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()


def _copies(model: nn.Module) -> dict[str, Tensor]:
    return {name: p.detach().clone() for name, p in model.named_parameters()}
