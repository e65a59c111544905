"""Numbers of a training for TensorBoard."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

from compactmlip.errors import InputError

FOLDER = "tensorboard"

NOT_DRAWN = ("epoch", "steps", "minutes")
"""Columns that say when, not how well."""


class Board:
    """Event file of a run, closed at the end of the ``with`` block.

    What a run writes again after an interruption replaces what was there from that step on.

    Parameters
    ----------
    folder
        Of the run; None to write nothing.

    Raises
    ------
    InputError
        If the package tensorboard is missing.
    """

    def __init__(self, folder: Path | None) -> None:
        self.folder = folder
        self._writer: Any = None
        if folder is not None:
            try:
                import tensorboard  # noqa: F401
            except ImportError:
                raise InputError(
                    "tensorboard=true needs the package tensorboard (pip install '.[tensorboard]')."
                ) from None

    def __enter__(self) -> Board:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._writer is not None:
            self._writer.close()

    def add(self, row: Mapping[str, float]) -> None:
        """Add the numbers of one validation under their names in ``history.csv``, at its step."""
        if self.folder is None:
            return
        step = int(row["steps"])
        if self._writer is None:
            from torch.utils.tensorboard import SummaryWriter

            self._writer = SummaryWriter(str(self.folder / FOLDER), purge_step=step)
        for name, value in row.items():
            if name not in NOT_DRAWN and math.isfinite(value):
                self._writer.add_scalar(name, value, step)
        self._writer.flush()
