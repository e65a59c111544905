"""Work of a lowered model of the MACE family; see :mod:`compactmlip.deploy.lower.mace`."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import cache
from itertools import pairwise

from compactmlip.channels import Channels
from compactmlip.kernels.contraction import contraction_plan
from compactmlip.models.gate import gate_input_channels
from compactmlip.models.mace_architecture import MACEArchitecture, MACELayer
from compactmlip.models.workload import Work, convolution_work, dense_work, padded
from compactmlip.spec import ModelSpec


def work(spec: ModelSpec, within: Callable[[float], float]) -> Work:
    """Count the work of an architecture, whose layers have no cutoffs of their own."""
    arch = MACEArchitecture.model_validate(spec.architecture)
    total = Work()
    for t, layer in enumerate(arch.layers):
        total += _interaction(layer, arch.channels_in(t), first=t == 0)
        last = t + 1 == len(arch.layers)
        total += _update(layer, arch, t, (layer.out[0],) if last else layer.out)
        if layer.readout is not None:
            sizes = (layer.out[0], *layer.readout.hidden, 1)
            total += Work(dense=float(sum(n * m for n, m in pairwise(sizes))))
    return total


def _interaction(layer: MACELayer, into: Channels, *, first: bool) -> Work:
    nonlinear = layer.interaction == "nonlinear"
    made = gate_input_channels(layer.down) if nonlinear else layer.down
    if first:
        found = convolution_work({(0, l, l): size for l, size in enumerate(made) if size})
        total = replace(found, gathered=0.0)
    else:
        paths = {path: layer.up[path[0]] for path in layer.paths}
        up = {l: (into[l], padded(size)) for l, size in enumerate(layer.up) if size and l < len(into)}
        rows = {l: sum(padded(size) for p, size in paths.items() if p[2] == l) for l in range(len(made))}
        down = {l: (rows[l], made[l]) for l in rows if rows[l] and made[l]}
        total = dense_work(up) + convolution_work(paths) + dense_work(down)
    if layer.interaction != "plain":
        total += convolution_work({(0, 0, 0): 1})
    if layer.has_inner:
        both = min(len(layer.inner), len(layer.atomic))
        total += dense_work({l: (layer.inner[l], layer.atomic[l]) for l in range(both) if layer.inner[l]})
    return total


def _update(layer: MACELayer, arch: MACEArchitecture, t: int, out: Channels) -> Work:
    alive = tuple(l for l, size in enumerate(layer.product) if size and l < len(out))
    orders = tuple(l for l, size in enumerate(layer.atomic) if size)
    operations = _operations(orders, alive, layer.correlation)
    total = Work(products=float(operations * layer.width))
    total += dense_work({l: (layer.width, out[l]) for l in alive if out[l]})
    if t > 0:
        into = arch.channels_in(t)
        total += dense_work({l: (into[l], out[l]) for l in arch.skip_orders(t) if l < len(out)})
    return total


@cache
def _operations(orders: tuple[int, ...], outputs: tuple[int, ...], degree: int) -> int:
    """Operations of a contraction for one channel."""
    return contraction_plan(orders, outputs, degree).operations[0] if outputs else 0
