"""A name that cannot be written is refused before anything is read or computed."""

from __future__ import annotations

from pathlib import Path

import pytest
from cli_runs import run_cli


@pytest.mark.parametrize(
    "line",
    [
        "distil none.safetensors --train none.xyz --valid none.xyz --minutes 60",
        "prune none.safetensors --to 8x0 --calibration none.xyz",
        "importance none.safetensors --calibration none.xyz",
        "convert none.safetensors",
        "sample none.xyz",
        "label none.xyz",
        "compile none.safetensors",
    ],
)
def test_of_the_output(
    line: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    code, _, err = run_cli(monkeypatch, capsys, f"{line} -o out.txt")
    assert code == 1 and "out.txt" in err and "choose such a name" in err
    assert not list(tmp_path.iterdir())
