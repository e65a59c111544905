"""Named foundation models: where each comes from, its licence and how to cite it."""

from __future__ import annotations

from dataclasses import dataclass

from compactmlip.errors import InputError, did_you_mean

SEVENN_VERSION = "0.13.0"
SEVENN_WHEEL_SHA256 = "9378f7df2b75fe83274483a5f804790ae1023dd22ddeb6a48c1a03de97e22620"

_SEVENNET_CITATION = (
    "Park, Kim, Hwang, Han, Scalable Parallel Algorithm for Graph Neural Network Interatomic Potentials "
    "in Molecular Dynamics Simulations, J. Chem. Theory Comput. 20, 4857 (2024), "
    "doi:10.1021/acs.jctc.4c00190"
)
_MULTI_FIDELITY_CITATION = (
    "Kim et al., Data-Efficient Multifidelity Training for High-Fidelity Machine Learning Interatomic "
    "Potentials, J. Am. Chem. Soc. 147, 1042 (2025), doi:10.1021/jacs.4c14455"
)


@dataclass(frozen=True)
class NamedCheckpoint:
    """One foundation model that is known by name.

    Attributes
    ----------
    name, aliases
        What a user may type (case does not matter).
    family
        Importer module in :mod:`compactmlip.families`.
    member
        Path of the checkpoint inside the sevenn wheel.
    sha256
        Digest of the checkpoint file.
    modalities
        Levels of theory to choose from at import; the first is the default.  Empty if there is one only.
    """

    name: str
    family: str
    member: str
    sha256: str
    licence: str
    citation: str
    aliases: tuple[str, ...] = ()
    modalities: tuple[str, ...] = ()

    @property
    def source(self) -> str:
        """Human-readable origin."""
        return f"sevenn {SEVENN_VERSION} (Python package), {self.member}"


_ROOT = "sevenn/pretrained_potentials"

NAMED_CHECKPOINTS: tuple[NamedCheckpoint, ...] = (
    NamedCheckpoint(
        name="7net-l3i5",
        family="sevennet",
        member=f"{_ROOT}/SevenNet_l3i5/checkpoint_l3i5.pth",
        sha256="a7ff190d41efe5b8317a03d20a468e4036a1a3e64e0b14fdbab64ac3f4bfc09d",
        licence="MIT",
        citation=_SEVENNET_CITATION,
        aliases=("sevennet-l3i5",),
    ),
    NamedCheckpoint(
        name="7net-0",
        family="sevennet",
        member=f"{_ROOT}/SevenNet_0__11Jul2024/checkpoint_sevennet_0.pth",
        sha256="7052cb42b7b3be42b40b97fa0d21077a48c54b5548948fc4dcf346629f813c36",
        licence="MIT",
        citation=_SEVENNET_CITATION,
        aliases=("7net-0_11jul2024", "sevennet-0"),
    ),
    NamedCheckpoint(
        name="7net-0_22May2024",
        family="sevennet",
        member=f"{_ROOT}/SevenNet_0__22May2024/checkpoint_sevennet_0.pth",
        sha256="5d389fafd512e6ae2830d74d0b66ffc49a55d3832653ff8e7bf7f1343013c1d1",
        licence="MIT",
        citation=_SEVENNET_CITATION,
        aliases=("sevennet-0_22may2024",),
    ),
    NamedCheckpoint(
        name="7net-mf-0",
        family="sevennet",
        member=f"{_ROOT}/SevenNet_MF_0/checkpoint_sevennet_mf_0.pth",
        sha256="81791329b37d445f46b531578c182c41792d98c7814222c9e5dde276402225fd",
        licence="MIT",
        citation=_MULTI_FIDELITY_CITATION,
        aliases=("sevennet-mf-0",),
        modalities=("PBE", "R2SCAN"),
    ),
)


def find_named(name: str) -> NamedCheckpoint | None:
    """Return the checkpoint of this name or alias, or None."""
    wanted = name.lower()
    for entry in NAMED_CHECKPOINTS:
        if wanted in (entry.name.lower(), *entry.aliases):
            return entry
    return None


def unknown_name_error(name: str) -> InputError:
    """Error for something that is neither a known name nor a file."""
    known = [entry.name for entry in NAMED_CHECKPOINTS]
    return InputError(
        f"'{name}' is neither a file nor a known model; known models: {', '.join(known)}."
        f"{did_you_mean(name, known)}"
    )
