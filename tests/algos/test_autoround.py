"""autoround: rounding tuned on the output of a layer; what is stored is what was trained."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.func import functional_call
from torch.nn.functional import linear, silu

import fewbit
from fewbit.algos import autoround, offsets
from fewbit.algos.algo import Run, shared_planes
from fewbit.algos.ranges import movable, values
from fewbit.errors import SpecError
from fewbit.quant import elements
from fewbit.quant.formats import FORMATS
from fewbit.quant.reference import decode, encode
from tests import tiny

ROWS = [
    *("int2-g32", "int2-g64-asym", "int3-g64", "int4-g64", "int4-g64-asym", "int4-channel", "int5-g32-asym"),
    *(
        "int8-tensor",
        "nvfp4",
        "nvfp4-46",
        "mxfp4",
        "mxfp6-e2m3",
        "mxfp8",
        "fp8-channel",
        "fp8-block",
        "nf4",
        "nf4-dq",
        "fp4",
    ),
]
SHAPES = [(5, 40), (33, 128)]
FAST = autoround.Options(iters=8, batch=4)


def noise(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def toy(n: int, k: int, count: int = 3) -> tuple[Run, dict[str, Tensor], list[Tensor]]:
    """down(silu(up(x)) + skip(x)): a layer of three linears, two of which read the same input."""
    weights = {"up": noise(n, k) / k**0.5, "skip": noise(n, k, seed=1) / k**0.5, "down": noise(k, n, seed=2) / n**0.5}
    mix = torch.eye(k) + 0.3 * noise(k, k, seed=3)
    xs = [noise(2, 32, k, seed=10 + i) @ mix for i in range(count)]

    def run(w: Any, i: int) -> Tensor:
        return linear(silu(linear(xs[i], w["up"])) + linear(xs[i], w["skip"]), w["down"])

    return run, weights, [run(weights, i) for i in range(count)]


def loss(run: Run, weights: dict[str, Tensor], targets: list[Tensor]) -> float:
    """What is minimised: each token's squared error in units of the token's own square."""
    errors = [
        (run(weights, i) - t).double().square().sum(-1) / t.double().square().sum(-1) for i, t in enumerate(targets)
    ]
    return float(torch.stack(errors).mean())


def rtn(weights: dict[str, Tensor], name: str) -> dict[str, Tensor]:
    spec = FORMATS[name].weight
    given = shared_planes(list(weights.values()), [spec] * len(weights))
    return {n: decode(encode(w, spec, g)) for (n, w), g in zip(weights.items(), given, strict=True)}


@pytest.mark.parametrize("name", ROWS)
def test_never_worse_than_rtn_and_the_same_again(name: str) -> None:
    spec = FORMATS[name].weight
    for shape in SHAPES:
        run, weights, targets = toy(*shape)
        state = torch.get_rng_state()
        found, again = (autoround.tune(run, weights, dict.fromkeys(weights, spec), targets, FAST) for _ in range(2))
        assert torch.equal(state, torch.get_rng_state())
        assert found.keys() == weights.keys()
        back = {n: decode(e.weight) for n, e in found.items()}
        assert loss(run, back, targets) <= loss(run, rtn(weights, name), targets) * (1 + 1e-5), shape
        for n, e in found.items():
            assert e.weight.spec == spec
            assert all(torch.equal(p, again[n].weight.planes[x]) for x, p in e.weight.planes.items())


@pytest.mark.parametrize("name", ROWS)
def test_what_is_trained_is_what_is_stored(name: str) -> None:
    """After random steps, the codes decode to the weight that the last forward pass saw, to the bit."""
    spec = FORMATS[name].weight
    for n, k in SHAPES:
        w = noise(n, k)
        (given,) = shared_planes([w], [spec])
        state = offsets.begin(w, spec, given)
        for step in range(5):
            offsets.move(state, noise(n, k, seed=step), 0.15, 0.08)
        assert torch.equal(decode(offsets.finish(state)), offsets.dense(state)), (n, k)


@pytest.mark.parametrize("name", ["int4-g64-asym", "int2-g32", "int3-g64", "nvfp4", "fp8-channel"])
def test_slopes_are_those_of_the_straight_through_estimate(name: str) -> None:
    """Against autograd through the textbook formulas, with rounding as the identity."""
    spec, shape = FORMATS[name].weight, (8, 128)
    w, grad = noise(*shape), noise(*shape, seed=5)
    state = offsets.begin(w, spec, {}, search=False)
    assert movable(spec) and state.ends is not None
    state.ends.factors = state.ends.factors * 0.7  # so that some values are clipped
    state.planes = state.ends.planes()
    want = _by_autograd(state, grad)
    before = state.ends.factors
    offsets.move(state, grad, 0.0, 0.01)
    moved = (before - state.ends.factors) / 0.01
    sure = want.abs() > 1e-2 * want.abs().mean()
    assert float((moved.sign() == want.sign())[sure].float().mean()) > 0.97


def _by_autograd(state: offsets.Rounding, grad: Tensor) -> Tensor:
    spec, ends = state.spec, state.ends
    assert ends is not None
    factors = ends.factors.clone().requires_grad_()
    low, high = ends.ranges.low * factors[0], ends.ranges.high * factors[1]
    element, block = spec.element, spec.scales[0].block[1] or 128
    x = state.w.flatten(-1).view(8, -1, block)
    if spec.zeros:
        scale = (high - low).unsqueeze(-1) / (element.max - element.min)
        zero = -low.unsqueeze(-1) / scale
        zero = zero + (zero.round() - zero).detach()
        code = x / scale + zero
    else:
        reach = (element.max - element.min) / 2 if spec.rule == "range" else element.max
        scale = torch.maximum(high, -low).unsqueeze(-1) / reach
        stored = values(state.planes, spec, state.shape)[0][:, 0]
        scale = scale + (stored - scale).detach()
        zero = torch.zeros(())
        code = x / scale
    table = elements.values(element)
    table = torch.unique(table[table.isfinite()])
    nearest = table[(code.detach().unsqueeze(-1) - table).abs().argmin(-1)]
    gap = (table[-1] - table[-2]) / 2
    clipped = (code.detach() > element.max + gap) | (code.detach() < element.min - gap)
    ste = torch.where(clipped, nearest, code + (nearest - code).detach())
    ((ste - zero) * scale * grad.view(8, -1, block)).sum().backward()
    assert factors.grad is not None
    return factors.grad if spec.zeros else factors.grad.sum(0).expand(2, -1, -1)


@pytest.mark.parametrize(
    ("name", "factor"), [("int4-g64", 0.5), ("int2-g64", 0.4), ("int2-g64-asym", 0.5), ("nvfp4", 0.7)]
)
def test_a_llama_layer(name: str, factor: float, tmp_path: Path) -> None:
    layer, inputs = _layer(tmp_path)
    weights = {n: p.float() for n, p in layer.named_parameters() if p.dim() == 2}

    def run(w: Any, i: int) -> Tensor:
        out = functional_call(layer, dict(w), inputs[i][0], inputs[i][1])
        return out[0] if isinstance(out, tuple) else out

    with torch.no_grad():
        targets = [run(weights, i) for i in range(len(inputs))]
    found = autoround.tune(
        run, weights, dict.fromkeys(weights, FORMATS[name].weight), targets, autoround.Options(iters=40)
    )
    back = {n: decode(e.weight) for n, e in found.items()}
    with torch.no_grad():
        assert loss(run, back, targets) < factor * loss(run, rtn(weights, name), targets)
    assert {e.log["kept"] for e in found.values()} == {"tuned"}


def _layer(folder: Path) -> tuple[torch.nn.Module, list[tuple[Any, Any]]]:
    """The first layer of a tiny llama and what it is called with."""
    model: Any = fewbit.load(tiny.llama(folder / "m"), dtype=torch.float32)
    calls: list[tuple[Any, Any]] = []
    layer = model.model.layers[0]
    hook = layer.register_forward_pre_hook(lambda m, a, k: calls.append((a, k)), with_kwargs=True)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for _ in range(4):
            model(torch.randint(0, 256, (2, 48), generator=generator), use_cache=False)
    hook.remove()
    return layer, calls


def test_a_weight_that_nothing_reads_keeps_its_range_and_rounding() -> None:
    run, weights, targets = toy(16, 64)
    spec = FORMATS["int4-g64"].weight
    weights["idle"] = noise(8, 64, seed=9)
    options = autoround.Options(iters=4, search=False)
    found = autoround.tune(run, weights, dict.fromkeys(weights, spec), targets, options)
    assert torch.equal(decode(found["idle"].weight), decode(encode(weights["idle"], spec)))


def test_rtn_where_tuning_cannot_gain() -> None:
    """Weights that the format holds exactly: no loss to lower, and the log says so."""
    run, weights, _ = toy(64, 64)
    spec = FORMATS["int4-g64-asym"].weight
    weights = {n: torch.randint(-8, 8, w.shape, generator=torch.Generator().manual_seed(0)) for n, w in weights.items()}
    weights = {
        n: w.float().index_fill(1, torch.tensor([0]), -8).index_fill(1, torch.tensor([1]), 7)
        for n, w in weights.items()
    }
    targets = [run(weights, i) for i in range(3)]
    found = autoround.tune(run, weights, dict.fromkeys(weights, spec), targets, FAST)
    assert all(torch.equal(decode(found[n].weight), w) for n, w in weights.items())
    for e in found.values():
        assert e.log["kept"] == "rtn" and "did not lower" in e.log["reason"]


def test_a_huge_token_does_not_drown_the_others() -> None:
    """Its error cannot be lowered here (its target is another layer's); the other tokens' can."""
    run, weights, targets = toy(32, 64)
    spec = dict.fromkeys(weights, FORMATS["int3-g64"].weight)
    rest = [t.clone() for t in targets]
    for t in targets:
        t[:, 0] = 1e3 * noise(64)
    found = {}
    for relative in (True, False):
        options = autoround.Options(iters=30, batch=4, relative=relative)
        encoded = autoround.tune(run, weights, spec, targets, options)
        back = {n: decode(e.weight) for n, e in encoded.items()}
        found[relative] = sum(float((run(back, i) - t)[:, 1:].square().mean()) for i, t in enumerate(rest))
    assert found[True] < 0.8 * found[False]


def test_siblings_share_the_outer_scale() -> None:
    run, weights, targets = toy(16, 64)
    found = autoround.tune(run, weights, dict.fromkeys(weights, FORMATS["nvfp4"].weight), targets, FAST)
    assert torch.equal(found["up"].weight.planes["scale1"], found["skip"].weight.planes["scale1"])


def test_formats_mixed_in_one_layer() -> None:
    run, weights, targets = toy(32, 64)
    names = {"up": "int4-g64", "skip": "nvfp4", "down": "fp8-channel"}
    specs = {n: FORMATS[f].weight for n, f in names.items()}
    found = autoround.tune(run, weights, specs, targets, FAST)
    assert {n: e.weight.spec for n, e in found.items()} == specs


def test_every_batch_comes_before_any_comes_again() -> None:
    targets = [torch.zeros(2, 1, 1)] * 5
    seen = list(autoround.draws(targets, autoround.Options(iters=10, batch=5)))
    assert all(len(step) == 2 for step in seen)
    flat = [i for step in seen for i in step]
    assert all(sorted(flat[i : i + 5]) == list(range(5)) for i in range(0, 20, 5))
    assert seen != list(autoround.draws(targets, autoround.Options(iters=10, batch=5, seed=1)))


def test_outside_layers_it_is_rtn() -> None:
    w, spec = noise(8, 64), FORMATS["int4-g64"].weight
    (found,) = autoround.ALGO.encode([w], [spec], None, autoround.Options())
    assert torch.equal(decode(found.weight), decode(encode(w, spec)))


def test_what_is_refused() -> None:
    for wrong in ({"iters": 0}, {"batch": 0}, {"lr": -1.0}):
        with pytest.raises(SpecError, match="autoround"):
            autoround.Options(**wrong)  # type: ignore[arg-type]
