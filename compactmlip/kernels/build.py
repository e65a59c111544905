"""Build the compiled operators on first use, keep them in the user's cache and load them.

All ``*.cpp`` files of this folder are compiled into one library (headers ``*.h`` beside them).  Each
registers its operators in the namespace of ``torch.ops.compactmlip`` with
``TORCH_LIBRARY_FRAGMENT(compactmlip, m)``: a FRAGMENT, because several files share the namespace.
One header is generated before (``contraction_source.py``).

What other modules use:

:func:`load`
    True once ``torch.ops.compactmlip.*`` can be called.  The first call in a process does the work;
    later ones cost nothing.
:func:`usable`
    Whether an operator is to be used for these tensors: on the CPU, float32 or float64, not switched
    off, and loaded.  Call it at the top of a function that has a plain PyTorch reference::

        def contract(x, weights):
            if usable(x, weights):
                return torch.ops.compactmlip.contract(x, weights)
            return reference(x, weights)
:func:`without_kernels`
    Context manager in which :func:`usable` is false: for oracles, and to record a TorchScript file that
    needs no library.

The environment variable ``COMPACTMLIP_KERNELS`` decides: ``auto`` (default) builds, and falls back to
plain PyTorch with one line of warning; ``build`` makes a failure an error; ``off`` uses plain PyTorch.
A failed build is remembered, with its message, until sources, compiler or torch change.
"""

from __future__ import annotations

import os
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from pathlib import Path

import torch
from torch import Tensor

from compactmlip.cache import cache_root
from compactmlip.errors import InputError, KernelError
from compactmlip.kernels.cached import NOTE as NOTE, BuildReport, Product, obtain
from compactmlip.kernels.compiler import (
    FLAGS,
    NATIVE,
    Compiler,
    compile_library,
    find_compiler as find_compiler,
    processor,
    torch_version,
)
from compactmlip.kernels.sources import GENERATED, digests, sources

HEADERS = (
    "ATen/ATen.h",
    "ATen/Dispatch.h",
    "ATen/Parallel.h",
    "ATen/core/dispatch/Dispatcher.h",
    "torch/csrc/autograd/custom_function.h",
    "torch/library.h",
)
"""Torch's headers that most sources include; a source takes longer for them than for its own code."""

VARIABLE = "COMPACTMLIP_KERNELS"
MODES = ("auto", "build", "off")
LIBRARY = "libcompactmlip_kernels.so"
KEPT = 16
"""Libraries that are kept in the cache: one per torch, compiler, processor and version of the sources."""

DTYPES = (torch.float32, torch.float64)

_switched_off: ContextVar[bool] = ContextVar("compactmlip_kernels_switched_off", default=False)
_once = threading.Lock()
_loaded: bool | None = None
_required = False


def usable(*tensors: Tensor) -> bool:
    """Whether compiled operators are to be used for these tensors."""
    if _switched_off.get() or any(t.device.type != "cpu" or t.dtype not in DTYPES for t in tensors):
        return False
    return load()


@contextmanager
def without_kernels() -> Iterator[None]:
    """Use plain PyTorch inside this context."""
    token = _switched_off.set(True)
    try:
        yield
    finally:
        _switched_off.reset(token)


def load() -> bool:
    """Make ``torch.ops.compactmlip`` available, building it on first use; false if it cannot be.

    Raises
    ------
    KernelError
        If that fails and ``COMPACTMLIP_KERNELS=build``.
    InputError
        If that variable has another value than it may have.
    """
    global _loaded
    if _loaded is None:
        with _once:
            if _loaded is None:
                _loaded = _load(mode())
    return _loaded


def require() -> None:
    """Make ``torch.ops.compactmlip`` available for what cannot do without, whatever the variable says.

    Raises
    ------
    KernelError
        If it cannot be built or loaded here.
    """
    global _required
    with _once:
        if not (_loaded or _required):
            check(build(announce=True, retry=False))
            _required = True


def mode() -> str:
    """Value of ``COMPACTMLIP_KERNELS``."""
    value = os.environ.get(VARIABLE) or "auto"
    if value not in MODES:
        raise InputError(f"{VARIABLE}={value}: known values are {', '.join(MODES)}.")
    return value


def build(*, force: bool = False, announce: bool = False, retry: bool = True) -> BuildReport:
    """Return the library for this torch, compiler and processor, making it if it is not in the cache.

    Parameters
    ----------
    force
        Make it even if it is there.
    announce
        Say on stderr that a build begins.
    retry
        Try again what has failed before with the same sources, compiler and torch.

    Raises
    ------
    KernelError
        If it cannot be made; the message has the compiler's first errors.
    """
    product = Product(
        home=cache_root() / "kernels",
        files=(LIBRARY,),
        what="kernels",
        duration="one to five minutes",
        identity=(torch_version(), processor(), *FLAGS, NATIVE, *digests(sources())),
        make=_compile,
        kept=KEPT,
    )
    return obtain(product, force=force, announce=announce, retry=retry)


def check(report: BuildReport) -> None:
    """Load a library into this process, for good.

    Raises
    ------
    KernelError
        If torch cannot load it.
    """
    try:
        torch.ops.load_library(str(report.path))
    except (OSError, RuntimeError) as error:
        reason = str(error).strip().splitlines()[0]
        raise KernelError(f"{report.path} cannot be loaded: {reason}") from error


def _load(chosen: str) -> bool:
    if chosen == "off":
        return False
    if _required:
        return True
    try:
        check(build(announce=True, retry=False))
    except KernelError as error:
        if chosen == "build":
            raise
        # One line: of a compiler's complaints the first one.
        reason = " ".join(line.strip() for line in str(error).splitlines()[:2])
        print(
            f"compactmlip: warning: running without compiled kernels, several times slower: {reason}. "
            f"'compactmlip build' tries again; {VARIABLE}=off stops this message.",
            file=sys.stderr,
        )
        return False
    return True


def _compile(compiler: Compiler, folder: Path) -> tuple[str, ...]:
    # The header of the programs takes a second or two, so it is made only where it is needed.
    if any(path.name == GENERATED for path in sources()):
        from compactmlip.kernels.contraction_source import HEADER, programs_source

        (folder / HEADER).write_text(programs_source())
    return compile_library(compiler, sources(), folder / LIBRARY, headers=HEADERS)
