"""The digest manifest of a folder: {file: {"sha256", "bytes"}} for every file a writer has put there."""

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path

from fewbit.errors import CheckpointError
from fewbit.files.disk import CHUNK, DiskFile
from fewbit.files.text import load_json

MANIFEST = "fewbit_manifest.json"

Entry = dict[str, str | int]


def manifest_bytes(entries: Mapping[str, Entry]) -> bytes:
    return (json.dumps(dict(sorted(entries.items())), indent=2) + "\n").encode()


def read_manifest(folder: Path | str) -> dict[str, Entry]:
    path = Path(folder) / MANIFEST
    value = load_json(path, str(path))
    if not isinstance(value, dict):
        raise CheckpointError(f"{path}: is not an object of files")
    for name, entry in value.items():
        if not name or "/" in name or "\0" in name or name in (".", ".."):
            raise CheckpointError(f"{path}: {name!r} is not the plain name of a file")
        if not isinstance(entry, dict) or set(entry) != {"sha256", "bytes"}:
            raise CheckpointError(f"{path}: {name!r}: its entry is not an object of exactly sha256 and bytes")
    return value


def verify_manifest(folder: Path | str) -> list[str]:
    """What differs from the manifest, one line per file; reads every file through."""
    try:
        entries = read_manifest(folder)
    except CheckpointError as e:
        return [str(e)]
    return [problem for name, entry in entries.items() if (problem := _compare(Path(folder) / name, entry))]


def _compare(path: Path, entry: Entry) -> str | None:
    try:
        disk = DiskFile(path)
    except CheckpointError as e:
        return str(e)
    try:
        if disk.size != entry["bytes"]:
            return f"{path}: has {disk.size} bytes, the manifest says {entry['bytes']}"
        found = _sha256(disk)
    except CheckpointError as e:
        return str(e)
    finally:
        disk.close()
    return None if found == entry["sha256"] else f"{path}: sha256 is {found}, the manifest says {entry['sha256']}"


def _sha256(disk: DiskFile) -> str:
    digest = hashlib.sha256()
    for start in range(0, disk.size, CHUNK):
        digest.update(disk.read(start, min(CHUNK, disk.size - start), "contents"))
    return digest.hexdigest()
