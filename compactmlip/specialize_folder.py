"""The folder of a run of :func:`compactmlip.specialize.specialize`."""

from __future__ import annotations

import hashlib
import json
import resource
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import yaml
from ase import Atoms

from compactmlip import checkpoint
from compactmlip.data.label import update_with_structures
from compactmlip.errors import InputError
from compactmlip.specialize_options import SpecializeOptions


class Folder:
    """The output folder: which steps are done and how long they took."""

    def __init__(self, path: Path, options: SpecializeOptions, structures: Sequence[Atoms]) -> None:
        self.path = path
        resolved = options.model_dump(mode="json")
        digest = hashlib.sha256()
        update_with_structures(digest, structures)
        # Accepting a licence changes no result; it is asked for once, before the teacher is imported.
        results = {key: value for key, value in resolved.items() if key != "accept_licence"}
        identity = json.dumps([results, digest.hexdigest()], sort_keys=True)
        self.identity = hashlib.sha256(identity.encode()).hexdigest()
        self.record: dict[str, Any] = {"identity": self.identity, "seconds": {}, "results": {}}
        path.mkdir(parents=True, exist_ok=True)
        state = self / "state.json"
        if state.is_file():
            found = json.loads(state.read_text())
            same = found.get("identity") == self.identity
            # A run that finished no step, as one with a wrong option, leaves nothing to protect.
            if not same and found.get("results"):
                raise InputError(
                    f"{path} holds a run with other options or structures (see {path / 'config.yaml'}); "
                    "give another folder with -o, or delete this one."
                )
            self.record = found if same else self.record
        text = yaml.safe_dump(resolved, sort_keys=False)
        checkpoint.atomic_write_text(self / "config.yaml", text)

    def __truediv__(self, name: str) -> Path:
        return self.path / name

    @property
    def seconds(self) -> float:
        """Time spent so far, over all parts of the run."""
        return float(sum(self.record["seconds"].values()))

    def step(self, name: str, run: Callable[[], dict[str, Any] | None]) -> dict[str, Any]:
        """Run a step unless it is done; time that an interrupted attempt took counts too."""
        if name not in self.record["results"]:
            begin = time.monotonic()
            try:
                self.record["results"][name] = run() or {}
            finally:
                spent = self.record["seconds"].get(name, 0.0) + time.monotonic() - begin
                self.record["seconds"][name] = spent
                self.record["peak_memory_GB"] = max(self.record.get("peak_memory_GB", 0.0), _peak_memory())
                text = json.dumps(self.record, indent=1)
                checkpoint.atomic_write_text(self / "state.json", text)
        result: dict[str, Any] = self.record["results"][name]
        return result


def _peak_memory() -> float:
    """Largest resident memory of this process so far, in GB (Linux counts it in kB)."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6
