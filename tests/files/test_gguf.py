"""The reader agrees with gguf-py on its own files, the fixtures and the table of types."""

import time
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch

from fewbit.errors import CheckpointError
from fewbit.files.gguf import GGML_TYPES, open_gguf
from tests.hostile.generators import FULL, file, part, split
from tests.hostile.raw import strings

FIXTURES = Path(__file__).parents[3] / "shared" / "fixtures"
FILES = sorted(FIXTURES.glob("*/*.gguf"))


def same_as_library(path: Path) -> None:
    theirs = gguf.GGUFReader(path)
    with open_gguf(path) as ours:
        fields = {name: field for name, field in theirs.fields.items() if not name.startswith("GGUF.")}
        assert ours.kv.keys() == fields.keys()
        for name, field in fields.items():
            assert ours.kv[name] == field.contents(), name
        assert list(ours.tensors) == [tensor.name for tensor in theirs.tensors]
        for tensor in theirs.tensors:
            mine = ours.tensors[tensor.name]
            assert (mine.ggml_type, mine.start, mine.nbytes) == (
                tensor.tensor_type,
                tensor.data_offset,
                tensor.n_bytes,
            )
            assert list(mine.shape) == tensor.shape.tolist()[::-1]
            assert ours.read(tensor.name).numpy().tobytes() == tensor.data.tobytes()


def test_type_table() -> None:
    theirs = {int(kind): (kind.name, *sizes) for kind, sizes in gguf.GGML_QUANT_SIZES.items()}
    assert theirs == GGML_TYPES


@pytest.mark.skipif(not FILES, reason="the shared fixtures are not beside the repository")
def test_fixtures() -> None:
    for path in FILES:
        same_as_library(path)


KINDS: dict[str, Any] = {
    "u8": 200,
    "i8": -100,
    "u16": 60000,
    "i16": -30000,
    "u32": 4_000_000_000,
    "i32": -2_000_000_000,
    "u64": 2**63,
    "i64": -(2**62),
    "f32": 0.1,
    "f64": 0.1,
    "bool": True,
    "string": "héllo",
}


def test_every_kind_of_value(tmp_path: Path) -> None:
    names = {"u": "uint", "i": "int", "f": "float"}
    writer = gguf.GGUFWriter(tmp_path / "x.gguf", "llama")
    for kind, value in KINDS.items():
        method = f"add_{names[kind[0]]}{kind[1:]}" if kind[1:].isdigit() else f"add_{kind}"
        getattr(writer, method)(kind, value)
    writer.add_array("array.i32", [1, -2, 3])
    writer.add_array("array.f32", [0.5, 1.5])
    writer.add_array("array.bool", [True, False])
    writer.add_array("array.string", ["a", "", "ß" * 300])
    writer.add_custom_alignment(64)
    writer.add_tensor("f16", np.arange(12, dtype=np.float16).reshape(3, 4))
    writer.add_tensor("q8", np.arange(4 * 34, dtype=np.uint8).reshape(2, 68), raw_dtype=gguf.GGMLQuantizationType.Q8_0)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    same_as_library(tmp_path / "x.gguf")
    with open_gguf(tmp_path / "x.gguf") as ours:
        assert {kind: ours.kinds[kind] for kind in KINDS} == {kind: kind for kind in KINDS}
        assert ours.kinds["array.bool"] == "[bool]" and ours.kv["array.bool"] == [True, False]
        assert ours.alignment == 64 and ours.kv_value("u64", "u64") == 2**63
        assert ours.tensors["q8"].shape == (2, 64) and ours.read("q8").shape == (2, 68)


def test_small_window(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = file(FULL)(tmp_path)
    with open_gguf(path) as whole:
        monkeypatch.setattr("fewbit.files.gguf_header._WINDOW", 3)
        with open_gguf(path) as pieces:
            assert (pieces.kv, pieces.tensors) == (whole.kv, whole.tensors)


def test_split_set_is_one_file(tmp_path: Path) -> None:
    first = split((part(0, 2, 3), ["a", "b"]), (part(1, 2, 3), ["c"]))(tmp_path)
    for path in (first, first.with_name("m-00002-of-00002.gguf")):
        with open_gguf(path) as merged:
            assert list(merged.tensors) == ["a", "b", "c"]
            assert [p.name for p in merged.files] == ["m-00001-of-00002.gguf", "m-00002-of-00002.gguf"]
            assert merged.kv["split.no"] == 0
            assert merged.read("c").shape == (32,)


def test_read_into(tmp_path: Path) -> None:
    with open_gguf(file(FULL)(tmp_path)) as ours:
        stacked = torch.ones(2, 34, dtype=torch.uint8)
        ours.read_into("b", stacked[1])
        assert torch.equal(stacked[1], ours.read("b")) and stacked[0].all()
        with pytest.raises(CheckpointError, match="tensor 'b': has 34 bytes"):
            ours.read_into("b", stacked)
        with pytest.raises(CheckpointError, match="no tensor 'c'"):
            ours.read("c")


def test_large_vocabulary_is_read_within_a_second(tmp_path: Path) -> None:
    from tests.hostile.raw import gguf as raw_gguf

    pieces = [f"piece{i}" for i in range(262_144)]
    path = file(raw_gguf([strings("tokenizer.ggml.tokens", pieces)]))(tmp_path)
    start = time.process_time()
    with open_gguf(path) as ours:
        taken = time.process_time() - start
        assert ours.kv["tokenizer.ggml.tokens"] == pieces
    assert taken < 1
