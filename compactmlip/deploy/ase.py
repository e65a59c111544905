"""ASE calculator for compiled models and for compactmlip checkpoints."""

from __future__ import annotations

import copy
import hashlib
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from ase import Atoms
from ase.calculators.calculator import Calculator, all_changes
from ase.stress import full_3x3_to_voigt_6_stress
from torch import nn

from compactmlip.data.graph import Derivatives, GraphBatch, build_graph
from compactmlip.data.neighbors import VerletList
from compactmlip.deploy.archive import DTYPES, usable_device
from compactmlip.deploy.engine import Engine, from_energies, load_engine
from compactmlip.deploy.trust import Outside
from compactmlip.errors import CheckpointError, InputError, OutsideError, TrustWarning, did_you_mean
from compactmlip.spec import DTypeName, ModelSpec


class CompactMLIPCalculator(Calculator):
    """Energy, forces and stress of a compactmlip model in ASE.

    Per-atom energies are summed in float64; forces and stress are derivatives of that sum with respect
    to the edge vectors.  Stress needs a cell with three vectors and at least one periodic direction.

    Parameters
    ----------
    model
        A compiled model (``*.pt``, ``*.pt2``), a checkpoint (``*.safetensors``), or a native model in
        memory, of which a copy is made.
    device
        For instance "cpu" or "cuda".
    dtype
        "float32" or "float64"; None takes the model's own.  A compiled model has only its own.
    skin
        Angstrom added to the cutoff of the neighbour list, so that it is searched again only when
        atoms may have come closer than the cutoff; results do not depend on it.  Zero searches at
        every step.
    cuda_graph
        Launch a calculation as one CUDA graph, which saves time on small systems: for compiled models on
        NVIDIA GPUs.  Not yet run on a GPU.
    check
        Compare the surroundings of all atoms with the file's trust region at the first and then at every
        ``check``-th calculation; each check costs about as much as an energy without forces.  0 never does.
        :attr:`outside` has the result, and the first time that atoms are outside, there is a
        :class:`compactmlip.errors.TrustWarning`.
    stop_outside
        Raise :class:`compactmlip.errors.OutsideError` instead of warning, before anything is calculated.

    Raises
    ------
    CheckpointError
        If the file is missing, damaged, of another type or of a newer version.
    InputError
        If an option cannot be used; if there is something to check and the model has no trust region.

    Notes
    -----
    A calculation raises :class:`SpeciesError` for a species that the model does not cover, and
    :class:`InputError` for positions or cells that mean nothing and for results that are not finite.
    Copies share the loaded model; pickles hold the path of the file, not its content, and refuse a file
    that has changed.
    """

    implemented_properties = ["energy", "free_energy", "energies", "forces", "stress"]  # noqa: RUF012
    ignored_changes = {"initial_charges", "initial_magmoms"}  # noqa: RUF012

    def __init__(
        self,
        model: str | Path | nn.Module,
        device: str = "cpu",
        dtype: DTypeName | None = None,
        skin: float = 0.5,
        cuda_graph: bool = False,
        check: int = 0,
        stop_outside: bool = False,
    ) -> None:
        super().__init__()
        if dtype is not None and dtype not in DTYPES:
            hint = did_you_mean(dtype, DTYPES)
            raise InputError(f"unknown dtype '{dtype}'; known: {', '.join(DTYPES)}.{hint}")
        self._source: Path | nn.Module
        self._sha256: str | None = None
        if isinstance(model, nn.Module):
            self._source = _detached_copy(model)
        else:
            # Absolute, so that a pickle can be used from another directory.
            self._source = Path(model).expanduser().absolute()
        _check_options(check, stop_outside)
        self._device, self._dtype, self._cuda_graph = str(device), dtype, bool(cuda_graph)
        engine = _load(self._source, self._device, dtype, self._cuda_graph)
        if isinstance(self._source, Path):
            self._sha256 = _sha256(self._source)
        if check and engine.trust is None:
            raise InputError(_without_region(self._source, engine))
        self._every, self._stop = int(check), bool(stop_outside)
        self._calculations, self._warned = 0, False
        self._outside: Outside | None = None
        self._engine: Engine | None = engine
        self._neighbors = VerletList(engine.spec.cutoff, skin)
        self.parameters.update(
            model=engine.spec.provenance.name if isinstance(model, nn.Module) else str(model),
            device=self._device,
            dtype=str(engine.dtype).removeprefix("torch."),
            skin=float(skin),
            cuda_graph=self._cuda_graph,
            check=self._every,
            stop_outside=self._stop,
        )

    @property
    def spec(self) -> ModelSpec:
        """Species, cutoff and provenance of the model."""
        return self._loaded().spec

    @property
    def dtype(self) -> torch.dtype:
        """Precision of the computation."""
        return self._loaded().dtype

    @property
    def outside(self) -> Outside | None:
        """Which atoms were outside the trust region at the last check, and why; None before the first.

        It is no entry of ``results``, because ASE refuses properties that it does not know.
        """
        return self._outside

    def set(self, **kwargs: Any) -> dict[str, Any]:
        """Refuse to change options of an existing calculator.

        Raises
        ------
        InputError
            If there is anything to change.
        """
        if kwargs:
            raise InputError(
                f"{', '.join(kwargs)}: options of a CompactMLIPCalculator are fixed; make a new calculator."
            )
        return {}

    def calculate(
        self,
        atoms: Atoms | None = None,
        properties: Sequence[str] = ("energy",),
        system_changes: Sequence[str] = all_changes,
    ) -> None:
        """Calculate all properties; called by ASE.

        Raises
        ------
        SpeciesError
            If the model does not cover a species.
        InputError
            If the structure has no meaning, or the model gives values that are not finite for it.
        OutsideError
            If atoms are outside the trust region and that should stop the calculation.
        """
        self.results = {}
        super().calculate(atoms, list(properties), list(system_changes))
        if self.atoms is None:
            raise InputError("there are no atoms to calculate; use atoms.calc = calculator.")
        engine = self._loaded()
        # A caller may be in inference mode, where no gradient could be taken.
        with torch.inference_mode(False):
            edges = self._neighbors.edges(self.atoms)
            graph = build_graph(self.atoms, engine.spec, engine.dtype, edges).to(device=engine.device)
            self._check_trust(engine, graph)
            found = engine.evaluate(graph)
        self.results = _results(found)

    def _check_trust(self, engine: Engine, graph: GraphBatch) -> None:
        """Look, at every ``check``-th calculation, for atoms outside the trust region."""
        due = self._every and self._calculations % self._every == 0
        self._calculations += 1
        if not due or engine.trust is None:
            return
        scores = engine.trust(graph.species, graph.centers, graph.neighbors, graph.vectors)
        self._outside = found = Outside(scores.cpu().numpy())
        if not found.count:
            return
        where = f"{found.describe()} (calculation {self._calculations}, {self.parameters['model']})"
        if self._stop:
            raise OutsideError(f"{where}. Train or calibrate the model on such structures, or do not stop.")
        if not self._warned:
            self._warned = True
            message = f"{where}; this is said once, see the calculator's 'outside' for later checks."
            warnings.warn(TrustWarning(message), stacklevel=3)

    def _get_name(self) -> str:
        return "compactmlip"

    def _loaded(self) -> Engine:
        """Model, loaded again after unpickling."""
        if self._engine is None:
            engine = _load(self._source, self._device, self._dtype, self._cuda_graph)
            if isinstance(self._source, Path) and _sha256(self._source) != self._sha256:
                raise CheckpointError(
                    f"{self._source}: the file has changed since the calculator was made from it; "
                    "make a new calculator."
                )
            self._engine = engine
        return self._engine

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_engine": None}

    def __deepcopy__(self, memo: dict[int, Any]) -> CompactMLIPCalculator:
        new = self.__class__.__new__(self.__class__)
        memo[id(self)] = new
        shared = {"_engine", "_source"}  # never changed
        for name, value in self.__dict__.items():
            setattr(new, name, value if name in shared else copy.deepcopy(value, memo))
        return new

    def __copy__(self) -> CompactMLIPCalculator:
        return copy.deepcopy(self)


@torch.inference_mode(False)  # weights made in a caller's inference mode could not take part in gradients
def _load(source: Path | nn.Module, device: str, dtype: DTypeName | None, cuda_graph: bool = False) -> Engine:
    target = usable_device(device)
    if cuda_graph and (isinstance(source, nn.Module) or source.suffix == ".safetensors"):
        raise InputError("cuda_graph=True is for compiled models (*.pt); leave it out, or compile the model.")
    if isinstance(source, nn.Module):
        return _native(copy.deepcopy(source), target, dtype)
    if source.suffix == ".safetensors":
        from compactmlip.checkpoint import load

        return _native(load(source), target, dtype)
    engine = load_engine(source, target, cuda_graph=cuda_graph)
    if dtype is not None and dtype != engine.spec.dtype:
        raise InputError(
            f"{source}: compiled in {engine.spec.dtype}, which cannot be changed to {dtype} afterwards; "
            f"compile the checkpoint again with --dtype {dtype}, or leave dtype out."
        )
    return engine


def _native(model: nn.Module, device: torch.device, dtype: DTypeName | None) -> Engine:
    from compactmlip.models import cast, model_dtype, model_spec

    model = model.to(device).eval().requires_grad_(False)
    if dtype is not None:
        model = cast(model, DTYPES[dtype])
    return Engine(model_spec(model), from_energies(model), model_dtype(model), device)


@torch.inference_mode(False)
def _detached_copy(model: nn.Module) -> nn.Module:
    """Copy of a native model that later training does not change."""
    if not isinstance(getattr(model, "spec", None), ModelSpec):
        raise InputError(
            f"a {type(model).__name__} is not a compactmlip model; give the path of a compiled model (*.pt) "
            "or of a checkpoint (*.safetensors)."
        )
    return copy.deepcopy(model)


def _check_options(check: int, stop_outside: bool) -> None:
    if isinstance(check, bool) or not isinstance(check, int | np.integer) or check < 0:
        raise InputError(f"check={check}: give a whole number of calculations, or 0 for no check.")
    if stop_outside and not check:
        raise InputError("stop_outside needs check: give check=1 to check at every calculation.")


def _without_region(source: Path | nn.Module, engine: Engine) -> str:
    """Why a model has no trust region, and what to do."""
    name = source if isinstance(source, Path) else "a model in memory"
    if engine.deployment is None:
        reason = "only compiled files have a trust region"
    elif engine.deployment.backend == "aoti":
        reason = "machine code (--backend aoti) has no trust region"
    else:
        reason = "the file was compiled without calibration structures"
    return (
        f"{name}: {reason}, so there is nothing to check. Compile it with 'compactmlip compile --calibration "
        "structures.xyz' (--backend kernels or torch), or leave check out."
    )


def _results(found: Derivatives) -> dict[str, Any]:
    """Results in ASE's form and units."""
    energies = found.node_energies.cpu().numpy().astype(np.float64)
    forces = found.forces.cpu().numpy().astype(np.float64)
    stress = found.stresses[0].cpu().numpy().astype(np.float64)
    bad = np.flatnonzero(~(np.isfinite(energies) & np.isfinite(forces).all(axis=1)))
    if bad.size:
        raise InputError(
            f"the model gives an energy or force that is not finite, first at atom {bad[0]}. The structure "
            "may be far from all that the model knows (atoms very close, time step too long), or the model "
            "is broken."
        )
    energy = float(found.energies[0])
    results = {"energy": energy, "free_energy": energy, "energies": energies, "forces": forces}
    if np.isfinite(stress).all():
        results["stress"] = full_3x3_to_voigt_6_stress(stress)
    return results


def _sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()
