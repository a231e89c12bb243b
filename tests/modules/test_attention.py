"""Our attention against the formula, one query at a time."""

import pytest
import torch
from torch import Tensor, nn

from fewbit.errors import UnsupportedError
from fewbit.modules import attention
from fewbit.modules.attention import forward
from fewbit.quant.elements import E4M3, F32, INT8
from fewbit.quant.reference import fake_quant
from fewbit.quant.spec import QuantSpec, spec

B, H, G, T, D = 2, 4, 2, 6, 8
LOWEST = torch.finfo(torch.float32).min


def inputs(queries: int = T) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(B, h, t, D, generator=generator) for h, t in ((H, queries), (G, T), (G, T)))
    past = torch.arange(T) > torch.arange(T - queries, T)[:, None]
    return q, k, v, torch.where(past, LOWEST, 0.0).expand(B, 1, queries, T)


def formula(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor, softcap: float | None = None, sinks: Tensor | None = None
) -> Tensor:
    out = torch.empty(B, q.shape[2], H, D)
    for b in range(B):
        for h in range(H):
            for t in range(q.shape[2]):
                scores = k[b, h // 2] @ q[b, h, t] / D**0.5
                scores = softcap * torch.tanh(scores / softcap) if softcap else scores
                scores = (scores + mask[b, 0, t]).exp()
                total = scores.sum() + (sinks[h].exp() if sinks is not None else 0)
                out[b, t, h] = scores @ v[b, h // 2] / total
    return out


def test_scores_in_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is computed a few queries at a time is what is computed at once."""
    q, k, v, mask = inputs()
    how = {"softcap": 5.0, "s_aux": torch.randn(H, generator=torch.Generator().manual_seed(1))}
    whole, _ = forward(nn.Module(), q, k, v, mask, **how)
    for rows in (1, 4):
        monkeypatch.setattr(attention, "ROOM", B * H * T * rows)
        found, _ = forward(nn.Module(), q, k, v, mask, **how)
        torch.testing.assert_close(found, whole)


class Doubled:
    """An Inside whose work can be told by the result."""

    def queries(self, query: Tensor, scaling: float) -> Tensor:
        return query * scaling * 2

    def weights(self, weights: Tensor) -> Tensor:
        return weights * 3

    def output(self, out: Tensor) -> Tensor:
        return out + 1


def test_inside() -> None:
    q, k, v, mask = inputs()
    module = nn.Module()
    setattr(module, attention.INSIDE, Doubled())
    found, _ = forward(module, q, k, v, mask)
    torch.testing.assert_close(found, formula(q * 2, k, v, mask) * 3 + 1)


@pytest.mark.parametrize("queries", [T, 1])
@pytest.mark.parametrize("softcap", [None, 5.0])
@pytest.mark.parametrize("sinks", [False, True])
def test_formula(queries: int, softcap: float | None, sinks: bool) -> None:
    q, k, v, mask = inputs(queries)
    s_aux = torch.randn(H) if sinks else None
    got, _ = forward(nn.Module(), q, k, v, mask, D**-0.5, softcap=softcap, s_aux=s_aux)
    torch.testing.assert_close(got, formula(q, k, v, mask, softcap, s_aux), rtol=1e-5, atol=1e-5)


def test_chosen_keys_and_bias() -> None:
    q, k, v, mask = inputs()
    bias = torch.randn(1, 1, T, T)
    indices = torch.stack([torch.arange(T).clamp(max=3), torch.arange(T), torch.zeros(T).long()], -1).expand(B, T, 3)
    allowed = torch.full((B, 1, T, T), LOWEST).scatter(-1, indices[:, None], 0.0)
    got, _ = forward(nn.Module(), q, k, v, mask, position_bias=bias, indices=indices)
    want = formula(q, k, v, mask.clamp(min=-1e30) + allowed.clamp(min=-1e30) + bias)
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("kv", "planes"),
    [
        (spec(E4M3, (F32, 0, 0)), {"scale0": torch.full((1, 1), 0.02)}),
        (spec(E4M3, (F32, 0, 0)), {"scale0": torch.tensor([0.02, 0.05]).view(G, 1, 1)}),
        (spec(INT8, (F32, 1, 0), rule="range", dynamic=1), {}),
    ],
)
def test_rounded_cache(kv: QuantSpec, planes: dict[str, Tensor]) -> None:
    q, k, v, mask = inputs()
    module = nn.Module()
    module.fewbit_kv = (kv, planes, planes)
    got, _ = forward(module, q, k, v, mask)

    def each(x: Tensor) -> Tensor:
        per_head = {n: p.expand(G, 1, 1) if p.dim() == 2 else p for n, p in planes.items()}
        heads = [fake_quant(x[:, g], kv, {n: p[g] for n, p in per_head.items()}) for g in range(G)]
        return torch.stack(heads, 1)

    assert not torch.equal(each(k), k)
    torch.testing.assert_close(got, formula(q, each(k), each(v), mask), rtol=1e-5, atol=1e-5)


def test_a_tensor_we_do_not_know_is_refused() -> None:
    q, k, v, mask = inputs()
    with pytest.raises(UnsupportedError, match="block_indices"):
        forward(nn.Module(), q, k, v, mask, block_indices=torch.zeros(1))
