"""How a model was made, as far as files tell: the importance of its teacher's channels, and a search."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from compactmlip import checkpoint
from compactmlip.compress.scores_file import load_scores
from compactmlip.compress.tapped import Scores
from compactmlip.errors import CheckpointError, InputError
from compactmlip.models import channel_graph, model_spec
from compactmlip.spec import ModelSpec


class Candidate(BaseModel):
    """One architecture of a search, as far as the report shows it."""

    model_config = ConfigDict(frozen=True, extra="ignore")
    relative_time: float = Field(gt=0)
    force_mae_meV_per_A: float = Field(ge=0)


class Front(BaseModel):
    """What ``compactmlip search`` writes into ``front.json``."""

    model_config = ConfigDict(frozen=True, extra="ignore")
    chosen: Candidate
    front: tuple[Candidate, ...]
    candidates: tuple[Candidate, ...]


@dataclass(frozen=True)
class Making:
    """For the report.

    Attributes
    ----------
    scores, criterion
        Importance of the teacher's channels by channel group, and the criterion's name.
    kept
        Channels that the model still has, by channel group.
    front
        Of the search.
    """

    scores: Scores = field(default_factory=dict)
    criterion: str = ""
    kept: dict[str, int] = field(default_factory=dict)
    front: Front | None = None


def read_making(spec: ModelSpec, teacher: Path, scores: Path | None, front: Path | None) -> Making | None:
    """Read what the files tell; None where there are none.

    Parameters
    ----------
    spec
        Of the model.
    teacher
        Its checkpoint; scores must be of this architecture.
    scores
        Written by ``compactmlip importance``, ``search`` or ``specialize``.
    front
        ``front.json`` of ``compactmlip search``.

    Raises
    ------
    CheckpointError
        If a file cannot be read.
    InputError
        If scores belong to another architecture, or the teacher is no checkpoint.
    """
    if scores is None and front is None:
        return None
    found: dict[str, Any] = {}
    if scores is not None:
        if teacher.suffix != ".safetensors":
            raise InputError(
                f"{scores}: scores are those of a checkpoint; give the teacher as *.safetensors."
            )
        original = checkpoint.load(teacher)
        values, header = load_scores(scores, original)
        # Where layers were cut as well, the names no longer stand for the same ones.
        same = spec.num_message_passing_layers == model_spec(original).num_message_passing_layers
        kept = {name: group.size for name, group in channel_graph(spec).groups.items()} if same else {}
        found = {"scores": values, "criterion": str(header.get("criterion", "importance")), "kept": kept}
    return Making(front=_read_front(front) if front else None, **found)


def _read_front(path: Path) -> Front:
    try:
        return Front.model_validate_json(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, ValidationError) as error:
        raise CheckpointError(f"{path}: not a front.json of 'compactmlip search': {error}") from error
