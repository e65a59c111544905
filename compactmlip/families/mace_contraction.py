"""Weights of upstream's symmetric contractions, whatever basis of couplings they belong to.

Layouts: e3nn modules hold one tensor per output order and degree, with the dense coupling tensors U as
buffers, which tell order and sign of the paths; cuequivariance modules hold one tensor per layer.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from compactmlip.errors import CheckpointError, UnsupportedFeatureError
from compactmlip.families.mace_upstream import environment_kept
from compactmlip.models.contraction import Parametrisation, SymmetricContraction, weight_key
from compactmlip.models.mace_architecture import MACELayer
from compactmlip.models.products import CouplingPath, Products, coupling_paths, products

Weights = dict[str, Tensor]


def _prefix(t: int) -> str:
    return f"products.{t}.symmetric_contractions"


def correlation(state: Mapping[str, Tensor], t: int, stated: int | None) -> int:
    """Largest degree of layer ``t``'s contraction; ``stated`` is used where the tensors do not tell.

    Raises
    ------
    CheckpointError
        If there is no contraction in a known layout.
    """
    first = f"{_prefix(t)}.contractions.0.weights"
    if f"{first}_max" in state:
        return 1 + sum(1 for name in state if name.startswith(f"{first}."))
    if f"{_prefix(t)}.weight" in state and stated is not None:
        return stated
    raise CheckpointError(f"the state dict has no weights of the symmetric contraction of layer {t}.")


@dataclass(frozen=True)
class _Found:
    """Weights of one output order and degree, (species, K or R, channels).

    ``paths`` is None where the file's couplings are not upstream's standard paths.
    """

    paths: Tensor | None
    independent: Tensor


def read(
    state: Mapping[str, Tensor], layers: Sequence[MACELayer], where: str, reduced: bool = False
) -> tuple[Parametrisation, list[Weights]]:
    """Weights of all layers by name (:func:`weight_key`), and the basis that they belong to.

    Weights of upstream's coupling paths are kept as they are, up to a sign each.  If any belong to another
    basis ("reduced" Clebsch-Gordan tensors), all are converted to the independent products.

    Parameters
    ----------
    reduced
        Whether the basis is said to be a reduced one.  Numbers of weights alone do not always tell: a layer
        of scalars with two factors has as many in either.
    """
    reduced = reduced or not all(_counts_fit(state, t, layer) for t, layer in enumerate(layers))
    found = []
    for t, layer in enumerate(layers):
        one_tensor = f"{_prefix(t)}.weight" in state
        found.append((_from_one_tensor if one_tensor else _from_modules)(state, t, layer, where, reduced))
    if all(f.paths is not None for weights in found for f in weights.values()):
        return "paths", [{k: f.paths for k, f in w.items() if f.paths is not None} for w in found]
    return "independent", [{key: f.independent for key, f in weights.items()} for weights in found]


def upstream_weights(
    state: Mapping[str, Tensor], t: int, layer: MACELayer, contraction: SymmetricContraction, where: str
) -> Weights:
    """Weights of layer ``t`` by upstream's names, for the couplings that an e3nn module's ``state`` holds.

    The inverse of :func:`read`.  Where the couplings are upstream's standard paths and the model keeps one
    weight for each, these are kept up to a sign.  Otherwise they are the smallest weights that give the same
    products.
    """
    weights = {}
    for k, L, nu, table in _parts(layer):
        source = f"{_prefix(t)}.contractions.{k}"
        name = "weights_max" if nu == layer.correlation else f"weights.{layer.correlation - nu - 1}"
        mixing = _mixing(state[f"{source}.U_matrix_{nu}"], _orders(layer), L, nu, where)
        signs = _signs(mixing, table) if contraction.parametrisation == "paths" else None
        if signs is not None:
            kept = contraction.weights[weight_key(L, nu)].detach()
            weights[f"{source}.{name}"] = kept * signs.reshape(1, -1, 1)
        else:
            combined = contraction.combined_weights(L, nu).detach()
            weights[f"{source}.{name}"] = torch.linalg.pinv(mixing) @ combined
    return weights


def _orders(layer: MACELayer) -> tuple[int, ...]:
    return tuple(l for l, size in enumerate(layer.atomic) if size)


def _parts(layer: MACELayer) -> Iterator[tuple[int, int, int, Products]]:
    """Number of the output, its order, degree and products, in upstream's order: largest degree first."""
    for k, L in enumerate(l for l, size in enumerate(layer.product) if size):
        for nu in range(layer.correlation, 0, -1):
            table = products(_orders(layer), L, nu)
            if table.multisets:
                yield k, L, nu, table


def _counts_fit(state: Mapping[str, Tensor], t: int, layer: MACELayer) -> bool:
    """Whether a layer in cuequivariance's layout has one weight per standard path (others tell the basis)."""
    flat = state.get(f"{_prefix(t)}.weight")
    return flat is None or flat.shape[1] == sum(table.mixing.shape[1] for *_, table in _parts(layer))


def _from_modules(
    state: Mapping[str, Tensor], t: int, layer: MACELayer, where: str, reduced: bool
) -> dict[str, _Found]:
    """Layout of e3nn: one tensor per output and degree."""
    weights = {}
    for k, L, nu, table in _parts(layer):
        source = f"{_prefix(t)}.contractions.{k}"
        name = "weights_max" if nu == layer.correlation else f"weights.{layer.correlation - nu - 1}"
        weight = state[f"{source}.{name}"]
        coupling = state.get(f"{source}.U_matrix_{nu}")
        if coupling is None:
            if reduced or weight.shape[1] != table.mixing.shape[1]:
                raise CheckpointError(
                    f"{where}: {source}.{name} has {weight.shape[1]} weights of another basis than the "
                    f"standard one of {table.mixing.shape[1]} paths, and the file does not hold the coupling "
                    "tensors (U_matrix) that they belong to."
                )
            weights[weight_key(L, nu)] = _standard(weight, _orders(layer), L, nu)
        else:
            mixing = _mixing(coupling, _orders(layer), L, nu, where)
            weights[weight_key(L, nu)] = _found(weight, mixing, table)
    return weights


def _standard(weight: Tensor, orders: tuple[int, ...], L: int, nu: int) -> _Found:
    """Weights of the paths in upstream's order, with e3nn 0.4's phases."""
    signs = torch.tensor([float(path_sign(path)) for path in coupling_paths(orders, L, nu)]).double()
    signed = weight * signs.reshape(1, -1, 1)
    return _Found(signed, torch.tensor(products(orders, L, nu).mixing) @ signed)


def _found(weight: Tensor, mixing: Tensor, table: Products) -> _Found:
    signs = _signs(mixing, table)
    if signs is None:
        return _Found(None, mixing @ weight)
    signed = weight * signs.reshape(1, -1, 1)
    return _Found(signed, torch.tensor(table.mixing) @ signed)


def _from_one_tensor(
    state: Mapping[str, Tensor], t: int, layer: MACELayer, where: str, reduced: bool
) -> dict[str, _Found]:
    """Layout of cuequivariance: all outputs and degrees side by side."""
    flat = state[f"{_prefix(t)}.weight"]
    if reduced:
        return _from_reduced_tensor(flat, layer, where)
    weights, start = {}, 0
    for _, L, nu, table in _parts(layer):
        stop = start + table.mixing.shape[1]
        weights[weight_key(L, nu)] = _standard(flat[:, start:stop], _orders(layer), L, nu)
        start = stop
    return weights


def _from_reduced_tensor(flat: Tensor, layer: MACELayer, where: str) -> dict[str, _Found]:
    """The same for reduced coupling tensors, whose basis only cuequivariance knows."""
    try:
        with environment_kept():
            from mace.tools import cg, cg_cueq_tools
            from mace.tools.cg import O3_e3nn, compute_U_cueq, cue
    except ImportError as error:
        raise UnsupportedFeatureError(
            f"{where}: the contraction is stored in cuequivariance's reduced basis. Install cuequivariance "
            "and 'compactmlip[mace]' to read it, or convert the model with mace_cueq_to_e3nn first."
        ) from error
    inputs = "+".join(f"1x{l}{'eo'[l % 2]}" for l in _orders(layer))
    outputs = [l for l, size in enumerate(layer.product) if size]
    names = "+".join(f"1x{l}{'eo'[l % 2]}" for l in outputs)
    irreps = [cue.Irreps(O3_e3nn, text) for text in (inputs, names)]
    degrees = list(range(1, layer.correlation + 1))
    with _double_precision(cg, cg_cueq_tools):
        _, projection = cg_cueq_tools.symmetric_contraction_proj(*irreps, degrees)
    inverse = torch.tensor(np.linalg.pinv(projection))
    spread = torch.einsum("zau,ab->zbu", flat, inverse)
    weights, start = {}, 0
    for _, L, nu, table in _parts(layer):
        with _double_precision(cg, cg_cueq_tools):
            coupling = compute_U_cueq(inputs, f"1x{L}{'eo'[L % 2]}", nu, dtype=torch.float64)[-1]
        stop = start + coupling.shape[-1]
        mixing = _mixing(coupling, _orders(layer), L, nu, where)
        weights[weight_key(L, nu)] = _found(spread[:, start:stop], mixing, table)
        start = stop
    return weights


@contextmanager
def _double_precision(cg: Any, tools: Any) -> Iterator[None]:
    """Meanwhile, these two modules of mace compute couplings in double, not in torch's default precision."""
    o3, dense = cg.o3, tools.U_matrix_real
    exact = partial(o3.wigner_3j, dtype=torch.float64)
    cg.o3 = SimpleNamespace(Irrep=o3.Irrep, Irreps=o3.Irreps, wigner_3j=exact)
    tools.U_matrix_real = partial(dense, dtype=torch.float64)
    try:
        yield
    finally:
        cg.o3, tools.U_matrix_real = o3, dense


def _phase(l1: int, l2: int, l3: int) -> int:
    """Sign of e3nn 0.4's coupling tensor relative to ours: flipped for orders {1, n, n} with n > 1."""
    low, middle, high = sorted((l1, l2, l3))
    return -1 if low == 1 and middle == high > 1 else 1


def path_sign(path: CouplingPath) -> int:
    """Product of the phases of a path's couplings."""
    sign, left = 1, path.orders[0]
    for l, out in zip(path.orders[1:], path.intermediates, strict=True):
        sign *= _phase(out, left, l)
        left = out
    return sign


def _mixing(coupling: Tensor, orders: tuple[int, ...], L: int, nu: int, where: str) -> Tensor:
    """Express dense coupling tensors by the independent products: (R, K) such that U = sum_r B_r mixing.

    Both are evaluated for random features, which sees exactly the symmetric part.
    """
    table = products(orders, L, nu)
    dense = coupling.double() if L else coupling.double().unsqueeze(0)
    dimension = sum(2 * l + 1 for l in orders)
    if dense.shape[:-1] != (2 * L + 1, *[dimension] * nu):
        raise CheckpointError(f"{where}: a coupling tensor of order {L} has shape {tuple(coupling.shape)}.")
    num = 4 + 2 * len(table.multisets)
    x = torch.tensor(np.random.default_rng(0).normal(size=(num, dimension)))
    components = [c for l in orders for c in range(l * l, (l + 1) * (l + 1))]
    position = {c: k for k, c in enumerate(components)}
    monomials = torch.stack([x[:, [position[c] for c in m]].prod(dim=1) for m in table.monomials], dim=1)
    basis = torch.einsum("rMm,xm->xMr", torch.tensor(table.coefficients), monomials)
    values = torch.einsum("...i,xi->x...", dense.movedim(-1, 1), x)
    for _ in range(nu - 1):
        values = torch.einsum("x...i,xi->x...", values, x)
    solution = torch.linalg.lstsq(basis.flatten(0, 1), values.flatten(0, 1), driver="gelsd").solution
    error = (basis @ solution - values).abs().max() / values.abs().max().clamp(min=1e-300)
    if error > 1e-5:
        raise UnsupportedFeatureError(
            f"{where}: the couplings of order {L} and degree {nu} are not symmetric products of natural "
            f"parity (deviation {float(error):.1e})."
        )
    return solution


def _signs(mixing: Tensor, table: Products) -> Tensor | None:
    """Signs that turn the standard paths into those of the file, or None if they are other paths."""
    standard = torch.tensor(table.mixing)
    if mixing.shape != standard.shape:
        return None
    overlap = (mixing * standard).sum(dim=0)
    signs = torch.where(overlap < 0, -1.0, 1.0).double()
    scale = standard.abs().max()
    return signs if bool(((standard * signs - mixing).abs() < 1e-4 * scale).all()) else None
