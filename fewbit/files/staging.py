"""Files that appear in a folder all at once or not at all.

Everything is written under a temporary name (`.NAME.partial`), synced, and renamed at the end in a given
order. A failure removes what was written; a kill leaves only names that no reader opens.
"""

import errno
import hashlib
import os
import shutil
from abc import ABC, abstractmethod
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import NoReturn, Self

import torch

from fewbit.errors import CapacityError, CheckpointError
from fewbit.files.disk import CHUNK, reason

ASK = "overwrite it (overwrite=True, --overwrite)"
_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


NONE = -1  # the number of a file that is not open


@dataclass(frozen=True, slots=True)
class Place:
    """Where a declared tensor goes, and what it must be in memory."""

    file: str
    start: int
    nbytes: int
    dtype: torch.dtype
    shape: tuple[int, ...]


class Staging:
    """The temporary files of one write into `folder`."""

    def __init__(self, folder: Path):
        self.folder = folder
        self._fds: dict[str, int] = {}
        self._published: list[Path] = []
        self._made = not folder.exists()
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as e:
            raise_write_error(folder, e)

    def partial(self, name: str) -> Path:
        return self.folder / f".{name}.partial"

    def create(self, name: str) -> None:
        self._fds[name] = NONE  # an interrupt may come between opening a file and keeping its number
        try:
            self.partial(name).unlink(missing_ok=True)  # what a kill left may be a link to a file that is to stay
            self._fds[name] = os.open(self.partial(name), os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o644)
        except OSError as e:
            self.fail(name, e)

    def adopt(self, name: str, path: Path) -> None:
        """A finished, synced file of the same volume under another name; a copy where it has no links."""
        partial = self.partial(name)
        self._fds[name] = NONE
        try:
            partial.unlink(missing_ok=True)
            try:
                os.link(path, partial)
            except OSError:
                shutil.copyfile(path, partial)
            self._fds[name] = os.open(partial, os.O_RDWR | os.O_CLOEXEC)
            os.fsync(self._fds[name])
        except OSError as e:
            self.fail(name, e)

    def write(self, name: str, start: int, data: bytes | memoryview) -> None:
        view, done = memoryview(data), 0
        try:
            while done < len(view):
                done += os.pwrite(self._fds[name], view[done : done + CHUNK], start + done)
        except OSError as e:
            self.fail(name, e)

    def put(self, name: str, data: bytes) -> None:
        self.create(name)
        self.write(name, 0, data)

    def seal(self, name: str) -> dict[str, str | int]:
        """Sync the file and read it back for its manifest entry."""
        digest, size = hashlib.sha256(), 0
        try:
            os.fsync(self._fds[name])
            while piece := os.pread(self._fds[name], CHUNK, size):
                digest.update(piece)
                size += len(piece)
        except OSError as e:
            self.fail(name, e)
        return {"sha256": digest.hexdigest(), "bytes": size}

    def check_complete(self, declared: Collection[str], done: Collection[str]) -> None:
        missing = sorted(set(declared) - set(done))
        if missing:
            self.discard()
            raise CheckpointError(f"{self.folder}: {len(missing)} declared tensors were not put, first {missing[0]!r}")

    def publish(self, names: Sequence[str]) -> None:
        """Give the files their names, in this order; the last is the one that makes the others count."""
        try:
            for name in names:
                if name == names[-1]:
                    sync_folder(self.folder)
                os.rename(self.partial(name), self.folder / name)
                self._published.append(self.folder / name)
                os.close(self._fds.pop(name))
            sync_folder(self.folder)
        except OSError as e:
            self.fail(names[-1], e)
        self._published = []

    def remove(self, names: Sequence[str]) -> None:
        """Remove finished files of an earlier write, in this order."""
        try:
            for name in names:
                (self.folder / name).unlink(missing_ok=True)
                sync_folder(self.folder)
        except OSError as e:
            self.fail(names[0], e)

    def discard(self) -> None:
        """Remove everything this write has made, published or not."""
        for name, fd in self._fds.items():
            if fd != NONE:
                os.close(fd)
            self.partial(name).unlink(missing_ok=True)
        for path in reversed(self._published):
            path.unlink(missing_ok=True)
        self._fds, self._published = {}, []
        if self._made and self.folder.is_dir() and not any(self.folder.iterdir()):
            self.folder.rmdir()

    def fail(self, name: str, error: OSError) -> NoReturn:
        self.discard()
        raise_write_error(self.folder / name, error)


class Writer(ABC):
    """What is written into a Staging: close publishes it, an error on the way leaves nothing."""

    _staging: Staging

    @abstractmethod
    def _publish(self) -> None:
        """Check that every tensor was put, then let the files appear."""

    def close(self) -> None:
        try:
            self._publish()
        except BaseException:
            self.abort()
            raise

    def abort(self) -> None:
        """Remove everything written so far."""
        self._staging.discard()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        if kind is None:
            self.close()
        else:
            self.abort()


def sync_folder(folder: Path) -> None:
    """The names in it outlast a loss of power."""
    fd = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def expect(out: Path, name: str, places: Mapping[str, Place], done: Collection[str]) -> Place:
    """The place of a tensor that was declared and not put yet."""
    if name not in places or name in done:
        raise CheckpointError(f"{out}: tensor {name!r} was {'put before' if name in places else 'not declared'}")
    return places[name]


def raise_write_error(path: Path, error: OSError) -> NoReturn:
    if error.errno in _FULL:
        raise CapacityError(f"{path}: cannot write: {reason(error)}; free some space and write again") from error
    raise CheckpointError(f"{path}: cannot write: {reason(error)}") from error
