"""Work of a lowered model of the NequIP family; see :mod:`compactmlip.deploy.lower.nequip`."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

from compactmlip.models.gate import gate_input_channels
from compactmlip.models.nequip import NequIPArchitecture
from compactmlip.models.workload import Work, convolution_work, dense_work, padded
from compactmlip.spec import ModelSpec


def work(spec: ModelSpec, within: Callable[[float], float]) -> Work:
    """Count the work of an architecture; ``within`` is the share of neighbours below a distance."""
    arch = NequIPArchitecture.model_validate(spec.architecture)
    total = Work(dense=float(arch.channels_in(len(arch.layers))[0]))
    for t, layer in enumerate(arch.layers):
        share = 1.0 if layer.cutoff is None else within(layer.cutoff)
        total += (_first(arch) if t == 0 else _later(arch, t)).with_edges(share)
    return total


def _first(arch: NequIPArchitecture) -> Work:
    """What neighbours send, and the map behind the convolution, are part of the tables."""
    layer = arch.layers[0]
    gates = gate_input_channels(layer.out)
    orders = {path[2] for path in layer.paths}
    found = convolution_work({(0, l, l): gates[l] for l in sorted(orders)})
    return replace(found, gathered=0.0, kept=found.kept + _gate(layer.out))


def _later(arch: NequIPArchitecture, t: int) -> Work:
    layer, into = arch.layers[t], arch.channels_in(t)
    gates = gate_input_channels(layer.out)
    sent = {l: padded(size) for l, size in enumerate(layer.up) if size and l < len(into)}
    kept = {
        l: gates[l] for l in range(min(len(gates), len(into))) if into[l] and arch.self_connection != "none"
    }
    maps = {l: (into[l], sent.get(l, 0) + kept.get(l, 0)) for l in range(len(into)) if l in sent or l in kept}
    paths = {path: layer.up[path[0]] for path in layer.paths}
    rows = {l: sum(padded(size) for p, size in paths.items() if p[2] == l) for l in range(len(gates))}
    down = {l: (rows[l], gates[l]) for l in rows if rows[l] and gates[l]}
    return dense_work(maps) + convolution_work(paths) + dense_work(down) + Work(kept=_gate(layer.out))


def _gate(out: tuple[int, ...]) -> float:
    return float(sum((2 * l + 1) * size for l, size in enumerate(out)))
