"""Files for tests of reading pickles, and a guard that notices when anything in one of them runs."""

from __future__ import annotations

import functools
import pickle
import sys
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from compactmlip.families.inert import InertObject, load_inert

FOLDER = Path(__file__).parent / "reference" / "mace"

RUNNING = ("compile", "exec", "import", "os.", "pickle.", "shutil.", "subprocess.")
EVENTS: list[tuple[str, str]] = []
WATCHED: list[str] = []


def _audit(event: str, args: tuple[Any, ...]) -> None:
    """Note what Python would do for code that runs; see the table of audit events in its documentation."""
    if WATCHED and (event.startswith(RUNNING) or (event == "open" and str(args[0]) != WATCHED[0])):
        EVENTS.append((event, str(args)[:200]))


@functools.cache
def _watch() -> None:
    """Install the hook, which cannot be removed; it does nothing outside nothing_runs()."""
    sys.addaudithook(_audit)
    load_inert(FOLDER / "cueq.model")  # imports of the standard library happen now, once


@contextmanager
def nothing_runs(path: Path) -> Iterator[None]:
    """Fail if anything is imported, executed or unpickled, or any other file opened, meanwhile."""
    _watch()
    EVENTS.clear()
    WATCHED[:] = [str(path)]
    try:
        yield
    finally:
        WATCHED.clear()
    assert not EVENTS, f"it ran {EVENTS}"


def read(path: Path) -> InertObject:
    """Load a file under the guard."""
    with nothing_runs(path):
        return load_inert(path)


def archive(path: Path, content: bytes, **others: bytes) -> Path:
    """A zip archive as PyTorch writes it, with this data.pkl and others by name."""
    with zipfile.ZipFile(path, "w") as file:
        for name, data in {"data.pkl": content, "byteorder": sys.byteorder.encode(), **others}.items():
            file.writestr(f"archive/{name}", data)
    return path


class Call:
    """Pickled as a call of a function, which pickle would make when it loads."""

    def __init__(self, function: Callable[..., Any], *args: Any) -> None:
        self.function, self.args = function, args

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[Any, ...]]:
        return self.function, self.args


def text(value: str) -> bytes:
    """Pickle opcode of a text."""
    return pickle.BINUNICODE + len(value).to_bytes(4, "little") + value.encode()
