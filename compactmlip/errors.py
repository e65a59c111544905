"""Exceptions of compactmlip.

Every message says what is wrong, where, and what to do about it.  All errors that a user can cause
derive from :class:`CompactMLIPError`, so that a script can catch one class and the command line can
print a line instead of a traceback.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class CompactMLIPError(Exception):
    """Base class of the errors that compactmlip raises on purpose."""


class InputError(CompactMLIPError, ValueError):
    """A structure, an option or a data set cannot be used as given."""


class SpeciesError(InputError):
    """A chemical species is not covered by the model."""


class CheckpointError(CompactMLIPError):
    """A model file is missing, damaged, of another format or of a newer version."""


class UnsupportedFeatureError(CompactMLIPError):
    """An upstream model uses a feature that compactmlip does not implement."""


class DownloadError(CompactMLIPError):
    """A checkpoint could not be fetched, or what arrived is not what was promised."""


class LicenceError(CompactMLIPError):
    """A model's licence restricts its use and has not been accepted."""


class KernelError(CompactMLIPError):
    """The compiled operators cannot be built or loaded on this machine."""


class LoweringError(CompactMLIPError):
    """A model cannot be brought into the form that compiled operators run."""


class SelfCheckError(CompactMLIPError):
    """An exported model does not reproduce the model it was made from."""


class CertificateError(CompactMLIPError):
    """A certificate does not belong to a model, cannot be reproduced, or says that the model failed."""


class OutsideError(CompactMLIPError):
    """Atoms are outside the trust region of a model, and the calculation should stop there."""


class TrustWarning(UserWarning):
    """Atoms are outside the trust region of a model; what it says of them is extrapolation."""


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """Return " Did you mean 'x'?" for the closest known word, or an empty string."""
    close = difflib.get_close_matches(word, list(known), n=1)
    return f" Did you mean '{close[0]}'?" if close else ""


def unknown_species_error(symbols: Iterable[str], known: Iterable[str], where: str) -> SpeciesError:
    """Build the error for species that a model does not cover.

    Parameters
    ----------
    symbols
        Chemical symbols met in the input (repetitions are fine).
    known
        Chemical symbols that the model covers.
    where
        What holds the unknown species, for the message.
    """
    covered = list(known)
    missing = sorted(set(symbols) - set(covered))
    shown = " ".join(covered) if len(covered) <= 20 else f"{len(covered)} species"
    return SpeciesError(
        f"{where} contains {', '.join(missing)}, which the model does not cover (it covers {shown}). "
        "Use a model that was made with these species, or remove them from the structure."
    )
