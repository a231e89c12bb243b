"""Static scales of a model full of quantizers: what its algorithm asks for, from one run of the user's forward loop.

Linears that engines fuse get one input scale and one outer weight scale, as ModelOpt's export gives them; here they run
with it from the start.
"""

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from fewbit.algos.algo import Stats
from fewbit.compat.group import Group, grouped, share
from fewbit.compat.insert import matrix, quantizers, weights
from fewbit.compat.methods import NEED_STATS, method_of, scale_weights
from fewbit.compat.quantizer import Quantizer, block_amax
from fewbit.errors import RequestError

SAMPLE = 512  # rows of an input that a search looks at
Loop = Callable[[Any], Any]


def calibrate(model: nn.Module, algorithm: Any, loop: Loop | None) -> None:
    """Give every quantizer its static scales, and weights what the algorithm changes of them."""
    method, told = method_of(algorithm)
    groups = grouped(model)
    if method is None:
        for weight in (w for group in groups for w in group):
            dynamic(weight.input)
    if loop is not None and (method in NEED_STATS or needs_loop(model)):
        observe(model, groups, loop, method)
    for group in groups:
        scale_weights(group, method or "max", told)
    settle(model, groups)


def dynamic(quantizer: Quantizer) -> None:
    """Formats that are not calibrated round inputs by what each call brings."""
    if quantizer.spec is not None:
        scales = tuple(replace(scale, dynamic=True) for scale in quantizer.spec.scales)
        quantizer.spec = replace(quantizer.spec, scales=scales)


def static(quantizer: Quantizer) -> bool:
    """True for a quantizer of inputs or of a cache that must see data first."""
    spec = quantizer.spec
    return quantizer.enabled and not quantizer.weight and spec is not None and not spec.scales[-1].dynamic


def needs_loop(model: nn.Module) -> bool:
    return any(static(q) and not q.planes for q in quantizers(model).values())


def observe(model: nn.Module, groups: Iterable[Group], loop: Loop, method: str | None) -> None:
    """Run the loop once, everything in full precision, and let the quantizers watch."""
    for group in groups if method in NEED_STATS else ():
        for w in group[:1]:
            w.input.stats = Moments(method in ("gptq", "local_hessian"))
    with watching(model, "plain"):
        loop(model)


@contextmanager
def watching(model: nn.Module, how: Any) -> Iterator[None]:
    """Quantizers of inputs and caches watch; weights are not rounded unless `how` is rounded."""
    held = list(quantizers(model).values())
    for q in held:
        q.watch = how if static(q) and not q.planes else "" if how == "rounded" else "plain"
    try:
        with torch.no_grad():
            yield
    finally:
        for q in held:
            q.watch = ""


class Moments:
    """What passed through one input: the statistics that algorithms read."""

    def __init__(self, hessian: bool):
        self.tokens, self.hessian = 0, hessian
        self.rows: list[Tensor] = []
        self.sums: dict[str, Tensor] = {}

    def add(self, x: Tensor) -> None:
        x = x.reshape(-1, x.shape[-1]).float()
        if not len(x):
            return
        self.tokens += len(x)
        found = {"mean": x.abs().sum(0), "square": x.square().sum(0)} | ({"hessian": x.T @ x} if self.hessian else {})
        top = x.abs().amax(0)
        self.sums = {n: self.sums.get(n, 0) + v for n, v in found.items()} | {
            "amax": torch.maximum(self.sums.get("amax", top), top)
        }
        self.rows.append(x[:: max(1, -(-len(x) // 64))])
        if sum(map(len, self.rows)) > 4 * SAMPLE:
            self.rows = [torch.cat(self.rows)[::2]]

    def stats(self, name: str) -> Stats:
        if not self.tokens:
            raise RequestError(f"{name}: forward_loop brought it no data; run the model on more, or leave it dense")
        sample = torch.cat(self.rows)
        sample = sample[torch.linspace(0, len(sample) - 1, min(SAMPLE, len(sample))).long()]
        means = {n: self.sums[n] / self.tokens for n in ("mean", "square")}
        hessian = self.sums["hessian"] / self.tokens if self.hessian else None
        return Stats(self.tokens, self.sums["amax"], means["mean"], means["square"], hessian, sample)


def hold_weights(model: nn.Module) -> None:
    """Every weight's scales from its largest magnitudes."""
    for _, name, module, quantizer, _ in weights(model):
        if quantizer.enabled and quantizer.spec is not None:
            quantizer.hold(block_amax(matrix(module, name), quantizer.spec))


def settle(model: nn.Module, groups: Iterable[Group]) -> None:
    """Scales of inputs and caches from what was seen; siblings share theirs."""
    for group in groups:
        share(group)
    missing = []
    for name, q in quantizers(model).items():
        if static(q) and not q.planes:
            if q.amax is None:
                missing.append(name)
            else:
                q.hold(q.amax)
        q.amax = None
    if missing:
        found = f"{len(missing)} quantizers ({', '.join(missing[:3])} ...)" if len(missing) > 3 else ", ".join(missing)
        raise RequestError(f"forward_loop brought no data to {found}; run the model on more, or leave them out")
