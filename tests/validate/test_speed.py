"""Speed compares models, not engines."""

from __future__ import annotations

import torch

from compactmlip import checkpoint
from compactmlip.deploy.compile import compile_model
from compactmlip.kernels import build
from compactmlip.validate.run import _same_engine


def test_a_teacher_is_timed_with_the_engine_of_the_model(small_model, tmp_path, monkeypatch):
    """Beside a plain deployed file it runs without kernels, beside a checkpoint with them."""
    source = checkpoint.save(small_model, tmp_path / "model.safetensors")
    compile_model(source, tmp_path / "plain.pt", dtype="float64")
    monkeypatch.setattr(build, "load", lambda: True)
    x = torch.zeros(1)
    assert build.usable(x)
    with _same_engine(tmp_path / "plain.pt"):
        assert not build.usable(x)
    with _same_engine(source):
        assert build.usable(x)
    assert build.usable(x)
