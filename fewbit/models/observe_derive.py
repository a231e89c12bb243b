"""What an input is made of, by derivatives: whatever the code between two modules looks like, they say what it does."""

import warnings
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from fewbit.models.observe_taps import Tap
from fewbit.models.observe_values import LAYOUTS, Source

LIMIT = 1e-4
PROBES = 3  # channels looked at first
HEADS = ("v_head_dim", "head_dim", "head_size", "attention_head_size", "d_kv")  # attributes that say a head's size


def carries(y: Tensor | None, leaf: Tensor | None) -> bool:
    """True when y is, token by token, leaf times a number, plus what does not depend on leaf."""
    if y is None or leaf is None or not y.requires_grad or y.numel() != leaf.numel() or y.shape[-1] != leaf.shape[-1]:
        return False
    u = torch.randn(y.shape, generator=torch.Generator().manual_seed(1), dtype=y.dtype)
    (g,) = torch.autograd.grad(y, leaf, u, retain_graph=True, allow_unused=True)
    if g is None:
        return False
    u, g = u.reshape(-1, u.shape[-1]), g.reshape(-1, u.shape[-1])
    factor = (u * g).sum(-1, keepdim=True) / (u * u).sum(-1, keepdim=True)
    return bool(g.norm() > 0) and bool((g - factor * u).norm() <= LIMIT * g.norm())


def made_of(x: Tensor, taps: Iterable[Tap]) -> dict[str, Tensor]:
    """The taps whose outputs make x channel by channel: each channel one output times what does not depend on it.

    -> path -> [K] long, the output that makes each channel.
    """
    if not x.requires_grad:
        return {}
    flat = x.reshape(-1, x.shape[-1])
    weights = torch.rand(len(flat), generator=torch.Generator().manual_seed(2), dtype=x.dtype) + 0.5
    z = (weights[:, None] * flat).sum(0)
    asked = [tap for tap in taps if len(tap.scales) == 1 and tap.kind in ("norm", "linear")]
    known = torch.autograd.grad(z.sum(), [t.scales[0] for t in asked], retain_graph=True, allow_unused=True)
    asked = [tap for tap, g in zip(asked, known, strict=True) if g is not None and bool((g != 0).any())]
    for channel in z[:: max(1, len(z) // PROBES)] if asked else ():
        parts = torch.autograd.grad(channel, [t.scales[0] for t in asked], retain_graph=True)
        asked = [tap for tap, part in zip(asked, parts, strict=True) if bool(near(part, channel.detach()).any())]
        if not asked:
            return {}
    if not asked:
        return {}
    jacobians = derivatives(z, [t.scales[0] for t in asked])
    found = {tap.path: single(jacobian, z) for tap, jacobian in zip(asked, jacobians, strict=True)}
    return {path: index for path, index in found.items() if index is not None}


def derivatives(z: Tensor, by: Sequence[Tensor]) -> list[Tensor]:
    """z: [K] -> for each of `by` [N], [K, N]; all rows at once where torch can, which long loops over time need."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch names the operations that it does one by one
            return list(torch.autograd.grad(z, by, torch.eye(len(z)), retain_graph=True, is_grads_batched=True))
    except RuntimeError:
        rows = [torch.autograd.grad(c, by, retain_graph=True) for c in z]
        return [torch.stack(column) for column in zip(*rows, strict=True)]


def single(jacobian: Tensor, z: Tensor) -> Tensor | None:
    """jacobian: [K, N]; which output each channel is in proportion to, where none of these outputs has a second part.

    Other outputs may matter in other ways: gates beside what they gate, queries and keys beside values.
    """
    z = z.detach()
    index = (jacobian - z[:, None]).abs().argmin(-1)
    if not bool(near(jacobian.gather(-1, index[:, None]), z[:, None]).all()) or bool((z == 0).all()):
        return None
    rows, place = index.unique(return_inverse=True)
    rest = jacobian[:, rows].scatter_add(-1, place[:, None], -z[:, None])
    return None if bool(rest.abs().amax() > LIMIT * z.abs().amax()) else index


def near(part: Tensor, z: Tensor) -> Tensor:
    """Where a derivative is the value itself."""
    return (part - z).abs() <= LIMIT * (10 * z.abs() + z.abs().amax() / 100)


def gate_rows(host: Any, n: int) -> Tensor | None:
    """Which of the n rows of a stack's first projection makes each channel of its second."""
    rows = torch.randn(16, n, generator=torch.Generator().manual_seed(3))
    scale = torch.ones(n, requires_grad=True)
    with torch.enable_grad():
        x = rows * scale
        z = (host._apply_gate(x) if host.has_gate else host.act_fn(x)).sum(0)
    return single(derivatives(z, [scale])[0], z)


def fit(index: Tensor, n: int, layer: nn.Module, path: str) -> Source | None:
    """The rows [K] as a Source of sizes that other sizes can be put into."""
    k, distinct = len(index), len(index.unique())
    if k % distinct:
        return None
    options = [(1, 0, "")] if distinct == k else []
    options += [(k // distinct, size, name) for name, size in head_sizes(layer, path) if distinct % size == 0]
    for repeat, block, name in options:
        for layout in LAYOUTS:
            source = Source("linear", path, 0, layout, repeat, block, 0, name)
            if (n == distinct) == (layout == "all") and torch.equal(source.rows(n, k), index):
                return source
    return None


def head_sizes(layer: nn.Module, path: str) -> list[tuple[str, int]]:
    """What the modules around one say a head's size is, nearest first."""
    found: dict[str, int] = {}
    while path:
        path = path.rpartition(".")[0]
        module = layer.get_submodule(path)
        for name in HEADS:
            value = getattr(module, name, None)
            if isinstance(value, int) and value > 1:
                found.setdefault(name, value)
    return list(found.items())
