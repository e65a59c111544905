"""Trust regions: what is scored, in the file and in ASE; which atoms are outside, and what users are told."""

from __future__ import annotations

import contextlib
import copy
import json
import pickle
import sys
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from ase import Atoms
from ase.build import bulk
from ase.io import write
from ase.neighborlist import neighbor_list
from torch import nn
from trust_structures import crystals, inputs, squeezed

from compactmlip import checkpoint
from compactmlip.cli import main
from compactmlip.data.graph import build_graph, collate
from compactmlip.deploy.archive import ENTRY, inspect, load_deployed, quiet_torchscript, trust_scores
from compactmlip.deploy.ase import CompactMLIPCalculator
from compactmlip.deploy.compile import CompileReport, compile_model
from compactmlip.deploy.engine import load_engine
from compactmlip.deploy.trust import METHOD, REASONS, Outside
from compactmlip.deploy.trust_fit import MIN_ATOMS
from compactmlip.errors import InputError, OutsideError, TrustWarning
from compactmlip.info import describe

SPECIES, DISTANCE, COORDINATION, FEATURES = range(4)


@pytest.fixture(scope="module")
def model(make_model: Any, make_spec: Any) -> nn.Module:
    made: nn.Module = make_model(make_spec(channels=(6, 4), num_layers=2, lmax_edge=2), seed=3)
    return made


@pytest.fixture(scope="module", params=["torch", "kernels"])
def made(request: pytest.FixtureRequest, model: nn.Module, tmp_path_factory: Any) -> CompileReport:
    if request.param == "kernels":
        request.getfixturevalue("kernels")
    path = tmp_path_factory.mktemp("trust") / f"{request.param}.pt"
    return compile_model(model, path, dtype="float64", backend=request.param, trust_structures=crystals(30))


def scores_of(path: Path, atoms: Atoms) -> np.ndarray:
    module, spec = load_deployed(path)
    graph = build_graph(atoms, spec)
    found = trust_scores(module)(graph.species, graph.centers, graph.neighbors, graph.vectors)
    assert found.dtype == torch.float64
    return found.numpy()


# The region


def test_calibration_is_inside_and_the_region_is_described(made: CompileReport) -> None:
    region = inspect(made.path)[1].trust
    assert region is not None and region == made.trust
    assert (region.num_structures, region.num_atoms) == (30, 240)
    assert set(region.species) == {"Mg", "O"}
    assert set(region.shortest) == {"O-O", "O-Mg", "Mg-Mg"}
    scores = np.concatenate([scores_of(made.path, a) for a in crystals(30)])
    assert (scores[:, [SPECIES, DISTANCE, COORDINATION]] < 1).all()
    # The quantile leaves out 0.5 % of the atoms before the margin.
    assert (scores[:, FEATURES] > 1).sum() <= 2
    fresh = np.concatenate([scores_of(made.path, a) for a in crystals(30, 100)])
    assert Outside(fresh).mask.mean() < 0.05
    assert 0 <= region.held_out < 0.05
    assert np.median(fresh[:, FEATURES]) > 0.2  # and the ball is not much larger than what is in it


def test_ranges_follow_from_the_description(made: CompileReport) -> None:
    """Distances and coordination, from ASE's neighbour list and the JSON text alone."""
    region, cutoff = made.trust, made.spec.cutoff
    assert region is not None
    for atoms in (squeezed(), crystals(1, 60)[0], crystals(1, 61, 0.3)[0]):
        found = scores_of(made.path, atoms)
        i, j, d = neighbor_list("ijd", atoms, cutoff)
        for k, symbol in enumerate(atoms.symbols):
            limits = region.species[symbol]
            mine = d[i == k]
            pairs = [f"{symbol}-{atoms.symbols[n]}" for n in j[i == k]]
            allowed = [region.shortest.get(p) or region.shortest["-".join(p.split("-")[::-1])] for p in pairs]
            distance = max((np.array(allowed) / mine).max(), mine.min() / limits.nearest[1])
            assert found[k, DISTANCE] == pytest.approx(distance, rel=1e-12)
            number = (0.5 * (1 + np.cos(np.pi * mine / cutoff))).sum()
            low, high = limits.coordination
            expected = abs(number - (low + high) / 2) / ((high - low) / 2)
            assert found[k, COORDINATION] == pytest.approx(expected, rel=1e-9)
    nearest = min(neighbor_list("d", a, cutoff).min() for a in crystals(30))
    assert region.species["Mg"].nearest[0] == pytest.approx(0.98 * nearest)


def test_each_reason(made: CompileReport) -> None:
    close = Outside(scores_of(made.path, squeezed()))
    assert "distance" in close.reasons(0) and "distance" in close.reasons(1)
    sparse = crystals(1, 70)[0]
    sparse.set_cell(sparse.cell * 1.12, scale_atoms=True)
    assert all("coordination" in Outside(scores_of(made.path, sparse)).reasons(k) for k in range(8))
    other = crystals(1, 71)[0]
    other.symbols[0] = "Si"
    found = Outside(scores_of(made.path, other))
    assert found.scores[0, SPECIES] == np.inf
    assert found.reasons(0) == ("species",)
    assert "distance" in found.reasons(1)  # the pair was never seen
    exchanged = crystals(1, 72)[0] * (2, 2, 2)
    exchanged.symbols[0], exchanged.symbols[1] = exchanged.symbols[1], exchanged.symbols[0]
    assert Outside(scores_of(made.path, exchanged)).count > 0
    alone = Outside(scores_of(made.path, Atoms("O")))
    assert "coordination" in alone.reasons(0) and "distance" in alone.reasons(0)


def test_features_see_what_distances_do_not(made: CompileReport) -> None:
    """Zinc blende with nearly the bond length of rock salt."""
    scores = scores_of(made.path, bulk("MgO", "zincblende", a=4.82, cubic=True))
    assert (scores[:, DISTANCE] < 1).all()
    assert (scores[:, FEATURES] > 1).all()


def test_rotations_images_and_batches_change_nothing(made: CompileReport) -> None:
    atoms = squeezed()
    scores = scores_of(made.path, atoms)
    outside = Outside(scores).mask
    assert outside.any() and not outside.all()
    turned = atoms.copy()
    turned.rotate(40, (3, 1, 2), rotate_cell=True)
    turned.positions += [7.0, -3.0, 11.0]
    turned.wrap()
    np.testing.assert_allclose(scores_of(made.path, turned), scores, rtol=1e-8)
    order = np.random.default_rng(0).permutation(len(atoms))
    np.testing.assert_allclose(scores_of(made.path, atoms[order]), scores[order], rtol=1e-8)
    np.testing.assert_allclose(scores_of(made.path, atoms * (1, 2, 1))[: len(atoms)], scores, rtol=1e-8)
    module, spec = load_deployed(made.path)
    batch = collate([build_graph(a, spec) for a in (crystals(1)[0], atoms)])
    np.testing.assert_allclose(trust_scores(module)(*inputs(batch))[8:].numpy(), scores, rtol=1e-8)


def test_energies_are_those_of_a_file_without_region(
    made: CompileReport, model: nn.Module, tmp_path: Path
) -> None:
    _, deployment = inspect(made.path)
    plain = compile_model(model, tmp_path / "m.pt", dtype="float64", backend=deployment.backend)
    assert plain.trust is None
    assert not hasattr(load_deployed(plain.path)[0], METHOD)
    a, b = (load_engine(path) for path in (made.path, plain.path))
    assert b.trust is None
    graph = build_graph(squeezed(), made.spec)
    assert torch.equal(a.evaluate(graph).forces, b.evaluate(graph).forces)
    assert torch.equal(a.evaluate(graph).energies, b.evaluate(graph).energies)


def test_same_structures_give_the_same_region(made: CompileReport, model: nn.Module, tmp_path: Path) -> None:
    _, deployment = inspect(made.path)
    again = compile_model(
        model, tmp_path / "m.pt", dtype="float64", backend=deployment.backend, calibration=crystals(30)
    )
    assert again.trust == made.trust
    np.testing.assert_array_equal(scores_of(again.path, squeezed()), scores_of(made.path, squeezed()))


def test_structures_without_neighbours_and_rare_species(model: nn.Module, tmp_path: Path) -> None:
    """Isolated atoms do not widen the region; a species with few atoms is not covered."""
    rare = crystals(1, 90)[0]
    rare.symbols[0] = "Si"
    report = compile_model(
        model, tmp_path / "m.pt", dtype="float64", trust_structures=[Atoms("O"), *crystals(5), rare]
    )
    assert report.trust is not None
    assert report.trust.num_structures == 6
    assert set(report.trust.species) == {"Mg", "O"}
    assert report.trust.species["O"].coordination[0] > 3
    pair = Atoms("MgO", [[0.0, 0.0, 0.0], [2.0, 0.0, 0.0]])
    few = compile_model(model, tmp_path / "few.pt", trust_structures=[Atoms("O"), pair])
    assert few.trust is None
    assert f"fewer than {MIN_ATOMS} atoms" in few.note


def test_one_structure_and_other_precisions(model: nn.Module, tmp_path: Path) -> None:
    big = bulk("MgO", "rocksalt", a=4.21, cubic=True) * (2, 2, 2)
    big.rattle(0.08, seed=0)
    for dtype in ("float32", "mixed", "bf16"):
        report = compile_model(model, tmp_path / f"{dtype}.pt", dtype=dtype, trust_structures=[big])  # type: ignore[arg-type]
        assert report.trust is not None
        calculator = CompactMLIPCalculator(report.path, check=1)
        with pytest.warns(TrustWarning):
            calculator.get_potential_energy(squeezed())
        calculator.get_potential_energy(big)
        assert calculator.outside is not None
        assert calculator.outside.mask.mean() < 0.05


# ASE


def test_results_are_the_same_with_a_check(made: CompileReport) -> None:
    plain, checked = CompactMLIPCalculator(made.path), CompactMLIPCalculator(made.path, check=1)
    for calculator in (plain, checked):
        assert calculator.outside is None
        calculator.get_potential_energy(crystals(1, 80)[0])
    assert plain.outside is None
    assert checked.outside is not None
    assert checked.outside.count == 0
    assert plain.results.keys() == checked.results.keys()
    for name in plain.results:
        np.testing.assert_array_equal(plain.results[name], checked.results[name])


def test_warns_once(made: CompileReport) -> None:
    calculator = CompactMLIPCalculator(made.path, check=1)
    calculator.get_potential_energy(crystals(1, 81)[0])
    with pytest.warns(TrustWarning, match=r"of 16 atoms are outside .*distance: \d+ \(atoms .*calculation 2"):
        calculator.get_potential_energy(squeezed())
    assert "forces" in calculator.results
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        calculator.get_potential_energy(squeezed((2, 3)))
    assert calculator.outside is not None
    assert calculator.outside.mask[3]


def test_checks_every_nth_calculation(made: CompileReport) -> None:
    calculator = CompactMLIPCalculator(made.path, check=3)
    calculator.get_potential_energy(crystals(1, 82)[0])
    first = calculator.outside
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for pair in ((0, 1), (2, 3)):
            calculator.get_potential_energy(squeezed(pair))
    assert calculator.outside is first
    with pytest.warns(TrustWarning, match="calculation 4"):
        calculator.get_potential_energy(squeezed())


def test_stops(made: CompileReport) -> None:
    calculator = CompactMLIPCalculator(made.path, check=1, stop_outside=True)
    calculator.get_potential_energy(crystals(1, 83)[0])
    atoms = squeezed()
    atoms.calc = calculator
    with pytest.raises(OutsideError, match="outside the model's trust region: .*Train or calibrate"):
        atoms.get_forces()
    assert calculator.results == {}
    assert calculator.outside is not None
    assert calculator.outside.count > 0


def test_copies_keep_checking(made: CompileReport) -> None:
    calculator = CompactMLIPCalculator(made.path, check=2, stop_outside=True)
    assert (calculator.parameters["check"], calculator.parameters["stop_outside"]) == (2, True)
    for other in (copy.deepcopy(calculator), pickle.loads(pickle.dumps(calculator))):
        with pytest.raises(OutsideError):
            other.get_potential_energy(squeezed())


def test_options_that_mean_nothing(made: CompileReport) -> None:
    for check in (-1, 1.5, "often", True):
        with pytest.raises(InputError, match="check="):
            CompactMLIPCalculator(made.path, check=check)  # type: ignore[arg-type]
    with pytest.raises(InputError, match="stop_outside needs check"):
        CompactMLIPCalculator(made.path, stop_outside=True)


def test_models_without_region(deployed: Path, model: nn.Module, made: CompileReport, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="compiled without calibration structures.*--calibration"):
        CompactMLIPCalculator(deployed, check=1)
    with pytest.raises(InputError, match="a model in memory: only compiled files"):
        CompactMLIPCalculator(model, check=1)
    entries = {ENTRY: ""}
    with quiet_torchscript():
        module = torch.jit.load(str(made.path), _extra_files=entries)
        description = json.loads(entries[ENTRY])
        description["deployed"] |= {"format_version": 3}
        del description["deployed"]["trust"]
        old = tmp_path / "old.pt"
        torch.jit.save(module, str(old), _extra_files={ENTRY: json.dumps(description)})
    CompactMLIPCalculator(old).get_potential_energy(crystals(1)[0])
    with pytest.raises(InputError, match="without calibration structures"):
        CompactMLIPCalculator(old, check=1)


# Words


def test_description_of_atoms_outside() -> None:
    scores = np.zeros((9, 4))
    assert Outside(scores).describe() == "0 of 9 atoms are outside the model's trust region"
    scores[2, DISTANCE], scores[2, FEATURES], scores[5, SPECIES] = 1.25, 3.0, np.inf
    scores[8, FEATURES] = np.nan
    found = Outside(scores)
    assert found.mask.tolist() == [k in (2, 5, 8) for k in range(9)]
    assert found.reasons(2) == ("distance", "features") and found.reasons(0) == ()
    assert "3 of 9 atoms are outside" in found.describe()
    assert "species: 1 (atoms 5)" in found.describe()
    assert "distance: 1 (atoms 2, up to 1.2 times the limit)" in found.describe()
    scores[:, COORDINATION] = 2.0
    assert "coordination: 9 (atoms 0, 1, 2, 3, 4, ..., up to 2 times the limit)" in Outside(scores).describe()
    assert len(REASONS) == scores.shape[1]


def test_info_and_command_line(
    made: CompileReport,
    deployed: Path,
    model: nn.Module,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    printed: list[str] = []
    rows = describe(made.path)["trust region"]
    assert rows[0].startswith("30 structures, 240 atoms; ")
    assert any(row.startswith("Mg: 120 atoms, nearest neighbour ") for row in rows)
    assert describe(deployed)["trust region"].startswith("none")
    source = checkpoint.save(model, tmp_path / "m.safetensors")
    write(tmp_path / "c.xyz", crystals(3))
    command = f"compactmlip compile {source} --backend torch --calibration c.xyz -o {tmp_path}/m.pt"
    monkeypatch.chdir(tmp_path)
    for extra in ([], ["--json"]):
        monkeypatch.setattr(sys, "argv", [*command.split(), *extra])
        with contextlib.suppress(SystemExit):
            main()
        printed.append(capsys.readouterr().out)
    assert "trust region: 3 structures, 24 atoms" in printed[0]
    assert json.loads(printed[1].splitlines()[-1])["trust_region"]["num_atoms"] == 24
