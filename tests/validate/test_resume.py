"""A validation that was stopped continues where it was, and only then."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest
from ase import Atoms
from ase.build import bulk

from compactmlip.validate.options import ValidateOptions
from compactmlip.validate.resume import FOLDER, Parts, identity


def test_parts_are_computed_once(tmp_path: Path) -> None:
    calls: list[int] = []

    def compute() -> tuple[np.ndarray, Atoms]:
        calls.append(1)
        return np.arange(3.0) / 7, bulk("Cu")

    first = Parts(tmp_path, "a").of("x", compute)
    again = Parts(tmp_path, "a").of("x", compute)
    assert len(calls) == 1 and np.array_equal(first[0], again[0]) and first[1] == again[1]
    Parts(tmp_path, "b").of("x", compute)
    assert len(calls) == 2, "parts of another run"
    parts = Parts(tmp_path, "b")
    parts.finish()
    assert not (tmp_path / FOLDER).exists() and len(calls) == 2


def test_a_failed_part_leaves_the_others(tmp_path: Path) -> None:
    parts = Parts(tmp_path, "a")
    assert parts.of("first", lambda: 1) == 1
    with pytest.raises(KeyboardInterrupt):
        parts.of("second", _interrupted)
    parts = Parts(tmp_path, "a")
    assert parts.of("first", _interrupted) == 1 and parts.of("second", lambda: 2) == 2


def _interrupted() -> int:
    raise KeyboardInterrupt


def test_parts_of_another_user_are_not_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """They may hold code."""
    Parts(tmp_path, "a").of("x", lambda: 1)
    monkeypatch.setattr(os, "getuid", lambda: -1)
    assert Parts(tmp_path, "a").of("x", lambda: 2) == 2


def test_identity(tmp_path: Path) -> None:
    """Files, structures, labels and options all count."""
    model, other = tmp_path / "a", tmp_path / "b"
    model.write_bytes(b"1")
    other.write_bytes(b"2")
    labelled = bulk("Cu")
    labelled.info["REF_energy"] = -3.5
    relabelled = labelled.copy()
    relabelled.info["REF_energy"] = -3.6
    options = ValidateOptions()
    runs = [
        ([model, model], [bulk("Cu")], options),
        ([model, other], [bulk("Cu")], options),
        ([model, model], [bulk("Cu", a=3.7)], options),
        ([model, model], [labelled], options),
        ([model, model], [relabelled], options),
        ([model, model], [bulk("Cu")], ValidateOptions(seed=1)),
    ]
    found = [identity(*run) for run in runs]
    assert len(set(found)) == len(runs) and found == [identity(*run) for run in runs]
