"""What a target architecture means for the channel groups of the MACE family."""

from __future__ import annotations

from collections.abc import Sequence

from compactmlip.channels import Channels, format_channels, path_group
from compactmlip.models.mace_architecture import MACEArchitecture, MACELayer
from compactmlip.models.targets import TargetOptions, Targets, Tie
from compactmlip.spec import ModelSpec


def target_sizes(spec: ModelSpec, target: Sequence[Channels], options: TargetOptions) -> Targets:
    """Number of channels to keep in each group.

    The last layer keeps only the orders that it has.  The embedding gets the scalars of the first layer,
    the neighbours' features as many channels as enter the layer, and the contraction as many channels as
    the layer has scalars, the same ones for all orders.  They are scored where they leave the
    contraction (Structural Pruning, D.3).  Spherical harmonics are kept: they are the many-body part's
    angular resolution, whatever the orders of the hidden features.
    """
    arch = MACEArchitecture.model_validate(spec.architecture)
    sizes = {"embedding/0": min(arch.embedding, target[0][0])}
    ties: list[Tie] = []
    into: Channels = (sizes["embedding/0"],)
    for t, (layer, wanted) in enumerate(zip(arch.layers, target, strict=True)):
        prefix = f"layers.{t}"
        out = tuple(min(c, wanted[l]) if l < len(wanted) else 0 for l, c in enumerate(layer.out))
        for l in _present(layer.up):
            sizes[f"{prefix}.up/{l}"] = min(layer.up[l], into[l] if l < len(into) else 0)
        for l in _present(layer.out):
            sizes[f"{prefix}.out/{l}"] = out[l]
        if layer.pair_embedding is not None:
            for name, size in zip(("source", "target"), layer.pair_embedding, strict=True):
                sizes[f"{prefix}.{name}/0"] = min(size, into[0])
        if layer.interaction != "nonlinear":
            for k, available in enumerate(layer.radial_hidden):
                sizes[f"{prefix}.radial.{k}/0"] = min(available, options.radial_hidden or available)
        if layer.readout is not None:
            for k, available in enumerate(layer.readout.hidden):
                sizes[f"{prefix}.readout.{k}/0"] = min(available, options.readout_hidden or available)
        sizes |= {name: 0 for p in layer.paths if (name := path_group(t, p)) in options.without_paths}
        ties += _contraction(layer, prefix, out, min(layer.width, wanted[0]), sizes)
        into = out
    return Targets(sizes, tuple(ties))


def _present(channels: Channels) -> list[int]:
    return [l for l, size in enumerate(channels) if size]


def _contraction(
    layer: MACELayer, prefix: str, out: Channels, width: int, sizes: dict[str, int]
) -> list[Tie]:
    """Sizes of everything that has the contraction's channels; the tie that keeps them the same."""
    for l in _present(layer.inner):
        sizes[f"{prefix}.inner/{l}"] = min(layer.inner[l], width)
    for l in _present(layer.atomic):
        sizes[f"{prefix}.atomic/{l}"] = min(layer.atomic[l], width)
    alive = [l for l in _present(layer.product) if l < len(out) and out[l]]
    for l in _present(layer.product):
        sizes[f"{prefix}.product/{l}"] = min(layer.product[l], width) if l in alive else 0
    if layer.atomic_positions or layer.product_positions:
        return []
    products = tuple(f"{prefix}.product/{l}" for l in alive)
    atomic = tuple(f"{prefix}.atomic/{l}" for l in _present(layer.atomic))
    return [Tie((*products, *atomic), scored_by=products)]


def channel_rows(spec: ModelSpec) -> list[tuple[str, str]]:
    """Rows (what, channels) for people."""
    arch = MACEArchitecture.model_validate(spec.architecture)
    rows = [("embedding", format_channels((arch.embedding,)))]
    for t, layer in enumerate(arch.layers):
        rows.append((f"layer {t}", f"{format_channels(layer.out)}, {len(layer.paths)} paths"))
        rows.append((f"layer {t} contraction", f"{layer.width} channels, {layer.correlation} factors"))
    return rows
