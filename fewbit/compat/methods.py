"""What ModelOpt's algorithms do to weights and their scales, by way of ours where we have one of that name."""

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

from fewbit.algos import get
from fewbit.algos.algo import Stats, options
from fewbit.compat.group import Group, Weight, share_weights
from fewbit.compat.insert import assign_matrix, matrix
from fewbit.compat.quantizer import Quantizer, block_amax, by_rule, inner_plane
from fewbit.errors import RequestError, UnsupportedError
from fewbit.quant import elements
from fewbit.quant.blocks import blocked
from fewbit.quant.qtensor import Planes, QTensor, stack
from fewbit.quant.reference import assign, decode

METHODS: dict[str, tuple[str, ...]] = {  # method -> the options it takes
    "max": ("distributed_sync",),
    "mse": ("step_size", "start_multiplier", "stop_multiplier", "fp8_scale_sweep", "distributed_sync"),
    "local_hessian": ("fp8_scale_sweep", "block_size", "distributed_sync"),
    "smoothquant": ("alpha",),
    "awq_lite": ("alpha_step",),
    "awq_clip": ("max_co_batch_size", "max_tokens_per_batch", "min_clip_ratio", "shrink_step"),
    "awq_full": ("alpha_step", "max_co_batch_size", "max_tokens_per_batch", "min_clip_ratio", "shrink_step"),
    "svdquant": ("lowrank", "alpha_step"),
    "gptq": ("perc_damp", "block_size"),
}
SPELLED = {"perc_damp": "damp", "block_size": "block", "min_clip_ratio": "clip"}  # options that ours have too
NEED_STATS = ("local_hessian", "smoothquant", "awq_lite", "awq_clip", "awq_full", "svdquant", "gptq")


def method_of(algorithm: Any) -> tuple[str | None, dict[str, Any]]:
    """ "max" | {"method": "awq_lite", ...} | None -> method and options."""
    told: dict[str, Any] = dict(algorithm) if isinstance(algorithm, Mapping) else {"method": algorithm}
    method = told.pop("method", None)
    if method is None and not told:
        return None, {}
    if method not in METHODS:
        raise UnsupportedError(f"algorithm {method!r} is not known", [f"known: {', '.join(METHODS)}, None"])
    if unknown := sorted(set(told) - set(METHODS[method])):
        known = ", ".join(METHODS[method])
        raise RequestError(f"algorithm {method}: unknown option {', '.join(unknown)}; it has {known}")
    return method, told


def scale_weights(group: Group, method: str, told: Mapping[str, Any]) -> None:
    """What the method does to the weights of a group, then their static scales."""
    stats = group[0].input.stats.stats(group[0].path) if group[0].input.stats is not None else None
    active = [w for w in group if w.quantizer.enabled]
    if active and stats is not None:
        if method in ("smoothquant", "awq_lite", "awq_full", "svdquant"):
            stats = smooth(group, active, stats, method, told)
        if method == "svdquant":
            low_rank(active, int(told.get("lowrank", 32)))
    for w in active:
        assert w.quantizer.spec is not None
        w.quantizer.hold(block_amax(matrix(w.module, w.name), w.quantizer.spec))
    share_weights(active)
    if method in ("awq_clip", "awq_full", "gptq"):
        encoded(active, stats, method, told)
    elif method in ("mse", "local_hessian"):
        search(active, stats, told, method == "mse")
    for w in group:
        w.input.stats = None


def smooth(group: Group, active: Group, stats: Stats, method: str, told: Mapping[str, Any]) -> Stats:
    """Scale the weights of a group and its input against each other; -> what the scaled input looks like."""
    if method == "smoothquant":
        algo, given = get("smooth"), {"alpha": float(told.get("alpha", 1.0))}
    else:
        algo, given = get("awq"), {"steps": round(1 / float(told.get("alpha_step", 0.1)))}
    members = [m for w in active for m in w.members]
    specs = [w.quantizer.spec for w in active for _ in w.members]
    act = group[0].input.spec if group[0].input.enabled else None
    assert algo.scale is not None
    s = algo.scale(members, specs, act, stats, options(algo, given), None)  # type: ignore[arg-type]
    pre = (1 / s).to(matrix(group[0].module, group[0].name).dtype)
    for w in group:
        w.input._pre_quant_scale = pre
        assign_matrix(w.module, w.name, matrix(w.module, w.name).float() / pre.float())
        if w.input.amax is not None:
            w.input.amax = (stats.amax * pre.float()).amax().view(1, 1)
    return scaled_stats(stats, pre.float())


def scaled_stats(stats: Stats, by: Tensor) -> Stats:
    return Stats(
        stats.tokens, stats.amax * by, stats.mean * by, stats.square * by**2,
        None if stats.hessian is None else stats.hessian * by * by[:, None],
        None if stats.sample is None else stats.sample * by,
    )  # fmt: skip


def low_rank(group: Group, rank: int) -> None:
    """The largest singular values of each weight leave it for a branch of their own."""
    for w in group:
        if w.name != "weight":
            raise UnsupportedError(f"svdquant of {w.path}", ["a stack of experts has no place for low-rank factors"])
        u, d, v = torch.linalg.svd(w.members[0], full_matrices=False)
        dtype = w.module.weight.dtype
        b, a = (u[:, :rank] * d[:rank]).to(dtype), v[:rank].to(dtype)
        w.module.register_buffer("svdquant_lora_a", a)
        w.module.register_buffer("svdquant_lora_b", b)
        assign_matrix(w.module, "weight", w.members[0] - b.float() @ a.float())


def encoded(group: Group, stats: Stats | None, method: str, told: Mapping[str, Any]) -> None:
    """Scales (and with gptq values) that one of our algorithms chooses."""
    algo = get("gptq" if method == "gptq" else "awq")
    given = {ours: told[theirs] for theirs, ours in SPELLED.items() if theirs in told}
    if "shrink_step" in told:
        given["clip_steps"] = round((1 - given.get("clip", 0.5)) / told["shrink_step"])
    for part in [group] if all(w.name == "weight" for w in group) else [[w] for w in group]:
        members = [[m] for w in part for m in w.members] if part[0].name != "weight" else [[w.members[0] for w in part]]
        specs = [w.quantizer.spec for w in part]
        found = [q.weight for ms in members for q in algo.encode(ms, specs[: len(ms)], stats, options(algo, given))]  # type: ignore[arg-type]
        if part[0].name != "weight":
            take(part[0], stack(found), method == "gptq")
        else:
            for w, q in zip(part, found, strict=True):
                take(w, q, method == "gptq")


def take(w: Weight, q: QTensor, values: bool) -> None:
    w.quantizer.planes = {n: plane for n, plane in q.planes.items() if n.startswith("scale")}
    if values:
        w.quantizer.chosen = q
        assign_matrix(w.module, w.name, decode(q))


def search(group: Group, stats: Stats | None, told: Mapping[str, Any], plain: bool) -> None:
    """Per block the scale that loses least: by squares, or by what the inputs make of them (local_hessian)."""
    for w in group:
        spec, m = w.quantizer.spec, matrix(w.module, w.name).detach().float()
        assert spec is not None
        if by_rule(spec) or m.dim() == 3:
            continue
        metric = None if plain or stats is None else _diagonal(stats.hessian, spec.scales[0].block[1])  # type: ignore[arg-type]
        w.quantizer.planes = best_planes(m, w.quantizer, candidates(w.quantizer, m, told), metric)


def candidates(quantizer: Quantizer, w: Tensor, told: Mapping[str, Any]) -> Iterable[Planes]:
    """Planes to try: every scale that E4M3 holds, or the largest magnitude times some factors."""
    spec, held = quantizer.spec, quantizer.planes
    assert spec is not None
    top = blocked(w.abs(), spec.scales[0].block).amax((-3, -1))
    if len(spec.scales) == 2 and told.get("fp8_scale_sweep"):
        for code in range(1, 127):
            yield held | {"scale0": torch.full(top.shape, code, dtype=torch.uint8, device=top.device)}
        return
    start, stop = float(told.get("start_multiplier", 0.25)), float(told.get("stop_multiplier", 4.0))
    step = float(told.get("step_size", 0.1))
    for i in range(int((stop - start) / step + 1e-6) + 1):
        amax = top * (start + i * step)
        if len(spec.scales) == 1:
            yield inner_plane(spec, amax)
        else:
            ideal = (amax / (spec.element.max * held["scale1"])).clamp(2.0**-9, 448.0)
            yield held | {"scale0": elements.encode(torch.where(amax > 0, ideal, 1.0), spec.scales[0].element)}


def best_planes(w: Tensor, quantizer: Quantizer, tried: Iterable[Planes], metric: Tensor | None) -> Planes:
    spec = quantizer.spec
    assert spec is not None
    best: Planes = {}
    least = torch.empty(0)
    for planes in tried:
        d = blocked(decode(assign(w, spec, planes)) - w, spec.scales[0].block)  # [R, rows, C, cols]
        error = d.square().sum((-3, -1)) if metric is None else torch.einsum("racx,cxy,racy->rc", d, metric, d)
        if not best:
            best, least = dict(planes), error
        gain = error < least
        least = torch.where(gain, error, least)
        best["scale0"] = torch.where(gain, planes["scale0"], best["scale0"])
    return best


def _diagonal(hessian: Tensor, cols: int) -> Tensor:
    """The blocks [C, cols, cols] along the diagonal."""
    pieces = blocked(hessian, (cols, cols))
    return pieces.diagonal(dim1=0, dim2=2).permute(2, 0, 1).contiguous()
