"""Rules that keep the package easy to change: who may import whom, light start, small files, clean text."""

from __future__ import annotations

import ast
import json
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "compactmlip"

LAYERS: tuple[tuple[str, ...], ...] = (
    ("errors", "spec", "channels", "progress", "config", "cache"),
    ("models", "kernels"),
    ("checkpoint",),
    ("families", "compress", "data", "deploy", "lammps"),
    ("train",),
    ("validate",),
    ("specialize", "specialize_folder", "specialize_options", "finetune", "search", "summary", "info"),
    ("cli_types", "cli_compress", "cli_deploy", "cli_train", "cli"),
)
"""A module imports from its own layer and those above it in this list, never from those below."""

EXCEPTIONS = {"compactmlip.data.graph": 0, "compactmlip.data.neighbors": 0}
"""Modules in another layer than their package: neighbour lists and batches, which models read."""

DEPLOYED = tuple(
    f"compactmlip.deploy.{name}"
    for name in ("ase", "archive", "cuda_graph", "engine", "matmul", "package", "trust")
)
"""What a deployed file needs to run; only these modules may be imported with them."""
DEPLOYED_NEEDS = (
    "compactmlip.errors",
    "compactmlip.spec",
    "compactmlip.cache",
    "compactmlip.data.graph",
    "compactmlip.data.neighbors",
    "compactmlip.kernels",
    *DEPLOYED,
)

UPSTREAM = {"e3nn", "fairchem", "mace", "nequip", "sevenn"}
NAMES_ON_INDEX = {"yaml": "pyyaml", "mace": "mace-torch"}
MAX_LINES = 500


class Import(NamedTuple):
    """One imported name; ``lazy`` if it is imported inside a function, ``typing`` if for annotations only."""

    module: str
    target: str
    line: int
    lazy: bool
    typing: bool


def package_modules() -> dict[str, Path]:
    modules = {}
    for path in sorted(PACKAGE.rglob("*.py")):
        parts = path.relative_to(ROOT).with_suffix("").parts
        modules[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return modules


def imports_of(module: str, tree: ast.AST, is_package: bool, known: set[str]) -> Iterator[Import]:
    """All imports of a module, relative ones resolved, submodules named in ``from package import x``."""

    def visit(node: ast.AST, lazy: bool, typing: bool) -> Iterator[Import]:
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield Import(module, alias.name, node.lineno, lazy, typing)
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                anchor = module.split(".")
                anchor = anchor[: len(anchor) - node.level + is_package]
                base = ".".join([*anchor, base] if base else anchor)
            for alias in node.names:
                submodule = f"{base}.{alias.name}"
                yield Import(module, submodule if submodule in known else base, node.lineno, lazy, typing)
        lazy = lazy or isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            for child in node.body:
                yield from visit(child, lazy, True)
            for child in node.orelse:
                yield from visit(child, lazy, typing)
            return
        for child in ast.iter_child_nodes(node):
            yield from visit(child, lazy, typing)

    return visit(tree, False, False)


MODULES = package_modules()
IMPORTS = [
    found
    for name, path in MODULES.items()
    for found in imports_of(
        name,
        ast.parse(path.read_text(encoding="utf-8")),
        path.name == "__init__.py",
        set(MODULES),
    )
]


def layer_of(module: str) -> int | None:
    """Index in LAYERS; None for the package's own __init__."""
    if module in EXCEPTIONS:
        return EXCEPTIONS[module]
    part = module.split(".")[1:2]
    if not part:
        return None
    for k, names in enumerate(LAYERS):
        if part[0] in names:
            return k
    raise AssertionError(f"{module} has no layer: add '{part[0]}' to LAYERS in {Path(__file__).name}")


def is_within(module: str, packages: tuple[str, ...]) -> bool:
    return any(module == p or module.startswith(p + ".") for p in packages)


def tracked_files() -> list[Path]:
    """Files under version control or about to be; without git, everything that is not a cache."""
    listing = subprocess.run(
        ["git", "ls-files", "-co", "--exclude-standard", "-z"],
        cwd=ROOT,
        capture_output=True,
        check=False,
    )
    if listing.returncode == 0:
        paths = [ROOT / name.decode() for name in listing.stdout.split(b"\0") if name]
    else:
        ignored = re.compile(r"/(\.git|\.\w+_cache|__pycache__|compactmlip-quickstart|build|dist|\.?venv)/")
        paths = [p for p in ROOT.rglob("*") if not ignored.search(p.as_posix())]
    return sorted(p for p in paths if p.is_file())


def text_of(path: Path) -> str | None:
    """Content, or None of a binary file."""
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError:
        return None


def loaded_modules(code: str) -> set[str]:
    """Names in sys.modules after a new interpreter has run ``code``."""
    script = f"{code}\nimport json, sys\nprint('\\n' + json.dumps(sorted(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return set(json.loads(done.stdout.splitlines()[-1]))


def test_the_parser_sees_every_kind_of_import() -> None:
    code = (
        "import a.b\nfrom .sub import x\nfrom . import known\n"
        "if TYPE_CHECKING:\n    from t import T\nelse:\n    import e\n"
        "class C:\n    def f(self):\n        from ..up import y\n"
    )
    found = imports_of("p.q.r", ast.parse(code), False, {"p.q.known"})
    assert [(i.target, i.lazy, i.typing) for i in found] == [
        ("a.b", False, False),
        ("p.q.sub", False, False),
        ("p.q.known", False, False),
        ("t", False, True),
        ("e", False, False),
        ("p.up", True, False),
    ]
    (relative,) = imports_of("p.q", ast.parse("from .r import x"), True, set())
    assert relative.target == "p.q.r"


def test_imports_go_one_way() -> None:
    wrong = []
    for found in IMPORTS:
        if not is_within(found.target, ("compactmlip",)) or found.typing:
            continue
        source, target = layer_of(found.module), layer_of(found.target)
        if source is not None and target is not None and target > source:
            wrong.append(f"{found.module}:{found.line} imports {found.target}")
    assert not wrong, "\n".join(wrong)


def test_no_import_cycles() -> None:
    """Modules can be put in an order in which each imports only earlier ones, when they are loaded."""
    needs: dict[str, set[str]] = {name: set() for name in MODULES}
    for found in IMPORTS:
        if not (found.lazy or found.typing) and found.target in MODULES and found.target != found.module:
            needs[found.module].add(found.target)
    while ready := {name for name, targets in needs.items() if not targets & needs.keys()}:
        needs = {name: targets for name, targets in needs.items() if name not in ready}
    assert not needs, f"these import each other: {sorted(needs)}"


def test_deployed_model_needs_no_training_code() -> None:
    wrong = [
        f"{i.module}:{i.line} imports {i.target}"
        for i in IMPORTS
        if i.module in DEPLOYED
        and is_within(i.target, ("compactmlip",))
        and not is_within(i.target, DEPLOYED_NEEDS)
        and not (i.lazy or i.typing)
    ]
    assert not wrong, "\n".join(wrong)
    loaded = loaded_modules("\n".join(f"import {m}" for m in DEPLOYED))
    for part in ("families", "compress", "train", "validate", "models"):
        assert f"compactmlip.{part}" not in loaded


def test_upstream_packages_only_in_families_and_lazily() -> None:
    wrong = [
        f"{i.module}:{i.line} imports {i.target}"
        for i in IMPORTS
        if i.target.split(".")[0] in UPSTREAM
        and not (is_within(i.module, ("compactmlip.families",)) and i.lazy)
    ]
    assert not wrong, "\n".join(wrong)


def test_third_party_imports_are_declared() -> None:
    """Modules imported at load time are dependencies; lazy imports may also come from an extra."""
    tomllib = pytest.importorskip("tomllib", reason="Python 3.11 reads pyproject.toml")
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]

    def names(requirements: list[str]) -> set[str]:
        return {re.match(r"[\w-]+", r)[0].lower() for r in requirements}  # type: ignore[index]

    required = names(project["dependencies"])
    extras = set().union(*(names(r) for r in project["optional-dependencies"].values()))
    wrong = []
    for found in IMPORTS:
        top = found.target.split(".")[0]
        if top in sys.stdlib_module_names or top == "compactmlip" or found.typing:
            continue
        name = NAMES_ON_INDEX.get(top, top.replace("_", "-"))
        if name not in (required | extras if found.lazy else required):
            wrong.append(f"{found.module}:{found.line} imports {found.target}")
    assert not wrong, "\n".join(wrong)


def test_constraints_pin_every_requirement() -> None:
    tomllib = pytest.importorskip("tomllib", reason="Python 3.11 reads pyproject.toml")
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    extras = project["optional-dependencies"]
    lines = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    pins = [line for line in lines if line and not line.startswith("#")]
    assert [p for p in pins if not re.fullmatch(r"[\w.-]+==[\w.]+", p)] == []
    pinned = {p.partition("==")[0].lower().replace("_", "-") for p in pins}
    wanted = [*project["dependencies"], *(r for e, rs in extras.items() if e != "gpu" for r in rs)]
    names = {re.match(r"[\w-]+", r)[0].lower() for r in wanted} - {"compactmlip"}  # type: ignore[index]
    assert names <= pinned


def test_import_is_light() -> None:
    loaded = loaded_modules("import compactmlip")
    assert "compactmlip" in loaded
    assert loaded.isdisjoint({"torch", "matplotlib", "scipy", "jinja2", "rich", "typer"})


def test_help_does_not_load_torch() -> None:
    """``--help`` of the program and of each command answers at once: nothing heavy is imported for it."""
    code = """
from typer.main import get_command
from typer.testing import CliRunner
from compactmlip.cli import app
commands = list(get_command(app).commands)
assert commands
for words in ([], *([c] for c in commands)):
    result = CliRunner().invoke(app, [*words, "--help"])
    assert result.exit_code == 0, (words, result.output, result.exception)
    assert "Usage" in result.output, words
"""
    loaded = loaded_modules(code)
    assert "compactmlip.cli" in loaded
    assert loaded.isdisjoint({"torch", "matplotlib", "scipy", "ase.calculators.calculator"})


def test_files_are_short() -> None:
    code = {".cpp", ".css", ".h", ".html", ".py"}
    lengths = {
        p.relative_to(ROOT).as_posix(): len(p.read_text(encoding="utf-8").splitlines())
        for p in tracked_files()
        if p.suffix in code
    }
    assert any(name.startswith("compactmlip/") for name in lengths)
    assert {name: n for name, n in lengths.items() if n > MAX_LINES} == {}


FOREIGN = {
    "a path of somebody's machine": re.compile(
        r"(?<![\w.\-/}])/(?:"
        + "|".join(("home", "root", "work", "Users", "tmp/w", "opt/(?:wheels|pypi)"))
        + r")\b/?"
    ),
    "the address of a package registry": re.compile(
        "|".join(
            rf"\b{host}\.{domain}\b"
            for host, domain in (
                ("pypi", "org"),
                ("pythonhosted", "org"),
                ("download\\.pytorch", "org"),
                ("anaconda", "org"),
                ("npmjs", "(?:org|com)"),
                ("proxy\\.golang", "org"),
                ("crates", "io"),
            )
        )
    ),
}


@pytest.mark.parametrize(
    ("text", "kind"),
    [
        ("open('/" + "home/me/x')", "a path of somebody's machine"),
        ("see /" + "work/main", "a path of somebody's machine"),
        ("https://files.pythonhosted" + ".org/x", "the address of a package registry"),
        ("https://pypi" + ".org/simple", "the address of a package registry"),
    ],
)
def test_foreign_text_is_recognised(text: str, kind: str) -> None:
    assert FOREIGN[kind].search(text)
    assert not FOREIGN[kind].search("energy/work per atom, ~/.cache/compactmlip, torch on an index")


def test_no_foreign_text_in_tracked_files() -> None:
    hits = []
    for path in tracked_files():
        text = text_of(path)
        for kind, pattern in FOREIGN.items():
            for match in pattern.finditer(text or ""):
                line = (text or "").count("\n", 0, match.start()) + 1
                hits.append(f"{path.relative_to(ROOT)}:{line}: {match[0]!r} is {kind}")
    assert not hits, "\n".join(hits)
