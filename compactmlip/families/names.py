"""Named foundation models: where each comes from, its licence and how to cite it.

The MACE models are those of ``mace_mp``, ``mace_off`` and ``mace_omol`` in mace-torch 0.3.16, with the
licences stated there and on the release pages, and two more of the same pages: MACE-MP-0 with l <= 2 and
MACE-OFF24.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Literal

from compactmlip.errors import InputError, LicenceError, did_you_mean

SEVENN_VERSION = "0.13.0"
SEVENN_WHEEL_SHA256 = "9378f7df2b75fe83274483a5f804790ae1023dd22ddeb6a48c1a03de97e22620"

Family = Literal["sevennet", "mace"]
LicenceName = Literal["MIT", "ASL"]

FAMILIES: dict[Family, str] = {"sevennet": "SevenNet", "mace": "MACE"}
"""Importer modules in :mod:`compactmlip.families`, and what people call them."""


@dataclass(frozen=True)
class Licence:
    """Terms of a model's weights; ``restriction`` is None where nothing has to be accepted first."""

    title: str
    url: str
    restriction: str | None = None


LICENCES: dict[LicenceName, Licence] = {
    "MIT": Licence("MIT License", "https://opensource.org/license/mit"),
    "ASL": Licence(
        "Academic Software License", "https://github.com/gabor1/ASL", "it does not permit commercial use"
    ),
}


@dataclass(frozen=True)
class WheelMember:
    """A file inside the sevenn wheel."""

    path: str

    def __str__(self) -> str:
        return f"sevenn {SEVENN_VERSION} (Python package), {self.path}"


@dataclass(frozen=True)
class WebFile:
    """A file with an address of its own."""

    url: str

    def __str__(self) -> str:
        return self.url

    @property
    def file_name(self) -> str:
        """Name under which upstream publishes it."""
        return self.url.rpartition("/")[2]


@dataclass(frozen=True)
class NamedCheckpoint:
    """One foundation model that is known by name.

    Attributes
    ----------
    name, aliases
        What a user may type (case does not matter).
    family
        Importer module in :mod:`compactmlip.families`.
    origin
        Where the file is.
    sha256
        Digest of the checkpoint file; None where it is not known, see
        :func:`compactmlip.families.fetch.fetch` for what is checked then.
    licence
        Key of :data:`LICENCES`.
    modalities
        Levels of theory to choose from at import; the first is the default.  Empty if there is one only,
        or if the file says.
    """

    name: str
    family: Family
    origin: WheelMember | WebFile
    sha256: str | None
    licence: LicenceName
    citation: str
    aliases: tuple[str, ...] = ()
    modalities: tuple[str, ...] = ()

    @property
    def source(self) -> str:
        """Human-readable origin."""
        return str(self.origin)

    @property
    def file_name(self) -> str:
        """Name of the file in the cache."""
        return self.name + (".model" if self.family == "mace" else ".pth")


_SEVENNET = (
    "Park, Kim, Hwang, Han, Scalable Parallel Algorithm for Graph Neural Network Interatomic Potentials "
    "in Molecular Dynamics Simulations, J. Chem. Theory Comput. 20, 4857 (2024), "
    "doi:10.1021/acs.jctc.4c00190"
)
_MULTI_FIDELITY = (
    "Kim et al., Data-Efficient Multifidelity Training for High-Fidelity Machine Learning Interatomic "
    "Potentials, J. Am. Chem. Soc. 147, 1042 (2025), doi:10.1021/jacs.4c14455"
)
_MACE = (
    "Batatia, Kovacs, Simm, Ortner, Csanyi, MACE: Higher Order Equivariant Message Passing Neural Networks "
    "for Fast and Accurate Force Fields, NeurIPS 35 (2022), arXiv:2206.07697"
)
_MP = (
    f"Batatia et al., A foundation model for atomistic materials chemistry (2023), arXiv:2401.00096; {_MACE}"
)
_OMAT = f"{_MP}; data: Barroso-Luque et al., Open Materials 2024 (2024), arXiv:2410.12771"
_MATPES = f"{_OMAT}; Kaplan et al., A Foundational Potential Energy Surface Dataset for Materials (2025), "
_MATPES += "arXiv:2503.04070"
_MH = (
    "Batatia et al., Cross Learning between Electronic Structure Theories for Unifying Molecular, Surface, "
    f"and Inorganic Crystal Foundation Force Fields (2025), arXiv:2510.25380; {_MACE}"
)
_OFF = (
    "Kovacs et al., MACE-OFF: Transferable Short Range Machine Learning Force Fields for Organic Molecules "
    f"(2023), arXiv:2312.15211; {_MACE}"
)
_OMOL = f"{_MP}; data: Levine et al., The Open Molecules 2025 (OMol25) Dataset (2025), arXiv:2505.08762"

_RELEASES = "https://github.com/ACEsuit/{}/releases/download"
_MP_PAGE, _PAGE = _RELEASES.format("mace-mp"), _RELEASES.format("mace-foundations")
_OFF_PAGE = "https://raw.githubusercontent.com/ACEsuit/mace-off/main"


def _sevennet(
    name: str, member: str, sha256: str, *, citation: str = _SEVENNET, **more: tuple[str, ...]
) -> NamedCheckpoint:
    origin = WheelMember(f"sevenn/pretrained_potentials/{member}")
    return NamedCheckpoint(name, "sevennet", origin, sha256, "MIT", citation, **more)


def _mace(
    name: str, url: str, licence: LicenceName, citation: str, aliases: tuple[str, ...] = ()
) -> NamedCheckpoint:
    return NamedCheckpoint(name, "mace", WebFile(url), None, licence, citation, aliases)


NAMED_CHECKPOINTS: tuple[NamedCheckpoint, ...] = (
    _sevennet(
        "7net-l3i5",
        "SevenNet_l3i5/checkpoint_l3i5.pth",
        "a7ff190d41efe5b8317a03d20a468e4036a1a3e64e0b14fdbab64ac3f4bfc09d",
        aliases=("sevennet-l3i5",),
    ),
    _sevennet(
        "7net-0",
        "SevenNet_0__11Jul2024/checkpoint_sevennet_0.pth",
        "7052cb42b7b3be42b40b97fa0d21077a48c54b5548948fc4dcf346629f813c36",
        aliases=("7net-0_11jul2024", "sevennet-0"),
    ),
    _sevennet(
        "7net-0_22May2024",
        "SevenNet_0__22May2024/checkpoint_sevennet_0.pth",
        "5d389fafd512e6ae2830d74d0b66ffc49a55d3832653ff8e7bf7f1343013c1d1",
        aliases=("sevennet-0_22may2024",),
    ),
    _sevennet(
        "7net-mf-0",
        "SevenNet_MF_0/checkpoint_sevennet_mf_0.pth",
        "81791329b37d445f46b531578c182c41792d98c7814222c9e5dde276402225fd",
        citation=_MULTI_FIDELITY,
        aliases=("sevennet-mf-0",),
        modalities=("PBE", "R2SCAN"),
    ),
    _mace(
        "mace-mp-0-small", f"{_MP_PAGE}/mace_mp_0/2023-12-10-mace-128-L0_energy_epoch-249.model", "MIT", _MP
    ),
    _mace("mace-mp-0-medium", f"{_MP_PAGE}/mace_mp_0/2023-12-03-mace-128-L1_epoch-199.model", "MIT", _MP),
    # mace_mp's "large" (256 channels, l <= 1); the release page calls the next one large (128, l <= 2).
    _mace("mace-mp-0-large", f"{_MP_PAGE}/mace_mp_0/MACE_MPtrj_2022.9.model", "MIT", _MP),
    _mace("mace-mp-0-l2", f"{_MP_PAGE}/mace_mp_0/2024-01-07-mace-128-L2_epoch-199.model", "MIT", _MP),
    _mace("mace-mp-0b-small", f"{_MP_PAGE}/mace_mp_0b/mace_agnesi_small.model", "MIT", _MP, ("small-0b",)),
    _mace("mace-mp-0b-medium", f"{_MP_PAGE}/mace_mp_0b/mace_agnesi_medium.model", "MIT", _MP, ("medium-0b",)),
    *(
        _mace(
            f"mace-mp-0b2-{size}",
            f"{_MP_PAGE}/mace_mp_0b2/mace-{size}-density-agnesi-stress.model",
            "MIT",
            _MP,
            (f"{size}-0b2",),
        )
        for size in ("small", "medium", "large")
    ),
    _mace(
        "mace-mp-0b3-medium", f"{_MP_PAGE}/mace_mp_0b3/mace-mp-0b3-medium.model", "MIT", _MP, ("medium-0b3",)
    ),
    _mace(
        "mace-mpa-0-medium",
        f"{_MP_PAGE}/mace_mpa_0/mace-mpa-0-medium.model",
        "MIT",
        _MP,
        ("medium-mpa-0", "mace-mpa-0"),
    ),
    *(
        _mace(
            f"mace-omat-0-{size}",
            f"{_MP_PAGE}/mace_omat_0/mace-omat-0-{size}.model",
            "ASL",
            _OMAT,
            (f"{size}-omat-0",),
        )
        for size in ("small", "medium")
    ),
    _mace("mace-matpes-pbe-0", f"{_PAGE}/mace_matpes_0/MACE-matpes-pbe-omat-ft.model", "ASL", _MATPES),
    _mace("mace-matpes-r2scan-0", f"{_PAGE}/mace_matpes_0/MACE-matpes-r2scan-omat-ft.model", "ASL", _MATPES),
    # Several heads: which, the file says.
    _mace("mace-mh-0", f"{_PAGE}/mace_mh_1/mace-mh-0.model", "ASL", _MH, ("mh-0",)),
    _mace("mace-mh-1", f"{_PAGE}/mace_mh_1/mace-mh-1.model", "ASL", _MH, ("mh-1",)),
    *(
        _mace(f"mace-off23-{size}", f"{_OFF_PAGE}/mace_off23/MACE-OFF23_{size}.model", "ASL", _OFF)
        for size in ("small", "medium", "large")
    ),
    _mace("mace-off24-medium", f"{_OFF_PAGE}/mace_off24/MACE-OFF24_medium.model", "ASL", _OFF),
    _mace(
        "mace-omol-0-extra-large",
        f"{_PAGE}/mace_omol_0/MACE-omol-0-extra-large-1024.model",
        "ASL",
        _OMOL,
        ("mace-omol-0", "extra_large"),
    ),
)


def find_named(name: str) -> NamedCheckpoint | None:
    """Return the checkpoint of this name or alias, or None."""
    wanted = name.lower()
    for entry in NAMED_CHECKPOINTS:
        if wanted in (entry.name.lower(), *entry.aliases):
            return entry
    return None


def recognise(file_name: str, digest: str) -> NamedCheckpoint | None:
    """Return the named checkpoint that a user's file is: by its sha256, else by its published name.

    mace-torch keeps its downloads under names without punctuation, so only letters, digits and
    underscores are compared.
    """
    by_digest = (entry for entry in NAMED_CHECKPOINTS if entry.sha256 == digest)
    by_name = (
        entry
        for entry in NAMED_CHECKPOINTS
        if isinstance(entry.origin, WebFile)
        and _letters(file_name) in (_letters(entry.origin.file_name), _letters(entry.file_name))
    )
    return next(by_digest, None) or next(by_name, None)


def _letters(name: str) -> str:
    return re.sub(r"\W", "", name).lower()


def require_licence(entry: NamedCheckpoint, accepted: str | None) -> None:
    """Raise unless the model's licence needs no acceptance or is the accepted one.

    Raises
    ------
    LicenceError
        The message names the licence, what it forbids and how to accept it.
    """
    licence = LICENCES[entry.licence]
    if licence.restriction is None or (isinstance(accepted, str) and accepted.upper() == entry.licence):
        return
    raise LicenceError(
        f"{entry.name} is published under the {licence.title} ({entry.licence}, {licence.url}): "
        f"{licence.restriction}, and models made from it inherit this. If you have read and accept it, add "
        f"--accept-licence {entry.licence} (in Python: accept_licence='{entry.licence}')."
    )


def unknown_name_error(name: str) -> InputError:
    """Error for something that is neither a known name nor a file."""
    every = [word for entry in NAMED_CHECKPOINTS for word in (entry.name, *entry.aliases)]
    sizes = [stem + name.lower() for stem in ("mace-mp-0-", "mace-off23-")]
    ambiguous = all(find_named(size) for size in sizes)
    hint = f" '{name}' alone is either of {', '.join(sizes)}." if ambiguous else did_you_mean(name, every)
    known = "; ".join(f"{title}: {', '.join(_short_list(family))}" for family, title in FAMILIES.items())
    return InputError(
        f"'{name}' is neither a file nor a known model. Known are, with licence and source in "
        f"'compactmlip models', {known}.{hint}"
    )


def _short_list(family: Family) -> list[str]:
    """Names of a family, those that differ in size only drawn together as ``name-{small,medium}``."""
    series: dict[str, list[str]] = {}
    for entry in NAMED_CHECKPOINTS:
        if entry.family == family:
            stem, dash, size = entry.name.rpartition("-")
            if size in ("small", "medium", "large"):
                series.setdefault(stem + dash, []).append(size)
            else:
                series[entry.name] = []
    return [stem + (f"{{{','.join(s)}}}" if len(s) > 1 else "".join(s)) for stem, s in series.items()]


def rows() -> list[dict[str, object]]:
    """Every known model as plain values, for scripts."""
    keys = ("name", "aliases", "family", "licence", "source", "citation")
    return [{key: getattr(entry, key) for key in keys} for entry in NAMED_CHECKPOINTS]


def listing() -> list[str]:
    """Lines for people: every known model with family, licence and source, then the licences."""
    width = max(len(entry.name) for entry in NAMED_CHECKPOINTS)
    lines = [
        f"{entry.name:{width}}  {FAMILIES[entry.family]:8}  {entry.licence}  {entry.source}"
        for entry in NAMED_CHECKPOINTS
    ]
    for name, licence in LICENCES.items():
        how = f"; {licence.restriction}; accept with --accept-licence {name}" if licence.restriction else ""
        lines.append(f"{name}: {licence.title}, {licence.url}{how}")
    return lines
