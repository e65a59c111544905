"""Small systems on NVIDIA GPUs: energies and gradients as one CUDA graph, launched at once.

A model is hundreds of small operations, and for a few hundred atoms it takes longer to launch them than to
compute them.  A CUDA graph records the operations once and launches them together; it always works on the
same memory, and so on the same numbers of atoms and edges.  Structures are therefore padded with atoms and
edges that have nothing to do with the others.  The recording has not been run on a GPU so far; padding is
tested on the CPU.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from compactmlip.data.graph import Derivatives, GraphBatch, derivatives
from compactmlip.deploy.archive import NodeEnergy
from compactmlip.errors import InputError

HEADROOM = 1.1
"""Capacity over what is needed, so that the changing number of edges needs no new recording."""

GRANULARITY = 64
"""Capacities are multiples of this."""

WARM_UP = 3
"""Calculations before the recording, as torch.cuda.graph wants it: libraries set themselves up."""

BEYOND = 2.0
"""Length of padding edges in cutoffs."""

VALUE_DEPENDENT = frozenset(
    f"aten::{name}"
    for name in (
        "nonzero",
        "masked_select",
        "unique",
        "_unique2",
        "unique_dim",
        "item",
        "_local_scalar_dense",
    )
)
"""Operations that wait for a value, which a recording cannot contain."""


@dataclass(frozen=True)
class Capacity:
    """Numbers of atoms and edges of a recording; at least one atom is padding."""

    atoms: int
    edges: int

    @staticmethod
    def of(num_atoms: int, num_edges: int) -> Capacity:
        """Capacity with some headroom."""
        atoms, edges = (int(HEADROOM * n) // GRANULARITY + 1 for n in (num_atoms, num_edges))
        return Capacity(GRANULARITY * atoms, GRANULARITY * edges)

    def holds(self, num_atoms: int, num_edges: int) -> bool:
        """Whether a structure fits."""
        return num_atoms < self.atoms and num_edges <= self.edges


class PaddedInputs:
    """Input tensors of a fixed size, filled with one structure after the other.

    Parameters
    ----------
    capacity
        Their size.
    cutoff
        Of the model, Angstrom.
    dtype, device
        Of the edge vectors; where the tensors are.
    """

    def __init__(
        self, capacity: Capacity, cutoff: float, dtype: torch.dtype, device: torch.device | str
    ) -> None:
        self.capacity = capacity
        self.species = torch.zeros(capacity.atoms, dtype=torch.long, device=device)
        self.centers, self.neighbors = torch.zeros(2, capacity.edges, dtype=torch.long, device=device)
        self.vectors = torch.zeros(capacity.edges, 3, dtype=dtype, device=device)
        self._far = torch.tensor([BEYOND * cutoff, 0.0, 0.0], dtype=dtype, device=device)
        self._numbers = torch.arange(capacity.edges, device=device)

    def fill(self, batch: GraphBatch) -> None:
        """Copy a structure that fits, and pad the rest.

        Padding edges go from padding atoms to themselves and are longer than the cutoff.  They are spread
        over these atoms, in ascending order, so that edges stay sorted by centre and no atom gets them all.
        """
        num_atoms, num_edges = len(batch.species), len(batch.centers)
        if not self.capacity.holds(num_atoms, num_edges):
            raise ValueError(f"{num_atoms} atoms and {num_edges} edges do not fit into {self.capacity}")
        self.species[:num_atoms].copy_(batch.species)
        self.species[num_atoms:].zero_()
        spare_atoms, spare_edges = self.capacity.atoms - num_atoms, self.capacity.edges - num_edges
        padding = num_atoms + self._numbers[:spare_edges] * spare_atoms // max(1, spare_edges)
        for ends, given in ((self.centers, batch.centers), (self.neighbors, batch.neighbors)):
            ends[:num_edges].copy_(given)
            ends[num_edges:].copy_(padding)
        self.vectors[:num_edges].copy_(batch.vectors.detach())
        self.vectors[num_edges:].copy_(self._far.expand(spare_edges, 3))


class Padded:
    """Derivatives by calculations of a fixed size: what a recording computes, without the recording.

    Parameters
    ----------
    node_energy
        The model.
    cutoff
        Angstrom.
    """

    def __init__(self, node_energy: NodeEnergy, cutoff: float) -> None:
        self.node_energy, self.cutoff = node_energy, cutoff
        self.inputs: PaddedInputs | None = None

    def __call__(self, batch: GraphBatch) -> Derivatives:
        """Derivatives of one or several structures."""
        num_atoms, num_edges = len(batch.species), len(batch.centers)
        inputs = self.inputs
        if (
            inputs is None
            or not inputs.capacity.holds(num_atoms, num_edges)
            or inputs.vectors.dtype != batch.vectors.dtype
        ):
            capacity = Capacity.of(num_atoms, num_edges)
            vectors = batch.vectors
            inputs = self.inputs = PaddedInputs(capacity, self.cutoff, vectors.dtype, vectors.device)
            inputs.fill(batch)
            self.prepare(inputs)
        else:
            inputs.fill(batch)
        energies, gradient = self.run(inputs)
        # Copies where the result would be part of what the next replay overwrites.
        return derivatives(batch, energies[:num_atoms].clone(), gradient[:num_edges])

    def evaluate(self, inputs: PaddedInputs) -> tuple[Tensor, Tensor]:
        """Energies of the atoms, and the gradient of their sum with respect to the edge vectors."""
        vectors = inputs.vectors.detach().requires_grad_()
        with torch.enable_grad():
            energies = self.node_energy(inputs.species, inputs.centers, inputs.neighbors, vectors)
            (gradient,) = torch.autograd.grad(energies.sum(), vectors)
        return energies.detach(), gradient

    def prepare(self, inputs: PaddedInputs) -> None:
        """Called when the inputs are new tensors, with a structure in them."""

    def run(self, inputs: PaddedInputs) -> tuple[Tensor, Tensor]:
        """Energies and gradient of what is in the inputs."""
        return self.evaluate(inputs)


class Recorded(Padded):
    """The same by a CUDA graph, recorded when the inputs are new and replayed else."""

    _graph: torch.cuda.CUDAGraph
    _results: tuple[Tensor, Tensor]

    def prepare(self, inputs: PaddedInputs) -> None:
        """Record.

        Raises
        ------
        InputError
            If the model does something that cannot be recorded.
        """
        device = inputs.vectors.device
        try:
            with torch.cuda.device(device):
                side = torch.cuda.Stream()
                side.wait_stream(torch.cuda.current_stream())
                with torch.cuda.stream(side):
                    for _ in range(WARM_UP):
                        self.evaluate(inputs)
                torch.cuda.current_stream().wait_stream(side)
                graph = torch.cuda.CUDAGraph()
                with torch.cuda.graph(graph):
                    self._results = self.evaluate(inputs)
        except torch.OutOfMemoryError:
            self.inputs = None
            raise
        except RuntimeError as error:
            self.inputs = None
            reason = (str(error).strip().splitlines() or ["no reason given"])[0]
            raise InputError(
                f"the model cannot be recorded as a CUDA graph: {reason}. Leave out cuda_graph=True."
            ) from error
        self._graph = graph

    def run(self, inputs: PaddedInputs) -> tuple[Tensor, Tensor]:
        """Launch the recording."""
        with torch.cuda.device(inputs.vectors.device):
            self._graph.replay()
        return self._results


def check_recordable(path: Path, module: torch.jit.ScriptModule | None, device: torch.device) -> None:
    """Refuse what cannot be recorded.

    Parameters
    ----------
    path
        Of the file.
    module
        Its TorchScript module; None if it has none.
    device
        Where it is to run.

    Raises
    ------
    InputError
        If the device is not an NVIDIA GPU, or the file has operations that wait for values.
    """
    if device.type != "cuda":
        raise InputError(
            f"{path}: cuda_graph=True is for NVIDIA GPUs, not for device '{device}'. Leave it out, or use "
            "device='cuda'."
        )
    if module is None:
        raise InputError(f"{path}: only TorchScript files (*.pt) can be recorded; leave out cuda_graph=True.")
    found = sorted({node.kind() for node in module.inlined_graph.nodes()} & VALUE_DEPENDENT)
    if found:
        raise InputError(
            f"{path}: {', '.join(found)} cannot be part of a CUDA graph (weights per species in a file of "
            "--backend torch, or layers with cutoffs of their own). Compile the model again with "
            "--static-shapes, or leave out cuda_graph=True."
        )
