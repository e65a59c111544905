"""Machine code (AOTInductor) against TorchScript with plain operators and with kernels: energies and forces.

The same model, structure and process, alternately; medians.  SevenNet has its real weights (downloaded on
first use), MACE random ones.

    OMP_NUM_THREADS=1 python benchmarks/aoti.py [--models 7net-l3i5 MACE]
"""

from __future__ import annotations

import tempfile
from functools import partial
from pathlib import Path
from time import perf_counter

import torch
from ase.build import bulk
from common import header, parser, report, table
from kernels import MACE_CHANNELS, mace, times

from compactmlip.compress.apply import keep_species
from compactmlip.data.graph import build_graph
from compactmlip.deploy.compile import compile_model
from compactmlip.deploy.engine import load_engine
from compactmlip.families import load_model

MACE = "128x0e+128x1o"


def main() -> None:
    options_parser = parser(__doc__)
    options_parser.add_argument("--models", nargs="+", default=["7net-l3i5", "MACE"])
    options_parser.add_argument("--dtype", default="float32")
    options_parser.add_argument("--repeats", type=int, default=5)
    options_parser.add_argument("--folder", type=Path, help="keep the compiled files here and use them again")
    options = options_parser.parse_args()
    torch.set_num_threads(options.threads)
    rows: list[list[object]] = []
    with tempfile.TemporaryDirectory() as temporary:
        folder = options.folder or Path(temporary)
        for name in options.models:
            model = (
                mace(MACE_CHANNELS[MACE]) if name == "MACE" else keep_species(load_model(name), ["Mg", "O"])
            )
            engines, seconds, megabytes = {}, {}, {}
            for backend in ("torch", "kernels", "aoti"):
                path = folder / f"{name}-{options.dtype}-{backend}.{'pt2' if backend == 'aoti' else 'pt'}"
                start = perf_counter()
                if not path.exists():
                    compile_model(model, path, dtype=options.dtype, backend=backend)  # type: ignore[arg-type]
                seconds[backend], megabytes[backend] = perf_counter() - start, path.stat().st_size / 1e6
                print(name, backend, f"{seconds[backend]:.0f} s", f"{megabytes[backend]:.1f} MB", flush=True)
                engines[backend] = load_engine(path)
            for cells in (1, 2):
                crystal = bulk("MgO", "rocksalt", a=4.21, cubic=True) * ((cells,) * 3)
                crystal.rattle(0.05, seed=0)
                graph = build_graph(crystal, engines["torch"].spec, engines["torch"].dtype)
                runs = {b: partial(e.evaluate, graph) for b, e in engines.items()}
                found = times(runs, options.repeats)
                forces = {b: e.evaluate(graph).forces for b, e in engines.items()}
                difference = float((forces["aoti"] - forces["torch"]).abs().max())
                row = [name if name != "MACE" else f"MACE {MACE}", len(crystal), len(graph.centers)]
                row += [1e3 * found[b] for b in engines]
                row += [found["torch"] / found["aoti"], difference, seconds["aoti"], megabytes["aoti"]]
                rows.append(row)
                print(row, flush=True)
    text = header("Machine code against TorchScript", f"python benchmarks/aoti.py --dtype {options.dtype}")
    text += f"\nMgO, {options.dtype}; milliseconds for energies and forces, medians of {options.repeats}.\n\n"
    columns = ("model", "atoms", "edges", "torch", "kernels", "aoti", "torch / aoti")
    more = ("force difference, eV/Å", "aoti compiled in, s", "its size, MB")
    report(text + table((*columns, *more), rows), options.output)


if __name__ == "__main__":
    main()
