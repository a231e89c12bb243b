"""How many kernels a decoder layer launches outside attention, counted on the twin: its own code, and fused.

Counted is every operation of torch that is no view, for one token in bfloat16. What is one kernel on a GPU (a linear
with its bias, a norm, act x up, a rotary embedding, a projection of all experts) counts as one, whatever it is made of
on a CPU. Experts are never run one by one here, as transformers' own loop would. Fused latent attention is what it is
over a paged cache.
"""

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from fewbit.models import fuse, hf, twin
from fewbit.models.fuse_place import place
from fewbit.models.observe_taps import layers_path
from fewbit.models.shrink import shrink
from fewbit.modules import attention, experts, glu, latent, linear, norm, paged, residual, rotary, router

FREE = ("empty", "lift_fresh", "detach", "alias", "_unsafe_view")  # operations that launch nothing
ONE = ((linear, "dense_linear"), (norm, "normed"), (norm, "normed_pair"), (glu, "act_mul"), (rotary, "rotate"),
       (latent, "assemble"), (latent, "joined"), (residual, "normed"), (residual, "add_normed"), (router, "wide"),
       (router, "choose"))  # fmt: skip
OTHERS = "fewbit-counted"  # our name among transformers' attention functions while counting


@dataclass(frozen=True, slots=True)
class Counted:
    """Kernels of one layer, the most of any: of the model's own code, and fused."""

    plain: int
    fused: int


class Count(TorchDispatchMode):
    """Counts while `on`."""

    def __init__(self) -> None:
        super().__init__()
        self.on, self.found = False, 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.found += self.on and launches(func)
        return func(*args, **(kwargs or {}))

    @contextmanager
    def paused(self, count: int) -> Iterator[None]:
        """What happens within counts as so many."""
        before, self.on = self.on, False
        self.found += count if before else 0
        try:
            yield
        finally:
            self.on = before

    def one(self, function: Callable[..., Any], count: int = 1) -> Callable[..., Any]:
        def run(*args: Any, **named: Any) -> Any:
            with self.paused(count):
                return function(*args, **named)

        return run


def launches(func: Any) -> bool:
    """Whether an operation gives anything but a view of what it was given."""
    views = any(r.alias_info is not None and not r.alias_info.is_write for r in func._schema.returns)
    return not views and not func._schema.name.removeprefix("aten::").startswith(FREE)


def counted(config: Any) -> Counted:
    """Of an architecture whose twin is exact here."""
    small = shrink(config)
    _, model = twin.filled(small, twin.require(config))
    model.bfloat16()
    plain = layers(model, False)
    list(place(model, fuse.plan(config).rewrites))
    return Counted(plain, layers(model, True))


@torch.no_grad()
def layers(model: Any, fused: bool) -> int:
    """The most kernels of any decoder layer of a twin, for one token. fused: our kernels sort and add up experts."""
    ids = torch.arange(10, 14)[None]
    held: nn.ModuleList = model.get_submodule(layers_path(model, ids))
    count, each = Count(), []
    one = count.one(dense)

    def before(*_: object) -> None:
        count.on, count.found = True, 0

    def after(*_: object) -> None:
        count.on = False
        each.append(count.found)

    with ExitStack() as stack:
        for target, name, function in (
            *((module, name, count.one(getattr(module, name))) for module, name in ONE),
            (experts, "stays_on_device", lambda *_: True), (experts, "dense", one if fused else apart(one)),
            (experts, "kernel", lambda: Routed(count, fused)), (paged, "forward", count.one(paged.forward, 0)),
            (latent, "goes_through", lambda module, _: latent.plain(module.kv_b_proj)),
        ):  # fmt: skip
            stack.enter_context(patch.object(target, name, function))
        hf.register_attention(OTHERS, count.one(attention.forward, 0))
        if hf.attention_of(model) == hf.OURS:
            model.config._attn_implementation = OTHERS
            stack.callback(setattr, model.config, "_attn_implementation", hf.OURS)
        for layer in held:
            stack.callback(layer.register_forward_pre_hook(before).remove)
            stack.callback(layer.register_forward_hook(after).remove)
        place = torch.zeros(1, dtype=torch.int64)
        stack.enter_context(paged.stepping(paged.Step(place, lambda: [paged.Span(0, 1, 1, place)], {}, 1)))
        stack.enter_context(count)
        model(input_ids=ids[:, :1], use_cache=False)
    return max(each)


def dense(x: Tensor, weight: Tensor, transposed: bool, rows: Tensor, token: Tensor | None = None) -> Tensor:
    """One projection of all experts, as the host would do it. Rows that belong to none stay zero."""
    x, numbers = x if token is None else x[token], rows.tolist()
    y = DENSE(x[: sum(numbers)], weight, transposed, numbers)
    return torch.cat([y, y.new_zeros(len(x) - len(y), y.shape[-1])])


def apart(project: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """The same, its rows picked out beforehand."""

    def run(x: Tensor, weight: Tensor, transposed: bool, rows: Tensor, token: Tensor | None = None) -> Tensor:
        return project(x if token is None else x[token], weight, transposed, rows)

    return run


class Routed:
    """What kernels.triton_route does, in one launch each, or by the operations of torch that they stand for."""

    def __init__(self, count: Count, fused: bool):
        ways = self.routed, self.combined, self.biased
        self.route, self.combine, self.add_bias = map(count.one, ways) if fused else ways

    @staticmethod
    def routed(choices: Tensor, experts: int) -> tuple[Tensor, Tensor, Tensor]:
        order = choices.flatten().argsort(stable=True)
        rows = torch.bincount(choices.flatten(), minlength=experts)[:experts]
        return order // choices.shape[-1], order.argsort(), rows

    @staticmethod
    def combined(
        y: Tensor, choices: Tensor, place: Tensor, weights: Tensor, experts: int, dtype: Any, onto: Tensor | None = None
    ) -> Tensor:
        total = (y[place].view(*choices.shape, -1) * weights[..., None]).sum(1).to(dtype)
        return total if onto is None else total + onto

    @staticmethod
    def biased(y: Tensor, bias: Tensor, rows: Tensor) -> Tensor:
        owner = torch.searchsorted(rows.cumsum(0), torch.arange(len(y)), right=True)
        return y + bias[owner.clamp_(max=len(rows) - 1)]  # the last one's, in rows that belong to none


DENSE = experts.dense
