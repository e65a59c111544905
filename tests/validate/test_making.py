"""Pictures of how a model was made, from the files of other commands."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from torch import nn

from compactmlip import checkpoint
from compactmlip.compress.importance import importance
from compactmlip.compress.scores_file import save_scores
from compactmlip.errors import CheckpointError, InputError
from compactmlip.models import model_spec
from compactmlip.validate.making import Front, read_making
from compactmlip.validate.report import build_report


def candidate(time: float, error: float) -> dict[str, Any]:
    """Entry of front.json, with more in it than is read."""
    return {"relative_time": time, "force_mae_meV_per_A": error, "parameters": 1, "plan": {}}


@pytest.fixture
def front(tmp_path: Path) -> Path:
    best = [candidate(0.1, 40.0), candidate(0.3, 15.0)]
    content = {"chosen": best[0], "front": best, "candidates": [*best, candidate(0.2, 60.0)], "target": {}}
    path = tmp_path / "front.json"
    path.write_text(json.dumps(content))
    return path


def test_scores_and_what_is_kept(
    small_model: nn.Module, make_model: Any, make_spec: Any, tmp_path: Path
) -> None:
    teacher = tmp_path / "teacher.safetensors"
    checkpoint.save(small_model, teacher)
    path = save_scores(
        tmp_path / "s.safetensors",
        importance(small_model, [], "magnitude"),
        small_model,
        criterion="magnitude",
    )
    smaller = make_model(make_spec(channels=(4, 2)))
    found = read_making(model_spec(smaller), teacher, path, None)
    assert found is not None and found.criterion == "magnitude" and found.front is None
    assert found.kept["layers.0.out/0"] == 4 and found.kept["layers.0.out/1"] == 2
    assert len(found.scores["layers.0.out/0"]) > 4
    with pytest.raises(InputError, match="another architecture"):
        checkpoint.save(smaller, tmp_path / "other.safetensors")
        read_making(model_spec(smaller), tmp_path / "other.safetensors", path, None)
    with pytest.raises(InputError, match=r"teacher as \*.safetensors"):
        read_making(model_spec(smaller), tmp_path / "teacher.pt", path, None)
    assert read_making(model_spec(smaller), teacher, None, None) is None


def test_front(small_model: nn.Module, front: Path, tmp_path: Path) -> None:
    found = read_making(model_spec(small_model), tmp_path / "none.pt", None, front)
    assert found is not None and found.front is not None and len(found.front.candidates) == 3
    for text in ("{", "[]", json.dumps({"front": []})):
        front.write_text(text)
        with pytest.raises(CheckpointError, match=r"front\.json"):
            read_making(model_spec(small_model), tmp_path / "none.pt", None, front)
    with pytest.raises(CheckpointError, match=r"not a front\.json"):
        read_making(model_spec(small_model), tmp_path / "none.pt", None, tmp_path / "missing.json")


def test_in_the_report(evidence: Any, small_model: nn.Module, front: Path) -> None:
    certificate, data = evidence()
    assert "How it was cut" not in build_report(certificate, data)
    spec = model_spec(small_model)
    found = read_making(spec, front.with_name("none.pt"), None, front)
    assert found is not None
    html = build_report(certificate, replace(data, making=found))
    assert "How it was cut" in html and "figure-front" in html and "figure-importance" not in html
    scored = replace(found, scores=importance(small_model, [], "magnitude"), criterion="magnitude", kept={})
    html = build_report(certificate, replace(data, making=scored))
    assert "figure-importance" in html and "(magnitude)" in html
    # A front without a measured speed of the teacher has no dot for this file.
    slow = certificate.model_copy(update={"speed": ()})
    with_dot, without = (build_report(c, replace(data, making=found)) for c in (certificate, slow))
    assert with_dot.count(">this file<") == 1 and ">this file<" not in without


def test_one_point_is_a_front() -> None:
    one = Front.model_validate({"chosen": candidate(1, 0), "front": [candidate(1, 0)], "candidates": []})
    assert np.isclose(one.chosen.relative_time, 1)
