"""What can be cut, seen by running the real sizes without the real weights.

Every linear gives random numbers that do not depend on its input; what stands between two linears (norms, rotary,
attention, gates) runs as it is written. Derivatives of a linear's input by those numbers say which rows of which
linears make which of its channels: heads, pairs of gate and up, whatever their order. No config is asked.
"""

from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import ExitStack
from math import gcd
from typing import Any

import torch
from torch import Tensor, nn

from fewbit.models import hf
from fewbit.models.fill import is_stack, replace
from fewbit.models.observe_taps import Tap, first_tensor, instead, layers_path, reader
from fewbit.models.observe_values import kind
from fewbit.models.shard_values import Block, Looked, Runs, Stack, runs_of

TOKENS = 16  # enough that no gate is closed for all of them
LARGEST = 1 << 20  # elements of a matrix of no linear that is looked at
RUN, UNITS = 64, 8  # channels that kernels like to have together, where that leaves so many units


class Stub(nn.Module):
    """A linear of the same sizes that gives random numbers."""

    def __init__(self, linear: nn.Linear, draw: torch.Generator):
        super().__init__()
        self.in_features, self.out_features, self.draw = linear.in_features, linear.out_features, draw
        self.weight = nn.Parameter(torch.ones(1, 1).expand(self.out_features, self.in_features), requires_grad=False)
        self.bias = None
        self.inputs: list[Tensor] = []
        self.outputs: list[Tensor] = []

    def forward(self, x: Tensor) -> Tensor:
        self.inputs.append(x)
        self.outputs.append(torch.randn(*x.shape[:-1], self.out_features, generator=self.draw).requires_grad_())
        return self.outputs[-1].clone()  # code may write into it


def look(config: Any, attention: str) -> Looked:
    """The blocks of every layer of a config's model; layers of the same sizes are looked at once."""
    model = stubbed(config, attention)
    ids = torch.randint(10, 100, (1, TOKENS), generator=torch.Generator().manual_seed(0))
    path = layers_path(model, ids)
    layers = model.get_submodule(path)
    keys = [signature(layer, kind(model.config, i)) for i, layer in enumerate(layers)]
    first = {key: i for i, key in reversed(list(enumerate(keys)))}
    try:
        run(model, layers, ids, {i for i, key in enumerate(keys) if first[key] != i})
    except Exception:  # a layer that gives more than hidden states cannot be passed over
        run(model, layers, ids, set())
    seen: dict[Any, tuple[Block | Stack, ...]] = {}
    for key, layer in zip(keys, layers, strict=True):
        if key not in seen:
            seen[key] = tuple(blocks(layer))
    head = next((p for p, m in model.named_modules() if m is hf.output_head(model) and isinstance(m, Stub)), "")
    return Looked(path, tuple(seen[key] for key in keys), head)


def stubbed(config: Any, attention: str) -> Any:
    """The model without its linears' and stacks' weights; other matrices are one row, repeated."""
    model = hf.build(config, torch.float32, attention)
    draw = torch.Generator().manual_seed(6)
    for path, module in list(model.named_modules()):
        if type(module) is nn.Linear:
            replace(model, path, Stub(module, draw))
        elif is_stack(module):
            module.forward = random_like(draw)
        else:
            for leaf, held in module._parameters.items():
                if held is not None and held.is_meta:
                    module._parameters[leaf] = filled(held, draw)
        for leaf, held in module._buffers.items():
            if held is not None and held.is_meta:
                module._buffers[leaf] = torch.zeros_like(held, device="cpu")
    return model


def random_like(draw: torch.Generator) -> Any:
    def forward(x: Tensor, *_: Any, **__: Any) -> Tensor:
        return torch.randn(x.shape, generator=draw)

    return forward


def filled(held: Tensor, draw: torch.Generator) -> nn.Parameter:
    noise = torch.randn(held.shape[-1:], generator=draw)
    value = 1 + 0.1 * noise if held.dim() < 2 else (noise / max(1, held.shape[-1]) ** 0.5).expand(held.shape)
    return nn.Parameter(value, requires_grad=held.dim() == 1 or held.numel() <= LARGEST)


def signature(layer: nn.Module, name: str) -> tuple[Any, ...]:
    """Equal for layers that are cut alike."""
    shapes = [(p, tuple(t.shape)) for p, t in layer.named_parameters()]
    return name, *shapes, *((p, type(m).__name__) for p, m in layer.named_modules())


def passed(x: Tensor, *_: Any, **__: Any) -> Tensor:
    return x


def run(model: Any, layers: nn.ModuleList, ids: Tensor, over: Collection[int]) -> None:
    """One forward; each layer's graph begins with it. over: layers that are passed over."""

    def enter(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        x = first_tensor(args, kwargs)
        return None if x is None else instead(args, kwargs, x, x.detach())

    for module in model.modules():
        if isinstance(module, Stub):
            module.inputs, module.outputs = [], []
    with ExitStack() as stack:
        for i, layer in enumerate(layers):
            stack.callback(layer.register_forward_pre_hook(enter, with_kwargs=True).remove)
            if i in over:
                layer.forward = passed
                stack.callback(layer.__dict__.pop, "forward", None)
        stack.enter_context(torch.enable_grad())
        model(input_ids=ids, use_cache=False)


def blocks(layer: nn.Module) -> Iterator[Block | Stack]:
    """One layer, after the run. What a linear is to be, where it could be several things, the twin decides."""
    stubs = {p: m for p, m in layer.named_modules() if isinstance(m, Stub) and len(m.inputs) == 1}
    others = {p: t for p, t in layer.named_parameters() if t.requires_grad}
    for path, stub in stubs.items():
        leaves = {p: m.outputs[0] for p, m in stubs.items() if m is not stub}
        if (found := block(path, stub.inputs[0], leaves, others)) is not None:
            yield found
    for path, module in layer.named_modules():
        if is_stack(module):
            yield Stack(path, module.num_experts)
            if not getattr(module, "has_post_expert_norm", False) and (cut := stack_block(path, module)) is not None:
                yield cut


def stack_block(path: str, host: Any) -> Block | None:
    """The projections of a stack, experts aside."""
    first = reader(path, Tap(path, host, "experts"))
    shape = getattr(host, first.rpartition(".")[2]).shape
    n = shape[-1] if host.is_transposed else shape[-2]
    rows = torch.randn(TOKENS, n, generator=torch.Generator().manual_seed(3)).requires_grad_()
    with torch.enable_grad():
        x = host._apply_gate(rows) if host.has_gate else host.act_fn(rows)
    found = block(f"{path}.down_proj", x, {first: rows}, {})
    return None if found is None else Block(found.reader, found.unit, found.units, found.makers, {}, stack=True)


def block(path: str, x: Tensor, linears: Mapping[str, Tensor], others: Mapping[str, Tensor]) -> Block | None:
    """x: what `path` reads -> its units with the rows that make them; None where x does not fall apart."""
    if not x.requires_grad:
        return None
    tried = Tried(x, {**linears, **others})
    for unit in tried.sizes(linears):
        found = tried.classes(unit)
        if found is None:
            continue
        makers = {p: runs for p, runs in found.items() if p in linears}
        if makers and not tried.matrices & set(found):
            params = {p: runs for p, runs in found.items() if p in others}
            return Block(path, unit, -(-x.shape[-1] // unit), makers, params)
    return None


class Tried:
    """Which elements of the leaves some channels of x are made of."""

    def __init__(self, x: Tensor, leaves: Mapping[str, Tensor]):
        self.x, self.k = x, x.shape[-1]
        self.weights = torch.rand(x.shape, generator=torch.Generator().manual_seed(2)) + 0.5
        self.names = list(leaves)
        self.matrices = {name for name, leaf in leaves.items() if isinstance(leaf, nn.Parameter) and leaf.dim() > 1}
        self.leaves = list(leaves.values())
        first = self.touched(slice(None))
        known = [i for i, name in enumerate(self.names) if name in first]
        self.names, self.leaves = [self.names[i] for i in known], [self.leaves[i] for i in known]

    def touched(self, channels: slice | Tensor) -> dict[str, Tensor]:
        """-> leaf -> [n] bool."""
        if not self.leaves:
            return {}
        z = (self.x[..., channels] * self.weights[..., channels]).sum()
        grads = torch.autograd.grad(z, self.leaves, retain_graph=True, allow_unused=True)
        found = zip(self.names, grads, strict=True)
        return {name: self.elements(name, g != 0) for name, g in found if g is not None}

    def elements(self, name: str, used: Tensor) -> Tensor:
        """Of a matrix of no linear: its rows."""
        return used.flatten(1).any(1) if name in self.matrices else used.reshape(-1, used.shape[-1]).any(0)

    def sizes(self, linears: Sequence[str] | Mapping[str, Tensor]) -> list[int]:
        """Lengths that units of channels may have, by where the rows of the first channel stop to matter."""
        first = self.touched(slice(1))
        found: dict[str, int] = {}
        for d in (d for d in range(1, self.k // 2 + 1) if self.k % d == 0):
            here, before = self.touched(slice(d, d + 1)), self.touched(slice(d - 1, d))
            for name in set(first) - set(found):
                apart = not bool((first[name] & here[name]).any())
                if apart and bool(first[name].any()) and bool((first[name] & before[name]).any()):
                    found[name] = d
            if {n for n in found if n in linears} >= set(linears) & set(first):
                break
        sizes = {size for name, size in found.items() if name in linears}
        if sizes == {1}:
            unit = gcd(self.k, RUN)
            while unit % 2 == 0 and self.k // unit < UNITS:
                unit //= 2
            return [unit]
        return sorted(sizes - {1})

    def one_by_one(self, unit: int) -> list[dict[str, Tensor]]:
        """What each unit touches."""
        return [self.touched(slice(start, start + unit)) for start in range(0, self.k, unit)]

    def apart(self, unit: int) -> list[dict[str, Tensor]]:
        """The same by the digits of units' numbers, if no two touch the same; else nothing."""
        units = torch.arange(self.k) // unit
        if (count := int(units[-1]) + 1) < 2:
            return []
        owner = {name: torch.zeros(len(seen), dtype=torch.int64) for name, seen in self.touched(slice(1)).items()}
        for digit in range((count - 1).bit_length()):
            ones, others = (self.touched((units >> digit & 1) == value) for value in (1, 0))
            if any(bool((ones[name] & others[name]).any()) for name in owner):
                return []
            for name, held in owner.items():
                held[ones[name]] |= 1 << digit
                held[~ones[name] & ~others[name]] = -1
        return [{name: held == u for name, held in owner.items()} for u in range(count)]

    def classes(self, unit: int) -> dict[str, tuple[Runs, ...]] | None:
        """Leaf -> the runs each unit needs, for leaves that not all units need whole; None: they overlap in part."""
        each = self.apart(unit) or self.one_by_one(unit)
        out: dict[str, tuple[Runs, ...]] = {}
        for name in self.names:
            masks = [found[name] for found in each]
            if all(torch.equal(mask, masks[0]) for mask in masks):
                continue
            runs = tuple(runs_of(mask) for mask in masks)
            distinct = list(dict(zip(runs, masks, strict=True)).values())
            if not bool((torch.stack(distinct).sum(0) == 1).all()):
                return None
            out[name] = runs
        return out
