"""Tables of engine.py from its records."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from common import header, table
from process import GB, TURN_SECONDS

COLUMNS = (
    "model",
    "system",
    "edges",
    "upstream float64",
    "upstream float32",
    "ours eager",
    "ours TorchScript",
    "kernels float64",
    "kernels float32",
    "kernels float32, whole step",
    "float64 / upstream float64",
    "float32 / upstream float64",
    "float32 / upstream float32",
    "GB upstream float64",
    "GB upstream float32",
    "GB kernels float64",
    "GB kernels float32",
    "ΔF float64 (eV/Å)",
    "ΔF float64 (relative)",
    "ΔF float32 (eV/Å)",
    "ΔF float32 (relative)",
)

Record = dict[str, Any]
Calculation = dict[str, Any]


def tables(records: Sequence[Record], max_memory: float, max_seconds: float) -> str:
    """One table for each number of threads, and one of their ratios."""
    text = header("Engine beside mace-torch and sevenn", "python benchmarks/engine.py")
    text += explanation(records, max_memory, max_seconds)
    threads = sorted({r["threads"] for r in records})
    for count in threads:
        rows = [row for r in records if r["threads"] == count for row in _rows(r)]
        text += f"\n## {_counted(count)}\n\n" + table(COLUMNS, rows)
    if len(threads) > 1:
        text += f"\n## {threads[-1]} threads over {threads[0]}\n\n" + _scaling(records, threads)
    return text


def own_forms(records: Sequence[Record]) -> str:
    """Our eager, TorchScript and kernel forms beside each other, a table for each number of threads."""
    names = ("eager", "TorchScript", "kernels float64", "kernels float32")
    columns = ("model", "system", *names, *(f"kernels float32 / {n}" for n in names[:3]))
    repeats = sorted({r["repeats"] for r in records})
    text = header("Our forms of each model", "python benchmarks/engine.py --ours-only")
    text += (
        "\nAtoms per second of energies and forces, medians of "
        f"{' or '.join(map(str, repeats))}, calculations in turn, each in a process of its own; and its peak "
        "memory. 'eager' is the native model with our kernels where it has some, 'TorchScript' the deployed "
        "file without kernels (`compile --backend torch`), both in float32. The models are those of "
        "engine.md.\n"
    )
    for threads in sorted({r["threads"] for r in records}):
        rows = [row for r in records if r["threads"] == threads for row in _forms(r)]
        text += f"\n## {_counted(threads)}\n\n" + table((*columns, *(f"GB {n}" for n in names)), rows)
    return text


def _forms(record: Record) -> list[list[object]]:
    """Rows of one model and structure."""
    found = {(c["form"], c["variant"]): c for c in record["calculations"]}
    rows: list[list[object]] = []
    for form in dict.fromkeys(label for label, _ in found):
        of = [found.get((form, variant), {}) for variant in ("eager", "torch", "kernels64", "kernels32")]
        rates = [_rate(record["atoms"], c, "seconds") for c in of]
        ratios = [_ratio(c, of[3]) for c in of[:3]]
        memory = [c["memory"] / GB if "seconds" in c else "–" for c in of]
        rows.append([_name(record["model"], form), record["system"], *rates, *ratios, *memory])
    return rows


def _counted(threads: int) -> str:
    return f"{threads} thread{'s' if threads > 1 else ''}"


def explanation(records: Sequence[Record], max_memory: float, max_seconds: float) -> str:
    """What the columns are, and why cells are empty."""
    repeats = sorted({r["repeats"] for r in records})
    failed = sorted(
        {
            f"{_name(r['model'], c['form'])}, {r['system']}, {c['variant']}, {r['threads']} thread(s): "
            f"{c['failed']}"
            for r in records
            for c in r["calculations"]
            if "failed" in c
        }
    )
    loads = [r["load"] for r in records if r["load"] is not None]
    waits = [
        sum(c["all_seconds"]) * r["threads"] / max(sum(c["all_processor_seconds"]), 1e-9)
        for r in records
        for c in r["calculations"]
        if "all_seconds" in c and r["threads"] == 1
    ]
    text = (
        f"\nAtoms per second of energies and forces with the neighbour list made before, medians of "
        f"{' or '.join(map(str, repeats))}, calculations in turn (of a turn of {TURN_SECONDS:g} s or "
        "more the median counts), each in a process of its own; GB: its peak "
        f"memory (loaded and before the first calculation {_start(records, True)} GB upstream and "
        f"{_start(records, False)} ours). 'Whole step' is `atoms.get_forces()` after moving the atoms, "
        "neighbour list and stress included, measured after the others. GOMP_SPINCOUNT is 1000 for all. "
        "Upstream has the elements of its release (89); ours those of the structure, except in "
        "rows 'all species'. Pruned rows are compared with the unpruned upstream model. ΔF: largest "
        "difference of a force component to upstream in float64, and relative to the largest component. "
        "MACE has random weights, scaled to realistic forces; SevenNet has its own.\n"
        f"\nAn empty cell (–) is a calculation that needs more than {max_memory:g} GB or "
        f"{max_seconds:g} s, or that failed:\n\n"
    )
    text += "".join(f"- {line}\n" for line in failed or ["none"])
    if loads:
        text += f"\nLoad average of the machine while measuring: {min(loads):.1f} to {max(loads):.1f}"
        if waits:
            text += f"; time on the clock over processor time (1 thread): at most {max(waits):.2f}"
        text += ".\n"
    return text


def _start(records: Sequence[Record], upstream: bool) -> str:
    """Range of the memory before the first calculation."""
    found = [
        c["memory_before"] / GB
        for r in records
        for c in r["calculations"]
        if "memory_before" in c and c["variant"].startswith("upstream") == upstream
    ]
    return f"{min(found):.2f} to {max(found):.2f}" if found else "–"


def _rows(record: Record) -> list[list[object]]:
    found = {(c["form"], c["variant"]): c for c in record["calculations"]}
    forms = list(dict.fromkeys(c["form"] for c in record["calculations"]))
    return [_row(record, form, found) for form in forms if _variants(found, form)]


def _variants(found: dict[tuple[str, str], Calculation], form: str) -> list[str]:
    return [variant for label, variant in found if label == form]


def _row(record: Record, form: str, found: dict[tuple[str, str], Calculation]) -> list[object]:
    upstream = [found.get(("", f"upstream{bits}"), {}) for bits in (64, 32)]
    eager, torch, double, single = (
        found.get((form, variant), {}) for variant in ("eager", "torch", "kernels64", "kernels32")
    )
    atoms = record["atoms"]
    rates = [_rate(atoms, c, "seconds") for c in (*upstream, eager, torch, double, single)]
    ratios = [_ratio(upstream[0], double), _ratio(upstream[0], single), _ratio(upstream[1], single)]
    memory = [c["memory"] / GB if "seconds" in c else "–" for c in (*upstream, double, single)]
    differences = [
        _scientific(c.get(name) if "pruned" not in form else None)
        for c in (double, single)
        for name in ("difference", "relative_difference")
    ]
    edges = next((c["edges"] for c in (single, double, torch, eager) if "edges" in c), "–")
    step = _rate(atoms, single, "step_seconds")
    return [
        _name(record["model"], form),
        record["system"],
        edges,
        *rates,
        step,
        *ratios,
        *memory,
        *differences,
    ]


def _name(model: str, form: str) -> str:
    return f"{model}, {form}" if form else model


def _rate(atoms: int, calculation: Calculation, key: str) -> object:
    return _number(atoms / calculation[key]) if key in calculation else "–"


def _ratio(slow: Calculation, fast: Calculation) -> object:
    if "seconds" not in slow or "seconds" not in fast:
        return "–"
    return _number(slow["seconds"] / fast["seconds"])


def _number(value: float) -> object:
    return f"{value:,.0f}" if value >= 100 else value


def _scientific(value: float | None) -> str:
    return "–" if value is None else f"{value:.1e}"


def _scaling(records: Sequence[Record], threads: Sequence[int]) -> str:
    """How many times faster each calculation is with the most threads than with the fewest."""
    by_key = {(r["model"], r["system"], r["threads"]): r for r in records}
    variants = ("upstream64", "upstream32", "kernels64", "kernels32")
    rows: list[list[object]] = []
    for model, system in dict.fromkeys((r["model"], r["system"]) for r in records):
        both = [by_key.get((model, system, count)) for count in (threads[0], threads[-1])]
        if both[0] is None or both[1] is None:
            continue
        few, many = ({(c["form"], c["variant"]): c for c in r["calculations"]} for r in both if r)
        for form in dict.fromkeys(label for label, _ in few):
            ratios = []
            for variant in variants:
                label = "" if variant.startswith("upstream") else form
                ratios.append(_ratio(few.get((label, variant), {}), many.get((label, variant), {})))
            rows.append([_name(model, form), system, *ratios])
    return table(
        ("model", "system", "upstream float64", "upstream float32", "kernels float64", "kernels float32"),
        rows,
    )
