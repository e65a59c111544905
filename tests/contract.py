"""What every native model family must satisfy; used by one test module per family.

All checks run in float64.  ``model`` is any native model, ``atoms`` a structure that it covers.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import torch
from ase import Atoms
from scipy.spatial.transform import Rotation
from torch import Tensor, nn

from compactmlip.channels import Mask
from compactmlip.data.graph import Derivatives, build_graph, energy_and_derivatives
from compactmlip.models import channel_graph


def evaluate(model: nn.Module, atoms: Atoms, masks: Mapping[str, Mask] | None = None) -> Derivatives:
    """Energies, forces and stress; ``masks`` (complete) set channels to zero while the model runs."""
    batch = build_graph(atoms, model.spec, torch.float64)
    if masks is None:
        return energy_and_derivatives(model, batch)

    def mask(space: str, order: int, x: Tensor) -> Tensor:
        return x * torch.as_tensor(masks[f"{space}/{order}"], dtype=x.dtype)

    return energy_and_derivatives(lambda *a: model(*a, tap=mask), batch)


def assert_same(a: Derivatives, b: Derivatives, tolerance: float) -> None:
    """Compare energies (relative), forces and stresses (absolute, eV and Angstrom)."""
    torch.testing.assert_close(a.node_energies, b.node_energies, rtol=tolerance, atol=tolerance)
    torch.testing.assert_close(a.forces, b.forces, rtol=0, atol=tolerance)
    torch.testing.assert_close(a.stresses, b.stresses, rtol=0, atol=tolerance, equal_nan=True)


def transformed(atoms: Atoms, matrix: np.ndarray) -> Atoms:
    """Apply a rotation (or inversion) to positions and cell."""
    return Atoms(atoms.numbers, atoms.positions @ matrix.T, cell=atoms.cell.array @ matrix.T, pbc=atoms.pbc)


def check_rotation(model: nn.Module, atoms: Atoms, rng: np.random.Generator) -> None:
    matrix = Rotation.random(rng=rng).as_matrix()
    one, two = evaluate(model, atoms), evaluate(model, transformed(atoms, matrix))
    rotation = torch.as_tensor(matrix)
    rotated = Derivatives(
        one.energies, one.node_energies, one.forces @ rotation.T, rotation @ one.stresses @ rotation.T
    )
    assert_same(rotated, two, 1e-10)


def check_translation_and_wrapping(model: nn.Module, atoms: Atoms) -> None:
    moved = atoms.copy()
    moved.positions += [0.37, -12.9, 5.1]
    if moved.pbc.all():
        moved.wrap()
    assert_same(evaluate(model, atoms), evaluate(model, moved), 1e-10)


def check_permutation(model: nn.Module, atoms: Atoms, rng: np.random.Generator) -> None:
    order = rng.permutation(len(atoms))
    one, two = evaluate(model, atoms), evaluate(model, atoms[order])
    permuted = Derivatives(one.energies, one.node_energies[order], one.forces[order], one.stresses)
    assert_same(permuted, two, 1e-10)


def check_extensivity(model: nn.Module, atoms: Atoms) -> None:
    """A supercell has the same energy per atom; far-apart copies add up."""
    one = evaluate(model, atoms)
    repeats = tuple(2 if p else 1 for p in atoms.pbc)
    many = evaluate(model, atoms.repeat(repeats))
    torch.testing.assert_close(many.energies, one.energies * np.prod(repeats), rtol=1e-10, atol=1e-10)
    if not atoms.pbc.any():
        pair = atoms.copy()
        far = atoms.copy()
        far.positions += [100.0, 0, 0]
        torch.testing.assert_close(
            evaluate(model, pair + far).energies, 2 * one.energies, rtol=1e-12, atol=1e-12
        )


def check_forces(model: nn.Module, atoms: Atoms, rng: np.random.Generator, step: float = 1e-4) -> None:
    """Forces against the fourth-order central difference of the energy along random directions."""
    forces = evaluate(model, atoms).forces.numpy()
    for _ in range(3):
        direction = rng.normal(size=forces.shape)
        direction /= np.linalg.norm(direction)

        def energy(t: float, direction: np.ndarray = direction) -> float:
            moved = atoms.copy()
            moved.positions += t * direction
            return float(evaluate(model, moved).energies)

        slope = (8 * (energy(step) - energy(-step)) - (energy(2 * step) - energy(-2 * step))) / (12 * step)
        assert abs(slope + float((forces * direction).sum())) < 1e-7 * max(1.0, np.abs(forces).max())


def check_stress(model: nn.Module, atoms: Atoms, rng: np.random.Generator, step: float = 1e-4) -> None:
    """Stress against the energy difference under random symmetric strains."""
    stress = evaluate(model, atoms).stresses[0].numpy()
    for _ in range(3):
        strain = rng.normal(size=(3, 3))
        strain = (strain + strain.T) / np.linalg.norm(strain + strain.T)

        def energy(t: float, strain: np.ndarray = strain) -> float:
            moved = atoms.copy()
            moved.set_cell(atoms.cell.array @ (np.eye(3) + t * strain), scale_atoms=True)
            return float(evaluate(model, moved).energies)

        slope = (8 * (energy(step) - energy(-step)) - (energy(2 * step) - energy(-2 * step))) / (12 * step)
        expected = float((stress * strain).sum()) * atoms.cell.volume
        assert abs(slope - expected) < 1e-7 * max(1.0, abs(expected))


def check_smooth_at_cutoff(model: nn.Module, symbols: str) -> None:
    """Energy and force of a dimer go to those of isolated atoms as the distance reaches the cutoff."""
    cutoff = model.spec.cutoff
    apart = evaluate(model, Atoms(symbols, [[0, 0, 0], [0, 0, cutoff + 1.0]]))
    forces = []
    for gap in (1e-2, 1e-3):
        near = evaluate(model, Atoms(symbols, [[0, 0, 0], [0, 0, cutoff - gap]]))
        forces.append(float(near.forces.abs().max()))
        assert abs(float(near.energies - apart.energies)) < 1e-2 * gap
    assert forces[1] < 0.2 * forces[0] + 1e-12
    assert forces[0] > 0


def check_empty_plan(model: nn.Module, atoms: Atoms) -> None:
    from compactmlip.compress.apply import prune

    same = prune(model, {})
    assert same is not model
    for (name, a), (_, b) in zip(model.state_dict().items(), same.state_dict().items(), strict=True):
        assert torch.equal(a, b), name
    assert same.spec.architecture == model.spec.architecture


def random_masks(model: nn.Module, rng: np.random.Generator) -> dict[str, np.ndarray]:
    """Masks of all channel groups with features; each keeps at least one channel."""
    masks = {}
    for name, group in channel_graph(model.spec).groups.items():
        if group.space is not None:
            masks[name] = rng.random(group.size) < rng.uniform(0.3, 0.9)
            masks[name][rng.integers(group.size)] = True
    return masks


def check_masked_equals_pruned(model: nn.Module, structures: list[Atoms], rng: np.random.Generator) -> None:
    """Random heterogeneous masks over all channel groups; masking never touches a parameter."""
    from compactmlip.compress.apply import prune

    graph = channel_graph(model.spec)
    masks = random_masks(model, rng)
    pruned = prune(model, masks)
    count = sum(p.numel() for p in pruned.parameters())
    assert count < sum(p.numel() for p in model.parameters())
    complete = graph.complete(masks)
    for atoms in structures:
        assert_same(evaluate(model, atoms, complete), evaluate(pruned, atoms), 1e-12)


def check_whole_orders_cut(model: nn.Module, structures: list[Atoms]) -> None:
    """Cutting every channel of one order of one layer removes what depended on it, and nothing else."""
    from compactmlip.compress.apply import prune

    graph = channel_graph(model.spec)
    for name, group in graph.groups.items():
        if group.order == 0 or ".out/" not in name:
            continue
        masks = {name: np.zeros(group.size, dtype=bool)}
        pruned = prune(model, masks)
        complete = graph.complete(masks)
        for atoms in structures:
            assert_same(evaluate(model, atoms, complete), evaluate(pruned, atoms), 1e-12)


def check_species_removal(model: nn.Module, atoms: Atoms) -> None:
    from compactmlip.compress.apply import keep_species

    kept = keep_species(model, atoms.get_chemical_symbols())
    assert set(kept.spec.species) == set(atoms.get_chemical_symbols())
    assert_same(evaluate(model, atoms), evaluate(kept, atoms), 1e-12)
