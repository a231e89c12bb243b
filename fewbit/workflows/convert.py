"""convert: any dialect to any that can hold the format, with proof; nothing is written before the proof is whole.

Two passes over the source, one module at a time. The first recasts every module, compares what it decodes to before and
after, and learns the layout; the second writes. A conversion that needs new codes is refused unless asked for.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from fewbit import codecs
from fewbit.codecs.codec import Codec
from fewbit.codecs.source import Source
from fewbit.errors import RequestError, UnsupportedError
from fewbit.files.writer import SafetensorsWriter, check_free
from fewbit.models.finding import refuse_on_errors
from fewbit.models.verify import dense_linears, verify_source
from fewbit.quant.qtensor import Quantized
from fewbit.quant.spec import Format
from fewbit.workflows.proof import ModuleProof, compare, refuse_inexact, rounding
from fewbit.workflows.refit import effective, refit, shared_outer
from fewbit.workflows.small_files import small_files, tokenizer_files

DTYPES = {"bf16": torch.bfloat16, "f16": torch.float16, "f32": torch.float32}
ON_DISK = {torch.bfloat16: "BF16", torch.float16: "F16", torch.float32: "F32", torch.uint8: "U8", torch.int8: "I8",
           torch.int32: "I32", torch.int64: "I64", torch.float8_e4m3fn: "F8_E4M3", torch.float8_e5m2: "F8_E5M2",
           torch.int16: "I16", torch.float64: "F64", torch.bool: "BOOL", torch.float8_e8m0fnu: "F8_E8M0"}  # fmt: skip
Progress = Callable[[Iterable[str], str], Iterable[str]]


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
    trust_remote_code: bool = False,
    progress: Progress = quiet,
) -> Conversion:
    """Rewrite a checkpoint in another dialect.

    to: a dialect of `fewbit.dialects()`, or "dense". requantize: allow new codes where the old ones do not carry over,
    in the nearest format the dialect holds, or in the one named (dense linears too, head and routers aside).
    dtype: bf16 | f16 | f32, of `to="dense"`. trust_remote_code: of a model whose code lies in its folder, which goes
    with it.
    """
    name = to.replace("_", "-")
    with codecs.open(src, trust_remote_code) as source:
        _check_target(source, Path(out), name, max_shard, overwrite)
        refuse_on_errors(source.path, verify_source(source))
        if name == "gguf":
            return _to_gguf(source, Path(out), requantize, overwrite, progress)
        if name == "dense":
            return _to_dense(source, Path(out), dtype, max_shard, overwrite, progress)
        if name not in codecs.CODECS:
            known = ", ".join(sorted([*codecs.CODECS, "gguf"]))
            raise UnsupportedError(f"dialect {to!r} is not known", [f"known: {known}"])
        return _to_codec(source, Path(out), codecs.CODECS[name], requantize, max_shard, overwrite, progress)


def _check_target(source: Source, out: Path, name: str, max_shard: int, overwrite: bool) -> None:
    """Refuse before the work what the writer would refuse after it, and what would cost the source."""
    if max_shard < 1:
        raise RequestError(f"max_shard={max_shard}: the largest shard is a number of bytes above 0")
    target = out / "model.gguf" if name == "gguf" and out.suffix != ".gguf" else out
    check_free(target, overwrite)
    if out.resolve() == source.path.resolve() or target.resolve() == source.path.resolve():
        reason = "a failure half way would leave neither model; give another folder"
        raise RequestError(f"{out}: is the checkpoint that is read; {reason}")


def _to_codec(
    source: Source, out: Path, codec: Codec, requantize: bool | str, max_shard: int, overwrite: bool, progress: Progress
) -> Conversion:
    if codec.fit is None or codec.write is None or codec.config is None:
        raise UnsupportedError(f"{codec.name} can be read, not written", [codec.summary])
    items = _items(source, requantize)
    outer = shared_outer(source, items, codec, requantize)
    proofs, formats, layout = [], {}, {}
    for name in progress(items, "proving"):
        old = source.read(items[name])
        new = refit(name, old, codec, requantize, outer)
        tensors = codec.write(new)
        back = codec.read(new.format, tensors)  # what a reader will see is what must be equal
        proofs.append(compare(name, old, back))
        formats[name] = new.format
        for ending, tensor in tensors.items():
            layout[name + ending] = ON_DISK[tensor.dtype], tuple(tensor.shape)
    refuse_inexact(proofs, requantize)
    dense = [name for name in source.dense if name not in items.values()]
    kv = kv_tensors(source, codec)
    layout |= {name: (source.dense[name].dtype, tuple(source.dense[name].shape)) for name in dense}
    layout |= {name: (ON_DISK[tensor.dtype], tuple(tensor.shape)) for name, tensor in kv.items()}
    files = small_files(source, codec.config(formats, _dense_linears(source, dense), source.plan.kv))
    with SafetensorsWriter(out, layout, max_shard=max_shard, overwrite=overwrite) as writer:
        for file, data in files.items():
            writer.add_file(file, data)
        for name in progress(items, "writing"):
            for ending, tensor in codec.write(refit(name, source.read(items[name]), codec, requantize, outer)).items():
                writer.put(name + ending, tensor)
        for name in dense:
            writer.put(name, _plain(source, name))
        for name, tensor in kv.items():
            writer.put(name, tensor)
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
    tensor = source.read(name)
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
        files = small_files(source, {}, config)
        for file, data in files.items():
            writer.add_file(file, data)
        for name in progress([*source.modules, *source.dense], "decoding"):
            value = source.read(name)
            if isinstance(value, Quantized):
                weight = effective(value)
                written = weight.to(target)
                writer.put(f"{name}.weight", written)
                proofs.append(rounding(name, value, weight, written))
            else:
                writer.put(name, value.to(target) if value.is_floating_point() else value)
    return Conversion(source.path, out, "dense", tuple(proofs), len(source.dense), tuple(files))


def _to_gguf(source: Source, out: Path, requantize: bool | str, overwrite: bool, progress: Progress) -> Conversion:
    from fewbit.codecs import gguf

    proofs = []
    layout: dict[str, tuple[Format | str, tuple[int, ...]]] = {}
    items = _items(source, requantize)
    outer = shared_outer(source, items, gguf, requantize)
    for name in progress(items, "proving"):
        old = source.read(items[name])
        new = refit(name, old, gguf, requantize, outer)
        proofs.append(compare(name, old, new))
        layout[name] = new.format, new.weight.shape
    refuse_inexact(proofs, requantize)
    if source.kv:
        reason = f"{len(source.kv)} attention modules carry KV scales, and a GGUF file has no place for them"
        raise UnsupportedError(f"cannot convert {source.path} to gguf", [reason])
    dense = [name for name in source.dense if name not in items.values()]
    for name in dense:
        layout[name] = source.dense[name].dtype, tuple(source.dense[name].shape)
    with gguf.create(out, source.config, layout, tokenizer_files(source), overwrite=overwrite) as sink:
        for name in progress(items, "writing"):
            sink.put(name, refit(name, source.read(items[name]), gguf, requantize, outer))
        for name in dense:
            sink.put(name, _plain(source, name))
    return Conversion(source.path, out, "gguf", tuple(proofs), len(dense))


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


def kv_tensors(source: Source, codec: Codec) -> dict[str, Tensor]:
    """The KV scales under their names in the target dialect; one scale for both becomes two."""
    if source.kv and not codec.kv_endings:
        reason = f"{len(source.kv)} attention modules carry KV scales, and {codec.name} has no place for them"
        raise UnsupportedError(f"cannot convert {source.path} to {codec.name}", [reason])
    out = {}
    for module, scales in source.kv.items():
        both = {"k": scales["kv"], "v": scales["kv"]} if "kv" in scales else {}
        for of, name in {**both, **{of: name for of, name in scales.items() if of != "kv"}}.items():
            ending = (codec.kv_endings or {}).get(of)
            if ending is None:
                raise UnsupportedError(f"{codec.name} has no name for the {of} scale of {module}")
            tensor = source.checkpoint.read(name)
            out[module + ending] = tensor.reshape(codec.kv_shape) if tensor.numel() == 1 else tensor
    return out
