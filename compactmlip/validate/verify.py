"""Whether a certificate belongs to a model, and whether its numbers can be reproduced."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from compactmlip.checkpoint import sha256
from compactmlip.data.read import read_structures
from compactmlip.errors import CertificateError, CompactMLIPError
from compactmlip.validate.certificate import Certificate
from compactmlip.validate.checks import Limit, overall
from compactmlip.validate.output import ARRAYS, FRAMES
from compactmlip.validate.parity import MILLI, Labels, evaluate_frames, labels_of, parity

TOLERANCE = {"float32": (1e-4, 1e-3), "float64": (1e-7, 1e-6)}
"""eV/atom and eV/Angstrom; another processor or number of threads rounds differently, far below the errors
of any model."""

SAME = 1e-6
"""Relative; numbers computed from the same arrays."""


@dataclass(frozen=True)
class Finding:
    """One thing that was looked at."""

    what: str
    agrees: bool
    detail: str


def verify(
    model: str | Path, certificate: str | Path, *, frames: int = 8, device: str = "cpu"
) -> list[Finding]:
    """Compare a certificate with the model and with the files beside it.

    Parameters
    ----------
    model
        The file that the certificate should belong to.
    certificate
        ``certificate.json``; ``heldout.extxyz`` and ``validation.npz`` lie beside it.
    frames
        Held-out structures on which the model is evaluated again; 0 for all.
    device
        Where to compute.

    Returns
    -------
    What was looked at, in order.

    Raises
    ------
    CheckpointError
        If the certificate or the model cannot be read.
    """
    found = Certificate.load(certificate)
    return list(_findings(Path(model), Path(certificate).parent, found, frames, device))


def require(model: str | Path, certificate: str | Path) -> Certificate:
    """Return the certificate of a model if it is this model's and none of its checks failed.

    Raises
    ------
    CertificateError
        Otherwise, with the reason.
    CheckpointError
        If it cannot be read.
    """
    found = Certificate.load(certificate)
    if found.model.sha256 != sha256(Path(model)):
        raise CertificateError(
            f"{certificate} is the certificate of another file ({found.model.file}); validate {model} with "
            "'compactmlip validate'."
        )
    failed = [check.name for check in found.checks if check.verdict == "fail"]
    if found.verdict == "fail" or failed or overall(found.checks) == "fail":
        raise CertificateError(f"{certificate}: {model} failed {', '.join(failed) or 'its validation'}.")
    return found


def _findings(model: Path, folder: Path, c: Certificate, frames: int, device: str) -> Iterator[Finding]:
    own = sha256(model)
    same = own == c.model.sha256
    yield Finding("the model is the one that was validated", same, f"SHA-256 {own[:16]}...")
    yield _verdicts(c)
    complete = True
    for name in (FRAMES, ARRAYS):
        path = folder / name
        known = c.files.get(name)
        if not path.is_file():
            finding = Finding(f"{name} is there", False, f"{path} is missing")
        else:
            agrees = known is not None and known == sha256(path)
            finding = Finding(
                f"{name} is unchanged", agrees, "its hash is in the certificate" if known else "no hash"
            )
        complete &= finding.agrees
        yield finding
    if complete:
        yield from _numbers(model, folder, c, frames, device)


def _verdicts(c: Certificate) -> Finding:
    """Verdicts must follow from the numbers and limits beside them."""
    wrong = [check.name for check in c.checks if not _follows(check)]
    if overall(c.checks) != c.verdict:
        wrong.append("the overall verdict")
    text = "of value, error and limits" if not wrong else f"not so: {', '.join(wrong)}"
    return Finding("verdicts are those of the numbers", not wrong, text)


def _follows(check: Any) -> bool:
    if check.good is None or check.bad is None:
        return True  # judged by more than one number
    if check.value is None:
        return bool(check.verdict == "fail")
    limit = Limit(good=check.good, bad=check.bad)
    if check.error is None:
        return bool(check.verdict == limit.judge(check.value))
    return bool(check.verdict == limit.judge_size(check.value, check.error))


def _numbers(model: Path, folder: Path, c: Certificate, frames: int, device: str) -> Iterator[Finding]:
    """The errors follow from the arrays, and the arrays from the model."""
    structures = read_structures(folder / FRAMES)
    reference = labels_of(structures)
    with np.load(folder / ARRAYS) as arrays:
        sizes = np.cumsum([len(a) for a in structures])[:-1]
        predicted = Labels(
            arrays["model_energies_eV"],
            tuple(np.split(arrays["model_forces_eV_per_A"], sizes)),
            arrays["model_stresses_eV_per_A3"],
        )
    again = parity(structures, reference, predicted)
    pairs = ((again.energy.mae, c.parity.energy.mae), (again.forces.mae, c.parity.forces.mae))
    agrees = all(np.isclose(a, b, rtol=SAME, atol=SAME) for a, b in pairs)
    text = f"energy {again.energy.mae:.4g} meV/atom, forces {again.forces.mae:.4g} meV/Angstrom"
    yield Finding("errors follow from the held-out structures", agrees, text)

    count = len(structures) if frames == 0 else min(frames, len(structures))
    chosen = np.linspace(0, len(structures) - 1, count).round().astype(int)
    from compactmlip.deploy.ase import CompactMLIPCalculator

    try:
        found = evaluate_frames(CompactMLIPCalculator(model, device=device), [structures[k] for k in chosen])
    except CompactMLIPError as error:
        yield Finding("the model gives these numbers", False, str(error))
        return
    energy = max(
        abs(found.energies[n] - predicted.energies[k]) / len(structures[k]) for n, k in enumerate(chosen)
    )
    force = max(float(abs(found.forces[n] - predicted.forces[k]).max()) for n, k in enumerate(chosen))
    allowed = TOLERANCE[c.model.dtype]
    text = (
        f"{count} of {len(structures)} structures: largest difference {energy * MILLI:.2g} meV/atom, "
        f"{force * MILLI:.2g} meV/Angstrom"
    )
    yield Finding("the model gives these numbers", energy <= allowed[0] and force <= allowed[1], text)
