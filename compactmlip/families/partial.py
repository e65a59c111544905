"""The unfinished file of a download: locked by one process, with a note on where its bytes come from."""

from __future__ import annotations

import fcntl
import json
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

from compactmlip.errors import DownloadError


class Part:
    """``target.part`` and ``target.part.json``, which outlive an interruption.

    Attributes
    ----------
    path
        The file.
    state
        Address, name of the version (validator) and total number of bytes, where the server gave them;
        empty if nothing is known.
    received
        Bytes added by this object.
    resumed
        Whether some bytes are from an earlier attempt than the others, or from an earlier process.
    """

    def __init__(self, path: Path, file: BinaryIO) -> None:
        self.path, self._file = path, file
        self._note = path.with_name(path.name + ".json")
        self.received, self.resumed = 0, self.size > 0
        self.state: dict[str, Any] = {}
        try:
            found = json.loads(self._note.read_text())
            self.state = found if found.keys() == {"url", "validator", "total"} else {}
        except (OSError, ValueError, AttributeError):
            pass  # no note, or one that was cut off: nothing is known about the part

    @property
    def size(self) -> int:
        """Bytes so far."""
        return os.fstat(self._file.fileno()).st_size

    def is_complete(self, url: str) -> bool:
        """Whether all bytes are here (and only the renaming is missing)."""
        return bool(self.size) and self.state.get("url") == url and self.size == self.state["total"]

    def can_resume(self, url: str) -> bool:
        """Whether the server can be asked for the rest."""
        return bool(self.size) and self.state.get("url") == url and self.state["validator"] is not None

    def begin(self, url: str, validator: str | None, total: int | None) -> None:
        """Forget what is here and note what will come."""
        self.clear()
        self.state = {"url": url, "validator": validator, "total": total}
        with disk(self._note):
            self._note.write_text(json.dumps(self.state))

    def append(self, block: bytes) -> None:
        """Add bytes at the end."""
        view = memoryview(block)
        with disk(self.path):
            while view:
                view = view[self._file.write(view) :]
        self.received += len(block)

    def clear(self) -> None:
        """Drop what is here."""
        with disk(self.path):
            self._file.truncate(0)
            self._note.unlink(missing_ok=True)
        self.state, self.resumed = {}, False

    def publish(self, target: Path) -> None:
        """Give the complete file its name."""
        with disk(target):
            os.fsync(self._file.fileno())
            self._note.unlink(missing_ok=True)
            self.path.replace(target)


@contextmanager
def locked_part(target: Path, progress: bool) -> Iterator[Part]:
    """Open ``target.part`` for this process alone; an empty one is removed in the end."""
    path = target.with_name(target.name + ".part")
    while True:
        with disk(path):
            file = path.open("ab", buffering=0)
        with file:
            _lock(file, target, progress)
            if not _is_at(file, path):  # the process that held the lock has renamed or removed it
                continue
            try:
                yield Part(path, file)
            finally:
                if _is_at(file, path) and not os.fstat(file.fileno()).st_size:
                    path.with_name(path.name + ".json").unlink(missing_ok=True)
                    path.unlink()  # last: whoever opens the name anew has a lock of its own
            return


def _lock(file: BinaryIO, target: Path, progress: bool) -> None:
    try:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            if progress:
                print(f"waiting for another process that downloads {target.name}", file=sys.stderr)
            fcntl.flock(file, fcntl.LOCK_EX)
    except OSError as error:
        raise DownloadError(
            f"{target.parent} does not allow locks ({error.strerror}). Set XDG_CACHE_HOME to a local folder."
        ) from error


def _is_at(file: BinaryIO, path: Path) -> bool:
    """Whether the open file is still the one of this name; others may rename it at any time."""
    try:
        return os.path.samestat(os.fstat(file.fileno()), path.stat())
    except FileNotFoundError:
        return False


@contextmanager
def disk(path: Path) -> Iterator[None]:
    """Errors of the file system, told apart from those of the network."""
    try:
        yield
    except OSError as error:
        raise DownloadError(
            f"cannot write {path}: {error.strerror or error}. Make room, or set XDG_CACHE_HOME."
        ) from error
