from __future__ import annotations

from pathlib import Path

import pytest
from pydantic import BaseModel, ConfigDict, Field

from compactmlip.config import resolve
from compactmlip.errors import InputError


class Inner(BaseModel):
    model_config = ConfigDict(extra="forbid")
    lr: float = Field(0.1, gt=0)
    epochs: int = 3


class Outer(BaseModel):
    model_config = ConfigDict(extra="forbid")
    seed: int = 0
    name: str | None = None
    inner: Inner = Inner()


def test_precedence_is_defaults_file_set_flags(tmp_path: Path) -> None:
    path = tmp_path / "run.yaml"
    path.write_text("seed: 1\nname: file\ninner:\n  lr: 0.2\n  epochs: 5\n")
    found = resolve(Outer, path, ["inner.lr=0.3", "name=set"], name="flag", seed=None)
    assert found == Outer(seed=1, name="flag", inner=Inner(lr=0.3, epochs=5))


def test_set_reads_yaml_values() -> None:
    assert resolve(Outer, None, ["name=null", "seed=7"]) == Outer(seed=7)


def test_nested_flag() -> None:
    assert resolve(Outer, None, [], inner__epochs=9).inner.epochs == 9


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("sede: 1", "unknown option 'sede'. Did you mean 'seed'"),
        ("inner:\n  epoch: 1", "unknown option 'inner.epoch'. Did you mean 'epochs'"),
        ("seed: many", "seed: Input should be a valid integer"),
        ("inner:\n  lr: -1", "inner.lr: Input should be greater than 0"),
        ("- a\n- b", "expected a YAML mapping"),
        ("seed: [1", "cannot read"),
    ],
)
def test_bad_files(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "run.yaml"
    path.write_text(text)
    with pytest.raises(InputError) as caught:
        resolve(Outer, path, [])
    assert message in str(caught.value)


def test_missing_file(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="cannot read"):
        resolve(Outer, tmp_path / "absent.yaml", [])


def test_empty_file_means_defaults(tmp_path: Path) -> None:
    (tmp_path / "run.yaml").write_text("")
    assert resolve(Outer, tmp_path / "run.yaml", []) == Outer()


@pytest.mark.parametrize("text", ["seed", "seed.deeper=1"])
def test_bad_settings(text: str) -> None:
    with pytest.raises(InputError, match="key=value|not a group"):
        resolve(Outer, None, ["seed=1", text])
