"""Speed compares models, not engines."""

from __future__ import annotations

import pytest
import torch

from compactmlip import checkpoint
from compactmlip.deploy.archive import inspect
from compactmlip.deploy.compile import compile_model
from compactmlip.kernels import build
from compactmlip.validate.run import _same_engine


def test_a_teacher_is_timed_with_the_engine_of_the_model(small_model, tmp_path, monkeypatch):
    """Beside a plain deployed file it runs without kernels, beside a checkpoint with them."""
    given = {"model": object(), "teacher": object()}
    source = checkpoint.save(small_model, tmp_path / "model.safetensors")
    compile_model(source, tmp_path / "plain.pt", dtype="float64")
    monkeypatch.setattr(build, "load", lambda: True)
    x = torch.zeros(1)
    assert build.usable(x)
    with _same_engine({"model": tmp_path / "plain.pt", "teacher": source}, given) as found:
        assert not build.usable(x) and found == given
    with _same_engine({"model": source, "teacher": source}, given) as found:
        assert build.usable(x) and found == given
    assert build.usable(x)


@pytest.mark.usefixtures("kernels")
def test_beside_a_lowered_model_the_teacher_is_lowered(small_model, tmp_path):
    source = checkpoint.save(small_model, tmp_path / "model.safetensors")
    compile_model(source, tmp_path / "fast.pt", dtype="float64", backend="kernels")
    given = {"model": object(), "teacher": object()}
    with _same_engine({"model": tmp_path / "fast.pt", "teacher": source}, given) as found:
        assert found["model"] is given["model"]
        deployed = inspect(found["teacher"].parameters["model"])[1]
        assert deployed.backend == "kernels" and deployed.tables is not None
