"""Models whose operations have shapes that the numbers of atoms and edges alone decide.

Some programs cannot wait for values: exported machine code and recorded CUDA graphs.
"""

from __future__ import annotations

from torch import nn


def use_static_shapes(model: nn.Module) -> None:
    """Change a model so that no shape depends on distances or species.

    Modules that have a choice have the attribute ``static_shapes``.  What they leave out otherwise, edges
    beyond a layer's cutoff for instance, then contributes nothing but takes its time.
    """
    for module in model.modules():
        if hasattr(module, "static_shapes"):
            setattr(module, "static_shapes", True)  # noqa: B010 - mypy takes attributes of modules for tensors
