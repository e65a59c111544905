"""Measurements in processes of their own: requests and answers over pipes, and memory limits and peaks.

Only the standard library, because the other side may be an environment without compactmlip.
"""

from __future__ import annotations

import contextlib
import json
import os
import resource
import select
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

GB = 1e9

TURN_SECONDS = 0.2
"""What a turn lasts at least."""


class WorkerFailed(Exception):
    """A worker could not do what it was asked; the text says why, briefly."""


def environment(threads: int) -> dict[str, str]:
    """Environment of a worker; the same for upstream and for ours.

    Threads that wait in a busy loop would take time from the other workers on a shared machine.
    """
    count = str(threads)
    fixed = {"OMP_NUM_THREADS": count, "MKL_NUM_THREADS": count, "OPENBLAS_NUM_THREADS": count}
    return {"GOMP_SPINCOUNT": "1000", **os.environ, **fixed}


def peak_memory() -> float:
    """Most bytes that this process has had in memory.

    ``ru_maxrss`` starts with what the parent had when it made this process; the kernel's own record of
    this address space does not.
    """
    with contextlib.suppress(OSError, IndexError, ValueError):
        return 1024.0 * int(Path("/proc/self/status").read_text().split("VmHWM:")[1].split()[0])
    return 1024.0 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def forget_peak_memory() -> None:
    """Let :func:`peak_memory` start again from what is in memory now (Linux)."""
    Path("/proc/self/clear_refs").write_text("5")


def limit_memory(num_bytes: float) -> None:
    """Let allocations beyond this fail with an error, instead of the machine running out of memory."""
    if num_bytes > 0:
        resource.setrlimit(resource.RLIMIT_DATA, (int(num_bytes), int(num_bytes)))


def timed(function: Callable[[], Any]) -> tuple[Any, dict[str, float]]:
    """Result, with the seconds on the clock and of processor time that it took."""
    clock, processor = time.perf_counter(), time.process_time()
    result = function()
    return result, {
        "seconds": time.perf_counter() - clock,
        "processor_seconds": time.process_time() - processor,
    }


def sustained(
    prepare: Callable[[], Callable[[], Any]], seconds: float, least: int = 1
) -> tuple[Any, dict[str, float]]:
    """Last result and median times of as many calls as end within ``seconds``, at least ``least``.

    A single call of some milliseconds after a pause would measure how threads wake up.  What ``prepare`` does
    for each call is not counted.
    """
    found: list[dict[str, float]] = []
    result = None
    while len(found) < least or sum(t["seconds"] for t in found) < seconds:
        result, times = timed(prepare())
        found.append(times)
    return result, {key: statistics.median(t[key] for t in found) for key in found[0]}


def serve(handlers: Mapping[str, Callable[..., dict[str, Any]]]) -> None:
    """Answer requests ``{"do": NAME, ...}``, one JSON object a line, until there are no more."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what a library prints must not be taken for an answer
    for line in sys.stdin:
        request = json.loads(line)
        try:
            answer = handlers[request.pop("do")](**request)
        except (MemoryError, RuntimeError) as error:
            message = str(error) or type(error).__name__
            memory = isinstance(error, MemoryError) or "allocate" in message
            answer = {"error": "too little memory" if memory else message.strip().splitlines()[-1]}
        answers.write(json.dumps(answer) + "\n")
        answers.flush()


class Worker:
    """A process that runs :func:`serve`.

    Parameters
    ----------
    command
        What to start.
    threads
        Threads that it may use.
    """

    def __init__(self, command: Sequence[str], threads: int) -> None:
        self.log = tempfile.TemporaryFile("w+")  # noqa: SIM115
        self.process = subprocess.Popen(
            list(command),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self.log,
            text=True,
            env=environment(threads),
        )

    def ask(self, do: str, timeout: float = 600.0, **options: Any) -> dict[str, Any]:
        """Send a request and wait for its answer; after an error the worker is gone.

        Raises
        ------
        WorkerFailed
            If it answers with an error, not in time, or not at all.
        """
        self.send(do, **options)
        return self.answer(timeout)

    def send(self, do: str, **options: Any) -> None:
        """Send a request without waiting; a worker that has ended is noticed by :meth:`answer`."""
        assert self.process.stdin is not None
        with contextlib.suppress(BrokenPipeError):
            self.process.stdin.write(json.dumps({"do": do, **options}) + "\n")
            self.process.stdin.flush()

    def answer(self, timeout: float = 600.0) -> dict[str, Any]:
        """Wait for the answer to a request; errors as in :meth:`ask`."""
        assert self.process.stdout is not None
        ready, _, _ = select.select([self.process.stdout], [], [], timeout)
        line = self.process.stdout.readline() if ready else None
        if line is None:
            self.close()
            raise WorkerFailed("too slow")
        if not line:
            self.process.wait()
            self.log.seek(0)
            last = (self.log.read().strip().splitlines() or ["no message"])[-1]
            code = self.process.returncode
            self.close()
            raise WorkerFailed(f"ended with code {code}: {last}")
        answer: dict[str, Any] = json.loads(line)
        if "error" in answer:
            self.close()
            raise WorkerFailed(answer["error"])
        return answer

    def close(self) -> None:
        """End the process."""
        self.process.kill()
        self.process.wait()
        for pipe in (self.process.stdin, self.process.stdout, self.log):
            if pipe is not None:
                with contextlib.suppress(BrokenPipeError):
                    pipe.close()

    def __enter__(self) -> Worker:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
