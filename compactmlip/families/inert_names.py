"""Which names a ``.model`` file may use, and what stands in for those that are plain values."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from compactmlip.families.inert_objects import Constructor, InertGlobal, InertObject, Refused

NEWEST_MACE = "0.3.16"
_KNOWN_MACE = {
    "calculators.lammps_mace": "LAMMPS_MACE",
    "calculators.lammps_mliap_mace": "LAMMPS_MLIAP_MACE MACEEdgeForcesWrapper MACELammpsConfig MLIAPUnified",
    "modules.blocks": """
        AtomicEnergiesBlock EquivariantProductBasisBlock GeneralNonLinearBiasReadoutBlock InteractionBlock
        LinearDipolePolarReadoutBlock LinearDipoleReadoutBlock LinearNodeEmbeddingBlock LinearReadoutBlock
        NonLinearBiasReadoutBlock NonLinearDipolePolarReadoutBlock NonLinearDipoleReadoutBlock
        NonLinearReadoutBlock RadialEmbeddingBlock RealAgnosticAttResidualInteractionBlock
        RealAgnosticDensityInteractionBlock RealAgnosticDensityResidualInteractionBlock
        RealAgnosticInteractionBlock RealAgnosticResidualInteractionBlock
        RealAgnosticResidualNonLinearInteractionBlock ScaleShiftBlock""",
    "modules.embeddings": "GenericJointEmbedding",
    "modules.extensions": "MACELES PolarMACE",
    "modules.field_blocks": """
        AgnosticChargeBiasedLinearPotentialEmbedding AgnosticEmbeddedOneBodyVariableUpdate
        EnvironmentDependentSpinSourceBlock FieldUpdateBlock MLPNonLinearity MultiLayerFeatureMixer
        NoNonLinearity OneBodyMLPFieldReadout PostScfReadout PotentialEmbeddingBlock
        SparseUvuTensorProduct""",
    "modules.gate": "GatedEquivariantBlock",
    "modules.irreps_tools": "reshape_irreps",
    "modules.lora": "LoRADenseLinear LoRAFCLayer LoRAO3Linear",
    "modules.models": "AtomicDielectricMACE AtomicDipolesMACE EnergyDipolesMACE MACE ScaleShiftMACE",
    "modules.radial": """
        AgnesiTransform BesselBasis ChebychevBasis GaussianBasis PolynomialCutoff RadialMLP SoftTransform
        ZBLBasis""",
    "modules.symmetric_contraction": "Contraction EmptyParam SymmetricContraction",
    "modules.utils": "GraphContext InteractionKwargs",
    "modules.wrapper_ops": """
        CuEquivarianceConfig FullyConnectedTensorProduct Linear OEQConfig SymmetricContractionWrapper
        TensorProduct TransposeIrrepsLayoutWrapper""",
    "tools.cg": "O3_e3nn",
    "tools.utils": "AtomicNumberTable UniversalEncoder",
}
MACE_CLASSES = frozenset(
    f"mace.{module}.{name}" for module, names in _KNOWN_MACE.items() for name in names.split()
)
"""Classes of mace-torch up to NEWEST_MACE that a saved model can contain."""

_PACKAGES = (
    *("cuequivariance", "cuequivariance_ops_torch", "cuequivariance_torch", "e3nn", "openequivariance"),
    *("opt_einsum_fx", "torch.fx", "torch.jit", "torch.nn"),
)
_SINGLE = {("functools", "partial"), ("torch", "Tensor"), ("torch._C", "_VariableFunctionsClass")}


def is_inert(module: str, name: str) -> bool:
    """Whether the name belongs to a package that models are made of: it is kept as a name."""
    packages = any(module == package or module.startswith(f"{package}.") for package in _PACKAGES)
    return packages or f"{module}.{name}" in MACE_CLASSES or (module, name) in _SINGLE


def is_newer_mace(module: str, name: str) -> bool:
    """Whether the name is mace's, but unknown up to NEWEST_MACE."""
    return module.split(".")[0] == "mace" and f"{module}.{name}" not in MACE_CLASSES


@dataclass(frozen=True)
class StorageType(InertGlobal):
    """A name such as ``torch.FloatStorage``: the dtype of the numbers in a storage."""

    dtype: torch.dtype


def _tensor(storage: Any, offset: Any, size: Any, stride: Any, *_: Any) -> Tensor:
    """``_rebuild_tensor_v2`` (flags and hooks are dropped); as_strided refuses to leave the storage."""
    if not isinstance(storage, Tensor):
        raise Refused("it builds a tensor from something other than a storage")
    return storage.as_strided(size, stride, offset)


def _parameter(tensor: Any, requires_grad: Any, *_: Any) -> nn.Parameter:
    if not isinstance(tensor, Tensor):
        raise Refused("it builds a parameter from something other than a tensor")
    return nn.Parameter(tensor, requires_grad=bool(requires_grad))


def _tensor_with_attributes(function: Any, _kind: Any, args: Any, _attributes: Any) -> Tensor:
    """``_rebuild_from_type_v2``: a tensor with Python attributes, which are dropped."""
    if not isinstance(function, Constructor) or function.call not in (_tensor, _parameter):
        raise Refused(f"it builds a tensor with {function!r}")
    return function.call(*args)


def _graph_module(body: Any, *code: Any) -> InertObject:
    """``reduce_graph_module``, which would execute ``code``: the attributes are the first argument."""
    if not isinstance(body, dict):
        raise Refused("it builds a graph module from something other than its attributes")
    return InertObject("torch.fx.graph_module", "GraphModule", code, body)


def _getattr(owner: Any, name: Any, *_: Any) -> InertGlobal | InertObject:
    """``getattr``, by which functions such as torch.tanh are pickled: the name, not the attribute."""
    if not isinstance(owner, InertGlobal):
        return InertObject("builtins", "getattr", (owner, name))
    if (owner.module, owner.name) == ("torch._C", "_VariableFunctionsClass"):
        return InertGlobal("torch", str(name))
    return InertGlobal(f"{owner.module}.{owner.name}", str(name))


def _encode(text: str, encoding: str) -> bytes:
    """``_codecs.encode``, by which protocol 2 stores bytes."""
    if encoding != "latin1":
        raise Refused(f"it encodes text as {encoding}")
    return text.encode("latin1")


_PLAIN_DTYPES = ("b1", "i1", "i2", "i4", "i8", "u1", "u2", "u4", "u8", "f2", "f4", "f8")


def _numpy_dtype(kind: Any, *_: Any) -> np.dtype[Any]:
    if kind not in _PLAIN_DTYPES:
        raise Refused(f"it holds numpy data of type {kind!r}")
    return np.dtype(kind)


def _numpy_scalar(dtype: Any, content: Any) -> Any:
    if not isinstance(dtype, np.dtype):
        raise Refused("it holds a numpy number without a type")
    return np.frombuffer(content, dtype=dtype, count=1)[0]


_CALLS: dict[tuple[str, str], Callable[..., Any]] = {
    ("_codecs", "encode"): _encode,
    ("builtins", "frozenset"): frozenset,
    ("builtins", "getattr"): _getattr,
    ("builtins", "set"): set,
    ("builtins", "slice"): slice,
    ("collections", "OrderedDict"): OrderedDict,
    ("numpy", "dtype"): _numpy_dtype,
    ("numpy.core.multiarray", "_reconstruct"): lambda *_: np.empty(0),
    ("numpy.core.multiarray", "scalar"): _numpy_scalar,
    ("torch", "Size"): torch.Size,
    ("torch", "device"): torch.device,
    ("torch._tensor", "_rebuild_from_type_v2"): _tensor_with_attributes,
    ("torch._utils", "_rebuild_parameter"): _parameter,
    ("torch._utils", "_rebuild_parameter_with_state"): _parameter,
    ("torch._utils", "_rebuild_tensor_v2"): _tensor,
    ("torch.fx.graph_module", "reduce_graph_module"): _graph_module,
    # TorchScript's pickles name the types of lists and dictionaries.
    **{
        ("torch.jit._pickle", f"build_{kind}list"): lambda values: values
        for kind in ("bool", "double", "int", "tensor")
    },
    ("torch.jit._pickle", "restore_type_tag"): lambda value, _: value,
}
_STORAGES = {
    "BFloat16Storage": torch.bfloat16,
    "BoolStorage": torch.bool,
    "ByteStorage": torch.uint8,
    "CharStorage": torch.int8,
    "DoubleStorage": torch.float64,
    "FloatStorage": torch.float32,
    "HalfStorage": torch.float16,
    "IntStorage": torch.int32,
    "LongStorage": torch.int64,
    "ShortStorage": torch.int16,
}
VALUES: dict[tuple[str, str], Any] = {
    **{key: Constructor(*key, call) for key, call in _CALLS.items()},
    ("numpy", "ndarray"): InertGlobal("numpy", "ndarray"),
    **{("torch", name): StorageType("torch", name, dtype) for name, dtype in _STORAGES.items()},
    **{("torch", str(dtype).removeprefix("torch.")): dtype for dtype in _STORAGES.values()},
}
"""Stand-ins by (module, name): our own functions for values and calls, dtypes as they are."""
