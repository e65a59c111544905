"""Run the machine's C++ compiler on the kernels: which compiler, which flags, what it complains about."""

from __future__ import annotations

import os
import platform
import re
import shlex
import shutil
import subprocess
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import torch

from compactmlip.errors import KernelError

FLAGS = ("-std=c++20", "-O3", "-fPIC", "-fopenmp", "-fvisibility=hidden", "-Wno-psabi")
"""Always given; the standard is what torch's headers need."""

NATIVE = "-march=native"
"""Given where the compiler knows it."""

COMMON_HEADERS = (
    "ATen/ATen.h",
    "ATen/Dispatch.h",
    "ATen/Parallel.h",
    "ATen/core/dispatch/Dispatcher.h",
    "torch/csrc/autograd/custom_function.h",
    "torch/library.h",
)
"""Torch's headers that most sources include.  They are read once: one file takes longer for them than for its
own code."""

COMPILE_TIMEOUT = 1800
"""Seconds after which a compiler that has not ended is stopped."""

MAX_LINES = 6
"""Lines of the compiler's errors that are shown."""


@dataclass(frozen=True)
class Compiler:
    """A C++ compiler.

    Attributes
    ----------
    command
        Words that start it: ``$CXX``, or g++.
    version
        First line that it prints about itself.
    """

    command: tuple[str, ...]
    version: str

    def __str__(self) -> str:
        return f"{' '.join(self.command)} ({self.version})"


def find_compiler() -> Compiler:
    """Return the compiler that ``$CXX`` names, or g++.

    Raises
    ------
    KernelError
        If there is none, or it does not tell its version.
    """
    command = tuple(shlex.split(os.environ.get("CXX", ""))) or ("g++",)
    if shutil.which(command[0]) is None:
        raise KernelError(f"there is no C++ compiler '{command[0]}'; install g++, or set CXX")
    try:
        done = _run([*command, "--version"], timeout=60)
    except (OSError, subprocess.TimeoutExpired) as error:
        raise KernelError(f"the C++ compiler '{command[0]}' does not start: {error}") from error
    if done.returncode != 0:
        raise KernelError(f"the C++ compiler '{' '.join(command)}' does not tell its version; set CXX")
    lines = (done.stdout or done.stderr).strip().splitlines()
    return Compiler(command, lines[0].strip() if lines else "unknown version")


def processor() -> str:
    """Return what decides about ``-march=native``: machine, model and instruction sets of the processor."""
    try:
        text = Path("/proc/cpuinfo").read_text(errors="replace")
    except OSError:
        text = ""
    found = {}
    for line in text.split("\n\n", 1)[0].splitlines():
        key, _, value = line.partition(":")
        if key.strip().lower() in ("model name", "cpu part", "flags", "features"):
            found[key.strip().lower()] = " ".join(sorted(value.split()))
    return "\n".join([platform.machine(), platform.processor(), *(f"{k}: {found[k]}" for k in sorted(found))])


def torch_version() -> str:
    """Return what a library that uses torch's C++ interface is bound to."""
    version = torch.version
    abi = torch.compiled_with_cxx11_abi()
    return f"torch {torch.__version__} {getattr(version, 'git_version', '')} cxx11 abi {abi}"


def compile_library(compiler: Compiler, sources: Sequence[Path], target: Path) -> tuple[str, ...]:
    """Compile the sources, side by side, and link them to a shared library.

    Headers may lie beside a source or beside the library.

    The library names torch's libraries without saying where they are: whoever loads it, Python or a
    C++ program, has loaded its own torch before.

    Returns
    -------
    flags
        Those that the compiler was given.

    Raises
    ------
    KernelError
        With the first errors of the compiler.
    """
    flags = (*FLAGS, NATIVE) if _accepts(compiler, NATIVE) else FLAGS
    home = Path(torch.__file__).parent
    include = [home / "include", home / "include" / "torch" / "csrc" / "api" / "include"]
    common = [*compiler.command, *flags, f"-I{target.parent}", *(f"-isystem{folder}" for folder in include)]
    common.append(f"-D_GLIBCXX_USE_CXX11_ABI={int(torch.compiled_with_cxx11_abi())}")
    common += _precompiled(common, target.with_name("common.h"))
    objects = [target.with_name(f"{source.stem}.o") for source in sources]
    with ThreadPoolExecutor(max_workers=max(1, min(len(sources), os.cpu_count() or 1))) as pool:
        jobs = [
            pool.submit(_check, [*common, "-c", str(source), "-o", str(made)], source.name)
            for source, made in zip(sources, objects, strict=True)
        ]
        for job in jobs:
            job.result()
    libraries = ["-ltorch", "-ltorch_cpu", "-lc10"]
    link = [*compiler.command, *flags, "-shared", *map(str, objects), f"-L{home / 'lib'}", *libraries]
    _check([*link, "-o", str(target)], target.name)
    return flags


def _precompiled(command: list[str], header: Path) -> list[str]:
    """Flags that let a source begin with the common headers, compiled; none where that does not work."""
    header.write_text("".join(f"#include <{name}>\n" for name in COMMON_HEADERS))
    try:
        _check([*command, "-x", "c++-header", str(header), "-o", f"{header}.gch"], header.name)
    except KernelError:  # sources include what they need themselves
        return []
    return ["-include", str(header)]


def first_errors(output: str) -> str:
    """Return the lines of a compiler's output that say what is wrong, at most ``MAX_LINES``."""
    lines = [line.rstrip() for line in output.splitlines() if line.strip()]
    marked = [line for line in lines if re.search(r"\b(error|undefined reference|cannot find)\b", line)]
    shown = marked or lines
    more = f"\n  ... and {len(shown) - MAX_LINES} more" if len(shown) > MAX_LINES else ""
    return "\n".join(f"  {line[:300]}" for line in shown[:MAX_LINES]) + more


def _accepts(compiler: Compiler, flag: str) -> bool:
    command = [*compiler.command, flag, "-x", "c++", "-fsyntax-only", "-"]
    try:
        return _run(command, timeout=60, text="int x;\n").returncode == 0
    except (OSError, subprocess.TimeoutExpired):
        return False


def _check(command: list[str], what: str) -> None:
    try:
        done = _run(command, timeout=COMPILE_TIMEOUT)
    except subprocess.TimeoutExpired as error:
        raise KernelError(f"{what}: '{command[0]}' did not end in {COMPILE_TIMEOUT / 60:.0f} min") from error
    except OSError as error:
        raise KernelError(f"{what}: '{command[0]}' does not start: {error}") from error
    if done.returncode != 0:
        said = first_errors(done.stderr or done.stdout) or "  (it says nothing)"
        raise KernelError(f"{what}: '{command[0]}' failed with status {done.returncode}:\n{said}")


def _run(
    command: Sequence[str], *, timeout: float, text: str | None = None
) -> subprocess.CompletedProcess[str]:
    # Messages in English and without colours, whatever the user's settings.
    environment = os.environ | {"LC_ALL": "C", "GCC_COLORS": ""}
    return subprocess.run(
        command,
        input=text if text is not None else "",
        capture_output=True,
        text=True,
        errors="replace",
        timeout=timeout,
        check=False,
        env=environment,
    )
