"""Features that trust regions see, and how a region is fitted to them."""

from __future__ import annotations

from typing import Any

import contract
import mace_models
import numpy as np
import pytest
import torch
from ase import Atoms
from ase.build import bulk
from torch import nn
from trust_structures import crystals, inputs, squeezed

from compactmlip.compress.apply import prune
from compactmlip.data.graph import build_graph
from compactmlip.deploy.lower.lower import lower_on_grid
from compactmlip.deploy.selfcheck import random_structures
from compactmlip.deploy.trust_fit import SHRINKAGE, Ball, fit
from compactmlip.errors import InputError, SelfCheckError
from compactmlip.models import exact_copy


@pytest.fixture(scope="module")
def model(make_model: Any, make_spec: Any) -> nn.Module:
    made: nn.Module = make_model(make_spec(channels=(6, 4), num_layers=2, lmax_edge=2), seed=3)
    return made


def assert_descriptors_agree(model: Any) -> None:
    lowered: Any = lower_on_grid(model, 320)
    largest = 0.0
    for atoms in random_structures(model.spec):
        given = inputs(build_graph(atoms, model.spec))
        expected = model.descriptors(*given)
        assert expected.ndim == 2 and len(expected) == len(atoms)
        largest = max(largest, float(expected.abs().max()))
        torch.testing.assert_close(lowered.descriptors(*given), expected, rtol=1e-5, atol=1e-6 * largest)
    assert largest > 1e-3


@pytest.mark.usefixtures("kernels")
@pytest.mark.parametrize("variant", mace_models.VARIANTS)
def test_lowered_mace_has_the_descriptors_of_the_model(variant: str) -> None:
    spec = mace_models.make_spec(**mace_models.VARIANTS[variant])
    assert_descriptors_agree(exact_copy(mace_models.make_model(spec, seed=1)))


@pytest.mark.usefixtures("kernels")
def test_lowered_mace_with_channels_cut_has_the_descriptors_of_the_model() -> None:
    whole = mace_models.make_model(mace_models.make_spec(), seed=0)
    assert_descriptors_agree(exact_copy(prune(whole, contract.random_masks(whole, np.random.default_rng(0)))))


@pytest.mark.usefixtures("kernels")
def test_lowered_nequip_has_the_descriptors_of_the_model(model_variant: nn.Module) -> None:
    assert_descriptors_agree(exact_copy(model_variant))


@pytest.mark.parametrize("family", ["nequip", "mace"])
def test_descriptors_do_not_see_rotations(family: str, model: Any, structures: dict[str, Atoms]) -> None:
    model = model if family == "nequip" else mace_models.make_model(mace_models.make_spec())
    atoms = structures["molecule"]
    turned = atoms.copy()
    turned.rotate(73, (1, 2, -3))
    turned.positions *= -1.0  # and inversion
    a, b = (model.descriptors(*inputs(build_graph(x, model.spec))) for x in (atoms, turned))
    torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-10)
    assert float((a[0] - a[1:]).detach().abs().max()) > 1e-3


def test_ball_is_the_mahalanobis_distance(rng: np.random.Generator) -> None:
    sample = torch.tensor(rng.normal(size=(400, 5)) @ rng.normal(size=(5, 5)) + 3.0)
    points = torch.tensor(rng.normal(size=(7, 5)) * 4)
    covariance = np.cov(sample.numpy().T)
    covariance += SHRINKAGE * np.trace(covariance) / 5 * np.eye(5)
    centred = points.numpy() - sample.numpy().mean(axis=0)
    expected = np.sqrt(np.einsum("ni,ij,nj->n", centred, np.linalg.inv(covariance), centred))
    np.testing.assert_allclose(Ball(sample)(points).numpy(), expected, rtol=1e-9)


def test_few_atoms_and_constant_features_are_well_conditioned(rng: np.random.Generator) -> None:
    few = torch.tensor(rng.normal(size=(8, 100)))
    ball = Ball(few)
    assert ball.directions.shape == (100, 2)
    new = ball(torch.tensor(rng.normal(size=(50, 100))))
    assert float(new.min()) > 5 and float(new.max()) < 20  # about the root of the number of channels
    constant = Ball(torch.full((20, 4), 2.0, dtype=torch.float64))
    assert float(constant(torch.full((1, 4), 2.0, dtype=torch.float64))) < 1e-6
    assert float(constant(torch.full((1, 4), 2.1, dtype=torch.float64))) > 100


def test_atoms_of_others_come_last(model: Any) -> None:
    """Programs that split a structure give features of owned atoms only, which come first."""
    fitted = fit(exact_copy(model), model.spec, [build_graph(a, model.spec) for a in crystals(5)])
    assert fitted is not None
    given = inputs(build_graph(squeezed(), model.spec))
    features = model.descriptors(*given).detach()
    everything = fitted.scores(features, *given)
    assert everything.shape == (16, 4)
    assert torch.equal(fitted.scores(features[:5], *given)[:, :3], everything[:5, :3])


def test_self_check_covers_the_scores(model: Any) -> None:
    module = exact_copy(model)
    graphs = [build_graph(a, model.spec) for a in crystals(5)]
    fitted = fit(module, model.spec, graphs)
    assert fitted is not None

    def right(*given: torch.Tensor) -> torch.Tensor:
        found: torch.Tensor = fitted.scores(module.descriptors(*given), *given)  # type: ignore[union-attr,operator]
        return found

    fitted.check(right, module, graphs, "float64")
    for wrong in (lambda *x: right(*x) * 1.01, lambda *x: right(*x) * torch.nan):
        with pytest.raises(SelfCheckError, match="trust region"):
            fitted.check(wrong, module, graphs, "float64")


def test_structures_that_repeat_each_other(model: Any) -> None:
    """Nothing but rounding tells their features apart: they are inside, everything else is not."""
    same = bulk("MgO", "rocksalt", a=4.21, cubic=True)
    graphs = [build_graph(a, model.spec) for a in (same, same * (2, 1, 1), same)]
    fitted = fit(exact_copy(model), model.spec, graphs)
    assert fitted is not None
    assert fitted.region.held_out == 0
    for atoms, inside in ((same * (1, 2, 2), True), (crystals(1)[0], False)):
        given = inputs(build_graph(atoms, model.spec))
        scores = fitted.scores(model.descriptors(*given).detach(), *given)
        assert bool((scores <= 1).all()) == inside


def test_one_strange_atom_does_not_let_everything_in(model: Any) -> None:
    """Silicon in one structure, and one atom of it on a site of MgO."""
    silicon = bulk("Si", "diamond", a=5.4, cubic=True)
    silicon.rattle(0.05, seed=0)
    strange = crystals(1, 7)[0]
    strange.symbols[0] = "Si"
    frames = [silicon, strange, *crystals(6)]
    fitted = fit(exact_copy(model), model.spec, [build_graph(a, model.spec) for a in frames])
    assert fitted is not None
    assert fitted.region.species["Si"].num_atoms == 9
    # Without the bound it is above 3000, because the other atoms do not tell how the strange one varies.
    assert 1 <= fitted.region.species["Si"].feature_distance < 300
    given = inputs(build_graph(silicon, model.spec))
    assert bool((fitted.scores(model.descriptors(*given).detach(), *given) <= 1).all())


def test_features_that_are_not_finite(model: Any) -> None:
    broken = exact_copy(model)
    with torch.no_grad():
        broken.layers[-1].down.orders["0"].weight.fill_(torch.nan)  # type: ignore[index,operator,union-attr]
    with pytest.raises(InputError, match="not finite for a calibration structure of 8 atoms"):
        fit(broken, model.spec, [build_graph(a, model.spec) for a in crystals(2)])
