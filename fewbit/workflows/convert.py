"""convert: any dialect to any that can hold the format, with proof; nothing is written before the proof is whole.

Two passes over the source, one module at a time. The first recasts every module, compares what it decodes to before and
after, and learns the layout; the second writes. A conversion that needs new codes is refused unless asked for.
"""

import json
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fewbit import codecs
from fewbit.codecs.codec import Codec
from fewbit.codecs.source import Source
from fewbit.errors import UnsupportedError
from fewbit.files.writer import SafetensorsWriter
from fewbit.models.finding import refuse_on_errors
from fewbit.models.values import sibling_groups
from fewbit.models.verify import dense_linears, verify_source
from fewbit.quant import qtensor
from fewbit.quant.formats import FORMATS, get
from fewbit.quant.qtensor import QTensor, Quantized
from fewbit.quant.recast import recast
from fewbit.quant.reference import choose, decode, encode
from fewbit.quant.spec import Format, describe

DTYPES = {"bf16": torch.bfloat16, "f16": torch.float16, "f32": torch.float32}
ON_DISK = {torch.bfloat16: "BF16", torch.float16: "F16", torch.float32: "F32", torch.uint8: "U8", torch.int8: "I8",
           torch.int32: "I32", torch.int64: "I64", torch.float8_e4m3fn: "F8_E4M3", torch.float8_e5m2: "F8_E5M2",
           torch.int16: "I16", torch.float64: "F64", torch.bool: "BOOL", torch.float8_e8m0fnu: "F8_E8M0"}  # fmt: skip
ROUNDING = 2.0**-10  # what a scale may lose to its new float type, of the tensor's largest value
COPIED = ("tokenizer", "special_tokens", "added_tokens", "vocab", "merges", "generation_config", "chat_template")
Progress = Callable[[Iterable[str], str], Iterable[str]]


@dataclass(frozen=True, slots=True)
class ModuleProof:
    """One module before and after."""

    name: str
    source: str
    target: str
    codes_equal: bool
    difference: float  # largest of the decoded weights, relative to the tensor's largest value
    error: float  # relative Frobenius norm of the difference: what requantizing cost


@dataclass(frozen=True, slots=True)
class Conversion:
    """What convert did, and the proof of it."""

    source: Path
    out: Path
    dialect: str
    modules: tuple[ModuleProof, ...]
    dense: int
    files: tuple[str, ...] = field(default=())

    @property
    def codes_equal(self) -> bool:
        return all(m.codes_equal for m in self.modules)

    @property
    def difference(self) -> float:
        return max((m.difference for m in self.modules), default=0.0)


def quiet(names: Iterable[str], label: str) -> Iterable[str]:
    return names


def convert(
    src: str | Path,
    out: str | Path,
    to: str,
    *,
    requantize: bool | str = False,
    dtype: str | None = None,
    max_shard: int = 5_000_000_000,
    overwrite: bool = False,
    progress: Progress = quiet,
) -> Conversion:
    """Rewrite a checkpoint in another dialect.

    to: a dialect of `fewbit.dialects()`, or "dense". requantize: allow new codes where the old ones do not carry over,
    in the nearest format the dialect holds, or in the one named (dense linears too, head and routers aside).
    dtype: bf16 | f16 | f32, of `to="dense"`.
    """
    with codecs.open(src) as source:
        refuse_on_errors(source.path, verify_source(source))
        name = to.replace("_", "-")
        if name == "gguf":
            return _to_gguf(source, Path(out), requantize, overwrite, progress)
        if name == "dense":
            return _to_dense(source, Path(out), dtype, max_shard, overwrite, progress)
        if name not in codecs.CODECS:
            known = ", ".join(sorted([*codecs.CODECS, "gguf"]))
            raise UnsupportedError(f"dialect {to!r} is not known", [f"known: {known}"])
        return _to_codec(source, Path(out), codecs.CODECS[name], requantize, max_shard, overwrite, progress)


def _to_codec(
    source: Source, out: Path, codec: Codec, requantize: bool | str, max_shard: int, overwrite: bool, progress: Progress
) -> Conversion:
    if codec.fit is None or codec.write is None or codec.config is None:
        raise UnsupportedError(f"{codec.name} can be read, not written", [codec.summary])
    items = _items(source, requantize)
    outer = _shared_outer(source, items, codec, requantize)
    proofs, formats, layout = [], {}, {}
    for name in progress(items, "proving"):
        old = source.read(items[name])
        new = _refit(name, old, codec, requantize, outer)
        tensors = codec.write(new)
        back = codec.read(new.format, tensors)  # what a reader will see is what must be equal
        proofs.append(_compare(name, old, back))
        formats[name] = new.format
        for ending, tensor in tensors.items():
            layout[name + ending] = ON_DISK[tensor.dtype], tuple(tensor.shape)
    _refuse_inexact(proofs, requantize)
    dense = [name for name in source.dense if name not in items.values()]
    renamed = dict(zip(dense, dense, strict=True)) | _kv_names(source, codec)
    for old_name, new_name in renamed.items():
        info = source.dense.get(old_name) or source.checkpoint.tensors[old_name]
        layout[new_name] = info.dtype, tuple(info.shape)
    files = _small_files(source, codec.config(formats, _dense_linears(source, dense), source.plan.kv))
    with SafetensorsWriter(out, layout, max_shard=max_shard, overwrite=overwrite) as writer:
        for file, data in files.items():
            writer.add_file(file, data)
        for name in progress(items, "writing"):
            for ending, tensor in codec.write(_refit(name, source.read(items[name]), codec, requantize, outer)).items():
                writer.put(name + ending, tensor)
        for old_name, new_name in renamed.items():
            writer.put(new_name, _plain(source, old_name))
    return Conversion(source.path, out, codec.name, tuple(proofs), len(dense), tuple(files))


def _items(source: Source, requantize: bool | str) -> dict[str, str]:
    """Module -> what to read for it: every quantized module, and with a format named every linear that is dense."""
    items = dict(zip(source.modules, source.modules, strict=True))
    if isinstance(requantize, str):
        items |= {name.removesuffix(".weight"): name for name in dense_linears(source)}
    if not items:
        reason = "--requantize --format NAME quantizes it by rounding to nearest"
        raise UnsupportedError(f"{source.path} holds no quantized module", [reason])
    return items


def _plain(source: Source, name: str) -> Tensor:
    tensor = source.read(name) if name in source.dense else source.checkpoint.read(name)
    assert isinstance(tensor, Tensor)
    return tensor


def _to_dense(
    source: Source, out: Path, dtype: str | None, max_shard: int, overwrite: bool, progress: Progress
) -> Conversion:
    target = _dense_target(source, dtype)
    layout: dict[str, tuple[str, tuple[int, ...]]] = {}
    for name, entry in source.modules.items():
        layout[f"{name}.weight"] = ON_DISK[target], tuple(entry.shape)
    for name, info in source.dense.items():
        floats = info.dtype in ("F32", "F16", "BF16", "F64")
        layout[name] = ON_DISK[target] if floats else info.dtype, tuple(info.shape)
    proofs = []
    with SafetensorsWriter(out, layout, max_shard=max_shard, overwrite=overwrite) as writer:
        config = {"dtype": str(target).removeprefix("torch.")}
        files = _small_files(source, {}, config)
        for file, data in files.items():
            writer.add_file(file, data)
        for name in progress([*source.modules, *source.dense], "decoding"):
            value = source.read(name)
            if isinstance(value, Quantized):
                weight = effective(value)
                writer.put(f"{name}.weight", weight.to(target))
                proofs.append(_rounding(name, value, weight, target))
            else:
                writer.put(name, value.to(target) if value.is_floating_point() else value)
    return Conversion(source.path, out, "dense", tuple(proofs), len(source.dense), tuple(files))


def _to_gguf(source: Source, out: Path, requantize: bool | str, overwrite: bool, progress: Progress) -> Conversion:
    from fewbit.codecs import gguf

    proofs = []
    layout: dict[str, tuple[Format | str, tuple[int, ...]]] = {}
    items = _items(source, requantize)
    outer = _shared_outer(source, items, gguf, requantize)
    for name in progress(items, "proving"):
        old = source.read(items[name])
        new = _refit(name, old, gguf, requantize, outer)
        proofs.append(_compare(name, old, new))
        layout[name] = new.format, new.weight.shape
    _refuse_inexact(proofs, requantize)
    if source.kv:
        reason = f"{len(source.kv)} attention modules carry KV scales, and a GGUF file has no place for them"
        raise UnsupportedError(f"cannot convert {source.path} to gguf", [reason])
    dense = [name for name in source.dense if name not in items.values()]
    for name in dense:
        layout[name] = source.dense[name].dtype, tuple(source.dense[name].shape)
    with gguf.create(out, source.config, layout, tokenizer_files(source), overwrite=overwrite) as sink:
        for name in progress(items, "writing"):
            sink.put(name, _refit(name, source.read(items[name]), gguf, requantize, outer))
        for name in dense:
            sink.put(name, _plain(source, name))
    return Conversion(source.path, out, "gguf", tuple(proofs), len(dense))


def _shared_outer(source: Source, items: dict[str, str], codec: Any, requantize: bool | str) -> dict[str, Tensor]:
    """Module -> the outer scale it shares with the siblings that engines fuse with it (NVFP4 and its like)."""
    if not isinstance(requantize, str):
        return {}
    spec = codec.fit(get(requantize)).weight
    if len(spec.scales) != 2 or spec.scales[1].block != (0, 0):
        return {}
    shared = {}
    for group in sibling_groups(items).values():
        planes = [choose(effective(source.read(items[name])), spec, {})["scale1"] for name in group]
        largest = torch.stack(planes).amax(0) if spec.scales[1].op == "mul" else torch.stack(planes).amin(0)
        shared |= dict.fromkeys(group, largest)
    return shared


def _refit(
    name: str, old: Quantized | Tensor, codec: Any, requantize: bool | str, outer: dict[str, Tensor]
) -> Quantized:
    """A module as the dialect holds it: recast where the codes carry over, encoded anew only when allowed."""
    if isinstance(requantize, str):
        return _encode_anew(name, old, codec.fit(get(requantize)), outer.get(name))
    assert isinstance(old, Quantized)
    try:
        target = codec.fit(old.format)
        return replace(old, format=target, weight=recast(old.weight, target.weight), act=_act(old, target))
    except UnsupportedError as error:
        if not requantize:
            hint = "--requantize chooses new codes and prints what that costs"
            raise UnsupportedError(f"{name}: {error}", [hint]) from error
    return _encode_anew(name, old, nearest(old.format, codec))


def _act(old: Quantized, target: Format) -> dict[str, Tensor]:
    """Static activation planes in the target's convention (a stored reciprocal, or not)."""
    if not old.act or old.format.act is None or target.act is None:
        return old.act
    planes = {}
    for name, plane in old.act.items():
        if not name.startswith("scale"):
            planes[name] = plane
            continue
        before, after = (f.scales[int(name[-1])] for f in (old.format.act, target.act))
        value = plane.float()
        planes[name] = (1 / value if before.op != after.op else value).to(after.element.dtype)
    return planes


def nearest(form: Format, codec: Any) -> Format:
    """The format of FORMATS that a dialect holds and that is nearest in size, never smaller where one is not."""
    bits = qtensor.bits_per_weight(form.weight)
    held = []
    for row in FORMATS.values():
        if row.weight.element.kind == "run" or (row.act is None) != (form.act is None):
            continue
        try:
            held.append(codec.fit(row))
        except UnsupportedError:
            continue
    if not held:
        raise UnsupportedError(f"{codec.name} holds no format like {describe(form.weight)}")
    return min(held, key=lambda f: _distance(qtensor.bits_per_weight(f.weight) - bits, f, form))


def _distance(gap: float, f: Format, form: Format) -> tuple[float, float, bool]:
    wider = f.weight.element.bits - form.weight.element.bits
    return abs(wider) + (10 if wider < 0 else 0), abs(gap), f.weight.element != form.weight.element


def _encode_anew(name: str, old: Quantized | Tensor, target: Format, outer: Tensor | None = None) -> Quantized:
    act = old.act if isinstance(old, Quantized) and old.format.act == target.act else {}
    static = [scale for scale in target.act.scales if not scale.dynamic] if target.act else []
    if static and not act:
        reason = "its activations have static scales, which only calibration on text can give"
        raise UnsupportedError(f"{name}: cannot be requantized to {describe(target.weight)}", [reason])
    given = {} if outer is None else {"scale1": outer}
    return Quantized(target, encode(effective(old), target.weight, given), act)


def effective(q: Quantized | Tensor) -> Tensor:
    """The dense weight that does the same to an unrounded input: transforms folded in. [..., N, K] float32."""
    if isinstance(q, Tensor):
        return q.float()
    w = decode(q.weight)
    for transform in reversed(q.transforms):
        t = transform.tensors
        if transform.kind == "permute":
            w = torch.empty_like(w).index_copy_(-1, t["index"].long(), w)
        elif transform.kind == "input_scale":
            w = w * t["scale"].float()
        elif transform.kind == "rotate":
            matrix = t["matrix"].float()
            w = (w.unflatten(-1, (-1, matrix.shape[0])) @ matrix.T).flatten(-2)
        elif transform.kind == "low_rank":
            w = w + t["b"].float() @ t["a"].float()
    return w


def _compare(name: str, old: Quantized | Tensor, new: Quantized) -> ModuleProof:
    """Decode both, and say how far apart they are."""
    before, after = effective(old), effective(new)
    gap = (after - before).abs_()
    top, norm = float(before.abs().amax()) or 1.0, float(before.norm()) or 1.0
    same = isinstance(old, Quantized) and same_codes(old.weight, new.weight)
    was = describe(old.weight.spec) if isinstance(old, Quantized) else str(old.dtype).removeprefix("torch.")
    return ModuleProof(name, was, describe(new.weight.spec), same, float(gap.amax()) / top, float(gap.norm()) / norm)


def same_codes(old: QTensor, new: QTensor) -> bool:
    """Equal codes; a signed and an unsigned integer of one width count as equal when they differ by the middle."""
    a, b = old.spec.element, new.spec.element
    if a == b:
        return torch.equal(old.planes["codes"], new.planes["codes"])
    if a.kind == b.kind == "int" and a.bits == b.bits:
        return torch.equal(qtensor.codes(old) ^ (1 << (int(a.bits) - 1)), qtensor.codes(new))
    return False


def _refuse_inexact(proofs: list[ModuleProof], requantize: bool | str) -> None:
    """Without --requantize the codes must be equal, and scales within the rounding of their new type."""
    bad = [p for p in proofs if not p.codes_equal or p.difference > ROUNDING]
    if bad and not requantize:
        lines = [f"{p.name}: {p.source} -> {p.target}: largest difference {p.difference:.3g}" for p in bad[:8]]
        hint = "--requantize chooses new codes and prints what that costs"
        raise UnsupportedError(f"{len(bad)} modules would not come out equal; nothing was written", [*lines, hint])


def _rounding(name: str, q: Quantized, weight: Tensor, target: torch.dtype) -> ModuleProof:
    gap = (weight.to(target).float() - weight).abs_()
    top, norm = float(weight.abs().amax()) or 1.0, float(weight.norm()) or 1.0
    label = str(target).removeprefix("torch.")
    return ModuleProof(name, describe(q.weight.spec), label, True, float(gap.amax()) / top, float(gap.norm()) / norm)


def _dense_target(source: Source, dtype: str | None) -> torch.dtype:
    if dtype is not None:
        if dtype not in DTYPES:
            raise UnsupportedError(f"dtype {dtype!r} is not known", [f"known: {', '.join(DTYPES)}"])
        return DTYPES[dtype]
    text = str(source.config.get("dtype") or source.config.get("torch_dtype") or "bfloat16")
    return {"float32": torch.float32, "float16": torch.float16}.get(text.removeprefix("torch."), torch.bfloat16)


def _dense_linears(source: Source, dense: list[str]) -> list[str]:
    """Modules left dense that a rule on linears would otherwise cover."""
    covered = set(dense_linears(source, heads=True))
    return [name.removesuffix(".weight") for name in dense if name in covered]


def _kv_names(source: Source, codec: Codec) -> dict[str, str]:
    """KV scale tensors -> their names in the target dialect."""
    if not source.kv:
        return {}
    if not codec.kv_endings:
        reason = f"{len(source.kv)} attention modules carry KV scales, and {codec.name} has no place for them"
        raise UnsupportedError(f"cannot convert {source.path} to {codec.name}", [reason])
    names = {}
    for module, scales in source.kv.items():
        for of, tensor in scales.items():
            if of not in codec.kv_endings:
                raise UnsupportedError(f"{codec.name} has no name for the {of} scale of {module}")
            names[tensor] = module + codec.kv_endings[of]
    return names


def tokenizer_files(source: Source) -> dict[str, bytes]:
    """Tokenizer and generation files, carried over or rebuilt from GGUF metadata."""
    if source.tokenizer is not None:
        return dict(source.tokenizer)
    if not source.path.is_dir():
        return {}
    names = (p for p in sorted(source.path.iterdir()) if p.is_file() and p.name.startswith(COPIED))
    return {p.name: p.read_bytes() for p in names if p.stat().st_size < 1 << 28 and p.suffix in SMALL}


SMALL = (".json", ".jinja", ".model", ".txt")


def _small_files(
    source: Source, extra: Mapping[str, dict[str, Any]], more: dict[str, Any] | None = None
) -> dict[str, bytes]:
    config = {k: v for k, v in source.config.items() if k not in ("quantization_config", "compression_config")}
    if isinstance(config.get("text_config"), dict):
        config["text_config"] = {k: v for k, v in config["text_config"].items() if k != "quantization_config"}
    if "torch_dtype" in config and more:
        config.pop("torch_dtype")
    config |= more or {}
    files = tokenizer_files(source)
    for name, value in extra.items():
        if name == "quantization_config":
            config[name] = value
        else:
            files[name] = json.dumps(value, indent=2).encode()
    return {"config.json": json.dumps(config, indent=2).encode(), **files}
