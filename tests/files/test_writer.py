"""What the writers put down is read alike by the peers' libraries, whatever the order, and never by halves."""

import json
import os
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import gguf
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from fewbit.errors import CheckpointError
from fewbit.files.checkpoint import open_checkpoint
from fewbit.files.gguf import GGML_IDS, open_gguf
from fewbit.files.manifest import MANIFEST
from fewbit.files.safetensors import DTYPES
from fewbit.files.shard import Part, write_shard
from fewbit.files.staging import Staging
from fewbit.files.writer import GGUFWriter, SafetensorsWriter, read_manifest, verify_manifest
from tests.files.test_gguf import KINDS, same_as_library
from tests.files.test_safetensors import random, same

ROOT = Path(__file__).parents[2]
SHAPE = (4, 8)
LAYOUT = {f"w.{dtype}": (dtype, SHAPE) for dtype in DTYPES} | {"scalar": ("F32", ()), "empty": ("BF16", (0, 3))}


def tensors(layout: Any) -> dict[str, torch.Tensor]:
    torch.manual_seed(0)
    found = {}
    for name, (dtype, shape) in layout.items():
        torch_dtype, bits = DTYPES[dtype]
        packed = (*shape[:-1], shape[-1] * bits // 8) if bits < 8 else shape
        found[name] = random(torch_dtype, *(packed or (1,))).reshape(packed)
    return found


def write(out: Path, order: Any = sorted, **options: Any) -> Path:
    data = tensors(LAYOUT)
    with SafetensorsWriter(out, LAYOUT, **options) as writer:
        writer.add_file("config.json", b'{"a": 1}')
        for name in order(data):
            writer.put(name, data[name])
    return out


@pytest.mark.parametrize("max_shard", [5_000_000_000, 300])
def test_read_back_by_us_and_by_the_library(max_shard: int, tmp_path: Path) -> None:
    out = write(tmp_path / "m", max_shard=max_shard)
    with open_checkpoint(out) as checkpoint:
        assert all(same(checkpoint.read(name), tensor) for name, tensor in tensors(LAYOUT).items())
        assert checkpoint.config == {"a": 1} and not checkpoint.unindexed
        assert len(checkpoint.files) == (1 if max_shard > 300 else 8)
        for path in checkpoint.files:
            with safe_open(path, "pt") as theirs:
                assert theirs.metadata() == {"format": "pt"}
                for name in theirs.keys():  # noqa: SIM118
                    if not name.startswith("w.F6"):
                        mine = checkpoint.read(name)
                        assert (
                            theirs.get_tensor(name)
                            .reshape(-1)
                            .view(torch.uint8)
                            .equal(mine.reshape(-1).view(torch.uint8))
                        )
            plain = [info for info in checkpoint.tensors.values() if info.file == path and info.nbytes]
            assert all(info.start % max(1, DTYPES[info.dtype][1] // 8) == 0 for info in plain)
    assert verify_manifest(out) == []


def test_same_bytes_in_any_order(tmp_path: Path) -> None:
    first = write(tmp_path / "a", max_shard=300)
    second = write(tmp_path / "b", order=lambda names: sorted(names, reverse=True), max_shard=300)
    names = sorted(path.name for path in first.iterdir())
    assert names == sorted(path.name for path in second.iterdir())
    assert all((first / name).read_bytes() == (second / name).read_bytes() for name in names)


def test_finished_files_become_the_shards(tmp_path: Path) -> None:
    """Written once, and still there when the write that takes them in is given up."""
    data, parts = tensors(LAYOUT), tmp_path / "parts"
    parts.mkdir()
    shards = {}
    for i, names in enumerate((list(LAYOUT)[:5], list(LAYOUT)[5:])):
        held = {n: Part(LAYOUT[n][0], LAYOUT[n][1], lambda n=n: data[n]) for n in names}
        shards[parts / f"{i}.safetensors"] = write_shard(parts / f"{i}.safetensors", held)
    with pytest.raises(KeyboardInterrupt), SafetensorsWriter(tmp_path / "m", {}, shards=shards):
        raise KeyboardInterrupt
    assert not (tmp_path / "m").exists() and all(path.exists() for path in shards)
    with SafetensorsWriter(tmp_path / "m", {}, shards=shards) as writer:
        writer.add_file("config.json", b"{}")
    assert verify_manifest(tmp_path / "m") == []
    with open_checkpoint(tmp_path / "m") as checkpoint:
        assert [path.name for path in checkpoint.files] == [f"model-0000{i}-of-00002.safetensors" for i in (1, 2)]
        assert all(same(checkpoint.read(name), tensor) for name, tensor in data.items())
    assert (tmp_path / "m" / checkpoint.files[0].name).stat().st_ino == (parts / "0.safetensors").stat().st_ino
    with pytest.raises(CheckpointError, match="'w' was declared as"):
        write_shard(parts / "bad.safetensors", {"w": Part("F32", (2, 2), lambda: torch.ones(3))})
    assert sorted(path.name for path in parts.iterdir()) == ["0.safetensors", "1.safetensors"]


def test_library_loads_a_plain_folder(tmp_path: Path) -> None:
    data = {"a": torch.randn(3, 4).T, "b": torch.ones(2).bfloat16()}
    with SafetensorsWriter(tmp_path, {"a": ("F32", (4, 3)), "b": ("BF16", (2,))}, metadata={}) as writer:
        for name, tensor in data.items():
            writer.put(name, tensor)
    theirs = load_file(tmp_path / "model.safetensors")
    assert all(same(theirs[name], tensor.contiguous()) for name, tensor in data.items())
    assert theirs.keys() == data.keys()


ONE = {"w": ("F32", (2, 2))}


def refused(words: str, tmp_path: Path, layout: Any = ONE, put: Any = (), files: Any = (), **options: Any) -> None:
    out = tmp_path / "m"
    with pytest.raises(CheckpointError, match=words), SafetensorsWriter(out, layout, **options) as writer:
        for name, tensor in put:
            writer.put(name, tensor)
        for name in files:
            writer.add_file(name, b"{}")
    assert not out.exists()


def test_refusals_leave_nothing(tmp_path: Path) -> None:
    good = ("w", torch.ones(2, 2))
    refused("1 declared tensors were not put, first 'w'", tmp_path)
    refused("'v' was not declared", tmp_path, put=[("v", torch.ones(1))])
    refused("'w' was put before", tmp_path, put=[good, good])
    refused(r"declared as torch.float32 \[2, 2\], put is torch.float32 \[4\]", tmp_path, put=[("w", torch.ones(4))])
    refused("put is torch.float16", tmp_path, put=[("w", torch.ones(2, 2).half())])
    refused("dtype 'F5' is unknown", tmp_path, {"w": ("F5", (2,))})
    refused("F4 packs 4 bits", tmp_path, {"w": ("F4", (3,))})
    refused("dimension -1", tmp_path, {"w": ("F32", (-1,))})
    refused("taken by the metadata", tmp_path, {"__metadata__": ("F32", (1,))})
    refused("empty name", tmp_path, {"": ("F32", (1,))})
    refused("not valid Unicode", tmp_path, {"\ud800": ("F32", (1,))})
    for name in ("../x", "a/b", "", ".hidden", MANIFEST, "model.safetensors", "model.safetensors.index.json", "x.gguf"):
        refused("not a free plain name", tmp_path, put=[good], files=[name])
    refused("'config.json' is not a free", tmp_path, put=[good], files=["config.json", "config.json"])


def test_an_exception_of_the_caller_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt), SafetensorsWriter(tmp_path / "m", ONE) as writer:
        writer.add_file("config.json", b"{}")
        raise KeyboardInterrupt
    assert not (tmp_path / "m").exists()


def test_an_interrupt_while_a_file_is_made_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    staging, real = Staging(tmp_path / "out"), os.open

    def interrupted(*given: Any) -> int:
        os.close(real(*given))
        raise KeyboardInterrupt

    staging.put("a", b"1")
    monkeypatch.setattr(os, "open", interrupted)
    with pytest.raises(KeyboardInterrupt):
        staging.put("b", b"2")
    assert len(list((tmp_path / "out").iterdir())) == 2
    staging.discard()
    assert not (tmp_path / "out").exists()


def test_a_model_in_the_way(tmp_path: Path) -> None:
    out = write(tmp_path / "m", max_shard=300)
    before = {path.name: path.read_bytes() for path in out.iterdir()}
    with pytest.raises(CheckpointError, match="already holds a model"):
        SafetensorsWriter(out, ONE)
    (out / "notes.txt").write_text("mine")
    with SafetensorsWriter(out, ONE, overwrite=True) as writer:
        writer.put("w", torch.ones(2, 2))
        assert all((out / name).read_bytes() == data for name, data in before.items())
        writer.add_file("config.json", b"{}")
    assert sorted(p.name for p in out.iterdir()) == ["config.json", MANIFEST, "model.safetensors", "notes.txt"]
    for way in ("file", "gguf"):
        other = tmp_path / way
        if way == "file":
            other.write_bytes(b"")
        else:
            other.mkdir()
            (other / "model.gguf").write_bytes(b"")
        with pytest.raises(CheckpointError, match=r"not a folder|already holds a model \(model.gguf\)"):
            SafetensorsWriter(other, ONE)


def test_a_config_in_the_way(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("mine")
    with pytest.raises(CheckpointError, match=r"'config.json' exists already"), SafetensorsWriter(tmp_path, ONE) as w:
        w.add_file("config.json", b"{}")
    assert [(p.name, p.read_text()) for p in tmp_path.iterdir()] == [("config.json", "mine")]


def test_the_old_model_stays_until_the_new_one_is_whole(tmp_path: Path) -> None:
    out = write(tmp_path / "m")
    writer = SafetensorsWriter(out, ONE, overwrite=True)
    writer.put("w", torch.ones(2, 2))
    writer.abort()
    assert verify_manifest(out) == []
    with open_checkpoint(out) as checkpoint:
        assert len(checkpoint.tensors) == len(LAYOUT)


def test_nothing_is_lost_by_an_abort_after_close(tmp_path: Path) -> None:
    with SafetensorsWriter(tmp_path, ONE) as writer:
        writer.put("w", torch.ones(2, 2))
    writer.abort()
    assert verify_manifest(tmp_path) == []


def test_manifest_finds_what_changed(tmp_path: Path) -> None:
    out = write(tmp_path / "m")
    assert read_manifest(out).keys() == {"config.json", "model.safetensors"}
    data = bytearray((out / "model.safetensors").read_bytes())
    data[-1] ^= 1
    (out / "model.safetensors").write_bytes(data)
    (out / "config.json").write_bytes(b"{}")
    assert [line.split(": ")[1][:6] for line in verify_manifest(out)] == ["has 2 ", "sha256"]
    (out / "config.json").unlink()
    assert "cannot open" in verify_manifest(out)[0]
    for bad in ({"../x": {"sha256": "", "bytes": 0}}, {"x": {"bytes": 0}}, []):
        (out / MANIFEST).write_text(json.dumps(bad))
        assert len(verify_manifest(out)) == 1
    (out / MANIFEST).unlink()
    assert "cannot open" in verify_manifest(out)[0]


GGUF_KV: dict[str, Any] = {"general.architecture": ("string", "llama"), "general.alignment": ("u32", 64)}
GGUF_KV |= {f"x.{kind}": (kind, value) for kind, value in KINDS.items()}
GGUF_KV |= {f"x.array.{kind}": (f"[{kind}]", [value] * 3) for kind, value in KINDS.items()}
GGUF_LAYOUT = {
    "a": (GGML_IDS["F32"], (3, 5)),
    "b": (GGML_IDS["Q4_K"], (2, 512)),
    "c": (GGML_IDS["NVFP4"], (2, 3, 64)),
    "d": (GGML_IDS["BF16"], (7,)),
}


def write_gguf(path: Path, order: Any = sorted) -> dict[str, torch.Tensor]:
    data = {
        "a": torch.randn(3, 5, generator=torch.Generator().manual_seed(0)),
        "b": torch.arange(2 * 288, dtype=torch.int32).to(torch.uint8).view(2, 288),
        "c": torch.arange(2 * 3 * 36, dtype=torch.int32).to(torch.uint8).view(2, 3, 36),
        "d": torch.ones(7).bfloat16(),
    }
    with GGUFWriter(path, GGUF_KV, GGUF_LAYOUT) as writer:
        for name in order(data):
            writer.put(name, data[name])
    return data


def test_gguf_read_back_by_us_and_by_the_library(tmp_path: Path) -> None:
    path = tmp_path / "m" / "model.gguf"
    data = write_gguf(path)
    same_as_library(path)
    assert gguf.GGUFReader(path).alignment == 64 and path.stat().st_size % 64 == 0
    with open_gguf(path) as file:
        assert file.typed_kv().keys() == GGUF_KV.keys()
        assert all(file.kinds[key] == kind for key, (kind, _) in GGUF_KV.items())
        for name, tensor in data.items():
            assert torch.equal(file.read(name).view(-1), tensor.view(-1).view(torch.uint8))
        copy = tmp_path / "copy.gguf"
        with GGUFWriter(
            copy, file.typed_kv(), {t.name: (t.ggml_type, t.shape) for t in file.tensors.values()}
        ) as writer:
            for name in reversed(file.tensors):
                writer.put(name, file.read(name))
    assert copy.read_bytes() == path.read_bytes()
    assert verify_manifest(tmp_path) == verify_manifest(path.parent) == []


BAD_GGUF: list[tuple[str, Any, Any]] = [
    ("general.alignment 13", {"general.alignment": ("u32", 13)}, {}),
    ("'a': cannot be stored as u8", {"a": ("u8", 256)}, {}),
    ("'a': cannot be stored as u32", {"a": ("u32", "1")}, {}),
    ("'a': cannot be stored as f32", {"a": ("f32", 1e300)}, {}),
    ("'a': cannot be stored as string", {"a": ("string", 1)}, {}),
    ("'a': cannot be stored as string", {"a": ("[string]", ["\ud800"])}, {}),
    ("'a': a bool", {"a": ("bool", 2)}, {}),
    ("'a': kind 'int'", {"a": ("int", 2)}, {}),
    ("empty key", {"": ("u8", 2)}, {}),
    ("tensor type 99 is unknown", {}, {"w": (99, (4,))}),
    ("blocks of 32", {}, {"w": (8, (4, 33))}),
    ("5 dimensions", {}, {"w": (0, (1,) * 5)}),
    ("a name has 1 to 63 bytes", {}, {"w" * 64: (0, (4,))}),
    ("1 declared tensors were not put, first 'w'", {}, {"w": (0, (4,))}),
]


@pytest.mark.parametrize(("words", "kv", "layout"), BAD_GGUF, ids=range(len(BAD_GGUF)))
def test_gguf_refusals_leave_nothing(words: str, kv: Any, layout: Any, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=words), GGUFWriter(tmp_path / "m" / "x.gguf", kv, layout):
        pass
    assert not (tmp_path / "m").exists()


def test_gguf_names_and_neighbours(tmp_path: Path) -> None:
    for name in ("x.bin", "x-00001-of-00002.gguf"):
        with pytest.raises(CheckpointError, match=r"must end in \.gguf"):
            GGUFWriter(tmp_path / name, {}, {})
    for name in ("one.gguf", "two.gguf"):
        GGUFWriter(tmp_path / name, {}, {}).close()
    with pytest.raises(CheckpointError, match="exists already"):
        GGUFWriter(tmp_path / "one.gguf", {}, {})
    assert read_manifest(tmp_path).keys() == {"one.gguf", "two.gguf"} and verify_manifest(tmp_path) == []
    with GGUFWriter(tmp_path / "one.gguf", {}, {"w": (0, (2,))}, overwrite=True) as writer:
        with pytest.raises(CheckpointError, match="has 8 raw bytes"):
            writer.put("w", torch.ones(2).int())
        writer.put("w", torch.ones(2))
    assert verify_manifest(tmp_path) == []


def test_crashes_leave_nothing_that_loads(tmp_path: Path) -> None:
    """SIGKILL before every system call and a full disk at many sizes, for each writer, into new and old folders."""
    command = [sys.executable, "-m", "tests.files.crash", str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, timeout=300)
    assert done.returncode == 0, done.stderr
    rows = [json.loads(line) for line in done.stdout.splitlines()]
    ends = Counter((row["how"], row["end"]) for row in rows)
    assert ends.keys() == {("kill", "killed"), ("kill", "done"), ("full", "capacity"), ("full", "done")}, ends
    assert ends["kill", "killed"] > 100 and ends["full", "capacity"] > 50
    for row in rows:
        if row["end"] == "done":
            assert row["found"] == 2, row
        elif row["end"] == "capacity":
            assert row["clean"] and row["found"] == (1 if row["overwrite"] else "refused"), row
        elif row["overwrite"]:
            assert row["found"] in (1, 2, "refused"), row
        else:
            assert row["found"] in ("refused", 2), row
    whole = [row for row in rows if row["end"] == "killed" and row["found"] == 2]
    assert len(whole) <= 4 * 6, "only what follows the last rename may find the new model"
