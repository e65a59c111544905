"""What a target architecture means for the channel groups of the NequIP family."""

from __future__ import annotations

from collections.abc import Sequence

from compactmlip.channels import Channels, path_group
from compactmlip.models.nequip import NequIPArchitecture
from compactmlip.models.targets import TargetOptions, Targets
from compactmlip.spec import ModelSpec


def target_sizes(spec: ModelSpec, target: Sequence[Channels], options: TargetOptions) -> Targets:
    """Number of channels to keep in each group.

    The last layer keeps only the orders that it has.  The embedding gets the scalars of the first layer,
    and the neighbours' features as many channels as enter the layer.  Spherical harmonics above
    ``edge_order`` (by default the largest order of the target) are dropped.  Without ``odd_paths``, so are
    the tensor-product paths with odd l1 + l2 + l3: they change sign under inversion, and without them the
    energy is exactly invariant.  Other paths go one by one.
    """
    arch = NequIPArchitecture.model_validate(spec.architecture)
    sizes = {"embedding/0": min(arch.embedding, target[0][0])}
    highest = max(len(channels) - 1 for channels in target)
    highest = highest if options.edge_order is None else options.edge_order
    for l in range(arch.lmax_edge + 1):
        sizes[f"edge_harmonics/{l}"] = int(l <= highest)
    into: Channels = (sizes["embedding/0"],)
    for t, (layer, wanted) in enumerate(zip(arch.layers, target, strict=True)):
        for l, available in enumerate(layer.up):
            if available:
                sizes[f"layers.{t}.up/{l}"] = min(available, into[l] if l < len(into) else 0)
        out = tuple(min(c, wanted[l]) if l < len(wanted) else 0 for l, c in enumerate(layer.out))
        for l, available in enumerate(layer.out):
            if available:
                sizes[f"layers.{t}.out/{l}"] = out[l]
        for k, available in enumerate(layer.radial_hidden):
            sizes[f"layers.{t}.radial.{k}/0"] = min(available, options.radial_hidden or available)
        for path in layer.paths:
            name, odd = path_group(t, path), bool(sum(path) % 2)
            sizes[name] = int((options.odd_paths or not odd) and name not in options.without_paths)
        into = out
    sizes["readout.hidden/0"] = min(arch.readout_hidden, options.readout_hidden or arch.readout_hidden)
    return Targets(sizes)


def channel_rows(spec: ModelSpec) -> list[tuple[str, str]]:
    """Rows (what, channels) for people."""
    return NequIPArchitecture.model_validate(spec.architecture).summary()
