"""Journal: what a long run has finished, on disk with digests, so that the same command goes on where it stopped.

Each finished unit is safetensors files, renamed into place when they are whole, and one line of the journal. The first
line says what the run depends on; a run that depends on something else is refused and told what differs.
"""

import errno
import fcntl
import hashlib
import json
import os
import shutil
import threading
from collections import deque
from collections.abc import Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from fewbit.errors import CapacityError, CheckpointError, RequestError
from fewbit.files.manifest import Entry
from fewbit.files.shard import Part, declared_bytes, filled, write_shard
from fewbit.files.staging import raise_write_error

FOLDER = ".fewbit-quantize"
FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
WRITERS = max(1, min(4, (os.cpu_count() or 1) // 4))  # a core hashes about as fast as a disk writes


class Journal:
    """The work folder of one run. A context: leaving it keeps the folder, `remove` takes it away."""

    def __init__(self, folder: Path, depends: Mapping[str, Any], restart: bool = False):
        self.folder = folder
        self.done: dict[str, dict[str, Any]] = {}
        self._writer = ThreadPoolExecutor(WRITERS)  # the next unit is worked on while these are written and hashed
        self._pending: deque[Future[None]] = deque()
        self._lines = threading.Lock()
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

    def save(self, unit: str, at: int, parts: Mapping[str, Part], notes: Mapping[str, Any], most: int) -> None:
        """Begin to put a finished unit on disk, then to say so; returns when few others are on their way there.

        at: its place among the units. most: bytes of one file.
        """
        self.flush(WRITERS - 1)
        self._pending.append(self._writer.submit(self._save, unit, at, parts, dict(notes), most))

    def flush(self, left: int = 0) -> None:
        """Return when all but that many units are on disk, or raise what kept them from there."""
        while len(self._pending) > left:
            self._pending.popleft().result()

    def _save(self, unit: str, at: int, parts: Mapping[str, Part], notes: dict[str, Any], most: int) -> None:
        files: dict[str, Entry] = {}
        sizes = {name: declared_bytes(name, part.dtype, part.shape) for name, part in parts.items()}
        for i, names in enumerate(filled(sizes, most)):
            name = f"{at:05d}-{i:03d}.safetensors"
            try:
                files[name] = write_shard(self.folder / name, {n: parts[n] for n in names})
            except OSError as error:
                if error.errno in FULL:
                    text = f"{self.folder}: no space for {sum(sizes[n] for n in names)} bytes; free some"
                    raise CapacityError(f"{text}, and the same command goes on here") from error
                raise_write_error(self.folder / name, error)
        line = {"unit": unit, "files": files, "notes": notes}
        with self._lines:
            self._append(line)
            self.done[unit] = line

    def check(self) -> None:
        """Every finished file is what was written."""
        for name, entry in ((name, e) for line in self.done.values() for name, e in line["files"].items()):
            path = self.folder / name
            try:
                with path.open("rb") as file:
                    found = hashlib.file_digest(file, "sha256").hexdigest()
            except OSError as error:
                raise CheckpointError(f"{path}: cannot be read: {error.strerror}; --restart begins anew") from None
            if found != entry["sha256"]:
                raise CheckpointError(f"{path}: its digest is not the journal's; --restart begins anew")

    def files(self, unit: str) -> dict[Path, Entry]:
        """The files of a finished unit."""
        return {self.folder / name: entry for name, entry in self.done[unit]["files"].items()}

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
    pairs = {key: _apart(found.get(key), asked.get(key)) for key in differing}
    lines = [f"  - {key}: begun with {_short(old)}, now {_short(new)}" for key, (old, new) in pairs.items()]
    head = f"{folder}: holds an unfinished run that depends on something else:"
    return "\n".join([head, *lines, "Go on with what it was begun with, or begin anew with --restart."])


def _apart(old: Any, new: Any) -> tuple[Any, Any]:
    """Of two mappings what is not in both, or else the line would be cut off before it."""
    if not isinstance(old, dict) or not isinstance(new, dict):
        return old, new
    one, two = ({k: v for k, v in a.items() if b.get(k) != v} for a, b in ((old, new), (new, old)))
    return one, two


def _short(value: Any) -> str:
    text = value.strip().replace("\n", ", ") if isinstance(value, str) else json.dumps(value)
    return text if len(text) < 160 else text[:157] + "..."
