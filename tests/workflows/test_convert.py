"""convert: codes carry over exactly where they can, and nowhere silently where they cannot."""

import json
import subprocess
import sys
from itertools import permutations
from pathlib import Path
from typing import Any

import pytest
import torch

import fewbit
from fewbit import codecs
from fewbit.errors import CheckpointError, UnsupportedError
from fewbit.quant.reference import decode
from fewbit.workflows import proof
from tests.tiny import llama

# formats that several dialects hold: every pair must carry the codes over
SHARED = {
    "int4-g128": ["gptq", "awq", "compressed-tensors", "gguf"],
    "int4-g128-asym": ["gptq", "awq", "compressed-tensors"],
    "int8-g32": ["gptq", "compressed-tensors", "gguf"],
    "int3-g128": ["gptq", "compressed-tensors"],
    "nvfp4-a16": ["modelopt", "compressed-tensors", "gguf"],
    "fp8-channel": ["modelopt", "compressed-tensors"],
    "fp8-block": ["fp8", "compressed-tensors"],
    "mxfp4-a16": ["compressed-tensors", "gguf"],
    "mxfp8": ["modelopt", "compressed-tensors"],
}
PAIRS = [(form, a, b) for form, dialects in SHARED.items() for a, b in permutations(dialects, 2)]


@pytest.fixture(scope="session")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return llama(tmp_path_factory.mktemp("convert") / "base")


def out_for(folder: Path, dialect: str) -> Path:
    return folder / ("model.gguf" if dialect == "gguf" else dialect)


def weights(path: Path) -> dict[str, torch.Tensor]:
    with codecs.open(path) as source:
        return {name: decode(source.read(name).weight) for name in source.modules}


@pytest.mark.parametrize(("form", "first", "second"), PAIRS)
def test_codes_carry_over(base: Path, tmp_path: Path, form: str, first: str, second: str) -> None:
    a, b = out_for(tmp_path, first), out_for(tmp_path / "to", second)
    b.parent.mkdir()
    fewbit.convert(base, a, first, requantize=form)
    proof = fewbit.convert(a, b, second)
    assert proof.codes_equal and proof.difference <= 2.0**-10
    assert [f for f in fewbit.verify(b) if f.severity == "error"] == []
    before, after = weights(a), weights(b)
    assert before.keys() == after.keys() and len(before) == 14
    for name in before:
        gap = (before[name] - after[name]).abs().max() / before[name].abs().max()
        assert gap <= 2.0**-10, name


def test_other_grid_is_refused_and_nothing_written(base: Path, tmp_path: Path) -> None:
    fewbit.convert(base, tmp_path / "a", "compressed-tensors", requantize="nvfp4-a16")
    with pytest.raises(UnsupportedError, match="requantize"):
        fewbit.convert(tmp_path / "a", tmp_path / "b", "gptq")
    assert not (tmp_path / "b").exists() or not list((tmp_path / "b").iterdir())


def test_requantize_prints_what_it_cost(base: Path, tmp_path: Path) -> None:
    fewbit.convert(base, tmp_path / "a", "compressed-tensors", requantize="nvfp4-a16")
    done = fewbit.convert(tmp_path / "a", tmp_path / "b", "gptq", requantize=True)
    assert not done.codes_equal and all(0 < m.error < 0.2 for m in done.modules)


def test_to_dense_is_what_it_decodes_to(base: Path, tmp_path: Path) -> None:
    fewbit.convert(base, tmp_path / "a", "gptq", requantize="int4-g128")
    fewbit.convert(tmp_path / "a", tmp_path / "b", "dense", dtype="f32")
    want = weights(tmp_path / "a")
    with codecs.open(tmp_path / "b") as source:
        assert source.dialect == "dense"
        for name, weight in want.items():
            assert torch.equal(source.read(f"{name}.weight"), weight)


def test_logits_survive(base: Path, tmp_path: Path) -> None:
    fewbit.convert(base, tmp_path / "a", "awq", requantize="int4-g128-asym")
    fewbit.convert(tmp_path / "a", tmp_path / "b", "dense", dtype="f32")
    ids = torch.arange(24).view(2, 12)
    with torch.inference_mode():
        got, want = (fewbit.load(tmp_path / d, dtype=torch.float32)(ids).logits for d in "ab")
    assert (got - want).norm() / want.norm() < 1e-5


def test_output_that_holds_a_model_is_left_alone(base: Path, tmp_path: Path) -> None:
    target = llama(tmp_path / "a")
    before = (target / "model.safetensors").read_bytes()
    with pytest.raises((CheckpointError, UnsupportedError)):
        fewbit.convert(base, target, "dense")
    assert (target / "model.safetensors").read_bytes() == before


@pytest.mark.parametrize(("to", "words"), [("nonsense", "known"), ("torchao", "known|read")])
def test_unknown_dialect(base: Path, tmp_path: Path, to: str, words: str) -> None:
    with pytest.raises(UnsupportedError, match=words):
        fewbit.convert(base, tmp_path / "x", to)


def test_shards(base: Path, tmp_path: Path) -> None:
    fewbit.convert(base, tmp_path / "a", "compressed-tensors", requantize="int4-g128", max_shard=40_000)
    assert len(list((tmp_path / "a").glob("model-*-of-*.safetensors"))) > 2
    assert [f for f in fewbit.verify(tmp_path / "a") if f.severity == "error"] == []


def test_transformers_reads_what_we_write(base: Path, tmp_path: Path) -> None:
    """The folder, not only the tensors: transformers' own loader of the dialect gives our logits."""
    pytest.importorskip("compressed_tensors.quantization", exc_type=ImportError)
    from transformers import AutoModelForCausalLM

    fewbit.convert(base, tmp_path / "a", "compressed-tensors", requantize="int4-g128")
    ids = torch.arange(24).view(2, 12)
    model: Any = AutoModelForCausalLM.from_pretrained(tmp_path / "a", dtype=torch.bfloat16)
    with torch.inference_mode():
        want = model.eval()(ids).logits.float()
        got = fewbit.load(tmp_path / "a", dtype=torch.float32)(ids).logits
    assert (got - want).norm() / want.norm() < 3e-2  # they compute in bfloat16


def test_killed_or_out_of_disk(tmp_path: Path) -> None:
    """What is left is refused or whole, the old model or the new; the same command says what to do, or works."""
    root = Path(__file__).parents[2]
    command = [sys.executable, "-m", "tests.workflows.crash", str(tmp_path)]
    done = subprocess.run(command, cwd=root, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]
    rows = [json.loads(line) for line in done.stdout.splitlines()]
    for row in rows:
        assert row["end"] in ("killed", "capacity", "done"), row
        whole = {"awq"} if row["end"] == "done" else {"refused", "awq"} | ({"gptq"} if row["overwrite"] else set())
        assert row["found"] in whole and row["after"] == "awq", row
        assert row["again"] == "done" or "--overwrite" in row["again"], row
        assert row["end"] != "capacity" or row["found"] == ("gptq" if row["overwrite"] else "refused"), row
    assert {"killed", "capacity", "done"} == {row["end"] for row in rows}
    assert {"refused", "awq", "gptq"} == {row["found"] for row in rows if row["end"] == "killed"}


def test_how_far_apart_is_found_in_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(proof, "PIECE", 7)
    before = torch.randn(5, 6, generator=torch.Generator().manual_seed(0))
    after = before.bfloat16()
    gap = after.float() - before
    want = float(gap.abs().amax() / before.abs().amax()), float(gap.norm() / before.norm())
    assert proof.apart(before, after) == pytest.approx(want, rel=1e-6)
    assert proof.apart(before * 0, after * 0) == (0.0, 0.0)
    before[0, 1] = after[0, 1] = 0
    rest = proof.apart(before, after)
    before[0, 1] = after[0, 1] = torch.nan  # of both: codes carried over as they are
    assert proof.apart(before, after) == rest
    after[4, 5] = torch.nan
    lost = proof.ModuleProof("m", "f32", "bf16", True, *proof.apart(before, after))
    with pytest.raises(UnsupportedError, match="largest difference nan"):
        proof.refuse_inexact([lost], False)
