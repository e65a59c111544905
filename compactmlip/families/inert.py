"""Read whole-module ``.model`` files (``torch.save(module)``) of MACE without the code that wrote them.

Such a file is a zip archive of tensors and a pickle that names classes of mace, e3nn, cuequivariance and
torch, among them ``reduce_graph_module``, which would execute source code from the file.  Here nothing
from the file is executed: see :mod:`compactmlip.families.inert_pickle`.  Names of those packages become
inert records, tensors and plain values are built by our own functions, and every other name is refused.
TorchScript that e3nn stores inside (``__codegen__``) is read in the same way, for its buffers.
"""

from __future__ import annotations

import io
import re
import sys
import zipfile
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from compactmlip.errors import CheckpointError, UnsupportedFeatureError
from compactmlip.families.inert_names import NEWEST_MACE, VALUES, StorageType, is_inert, is_newer_mace
from compactmlip.families.inert_objects import InertGlobal, InertObject, Refused
from compactmlip.families.inert_pickle import read_pickle

__all__ = ["InertGlobal", "InertObject", "irreps", "load_inert", "modules", "state_dict"]

_DAMAGE = (
    *(ArithmeticError, AttributeError, EOFError, LookupError, OSError, RuntimeError, TypeError, ValueError),
    *(zipfile.BadZipFile, zlib.error),
)
_MAX_DEPTH = 100  # of nested modules; real models have about ten
_MAX_MODULES = 100_000  # under all their names; real models have hundreds


def load_inert(path: Path) -> InertObject:
    """Read a whole-module file; nothing in it is run, and no upstream package is imported.

    Returns
    -------
    The root object; tensors are on the CPU, in their stored dtype.

    Raises
    ------
    CheckpointError
        If the file is missing, damaged, TorchScript or a state dict, or names anything that is neither a
        plain value nor part of a known upstream package.
    UnsupportedFeatureError
        If it names a class that the newest known mace-torch does not have.
    """
    path = Path(path)
    if not path.is_file():
        raise CheckpointError(f"{path}: no such file.")
    if not zipfile.is_zipfile(path):
        raise CheckpointError(
            f"{path}: not a complete PyTorch file (no zip archive). It is empty, truncated or of another "
            "type; fetch it again. If PyTorch before 1.6 wrote it, load and save it once with a newer one."
        )
    try:
        with zipfile.ZipFile(path) as archive:
            root = _Archive(archive, str(path)).read()
    except Refused as error:
        raise CheckpointError(
            f"{path}: refused, because {error}. Nothing in the file has been run. No MACE model needs this: "
            "do not open the file with other programs, and get the model from its publisher again."
        ) from error
    except _DAMAGE as error:
        raise CheckpointError(
            f"{path}: cannot be read ({error or type(error).__name__}). It is truncated or damaged."
        ) from error
    if not isinstance(root, InertObject):
        raise CheckpointError(
            f"{path}: holds a {type(root).__name__}, perhaps a state dict, and no model. Names and tensors "
            "alone do not say how it is built: give the .model file, or the state dict with its config."
        )
    return root


class _Archive:
    """One PyTorch zip archive: the file itself, or TorchScript stored inside it."""

    def __init__(self, archive: zipfile.ZipFile, where: str, scripted: bool = False) -> None:
        self._zip = archive
        self._where = where
        self._scripted = scripted
        self._storages: dict[str, Tensor] = {}
        self._prefix = _prefix(archive)

    def read(self) -> Any:
        """Read data.pkl."""
        names = set(self._zip.namelist())
        if f"{self._prefix}constants.pkl" in names and not self._scripted:
            raise CheckpointError(
                f"{self._where}: a TorchScript file, compiled for LAMMPS or for deployment; the structure of "
                "the model cannot be read from it. Give the original .model file that it was made from."
            )
        if f"{self._prefix}byteorder" in names:
            order = self._zip.read(f"{self._prefix}byteorder").decode()
            if order != sys.byteorder:
                raise Refused(f"its tensors are in {order}-endian byte order, unlike this machine's")
        return self._with_scripts(
            read_pickle(self._zip.read(f"{self._prefix}data.pkl"), self._find_global, self._storage)
        )

    def _find_global(self, module: str, name: str) -> InertGlobal:
        module = {"__builtin__": "builtins"}.get(module, module).replace("numpy._core.", "numpy.core.")
        if (module, name) in VALUES:
            return VALUES[module, name]
        if is_newer_mace(module, name):
            raise UnsupportedFeatureError(
                f"{self._where}: uses {module}.{name}, which mace-torch {NEWEST_MACE}, the newest that this "
                "compactmlip knows, does not have. Upgrade compactmlip; or, with the mace-torch that wrote "
                "the file, save the state dict and the config of the model, and import those."
            )
        if is_inert(module, name) or (self._scripted and module.startswith("__torch__.")):
            return InertGlobal(module, name)
        raise Refused(f"it refers to {module}.{name}")

    def _storage(self, identifier: Any) -> Tensor:
        """Content of a storage, as a vector, from the persistent id that stands for it."""
        tag, kind, key, _, count = identifier
        if tag != "storage" or not isinstance(kind, StorageType) or type(key) is not str:
            raise Refused("it holds a persistent id that is no tensor storage")
        if key not in self._storages:
            content = bytearray(self._zip.read(f"{self._prefix}data/{key}"))
            if len(content) != count * kind.dtype.itemsize:
                raise ValueError(f"tensor storage {key} has {len(content)} bytes, not {count} numbers")
            self._storages[key] = (
                torch.frombuffer(content, dtype=kind.dtype) if content else torch.empty(0, dtype=kind.dtype)
            )
        return self._storages[key]

    def _with_scripts(self, root: Any) -> Any:
        """Add the submodules that are stored as TorchScript, or, inside one, sort attributes into tables."""
        if self._scripted:
            for _, script in modules(root, _children=_attributes):
                self._sort_attributes(script)
            return root
        for _, module in list(modules(root)) if isinstance(root, InertObject) else ():
            stored = module.state.pop("__codegen__", {}) if isinstance(module.state, dict) else {}
            for name, content in stored.items():
                with zipfile.ZipFile(io.BytesIO(content)) as archive:
                    script = _Archive(archive, f"{self._where} ({name})", scripted=True).read()
                module.state.setdefault("_modules", {})[name] = script
        return root

    def _sort_attributes(self, script: InertObject) -> None:
        """Put a scripted module's attributes in tables: its source lists parameters and buffers."""
        source = self._zip.read(f"{self._prefix}code/{script.module.replace('.', '/')}.py").decode()
        body = re.split(rf"^class {re.escape(script.name)}\(Module\):$", source, flags=re.M)[1]
        body = re.split(r"^class |^def |^  def ", body, flags=re.M)[0]
        tables: dict[str, dict[str, Any]] = {"_parameters": {}, "_buffers": {}, "_modules": {}}
        for table in ("parameters", "buffers"):
            listed = re.search(rf"^  __{table}__ = \[([^\]]*)\]", body, flags=re.M)
            names = set(re.findall(r'"([^"]*)"', listed[1])) if listed else set()
            tables[f"_{table}"] = {k: v for k, v in script.state.items() if k in names}
        tables["_modules"] = _attributes(script)
        moved = {key for table in tables.values() for key in table}
        script.state = {k: v for k, v in script.state.items() if k not in moved} | tables


def _prefix(archive: zipfile.ZipFile) -> str:
    """Folder of the archive, with its slash, in which data.pkl lies."""
    found = [name for name in archive.namelist() if name.count("/") == 1 and name.endswith("/data.pkl")]
    if len(found) != 1:
        raise ValueError("the archive has no data.pkl: PyTorch did not write it")
    return found[0][: -len("data.pkl")]


def _attributes(script: InertObject) -> dict[str, Any]:
    return {k: v for k, v in script.state.items() if isinstance(v, InertObject)}


def _modules(module: InertObject) -> dict[str, Any]:
    return {k: v for k, v in module.table("_modules").items() if isinstance(v, InertObject)}


def modules(root: InertObject, *, _children: Any = _modules) -> Iterator[tuple[str, InertObject]]:
    """Every module once, with its dotted name, in the order of ``torch.nn.Module.named_modules()``."""
    return _walk(root, _children, set())


def _walk(
    module: InertObject, children: Any, seen: set[int] | None, name: str = "", depth: int = 0
) -> Iterator[tuple[str, InertObject]]:
    """Modules in depth-first order; each once if ``seen`` is a set, else under all their names."""
    if depth > _MAX_DEPTH:
        raise CheckpointError(
            f"The model nests more than {_MAX_DEPTH} modules, or one contains itself, at {name[:80]}. "
            "The file is damaged; fetch it again."
        )
    if seen is not None:
        if id(module) in seen:
            return
        seen.add(id(module))
    yield name, module
    for key, child in children(module).items():
        yield from _walk(child, children, seen, f"{name}.{key}" if name else str(key), depth + 1)


def state_dict(root: InertObject) -> dict[str, Tensor]:
    """Parameters and persistent buffers: ``state_dict()`` of the module that was saved, in its order.

    ``torch.load`` of a model that was converted to cuequivariance traces its graphs again, which adds
    copies of constants under names with ``_tensor_constant``; they are not in the file, and not here.

    Raises
    ------
    CheckpointError
        If a module contains itself.
    """
    found: dict[str, Tensor] = {}
    for count, (name, module) in enumerate(_walk(root, _modules, None)):
        if count > _MAX_MODULES:
            raise CheckpointError(f"The model has more than {_MAX_MODULES} modules: the file is damaged.")
        hidden = module.attribute("_non_persistent_buffers_set", set())
        for table in ("_parameters", "_buffers"):
            for key, value in module.table(table).items():
                if isinstance(value, Tensor) and not (table == "_buffers" and key in hidden):
                    found[f"{name}.{key}" if name else key] = value.detach()
    return found


def irreps(obj: Any) -> list[tuple[int, int, int]]:
    """Multiplicity, order l and parity of each term of e3nn's or cuequivariance's ``Irreps``, or its text.

    Raises
    ------
    CheckpointError
        If the object is nothing of the kind.
    """
    try:
        if isinstance(obj, str):
            terms = [re.fullmatch(r"\s*(?:(\d+)x)?(\d+)([eo])\s*", term) for term in obj.split("+")]
            return [(int(t[1] or 1), int(t[2]), 1 if t[3] == "e" else -1) for t in terms]  # type: ignore[index]
        if isinstance(obj, InertObject) and obj.name == "Irreps" and obj.module.startswith("e3nn."):
            return [(mul, *ir.args[0]) for mul, ir in (term.args[0] for term in obj.args[0])]
        if isinstance(obj, InertObject) and obj.name == "Irreps" and obj.module.startswith("cuequivariance."):
            pairs = [(t.attribute("mul"), t.attribute("ir")) for t in obj.attribute("_mulirreps")]
            return [(mul, ir.attribute("l"), ir.attribute("p")) for mul, ir in pairs]
    except (AttributeError, LookupError, TypeError, ValueError) as error:
        raise CheckpointError(f"{obj!r} in this file is damaged: not a list of irreps ({error}).") from error
    raise CheckpointError(f"Expected irreps, found {obj!r}: the file has another layout than MACE's.")
