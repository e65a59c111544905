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

import fcntl
import hashlib
import json
import os
import shutil
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from pathlib import Path
from typing import TextIO

import torch
from torch import Tensor

from compactmlip.cache import cache_root
from compactmlip.errors import InputError, KernelError
from compactmlip.kernels.compiler import (
    FLAGS,
    NATIVE,
    Compiler,
    compile_library,
    find_compiler,
    processor,
    torch_version,
)

VARIABLE = "COMPACTMLIP_KERNELS"
MODES = ("auto", "build", "off")
LIBRARY = "libcompactmlip_kernels.so"
NOTE = "build.json"
FAILED = "failed.txt"
GENERATED = "contraction_folded.cpp"
"""The file that includes a header which is made here, by these modules:"""
GENERATORS = (
    "kernels/contraction_program.py",
    "kernels/contraction_source.py",
    "models/angular.py",
    "models/products.py",
)
KEPT = 16
"""Libraries that are kept in the cache: one per torch, compiler, processor and version of the sources."""

DTYPES = (torch.float32, torch.float64)

_switched_off: ContextVar[bool] = ContextVar("compactmlip_kernels_switched_off", default=False)
_once = threading.Lock()
_loaded: bool | None = None
_required = False


@dataclass(frozen=True)
class BuildReport:
    """A library that is ready to be loaded.

    Attributes
    ----------
    path
        The library.
    built
        Whether it was made just now; false if it was in the cache.
    compiler, flags
        What made it.
    seconds
        How long that took.
    """

    path: Path
    built: bool
    compiler: str
    flags: str
    seconds: float


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
    home = cache_root() / "kernels"
    try:
        home.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise KernelError(f"cannot create {home}: {error.strerror}; set XDG_CACHE_HOME") from error
    runtime = _digest(torch_version(), processor(), *FLAGS, NATIVE, *_sources_digest())
    try:
        compiler = find_compiler()
    except KernelError:
        # A machine without compiler may share the cache with one that has it.
        present = sorted(home.glob(f"{runtime}-*"), key=lambda p: p.stat().st_mtime)
        reports = [report for folder in reversed(present) if (report := _cached(folder)) is not None]
        if not reports or force:
            raise
        return reports[0]
    folder = home / f"{runtime}-{_digest(compiler.version, *compiler.command)}"
    if not force and (report := _cached(folder)) is not None:
        return report
    with _locked(home / "lock"):
        if not force and (report := _cached(folder)) is not None:  # made while this process waited
            return report
        if not retry:
            _raise_known_failure(folder)
        return _make(compiler, folder, announce)


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


def sources() -> list[Path]:
    """Files that are compiled."""
    return sorted(Path(__file__).parent.glob("*.cpp"))


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


def _make(compiler: Compiler, folder: Path, announce: bool) -> BuildReport:
    """Compile beside the place of the library, then give the folder its name."""
    if announce:
        print(
            f"compactmlip: building kernels for this machine with {compiler.command[0]} "
            "(once, one to five minutes)",
            file=sys.stderr,
            flush=True,
        )
    start = time.monotonic()
    temporary = Path(tempfile.mkdtemp(dir=folder.parent, prefix="making-"))
    try:
        library = temporary / LIBRARY
        try:
            _generate(temporary)
            flags = compile_library(compiler, sources(), library)
        except KernelError as error:
            (temporary / FAILED).write_text(str(error))
            _replace(temporary, folder)
            raise
        for made in temporary.iterdir():
            if made != library:
                made.unlink()
        note = {
            "sha256": _sha256(library),
            "compiler": str(compiler),
            "flags": " ".join(flags),
            "seconds": round(time.monotonic() - start, 1),
        }
        (temporary / NOTE).write_text(json.dumps(note))
        _replace(temporary, folder)
    except OSError as error:
        raise KernelError(f"cannot write {folder}: {error.strerror or error}; set XDG_CACHE_HOME") from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    _forget_old(folder.parent)
    report = _cached(folder)
    if report is None:
        raise KernelError(f"{folder} was damaged while it was written; try again")
    return BuildReport(report.path, True, report.compiler, report.flags, report.seconds)


def _generate(folder: Path) -> None:
    """Write the header of the programs beside the objects; a second or two, so only where it is needed."""
    if any(path.name == GENERATED for path in sources()):
        from compactmlip.kernels.contraction_source import HEADER, programs_source

        (folder / HEADER).write_text(programs_source())


def _replace(temporary: Path, folder: Path) -> None:
    # Under the lock; a process that finds the folder missing in between waits for the lock.
    if folder.exists():
        shutil.rmtree(folder)
    temporary.chmod(0o755)
    temporary.rename(folder)


def _cached(folder: Path) -> BuildReport | None:
    """The library in a folder if it is complete and undamaged: a damaged one could crash the process."""
    path = folder / LIBRARY
    try:
        note = json.loads((folder / NOTE).read_text())
        if note["sha256"] != _sha256(path):
            return None
        return BuildReport(path, False, note["compiler"], note["flags"], note["seconds"])
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _raise_known_failure(folder: Path) -> None:
    try:
        text = (folder / FAILED).read_text()
    except OSError:
        return
    raise KernelError(f"an earlier build failed. {text}")


def _forget_old(home: Path) -> None:
    folders = sorted((p for p in home.glob("*-*") if p.is_dir()), key=lambda p: p.stat().st_mtime)
    for folder in folders[:-KEPT]:
        shutil.rmtree(folder, ignore_errors=True)


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    """Let one process at a time build; the lock ends with the process that holds it."""
    try:
        file = path.open("a")
    except OSError as error:
        raise KernelError(f"cannot open {path}: {error.strerror or error}; set XDG_CACHE_HOME") from error
    with file:
        try:
            _wait_for(file)
        except OSError as error:
            raise KernelError(
                f"{path.parent} does not allow locks ({error.strerror}); set XDG_CACHE_HOME to a local folder"
            ) from error
        yield


def _wait_for(file: TextIO) -> None:
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        print("compactmlip: waiting for another process that builds the kernels", file=sys.stderr)
        fcntl.flock(file, fcntl.LOCK_EX)


def _sources_digest() -> list[str]:
    headers = sorted(Path(__file__).parent.glob("*.h"))
    generators = [Path(__file__).parents[1] / name for name in GENERATORS]
    return [f"{path.name}\n{_sha256(path)}" for path in (*sources(), *headers, *generators)]


def _sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def _digest(*parts: str) -> str:
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()[:16]
