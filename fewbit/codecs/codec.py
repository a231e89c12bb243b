"""Codec: what one checkpoint dialect is, as data and pure functions; and what all dialects share.

A codec maps the tensors of one module (by the endings of their names) to a Quantized and back. It never sees a model,
never opens a file, and works on meta tensors, so layouts are known before the first byte is written.
"""

import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from fewbit.errors import CheckpointError, UnsupportedError
from fewbit.files.checkpoint import Checkpoint
from fewbit.files.safetensors import TensorInfo, storage
from fewbit.quant.elements import BF16, F16, F32, Element
from fewbit.quant.plan import Plan
from fewbit.quant.qtensor import Quantized
from fewbit.quant.spec import Format, QuantSpec

Config = dict[str, Any]
Tensors = dict[str, Tensor]  # ending of the name, joiner included (".weight_scale") -> tensor
FLOATS: dict[torch.dtype, Element] = {torch.float32: F32, torch.float16: F16, torch.bfloat16: BF16}
CONFIG_FILES = (
    "quantize_config.json", "quant_config.json", "hf_quant_config.json", "quantization_config.json", "quanto_qmap.json",
)  # fmt: skip
DTYPES: dict[Element, str] = {F32: "F32", F16: "F16", BF16: "BF16"}


@dataclass(frozen=True, slots=True)
class Located:
    """A quantization config and where it was found."""

    config: Config
    where: str  # "config.json: quantization_config"


class Parts(Mapping[str, Tensor]):
    """The tensors of one module, by ending; read when asked for."""

    def __init__(self, checkpoint: Checkpoint, module: str, infos: dict[str, TensorInfo]):
        self.checkpoint, self.module, self.infos = checkpoint, module, infos

    def __getitem__(self, ending: str) -> Tensor:
        if ending not in self.infos:
            found = ", ".join(sorted(self.infos)) or "nothing"
            raise CheckpointError(f"{self.module}: tensor {self.module}{ending} is missing; found {found}")
        return self.checkpoint.read(self.infos[ending].name)

    def __iter__(self) -> Iterator[str]:
        return iter(self.infos)

    def __len__(self) -> int:
        return len(self.infos)

    def __contains__(self, ending: object) -> bool:
        return ending in self.infos

    def info(self, ending: str) -> TensorInfo:
        if ending not in self.infos:
            self[ending]  # raises
        return self.infos[ending]

    def meta(self, ending: str) -> Tensor:
        """The tensor without its data."""
        info = self.info(ending)
        dtype, shape = storage(info.dtype, info.shape, info.name)
        return torch.empty(shape, dtype=dtype, device="meta")


@dataclass(frozen=True, slots=True)
class Codec:
    """One dialect of safetensors checkpoints. `name` is its quant_method and, with underscores, its file."""

    name: str
    claims: Callable[[Located], str | None]  # the evidence, or None
    plan: Callable[[Config], Plan]
    endings: tuple[str, ...]  # of every tensor a quantized module may have
    marker: tuple[str, ...]  # endings that only a quantized module has
    shape: Callable[[Format, Parts], "tuple[int, ...] | Quantized"]  # [N, K] or [E, N, K], or see by_header
    read: Callable[[Format, Mapping[str, Tensor]], Quantized]
    fit: Callable[[Format], Format] | None = None  # the format as this dialect holds it, or UnsupportedError
    write: Callable[[Quantized], Tensors] | None = None
    config: Callable[[Mapping[str, Format], list[str], QuantSpec | None], dict[str, Config]] | None = None
    kv_endings: Mapping[str, str] | None = None  # {"k": ".k_scale", "v": ".v_scale"} under the attention module
    kv_shape: tuple[int, ...] = ()  # of one KV scale on disk
    unused: tuple[str, ...] = ()  # endings that are known and carry nothing
    shared: Callable[[Config], tuple[str, ...]] | None = None  # endings of tensors stored once for many modules
    explicit: bool = True  # a module the plan covers and the file holds dense is a lie, not a habit
    summary: str = ""


def by_header(
    read: Callable[[Format, Mapping[str, Tensor]], Quantized], *peek: str
) -> Callable[[Format, Parts], Quantized]:
    """`shape` of a codec whose read works on meta tensors: the whole module, and with it every check, without its data.

    peek: endings of small tensors that are read all the same (a stored shape, a column order).
    """

    def shape(form: Format, parts: Parts) -> Quantized:
        return read(form, {ending: parts[ending] if ending in peek else parts.meta(ending) for ending in parts})

    return shape


def quantization_config(checkpoint: Checkpoint) -> Located | None:
    """The first quantization config of a checkpoint, in the order that tools write and read them."""
    config = checkpoint.config
    text = config.get("text_config")
    for where, holder in (("config.json: ", config), ("config.json: text_config.", text)):
        if isinstance(holder, dict):
            for key in ("quantization_config", "compression_config"):
                if holder.get(key) is not None:
                    return _located(holder[key], where + key)
    for name in CONFIG_FILES:
        if name in checkpoint.extra:
            return _located(checkpoint.extra[name], name)
    return None


def _located(config: object, where: str) -> Located:
    if not isinstance(config, dict):
        raise CheckpointError(f"{where} must be an object, found {type(config).__name__}")
    return Located(config, where)


def by_method(*methods: str) -> Callable[[Located], str | None]:
    """claims for a codec that is named by quant_method alone."""

    def claims(located: Located) -> str | None:
        method = str(located.config.get("quant_method", "")).lower().replace("_", "-")
        return f"{located.where}.quant_method = {method}" if method in methods else None

    return claims


# name of a KV scale -> its attention module and what it scales; every spelling of the field
_KV_NAMES = tuple(
    re.compile(pattern)
    for pattern in (
        r"(?P<module>.+?)\.(?:(?:q|k|v|qkv)_proj\.)?(?P<of>q|k|v|kv|prob)_(?:scale|zero_point|bias)$",
        r"(?P<module>.+?)\.(?P<of>k|v|q)_proj\.output_scale$",
        r"(?P<module>.+?)\.(?P<of>k|v)_cache\.scale$",
        r"(?P<module>.+?)\.(?P<of>prob)_output_scale$",
    )
)


def kv_scale(name: str) -> tuple[str, str] | None:
    """A tensor name -> (attention module, "k" | "v" | "q" | "kv" | "prob") when it is a scale of the KV cache."""
    for pattern in _KV_NAMES:
        if match := pattern.match(name):
            return match["module"], match["of"] + ("_zero" if name.endswith(("zero_point", "_bias")) else "")
    return None


EMBEDDINGS = re.compile(r"(?:.*\.)?(?:embed_tokens|word_embeddings|tok_embeddings|embed_in|wte|wpe)$")


def kind_of(module: str) -> str:
    """The class a config calls a module by, as far as its name on disk tells."""
    return "Embedding" if EMBEDDINGS.match(module) else "Linear"


def with_scale_element(spec: QuantSpec, scale: Tensor, level: int = 0) -> QuantSpec:
    """The spec with the float type in which a checkpoint really keeps one of its scales."""
    if scale.dtype not in FLOATS:
        raise CheckpointError(f"a scale must be F32, F16 or BF16, found {scale.dtype}")
    scales = list(spec.scales)
    scales[level] = replace(scales[level], element=FLOATS[scale.dtype])
    return replace(spec, scales=tuple(scales))


def want(ending: str, tensor: Tensor, dtype: torch.dtype | tuple[torch.dtype, ...], shape: tuple[int, ...]) -> Tensor:
    """The tensor, if it is what the dialect says."""
    dtypes = dtype if isinstance(dtype, tuple) else (dtype,)
    if tensor.dtype not in dtypes or tuple(tensor.shape) != shape:
        types = " or ".join(str(d).removeprefix("torch.") for d in dtypes)
        found = f"{list(tensor.shape)} {str(tensor.dtype).removeprefix('torch.')}"
        raise CheckpointError(f"{ending}: want {list(shape)} {types}, found {found}")
    return tensor


def as_grid(ending: str, scale: Tensor, shape: tuple[int, int]) -> Tensor:
    """A scale stored as [], [1], [N], [N, 1], [a, 1, b, 1] ... -> the [rows, cols] of its grid."""
    if scale.numel() != shape[0] * shape[1]:
        raise CheckpointError(f"{ending}: want {shape[0] * shape[1]} scales ({list(shape)}), found {list(scale.shape)}")
    return scale.reshape(shape)


def refuse(codec: str, what: str, *reasons: str) -> UnsupportedError:
    return UnsupportedError(f"{codec} cannot hold {what}", reasons)
