"""Experts: the quantized projections of one mixture-of-experts module, each a list of parts [E, N_i, K] along N.

The host is transformers' own experts module: its dense parameters, biases and gate are used as they are, and `forward`
is what it is told to call. On a GPU only the device knows which expert has how many rows. Gate and up stay separate
parts, since each may have its own format and scales.
"""

from collections.abc import Callable, Sequence
from functools import cache, partial
from typing import Any, Protocol, Self

import torch
from torch import Tensor, nn

from fewbit.errors import UnsupportedError
from fewbit.kernels import triton_runtime
from fewbit.kernels.triton_experts import run_plain
from fewbit.modules import glu
from fewbit.modules.glu import GluForm
from fewbit.modules.linear import Options, Part, moved, part
from fewbit.quant.qtensor import QTensor, Quantized, Transform
from fewbit.quant.spec import Format, describe

ATTRIBUTE = "fewbit_experts"  # where a host holds its Experts
GATE = "fewbit_gate"  # where a host holds the GluForm that its own gate is
WATCH = "fewbit_watch"  # where a host holds what watches it: a Watch
Rows = Sequence[int] | Tensor  # how many rows belong to each expert: numbers, or [E] on the device


class Host(Protocol):
    """What transformers promises of a class under its experts decorator."""

    num_experts: int
    has_gate: bool
    has_bias: bool
    is_transposed: bool
    act_fn: Callable[[Tensor], Tensor]

    def _apply_gate(self, gate_up: Tensor) -> Tensor: ...


class Watch(Protocol):
    """Told of every input of a projection, before the projection runs. What it sees changes no output."""

    every: Sequence[int]  # experts to be shown all tokens, whatever the router chose

    def routed(self, rows: Sequence[int]) -> None: ...

    def __call__(self, projection: str, x: Tensor, rows: Sequence[int]) -> None: ...

    def shown(self, projection: str, x: Tensor, expert: int) -> None: ...


class Experts(nn.Module):
    """Projection name -> its parts. A projection without parts is dense and stays with the host."""

    def __init__(self, options: Options):
        super().__init__()
        self.options = options
        self.parts: dict[str, tuple[Part, ...]] = {}

    def bind(self, projection: str, parts: Sequence[Quantized]) -> None:
        """parts: planes with a leading axis of experts, in their order along N."""
        self.parts[projection] = tuple(part(q, "experts", self.options) for q in parts)

    def run(self, projection: str, x: Tensor, rows: Rows, token: Tensor | None = None) -> Tensor:
        """x: [S, K] sorted by expert, or [T, K] and token: [S], which of its rows each is -> [S, N]."""
        parts = self.parts[projection]
        if token is not None and not all(p.kernel.gathers for p in parts):
            x, token = x[token], None
        given = (rows,) if token is None else (rows, token)
        outs = [p.kernel.run(x, p.packed, *given) for p in parts]
        return outs[0] if len(outs) == 1 else torch.cat(outs, -1)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        super()._apply(fn, recurse)
        self.parts = {name: moved(parts, "experts", fn, self.options) for name, parts in self.parts.items()}
        return self


def forward(host: Any, hidden: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
    """hidden: [T, H], top_k_index and top_k_weights: [T, k] -> [T, H]; the function registered with transformers.

    A choice of num_experts or above names no expert (padding under expert parallelism); it sorts last.
    """
    way = by_device if stays_on_device(host, hidden) else by_host
    return way(host, hidden, top_k_index, top_k_weights)


def stays_on_device(host: Any, hidden: Tensor) -> bool:
    """Whether the host need not know which expert has how many rows: nobody watches, and nothing goes back through."""
    ours = getattr(host, ATTRIBUTE, None)
    seen = hasattr(host, WATCH) or not (ours is None or isinstance(ours, Experts))
    return hidden.is_cuda and not seen and not torch.is_grad_enabled() and triton_runtime.lacking(hidden.device) is None


def by_host(host: Any, hidden: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
    """Rows of each expert as numbers of Python's, which wait for the device."""
    choices = top_k_index.reshape(-1)
    order = choices.argsort(stable=True)
    rows = torch.bincount(choices, minlength=host.num_experts)[: host.num_experts].tolist()
    order = order[: sum(rows)]
    token = order // top_k_index.shape[-1]
    watch: Watch | None = getattr(host, WATCH, None)
    if watch is not None:
        watch.routed(rows)
        show_all(host, hidden, watch)
    x = lowered(host, raised(host, hidden[token], rows, partial(watch, rows=rows) if watch is not None else None), rows)
    x = x * top_k_weights.reshape(-1)[order, None]
    return torch.zeros_like(hidden).index_add_(0, token, x.to(hidden.dtype))


def by_device(
    host: Any, hidden: Tensor, top_k_index: Tensor, top_k_weights: Tensor, onto: Tensor | None = None
) -> Tensor:
    """Rows of each expert as a tensor: no one waits, sizes follow from shapes, and a CUDA graph can hold it all.

    onto: [T, H], added to what the experts give.
    """
    run = kernel()
    token, place, rows = run.route(top_k_index, host.num_experts)
    x = lowered(host, raised(host, hidden, rows, None, token), rows)
    y: Tensor = run.combine(x, top_k_index, place, top_k_weights, host.num_experts, hidden.dtype, onto)
    return y


def show_all(host: Any, hidden: Tensor, watch: Watch) -> None:
    """Run the experts that are to see every token, one by one, for the watch alone."""
    for e in watch.every:
        raised(host, hidden, [len(hidden) * (i == e) for i in range(host.num_experts)], partial(watch.shown, expert=e))


def raised(
    host: Any, x: Tensor, rows: Rows, tell: Callable[[str, Tensor], None] | None, token: Tensor | None = None
) -> Tensor:
    """x: [S, H] sorted by expert, or [T, H] and token: [S] -> what the down projection reads."""
    up = "gate_up_proj" if host.has_gate else "up_proj"
    if tell is not None:
        tell(up, x)
    x = project(host, up, x, rows, token)
    x = gated(host, x) if host.has_gate else host.act_fn(x)
    if tell is not None:
        tell("down_proj", x)
    return x


def gated(host: Any, x: Tensor) -> Tensor:
    """x: [S, 2 M] -> [S, M], in one launch on a GPU where `fuse` found what the host's own code does."""
    form: GluForm | None = getattr(host, GATE, None)
    if form is None:
        y: Tensor = host._apply_gate(x)
        return y
    gate, up = glu.HALVES[form.half](x)
    return glu.act_mul(gate, up, form.gating)


def lowered(host: Any, x: Tensor, rows: Rows) -> Tensor:
    """x: [S, M] as `raised` gives it -> what the experts put out, [S, H]."""
    x = project(host, "down_proj", x, rows)
    return host.post_expert_norm(x) if getattr(host, "has_post_expert_norm", False) else x


def project(host: Any, name: str, x: Tensor, rows: Rows, token: Tensor | None = None) -> Tensor:
    """One projection of all chosen experts, dense or quantized, with its bias."""
    ours: Experts | None = getattr(host, ATTRIBUTE, None)
    bias = getattr(host, f"{name}_bias") if host.has_bias else None
    if ours is not None and name in ours.parts:
        y = ours.run(name, x, rows, token)
    else:
        y = dense(x, getattr(host, name), host.is_transposed, rows, token)
    if bias is None:
        return y
    if isinstance(rows, Tensor):
        added: Tensor = kernel().add_bias(y, bias, rows)
        return added
    return y + bias.repeat_interleave(torch.tensor(rows, device=x.device), dim=0, output_size=x.shape[0])


def dense(x: Tensor, weight: Tensor, transposed: bool, rows: Rows, token: Tensor | None = None) -> Tensor:
    """weight: [E, N, K], or [E, K, N] where transformers stores it transposed. token: as in Experts.run."""
    if isinstance(rows, Tensor):
        return run_plain(x, weight, transposed, rows, token)
    x = x if token is None else x[token]
    runs = x.split(list(rows))
    used = [(run, weight[e]) for e, run in enumerate(runs) if len(run)]
    if not used:
        return x.new_empty(0, weight.shape[-1 if transposed else -2])
    return torch.cat([run @ (w if transposed else w.mT) for run, w in used])


def empty_stack(count: int, q: Quantized, device: torch.device) -> Quantized:
    """Room for `count` experts like q."""

    def wide(planes: dict[str, Tensor]) -> dict[str, Tensor]:
        return {name: torch.empty(count, *p.shape, dtype=p.dtype, device=device) for name, p in planes.items()}

    weight = QTensor(q.weight.spec, (count, *q.weight.shape), wide(q.weight.planes))
    return Quantized(q.format, weight, wide(q.act), tuple(Transform(t.kind, wide(t.tensors)) for t in q.transforms))


def put(stack: Quantized, e: int, q: Quantized, name: str) -> None:
    """Copy one expert into its place; all experts of a part share one format and shape."""
    if q.weight.shape != stack.weight.shape[1:] or not _alike(q.format, stack.format):
        asked = f"{list(q.weight.shape)} {_told(q.format)}"
        held = f"{list(stack.weight.shape[1:])} {_told(stack.format)}"
        raise UnsupportedError(
            f"{name}: expert {e} is {asked}, the experts before it {held}", ["experts of one projection share a format"]
        )
    if [t.kind for t in q.transforms] != [t.kind for t in stack.transforms]:
        kinds = [", ".join(t.kind for t in each.transforms) or "none" for each in (q, stack)]
        raise UnsupportedError(f"{name}: expert {e} has the transforms {kinds[0]}, the experts before it {kinds[1]}")
    for mine, theirs in zip(_groups(stack), _groups(q), strict=True):
        if mine.keys() != theirs.keys():
            raise UnsupportedError(f"{name}: expert {e} has planes {sorted(theirs)}, the others {sorted(mine)}")
        for plane, value in theirs.items():
            mine[plane][e].copy_(value)


def _alike(a: Format, b: Format) -> bool:
    acts = [f.act.stored if f.act else None for f in (a, b)]
    return a.weight.stored == b.weight.stored and acts[0] == acts[1]


def _told(form: Format) -> str:
    return describe(form.weight) + (f" with activations {describe(form.act)}" if form.act else "")


def _groups(q: Quantized) -> list[dict[str, Tensor]]:
    return [q.weight.planes, q.act, *(t.tensors for t in q.transforms)]


@cache
def kernel() -> Any:
    from fewbit.kernels import triton_route

    return triton_route
