"""Fetch named checkpoints into the user's cache, verified by digest."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

from compactmlip.checkpoint import atomic_write, sha256
from compactmlip.errors import DownloadError
from compactmlip.families.names import SEVENN_VERSION, SEVENN_WHEEL_SHA256, NamedCheckpoint

DOWNLOAD_TIMEOUT = 1800
"""Seconds after which a download that has not ended is given up."""


def cache_directory() -> Path:
    """``$XDG_CACHE_HOME/compactmlip``, by default ``~/.cache/compactmlip``; created if missing."""
    root = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "compactmlip"
    try:
        root.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise DownloadError(
            f"cannot create the cache folder {root}: {error.strerror}. Set XDG_CACHE_HOME."
        ) from error
    return root


def fetch(entry: NamedCheckpoint) -> Path:
    """Return the cached checkpoint file, downloading it on first use.

    The file is taken out of the sevenn wheel, which is downloaded with pip but neither installed nor
    imported.  Wheel and file are checked against known SHA-256 digests.

    Raises
    ------
    DownloadError
        If pip fails, or what arrived is not what was expected.
    """
    target = cache_directory() / "checkpoints" / f"{entry.name}.pth"
    if target.is_file() and sha256(target) == entry.sha256:
        return target
    target.parent.mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory(dir=cache_directory(), prefix="download-") as folder:
        wheel = _download_wheel(Path(folder))
        _unpack(wheel, entry, target)
    return target


def _download_wheel(folder: Path) -> Path:
    requirement = f"sevenn=={SEVENN_VERSION}"
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check", "--no-deps"]
    command += ["--only-binary=:all:", "--dest", str(folder), requirement]
    by_hand = (
        f"By hand: 'pip download --no-deps {requirement}', unzip the wheel, "
        "and give the path of its .pth file."
    )
    try:
        done = subprocess.run(
            command,
            capture_output=True,
            text=True,
            timeout=DOWNLOAD_TIMEOUT,
            check=False,
            stdin=subprocess.DEVNULL,
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        raise DownloadError(f"pip could not download {requirement}: {error}. {by_hand}") from error
    wheels = list(folder.glob("sevenn-*.whl"))
    if done.returncode != 0 or len(wheels) != 1:
        tail = "\n".join(done.stderr.strip().splitlines()[-3:])
        raise DownloadError(f"pip could not download {requirement}:\n{tail}\n{by_hand}")
    found = sha256(wheels[0])
    if found != SEVENN_WHEEL_SHA256:
        raise DownloadError(
            f"{wheels[0].name} has sha256 {found}, expected {SEVENN_WHEEL_SHA256}; it is not used. {by_hand}"
        )
    return wheels[0]


def _unpack(wheel: Path, entry: NamedCheckpoint, target: Path) -> None:
    def write(temporary: Path) -> None:
        with zipfile.ZipFile(wheel) as archive, archive.open(entry.member) as source:
            temporary.write_bytes(source.read())
        found = sha256(temporary)
        if found != entry.sha256:
            raise DownloadError(
                f"{entry.member} has sha256 {found}, expected {entry.sha256}; it is not used."
            )

    atomic_write(target, write)
