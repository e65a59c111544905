from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from ase import Atoms, units
from ase.build import bulk, molecule
from pydantic import ValidationError
from springs import FORCE_CONSTANT, LENGTH, RANGE, Springs
from torch import nn

from compactmlip.data.candidates import defect_shares, draw_candidates, make_sources
from compactmlip.data.graph import build_graph, energy_and_derivatives
from compactmlip.data.md import FORCE_LIMIT
from compactmlip.data.perturb import shortest_ratio
from compactmlip.data.sample import SampleOptions, sample
from compactmlip.data.select import structure_descriptors
from compactmlip.data.teacher import scalar_features
from compactmlip.errors import InputError, SpeciesError


@pytest.fixture
def springs(make_spec: Callable[..., Any]) -> Springs:
    return Springs(make_spec(num_layers=1, cutoff=RANGE))


@pytest.fixture
def tiny_model(make_spec: Callable[..., Any], make_model: Callable[..., nn.Module]) -> nn.Module:
    return make_model(make_spec(channels=(6, 2), num_layers=2, lmax_edge=1, cutoff=3.2))


@pytest.fixture
def rocksalt() -> Atoms:
    return bulk("MgO", "rocksalt", a=2 * LENGTH, cubic=True)


def quick(structures: list[Atoms], model: nn.Module, **options: Any) -> list[Atoms]:
    return sample(structures, model, SampleOptions(**options), progress=False)


def test_sample_of_a_crystal(springs: Springs, rocksalt: Atoms) -> None:
    frames = quick(
        [rocksalt],
        springs,
        n=40,
        max_atoms=16,
        vacancies=0.1,
        vacancy_atoms=16,
        surfaces=0,
        md_steps=20,
        md_interval=2,
    )
    assert len(frames) == 40
    kinds = Counter(a.info["config_type"] for a in frames)
    assert set(kinds) == {"input", "rattle", "strain", "supercell", "vacancy", "md"}
    assert kinds["md"] == 10 and 1 <= kinds["vacancy"] <= 8
    assert {_temperature(a) for a in frames} == {0.0, 300.0, 600.0, 1000.0}
    for atoms in frames:
        assert shortest_ratio(atoms) >= 0.6 and len(atoms) <= 16 and atoms.info["source"] == 0
        assert ("trajectory" in atoms.info) == (atoms.info["config_type"] == "md")
        if atoms.info["config_type"] == "vacancy":
            assert abs(np.diff([list(atoms.symbols).count(s) for s in ("Mg", "O")])[0]) == 1
        if atoms.info["config_type"] == "strain":
            assert abs(atoms.cell.volume / len(atoms) / (rocksalt.cell.volume / 8) - 1) < 0.15
        elif atoms.info["config_type"] != "vacancy":
            assert atoms.cell.volume / len(atoms) == pytest.approx(rocksalt.cell.volume / 8)
    distinct = {atoms.positions.tobytes() + atoms.cell.array.tobytes() for atoms in frames}
    assert len(distinct) == 40


def test_defects_of_a_crystal(springs: Springs, rocksalt: Atoms) -> None:
    """Asked for or not, a crystal has vacancies in its larger cells and slabs along planes without charge."""
    frames = quick([rocksalt], springs, n=60, max_atoms=16, md_fraction=0.0)
    kinds = Counter(a.info["config_type"] for a in frames)
    assert 4 <= kinds["vacancy"] <= 18 and 2 <= kinds["surface"] <= 12
    gone = Counter(
        int(np.sign(np.diff([list(a.symbols).count(s) for s in ("Mg", "O")])[0]))
        for a in frames
        if a.info["config_type"] == "vacancy"
    )
    assert min(gone.values()) >= 2 and set(gone) == {-1, 1}, "vacancies of both species"
    sizes = Counter(len(a) for a in frames if a.info["config_type"] == "vacancy")
    assert set(sizes) == {15, 63}
    for atoms in (a for a in frames if a.info["config_type"] == "vacancy"):
        assert abs(np.diff([list(atoms.symbols).count(s) for s in ("Mg", "O")])[0]) == 1
    areas = set()
    for atoms in (a for a in frames if a.info["config_type"] == "surface"):
        assert len(atoms) <= 16 and atoms.info["temperature"] > 0 and atoms.pbc.all()
        assert list(atoms.symbols).count("Mg") == list(atoms.symbols).count("O")
        heights = atoms.positions[:, 2]
        assert atoms.cell.lengths()[2] - np.ptp(heights) > RANGE + 1.0
        areas.add(round(float(np.linalg.norm(np.cross(*atoms.cell.array[:2])) / LENGTH**2), 3))
    polar = round(2 * 3**0.5, 3)  # area of one formula unit in (111)
    assert areas and not any(np.isclose(area % polar, 0, atol=1e-2) for area in areas)
    none = quick([rocksalt], springs, n=20, max_atoms=16, md_fraction=0.0, vacancies=0, surfaces=0)
    assert {a.info["config_type"] for a in none} <= {"input", "rattle", "strain", "supercell"}


def test_molecules_have_no_defects(tiny_model: nn.Module, structures: dict[str, Atoms]) -> None:
    water = molecule("H2O")
    water.set_cell([4.0, 4.2, 4.1])
    water.pbc = True
    options = SampleOptions(n=30, max_atoms=12, md_fraction=0)
    (source,) = make_sources([water], tiny_model, options, np.random.default_rng(0))
    assert not source.network and not source.slabs
    assert set(defect_shares([source], options).values()) == {0.0}
    asked = options.model_copy(update={"surfaces": 0.5})
    (source,) = make_sources([water], tiny_model, asked, np.random.default_rng(0))
    drawn = draw_candidates([source], 40, asked, np.random.default_rng(0))
    assert Counter(a.info["config_type"] for a in drawn)["surface"] > 8


def test_shares_of_defects_follow_the_networks(tiny_model: nn.Module, structures: dict[str, Atoms]) -> None:
    options = SampleOptions(n=30, max_atoms=16)
    crystal, other = structures["crystal"], structures["molecule"]
    sources = make_sources([crystal, other], tiny_model, options, np.random.default_rng(0))
    assert [s.network for s in sources] == [True, False]
    assert defect_shares(sources, options) == {"vacancy": 0.07, "surface": 0.04}
    given = options.model_copy(update={"vacancies": 0.3})
    assert defect_shares(sources, given) == {"vacancy": 0.3, "surface": 0.04}
    drawn = draw_candidates(sources, 200, options, np.random.default_rng(0))
    assert {a.info["source"] for a in drawn if a.info["config_type"] in ("vacancy", "surface")} == {0}


def test_seed_decides_everything(springs: Springs, rocksalt: Atoms) -> None:
    options = {"n": 12, "max_atoms": 8, "md_steps": 6, "md_interval": 2, "md_evaluations": 96}
    first = quick([rocksalt], springs, **options, seed=5)
    again = quick([rocksalt], springs, **options, seed=5)
    other = quick([rocksalt], springs, **options, seed=6)
    assert len(first) == len(again)
    for a, b in zip(first, again, strict=True):
        assert (
            np.array_equal(a.positions, b.positions) and np.array_equal(a.cell, b.cell) and a.info == b.info
        )
    moved = [a for a in other if a.info["config_type"] != "input"]
    assert all(not any(np.array_equal(a.positions, b.positions) for b in first) for a in moved)
    assert not rocksalt.info and np.array_equal(
        rocksalt.positions, bulk("MgO", "rocksalt", a=4.21, cubic=True).positions
    )


@pytest.mark.parametrize("name", ["slab", "molecule", "smaller than the cutoff"])
def test_other_kinds_of_input(tiny_model: nn.Module, structures: dict[str, Atoms], name: str) -> None:
    atoms = structures[name]
    frames = quick([atoms], tiny_model, n=15, max_atoms=12, md_steps=4, md_interval=2, md_evaluations=40)
    kinds = {a.info["config_type"] for a in frames}
    assert len(frames) == 15
    assert all(np.array_equal(f.pbc, atoms.pbc) for f in frames)
    if name == "molecule":
        assert kinds <= {"input", "rattle", "md"}
        assert all(len(f) == len(atoms) for f in frames)
    if name == "slab":
        assert "strain" in kinds
        normal = atoms.cell.array[2]
        assert all(np.allclose(f.cell.array[2], normal) for f in frames)
        assert all(len(f) * atoms.cell.volume == pytest.approx(8 * f.cell.volume, rel=0.15) for f in frames)


def test_one_atom_cell_is_repeated(tiny_model: nn.Module) -> None:
    frames = quick([bulk("Si", "bcc", a=3.1)], tiny_model, n=10, md_fraction=0.0)
    assert all(len(a) >= 8 for a in frames if a.info["config_type"] in ("rattle", "supercell"))


def test_several_inputs_all_take_part(tiny_model: nn.Module, structures: dict[str, Atoms]) -> None:
    inputs = [structures["crystal"], structures["molecule"], structures["isolated atom"]]
    frames = quick(inputs, tiny_model, n=30, max_atoms=8, md_fraction=0.0)
    assert {a.info["source"] for a in frames} == {0, 1, 2}
    many = [structures["molecule"].copy() for _ in range(40)]
    frames = quick(many, tiny_model, n=8, md_fraction=0.0)
    assert len(frames) == 8 and len({a.info["source"] for a in frames}) > 3


def test_chosen_structures_spread_more_than_random_candidates(
    tiny_model: nn.Module, rocksalt: Atoms, rng: np.random.Generator
) -> None:
    options = SampleOptions(n=20, max_atoms=8, md_fraction=0.0, temperature=600, oversample=5)
    chosen = sample([rocksalt], tiny_model, options, progress=False)
    sources = make_sources([rocksalt], tiny_model, options, np.random.default_rng(1))
    drawn = draw_candidates(sources, 100, options, np.random.default_rng(2))
    frames = [*chosen, *drawn]
    x = structure_descriptors(frames, [f for _, f in scalar_features(frames, tiny_model)])

    def spread(indices: Any) -> float:
        """Mean distance to the nearest neighbour in the set."""
        d = np.linalg.norm(x[indices][:, None] - x[indices][None], axis=-1)
        return float((d + 1e9 * np.eye(len(d))).min(axis=1).mean())

    random = [spread(20 + rng.choice(len(drawn), 20, replace=False)) for _ in range(20)]
    assert spread(np.arange(20)) > np.mean(random) + 2 * np.std(random)


@pytest.mark.parametrize("vacancies", [0.0, 0.5])
def test_large_forces_are_rejected(springs: Springs, rocksalt: Atoms, vacancies: float) -> None:
    """A solid as stiff as diamond, far too hot: some candidates are beyond the limit, none is returned."""
    stiff = Springs(springs.spec, spring=15.0)
    options = SampleOptions(
        n=12, temperature=25000, strain=0, shear=0, md_fraction=0, max_atoms=8, vacancies=vacancies, seed=1
    )
    sources = make_sources([rocksalt], stiff, options, np.random.default_rng(0))
    candidates = draw_candidates(sources, 100, options, np.random.default_rng(0))
    worst = [_largest_force(a, stiff) for a in candidates]
    assert max(worst) > FORCE_LIMIT > np.quantile(worst, 0.3), "otherwise this test shows nothing"
    chosen = sample([rocksalt], stiff, options, progress=False)
    assert max(_largest_force(a, stiff) for a in chosen) <= FORCE_LIMIT


def _largest_force(atoms: Atoms, model: Springs) -> float:
    forces = energy_and_derivatives(model, build_graph(atoms, model.spec)).forces
    return float(torch.linalg.vector_norm(forces, dim=1).max())


def test_hopeless_options_end_with_an_error(springs: Springs, rocksalt: Atoms) -> None:
    soft = Springs(springs.spec, spring=1e-4)  # everything may move by 0.3 Angstrom
    tight = rocksalt.copy()
    tight.set_cell(tight.cell * 0.62, scale_atoms=True)
    with pytest.raises(InputError, match=r"only \d+ of 50 structures are physically sensible"):
        quick([tight], soft, n=50, strain=0.0, shear=0.0, md_fraction=0.0, max_atoms=8, temperature=1e4)


def test_cost_is_as_planned(springs: Springs, rocksalt: Atoms) -> None:
    """The default for 200 structures: MD within its budget, few other gradients."""
    frames = sample([rocksalt], springs, SampleOptions(), progress=False)
    assert len(frames) == 200
    assert sum(a.info["config_type"] == "md" for a in frames) == 30
    assert springs.gradients < 1500 + 250 + 200 + 2700, "MD, force constants, suspicious candidates, defects"
    assert springs.atom_evaluations - springs.gradients < 2 * 200 * 20, "features of the candidates"


def test_bad_input_is_refused(tiny_model: nn.Module, rocksalt: Atoms) -> None:
    with pytest.raises(InputError, match="no structure"):
        quick([], tiny_model)
    with pytest.raises(SpeciesError, match=r"frame 1 contains N,"):
        quick([rocksalt, molecule("NH3")], tiny_model)
    squeezed = rocksalt.copy()
    squeezed.set_cell(squeezed.cell * 0.5, scale_atoms=True)
    with pytest.raises(InputError, match=r"structure 0: two atoms are at 0\.\d+ times"):
        quick([squeezed], tiny_model)
    with pytest.raises(InputError, match="vacancies need a periodic structure"):
        quick([molecule("H2O")], tiny_model, vacancies=0.2)
    with pytest.raises(InputError, match="surfaces need a structure that is periodic in three"):
        quick([molecule("H2O")], tiny_model, surfaces=0.2)


@pytest.mark.parametrize(
    "options",
    [
        {"n": 0},
        {"temperature": 0},
        {"temperature": ()},
        {"md_fraction": 1.5},
        {"rattle": 0.1},
        {"vacancies": 0.6, "surfaces": 0.6},
    ],
)
def test_bad_options_are_refused(options: dict[str, Any]) -> None:
    with pytest.raises(ValidationError):
        SampleOptions(**options)


def test_one_temperature_may_be_a_number() -> None:
    assert SampleOptions(temperature=450).temperature == (450.0,)


def test_sampled_amplitude_follows_temperature(springs: Springs, rocksalt: Atoms) -> None:
    options = {"n": 30, "strain": 0.0, "shear": 0.0, "md_fraction": 0.0, "max_atoms": 8}
    options |= {"vacancies": 0.0, "surfaces": 0.0}
    frames = quick([rocksalt], springs, temperature=(100, 900), **options)
    rms = {
        t: np.sqrt(np.mean([(a.positions - rocksalt.positions) ** 2 for a in frames if _temperature(a) == t]))
        for t in (100.0, 900.0)
    }
    assert rms[900.0] / rms[100.0] == pytest.approx(3.0, rel=0.2)
    assert rms[900.0] == pytest.approx(np.sqrt(units.kB * 900 / (FORCE_CONSTANT)), rel=0.3)


def _temperature(atoms: Atoms) -> float:
    return float(atoms.info["temperature"])
