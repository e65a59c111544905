"""Worker of engine.py for mace-torch and sevenn; run by an interpreter that has one of them.

It needs neither compactmlip nor the other package.  Requests and answers: see process.py.
"""

from __future__ import annotations

import os

os.environ.setdefault("TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD", "1")

import warnings
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from ase import Atoms
from ase.build import bulk
from process import TURN_SECONDS, limit_memory, peak_memory, serve, sustained
from torch import Tensor, nn

TYPICAL_FORCE = 0.5
"""eV/Angstrom, root mean square of the components in rattled silicon."""

DTYPES = {"float32": torch.float32, "float64": torch.float64}


def mace_model(hidden_irreps: str, num_bessel: int = 10, density: bool = False) -> nn.Module:
    """One of mace-torch's released architectures, 89 elements, with random weights."""
    from e3nn import o3
    from mace import modules

    kind = "RealAgnosticDensity{}InteractionBlock" if density else "RealAgnosticResidualInteractionBlock"
    torch.manual_seed(0)
    return modules.ScaleShiftMACE(
        r_max=6.0,
        num_bessel=num_bessel,
        num_polynomial_cutoff=5,
        max_ell=3,
        interaction_cls=modules.interaction_classes[kind.format("Residual")],
        interaction_cls_first=modules.interaction_classes[kind.format("")],
        num_interactions=2,
        num_elements=89,
        hidden_irreps=o3.Irreps(hidden_irreps),
        MLP_irreps=o3.Irreps("16x0e"),
        atomic_energies=np.zeros(89),
        avg_num_neighbors=62.0,
        atomic_numbers=list(range(1, 90)),
        correlation=3,
        gate=torch.nn.functional.silu,
        radial_MLP=[64, 64, 64],
        atomic_inter_scale=0.8,
        atomic_inter_shift=0.2,
        use_reduced_cg=False,
        distance_transform="Agnesi" if density else "None",
        pair_repulsion=density,
    )


def mace_batch(model: Any, atoms: Atoms) -> dict[str, Any]:
    """One structure as mace-torch's models want it; torch's default dtype."""
    from mace import data
    from mace.tools import torch_geometric, utils

    numbers = utils.AtomicNumberTable([int(z) for z in model.atomic_numbers])
    one = data.AtomicData.from_config(
        data.config_from_atoms(atoms), z_table=numbers, cutoff=float(model.r_max)
    )
    loader = torch_geometric.dataloader.DataLoader([one], batch_size=1, shuffle=False)
    return dict(next(iter(loader)).to_dict())


def mace_run(model: str, atoms: Atoms, dtype: torch.dtype, device: str) -> Callable[[], Callable[[], Tensor]]:
    """What prepares a calculation of energy and forces with a saved model."""
    torch.set_default_dtype(dtype)
    loaded = torch.load(model, weights_only=False).to(device, dtype).eval()
    for parameter in loaded.parameters():
        parameter.requires_grad_(False)  # as in mace-torch's calculator
    batch = {key: value.to(device) for key, value in mace_batch(loaded, atoms).items()}
    return lambda: lambda: loaded(batch, compute_stress=False)["forces"].detach()


def sevenn_run(
    model: str, atoms: Atoms, dtype: torch.dtype, device: str
) -> Callable[[], Callable[[], Tensor]]:
    """The same with a named SevenNet model."""
    from sevenn import _keys as keys
    from sevenn.atom_graph_data import AtomGraphData
    from sevenn.calculator import SevenNetCalculator
    from sevenn.train.dataload import unlabeled_atoms_to_graph

    calculator = SevenNetCalculator(model, device=device)
    loaded = calculator.model.to(dtype)
    if dtype == torch.float64:
        _make_double(loaded)
    arrays = unlabeled_atoms_to_graph(atoms, calculator.cutoff)
    graph = AtomGraphData.from_numpy_dict(dict(arrays))
    for name, value in arrays.items():
        # From the arrays, because the graph holds them in float32.
        if isinstance(value, np.ndarray) and value.dtype.kind == "f":
            graph[name] = torch.as_tensor(value, dtype=dtype)

    graph = graph.to(device)

    def prepare() -> Callable[[], Tensor]:
        fresh = graph.clone()  # the model writes its results into it
        return lambda: loaded(fresh)[keys.PRED_FORCE].detach()

    return prepare


def _make_double(model: nn.Module) -> None:
    """Make a model in float64 compute in it: one-hot vectors and Wigner 3j symbols are float32 by default."""
    from e3nn.o3 import wigner_3j
    from sevenn.nn.node_embedding import OnehotEmbedding

    def upcast(module: nn.Module, arguments: object, data: Any) -> Any:
        for name, value in list(data.items()):
            if isinstance(value, Tensor) and value.dtype == torch.float32:
                data[name] = value.double()
        return data

    for module in model.modules():
        if isinstance(module, OnehotEmbedding):
            module.register_forward_hook(upcast)
    for name, symbols in model.named_buffers():
        if "_w3j_" in name:
            symbols.copy_(wigner_3j(*map(int, name.split("_")[-3:]), dtype=torch.float64))


RUNS = {"mace": mace_run, "sevenn": sevenn_run}


class Calculation:
    """Energies and forces of one structure by one model."""

    def setup(
        self,
        package: str,
        model: str,
        structure: str,
        dtype: str,
        threads: int,
        memory: float,
        device: str = "cpu",
    ) -> dict[str, Any]:
        limit_memory(memory)
        torch.set_num_threads(threads)
        self.prepare = RUNS[package](model, read_structure(structure), DTYPES[dtype], device)
        self.on_gpu = torch.device(device).type == "cuda"
        self.forces = torch.empty(0)
        return {"memory_before": peak_memory()}

    def run(self) -> dict[str, Any]:
        # A calculation may need a copy of the graph, which is no part of it.
        self.forces, times = sustained(lambda: self._finished(self.prepare()), TURN_SECONDS)
        return dict(times)

    def _finished(self, calculate: Callable[[], Tensor]) -> Callable[[], Tensor]:
        def finished() -> Tensor:
            forces = calculate()
            if self.on_gpu:
                torch.cuda.synchronize()
            return forces

        return finished

    def finish(self, forces: str) -> dict[str, Any]:
        np.save(forces, self.forces.double().cpu().numpy())
        return {"memory": peak_memory()}


def read_structure(path: str) -> Atoms:
    """Periodic structure from an array file."""
    with np.load(path) as arrays:
        return Atoms(arrays["numbers"], arrays["positions"], cell=arrays["cell"], pbc=True)


def make_mace(path: str, **settings: Any) -> dict[str, Any]:
    """Save a model with random weights (float64), scaled so that its forces are those of a real material.

    Random weights give forces of about 1e-4 eV/Angstrom, below the errors that tables of radial functions may
    have, and the comparison would be too easy.
    """
    torch.set_default_dtype(torch.float64)
    model: Any = mace_model(**settings)
    silicon = bulk("Si", "diamond", a=5.43, cubic=True)
    silicon.rattle(0.05, seed=0)
    forces = model(mace_batch(model, silicon))["forces"]
    model.scale_shift.scale *= TYPICAL_FORCE / float(forces.square().mean().sqrt())
    torch.save(model, path)
    return {}


def main() -> None:
    warnings.simplefilter("ignore")
    calculation = Calculation()
    serve(
        {
            "make_mace": make_mace,
            "setup": calculation.setup,
            "run": calculation.run,
            "finish": calculation.finish,
        }
    )


if __name__ == "__main__":
    main()
