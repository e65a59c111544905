"""Run the command line in this process, as a user types it."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch
from ase import Atoms
from ase.build import bulk
from torch import nn

from compactmlip import cli


def crystals(count: int, key: str, *values: str) -> list[Atoms]:
    """Rattled MgO, with ``info[key]`` going around the values."""
    frames = []
    for k in range(count):
        atoms = bulk("MgO", "rocksalt", a=4.21, cubic=True)
        atoms.rattle(0.1, seed=k)
        atoms.info[key] = values[k % len(values)]
        frames.append(atoms)
    return frames


def model_and_truth(
    make_spec: Callable[..., Any], make_model: Callable[..., nn.Module]
) -> tuple[nn.Module, nn.Module]:
    """A small model of five species, and one whose energies differ from its by a tenth."""
    spec = make_spec(channels=(4, 3), num_layers=2, lmax_edge=1, cutoff=3.2)
    model, truth = make_model(spec, seed=3), make_model(spec, seed=3)
    with torch.no_grad():
        truth.readout.weight.mul_(1.1)
    return model, truth


def run_cli(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], line: str
) -> tuple[int, str, str]:
    """Exit status, output and errors of ``compactmlip LINE``."""
    monkeypatch.setattr(sys, "argv", ["compactmlip", *line.split()])
    code = 0
    try:
        cli.main()
    except SystemExit as stop:
        code = int(stop.code or 0)
    captured = capsys.readouterr()
    return code, captured.out, captured.err
