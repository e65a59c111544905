"""Progress of long work: a bar on a terminal, a line now and then in a log file."""

from __future__ import annotations

import sys
import time
from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

LOG_INTERVAL = 15.0
"""Seconds between lines where there is no terminal."""


class Track:
    """Context manager that shows how far a task is, its rate and the time left (on stderr).

    Parameters
    ----------
    description
        What is being done.
    total
        Amount of work, in ``unit``.
    unit
        Name of the unit for the rate, for instance "atoms".
    enabled
        If false nothing is shown.
    """

    def __init__(self, description: str, total: float, unit: str = "atoms", *, enabled: bool = True) -> None:
        self.description, self.total, self.unit, self.enabled = description, total, unit, enabled
        self.done = 0.0
        self._note = ""
        self._shown = -1.0
        self._bar: Progress | None = None

    def __enter__(self) -> Track:
        self._start = self._last_line = time.monotonic()
        console = Console(stderr=True)
        if self.enabled and console.is_terminal:
            self._bar = Progress(
                TextColumn("{task.description}"),
                BarColumn(),
                TextColumn("{task.fields[rate]} {task.fields[note]}"),
                TimeElapsedColumn(),
                TimeRemainingColumn(),
                console=console,
            )
            self._task = self._bar.add_task(self.description, total=self.total, rate="", note="")
            self._bar.start()
        return self

    def advance(self, amount: float, note: str = "") -> None:
        """Record finished work; ``note`` is shown beside the rate."""
        self.done += amount
        self._note = note or self._note
        if self._bar is not None:
            self._bar.update(self._task, advance=amount, rate=self._rate(), note=self._note)
        elif self.enabled and time.monotonic() - self._last_line > LOG_INTERVAL:
            self._line()

    def _rate(self) -> str:
        elapsed = max(time.monotonic() - self._start, 1e-9)
        return f"{self.done / elapsed:.3g} {self.unit}/s"

    def _line(self) -> None:
        self._last_line, self._shown = time.monotonic(), self.done
        elapsed = self._last_line - self._start
        left = elapsed * (self.total / self.done - 1) if self.done else float("nan")
        share = 100 * self.done / self.total if self.total else 100
        print(
            f"{self.description}: {share:.0f} %, {self._rate()}, {left:.0f} s left {self._note}".rstrip(),
            file=sys.stderr,
            flush=True,
        )

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if self._bar is not None:
            self._bar.stop()
        elif (
            self.enabled and kind is None and self.done > self._shown and time.monotonic() - self._start > 1.0
        ):
            self._line()
