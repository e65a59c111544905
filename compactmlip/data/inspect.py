"""What can be wrong with labelled data, found before any training: one message for each kind.

Checks here need no model; :mod:`compactmlip.data.suspect` compares labels with a model's predictions.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from ase import Atoms

from compactmlip.data.read import ENERGY, FORCES, STRESS, is_isolated_atom
from compactmlip.errors import InputError, SpeciesError
from compactmlip.spec import ModelSpec

SAME_POSITION = 1e-4
"""Angstrom; atoms of two frames that differ by less are in the same place."""

Place = tuple[str, int]
"""Name of a set and index of a frame in it."""

CHECKS = {
    "nan-labels": "labels that are NaN or infinite",
    "missing-forces": "frames without forces among frames with forces",
    "mixed-pbc": "frames with different periodicity",
    "duplicates": "the same structure twice in one set",
    "leaks": "the same structure in two sets",
    "absurd-forces": "forces above max_force",
    "units": "labels that look like other units, or another sign",
}
"""Names of the checks, for ``accept`` and ``drop``."""


@dataclass(frozen=True)
class Finding:
    """Something that is wrong.

    Attributes
    ----------
    check
        Name of the check, see :data:`CHECKS`.
    message
        What is wrong and where.
    frames
        Frames that ``drop`` would remove; empty if removing frames is no cure.
    acceptable
        Whether one can go on as it is.
    fatal
        Whether the run stops unless it is accepted or dropped; else it is a warning.
    """

    check: str
    message: str
    frames: tuple[Place, ...] = ()
    acceptable: bool = True
    fatal: bool = True

    def advice(self) -> str:
        """How to go on."""
        ways = [f"--accept {self.check} keeps them"] if self.acceptable else []
        ways += [f"--drop {self.check} leaves these frames out"] if self.frames else []
        return "; ".join(ways)


Sets = Mapping[str, Sequence[Atoms]]


def inspect_sets(sets: Sets, max_force: float) -> list[Finding]:
    """Look for bad labels and structures.

    Parameters
    ----------
    sets
        Frames with ``REF_*`` labels by the name of their set; of those in two sets, the first named keeps
        the structure unless ``drop`` is asked for.
    max_force
        eV/Angstrom.
    """
    found = [
        *_not_finite(sets),
        *_missing_forces(sets),
        *_mixed_pbc(sets),
        *_absurd_forces(sets, max_force),
        *_repeated(sets),
    ]
    return found


def check_species(sets: Sets, spec: ModelSpec, name: str) -> None:
    """Raise :class:`SpeciesError` if a model lacks a species of the data; the message names all of them."""
    places: dict[str, Place] = {}
    for set_name, frames in sets.items():
        for k, atoms in enumerate(frames):
            for symbol in set(atoms.get_chemical_symbols()) - set(spec.species):
                places.setdefault(symbol, (set_name, k))
    if places:
        where = ", ".join(f"{s} (first in {_place(p)})" for s, p in sorted(places.items()))
        covered = " ".join(spec.species) if len(spec.species) <= 20 else f"{len(spec.species)} species"
        raise SpeciesError(
            f"the data contain {where}, which {name} does not cover (it covers {covered}). Remove these "
            "frames, or start from a model that was trained on these species."
        )


def settle(
    sets: Sets, findings: Sequence[Finding], accept: Iterable[str], drop: Iterable[str]
) -> tuple[dict[str, list[Atoms]], list[str]]:
    """Act on findings: return the sets without dropped frames, and what is to be said.

    Raises
    ------
    InputError
        Naming every finding that is neither accepted nor dropped, or an unknown check.
    """
    accept, drop = set(accept), set(drop)
    unknown = sorted((accept | drop) - set(CHECKS))
    if unknown:
        raise InputError(f"unknown check '{unknown[0]}'; the checks are {', '.join(CHECKS)}.")
    errors: list[str] = []
    notes: list[str] = []
    gone: set[Place] = set()
    for finding in findings:
        if finding.check in drop and finding.frames:
            gone.update(finding.frames)
            notes.append(f"{finding.check}: {finding.message} {len(finding.frames)} frames left out.")
        elif finding.fatal and not (finding.acceptable and finding.check in accept):
            errors.append(f"{finding.check}: {finding.message} {finding.advice()}".rstrip())
        else:
            notes.append(f"{finding.check}: {finding.message}")
    if errors:
        raise InputError("the data cannot be used as they are.\n  " + "\n  ".join(errors))
    kept = {n: [a for k, a in enumerate(frames) if (n, k) not in gone] for n, frames in sets.items()}
    return kept, notes


def _place(place: Place) -> str:
    return f"{place[0]} frame {place[1]}"


def _some(places: Sequence[Place]) -> str:
    shown = ", ".join(map(_place, places[:3]))
    return shown if len(places) <= 3 else f"{shown} and {len(places) - 3} more"


def _walk(sets: Sets) -> Iterable[tuple[Place, Atoms]]:
    for name, frames in sets.items():
        for k, atoms in enumerate(frames):
            yield (name, k), atoms


def _not_finite(sets: Sets) -> list[Finding]:
    found = []
    for key in (ENERGY, FORCES, STRESS):
        bad = [
            place
            for place, a in _walk(sets)
            if not np.isfinite(a.arrays.get(key, 0.0) if key == FORCES else a.info.get(key, 0.0)).all()
        ]
        if bad:
            text = f"{len(bad)} frames have {key} that is NaN or infinite ({_some(bad)})."
            found.append(Finding("nan-labels", text, tuple(bad), acceptable=False))
    return found


def _missing_forces(sets: Sets) -> list[Finding]:
    frames = [(place, a) for place, a in _walk(sets) if not is_isolated_atom(a)]
    without = [place for place, a in frames if FORCES not in a.arrays]
    if not without:
        return []
    text = (
        f"{len(without)} of {len(frames)} frames have no forces ({_some(without)}); training would use their"
    )
    return [Finding("missing-forces", f"{text} energies only.", tuple(without))]


def _mixed_pbc(sets: Sets) -> list[Finding]:
    places: dict[tuple[bool, ...], list[Place]] = {}
    boxed: list[Place] = []
    composition: dict[str, set[tuple[bool, ...]]] = {}
    for place, a in _walk(sets):
        if is_isolated_atom(a):
            continue
        kind = tuple(bool(p) for p in a.pbc)
        places.setdefault(kind, []).append(place)
        composition.setdefault(a.get_chemical_formula(), set()).add(kind)
        if not any(kind) and a.cell.rank == 3:
            boxed.append(place)
    if len(places) < 2:
        return []
    rarest = min(places, key=lambda kind: len(places[kind]))
    listed = ", ".join(f"{_pbc(kind)}: {len(p)}" for kind, p in sorted(places.items(), reverse=True))
    text = f"frames with different pbc ({listed}; {_pbc(rarest)} is {_some(places[rarest])})"
    both = [formula for formula, kinds in composition.items() if len(kinds) > 1]
    if boxed:
        text += f"; {len(boxed)} that are not periodic have a cell all the same, is their pbc lost?"
        return [Finding("mixed-pbc", text, tuple(boxed))]
    if both:
        text += f"; {both[0]} occurs in both ways."
        return [Finding("mixed-pbc", text, tuple(places[rarest]))]
    return [Finding("mixed-pbc", f"{text}.", fatal=False)]


def _pbc(kind: tuple[bool, ...]) -> str:
    return "".join("T" if p else "F" for p in kind)


def _absurd_forces(sets: Sets, max_force: float) -> list[Finding]:
    largest = {
        place: float(np.linalg.norm(a.arrays[FORCES], axis=1).max())
        for place, a in _walk(sets)
        if FORCES in a.arrays
    }
    bad = [place for place, force in largest.items() if force > max_force]
    if not bad:
        return []
    worst = max(bad, key=lambda place: largest[place])
    text = (
        f"{len(bad)} frames have a force above max_force = {max_force:g} eV/Angstrom; the largest is "
        f"{largest[worst]:.3g} eV/Angstrom in {_place(worst)}."
    )
    return [Finding("absurd-forces", text, tuple(bad))]


def _repeated(sets: Sets) -> list[Finding]:
    """Duplicates within a set, and structures that two sets share."""
    groups = repeated_structures([a for _, a in _walk(sets)])
    places = [place for place, _ in _walk(sets)]
    energies = [a.info.get(ENERGY, np.nan) for _, a in _walk(sets)]
    within: list[Place] = []
    across: list[Place] = []
    pairs: Counter[tuple[str, str]] = Counter()
    contradicting = 0
    for group in groups:
        members = [places[k] for k in group]
        seen: set[str] = set()
        for name, k in members:
            (within if name in seen else across if seen else []).append((name, k))
            if seen and name not in seen:
                pairs[min(seen), name] += 1
            seen.add(name)
        spread = np.ptp([energies[k] for k in group])
        contradicting += bool(spread > 1e-3)
    found = []
    extra = f" {contradicting} such structures have energies that differ." if contradicting else ""
    if within:
        text = f"{len(within)} frames repeat an earlier structure of their set ({_some(within)}).{extra}"
        found.append(Finding("duplicates", text, tuple(within)))
    if across:
        names = ", ".join(f"{n} in {a} and {b}" for (a, b), n in pairs.items())
        text = f"structures are in two sets ({names}; {_some(across)}): errors there would look too small."
        found.append(Finding("leaks", text, tuple(across)))
    return found


def repeated_structures(frames: Sequence[Atoms]) -> list[list[int]]:
    """Groups of frames with the same species, cell, periodicity and positions, in the order of the frames.

    Positions are compared atom by atom, up to periodic images; the same structure shifted, rotated or with
    its atoms in another order is not recognised.
    """
    classes: dict[bytes, list[int]] = {}
    for k, a in enumerate(frames):
        classes.setdefault(a.numbers.tobytes() + a.pbc.tobytes(), []).append(k)
    groups = []
    for members in classes.values():
        left = _sorted_by_shape(frames, members)
        while left:
            first, rest = left[0], left[1:]
            near = []
            for size, k in rest:
                if size - first[0] > SAME_POSITION:
                    break
                if _same(frames[first[1]], frames[k]):
                    near.append(k)
            if near:
                groups.append(sorted([first[1], *near]))
            taken = set(near)
            left = [item for item in rest if item[1] not in taken]
    return sorted(groups)


def _sorted_by_shape(frames: Sequence[Atoms], members: Sequence[int]) -> list[tuple[float, int]]:
    """Frames sorted by a number that is the same for the same structure: two distances, and the cell."""
    sizes = []
    for k in members:
        a = frames[k]
        pair = a.get_distance(0, len(a) - 1, mic=bool(a.pbc.any())) if len(a) > 1 else 0.0
        sizes.append((0.1 * pair + 0.01 * float(np.linalg.norm(a.cell.array)), k))
    return sorted(sizes)


def _same(a: Atoms, b: Atoms) -> bool:
    if abs(a.cell.array - b.cell.array).max() > SAME_POSITION:
        return False
    moved = b.positions - a.positions
    if a.pbc.any() and a.cell.rank == 3:
        scaled = np.linalg.solve(a.cell.array.T, moved.T)
        scaled[a.pbc] -= np.rint(scaled[a.pbc])
        moved = scaled.T @ a.cell.array
    return bool(abs(moved).max() < SAME_POSITION)
