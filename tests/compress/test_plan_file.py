"""Plans as files."""

from __future__ import annotations

from pathlib import Path

import pytest

from compactmlip.compress.plan_file import Plan
from compactmlip.errors import InputError


def test_round_trip_has_one_line_per_layer(tmp_path: Path) -> None:
    plan = Plan.uniform("8x0+4x1,6x0", 2, edge_order=2, made_by={"budget": "parameters=20%"})
    path = plan.save(tmp_path / "plan.json")
    assert Plan.load(path) == plan
    assert plan.target == "8x0+4x1,6x0"
    assert plan.channels == ((8, 4), (6,))
    lines = [line.strip(" ,") for line in path.read_text().splitlines()]
    assert '"8x0+4x1"' in lines and '"6x0"' in lines
    assert "odd_paths" not in path.read_text(), "defaults are left out"


def test_paths_are_sorted_one_per_line(tmp_path: Path) -> None:
    names = ["layers.1.path/1-0-1", "layers.0.path/0-1-1", "layers.1.path/1-0-1"]
    plan = Plan.uniform("8x0", 2, without_paths=names)
    path = plan.save(tmp_path / "plan.json")
    assert Plan.load(path) == plan and plan.without_paths == tuple(sorted(set(names)))
    assert plan.summary == "8x0,8x0, without 2 paths"
    assert Plan.uniform("8x0", 1, edge_order=1, without_paths=names[:1]).summary.endswith(
        "<= 1, without 1 path"
    )
    lines = [line.strip(" ,") for line in path.read_text().splitlines()]
    assert '"layers.0.path/0-1-1"' in lines and '"layers.1.path/1-0-1"' in lines


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "cannot read"),
        ("[1]", "expected a plan"),
        ("{}", "layers"),
        ('{"layers": ["8x0"], "lawyers": 1}', "lawyers"),
        ('{"layers": ["8of0"]}', "cannot read channels"),
        ('{"layers": ["8x0"], "version": 2}', "version"),
    ],
)
def test_what_is_wrong_is_said(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "plan.json"
    path.write_text(text)
    with pytest.raises(InputError, match=message):
        Plan.load(path)


def test_missing_file(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="cannot read the plan"):
        Plan.load(tmp_path / "none.json")
