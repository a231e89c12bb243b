"""inspect: what a checkpoint is, module by module, from its headers alone."""

from collections import Counter
from dataclasses import asdict, dataclass
from math import prod
from pathlib import Path
from typing import Any

import torch

from fewbit import codecs
from fewbit.codecs.source import Source
from fewbit.errors import RequestError
from fewbit.kernels.capability import lacking, not_fast, run_as
from fewbit.kernels.select import select
from fewbit.models import kv_file
from fewbit.models.build import ACTIVATIONS
from fewbit.models.verify import model_config
from fewbit.quant.formats import name_of
from fewbit.quant.kv import KV_FORMATS, measured
from fewbit.quant.spec import Format, describe


@dataclass(frozen=True, slots=True)
class ModuleInfo:
    """One quantized module."""

    name: str
    format: str  # a name of fewbit.formats(), or the spec in words
    weight: str
    activations: str
    shape: tuple[int, ...]
    bits_per_weight: float
    bytes: int
    rule: str
    kernel: str
    refused: tuple[str, ...]  # other kernels, and why not
    invariant: bool  # whether a row's result never depends on how many rows are beside it
    weights_only: str = ""  # why an engine on this device would leave its activations as they are
    fast: str = ""  # under activations="fast": what its inputs are rounded to, or why they are not


@dataclass(frozen=True, slots=True)
class DenseInfo:
    """A matrix that is left dense, and the rule that says so."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    bytes: int
    rule: str


@dataclass(frozen=True, slots=True)
class Info:
    """A checkpoint."""

    path: str
    dialect: str
    evidence: str
    architecture: str
    model_type: str
    parameters: int
    bytes: int
    bits_per_weight: float  # of everything
    quantized_bits_per_weight: float  # of the quantized modules
    modules: tuple[ModuleInfo, ...]
    dense: tuple[DenseInfo, ...]
    kv: str
    kv_scales: str  # where those of the KV cache come from
    kv_modules: int
    surplus: dict[str, str]
    files: tuple[str, ...]
    remote_code: tuple[str, ...]

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


def inspect(
    path: str | Path,
    device: str = "cpu",
    activations: str = "hardware",
    kv_scales: str | Path | None = None,
    trust_remote_code: bool = False,
) -> Info:
    """Dialect, architecture, per-module format, sizes, ignored modules and why, kernels and why not others.

    activations, kv_scales: as a server would be asked; "fast" says of each module what that comes to.
    trust_remote_code: only kv_scales ask for the model's config object; all else is read without.
    """
    if activations not in ACTIVATIONS:
        raise RequestError(f"activations={activations!r}: known are {', '.join(ACTIVATIONS)}")
    try:
        torch.device(device)
    except RuntimeError as error:
        raise RequestError(f"device {device!r} is not known: cpu, cuda and cuda:N are") from error
    if device.startswith("cuda") and not torch.cuda.is_available():
        raise RequestError(f"device {device!r}: no CUDA device is here, and what a kernel takes depends on which it is")
    with codecs.open(path, trust_remote_code) as source:
        return _info(source, device, activations, kv_scales)


def _info(source: Source, device: str, activations: str, kv_scales: str | Path | None) -> Info:
    modules = tuple(_module(source, name, torch.device(device), activations) for name in source.modules)
    dense = tuple(_dense(source, name) for name, info in source.dense.items() if len(info.shape) >= 2)
    vectors = [info for info in source.dense.values() if len(info.shape) < 2]
    nbytes = sum(m.bytes for m in modules) + sum(d.bytes for d in dense) + sum(v.nbytes for v in vectors)
    weights = sum(prod(m.shape) for m in modules)
    parameters = weights + sum(prod(d.shape) for d in dense) + sum(prod(v.shape) for v in vectors)
    architectures = source.config.get("architectures") or ["unknown"]
    cache, origin = _cache(source, kv_scales)
    return Info(
        path=str(source.path),
        dialect=source.dialect,
        evidence=source.evidence,
        architecture=str(architectures[0]),
        model_type=str(source.config.get("model_type", "unknown")),
        parameters=parameters,
        bytes=nbytes,
        bits_per_weight=round(8 * nbytes / max(parameters, 1), 4),
        quantized_bits_per_weight=round(8 * sum(m.bytes for m in modules) / max(weights, 1), 4),
        modules=modules,
        dense=dense,
        kv=cache,
        kv_scales=origin,
        kv_modules=len(source.kv),
        surplus=source.surplus,
        files=tuple(str(file.name) for file in source.checkpoint.files),
        remote_code=tuple(source.checkpoint.remote_code),
    )


def _cache(source: Source, kv_scales: str | Path | None) -> tuple[str, str]:
    """What a server would cache by itself, and where its scales come from."""
    if kv_scales is not None:
        found = kv_file.read(kv_scales, model_config(source))
        how = f"measured on {found.measured.get('text')}, {found.measured.get('tokens')} tokens"
        return describe(measured(KV_FORMATS[found.format], found.per_head)), f"file {kv_scales}, {how}"
    spec = source.plan.kv
    held = f"checkpoint, {len(source.kv)} attention modules" if source.kv else "none"
    if spec is None:
        return "as computed", f"{held}, which --kv-cache-dtype fp8 would use" if source.kv else held
    return describe(spec), "at each call" if spec.dynamic else held


def _module(source: Source, name: str, device: torch.device, activations: str) -> ModuleInfo:
    entry = source.modules[name]
    run = run_as(entry.format, device, torch.bfloat16, activations)
    kernel, refused = select("linear", run, device, torch.bfloat16)
    return ModuleInfo(
        name,
        name_of(entry.format) or describe(entry.format.weight),
        describe(entry.format.weight),
        describe(entry.format.act) if entry.format.act else "as they are",
        tuple(entry.shape),
        round(8 * entry.nbytes / prod(entry.shape), 4),
        entry.nbytes,
        f"{entry.rule.where} {entry.rule.pattern!r}".strip() if entry.rule else "",
        kernel.name,
        tuple(f"{name}: {reason}" for name, reason in refused),
        kernel.invariant,
        lacking(entry.format, device) or "",
        _fast(entry.format, run, device) if activations == "fast" else "",
    )


def _fast(declared: Format, run: Format, device: torch.device) -> str:
    if run.act is not None and run != declared:
        return f"rounded to {describe(run.act)}"
    return f"left as declared: {not_fast(declared, device, torch.bfloat16)}"


def _dense(source: Source, name: str) -> DenseInfo:
    info = source.dense[name]
    form, rule = source.plan.for_module(name.removesuffix(".weight"))
    said = f"{rule.where} {rule.pattern!r}".strip() if rule and form is None else ""
    return DenseInfo(name, info.dtype, tuple(info.shape), info.nbytes, said)


def summary(info: Info) -> list[tuple[str, str, str, str]]:
    """Rows for a table, equal modules together: (format, activations, modules, bytes)."""
    counts: Counter[tuple[str, str, str]] = Counter()
    sizes: Counter[tuple[str, str, str]] = Counter()
    for m in info.modules:
        counts[m.format, m.weight, m.activations] += 1
        sizes[m.format, m.weight, m.activations] += m.bytes
    return [(f"{f} ({w})", a, str(n), size(sizes[f, w, a])) for (f, w, a), n in counts.most_common()]


def size(nbytes: float) -> str:
    for unit in ("B", "KiB", "MiB"):
        if nbytes < 1024:
            return f"{nbytes:.0f} {unit}" if unit == "B" else f"{nbytes:.1f} {unit}"
        nbytes /= 1024
    return f"{nbytes:.2f} GiB"
