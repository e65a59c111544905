"""Where the time of energies and forces goes, and how far each operator is from what the machine can do.

The first table has the time inside each operator (torch.profiler; without that of operators that it calls).
The second has floating-point operations, and the bytes of all tensors that go in and out, each once.  The
roofline is the larger of both times that these would take at the machine's measured peaks; where tensors stay
in a cache, more than 100 percent are possible.

    OMP_NUM_THREADS=1 python benchmarks/profile_engine.py small.pt large.pt --systems "MgO 216" "Si 64"
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Callable
from pathlib import Path

import torch
from common import Evaluation, header, parser, report, structure, table
from operations import Counter, Work, peak_bandwidth, peak_flops
from process import timed
from torch.profiler import ProfilerActivity, profile

WARM_UP = 2

MATRIX_PRODUCTS = ("aten::mm", "aten::addmm", "aten::bmm", "aten::baddbmm")


def profiled(run: Callable[[], object], repeats: int) -> dict[str, tuple[float, float]]:
    """Calls, and seconds inside each operator, of one calculation on average."""
    with profile(activities=[ProfilerActivity.CPU]) as found:
        for _ in range(repeats):
            run()
    return {
        event.key: (event.count / repeats, 1e-6 * event.self_cpu_time_total / repeats)
        for event in found.key_averages()
    }


def time_table(times: dict[str, tuple[float, float]], most: int) -> str:
    """Operators by time."""
    total = sum(seconds for _, seconds in times.values())
    ordered = sorted(times.items(), key=lambda item: -item[1][1])
    rows: list[list[object]] = [
        [name, f"{calls:g}", 1e3 * seconds, f"{100 * seconds / total:.1f}"]
        for name, (calls, seconds) in ordered[:most]
    ]
    rest = sum(seconds for _, (_, seconds) in ordered[most:])
    rows.append([f"{len(ordered[most:])} others", "", 1e3 * rest, f"{100 * rest / total:.1f}"])
    return table(("operator", "calls", "ms", "percent"), rows)


def roofline_table(
    times: dict[str, tuple[float, float]], counter: Counter, peaks: tuple[float, float], share: float
) -> str:
    """Work, rates and distance from the roofline of the operators of any weight."""
    total = sum(seconds for _, seconds in times.values())
    rows: list[list[object]] = []
    for name, (_, seconds) in sorted(times.items(), key=lambda item: -item[1][1]):
        work = counter.work.get(name, Work())
        important = name.startswith("compactmlip::") or name in MATRIX_PRODUCTS or seconds > share * total
        if not important or work.calls == 0 or seconds == 0:
            continue
        counted = work.flops is not None
        flops = work.flops or 0.0
        ideal = max(flops / peaks[0], work.bytes / peaks[1])
        bound = "compute" if flops / peaks[0] > work.bytes / peaks[1] else "memory"
        rows.append(
            [
                name,
                work.calls,
                1e3 * seconds,
                1e-9 * flops if counted else "–",
                1e-9 * work.bytes,
                1e-9 * flops / seconds if counted else "–",
                1e-9 * work.bytes / seconds,
                bound,
                f"{100 * ideal / seconds:.0f}",
            ]
        )
    columns = ("operator", "calls", "ms", "GFLOP", "GB", "GFLOP/s", "GB/s", "bound by")
    return table((*columns, "percent of roofline"), rows)


def section(path: Path, system: str, options: argparse.Namespace) -> str:
    """Both tables of one file."""
    evaluation = Evaluation(path)
    kind, count = system.split()
    atoms = structure(kind, int(count))
    graph = evaluation.graph(atoms)

    def run() -> object:
        return evaluation(graph)

    for _ in range(WARM_UP):
        run()
    seconds = statistics.median(timed(run)[1]["seconds"] for _ in range(options.repeats))
    times = profiled(run, options.repeats)
    with Counter(evaluation.spec) as counter:
        run()
    peaks = {dtype: peak_flops(dtype) for dtype in (torch.float32, torch.float64)}
    bandwidth = peak_bandwidth()
    text = (
        f"\n## {path.name}, {system}\n\n{str(evaluation.dtype).removeprefix('torch.')}; "
        f"{len(atoms)} atoms, {len(graph.centers)} edges; {1e3 * seconds:.4g} ms, "
        f"{len(atoms) / seconds:,.0f} atoms/s (median of {options.repeats}, without the profiler). Machine: "
        f"{1e-9 * peaks[torch.float32]:.0f} GFLOP/s in float32 and {1e-9 * peaks[torch.float64]:.0f} in "
        f"float64 (matrix product), {1e-9 * bandwidth:.1f} GB/s (a = b + s c).\n\n"
    )
    text += time_table(times, options.most)
    text += "\nWork, and distance from the roofline, of operators with more than 1 percent of the time.\n\n"
    return text + roofline_table(times, counter, (peaks[evaluation.dtype], bandwidth), 0.01)


def main() -> None:
    options_parser = parser(__doc__)
    options_parser.add_argument("models", nargs="+", type=Path, help="deployed files, or checkpoints")
    options_parser.add_argument("--systems", nargs="+", default=["MgO 216"], help="for each file, or for all")
    options_parser.add_argument("--repeats", type=int, default=5)
    options_parser.add_argument("--most", type=int, default=12, help="operators in the first table")
    options = options_parser.parse_args()
    torch.set_num_threads(options.threads)
    systems = options.systems * (len(options.models) if len(options.systems) == 1 else 1)
    text = header("Profile of the engine", "python benchmarks/profile_engine.py")
    for path, system in zip(options.models, systems, strict=True):
        text += section(path, system, options)
    report(text, options.output)


if __name__ == "__main__":
    main()
