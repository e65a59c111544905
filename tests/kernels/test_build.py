"""Building on first use: cache, lock, damage, compilers that are missing or fail."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch

from compactmlip.errors import InputError, KernelError
from compactmlip.kernels import build as building, compiler as compiling
from compactmlip.kernels.build import build, usable, without_kernels

SOURCE = 'extern "C" int compactmlip_answer() { return 42; }\n'


@pytest.fixture
def source(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A source that compiles at once, instead of the package's; the cache is empty."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.delenv("CXX", raising=False)
    path = tmp_path / "tiny.cpp"
    path.write_text(SOURCE)
    monkeypatch.setattr(building, "sources", lambda: [path])
    try:
        compiling.find_compiler()
    except KernelError as error:
        pytest.skip(str(error))
    return path


@pytest.fixture
def wrapper(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], Path]:
    """``wrapper(lines)``: a compiler that runs these lines of shell before g++; returns its log of calls."""

    def make(lines: str = "") -> Path:
        script, log = tmp_path / "wrapped-g++", tmp_path / "calls"
        script.write_text(f'#!/bin/sh\necho "$@" >> {log}\n{lines}\nexec g++ "$@"\n')
        script.chmod(0o755)
        monkeypatch.setenv("CXX", str(script))
        return log

    return make


def compilations(log: Path) -> int:
    return sum(" -c " in line for line in log.read_text().splitlines())


def test_second_build_is_the_first_one(source: Path, wrapper: Callable[..., Path]) -> None:
    log = wrapper()
    first, second = build(), build()
    assert first.built and not second.built
    assert first.path == second.path and first.path.is_file()
    assert first.path.is_relative_to(source.parent / "cache" / "compactmlip" / "kernels")
    assert "-O3" in first.flags and "wrapped-g++" in first.compiler
    assert compilations(log) == 1
    assert build(force=True).built and compilations(log) == 2
    leftovers = {p.name for p in first.path.parent.parent.iterdir()} - {"lock", first.path.parent.name}
    assert not leftovers
    torch.ops.load_library(str(first.path))


def test_new_sources_compiler_and_processor_are_told_apart(
    source: Path, wrapper: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    paths = [build().path]
    wrapper()
    paths.append(build().path)
    source.write_text(SOURCE + "// changed\n")
    paths.append(build().path)
    monkeypatch.setattr(building, "processor", lambda: "another one")
    paths.append(build().path)
    monkeypatch.setattr(building, "torch_version", lambda: "torch 99")
    paths.append(build().path)
    assert len(set(paths)) == 5 and all(p.is_file() for p in paths)


@pytest.mark.parametrize("damage", ["cut", "changed", "note"])
def test_damaged_library_is_built_again(source: Path, damage: str) -> None:
    path = build().path
    content = path.read_bytes()
    if damage == "cut":
        path.write_bytes(content[: len(content) // 2])
    elif damage == "changed":
        path.write_bytes(content[:5000] + b"\xff" * 16 + content[5016:])
    else:
        path.with_name(building.NOTE).write_text("{")
    again = build()
    assert again.built and again.path == path
    assert not build().built


def test_one_of_many_builds(source: Path, wrapper: Callable[..., Path]) -> None:
    log = wrapper("sleep 0.2")
    with ThreadPoolExecutor(4) as pool:
        reports = list(pool.map(lambda _: build(), range(4)))
    assert sum(r.built for r in reports) == 1
    assert len({r.path for r in reports}) == 1
    assert compilations(log) == 1


def test_compiler_errors_are_shown_and_remembered(
    source: Path, wrapper: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    log = wrapper()
    source.write_text("int x = y;\nint z = w;\n")
    with pytest.raises(KernelError, match="tiny.cpp: .* failed with status 1") as failure:
        build(retry=False)
    lines = str(failure.value).splitlines()
    assert len(lines) == 3 and "'y' was not declared" in lines[1] and "'w' was not declared" in lines[2]
    with pytest.raises(KernelError, match="an earlier build failed"):
        build(retry=False)
    assert compilations(log) == 1
    with pytest.raises(KernelError, match="failed with status 1"):
        build()
    assert compilations(log) == 2
    source.write_text(SOURCE)
    assert build(retry=False).built


def test_many_errors_are_cut() -> None:
    output = "\n".join(f"a.cpp:{k}:1: error: no {k}" for k in range(20))
    shown = compiling.first_errors(f"a.cpp: In function\n{output}").splitlines()
    assert len(shown) == compiling.MAX_LINES + 1
    assert shown[0] == "  a.cpp:0:1: error: no 0" and "14 more" in shown[-1]
    assert compiling.first_errors("killed\n") == "  killed"


def test_compiler_without_march_native(source: Path, wrapper: Callable[..., Path]) -> None:
    wrapper('case "$*" in *march=native*) echo "error: no such flag" >&2; exit 1;; esac')
    report = build()
    assert report.built and "march" not in report.flags


def test_compiler_is_missing(source: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CXX", "no-such-compiler")
    with pytest.raises(KernelError, match="compiler 'no-such-compiler'; install .*, or set CXX"):
        build()
    monkeypatch.delenv("CXX")
    made = build().path
    monkeypatch.setenv("CXX", "no-such-compiler")  # as on a node of a cluster that shares the folder
    assert build().path == made and not build().built


def test_cache_cannot_be_written(source: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(source))  # a file, not a folder
    with pytest.raises(KernelError, match="XDG_CACHE_HOME"):
        build()


def test_old_libraries_are_forgotten(source: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(building, "KEPT", 2)
    paths = []
    for k in range(4):
        source.write_text(f"{SOURCE}// {k}\n")
        paths.append(build().path)
        os.utime(paths[-1].parent, (k, k))
    assert [p.is_file() for p in paths] == [False, False, True, True]


def test_switches(monkeypatch: pytest.MonkeyPatch) -> None:
    x = torch.zeros(1)
    monkeypatch.setattr(building, "load", lambda: True)
    assert usable(x) and usable(x, x.double())
    assert not usable(x.to(torch.bfloat16)) and not usable(x, torch.zeros(1, device="meta"))
    with without_kernels():
        assert not usable(x)
        with without_kernels():
            assert not usable(x)
        assert not usable(x)
    assert usable(x)
    monkeypatch.setenv(building.VARIABLE, "of")
    with pytest.raises(InputError, match="known values are auto, build, off"):
        building.mode()


RUN = """
import torch
from compactmlip.kernels.ops import convolve
assert not torch.ops.loaded_libraries, "loaded before it was used"
one = torch.ones(1, 1, 1)
for _ in range(2):
    print(float(convolve(2 * one, 3 * one, 4 * one, torch.tensor([0]), torch.tensor([0]), [0])))
print(len(torch.ops.loaded_libraries))
"""


def run(tmp_path: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-W", "error", "-c", RUN],
        capture_output=True,
        text=True,
        check=False,
        env=os.environ | {"XDG_CACHE_HOME": str(tmp_path / "cache"), **environment},
    )


@pytest.mark.parametrize("compiler", ["false", "no-such-compiler"])
def test_without_compiler_models_run_in_plain_torch(tmp_path: Path, compiler: str) -> None:
    done = run(tmp_path, CXX=compiler)
    assert done.stdout.split() == ["24.0", "24.0", "0"], done.stderr
    assert len(done.stderr.splitlines()) == 1
    assert done.stderr.startswith("compactmlip: warning: running without compiled kernels")
    assert compiler in done.stderr and "compactmlip build" in done.stderr
    strict = run(tmp_path, CXX=compiler, COMPACTMLIP_KERNELS="build")
    assert strict.returncode and "KernelError" in strict.stderr
    off = run(tmp_path, CXX=compiler, COMPACTMLIP_KERNELS="off")
    assert off.stdout.split() == ["24.0", "24.0", "0"] and not off.stderr


def test_first_use_says_that_it_builds(tmp_path: Path) -> None:
    """A compiler that fails after it has begun: one line for the build, then the warning."""
    script = tmp_path / "failing-g++"
    script.write_text(
        '#!/bin/sh\ncase "$*" in *--version*) echo "failing 1.0"; exit 0;; esac\n'
        'echo "x.cpp:1:1: error: this compiler always fails" >&2\nexit 1\n'
    )
    script.chmod(0o755)
    done = run(tmp_path, CXX=str(script))
    assert done.stdout.split() == ["24.0", "24.0", "0"], done.stderr
    lines = done.stderr.splitlines()
    assert "building kernels" in lines[0] and "once" in lines[0]
    assert len(lines) == 2 and "warning" in lines[1] and "always fails" in lines[1]
    again = run(tmp_path, CXX=str(script))
    assert "building" not in again.stderr and "an earlier build failed" in again.stderr
