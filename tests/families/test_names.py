"""Names of foundation models: the table against mace-torch, licences, and which importer gets a file."""

from __future__ import annotations

import ast
import importlib.metadata
import io
import re
import sys
import types
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from typer.testing import CliRunner

import compactmlip.families as families
from compactmlip import checkpoint
from compactmlip.cli import app
from compactmlip.errors import CheckpointError, DownloadError, InputError, LicenceError
from compactmlip.families import fetch as fetch_function, load_model
from compactmlip.families.names import (
    FAMILIES,
    LICENCES,
    NAMED_CHECKPOINTS,
    WebFile,
    find_named,
    recognise,
    require_licence,
)
from compactmlip.models import model_spec

MACE = [entry for entry in NAMED_CHECKPOINTS if entry.family == "mace"]


@pytest.fixture(scope="module")
def upstream() -> tuple[dict[str, str], set[str]]:
    """Addresses by short name, and addresses under the ASL, read from mace-torch without importing it."""
    try:
        package = importlib.metadata.distribution("mace-torch")
    except importlib.metadata.PackageNotFoundError:
        pytest.skip("mace-torch is not installed")
    text = Path(str(package.locate_file("mace/calculators/foundations_models.py"))).read_text()
    tables: dict[str, dict[str, str]] = {}
    restricted: set[str] = set()
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name):
            name = node.targets[0].id
            if name in ("mace_mp_urls", "mace_off_urls", "urls"):
                tables[name] = ast.literal_eval(node.value)
            elif name == "ASL_checkpoint_urls":
                restricted = {
                    tables["mace_mp_urls"][ast.literal_eval(item.slice)]
                    for item in ast.walk(node.value)
                    if isinstance(item, ast.Subscript)
                }
    off = {f"off:{key}": url for key, url in tables["mace_off_urls"].items()}
    return tables["mace_mp_urls"] | off | tables["urls"], restricted | set(off.values()) | set(
        tables["urls"].values()
    )


def test_all_models_of_mace_torch(upstream: tuple[dict[str, str], set[str]]) -> None:
    addresses, restricted = upstream
    ours = {entry.source: entry for entry in MACE}
    assert len(addresses) == 20 and set(addresses.values()) <= ours.keys()
    assert {url for url in addresses.values() if ours[url].licence == "MIT"}.isdisjoint(restricted)
    # Free are the models made from Materials Project data only.
    free = {entry.name for entry in MACE if entry.licence == "MIT"}
    assert all(re.match(r"mace-(mp|mpa)-0", name) for name in free)
    for short, url in addresses.items():
        if not short.startswith("off:") and short not in ("small", "medium", "large"):
            assert find_named(short) is ours[url], short


def test_names_are_unambiguous() -> None:
    words = [word.lower() for entry in NAMED_CHECKPOINTS for word in (entry.name, *entry.aliases)]
    assert len(words) == len(set(words)) and len(MACE) >= 22
    assert len({entry.source for entry in NAMED_CHECKPOINTS}) == len(NAMED_CHECKPOINTS)
    for entry in NAMED_CHECKPOINTS:
        assert all(find_named(word.upper()) is entry for word in (entry.name, *entry.aliases))
        assert entry.citation and entry.licence in LICENCES and entry.family in FAMILIES
        assert entry.sha256 is None or re.fullmatch("[0-9a-f]{64}", entry.sha256)
        if isinstance(entry.origin, WebFile):
            assert re.fullmatch(r"https://[\w./-]+\.model", entry.origin.url)
    assert find_named("nonsense") is None and find_named("medium") is None


def test_every_mace_citation_names_a_paper() -> None:
    assert all("arXiv:2206.07697" in e.citation and e.citation.count("arXiv") >= 2 for e in MACE)
    by_name = {entry.name: entry.citation for entry in MACE}
    assert "2401.00096" in by_name["mace-mp-0-medium"] and "2312.15211" in by_name["mace-off23-small"]


@pytest.mark.parametrize(
    ("name", "hint"),
    [
        ("7net-l3i6", "Did you mean '7net-l3i5'"),
        ("mace-off23-smal", "Did you mean 'mace-off23-small'"),
        ("medium-mpa0", "Did you mean 'medium-mpa-0'"),
        ("medium", "either of mace-mp-0-medium, mace-off23-medium"),
    ],
)
def test_unknown_name(name: str, hint: str) -> None:
    with pytest.raises(InputError) as caught:
        load_model(name)
    message = str(caught.value)
    assert hint in message and "SevenNet: 7net-l3i5, " in message
    assert "mace-mp-0-{small,medium,large}, " in message and "'compactmlip models'" in message
    assert len(message) < 900


def test_list_of_models() -> None:
    result = CliRunner().invoke(app, ["models"])
    lines = result.output.splitlines()
    assert result.exit_code == 0 and len(lines) == len(NAMED_CHECKPOINTS) + len(LICENCES)
    for entry, line in zip(NAMED_CHECKPOINTS, lines, strict=False):
        assert line.split()[:3] == [entry.name, FAMILIES[entry.family], entry.licence]
        assert line.endswith(entry.source)
    assert "does not permit commercial use; accept with --accept-licence ASL" in lines[-1]


RESTRICTED = [entry for entry in NAMED_CHECKPOINTS if entry.licence == "ASL"]


@pytest.fixture
def no_download(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names that were about to be fetched."""
    asked: list[str] = []

    def refuse(entry: Any, *, progress: bool) -> Path:
        asked.append(entry.name)
        raise DownloadError("no network in this test.")

    assert families.fetch is fetch_function
    monkeypatch.setattr(families, "fetch", refuse)
    return asked


@pytest.mark.parametrize("entry", RESTRICTED, ids=lambda e: e.name)
def test_licence_comes_before_the_download(entry: Any, no_download: list[str]) -> None:
    for accepted in (None, "MIT", "", False, True):
        with pytest.raises(
            LicenceError, match=r"Academic Software License \(ASL, https://github.com/gabor1/ASL"
        ):
            load_model(entry.name, accept_licence=accepted)  # type: ignore[arg-type]
    assert no_download == []
    with pytest.raises(DownloadError):
        load_model(entry.name, accept_licence="asl")
    assert no_download == [entry.name]


def test_free_licence_is_not_asked_for(no_download: list[str]) -> None:
    with pytest.raises(DownloadError):
        load_model("mace-mp-0-medium")
    assert no_download == ["mace-mp-0-medium"]


@pytest.mark.parametrize(
    "line",
    [
        "convert mace-off23-small",
        "label mgo.xyz --teacher mace-off23-small",
        "sample mgo.xyz --teacher mace-off23-small",
        "prune mace-off23-small --calibration mgo.xyz",
        "specialize mgo.xyz --teacher mace-off23-small -o run --json",
        "quickstart --teacher mace-off23-small -o run --json",
    ],
)
def test_licence_on_the_command_line(
    line: str, no_download: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each command that loads a teacher refuses at first, and goes on in the same folder when it is told."""
    import ase.io
    from ase.build import bulk

    monkeypatch.chdir(tmp_path)
    ase.io.write("mgo.xyz", bulk("MgO", "rocksalt", a=4.21))
    refused = CliRunner().invoke(app, line.split())
    assert isinstance(refused.exception, LicenceError) and "--accept-licence ASL" in str(refused.exception)
    assert no_download == []
    accepted = CliRunner().invoke(app, [*line.split(), "--accept-licence", "ASL"])
    assert isinstance(accepted.exception, DownloadError) and no_download == ["mace-off23-small"]


class _Importer:
    """Stands in for the MACE importer: remembers what it was called with."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.calls: list[tuple[Path, Any, str | None]] = []
        self.error: Exception | None = None

    def load_checkpoint(self, path: Path, provenance: Any, modality: str | None = None) -> nn.Module:
        self.calls.append((path, provenance, modality))
        if self.error is not None:
            raise self.error
        return self.model


@pytest.fixture
def importer(
    monkeypatch: pytest.MonkeyPatch, make_spec: Callable[..., Any], make_model: Callable[..., nn.Module]
) -> _Importer:
    stand_in = _Importer(make_model(make_spec(channels=(4, 2), num_layers=2, lmax_edge=1)))
    stub = types.ModuleType("compactmlip.families.mace")
    stub.load_checkpoint = stand_in.load_checkpoint  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, stub.__name__, stub)
    monkeypatch.setattr(families, "mace", stub, raising=False)
    return stand_in


def _whole_model(path: Path, module: bytes = b"mace.modules.models") -> Path:
    """A zip archive whose pickle names a class, as torch.save writes whole models."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        archive.writestr("archive/data.pkl", b"\x80\x02c" + module + b"\nScaleShiftMACE\n)\x81.")
        archive.writestr("archive/version", b"3\n")
    path.write_bytes(buffer.getvalue())
    return path


def test_named_model_goes_to_its_importer(
    importer: _Importer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "cached"
    path.write_bytes(b"weights")
    monkeypatch.setattr(families, "fetch", lambda entry, progress: path)
    model = load_model("mh-1", modality="omat_pbe", accept_licence="ASL")
    ((found, provenance, modality),) = importer.calls
    assert found == path and modality == "omat_pbe"
    assert provenance.name == "mace-mh-1 (omat_pbe)" and provenance.licence == "ASL"
    assert provenance.parent_sha256 == checkpoint.sha256(path)
    assert provenance.source.endswith("mace-mh-1.model") and "2510.25380" in provenance.citation
    assert [(s.action, s.options) for s in provenance.steps] == [("import", {"modality": "omat_pbe"})]
    assert next(model.parameters()).dtype == torch.float32


@pytest.mark.parametrize("name", ["mine.model", "mine.pt", "mine"])
def test_unnamed_mace_file(importer: _Importer, tmp_path: Path, name: str) -> None:
    path = _whole_model(tmp_path / name)
    load_model(path, modality="head")
    ((found, provenance, modality),) = importer.calls
    assert (found, modality, provenance.licence) == (path, "head", "unknown")
    assert (provenance.name, provenance.source) == ("mine", name)


def test_suffix_of_mace_is_enough(importer: _Importer, tmp_path: Path) -> None:
    """Damaged files too: the importer says what is wrong with them."""
    (tmp_path / "cut.model").write_bytes(b"cut")
    load_model(tmp_path / "cut.model")
    assert len(importer.calls) == 1


def test_state_dict_that_is_not_from_sevennet(importer: _Importer, tmp_path: Path) -> None:
    torch.save({"weights": torch.zeros(2)}, tmp_path / "state.pth")
    load_model(tmp_path / "state.pth")
    assert len(importer.calls) == 1
    importer.error = CheckpointError("state.pth: no MACE model.")
    with pytest.raises(
        CheckpointError, match=r"not a SevenNet checkpoint; .* MACE model: state.pth: no MACE model"
    ):
        load_model(tmp_path / "state.pth")


def test_state_dict_of_mace_under_sevennets_keys(importer: _Importer, tmp_path: Path) -> None:
    content = {"config": {"r_max": 5.0}, "model_state_dict": {"w": torch.zeros(2)}}
    torch.save(content, tmp_path / "state.pth")
    load_model(tmp_path / "state.pth")
    assert len(importer.calls) == 1


def test_objects_of_other_programs_are_refused(importer: _Importer, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="refused"):
        load_model(_whole_model(tmp_path / "other.pth", b"fairchem.core.models"))
    assert importer.calls == []


@pytest.mark.parametrize("name", ["MACE-OFF23_small.model", "MACEOFF23_smallmodel", "mace-off23-small.model"])
def test_published_file_keeps_its_licence(importer: _Importer, tmp_path: Path, name: str) -> None:
    """Downloaded in a browser, by mace-torch (which drops punctuation), or copied from the cache."""
    path = _whole_model(tmp_path / name)
    with pytest.raises(LicenceError):
        load_model(path)
    assert importer.calls == []
    load_model(path, accept_licence="ASL")
    ((_, provenance, _),) = importer.calls
    assert provenance.licence == "ASL" and provenance.name == "mace-off23-small"
    assert provenance.source.startswith(f"{name}, by its file name: https://")


def test_recognised_by_digest() -> None:
    entry = find_named("7net-0")
    assert entry is not None and entry.sha256 is not None
    assert recognise("renamed.pth", entry.sha256) is entry
    assert recognise("checkpoint_sevennet_0.pth", "0" * 64) is None


def test_converted_model_is_not_asked_again(
    tmp_path: Path, make_spec: Callable[..., Any], make_model: Callable[..., nn.Module]
) -> None:
    spec = make_spec(channels=(4, 2), num_layers=2, lmax_edge=1)
    provenance = spec.provenance.model_copy(update={"licence": "ASL"})
    path = checkpoint.save(
        make_model(spec.model_copy(update={"provenance": provenance})), tmp_path / "a.safetensors"
    )
    assert model_spec(load_model(path)).provenance.licence == "ASL"


def test_acceptance_says_which_licence() -> None:
    (entry,) = [e for e in MACE if e.name == "mace-omol-0-extra-large"]
    with pytest.raises(
        LicenceError, match=r"(?s)mace-omol-0-extra-large.*not permit commercial.*accept_licence='ASL'"
    ):
        require_licence(entry, None)
    require_licence(entry, "ASL")
