"""Run the command line in this process, as a user types it."""

from __future__ import annotations

import sys

import pytest

from compactmlip import cli


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
