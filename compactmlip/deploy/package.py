"""Files with machine code (``*.pt2``): what they are bound to, and how they are run.

The code, made by AOTInductor, maps ``(species, centers, neighbors, vectors)`` to the energy of each atom
(N,) and to the gradient of their sum with respect to the vectors (E, 3).  It runs in one version of torch
on processors that have the instructions of the one it was made on.
"""

from __future__ import annotations

import platform
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from compactmlip.data.graph import GraphBatch
from compactmlip.deploy.archive import Binary, Deployment
from compactmlip.errors import CheckpointError, InputError

SMALLEST = 2
"""Numbers of atoms and edges from here on are free in the code; smaller inputs are padded."""

PREFIXES = (
    *("abm", "adx", "aes", "amx", "avx", "bmi", "f16c", "fma", "gfni", "lzcnt", "movbe", "pclmul"),
    *("popcnt", "sha", "sse", "ssse", "vaes", "vpclmul", "xop"),
    *("asimd", "neon", "sve"),
)
"""Beginnings of the names that Linux gives to sets of instructions which a compiler may use."""


def this_machine() -> Binary:
    """Return what machine code made here is bound to."""
    return Binary(machine=platform.machine(), instruction_sets=_instruction_sets())


def check_runs_here(path: Path, deployment: Deployment, device: torch.device) -> None:
    """Refuse machine code that cannot run here, or could crash.

    Raises
    ------
    CheckpointError
        If it was made with another torch or for another processor.
    InputError
        If the device is not the CPU.
    """
    mend = (
        f"Compile the model again here: compactmlip compile CHECKPOINT.safetensors -o {path.name} "
        f"--backend aoti --dtype {deployment.precision or 'float32'}"
    )
    if device.type != "cpu":
        raise InputError(
            f"{path}: compiled with --backend aoti for the CPU, and cannot run on '{device}'. "
            "Compile the model again with --backend cueq (needs cuequivariance) or --backend torch."
        )
    if deployment.torch_version != str(torch.__version__):
        raise CheckpointError(
            f"{path}: machine code made with torch {deployment.torch_version}, which torch "
            f"{torch.__version__} cannot run. {mend}"
        )
    made, here = deployment.binary, this_machine()
    if made is None:
        raise CheckpointError(f"{path}: does not say for which processor it was made. {mend}")
    if made.machine != here.machine:
        raise CheckpointError(
            f"{path}: machine code for {made.machine} processors, and this is {here.machine}. {mend}"
        )
    missing = sorted(set(made.instruction_sets) - set(here.instruction_sets))
    if missing:
        raise CheckpointError(
            f"{path}: made on a processor with instructions that this one lacks ({', '.join(missing)}). "
            f"{mend}"
        )


class PackagedModel:
    """Machine code from a file, ready to run.

    Parameters
    ----------
    path
        A file for which :func:`check_runs_here` had no objection.
    cutoff
        Of the model, Angstrom.

    Raises
    ------
    CheckpointError
        If torch cannot load it.
    """

    def __init__(self, path: Path, cutoff: float) -> None:
        self.cutoff = cutoff
        try:
            # The loader below torch._inductor.aoti_load_package, which takes seconds to import.
            from torch._C._aoti import AOTIModelPackageLoader

            self._loader: Any = AOTIModelPackageLoader(str(path), "model", False, 1, -1)
        except (ImportError, RuntimeError) as error:
            reason = str(error).strip().splitlines()[0]
            raise CheckpointError(
                f"{path}: torch {torch.__version__} cannot load it: {reason}. Copy it again, or compile the "
                "model again."
            ) from error

    def __call__(self, batch: GraphBatch) -> tuple[Tensor, Tensor]:
        """Return energies (N,) in eV and their sum's gradient (E, 3) in eV/Angstrom."""
        num_atoms, num_edges = len(batch.species), len(batch.centers)
        inputs = [batch.species, batch.centers, batch.neighbors, batch.vectors.detach()]
        if num_atoms < SMALLEST or num_edges < SMALLEST:
            inputs = self._padded(*inputs)
        energies, gradient = self._loader.run([t.contiguous() for t in inputs])
        return energies[:num_atoms], gradient[:num_edges]

    def _padded(self, species: Tensor, centers: Tensor, neighbors: Tensor, vectors: Tensor) -> list[Tensor]:
        """The same with a molecule of two atoms that shares no edge with the others, which keep their values.

        Its bond is half the cutoff long, so that nothing in it is infinite.
        """
        first = len(species)
        ends = torch.tensor([first, first + 1])
        bond = vectors.new_tensor([0.5 * self.cutoff, 0.0, 0.0])
        return [
            torch.cat([species, torch.zeros(2, dtype=species.dtype)]),
            torch.cat([centers, ends]),
            torch.cat([neighbors, ends.flip(0)]),
            torch.cat([vectors, torch.stack([bond, -bond])]),
        ]


def _instruction_sets() -> tuple[str, ...]:
    try:
        text = Path("/proc/cpuinfo").read_text(errors="replace")
    except OSError:
        return ()
    for line in text.splitlines():
        key, _, value = line.partition(":")
        if key.strip().lower() in ("flags", "features"):
            return tuple(sorted({name for name in value.split() if name.startswith(PREFIXES)}))
    return ()
