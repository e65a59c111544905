"""Errors by species and number of neighbours, on structures whose coordination is known."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from ase import Atoms
from ase.build import bulk, fcc111, molecule

from compactmlip.validate.environment import effective_coordination, errors_by_environment
from compactmlip.validate.parity import Labels
from compactmlip.validate.report import build_report


@pytest.mark.parametrize(
    ("atoms", "expected"),
    [
        (bulk("Cu", "fcc", a=3.6), 12),
        (bulk("MgO", "rocksalt", a=4.21), 6),
        (bulk("Si", "diamond", a=5.43), 4),
        (Atoms("Ar"), 0),
        (Atoms("N2", [[0, 0, 0], [0, 0, 1.1]]), 1),
    ],
)
def test_crystals(atoms: Atoms, expected: int) -> None:
    found = effective_coordination(atoms)
    assert found == pytest.approx(np.full(len(atoms), expected), abs=0.05)


def test_body_centred_cubic() -> None:
    """Eight neighbours and six that are 15 % farther: Hoppe's 11.2 with this weighting."""
    near, far = np.exp(1 - 1), np.exp(1 - (2 / np.sqrt(3)) ** 6)
    mean = (8 * near + 6 * far * 2 / np.sqrt(3)) / (8 * near + 6 * far)
    expected = 8 * np.exp(1 - mean**-6.0) + 6 * np.exp(1 - (2 / np.sqrt(3) / mean) ** 6)
    assert effective_coordination(bulk("Fe", "bcc", a=2.87))[0] == pytest.approx(expected, abs=0.01)


def test_surfaces_and_molecules() -> None:
    slab = fcc111("Cu", (2, 2, 4), a=3.6, vacuum=6)
    assert sorted({round(c) for c in effective_coordination(slab)}) == [9, 12]
    water = molecule("H2O")
    assert [round(c) for c in effective_coordination(water)] == [2, 1, 1]


def test_errors_where_they_are() -> None:
    """An error on the atoms of a surface only shows there."""
    slab, crystal = fcc111("Cu", (2, 2, 4), a=3.6, vacuum=6), bulk("Cu", "fcc", a=3.6)
    frames = [slab, crystal, crystal]
    true = tuple(np.full((len(a), 3), 0.5) for a in frames)
    outside = effective_coordination(slab) < 10
    off = true[0] + 0.03 * outside[:, None]
    nothing = np.full((3, 6), np.nan)
    rows = errors_by_environment(
        frames, Labels(np.zeros(3), true, nothing), Labels(np.zeros(3), (off, *true[1:]), nothing)
    )
    found = {(row.species, row.neighbors): row for row in rows}
    assert set(found) == {("Cu", 9), ("Cu", 12)}
    assert found["Cu", 9].forces == pytest.approx(30) and found["Cu", 12].forces == 0
    assert found["Cu", 9].atoms == 8 and found["Cu", 12].atoms == 10
    assert found["Cu", 9].mean_force == pytest.approx(500) and found["Cu", 9].forces_error < 1e-9


def test_single_atom_has_no_error_bar() -> None:
    pair, nothing = Atoms("HF", [[0, 0, 0], [0, 0, 0.9]]), np.full((1, 6), np.nan)
    forces = (np.zeros((2, 3)),)
    rows = errors_by_environment([pair], *(Labels(np.zeros(1), forces, nothing),) * 2)
    assert [row.forces_error for row in rows] == [None, None]
    assert type(rows[0]).model_validate_json(rows[0].model_dump_json()) == rows[0]


def test_in_the_report(evidence: Any) -> None:
    certificate, data = evidence()
    rows = errors_by_environment(data.frames, data.reference, data.predicted)
    assert {row.species for row in rows} == {"Mg", "O"}
    assert sum(row.atoms for row in rows) == sum(len(a) for a in data.frames)
    changed = certificate.model_copy(update={"environments": rows})
    html = build_report(changed, replace(data))
    assert "figure-environment" in html and "figure-environment" not in build_report(certificate, data)
    assert type(certificate).model_validate_json(changed.model_dump_json()) == changed
