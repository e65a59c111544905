"""The report of a fine-tuning: one HTML file that needs nothing but itself."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from importlib import resources
from typing import Any

import numpy as np

from compactmlip.validate.report.figures import (
    INK,
    MODEL,
    PALETTE,
    TEACHER,
    draw_line,
    make_panels,
    render_svg,
    styled,
)
from compactmlip.validate.report.formats import integer, number


def build_finetune_report(summary: Mapping[str, Any]) -> str:
    """Return the report of a summary (content of ``summary.json``) as HTML text."""
    from jinja2 import Environment, StrictUndefined
    from markupsafe import Markup

    package = resources.files(__package__)
    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True)
    environment.filters.update(num=number, int_=integer)
    template = environment.from_string(package.joinpath("finetuning.html.j2").read_text(encoding="utf-8"))
    return template.render(
        s=summary,
        css=Markup(package.joinpath("report.css").read_text(encoding="utf-8")),
        curves=Markup(curves_figure(summary["history"], summary["best_epoch"])),
        tables=_tables(summary["sets"]),
        headline=_headline(summary),
    )


def _headline(s: Mapping[str, Any]) -> list[tuple[str, str, str]]:
    name = "test" if "test" in s["sets"] else "valid"
    errors = s["sets"][name]
    numbers = [
        (
            f"{quantity} MAE, {name}",
            number(errors["after"][key]["mae"]),
            f"{unit}, before {_num(errors, key)}",
        )
        for quantity, key, unit in (("energy", "energy", "meV/atom"), ("force", "forces", "meV/Å"))
    ]
    forgotten = s["forgetting"]
    if forgotten:
        first = forgotten[0]
        unit = f"meV/Å from the parent, of {number(first['mean_force'])}"
        numbers.append(("force change, replay", number(first["errors"]["forces"]["mae"]), unit))
    return [*numbers, ("best epoch", integer(s["best_epoch"]), s["stopped_because"])]


def _num(errors: Mapping[str, Any], key: str) -> str:
    return number(errors["before"][key]["mae"])


def _tables(sets: Mapping[str, Any]) -> list[dict[str, Any]]:
    """For each set: overall errors, then by species and configuration type, before and after."""
    tables = []
    for name, errors in sets.items():
        before, after = errors["before"], errors["after"]
        species = [
            (symbol, before["forces_by_species"][symbol], found)
            for symbol, found in after["forces_by_species"].items()
        ]
        types = list(zip(errors["rows_before"], errors["rows_after"], strict=True))
        overall = [
            (title, unit, before[key], after[key])
            for title, key, unit in (
                ("energy", "energy", "meV/atom"),
                ("forces", "forces", "meV/Å"),
                ("stress", "stress", "meV/Å³"),
            )
            if after[key]["mae"] is not None
        ]
        tables.append(
            {"name": name, "errors": errors, "overall": overall, "species": species, "types": types}
        )
    return tables


@styled
def curves_figure(history: Sequence[Mapping[str, float]], best_epoch: int) -> str:
    """Loss, and validation errors of energies and forces, over the epochs."""
    epochs = np.array([row["epoch"] for row in history], dtype=float)
    figure, (top, bottom) = make_panels((6.6, 4.4), (1, 1.2))
    draw_line(top, epochs, _column(history, "loss"), MODEL, "training", 1.1)
    draw_line(top, epochs, _column(history, "valid_loss"), TEACHER, "validation, averaged weights", 1.4)
    columns = (
        ("energy_mae_meV_per_atom", "energy (meV/atom)", PALETTE[2]),
        ("forces_mae_meV_per_A", "forces (meV/Å)", PALETTE[3]),
        ("stress_mae_meV_per_A3", "stress (meV/Å³)", PALETTE[4]),
    )
    for column, label, colour in columns:
        values = _column(history, column)
        if np.isfinite(values).any():
            draw_line(bottom, epochs, values, colour, label, 1.4)
    for axes in (top, bottom):
        axes.axvline(best_epoch, color=INK, linewidth=0.8, alpha=0.5, linestyle=(0, (4, 3)))
        axes.set_yscale("log")
        axes.legend(loc="upper right", ncols=2)
    top.set_ylabel("loss")
    bottom.set_ylabel("validation MAE")
    bottom.set_xlabel("epoch")
    return render_svg(figure, "curves", "Loss and validation errors over the epochs of training.")


def _column(history: Sequence[Mapping[str, float]], name: str) -> np.ndarray:
    """Values over the epochs; NaN where nothing is known, and for zeros, which have no logarithm."""
    values = np.array(
        [row.get(name) if row.get(name) is not None else np.nan for row in history], dtype=float
    )
    return np.where(values > 0, values, np.nan)
