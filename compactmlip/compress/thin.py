"""Cut single paths of the tensor products: those first that are worth least for the work that they take.

Each path of a convolution couples one order of the neighbours' features with one of the harmonics of an edge.
In deployed SevenNet models paths take most of the time, and most of them add little to the accuracy.  Whether
a model that keeps its channels and loses paths learns better than one of the same speed with fewer channels
depends on the material; MACE models had better lose channels (benchmarks/results/paths.md).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from compactmlip.channels import is_path, parse_path
from compactmlip.compress.cost import Cost, Setting, Shapes
from compactmlip.compress.plan_file import Plan
from compactmlip.errors import InputError
from compactmlip.models import work

HARMONICS = "edge_harmonics/"


def cuttable_paths(shapes: Shapes) -> tuple[str, ...]:
    """Paths of a model that may go.

    Every layer keeps 0-0-0, so that none is left without any.
    """
    return tuple(n for n in shapes.graph.groups if is_path(n) and not n.endswith("/0-0-0"))


def kept_paths(shapes: Shapes, plan: Plan) -> list[str]:
    """Those of them that a plan leaves."""
    masks = shapes.graph.complete(shapes.masks(plan))
    return [name for name in cuttable_paths(shapes) if masks[name].all()]


def effort(shapes: Shapes, setting: Setting) -> Cost:
    """Work per atom in multiply-adds of a convolution: about proportional to the time, on any machine."""
    return lambda plan: work(shapes.pruned(plan)).effort(setting.edges_per_atom)


def without_paths(plan: Plan, names: Sequence[str]) -> Plan:
    """The plan without further paths."""
    return plan.model_copy(update={"without_paths": tuple(sorted({*plan.without_paths, *names}))})


def tidied(shapes: Shapes, plan: Plan) -> Plan:
    """The same plan without channels and harmonics that no path makes or uses any more."""
    masks = shapes.graph.complete(shapes.masks(plan))
    layers = []
    for t, channels in enumerate(plan.channels):
        names = [f"layers.{t}.out/{l}" for l in range(len(channels))]
        layers.append(tuple(int(masks[name].sum()) if name in masks else 0 for name in names))
    made = plan.model_copy(update={"layers": Plan.of(layers).layers, "without_paths": ()})
    if any(name.startswith(HARMONICS) for name in masks):
        used = [parse_path(name)[1][1] for name in masks if is_path(name) and masks[name].all()]
        made = made.model_copy(update={"edge_order": max(used)})
    made = without_paths(made, [name for name in kept_paths(shapes, made) if name in plan.without_paths])
    after = shapes.graph.complete(shapes.masks(made))
    different = [n for n, mask in after.items() if not np.array_equal(mask, masks[n])]
    return plan if any(not name.startswith(HARMONICS) for name in different) else made


def by_price(shapes: Shapes, plan: Plan, paths: Mapping[str, float], cost: Cost) -> list[str]:
    """Paths that a plan leaves, beginning with the least importance for the cost that they save.

    Parameters
    ----------
    shapes
        Of the model.
    plan
        What else is kept.
    paths
        Importance of each path, see :func:`compactmlip.compress.path_importance.path_importance`.
    cost
        What is saved.
    """
    whole = cost(plan)
    kept = kept_paths(shapes, plan)
    saved = {name: max(whole - cost(without_paths(plan, [name])), 1e-12 * whole) for name in kept}
    return sorted(kept, key=lambda name: paths[name] / saved[name])


def thinned(shapes: Shapes, plan: Plan, paths: Mapping[str, float], cost: Cost, bound: float) -> Plan | None:
    """The plan without as many of its paths as a cost of ``bound`` takes; None if all are too few.

    The last one may have saved more than was wanted, so that others, the most important ones first, come back
    where they still fit.
    """
    cut: list[str] = []
    for name in [None, *by_price(shapes, plan, paths, cost)]:
        cut += [] if name is None else [name]
        if cost(without_paths(plan, cut)) <= bound:
            break
    else:
        return None
    for name in sorted(cut, key=lambda name: -paths[name]):
        fewer = [other for other in cut if other != name]
        if cost(without_paths(plan, fewer)) <= bound:
            cut = fewer
    return tidied(shapes, without_paths(plan, cut))


def thinned_by_share(
    shapes: Shapes, plan: Plan, paths: Mapping[str, float], cost: Cost, share: float
) -> Plan:
    """The plan without a share of the paths that it leaves.

    Raises
    ------
    InputError
        If the share is not between 0 and 1.
    """
    if not 0 <= share <= 1:
        raise InputError(f"the share of paths to cut must be between 0 and 1, not {share:g}.")
    order = by_price(shapes, plan, paths, cost)
    return tidied(shapes, without_paths(plan, order[: round(share * len(order))]))
