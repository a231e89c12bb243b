"""Fused modules on a GPU: kernels against their torch forms, fused models against unfused ones, and under a graph."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fewbit.kernels.input_rounding import Rounding, Wanted, offered
from fewbit.models import fuse, hf, twin
from fewbit.models.fill import settle
from fewbit.models.fuse_place import put_back
from fewbit.modules import glu, norm, residual, rotary
from fewbit.modules.glu import Gating
from fewbit.modules.linear import Linear, Options
from fewbit.modules.merged import merge
from fewbit.quant.formats import FORMATS
from fewbit.quant.qtensor import Quantized
from fewbit.quant.reference import encode
from tests.gpu.causal import CAUSAL

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")]
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
STEP = {torch.float32: 2.0**-19, torch.bfloat16: 2.0**-6, torch.float16: 2.0**-9}  # two roundings, each one off
TYPES = ("llama", "qwen3", "gemma3_text", "phi3")
ROWS = (1, 7, 300)


def random(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to("cuda", dtype)


def near(got: Tensor, want: Tensor, of: float = 1e-6) -> None:
    """of: the size of what is added up, where results can be smaller."""
    assert got.shape == want.shape and got.dtype == want.dtype
    torch.testing.assert_close(got, want, rtol=STEP[want.dtype], atol=max(1e-6, of * STEP[want.dtype]))


@pytest.fixture(autouse=True)
def nan_memory() -> None:
    """What kernels write to was NaN before: an element that is left out shows."""
    held = torch.full((1 << 26,), torch.nan, device="cuda")
    del held


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("times", norm.TIMES)
@pytest.mark.parametrize("centred", [False, True])
def test_norm(times: Any, centred: bool, dtype: torch.dtype) -> None:
    from fewbit.kernels import triton_norm

    form = norm.NormForm(1e-5, times, centred)
    for d in (64, 128, 720, 4096, 8192, 20480):
        w = random(d, dtype=dtype, seed=1)
        for rows in ROWS:
            x = random(rows, d, dtype=dtype) * torch.logspace(-3, 1, rows, device="cuda")[:, None].to(dtype)
            near(triton_norm.norm(x, w, None, 1e-5, times, centred), norm.norm(x, w, None, form), of=4.0 * centred)
    packed, w = random(2, 160, 12, 128, dtype=dtype), random(128, dtype=dtype, seed=1)
    for heads in (packed[:, :, :8], packed[:, :, 8:11].transpose(1, 2)):  # as merged projections hold them
        got = triton_norm.norm(heads, w, None, 1e-5, times, centred)
        near(got, norm.norm(heads, w, None, form), of=4.0 * centred)
        assert got.stride() == (heads + 0).stride()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("times", norm.TIMES)
@pytest.mark.parametrize("centred", [False, True])
def test_add_norm(times: Any, centred: bool, dtype: torch.dtype) -> None:
    """To the bit torch's addition and the kernels of the norms beside it."""
    form = norm.NormForm(1e-5, times, centred)
    for d in (64, 128, 720, 4096, 8192, 20480):
        one, other = (norm.Norm(nn.Parameter(random(d, dtype=dtype, seed=s)), None, form) for s in (1, 2))
        for rows in (*ROWS, 2100 if d <= 128 else 5):
            x, r = random(rows, d, dtype=dtype, seed=3), 3 * random(rows, d, dtype=dtype, seed=4)
            for before, after in ((None, other), (one, None), (one, other)):
                parts = before and before.norm_parts, after and after.norm_parts
                assert residual.kernel().takes_sum(x, r, *parts) == (before is None or dtype != torch.float32)
                total, y = residual.add_normed(x, r, before, after)
                assert torch.equal(total, r + (x if before is None else before(x)))
                assert (y is None) == (after is None) and (after is None or torch.equal(y, after(total)))


GATINGS = [Gating(act, glu.ALPHA.get(act, 1.0)) for act in glu.ACTIVATIONS]
GATINGS += [Gating("quick_gelu", 1.5, limit=3.0, plus=1.0), Gating("silu", limit=3.0), Gating("relu", plus=1.0)]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("by", GATINGS, ids=repr)
def test_glu(by: Gating, dtype: torch.dtype) -> None:
    from fewbit.kernels import triton_glu

    for n in (96, 1000, 14336):
        for rows in ROWS:
            both = 4 * random(1, rows, 2 * n, dtype=dtype)
            for gate, up in (half(both) for half in glu.HALVES.values()):
                got = triton_glu.act_mul(gate, up, by.act, by.alpha, by.limit, by.plus)
                near(got, glu.multiplied(gate, up, by), of=4.0)
    none, one = torch.full((3,), torch.nan, device="cuda", dtype=dtype), torch.ones(3, device="cuda", dtype=dtype)
    for pair in ((none, one), (one, none)):
        assert bool(triton_glu.act_mul(*pair, "quick_gelu", 1.7, 7.0, 1.0).isnan().all())


@pytest.mark.parametrize("rows", [1, 2, 3, 8])
@pytest.mark.parametrize("n", [512, 4100, 14336, 28672])
def test_rows_that_programs_share(n: int, rows: int) -> None:
    """Codes as their reader would make them, time after time: what programs tell one another is used up."""
    from fewbit.kernels import triton_glu
    from fewbit.kernels.triton_quantize import quantize_rows

    how = Rounding("e4m3", 0, False, 448.0, 1.0, False)
    wanted = Wanted(how, codes_only=True)
    pairs = [(3 * random(rows, 2 * n, dtype=torch.bfloat16, seed=i)).chunk(2, -1) for i in range(4)]
    by = ("silu", 1.0, float("inf"), 0.0)
    want = [quantize_rows(triton_glu.act_mul(*pair, *by), how) for pair in pairs]

    def all_of_them() -> list[Any]:
        return [offered(triton_glu.act_mul(*pair, *by, wanted), how) for pair in pairs]

    made = [all_of_them() for _ in range(3)]
    graph = torch.cuda.CUDAGraph()
    torch.cuda.synchronize()
    with torch.cuda.graph(graph):
        recorded = all_of_them()
    for _ in range(20):
        graph.replay()
    for found in (*made, recorded):
        for (codes, scales), (want_codes, want_scales) in zip(found, want, strict=True):
            assert torch.equal(scales, want_scales)
            assert torch.equal(codes.view(torch.uint8), want_codes.view(torch.uint8))
    assert wanted.mail is not None and bool((wanted.mail[:-1] == -1).all())


@pytest.mark.parametrize(("dtype", "tables"), [*((d, d) for d in DTYPES), (torch.bfloat16, torch.float32)], ids=str)
@pytest.mark.parametrize("form", rotary.FORMS, ids=str)
def test_rotary(form: rotary.RotaryForm, dtype: torch.dtype, tables: torch.dtype) -> None:
    from fewbit.kernels import triton_rotary

    for tokens in (1, 5, 700):
        packed = random(2, tokens, 14, 128, dtype=dtype)
        q, k = packed[:, :, :10], packed[:, :, 10:12]
        for heads, width, batch in ((2, 128, 2), (1, 128, 1), (1, 96, 2)):
            given = (q, k) if heads == 2 else (q.transpose(1, 2), k.transpose(1, 2))
            entries = width // 2 if form.table == "short" else width
            cos, sin = (random(batch, tokens, entries, dtype=tables, seed=s) for s in (4, 5))
            assert triton_rotary.takes(*given, cos, sin, width, heads)
            got = rotary.rotate(*given, cos, sin, form, heads)
            for found, x in zip(got, given, strict=True):
                near(found, rotary.turned(x, cos.unsqueeze(heads), sin.unsqueeze(heads), form), of=8.0)
                assert found.stride() == (x + 0).stride()


def models(model_type: str, dtype: torch.dtype) -> tuple[Any, Any, Any]:
    """-> a small model as it is, the same fused, and the report."""
    config = hf.read_config({"model_type": model_type, "num_hidden_layers": 4, "hidden_size": 256, "head_dim": 64,
                             "intermediate_size": 512, "num_attention_heads": 4, "num_key_value_heads": 2,
                             "vocab_size": 512, "pad_token_id": 0, "tie_word_embeddings": False})  # fmt: skip
    made = []
    for _ in range(2):
        state = hf.disk_state(twin.random(config))
        model = hf.build(config, torch.float32, CAUSAL)
        twin.fill(model, twin.Memory(state))
        made.append(model.to("cuda", dtype))
    report = fuse.apply(made[1], fuse.plan(config))
    settle(made[1])
    return made[0], made[1], report


IDS = torch.randint(10, 500, (3, 33), generator=torch.Generator().manual_seed(0))


@torch.inference_mode()
def logits(model: Any, ids: Tensor) -> Tensor:
    found: Tensor = model(input_ids=ids, use_cache=False).logits
    return found


@pytest.mark.parametrize("model_type", TYPES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_same_logits(model_type: str, dtype: torch.dtype) -> None:
    plain, fused, report = models(model_type, dtype)
    assert report.count("norm") and report.count("glu") and report.count("rotary"), str(report)
    ids = IDS.cuda()
    want, got = logits(plain, ids), logits(fused, ids)
    if dtype == torch.float32:
        assert twin.relative(got, want) < 1e-4  # a GPU sums a merged product in another order
        return
    exact = logits(plain.float(), ids)
    ours, theirs = ((x.float() - exact).square().mean().sqrt() for x in (got, want))
    assert ours < 1.2 * theirs + 1e-3, f"from float32: fused {ours:.4f}, unfused {theirs:.4f}"


@pytest.mark.parametrize("model_type", (*TYPES, "gemma2", "olmo2", "cohere2", "granite"))
def test_sums_change_no_bit(model_type: str) -> None:
    """Beside torch's additions and our norms' kernel."""
    _, fused, report = models(model_type, torch.bfloat16)
    assert report.count("sums") == 4
    got = logits(fused, IDS.cuda())
    put_back(fused, ("sums",))
    assert torch.equal(got, logits(fused, IDS.cuda()))


@pytest.mark.parametrize("model_type", TYPES)
def test_graph(model_type: str) -> None:
    _, fused, _ = models(model_type, torch.bfloat16)
    ids = IDS[:2, :9].cuda()
    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        for _ in range(2):
            logits(fused, ids)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.inference_mode(), torch.cuda.graph(graph):
        out = fused(input_ids=ids, use_cache=False).logits
    for seed in (1, 2):
        new = torch.randint(10, 500, ids.shape, generator=torch.Generator().manual_seed(seed)).cuda()
        ids.copy_(new)
        with torch.inference_mode():
            out.fill_(torch.nan)
        graph.replay()
        near(out, logits(fused, new), of=float(out.abs().max()))


@pytest.mark.parametrize("name", ["fp8-tensor", "fp8-channel"])
@pytest.mark.parametrize("apart", [True, False])
def test_a_gate_that_scales_what_it_reads(name: str, apart: bool) -> None:
    """To the bit what the linears give where somebody watches them, who sees them scaled; at few rows and at many."""
    draw = torch.Generator().manual_seed(0)
    form = FORMATS[name]

    def linear(n: int, k: int) -> Linear:
        made = Linear(k, n, None, None)
        made.bind(
            (Quantized(form, encode(torch.randn(n, k, generator=draw) * 0.05, form.weight)),),
            Options(dtype=torch.bfloat16),
        )
        return made

    mlp = nn.Module()
    gates = merge([linear(512, 256), linear(512, 256)]) if apart else [linear(1024, 256)]
    for path, part in zip(("gate", "up") if apart else ("gate",), gates, strict=True):
        setattr(mlp, path, part)
    mlp.down = linear(256, 512)
    mlp.cuda()
    how = glu.GluForm(Gating("silu"), "gate", "up" if apart else "", "down")
    seen: list[Tensor] = []
    for rows in (3, 40, 300):
        x = random(1, rows, 256, dtype=torch.bfloat16)
        glu.forward(mlp, how, x)  # the gate hears how its reader rounds
        got = glu.forward(mlp, how, x)
        hook = mlp.gate.register_forward_hook(lambda *given: seen.append(given[-1]))
        assert torch.equal(got, glu.forward(mlp, how, x))
        hook.remove()
    assert [len(y[0]) for y in seen] == [3, 40, 300]
