"""What all benchmark scripts share: a description of the machine and tables in Markdown."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from datetime import datetime, timezone
from pathlib import Path

import torch

from compactmlip.validate.certificate import software_versions
from compactmlip.validate.speed import describe_machine

RESULTS = Path(__file__).parent / "results"


def parser(description: str | None) -> argparse.ArgumentParser:
    """Parser with the options that every script has."""
    made = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    made.add_argument("--threads", type=int, default=1)
    made.add_argument("--output", type=Path, help="write the tables here as well (Markdown)")
    return made


def header(title: str, command: str) -> str:
    """Title, command, date, processor and versions."""
    machine = describe_machine()
    versions = ", ".join(f"{name} {version}" for name, version in software_versions().items())
    now = datetime.now(timezone.utc).strftime("%Y-%m-%d")
    return (
        f"# {title}\n\n`{command}`\n\n{now}; {machine.processor}, {torch.get_num_threads()} thread(s) of "
        f"{machine.cores} cores; load average before the run {machine.load_average}; {versions}.\n"
    )


def table(columns: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    """Markdown table; floats get three significant digits."""
    lines = ["| " + " | ".join(columns) + " |", "|" + " --- |" * len(columns)]
    lines += ["| " + " | ".join(_cell(value) for value in row) + " |" for row in rows]
    return "\n".join(lines) + "\n"


def _cell(value: object) -> str:
    if isinstance(value, float):
        return f"{value:#.3g}".rstrip(".")
    return str(value)


def report(text: str, output: Path | None) -> None:
    """Print, and write if asked."""
    print(text, flush=True)
    if output is not None:
        output.parent.mkdir(parents=True, exist_ok=True)
        output.write_text(text)
