"""Source: an open checkpoint as every workflow sees it: modules that are quantized, tensors that are not."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor

from fewbit.codecs.codec import Codec, Located, Parts, kind_of, kv_scale
from fewbit.errors import CheckpointError, FewbitError
from fewbit.files.checkpoint import Checkpoint
from fewbit.files.safetensors import TensorInfo
from fewbit.quant.plan import Plan, Rule
from fewbit.quant.qtensor import Quantized
from fewbit.quant.spec import Format

SURPLUS = ("rotary_emb.inv_freq", ".attn.masked_bias", ".attn.bias")  # tensors of old files that no model reads


@dataclass(frozen=True, slots=True)
class Entry:
    """One quantized module, from the headers alone."""

    format: Format
    shape: tuple[int, ...]
    tensors: tuple[str, ...]
    nbytes: int
    rule: Rule | None
    read: Callable[[], Quantized] = field(repr=False)


@dataclass(slots=True)
class Source:
    """modules, dense and kv are keyed by the names on disk (for GGUF: by the Hugging Face names they map to)."""

    path: Path
    dialect: str
    evidence: str
    config: dict[str, Any]
    plan: Plan
    checkpoint: Checkpoint
    modules: dict[str, Entry] = field(default_factory=dict)
    dense: dict[str, TensorInfo] = field(default_factory=dict)
    kv: dict[str, dict[str, str]] = field(default_factory=dict)  # attention module -> {"k": tensor, "v": tensor}
    surplus: dict[str, str] = field(default_factory=dict)  # tensor -> why nothing reads it
    problems: list[tuple[str, str, str]] = field(default_factory=list)  # (finding, name, text), met while grouping
    tokenizer: Mapping[str, bytes] | None = None  # files rebuilt from GGUF metadata; None = files of the folder
    explicit: bool = True
    trusted: bool = False  # code in its folder may be imported
    reader: Callable[[str], Tensor] | None = None  # of dense tensors, when the dialect rewrites them

    def read(self, name: str) -> Quantized | Tensor:
        """A module by name, or a dense tensor by name."""
        if name in self.modules:
            try:
                return self.modules[name].read()
            except FewbitError as error:
                raise CheckpointError(f"{self.path}: module {name}: {error}") from error
        return self.reader(name) if self.reader else self.checkpoint.read(name)

    def close(self) -> None:
        self.checkpoint.close()

    def __enter__(self) -> "Source":
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()


def plan_of(codec: Codec, located: Located) -> Plan:
    """The plan of a config; a value of a type that no tool writes is the file's fault."""
    try:
        return codec.plan(located.config)
    except (TypeError, AttributeError, KeyError, ValueError) as error:
        raise CheckpointError(f"{located.where}: not a config of {codec.name}: {error}") from error


def group(checkpoint: Checkpoint, codec: Codec, located: Located) -> Source:
    """Sort the tensors of a safetensors checkpoint into modules, dense tensors, KV scales and surplus."""
    plan = plan_of(codec, located)
    source = Source(checkpoint.path, codec.name, "", checkpoint.config, plan, checkpoint, explicit=codec.explicit)
    modules: dict[str, dict[str, TensorInfo]] = {}
    endings = codec.shared(located.config) if codec.shared else ()
    shared: dict[str, TensorInfo] = {}
    for name, info in checkpoint.tensors.items():
        if endings and name.endswith(endings):
            ending = next(e for e in endings if name.endswith(e))
            shared.setdefault(f"{ending}:{info.shape[0]}", info)
            source.surplus[name] = "a transform; its modules read it"
        elif (of := kv_scale(name)) and not name.endswith(codec.unused):
            source.kv.setdefault(of[0], {})[of[1]] = name
        elif name.endswith(SURPLUS):
            source.surplus[name] = "computed from the config"
        elif found := _split(name, codec):
            modules.setdefault(found[0], {})[found[1]] = info
        else:
            source.dense[name] = info
    for module, infos in modules.items():
        _sort_module(source, codec, module, infos, shared)
    return source


def _split(name: str, codec: Codec) -> tuple[str, str] | None:
    for ending in sorted((*codec.endings, *codec.unused), key=len, reverse=True):
        if name.endswith(ending):
            return name[: -len(ending)], ending
    return None


def _sort_module(
    source: Source, codec: Codec, module: str, infos: dict[str, TensorInfo], shared: dict[str, TensorInfo]
) -> None:
    dense = infos.get(".weight")
    is_float = dense is not None and dense.dtype in ("F32", "F16", "BF16", "F64")
    form, rule = source.plan.for_module(module, kind_of(module))
    bare = form is not None and dense is not None and not is_float  # codes without a scale: the codec says what misses
    marked = bare or any(ending in codec.marker for ending in infos)
    if not marked:
        source.dense |= {info.name: info for info in infos.values()}
    elif form is None and is_float:
        assert dense is not None
        source.dense[dense.name] = dense
        reason = f"excluded by {rule.where} = {rule.pattern!r}" if rule else "no rule covers it"
        source.surplus |= {info.name: reason for ending, info in infos.items() if ending != ".weight"}
    elif form is None:
        by = f"{rule.where} = {rule.pattern!r} excludes it" if rule else "no rule of the plan covers it"
        source.problems.append(("stored-quantized", module, f"is stored quantized ({_list(infos)}), and {by}"))
    else:
        _add_module(source, codec, module, infos, form, rule, shared if form.transforms else {})


def _add_module(
    source: Source,
    codec: Codec,
    module: str,
    infos: dict[str, TensorInfo],
    form: Format,
    rule: Rule | None,
    shared: dict[str, TensorInfo],
) -> None:
    unused = [infos.pop(ending).name for ending in codec.unused if ending in infos]
    source.surplus |= dict.fromkeys(unused, f"{codec.name} writes it and nothing reads it")
    parts = Parts(source.checkpoint, module, infos | shared)
    try:
        found = codec.shape(form, parts)
    except (FewbitError, KeyError) as error:  # KeyError: an ending that the layout needs and the file lacks
        text = str(error) if isinstance(error, FewbitError) else f"tensor {module}{error.args[0]} is missing"
        source.problems.append(("unreadable", module, text))
        return
    stored, shape = (found.format, found.weight.shape) if isinstance(found, Quantized) else (form, found)
    names = tuple(info.name for info in infos.values())
    nbytes = sum(info.nbytes for info in infos.values())
    source.modules[module] = Entry(stored, shape, names, nbytes, rule, lambda: codec.read(form, parts))


def _list(infos: dict[str, TensorInfo]) -> str:
    return ", ".join(sorted(infos))
