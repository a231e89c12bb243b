"""Experts, dense and quantized, against a loop over tokens."""

import pytest
import torch
from torch import Tensor, nn

from fewbit.errors import UnsupportedError
from fewbit.modules.experts import ATTRIBUTE, Experts, empty_stack, forward, put
from fewbit.modules.linear import Options
from fewbit.quant.formats import FORMATS
from fewbit.quant.qtensor import Quantized, Transform, stack
from fewbit.quant.reference import decode, encode, linear

E, H, M = 4, 64, 32


class Host(nn.Module):
    """What transformers' decorated classes look like."""

    def __init__(self, transposed: bool = False, bias: bool = False, gate: bool = True):
        super().__init__()
        torch.manual_seed(0)
        self.num_experts, self.is_transposed, self.has_bias, self.has_gate = E, transposed, bias, gate
        self.act_fn = nn.SiLU()
        up = "gate_up_proj" if gate else "up_proj"
        for name, n, k in ((up, (1 + gate) * M, H), ("down_proj", H, M)):
            weight = torch.randn(E, n, k) / k**0.5
            self.register_parameter(name, nn.Parameter(weight.mT.contiguous() if transposed else weight, False))
            if bias:
                self.register_parameter(f"{name}_bias", nn.Parameter(torch.randn(E, n), False))

    def _apply_gate(self, gate_up: Tensor) -> Tensor:
        gate, up = gate_up.chunk(2, -1)
        return self.act_fn(gate) * up


def choices(tokens: int) -> tuple[Tensor, Tensor, Tensor]:
    torch.manual_seed(1)
    index = torch.stack([torch.randperm(E)[:2] for _ in range(tokens)])
    return torch.randn(tokens, H), index, torch.rand(tokens, 2)


def by_token(host: Host, hidden: Tensor, index: Tensor, weights: Tensor, apply: dict[str, list[Quantized]]) -> Tensor:
    """One token, one expert at a time."""

    def project(name: str, e: int, x: Tensor) -> Tensor:
        if name in apply:
            y = torch.cat([linear(x[None], one(q, e))[0] for q in apply[name]])
        else:
            w = getattr(host, name)[e]
            y = x @ w if host.is_transposed else w @ x
        return y + getattr(host, f"{name}_bias")[e] if host.has_bias else y

    out = torch.zeros_like(hidden)
    for t, x in enumerate(hidden):
        for e, weight in zip(index[t].tolist(), weights[t], strict=True):
            if host.has_gate:
                inner = host._apply_gate(project("gate_up_proj", e, x))
            else:
                inner = host.act_fn(project("up_proj", e, x))
            out[t] += weight * project("down_proj", e, inner)
    return out


def one(q: Quantized, e: int) -> Quantized:
    from fewbit.kernels.torch_dequant import expert

    return expert(q, e)


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("gate", [False, True])
def test_dense(transposed: bool, bias: bool, gate: bool) -> None:
    host = Host(transposed, bias, gate)
    hidden, index, weights = choices(9)
    want = by_token(host, hidden, index, weights, {})
    torch.testing.assert_close(forward(host, hidden, index, weights), want, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", ["int4-g32", "nvfp4-a16", "fp8-tensor", "mxfp4"])
def test_quantized_parts_of_their_own_format(name: str) -> None:
    host = Host(bias=True)
    form = FORMATS[name]
    gate = Quantized(form, encode(torch.randn(E, M, H), form.weight))
    up = Quantized(FORMATS["int8-channel"], encode(torch.randn(E, M, H), FORMATS["int8-channel"].weight))
    down = Quantized(form, encode(torch.randn(E, H, M), form.weight))
    ours = Experts(Options())
    ours.bind("gate_up_proj", (gate, up))
    ours.bind("down_proj", (down,))
    setattr(host, ATTRIBUTE, ours)
    hidden, index, weights = choices(9)
    want = by_token(host, hidden, index, weights, {"gate_up_proj": [gate, up], "down_proj": [down]})
    torch.testing.assert_close(forward(host, hidden, index, weights), want, rtol=1e-4, atol=1e-4)


def test_each_expert_keeps_its_own_planes() -> None:
    form = FORMATS["fp8-tensor-static"]
    each = []
    for e in range(E):
        weight = encode(torch.randn(M, H) * (e + 1), form.weight)
        permute = Transform("permute", {"index": torch.randperm(H)})
        each.append(Quantized(form, weight, {"scale0": torch.full((1, 1), 0.01 * (e + 1))}, (permute,)))
    held = empty_stack(E, each[0], torch.device("cpu"))
    for e, q in enumerate(each):
        put(held, e, q, "experts.up_proj")
    assert torch.equal(decode(held.weight), decode(stack([q.weight for q in each])))
    x = torch.randn(3, H)
    for e, q in enumerate(each):
        torch.testing.assert_close(linear(x, one(held, e)), linear(x, q))


def test_experts_of_two_formats_are_refused() -> None:
    first = Quantized(FORMATS["int4-g32"], encode(torch.randn(M, H), FORMATS["int4-g32"].weight))
    other = Quantized(FORMATS["int8-channel"], encode(torch.randn(M, H), FORMATS["int8-channel"].weight))
    held = empty_stack(E, first, torch.device("cpu"))
    with pytest.raises(UnsupportedError, match=r"up_proj: expert 1 is .* int8 .*, the experts before it .* int4 "):
        put(held, 1, other, "up_proj")


def test_padding_choices_name_no_expert() -> None:
    host = Host()
    hidden, index, weights = choices(5)
    index[2] = E
    weights[2] = 0.0
    kept = [0, 1, 3, 4]
    got = forward(host, hidden, index, weights)
    torch.testing.assert_close(got[kept], by_token(host, hidden[kept], index[kept], weights[kept], {}))
    assert not got[2].any()


def test_no_token_at_all() -> None:
    hidden = torch.randn(0, H)
    got = forward(Host(), hidden, torch.zeros(0, 2, dtype=torch.long), torch.zeros(0, 2))
    assert got.shape == (0, H)


@pytest.mark.parametrize(
    ("first", "other", "text"),
    [
        ("int4-g32", "int4-g64", r"expert 1 is .*64.*, the experts before it .*32"),
        ("fp8-channel", "fp8-channel-a16", r"the experts before it .* with activations"),
    ],
)
def test_experts_that_differ_in_group_or_activations_are_refused(first: str, other: str, text: str) -> None:
    each = [Quantized(FORMATS[n], encode(torch.randn(M, H), FORMATS[n].weight)) for n in (first, other)]
    held = empty_stack(E, each[0], torch.device("cpu"))
    with pytest.raises(UnsupportedError, match=text):
        put(held, 1, each[1], "up_proj")
