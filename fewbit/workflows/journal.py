"""Journal: what a long run has finished, on disk with digests, so that the same command goes on where it stopped.

Each finished unit is one safetensors file, renamed into place when it is whole, and one line of the journal. The first
line says what the run depends on; a run that depends on something else is refused and told what differs.
"""

import errno
import fcntl
import hashlib
import json
import os
import shutil
from collections.abc import Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from safetensors.torch import save
from torch import Tensor

from fewbit.errors import CapacityError, CheckpointError, RequestError
from fewbit.files.safetensors import open_safetensors
from fewbit.files.staging import raise_write_error

FOLDER = ".fewbit-quantize"
FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


class Journal:
    """The work folder of one run. A context: leaving it keeps the folder, `remove` takes it away."""

    def __init__(self, folder: Path, depends: Mapping[str, Any], restart: bool = False):
        self.folder = folder
        self.done: dict[str, dict[str, Any]] = {}
        self._writer = ThreadPoolExecutor(1)  # the next unit is worked on while one is written and hashed
        self._pending: Future[None] | None = None
        if restart:
            shutil.rmtree(self.folder, ignore_errors=True)
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            self._file = (self.folder / "journal.jsonl").open("a+b")
        except OSError as error:
            raise_write_error(self.folder, error)
        self._lock()
        self._resume(json.loads(json.dumps(depends)))

    def _lock(self) -> None:
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            self._file.close()
            raise RequestError(f"{self.folder}: another run is writing here; wait for it, or give another -o") from None

    def _resume(self, depends: dict[str, Any]) -> None:
        self._file.seek(0)
        lines = self._whole(self._file.read())
        if not lines:
            self._append({"depends": depends})
            return
        found = lines[0].get("depends", {})
        if found != depends:
            self.close()
            raise RequestError(_differences(self.folder, found, depends))
        self.done = {line["unit"]: line for line in lines[1:]}

    def _whole(self, raw: bytes) -> list[dict[str, Any]]:
        """The lines that were written to their end; a torn last one is cut off."""
        end = raw.rfind(b"\n") + 1
        if end != len(raw):
            os.ftruncate(self._file.fileno(), end)
        try:
            return [json.loads(line) for line in raw[:end].splitlines()]
        except ValueError as error:
            self.close()
            raise CheckpointError(
                f"{self.folder}/journal.jsonl: not a journal: {error}; --restart begins anew"
            ) from None

    def _append(self, line: Mapping[str, Any]) -> None:
        try:
            os.write(self._file.fileno(), json.dumps(line).encode() + b"\n")
            os.fsync(self._file.fileno())
        except OSError as error:
            raise_write_error(self.folder, error)

    def save(self, unit: str, tensors: Mapping[str, Tensor], notes: Mapping[str, Any]) -> None:
        """Begin to put a finished unit on disk, then to say so; returns when the unit before it is there."""
        # cloned: siblings may hold one and the same tensor, which the library refuses to write
        data = save({name: t.detach().cpu().contiguous().clone() for name, t in tensors.items()})
        self.flush()
        self._pending = self._writer.submit(self._save, unit, data, dict(notes))

    def flush(self) -> None:
        """Return when everything is on disk, or raise what kept it from there."""
        pending, self._pending = self._pending, None
        if pending is not None:
            pending.result()

    def _save(self, unit: str, data: bytes, notes: dict[str, Any]) -> None:
        name = f"{len(self.done):05d}.safetensors"
        partial = self.folder / f"{name}.partial"
        try:
            with partial.open("wb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
            partial.rename(self.folder / name)
        except OSError as error:
            partial.unlink(missing_ok=True)
            if error.errno in FULL:
                text = f"{self.folder}: no space for {len(data)} bytes; free some, and the same command goes on here"
                raise CapacityError(text) from error
            raise_write_error(partial, error)
        line = {"unit": unit, "file": name, "sha256": hashlib.sha256(data).hexdigest(), "notes": notes}
        self._append(line)
        self.done[unit] = line

    def check(self) -> None:
        """Every finished file is what was written."""
        for line in self.done.values():
            path = self.folder / line["file"]
            try:
                with path.open("rb") as file:
                    found = hashlib.file_digest(file, "sha256").hexdigest()
            except OSError as error:
                raise CheckpointError(f"{path}: cannot be read: {error.strerror}; --restart begins anew") from None
            if found != line["sha256"]:
                raise CheckpointError(f"{path}: its digest is not the journal's; --restart begins anew")

    def open(self, unit: str) -> Any:
        """The file of a finished unit: .tensors by name, .read(name)."""
        return open_safetensors(self.folder / self.done[unit]["file"])

    def remove(self) -> None:
        self.close()
        shutil.rmtree(self.folder)

    def close(self) -> None:
        self._writer.shutdown()
        self._file.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.close()


def _differences(folder: Path, found: Mapping[str, Any], asked: Mapping[str, Any]) -> str:
    differing = [key for key in sorted({*found, *asked}) if found.get(key) != asked.get(key)]
    lines = [f"  - {key}: begun with {_short(found.get(key))}, now {_short(asked.get(key))}" for key in differing]
    head = f"{folder}: holds an unfinished run that depends on something else:"
    return "\n".join([head, *lines, "Go on with what it was begun with, or begin anew with --restart."])


def _short(value: Any) -> str:
    text = value.strip().replace("\n", ", ") if isinstance(value, str) else json.dumps(value)
    return text if len(text) < 160 else text[:157] + "..."
