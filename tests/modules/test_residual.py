"""A stream that is added to later: whatever is done with it finds what torch would have added."""

from collections.abc import Callable, Iterator
from functools import partial
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fewbit.kernels.compiled import left_to_torch
from fewbit.modules import residual
from fewbit.modules.linear import Linear
from fewbit.modules.norm import Norm, NormForm
from fewbit.modules.parted import Parted
from fewbit.modules.residual import Later

X, Y, Z = torch.randn(3, 2, 8, generator=torch.Generator().manual_seed(0)).unbind()
NORM = Norm(nn.Parameter(torch.linspace(0.5, 1.5, 8), requires_grad=False), None, NormForm(1e-6))
AFTER = Norm(nn.Parameter(torch.linspace(-1, 1, 8), requires_grad=False), None, NormForm(1e-5, "late"))


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """What was launched for additions and norms."""
    made: list[str] = []

    def noting(name: str, real: Callable[..., Any]) -> Callable[..., Any]:
        return lambda *given: (made.append(name), real(*given))[1]

    monkeypatch.setattr(residual, "add_normed", noting("add", residual.add_norm))
    monkeypatch.setattr(residual, "by", noting("norm", residual.by))
    with left_to_torch():
        yield made


def pre(x: Any) -> Any:
    x = x + torch.tanh(NORM(x))
    return x + AFTER(x) * 2


def sandwich(x: Any) -> Any:
    x = x + LATER(torch.tanh(NORM(x)))
    return x + LATER(AFTER(x))


def post(x: Any) -> Any:
    x = x + LATER(torch.tanh(x * 1.0))
    return LATER(torch.tanh(x * 1.0)) + x


def parallel(x: Any) -> Any:
    h = NORM(x)
    return x + torch.tanh(h) + torch.sigmoid(h)


LATER: Any = NORM
WIRINGS: dict[str, tuple[Callable[[Any], Any], Any]] = {  # and what a layer gives
    "pre": (pre, Later),
    "sandwich": (sandwich, Later),
    "post": (post, Tensor),
    "parallel": (parallel, Later),
}


@pytest.mark.parametrize("name", WIRINGS)
def test_wirings(name: str, calls: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """One layer after another, and the last norm."""
    run, kind = WIRINGS[name]
    want = AFTER(run(run(X)))
    calls.clear()
    monkeypatch.setitem(globals(), "LATER", lambda x: residual.later(NORM, x))
    first = run(X if kind is Tensor else Later(X))
    assert isinstance(first, kind)
    got = AFTER(run(first))
    assert torch.equal(got, want)
    assert calls == (["norm"] if kind is Later else []) + ["add"] * 4


SUM = X + Y
USES: dict[str, tuple[Callable[[Any], Any], Any]] = {
    "shape": (lambda s: s.shape, SUM.shape),
    "method": (lambda s: s.float().mean(-1), SUM.mean(-1)),
    "function": (lambda s: torch.tanh(s), SUM.tanh()),
    "several": (lambda s: torch.cat([s, X]), torch.cat([SUM, X])),
    "named": (lambda s: nn.functional.linear(input=s, weight=torch.eye(8)), SUM),
    "left": (lambda s: Z + s, Z + SUM),
    "twice": (lambda s: s + s, SUM + SUM),
    "number": (lambda s: s + 1, SUM + 1),
    "number before": (lambda s: 1 + s, SUM + 1),
    "times": (lambda s: 2 * s - Z, 2 * SUM - Z),
    "over": (lambda s: s / 2, SUM / 2),
    "scaled": (lambda s: torch.add(s, Z, alpha=2), SUM + 2 * Z),
    "row": (lambda s: s[0], SUM[0]),
    "broadcast": (lambda s: s + Z[:1], SUM + Z[:1]),
    "in place": (lambda s: Z.clone().add_(s), Z + SUM),
    "another layer": (lambda s: NORM(s) + AFTER(s), NORM(SUM) + AFTER(SUM)),
}


@pytest.mark.parametrize("name", USES)
def test_uses(name: str) -> None:
    use, want = USES[name]
    got = use(Later(X) + Y)
    if isinstance(got, Later):
        got = got.tensor
    assert torch.equal(got, want) if isinstance(want, Tensor) else got == want


ROWS, COLUMNS = torch.tensor([[0.5], [3.0]]), torch.linspace(0.1, 2.0, 8)
SCALES = [(ROWS, None), (None, COLUMNS), (ROWS, COLUMNS)]


SECOND: Any = SimpleNamespace(reduce=lambda x: x + Z, near=None)  # whose other rank has Z


@pytest.mark.parametrize("norms", [(), (AFTER,)], ids=["added", "normed"])
def test_a_sum_over_ranks_waits_too(calls: list[str], norms: tuple[Norm, ...]) -> None:
    s = residual.stream(Y)
    part = Later(X, ranks=SECOND)
    assert part.waits
    s = s + (residual.later(norms[0], part) if norms else part)
    x = X + Z if not norms else residual.by(norms[0], X + Z)
    assert torch.equal(NORM(s), NORM(Y + x)) and torch.equal(s.tensor, Y + x)
    assert calls.count("add") == 1
    assert torch.equal(torch.tanh(Later(X, ranks=SECOND)), torch.tanh(X + Z))  # whoever else reads it finds it whole
    assert torch.equal(Y + Later(X, ranks=SECOND), Y + (X + Z))


def test_a_linear_of_columns() -> None:
    linear = Linear(8, 8, nn.Parameter(torch.eye(8), requires_grad=False), None)
    linear.parted = Parted(SECOND)
    assert torch.equal(linear(X), X + Z)
    later = residual.product(linear, X)
    assert isinstance(later, Later) and later.ranks is SECOND and torch.equal(later.tensor, X + Z)


@pytest.mark.parametrize("scales", SCALES)
def test_scales_of_a_product_wait_too(scales: residual.Scales, calls: list[str]) -> None:
    want = Y * (1.0 if scales[1] is None else COLUMNS) * (1.0 if scales[0] is None else ROWS)
    made = partial(Later, Y, scales=scales)
    assert torch.equal(torch.tanh(made()), want.tanh()) and torch.equal(X + made(), X + want)
    assert torch.equal(residual.later(NORM, made()).tensor, NORM(want))
    calls.clear()
    assert torch.equal(AFTER(Later(X) + made()), AFTER(X + want))
    assert torch.equal(AFTER(made() + Later(X)), AFTER(X + want))
    assert torch.equal(AFTER(Later(X) + residual.later(NORM, made())), AFTER(X + NORM(want)))
    assert calls[0] == "add" and torch.equal(made() + made(), want + want)


def test_a_product_leaves_its_scales_to_who_adds(monkeypatch: pytest.MonkeyPatch) -> None:
    linear = Linear(8, 8, nn.Parameter(torch.eye(8), requires_grad=False), None)
    assert torch.equal(residual.product(linear, Later(X) + Y), SUM)
    monkeypatch.setattr(Linear, "unscaled", lambda self, x: (Linear.forward(self, x), ROWS, COLUMNS))
    found = residual.product(linear, X)
    assert isinstance(found, Later) and torch.equal(found.tensor, X * COLUMNS * ROWS)
    linear.register_forward_hook(lambda *_: None)
    assert residual.product(linear, X) is not None and isinstance(residual.product(linear, X), Tensor)


def test_a_norm_that_is_not_added() -> None:
    alone = residual.later(NORM, X)
    assert torch.equal(torch.tanh(alone), NORM(X).tanh())
    assert torch.equal((residual.later(NORM, X) + residual.later(AFTER, X)), NORM(X) + AFTER(X))
    assert torch.equal(AFTER(residual.later(NORM, X)), AFTER(NORM(X)))


def test_a_sum_is_added_once(calls: list[str]) -> None:
    s = Later(X) + Y
    assert not calls
    for _ in range(3):
        assert torch.equal(s.tensor, SUM)
    assert calls == ["add"] and s.residual is None


class Layer(nn.Module):
    def forward(self, hidden_states: Any, mask: Any = None, **more: Any) -> Any:
        return hidden_states, mask, more


def test_a_layer_is_given_a_stream() -> None:
    layer = Layer()
    for got in (residual.forward(layer, X, 1, a=2), residual.forward(layer, hidden_states=X, mask=1, a=2)):
        assert isinstance(got[0], Later) and got[0].tensor is X and got[1:] == (1, {"a": 2})
    held = Later(X)
    assert residual.forward(layer, held)[0] is held
    assert residual.forward(layer, SimpleNamespace())[0] is not held
