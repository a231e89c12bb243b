"""The state of quantizers by ModelOpt's names: the largest magnitudes, and what else stands beside weights.

Written as HF exports write it, `model.layers.0.self_attn.q_proj.input_quantizer._amax`; read also as vLLM spells it,
with fused linears (qkv_proj, gate_up_proj, experts.w13_), and as Megatron's exports do. Scales are made of magnitudes
here, so that a model serves the same from a file and straight from calibration.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from fewbit.compat.insert import CACHE, OTHERS, weights
from fewbit.compat.quantizer import Quantizer, by_rule
from fewbit.errors import CheckpointError
from fewbit.modules.attention import is_attention
from fewbit.quant import elements
from fewbit.quant.blocks import over
from fewbit.quant.qtensor import Planes, grid
from fewbit.quant.spec import QuantSpec

AMAX, GLOBAL, SMOOTH, BIAS = "_amax", "_global_amax", "_pre_quant_scale", "_bias_value"
LORA = ("svdquant_lora_a", "svdquant_lora_b")
State = dict[str, Tensor]
FUSED = {"q_proj": "qkv_proj", "k_proj": "qkv_proj", "v_proj": "qkv_proj", "gate_proj": "gate_up_proj",
         "up_proj": "gate_up_proj"}  # fmt: skip
ORDER = {"qkv_proj": ("q_proj", "k_proj", "v_proj"), "gate_up_proj": ("gate_proj", "up_proj")}
EXPERT = re.compile(r"(.*)\.(\d+)\.(\w+)$")
STACKED = {"gate_up_proj": ("w13", ("gate_proj", "up_proj")), "up_proj": ("w13", ("up_proj",)),
           "down_proj": ("w2", ("down_proj",))}  # fmt: skip


def state_of(model: nn.Module, prefix: str = "") -> State:
    """What the quantizers of a calibrated model hold. prefix: of the model's own path."""
    found: State = {}
    for path, name, module, weight, inputs in weights(model):
        pair = {"weight": _magnitudes(weight), "input": _magnitudes(inputs)}
        if inputs._pre_quant_scale is not None:
            pair["input"][SMOOTH] = inputs._pre_quant_scale
        pair["weight"] |= {n: t for n in LORA if (t := getattr(module, n, None)) is not None}
        for role, held in pair.items():
            if name == "weight":
                found |= {f"{prefix}{path}.{role}_quantizer.{n}": t for n, t in held.items()}
            else:
                for suffix, value in held.items():
                    found |= _of_experts(f"{prefix}{path}", name, role, suffix, value, module.num_experts)
    for path, module in model.named_modules():
        for leaf in (*CACHE, OTHERS[0]) if is_attention(module) else ():
            quantizer = getattr(module, leaf, None)
            if quantizer is not None and quantizer.enabled:
                held = _magnitudes(quantizer)
                if quantizer.affine:
                    held[BIAS] = quantizer._bias_value[None]
                found |= {f"{prefix}{path}.{leaf}.{n}": t for n, t in held.items()}
    return {key: t.detach().cpu().clone().contiguous() for key, t in found.items()}


def _of_experts(path: str, name: str, role: str, suffix: str, value: Tensor, count: int) -> State:
    """One number for each expert goes by the names of its projections, anything else by the name of the stack."""
    if value.numel() not in (1, count) or suffix not in (AMAX, GLOBAL):
        return {f"{path}.{name}_{role}_quantizer.{suffix}": value}
    each = value.reshape(-1).expand(count)
    return {f"{path}.{e}.{leaf}.{role}_quantizer.{suffix}": each[e]
            for e in range(count) for leaf in STACKED[name][1]}  # fmt: skip


def _magnitudes(q: Quantizer) -> State:
    """The largest magnitudes that the static scales of a quantizer stand for, shaped as ModelOpt shapes them."""
    spec, planes = q.spec, q.planes
    if spec is None or not q.enabled or not planes:
        return {}
    if len(spec.scales) == 1:
        scale = elements.decode(planes["scale0"], spec.scales[0].element)
        return {AMAX: _shaped(_unscaled(scale, spec.element.max), spec)}
    whole = _unscaled(planes["scale1"], q.outer or _top(spec))
    if "scale0" not in planes:
        return {AMAX: whole.reshape(whole.shape[:-2])}
    amax = elements.decode(planes["scale0"], spec.scales[0].element) * planes["scale1"] * spec.element.max
    return {AMAX: _shaped(amax, spec), GLOBAL: whole.reshape(whole.shape[:-2])}


def _top(spec: QuantSpec) -> float:
    """What the outer scale of two brings to 1."""
    return spec.element.max * (256.0 if spec.rule == "four-over-six" else spec.scales[0].element.max)


def _unscaled(scale: Tensor, number: float) -> Tensor:
    """What gives exactly this scale when it is divided by the number."""
    near = scale * number
    below, above = (near.nextafter(near.new_tensor(end)) for end in (0.0, float("inf")))
    for other in (below, above):
        near = torch.where(over(near, number) == scale, near, other)
    return near


def _shaped(amax: Tensor, spec: QuantSpec) -> Tensor:
    """[*, R, C] -> a number, [N, 1], [N * C, 1], or [R, 1, C, 1] for blocks of several rows."""
    rows, cols = spec.scales[0].block
    lead = amax.shape[:-2]
    if (rows, cols) == (0, 0):
        return amax.reshape(lead)
    if rows > 1:
        return amax[..., :, None, :, None]
    return amax.reshape(*lead, -1, 1)


@dataclass(slots=True)
class Reader:
    """A state by names of whichever kind. What has been taken is noted: what is left over is said."""

    tensors: Mapping[str, Tensor]
    where: str
    taken: set[str] = field(default_factory=set)

    def get(self, *keys: str) -> Tensor | None:
        for key in keys:
            if key in self.tensors:
                self.taken.add(key)
                return self.tensors[key]
        return None

    @property
    def left(self) -> list[str]:
        return sorted(self.tensors.keys() - self.taken)

    def linear(self, path: str, role: str, suffix: str, rows: Mapping[str, int]) -> Tensor | None:
        """Of a linear, or its part of what engines fuse. rows: outputs of it and its siblings, by path."""
        parent, _, leaf = path.rpartition(".")
        own = self.get(f"{path}.{role}_quantizer.{suffix}")
        if own is not None or leaf not in FUSED:
            return own
        whole = self.get(f"{parent}.{FUSED[leaf]}.{role}_quantizer.{suffix}")
        if whole is None or role == "input" or whole.numel() == 1:
            return whole
        names = [f"{parent}.{name}" for name in ORDER[FUSED[leaf]]]
        total, start = sum(rows[n] for n in names), sum(rows[n] for n in names[: names.index(path)])
        if len(whole) % total:
            raise CheckpointError(f"{self.where}: {parent}.{FUSED[leaf]} has {len(whole)} magnitudes for {total} rows")
        each = len(whole) // total
        return whole[start * each : (start + rows[path]) * each]

    def stack(self, host: str, name: str, role: str, suffix: str, others: Sequence[str], count: int) -> Tensor | None:
        """Of a stack of experts: one tensor for all, or what its experts' projections have. others: names on disk."""
        hosts = list(dict.fromkeys([host, *(m[1] for n in others if (m := EXPERT.match(n)))]))
        for at in hosts:
            short = f"{STACKED[name][0]}_{role}_quantizer.{suffix}"
            found = self.get(f"{at}.{name}_{role}_quantizer.{suffix}", f"{at}.{name}.{role}_quantizer.{suffix}",
                             f"{at}.{short}", f"{at}.routed_experts.{short}")  # fmt: skip
            if found is not None:
                return found
        held: dict[int, list[Tensor]] = {}
        named = [f"{at}.{e}.{leaf}" for at in hosts for e in range(count) for leaf in STACKED[name][1]]
        for each in dict.fromkeys([*named, *others]):
            if (match := EXPERT.match(each)) and (t := self.get(f"{each}.{role}_quantizer.{suffix}")) is not None:
                held.setdefault(int(match[2]), []).append(t.float().reshape(-1))
        if not held:
            return None
        if missing := sorted(set(range(count)) - held.keys()):
            raise CheckpointError(f"{self.where}: {host}: experts {missing[:4]} have no {role}_quantizer.{suffix}")
        if suffix == SMOOTH:
            return torch.stack([held[e][0] for e in range(count)])
        return torch.stack([torch.stack([t.amax() for t in held[e]]).amax() for e in range(count)])

    def attention(self, path: str, leaf: str, suffix: str) -> Tensor | None:
        return self.get(f"{path}.{leaf}.{suffix}", f"{path}.attn.{leaf}.{suffix}")


def planes_of(
    spec: QuantSpec, amax: Tensor, whole: Tensor | None, shape: Sequence[int], where: str, outer: float = 0.0
) -> Planes:
    """The static planes of a spec that magnitudes stand for. shape: [*, N, K] of what is rounded."""
    if by_rule(spec):
        return {}
    amax = amax.float()
    if not bool(amax.isfinite().all()) or bool((amax < 0).any()):
        raise CheckpointError(f"{where}: a largest magnitude must be finite and not below 0")
    if len(spec.scales) == 1 or whole is not None:
        cells = grid(tuple(shape), spec.scales[0].block)
        amax = _cells(amax, tuple(shape[:-2]), cells, where)
    maker = Quantizer(spec, outer=outer)
    if len(spec.scales) == 1:
        maker.hold(amax)
        return maker.planes
    maker.hold((amax if whole is None else whole.float()).reshape(-1, 1, 1).squeeze(0))
    planes = maker.planes
    if whole is not None:
        ideal = (amax / (spec.element.max * planes["scale1"])).clamp(2.0**-9, spec.scales[0].element.max)
        planes["scale0"] = elements.encode(torch.where(amax > 0, ideal, 1.0), spec.scales[0].element)
    return planes


def _cells(amax: Tensor, lead: tuple[int, ...], cells: tuple[int, int], where: str) -> Tensor:
    wanted = cells[0] * cells[1]
    for e in lead:
        wanted *= e
    if amax.numel() == wanted:
        return amax.reshape(*lead, *cells)
    if lead and amax.numel() in (1, lead[0]):
        return amax.reshape(-1, 1, 1).expand(*lead, *cells)
    if amax.numel() == 1:
        return amax.reshape(1, 1)
    raise CheckpointError(f"{where}: {list(amax.shape)} magnitudes for blocks of {[*lead, *cells]}")


def normalized(tree: Mapping[str, Any]) -> State:
    """A file's tensors by flat names: dicts in dicts, Megatron's `quantizer_amax`, prefixes of wrappers."""
    out: State = {}

    def walk(prefix: str, value: Any) -> None:
        if isinstance(value, Mapping):
            for name, inner in value.items():
                walk(f"{prefix}.{name}" if prefix else str(name), inner)
        elif isinstance(value, Tensor):
            name = prefix.replace("quantizer_amax", "quantizer._amax").replace("quantizer._quantizer.", "quantizer.")
            out[re.sub(r"^(module\.|modelopt_state_weights\.)+", "", name)] = value

    walk("", tree)
    return out
