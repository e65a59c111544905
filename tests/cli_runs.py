"""Run the command line in this process, as a user types it."""

from __future__ import annotations

import sys

import pytest
from ase import Atoms
from ase.build import bulk

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
