"""Folders, bare files and what surrounds the weights."""

import json
import sys
from pathlib import Path

import pytest
import torch

from fewbit.errors import CheckpointError
from fewbit.files.checkpoint import open_checkpoint
from tests.hostile.generators import BOTH, CONFIG, FIRST, FULL, GOOD, SECOND, file, folder, part, shard, sharded, split

FIXTURES = Path(__file__).parents[3] / "shared" / "fixtures"
FOLDERS = sorted(p.parent for p in FIXTURES.glob("*/meta.json"))


@pytest.mark.skipif(not FOLDERS, reason="the shared fixtures are not beside the repository")
def test_fixtures() -> None:
    for path in FOLDERS:
        with open_checkpoint(path) as checkpoint:
            assert checkpoint.tensors and not checkpoint.unindexed, path
            assert [p.name for p in checkpoint.files] != ["reference.safetensors"], path
            assert bool(checkpoint.config) != bool(checkpoint.gguf), path


def test_single_file_folder(tmp_path: Path) -> None:
    extra = {"quantize_config__json": {"bits": 4}, "generation_config__json": {"a": 1}, "tokenizer__json": b"not read"}
    with open_checkpoint(folder(GOOD, **extra)(tmp_path)) as checkpoint:
        assert checkpoint.config == CONFIG
        assert checkpoint.extra == {"quantize_config.json": {"bits": 4}}
        assert checkpoint.index is None and checkpoint.gguf is None and checkpoint.remote_code == []
        assert checkpoint.files == [tmp_path / "model.safetensors"]
        out = torch.ones(2, 2)
        checkpoint.read_into("w", out)
        assert torch.equal(out, checkpoint.read("w")) and not out.any()
        with pytest.raises(CheckpointError, match="no tensor 'v'"):
            checkpoint.read("v")


def test_shards_and_what_the_index_leaves_out(tmp_path: Path) -> None:
    make = sharded(BOTH, {FIRST: shard("a", "c"), SECOND: shard("b")})
    with open_checkpoint(make(tmp_path)) as checkpoint:
        assert checkpoint.index == BOTH
        assert {name: info.file.name for name, info in checkpoint.tensors.items()} == BOTH
        assert list(checkpoint.unindexed) == ["c"] and checkpoint.read("c").shape == (4,)


def test_bare_files(tmp_path: Path) -> None:
    with open_checkpoint(folder(GOOD)(tmp_path / "s") / "model.safetensors") as checkpoint:
        assert checkpoint.config == {} and list(checkpoint.tensors) == ["w"]
    with open_checkpoint(str(file(FULL, "any.gguf")(tmp_path / "g"))) as checkpoint:
        assert checkpoint.gguf is not None and checkpoint.gguf.kv["x"] == ["a", "bc"]
        assert checkpoint.tensors["b"].dtype == "Q8_0" and checkpoint.tensors["a"].shape == (2, 4)
        assert checkpoint.read("b").shape == (34,)
        out = torch.zeros(34, dtype=torch.uint8)
        checkpoint.read_into("b", out)


def test_folders_with_one_gguf_set(tmp_path: Path) -> None:
    split((part(0, 2), ["a"]), (part(1, 2), ["b"]))(tmp_path)
    (tmp_path / "reference.safetensors").write_bytes(GOOD)
    with open_checkpoint(tmp_path) as checkpoint:
        assert list(checkpoint.tensors) == ["a", "b"] and len(checkpoint.files) == 2
    (tmp_path / "other.gguf").write_bytes(FULL)
    with pytest.raises(CheckpointError, match=r"several models: m-00001-of-00002\.gguf, other\.gguf"):
        open_checkpoint(tmp_path)


def test_other_names_of_one_file(tmp_path: Path) -> None:
    folder(None)(tmp_path)
    (tmp_path / "gptq_model-4bit-128g.safetensors").write_bytes(GOOD)
    with open_checkpoint(tmp_path) as checkpoint:
        assert list(checkpoint.tensors) == ["w"]
    (tmp_path / "other.safetensors").write_bytes(GOOD)
    with pytest.raises(CheckpointError, match="several models"):
        open_checkpoint(tmp_path)


def test_links_of_a_hub_cache_stay_inside_it(tmp_path: Path) -> None:
    repository = tmp_path / "models--org--name"
    snapshot, blobs = repository / "snapshots" / "abc", repository / "blobs"
    folder(GOOD)(snapshot)
    blobs.mkdir()
    for name in ("config.json", "model.safetensors"):
        (snapshot / name).rename(blobs / name)
        (snapshot / name).symlink_to(Path("../../blobs") / name)
    with open_checkpoint(snapshot) as checkpoint:
        assert list(checkpoint.tensors) == ["w"]
    (tmp_path / "outside").write_bytes(GOOD)
    (snapshot / "model.safetensors").unlink()
    (snapshot / "model.safetensors").symlink_to(tmp_path / "outside")
    with pytest.raises(CheckpointError, match="leaves the folder"):
        open_checkpoint(snapshot)


def test_remote_code_is_listed_and_never_imported(tmp_path: Path) -> None:
    code = f"import pathlib; pathlib.Path({str(tmp_path / 'ran')!r}).touch()"
    make = folder(
        GOOD,
        config__json=CONFIG | {"auto_map": {"AutoModel": "modeling_evil.Evil"}},
        tokenizer_config__json={"auto_map": {"AutoTokenizer": ["tokenization_evil.Evil", None]}},
        modeling_evil__py=code.encode(),
        tokenization_evil__py=code.encode(),
    )
    with open_checkpoint(make(tmp_path / "m")) as checkpoint:
        assert [line.split(" = ")[0] for line in checkpoint.remote_code] == [
            "config.json: AutoModel",
            "tokenizer_config.json: AutoTokenizer",
        ]
    assert not (tmp_path / "ran").exists() and not any("evil" in name for name in sys.modules)


def test_no_fallback_to_a_pickle(tmp_path: Path) -> None:
    make = folder(GOOD[:-1], pytorch_model__bin=b"\x80\x02.")
    with pytest.raises(CheckpointError, match=r"model\.safetensors"):
        open_checkpoint(make(tmp_path))
    with pytest.raises(CheckpointError, match="pickle"):
        open_checkpoint(tmp_path / "pytorch_model.bin")
    with pytest.raises(CheckpointError, match="nothing else is read"):
        open_checkpoint(tmp_path / "config.json")


def test_index_of_one_file(tmp_path: Path) -> None:
    folder(GOOD)(tmp_path)
    index = {"weight_map": {"w": "model.safetensors"}}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    with open_checkpoint(tmp_path) as checkpoint:
        assert checkpoint.index == index["weight_map"]
