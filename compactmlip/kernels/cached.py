"""Libraries that are compiled on first use and kept in the user's cache; torch is not imported here."""

from __future__ import annotations

import fcntl
import hashlib
import json
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TextIO

from compactmlip.errors import KernelError
from compactmlip.kernels.compiler import Compiler, find_compiler

NOTE = "build.json"
FAILED = "failed.txt"


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


@dataclass(frozen=True)
class Product:
    """What is made, and where it is kept.

    Attributes
    ----------
    home
        Folder in which each build has a folder of its own.
    files
        Names of what is made, the library that is reported first.
    what, duration
        For messages.
    identity
        Everything that decides whether a library fits, apart from the compiler.
    make
        Writes the files to a folder and returns the compiler's flags; other files there are removed.
    kept
        Builds that are kept.
    """

    home: Path
    files: tuple[str, ...]
    what: str
    duration: str
    identity: tuple[str, ...]
    make: Callable[[Compiler, Path], Sequence[str]]
    kept: int


def obtain(
    product: Product, *, force: bool = False, announce: bool = False, retry: bool = True
) -> BuildReport:
    """Return a product from the cache, making it if it is not there.

    Parameters
    ----------
    product
        What is wanted.
    force
        Make it even if it is there.
    announce
        Say on stderr that a build begins.
    retry
        Try again what has failed before with the same compiler.

    Raises
    ------
    KernelError
        If it cannot be made; the message has the compiler's first errors.
    """
    try:
        product.home.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise KernelError(f"cannot create {product.home}: {error.strerror}; set XDG_CACHE_HOME") from error
    try:
        compiler = find_compiler()
    except KernelError:
        # A machine without compiler may share the cache with one that has it.
        present = None if force else newest(product)
        if present is None:
            raise
        return present
    folder = product.home / f"{digest(*product.identity)}-{digest(compiler.version, *compiler.command)}"
    if not force and (report := _intact(product, folder)) is not None:
        return report
    with _locked(product):
        if not force and (report := _intact(product, folder)) is not None:  # made while this process waited
            return report
        if not retry:
            _raise_known_failure(folder)
        return _make(product, compiler, folder, announce)


def newest(product: Product) -> BuildReport | None:
    """The youngest intact build, by whichever compiler; None if there is none."""
    present = sorted(product.home.glob(f"{digest(*product.identity)}-*"), key=lambda p: p.stat().st_mtime)
    reports = (_intact(product, folder) for folder in reversed(present))
    return next((report for report in reports if report is not None), None)


def file_digest(path: Path) -> str:
    """SHA-256 of a file."""
    return hashlib.sha256(path.read_bytes()).hexdigest()


def digest(*parts: str) -> str:
    """Short name for what these strings say together."""
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()[:16]


def _make(product: Product, compiler: Compiler, folder: Path, announce: bool) -> BuildReport:
    """Compile beside the place of the library, then give the folder its name."""
    if announce:
        print(
            f"compactmlip: building {product.what} for this machine with {compiler.command[0]} "
            f"(once, {product.duration})",
            file=sys.stderr,
            flush=True,
        )
    start = time.monotonic()
    temporary = Path(tempfile.mkdtemp(dir=folder.parent, prefix="making-"))
    try:
        try:
            flags = product.make(compiler, temporary)
        except KernelError as error:
            (temporary / FAILED).write_text(str(error))
            _replace(temporary, folder)
            raise
        for path in temporary.iterdir():
            if path.name not in product.files:
                path.unlink()
        sums = {name: file_digest(temporary / name) for name in product.files}
        note = {
            "sha256": sums.pop(product.files[0]),
            "compiler": str(compiler),
            "flags": " ".join(flags),
            "seconds": round(time.monotonic() - start, 1),
            "others": sums,
        }
        (temporary / NOTE).write_text(json.dumps(note))
        _replace(temporary, folder)
    except OSError as error:
        raise KernelError(f"cannot write {folder}: {error.strerror or error}; set XDG_CACHE_HOME") from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    _forget_old(product)
    report = _intact(product, folder)
    if report is None:
        raise KernelError(f"{folder} was damaged while it was written; try again")
    return BuildReport(report.path, True, report.compiler, report.flags, report.seconds)


def _replace(temporary: Path, folder: Path) -> None:
    # Under the lock; a process that finds the folder missing in between waits for the lock.
    if folder.exists():
        shutil.rmtree(folder)
    temporary.chmod(0o755)
    temporary.rename(folder)


def _intact(product: Product, folder: Path) -> BuildReport | None:
    """The build in a folder if it is complete and undamaged: a damaged one could crash the process."""
    path = folder / product.files[0]
    try:
        note = json.loads((folder / NOTE).read_text())
        sums = {product.files[0]: note["sha256"], **note.get("others", {})}
        if any(file_digest(folder / name) != sums[name] for name in product.files):
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


def _forget_old(product: Product) -> None:
    folders = sorted((p for p in product.home.glob("*-*") if p.is_dir()), key=lambda p: p.stat().st_mtime)
    for folder in folders[: -product.kept]:
        shutil.rmtree(folder, ignore_errors=True)


@contextmanager
def _locked(product: Product) -> Iterator[None]:
    """Let one process at a time build; the lock ends with the process that holds it."""
    path = product.home / "lock"
    try:
        file = path.open("a")
    except OSError as error:
        raise KernelError(f"cannot open {path}: {error.strerror or error}; set XDG_CACHE_HOME") from error
    with file:
        try:
            _wait_for(file, product.what)
        except OSError as error:
            raise KernelError(
                f"{path.parent} does not allow locks ({error.strerror}); set XDG_CACHE_HOME to a local folder"
            ) from error
        yield


def _wait_for(file: TextIO, what: str) -> None:
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        print(f"compactmlip: waiting for another process that builds {what}", file=sys.stderr)
        fcntl.flock(file, fcntl.LOCK_EX)
