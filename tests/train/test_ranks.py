"""Two processes under torchrun give what one gives."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import ranks_job
import torch
from ase.build import bulk, molecule
from torch import nn

from compactmlip import checkpoint
from compactmlip.data.label import label
from compactmlip.spec import ModelSpec
from compactmlip.train.ranks import Ranks, current_ranks, own_device

ROOT = Path(__file__).resolve().parents[2]


def free_port() -> int:
    with socket.socket() as made:
        made.bind(("127.0.0.1", 0))
        return int(made.getsockname()[1])


@pytest.fixture(scope="module")
def folder(
    tmp_path_factory: pytest.TempPathFactory,
    tiny_spec: ModelSpec,
    make_model: Callable[..., nn.Module],
) -> Path:
    """A student, and seven labelled structures, the last one a molecule."""
    path = tmp_path_factory.mktemp("ranks")
    frames = []
    for k in range(6):
        atoms = bulk("MgO", "rocksalt", a=4.21, cubic=k % 2 == 1) * (1 + (k == 4), 1, 1)
        atoms.rattle(0.1, seed=k)
        frames.append(atoms)
    oxygen = molecule("O2")
    oxygen.rattle(0.05, seed=9)
    label([*frames, oxygen], make_model(tiny_spec, seed=3), path / "frames.xyz", hessian=3, progress=False)
    checkpoint.save(make_model(tiny_spec, seed=4), path / "student.safetensors")
    return path


@pytest.fixture(scope="module")
def both(folder: Path) -> list[dict[str, Any]]:
    """What each of two processes found."""
    address = ["--master-addr=127.0.0.1", f"--master-port={free_port()}"]
    launcher = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2", *address]
    paths = os.pathsep.join([str(ROOT), str(ROOT / "tests"), os.environ.get("PYTHONPATH", "")])
    more = {"PYTHONPATH": paths, "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}
    job = [str(ROOT / "tests" / "ranks_job.py"), str(folder)]
    done = subprocess.run(
        [*launcher, *job], env=os.environ | more, capture_output=True, text=True, timeout=600
    )
    assert done.returncode == 0, done.stderr[-4000:]
    return [json.loads((folder / f"rank-{k}.json").read_text()) for k in range(2)]


def test_gradients_are_those_of_one_process(folder: Path, both: list[dict[str, Any]]) -> None:
    assert [found["size"] for found in both] == [2, 2]
    for k, expected in enumerate(ranks_job.gradients(folder)):
        largest = max(abs(x) for g in expected["gradient"] if g is not None for x in g)
        assert largest > 1e-3
        for found in both:
            assert found["gradients"][k]["terms"] == pytest.approx(expected["terms"], rel=1e-10)
            for own, other in zip(found["gradients"][k]["gradient"], expected["gradient"], strict=True):
                assert (own is None) == (other is None)
                assert own is None or own == pytest.approx(other, abs=1e-10 * largest)
        assert both[0]["gradients"][k] == both[1]["gradients"][k]


def test_training_is_that_of_one_process(
    folder: Path, both: list[dict[str, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where the second process's time runs faster; it writes nothing."""
    for method in ("save", "write_history"):  # which the job replaces
        monkeypatch.setattr(ranks_job.state.RunFolder, method, getattr(ranks_job.state.RunFolder, method))
    alone = ranks_job.train(folder, "alone")
    assert alone["stopped"] == "the 2 minutes are used" and len(alone["history"]) > 2
    expected = torch.tensor(alone["weights"])
    for found in both:
        training = found["training"]
        assert training["stopped"] == alone["stopped"]
        assert [row["steps"] for row in training["history"]] == [row["steps"] for row in alone["history"]]
        torch.testing.assert_close(torch.tensor(training["weights"]), expected, rtol=1e-6, atol=1e-7)
    assert both[0]["training"]["weights"] == both[1]["training"]["weights"]
    assert both[0]["training"]["written"] == alone["written"] != []
    assert both[1]["training"]["written"] == []


def test_shares_are_even_and_complete() -> None:
    sizes = [8, 1, 1, 7, 4, 4, 2]
    shares = [Ranks(k, 3).share(sizes) for k in range(3)]
    assert sorted(k for share in shares for k in share) == list(range(7))
    assert [sum(sizes[k] for k in share) for share in shares] == [9, 9, 9]
    assert [Ranks(k, 3).share([5]) for k in range(3)] == [[0], [], []]


def test_alone_nothing_is_shared(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    ranks = current_ranks()
    assert (ranks.rank, ranks.size, ranks.first) == (0, 1, True)
    assert ranks.collect({1: "b", 0: "a"}) == {0: "a", 1: "b"} and ranks.from_first(lambda: 3) == 3
    assert own_device("cuda") == "cuda"
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("LOCAL_RANK", "1")
    assert own_device("cuda") == "cuda:1" and own_device("cpu") == "cpu"
