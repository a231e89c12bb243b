"""Grouped experts by Triton's interpreter: rows that only a tensor knows, against the experts one by one."""

from collections.abc import Iterator

import pytest
import torch

from fewbit.kernels import torch_dequant, triton_experts, triton_linear, triton_route
from fewbit.kernels.registry import KERNELS
from fewbit.kernels.triton_linear import Tiling
from fewbit.models.fuse_count import Routed
from fewbit.modules import experts, glu, mixture
from fewbit.modules.experts import ATTRIBUTE, Experts, by_device, by_host
from fewbit.modules.glu import Gating, GluForm
from fewbit.modules.linear import Options, Part
from fewbit.modules.mixture import MixtureForm
from fewbit.quant.formats import FORMATS
from fewbit.quant.qtensor import Quantized, Transform
from fewbit.quant.reference import encode
from tests.modules.test_experts import E, H, Host, M, choices

LACKING = triton_linear.triton_runtime.lacking(torch.device("cpu"))
pytestmark = pytest.mark.skipif(LACKING is not None or torch.cuda.is_available(), reason=str(LACKING))
KERNEL = next(k for k in KERNELS if (k.name, k.op) == ("triton", "experts"))
COUNTS = ([3, 0, 18, 1], [0, 0, 0, 5], [1, 1, 1, 1], [0, 0, 0, 0], [33, 0, 0, 0])


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    for name in ("TILES", "EXACT"):
        monkeypatch.setattr(triton_linear, name, (Tiling(16, 32, 64, 4),))
    torch.use_deterministic_algorithms(True)  # torch.empty gives NaN
    yield
    torch.use_deterministic_algorithms(False)


def stack(name: str, n: int = 40, k: int = 64) -> Quantized:
    w = torch.randn(4, n, k, generator=torch.Generator().manual_seed(1)) / 8
    return Quantized(FORMATS[name], encode(w, FORMATS[name].weight))


@pytest.mark.parametrize("counts", COUNTS)
@pytest.mark.parametrize("over", [0, 2])
def test_plain(counts: list[int], over: int) -> None:
    size = sum(counts)
    x, w = torch.randn(size + over, 72), torch.randn(4, 40, 72)
    want = torch.cat([run @ e.T for run, e in zip(x[:size].split(counts), w, strict=True)])
    for weight, transposed in ((w, False), (w.mT.contiguous(), True)):
        got = triton_experts.run_plain(x, weight, transposed, torch.tensor(counts))
        assert got.shape == (size + over, 40)
        torch.testing.assert_close(got[:size], want, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("name", ["q8_0", "int4-g32-asym", "fp8-tensor", "nvfp4-a16", "int6-channel", "nf4"])
def test_quantized(name: str) -> None:
    q = stack(name)
    for counts in COUNTS[:2]:
        x = torch.randn(sum(counts), 64)
        want = torch_dequant.run_experts(x, q, counts)
        for rows in (torch.tensor(counts), counts):
            got = triton_experts.run_experts(x, triton_experts.prepack_experts(q), rows)
            torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", [None, "q8_0", "int8-channel-a8", "fp8-channel"])
@pytest.mark.parametrize("counts", COUNTS)
def test_rows_of_x_that_are_not_sorted(name: str | None, counts: list[int]) -> None:
    """To the bit what they give sorted; rows of none, and rows of x that nobody asks for, harm nothing."""
    size, rows = sum(counts), torch.tensor(counts)
    x = torch.randn(5, 64)
    token = torch.randint(0, 4, (size + 2,), generator=torch.Generator().manual_seed(0))
    x[4] = float("nan")
    w, q = torch.randn(4, 40, 64), stack(name) if name else None
    packed = triton_experts.prepack_experts(q) if q else None
    if packed is None:
        got, want = (triton_experts.run_plain(a, w, False, rows, t) for a, t in ((x, token), (x[token], None)))
    else:
        got, want = (triton_experts.run_experts(a, packed, rows, t) for a, t in ((x, token), (x[token], None)))
    assert got.shape == want.shape == (size + 2, 40)
    assert torch.equal(got[:size], want[:size])


def test_what_it_leaves_to_others() -> None:
    cpu = torch.device("cpu")
    why = triton_experts.supports(FORMATS["fp8-tensor-static"], cpu, torch.float32)
    assert "for each row" in str(why)
    assert triton_experts.supports(FORMATS["fp8-tensor"], cpu, torch.float32) is None
    permute = Transform("permute", {"index": torch.stack([torch.randperm(64)] * 4)})
    permuted = Quantized(FORMATS["int8-channel"], stack("int8-channel").weight, transforms=(permute,))
    assert triton_experts.prepack_experts(permuted) is None


def quantized(host: Host, name: str) -> None:
    """Bind both projections to the Triton kernel, the first in two parts."""
    ours = Experts(Options())
    for projection, shapes in (("gate_up_proj", ((M, H), (M, H))), ("down_proj", ((H, M),))):
        parts = [Quantized(FORMATS[name], encode(torch.randn(E, *s) / 8, FORMATS[name].weight)) for s in shapes]
        ours.parts[projection] = tuple(
            Part(q, KERNEL, triton_experts.prepack_experts(q), q.weight.device) for q in parts
        )
    setattr(host, ATTRIBUTE, ours)


@pytest.mark.parametrize(
    ("form", "kind"),
    [(None, {}), (None, {"transposed": True, "bias": True}), (None, {"gate": False}), ("int4-g32", {"bias": True})],
)
def test_forward_by_device_is_forward_by_host(form: str | None, kind: dict[str, bool]) -> None:
    host = Host(**kind)
    if form is not None:
        quantized(host, form)
    hidden, index, weights = choices(7)
    index[2, 1] = index[5, 0] = E  # no expert
    weights[2, 1] = weights[5, 0] = 0.0
    with torch.no_grad():
        got = by_device(host, hidden, index, weights)
        torch.testing.assert_close(got, by_host(host, hidden, index, weights), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(("tokens", "k", "count"), [(1, 2, 4), (7, 3, 5), (40, 4, 60), (0, 2, 4)])
def test_route_and_back(tokens: int, k: int, count: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(triton_route, "BLOCK", 32)
    draw = torch.Generator().manual_seed(tokens)
    choices = torch.randint(0, count + 3, (tokens, k), generator=draw)  # from count on: of no expert
    token, place, rows = triton_route.route(choices, count)
    order = choices.flatten().clamp(max=count).argsort(stable=True)
    assert torch.equal(token, order // k) and torch.equal(place[order], torch.arange(tokens * k))
    assert torch.equal(rows, torch.bincount(choices.flatten(), minlength=count)[:count])
    y, weights = torch.randn(tokens * k, 70), torch.randn(tokens, k)
    y[int(rows.sum()) :] = float("nan")  # rows of none are undefined
    got = triton_route.combine(y, choices, place, weights, count, torch.bfloat16)
    terms = (y[place].view(tokens, k, 70) * weights[..., None]).where(choices[..., None] < count, 0.0)
    torch.testing.assert_close(got, terms.sum(1).bfloat16())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_back_onto_another_sum(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rounded before it, as two operations are."""
    monkeypatch.setattr(triton_route, "BLOCK", 32)
    choices = torch.tensor([[0, 2], [1, 5], [2, 1]])  # one of no expert
    _, place, _ = triton_route.route(choices, 4)
    y, weights, onto = (torch.randn(n, m).to(dtype) for n, m in ((6, 70), (3, 2), (3, 70)))
    apart = triton_route.combine(y, choices, place, weights, 4, dtype)
    got = triton_route.combine(y, choices, place, weights, 4, dtype, onto.T.contiguous().T)
    assert got.dtype == dtype
    step = 2.0**-7 if dtype == torch.bfloat16 else 1e-6  # the interpreter cuts where a GPU rounds
    torch.testing.assert_close(got, apart + onto, rtol=step, atol=step)


@pytest.mark.parametrize("half", glu.HALVES)
def test_gate_in_one_launch(half: glu.Half) -> None:
    host, x = Host(), torch.randn(6, 2 * M)
    gate, up = glu.HALVES[half](x)
    setattr(host, experts.GATE, GluForm(Gating("gelu"), "gate_up_proj", "", "down_proj", half))
    assert torch.equal(experts.gated(host, x), torch.nn.functional.gelu(gate) * up)


@pytest.mark.parametrize("counts", COUNTS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_biases_in_one_launch(counts: list[int], dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(triton_route, "BLOCK", 32)
    size, rows = sum(counts), torch.tensor(counts)
    y, bias = torch.randn(size + 2, 70).to(dtype), torch.randn(4, 70).to(dtype)  # two rows belong to none
    want = Routed.biased(y, bias, rows)[:size]
    got = triton_route.add_bias(y, bias, rows)
    assert got is y
    torch.testing.assert_close(got[:size], want)


def test_a_shared_expert_beside_them(monkeypatch: pytest.MonkeyPatch) -> None:
    """By the device as by the host; a hook of the experts is of what they alone give."""
    host = Host()
    hidden, index, weights = choices(6)

    def call(*args: torch.Tensor) -> torch.Tensor:
        return by_host(host, *args)

    host.forward = call
    module = torch.nn.Module()
    module.stack, module.shared = host, torch.nn.Linear(H, H)
    module.router = torch.nn.Identity()
    monkeypatch.setattr(module.router, "forward", lambda x: (None, weights, index))
    form, x = MixtureForm("router", "stack", "shared", True), hidden[None]
    with torch.no_grad():
        want = mixture.forward(module, form, x)
        monkeypatch.setattr(experts, "stays_on_device", lambda *_: True)
        got = mixture.forward(module, form, x)
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)
        host.register_forward_hook(lambda _m, _a, y: y * 2)
        twice = mixture.forward(module, form, x)
        torch.testing.assert_close(twice - want, want - module.shared(x), rtol=1e-3, atol=1e-3)


def test_norm_after_the_experts() -> None:
    host = Host()
    host.has_post_expert_norm, host.post_expert_norm = True, torch.nn.LayerNorm(H)
    with torch.no_grad():
        args = (host, *choices(5))
        torch.testing.assert_close(by_device(*args), by_host(*args), rtol=1e-4, atol=1e-4)


def test_no_token_at_all() -> None:
    assert by_device(Host(), torch.randn(0, H), torch.zeros(0, 2, dtype=torch.long), torch.zeros(0, 2)).shape == (0, H)


def test_a_cpu_goes_by_host() -> None:
    with torch.no_grad():
        assert not experts.stays_on_device(Host(), torch.randn(1, H))


def test_owners() -> None:
    found = Routed.biased(torch.zeros(5, 1), torch.arange(3.0)[:, None], torch.tensor([2, 0, 1]))
    assert found[:, 0].tolist() == [0, 0, 2, 2, 2]
