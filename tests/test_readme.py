"""The README: its commands are well formed, and they run.

Commands of the section "Install" are run by ``.ci/run``.  All other blocks run here, in order, in one
folder, when COMPACTMLIP_QUICKSTART_DIR names a finished quickstart folder.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest
from browser import check, needs_browser

ROOT = Path(__file__).resolve().parents[1]
QUICKSTART = os.environ.get("COMPACTMLIP_QUICKSTART_DIR")
BLOCK_TIMEOUT = 900
needs_quickstart = pytest.mark.skipif(
    QUICKSTART is None, reason="COMPACTMLIP_QUICKSTART_DIR is not set (.ci/run sets it)"
)


class Block(NamedTuple):
    section: str
    language: str
    line: int
    text: str


def parse_blocks(markdown: str) -> list[Block]:
    """Fenced blocks with the second-level heading above them."""
    blocks: list[Block] = []
    section, language, start = "", "", 0
    body: list[str] | None = None
    for number, line in enumerate(markdown.splitlines(), start=1):
        if body is None and line.startswith("```"):
            language, start, body = line[3:].strip(), number, []
        elif body is None:
            section = line[3:].strip() if line.startswith("## ") else section
        elif line == "```":
            blocks.append(Block(section, language, start, "\n".join(body) + "\n"))
            body = None
        else:
            body.append(line)
    if body is not None:
        raise ValueError(f"the block that starts in line {start} does not end")
    return blocks


README = (ROOT / "README.md").read_text(encoding="utf-8")
BLOCKS = parse_blocks(README)
INSTALL = [b for b in BLOCKS if b.section == "Install"]
RUNNABLE = [b for b in BLOCKS if b.section != "Install" and b.language in ("bash", "python")]


def test_parse_blocks() -> None:
    text = "## One\n```bash\n## no heading\n```\n## Two\ntext\n```python\nx = 1\n\ny = 2\n```\n"
    assert parse_blocks(text) == [
        Block("One", "bash", 2, "## no heading\n"),
        Block("Two", "python", 7, "x = 1\n\ny = 2\n"),
    ]
    with pytest.raises(ValueError, match="line 1"):
        parse_blocks("```bash\nls\n")


def test_install_is_two_commands() -> None:
    assert [b.text for b in INSTALL] == [
        "pip install -c constraints.txt . && compactmlip quickstart\n",
        "pip install -c constraints.txt '.[test]' && pytest -n 2\n",
    ]
    assert {b.language for b in INSTALL} == {"bash"}


def test_every_block_says_its_language() -> None:
    unknown = [b for b in BLOCKS if b.language not in ("bash", "python", "text")]
    assert not unknown, f"no test would run these: {unknown}"
    assert RUNNABLE


@pytest.mark.parametrize("block", [b for b in BLOCKS if b.language == "bash"], ids=lambda b: f"line-{b.line}")
def test_bash_commands_exist(block: Block) -> None:
    """Subcommands and long options in the README are those of the command line."""
    from typer.main import get_command

    from compactmlip.cli import app

    commands = get_command(app).commands  # type: ignore[attr-defined]
    for line in block.text.replace("&&", "\n").splitlines():
        words = line.split()
        if words[:1] != ["compactmlip"]:
            continue
        assert words[1] in commands, line
        options = {o for p in commands[words[1]].params for o in (*p.opts, *p.secondary_opts)}
        used = {w.partition("=")[0] for w in words[2:] if w.startswith("-")}
        assert used <= options, f"{line}: unknown options {used - options}"


@pytest.mark.parametrize(
    "block", [b for b in BLOCKS if b.language == "python"], ids=lambda b: f"line-{b.line}"
)
def test_python_compiles(block: Block) -> None:
    compile(block.text, f"README.md:{block.line}", "exec")


def test_links_lead_somewhere() -> None:
    targets = [t for t in re.findall(r"\]\(([^)#]+)\)", README) if "://" not in t]
    assert targets
    missing = [t for t in targets if not (ROOT / t).exists()]
    assert not missing


@pytest.fixture(scope="module")
def workdir(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A folder with a copy of the quickstart's results, shared by the blocks."""
    assert QUICKSTART is not None
    source = Path(QUICKSTART)
    assert (source / "model.pt").is_file(), f"{source} is not a finished quickstart folder"
    folder = tmp_path_factory.mktemp("readme")
    shutil.copytree(source, folder / "compactmlip-quickstart")
    yield folder
    shutil.rmtree(folder, ignore_errors=True)


@needs_quickstart
def test_quickstart_leaves_the_files_that_the_readme_names(workdir: Path) -> None:
    table = README.partition("## What quickstart does")[2].partition("\n## ")[0]
    names = re.findall(r"`([\w.]+\.(?:html|json|pt|safetensors|xyz|yaml))`", table)
    assert len(names) >= 12
    assert [n for n in names if not (workdir / "compactmlip-quickstart" / n).is_file()] == []


@needs_quickstart
@needs_browser
def test_report_in_a_browser() -> None:
    """With every section that a real validation fills."""
    assert QUICKSTART is not None
    check(Path(QUICKSTART) / "report.html")


@needs_quickstart
@pytest.mark.timeout(BLOCK_TIMEOUT + 60)
@pytest.mark.parametrize("block", RUNNABLE, ids=lambda b: f"{b.language}-line-{b.line}")
def test_block_runs(block: Block, workdir: Path) -> None:
    """Blocks run in the order of the README; later ones use the files of earlier ones."""
    if block.language == "bash":
        command = ["bash", "-euo", "pipefail", "-c", block.text]
    else:
        command = [sys.executable, "-c", block.text]
    done = subprocess.run(
        command,
        cwd=workdir,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=BLOCK_TIMEOUT,
        check=False,
    )
    tail = (done.stdout + done.stderr)[-3000:]
    assert done.returncode == 0, f"README.md line {block.line} failed:\n{block.text}\n{tail}"
    assert done.stdout.strip(), f"README.md line {block.line} printed nothing"
