"""Fakequant over ranks: magnitudes are of the whole model, ranks cut what they hold from them, and texts are the same.

ModelOpt's example calibrates each rank on its shard, so that there a tensor's range depends on how many GPUs there are.
"""

from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

from fewbit import LLM, SamplingParams
from fewbit.cli import app
from fewbit.compat import fakequant
from fewbit.models import emulation
from fewbit.models.build import load
from fewbit.models.shard_proof import Meeting, Simulated, together
from fewbit.models.shard_source import SHARDS
from fewbit.models.shard_take import dense
from fewbit.modules.linear import Linear
from fewbit.served import compared
from tests.compat import small

GREEDY = SamplingParams(max_tokens=24, temperature=0.0, ignore_eos=True)
FP8 = {"fakequant": "FP8_DEFAULT_CFG", "kv_fakequant": "FP8_KV_CFG"}
PRESETS = [FP8, {"fakequant": "NVFP4_DEFAULT_CFG", "kv_fakequant": "NVFP4_KV_CFG"}, {"fakequant": "INT8_DEFAULT_CFG"}]


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Four heads over two of keys: every linear of a layer is cut in two."""
    sizes = {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 32, "max_position_embeddings": 512}
    return small.folder(tmp_path_factory.mktemp("ranks") / "base", **sizes)


@pytest.fixture(autouse=True)
def one_thread() -> Any:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def test_calibrate_writes_the_same_for_any_number_of_ranks(base: Path, tmp_path: Path) -> None:
    files: list[dict[str, bytes]] = []
    for ranks in (1, 2):
        out = tmp_path / str(ranks)
        asked = ["--fakequant", FP8["fakequant"], "--kv-fakequant", FP8["kv_fakequant"], "-o", str(out)]
        small_text = ["--calib-samples", "2", "--calib-len", "64"]
        done = CliRunner().invoke(app, ["calibrate", str(base), *asked, *small_text, "-tp", str(ranks)])
        assert done.exit_code == 0, done.output
        assert ("of the whole model: the same for 2 ranks as for one" in done.output) is (ranks == 2)
        files.append({path.name: path.read_bytes() for path in out.iterdir()})
    assert files[0] == files[1] and {"quant_amax.st", "quant_amax.pth"} < files[0].keys()


def test_ranks_read_the_same_state(base: Path) -> None:
    """As an engine for one or two of them starts; and it is not what a rank would have found in its own part."""
    read: list[bytes] = []
    for ranks in (1, 2):
        asked = {"model": str(base), "tensor_parallel_size": ranks, "calib_size": 2, **FP8}
        with fakequant.prepared(asked) as config:
            assert config.tensor_parallel_size == ranks
            read.append(Path(str(config.emulation)).read_bytes())
            found = emulation.read(str(config.emulation))
    assert read[0] == read[1]
    assert len(found.arrivals) == 14 and all(arrival.weight and arrival.act for arrival in found.arrivals.values())
    model = load(base, dtype="float32")
    cut = [model.get_submodule(p).weight.chunk(2, 1) for p in found.arrivals if p.endswith(("o_proj", "down_proj"))]
    assert len(cut) == 4 and all(float(a.abs().max()) != float(b.abs().max()) for a, b in cut)


def weights(model: Any) -> dict[str, Any]:
    """Linear -> (its rounded weight, the scale of its input)."""
    linears = {path: module for path, module in model.named_modules() if isinstance(module, Linear)}
    parts = {path: module.parts for path, module in linears.items() if module.parts}
    return {path: (torch.cat([p.packed.weight for p in held]), held[0].quantized.act) for path, held in parts.items()}


@pytest.mark.parametrize("preset", PRESETS, ids=lambda preset: preset["fakequant"])
def test_ranks_hold_what_is_cut_from_the_whole(preset: dict[str, str], base: Path, tmp_path: Path) -> None:
    with fakequant.prepared({"model": str(base), "dtype": "float32", "calib_size": 2, **preset}) as config:
        found = emulation.read(str(config.emulation))
    options: dict[str, Any] = {"dtype": torch.float32, "kernels": "emulated"}
    options |= {"format": found.arrivals, "kv": found.sides}
    whole, meeting = load(base, **options), Meeting(2)
    ranks = [load(base, ranks=Simulated(r, 2, meeting), **options) for r in range(2)]
    want = weights(whole)
    for model in ranks:
        cuts, got = getattr(model, SHARDS).cuts, weights(model)
        assert got.keys() == want.keys() and got.keys() <= cuts.keys()
        for path, (weight, scale) in got.items():
            cut = cuts[path]
            assert torch.equal(weight, dense(want[path][0], 0 if cut.kind == "rows" else 1, cut.runs)), path
            whole_scale = want[path][1]
            assert scale.keys() == whole_scale.keys() and scale, path
            assert all(torch.equal(plane, whole_scale[name]) for name, plane in scale.items()), path
    logits = together(ranks, meeting, small.logits)
    assert torch.equal(logits[0], logits[1])
    assert torch.nn.functional.cosine_similarity(logits[0].flatten(), small.logits(whole).flatten(), 0) > 0.999


def texts(model: Path, **options: Any) -> list[list[int]]:
    with LLM(model, dtype="float32", **options) as llm:
        return [list(o.outputs[0].token_ids) for o in llm.generate([row.tolist() for row in small.ids()], GREEDY)]


@pytest.mark.parametrize("preset", PRESETS[:2], ids=lambda preset: preset["fakequant"])
def test_two_ranks_say_what_one_says(preset: dict[str, str], base: Path) -> None:
    """Calibrated as the engine starts."""
    one, two = (texts(base, calib_size=2, tensor_parallel_size=ranks, **preset) for ranks in (1, 2))
    same, _ = compared(one, two)
    assert same > 0.9 * sum(map(len, one)) > compared(one, texts(base))[0]


def test_two_ranks_with_a_file(base: Path, tmp_path: Path) -> None:
    fakequant.calibrate(base, tmp_path / "out", **FP8, text={"data": small.ids()})
    one, two = (texts(tmp_path / "out", amax_file=str(tmp_path / "out"), tensor_parallel_size=n) for n in (1, 2))
    same, _ = compared(one, two)  # a sum of two parts may fall on the other side of a code, late in one text
    assert same > 0.9 * sum(map(len, one)) > compared(one, texts(base))[0]
