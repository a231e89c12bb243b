"""A router's choice in Triton's interpreter, against the operations of torch that it stands for."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from fewbit.kernels.triton_runtime import lacking
from fewbit.modules import router
from fewbit.modules.router import Choice, Groups, RouteForm

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
pytestmark = [
    pytest.mark.skipif(lacking(torch.device(DEVICE)) is not None, reason=str(lacking(torch.device(DEVICE)))),
    *(pytest.mark.filterwarnings(f"ignore:{what}") for what in ("overflow", "invalid value", "divide by", "All-NaN")),
]
TOP = RouteForm("k")
GROUPS = Groups("g", "t")
DEEPSEEK = RouteForm("k", "wide", "sigmoid", "b", groups=GROUPS, divide="plus", eps=1e-20, scale="s", ordered=False)
CASES: dict[str, tuple[Choice, int]] = {  # and experts
    "mixtral": (Choice(replace(TOP, divide="plus"), 2), 8),
    "qwen3": (Choice(TOP, 8), 128),
    "gpt_oss": (Choice(replace(TOP, score="none", then="softmax"), 4), 33),
    "kolibri": (Choice(replace(TOP, score="none", bias="b", then="sigmoid", divide="plus"), 5), 40),
    "deepseek_v3": (Choice(DEEPSEEK, 8, 2.5, 8, 4), 64),
    "one group": (Choice(DEEPSEEK, 3, 2.5, 1, 1), 20),
    "odd groups": (Choice(DEEPSEEK, 5, 2.5, 3, 2), 21),
    "deepseek_v2": (Choice(replace(TOP, groups=Groups("g", "t", "one", 0.0, True), scale="s"), 6, 16.0, 4, 2), 40),
    "axk2": (Choice(replace(DEEPSEEK, groups=replace(GROUPS, fill=0.0)), 4, 2.5, 4, 2), 16),
    "ernie": (Choice(replace(TOP, bias="b", divide="least", eps=1e-12), 3), 12),
    "all of them": (Choice(replace(TOP, score="sigmoid"), 6), 6),
}


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(DEVICE)


@pytest.fixture(autouse=True)
def first_of_equals(monkeypatch: pytest.MonkeyPatch) -> None:
    """torch.topk takes any of those that are equal; here the first, as the kernel does."""

    def topk(x: Tensor, k: int, dim: int = -1, sorted: bool = True) -> Any:
        values, order = x.sort(dim=dim, descending=True, stable=True)
        return torch.return_types.topk((values[..., :k], order[..., :k]))

    monkeypatch.setattr(torch, "topk", topk)
    monkeypatch.setattr(Tensor, "topk", topk)


def compare(logits: Tensor, bias: Tensor | None, by: Choice) -> None:
    from fewbit.kernels import triton_choose

    assert triton_choose.takes(logits, bias, by.top)
    weights, experts = triton_choose.choose(logits, bias, by, torch.float32)
    wanted, order = router.chosen(logits, bias, by)
    assert weights.dtype == torch.float32 and torch.equal(experts, order)
    torch.testing.assert_close(weights, wanted, rtol=1e-5, atol=1e-30, equal_nan=True)


@pytest.mark.parametrize("name", CASES)
def test_choice(name: str) -> None:
    by, count = CASES[name]
    bias = random(1, count, seed=1) / 4 if by.form.bias else None
    wide = random(5, count + 3)
    for logits in (wide[:, :count], 3 * wide[:, 3:], wide[:, :count].bfloat16(), wide[:1, :count] - 12):
        compare(logits, bias, by)
        if bias is not None:
            compare(logits, bias.flatten().bfloat16(), by)


@pytest.mark.parametrize("name", CASES)
def test_equal_ones(name: str) -> None:
    by, count = CASES[name]
    bias = torch.zeros(count, device=DEVICE) if by.form.bias else None
    compare(torch.zeros(1, count, device=DEVICE), bias, by)
    compare(random(12, count).round(), bias, by)


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("odd", [torch.nan, torch.inf, -torch.inf], ids=str)
def test_nothing_hides_what_is_not_finite(name: str, odd: float) -> None:
    by, count = CASES[name]
    bias = random(count, seed=1) / 4 if by.form.bias else None
    logits = random(6, count)
    logits[1, count - 1] = logits[3, 2] = logits[3, 3] = logits[4] = odd
    compare(logits, bias, by)
    if bias is not None:
        bias[1] = odd
        compare(logits, bias, by)


def test_zero_has_no_sign() -> None:
    from fewbit.kernels import triton_choose

    by = Choice(RouteForm("k", score="none"), 2)
    logits = torch.tensor([[-0.0, 0.0, -1.0], [0.0, -0.0, -1.0]], device=DEVICE)
    assert triton_choose.choose(logits, None, by, torch.float32)[1].tolist() == [[0, 1], [0, 1]]


def test_a_type_of_weights_and_no_token() -> None:
    from fewbit.kernels import triton_choose

    by, count = CASES["mixtral"]
    logits = random(3, count)
    weights, _ = triton_choose.choose(logits, None, by, torch.bfloat16)
    wanted = router.chosen(logits, None, by)[0]
    assert weights.dtype == torch.bfloat16
    torch.testing.assert_close(weights.float(), wanted, rtol=2.0**-7, atol=0)
    weights, experts = triton_choose.choose(logits[:0], None, by, torch.float32)
    assert weights.shape == experts.shape == (0, 2)


def test_what_it_leaves_to_torch() -> None:
    from fewbit.kernels import triton_choose

    x = random(2, 8)
    assert not triton_choose.takes(x.T, None, 2) and not triton_choose.takes(x[None], None, 2)
    assert not triton_choose.takes(x.requires_grad_(), None, 2)
    assert not triton_choose.takes(x.detach(), random(7), 2) and not triton_choose.takes(x.detach(), None, 9)
