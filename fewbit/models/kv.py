"""How a model caches its keys and values: the format that was asked for or declared, and where its scales come from.

Every attention module is given what its keys and values are rounded to (modules.attention.KV). An engine's cache holds
them as that says; elsewhere they are rounded and stay as they are, which is the same values.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from fewbit import codecs
from fewbit.errors import CheckpointError, RequestError, UnsupportedError
from fewbit.models import hf, kv_file
from fewbit.models.fill import Filler
from fewbit.modules import attention, paged
from fewbit.quant.elements import E4M3, E5M2, Element
from fewbit.quant.kv import KV_FORMATS, MEASURED, PLAIN, by_row, measured, whole
from fewbit.quant.qtensor import Planes
from fewbit.quant.spec import QuantSpec, describe
from fewbit.transforms import rotate

FROM = "fewbit_kv_from"  # attribute of a model: where the scales come from, in words
AT_CALL = "at each call"
FINDINGS = ("kv-scale", "kv-scale-missing")  # of verify; scales that were given stand for those of the checkpoint
Scales = Mapping[str, Mapping[str, Tensor]]  # attention module on disk -> {"k", "v"} -> scales


@dataclass(frozen=True, slots=True)
class Asked:
    """format: auto, a float type, or a name of KV_FORMATS. scales: a side file; scale: one number for every layer."""

    format: str = "auto"
    scales: str | None = None
    scale: float | None = None
    turn: bool = False  # by a Hadamard matrix before rounding

    def __post_init__(self) -> None:
        known = (*PLAIN, *KV_FORMATS)
        if self.format not in known:
            raise RequestError(f"kv_cache_dtype={self.format!r}: known are {', '.join(known)}")
        if self.scales is not None and self.scale is not None:
            raise RequestError("kv_scales and kv_scale: a file, or one number; not both")
        if self.scale is not None and not 0 < self.scale < float("inf"):
            raise RequestError(f"kv_scale={self.scale}: want a number above 0, such as 1.0")
        spec = KV_FORMATS.get(self.format)
        if spec is None and self.format != "auto" and (self.scales or self.scale or self.turn):
            raise RequestError(
                f"kv_cache_dtype={self.format!r} rounds nothing: leave out kv_scales, kv_scale, kv_rotate"
            )
        if spec is not None and spec.dynamic and self.scale is not None:
            raise RequestError(f"kv_scale: {self.format} chooses its scales as tokens are written; leave it out")

    @property
    def skipped(self) -> tuple[str, ...]:
        """Findings that no longer matter."""
        return FINDINGS if self.scale is not None or self.scales is not None else ()


@dataclass(frozen=True, slots=True)
class Found:
    """What it came to. scales: None where every module has the same, given or chosen at each call."""

    spec: QuantSpec
    origin: str
    scales: Scales | None = None
    given: float | None = None


def apply(model: nn.Module, source: codecs.Source, filler: Filler, asked: Asked | None = None) -> None:
    """Give attention modules the spec and the scales of their cache."""
    asked = asked or Asked()
    found = resolved(source, asked, model, filler.options.activations)
    setattr(model, FROM, found.origin if found is not None else "none")
    if found is None:
        return
    used = hf.attention_of(model)
    if used not in (attention.NAME, paged.NAME):
        what = "asked for" if asked.format != "auto" else "declared by the checkpoint"
        reason = f"the model runs on transformers' own {used} attention, where ours is not exact"
        raise UnsupportedError(f"a quantized KV cache is {what}", [reason])
    # a scale chosen over all that runs at once would depend on who that is
    spec = by_row(found.spec) if used == paged.NAME else found.spec
    for path, planes in placed(model, filler, found).items():
        setattr(model.get_submodule(path), attention.KV, (spec, *planes))
    if asked.turn:
        if any(not scale.dynamic for scale in spec.scales):
            reason = (
                f"{describe(spec)} has scales that were measured without it; nvfp4, mxfp4, int4 and int8 choose theirs"
            )
            raise UnsupportedError("kv_rotate: keys and values are turned before they are rounded", [reason])
        turn = Turn()
        for path in caching(model):
            setattr(model.get_submodule(path), attention.KV_TURN, turn)


def resolved(source: codecs.Source, asked: Asked, model: nn.Module, activations: str) -> Found | None:
    """None: nothing is rounded."""
    declared = source.plan.kv
    side = kv_file.read(asked.scales, model.config) if asked.scales is not None else None
    if asked.format == "auto":
        if side is not None:
            return Found(measured(KV_FORMATS[side.format], side.per_head), f"file {asked.scales}", side.scales)
        if declared is None or activations == "off":
            if asked.scale is not None or asked.turn:
                raise RequestError("kv_scale, kv_rotate: the checkpoint declares no format of the KV cache; name one, "
                                   "such as --kv-cache-dtype fp8")  # fmt: skip
            return None
        if asked.scale is not None:
            return _given(declared, asked.scale)
        if all(scale.dynamic for scale in declared.scales):
            return Found(declared, AT_CALL)
        return _stored(source, declared, declared.element)
    spec = KV_FORMATS.get(asked.format)
    if spec is None:
        return None
    if side is not None:
        if asked.format not in MEASURED:
            raise RequestError(f"kv_scales: {asked.format} chooses its scales as tokens are written; leave it out")
        scales = rescaled(side.scales, KV_FORMATS[side.format].element, spec.element)
        return Found(measured(spec, side.per_head), f"file {asked.scales}", scales)
    if spec.dynamic:
        return Found(spec, AT_CALL)
    if asked.scale is not None:
        return _given(spec, asked.scale)
    if source.kv:
        made_for = declared.element if declared is not None and whole(declared) else E4M3
        return _stored(source, spec, made_for)
    if spec.element == E5M2:  # reaches 57344, beyond any key or value
        return Found(spec, "1.0, as e5m2 needs no other", given=1.0)
    raise RequestError(
        f"kv_cache_dtype={asked.format!r}: {source.path} holds no scales for it. What works: --kv-scale 1.0 "
        f"(kv_scale=1.0), which cuts off values beyond {spec.element.max:g}; or measuring them: fewbit calibrate "
        f"{source.path} --kv {asked.format} -o scales.safetensors, then --kv-scales scales.safetensors; or int8, "
        "which needs none"
    )


def _given(spec: QuantSpec, scale: float) -> Found:
    if not whole(spec) or spec.dynamic:
        raise RequestError(f"kv_scale: {describe(spec)} chooses its scales as tokens are written; leave it out")
    return Found(measured(spec), f"{scale}, given", given=scale)


def _stored(source: codecs.Source, spec: QuantSpec, made_for: Element) -> Found:
    """The checkpoint's, for codes of another element where that is what they are used with."""
    if not source.kv:
        raise CheckpointError(
            f"{source.path}: declares KV scales, and no tensor holds any; --kv-scale 1.0 takes that for all"
        )
    scales = {name: stored(source, name) for name in source.kv}
    if made_for != spec.element or spec != source.plan.kv:
        heads = any(t.numel() > 1 for held in scales.values() for t in held.values())
        spec = measured(spec, heads)
    return Found(spec, "checkpoint", rescaled(scales, made_for, spec.element))


def rescaled(scales: Scales, made_for: Element, used: Element) -> Scales:
    """Scales reach as far with the other element."""
    if made_for.max == used.max:
        return scales
    return {name: {of: t * (made_for.max / used.max) for of, t in held.items()} for name, held in scales.items()}


def stored(source: codecs.Source, name: str) -> dict[str, Tensor]:
    """The scales of one attention module in the checkpoint."""
    held, out = source.kv[name], {}
    for of in ("k", "v"):
        tensor = held.get(of, held.get("kv"))
        if tensor is None:
            raise CheckpointError(f"{name}: no {of} scale of the KV cache; found {', '.join(held.values())}")
        out[of] = torch.as_tensor(source.checkpoint.read(tensor)).float()
        if not kv_file.sound(out[of]):
            raise CheckpointError(
                f"{tensor}: a KV scale must be finite and above 0, found {out[of].flatten()[:4].tolist()}; "
                "--kv-scale 1.0 takes that for all"
            )
    return out


def placed(model: nn.Module, filler: Filler, found: Found) -> dict[str, tuple[Planes, Planes]]:
    """Attention module in the model -> planes of its keys and of its values."""
    level = next((i for i in reversed(range(len(found.spec.scales))) if not found.spec.scales[i].dynamic), None)
    if found.scales is None:
        one = {} if found.given is None else {f"scale{level}": torch.full((1, 1), found.given, device=filler.device)}
        return dict.fromkeys(caching(model), (one, one))
    out = {}
    for name, held in found.scales.items():
        k, v = ({f"scale{level}": _plane(held[of], filler.device)} for of in ("k", "v"))
        out[attention_path(name, filler)] = k, v
    if missing := lacking(model, out):
        raise CheckpointError(
            f"no KV scales ({found.origin}) for {', '.join(missing)}; --kv-scale 1.0 takes that for all"
        )
    return out


def _plane(scale: Tensor, device: torch.device) -> Tensor:
    return (scale.reshape(1, 1) if scale.numel() == 1 else scale.reshape(-1, 1, 1)).to(device)


def lacking(model: nn.Module, having: Iterable[str]) -> list[str]:
    """Modules of the kinds of those that have scales, and which have none."""
    kinds = {_kind(model.get_submodule(path)) for path in having}
    return [path for path, module in model.named_modules() if _kind(module) in kinds and path not in having]


def _kind(module: nn.Module) -> tuple[type, frozenset[str]]:
    return type(module), frozenset(name for name, _ in module.named_children())


def caching(model: nn.Module) -> list[str]:
    """Modules that may keep keys and values, those that know their layer; whoever does not looks at none of it."""
    found = [path for path, module in model.named_modules() if isinstance(getattr(module, "layer_idx", None), int)]
    if not found:
        raise UnsupportedError("a quantized KV cache", [f"no module of {type(model).__name__} keeps one by layer"])
    return found


def attention_path(name: str, filler: Filler) -> str:
    """An attention module's path in the model, by way of a projection in it."""
    asked = [f"{name}.{leaf}.weight" for leaf in ("k_proj", "qkv_proj", "kv_b_proj", "o_proj")]
    places = [p for p in filler.rules.place(asked).values() if p is not None]
    if not places:
        raise CheckpointError(f"{name}: has KV scales, and no attention of the model has that name")
    return places[0].target.rsplit(".", 2)[0]


class Turn:
    """x [..., D] -> x Q in float32, by a Hadamard matrix of its size; with back=True, x Q^T. Made when first met."""

    def __init__(self) -> None:
        self._held: dict[tuple[int, torch.device], Tensor] = {}

    def __call__(self, x: Tensor, back: bool = False) -> Tensor:
        key = x.shape[-1], x.device
        if key not in self._held:
            self._held[key] = rotate.matrix(rotate.rotation(key[0]), torch.float32).to(x.device)
        matrix = self._held[key]
        return (x.float() @ (matrix.T if back else matrix)).to(x.dtype)
