"""Writing GGUF: Hugging Face names, values, config and tokenizer turned back into ggml's.

`create` plans the whole file from the layout, so nothing is written that the format cannot hold. Experts wait until
their stack is whole; everything else goes to disk as it comes.
"""

import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import torch
from torch import Tensor

from fewbit.codecs.gguf_metadata import ARCHITECTURES, metadata_of, rotary_tables
from fewbit.codecs.gguf_names import NAMES, SIDES, TOP, half_rows
from fewbit.codecs.gguf_tokenizer import WORDS
from fewbit.codecs.gguf_vocabulary import tokenizer_kv
from fewbit.errors import CheckpointError, UnsupportedError
from fewbit.files.gguf import GGML_IDS
from fewbit.files.vocabulary import check_vocabulary
from fewbit.files.writer import GGUFWriter
from fewbit.quant import qtensor
from fewbit.quant.elements import E2M1, E4M3, F32, INT4, INT5, INT8, UINT4, UINT5
from fewbit.quant.ggml import TYPES, to_blocks, type_of
from fewbit.quant.qtensor import QTensor, Quantized
from fewbit.quant.spec import Format, QuantSpec, Scale, describe

Layout = Mapping[str, tuple[Format | str, Sequence[int]]]  # name -> (format or dtype, shape)
NVFP4_INPUT = QuantSpec(
    E2M1, (Scale(E4M3, (1, 16), dynamic=True), Scale(F32, (0, 0)))
)  # the outer scale is in the file
BLOCKS = {INT4: "q4_0", INT5: "q5_0", INT8: "q8_0", UINT4: "q4_1", UINT5: "q5_1"}
FILE_TYPES = {
    "F32": 0, "F16": 1, "Q4_0": 2, "Q4_1": 3, "Q8_0": 7, "Q5_0": 8, "Q5_1": 9, "Q2_K": 10, "Q3_K": 12, "Q4_K": 15,
    "Q5_K": 17, "Q6_K": 18, "IQ2_XXS": 19, "IQ2_XS": 20, "IQ3_XXS": 23, "IQ1_S": 24, "IQ4_NL": 25, "IQ3_S": 26,
    "IQ2_S": 28, "IQ4_XS": 30, "IQ1_M": 31, "BF16": 32, "TQ1_0": 36, "TQ2_0": 37, "MXFP4": 38, "NVFP4": 39, "Q1_0": 40,
}  # fmt: skip
FLOATS = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
MIXTRAL_NAMES = {"gate_proj": "w1", "up_proj": "w3", "down_proj": "w2"}


def fit(form: Format) -> Format:
    """The format as a GGUF file holds it: the same codes, blocks as fine as ggml's."""
    if form.transforms:
        raise _no(form.weight, f"it comes with {', '.join(form.transforms)}, and a GGUF file holds weights alone")
    weight = _fit_weight(form.weight)
    if form.act is None:
        return Format(weight)
    chain = [(s.element, s.block, s.dynamic) for s in form.act.scales]
    if type_of(weight) == "nvfp4" and chain == [(s.element, s.block, s.dynamic) for s in NVFP4_INPUT.scales]:
        return Format(weight, NVFP4_INPUT)
    raise _no(form.weight, f"its inputs are rounded to {describe(form.act)}, which a GGUF file cannot say")


def _fit_weight(weight: QuantSpec) -> QuantSpec:
    if name := type_of(weight):
        return TYPES[name].spec
    floats = len(weight.scales) == 1 and weight.scales[0].element.kind == "native"
    if weight.element in BLOCKS and floats and len(weight.zeros) == (not weight.element.signed):
        rows, cols = weight.scales[0].block
        if rows not in (0, 1) or cols % 32:
            raise _no(weight, f"blocks of {rows} x {cols} are no whole number of ggml's 1 x 32")
        return TYPES[BLOCKS[weight.element]].spec
    nvfp4 = TYPES["nvfp4"].spec
    if [(s.element, s.block) for s in weight.scales] == [(s.element, s.block) for s in nvfp4.scales]:
        return nvfp4 if weight.element == E2M1 else _refuse(weight)
    return _refuse(weight)


def _refuse(weight: QuantSpec) -> QuantSpec:
    held = "4, 5 and 8 bit integers in blocks of 32 (asymmetric: 4 and 5), MXFP4, NVFP4 and ggml's own types"
    raise _no(weight, f"it holds {held}")


def _no(weight: QuantSpec, why: str) -> UnsupportedError:
    return UnsupportedError(f"gguf cannot hold {describe(weight)}", [why])


@dataclass(frozen=True, slots=True)
class Slot:
    """Where a Hugging Face tensor goes: a GGUF name, an entry of its leading axis, and what happens to its rows."""

    name: str
    index: int | None = None
    operation: str = ""


class Sink:
    """Takes tensors under Hugging Face names and writes one GGUF file. A context: without an error it closes itself."""

    def __init__(self, writer: GGUFWriter, slots: dict[str, tuple[Slot, ...]], types: dict[str, str], config: Any):
        self._writer, self._slots, self._types, self._config = writer, slots, types, config
        self._stacks: dict[str, dict[int, Tensor]] = {}
        self._sizes = _expert_counts(slots, types)
        self._closed = False

    def put(self, name: str, value: Quantized | Tensor) -> None:
        """One tensor or module of the layout, in any order."""
        if name not in self._slots:
            raise CheckpointError(f"{name}: was not declared when the file was created")
        for part, slot in enumerate(self._slots[name]):
            if isinstance(value, Quantized):
                weight = _codes(value.weight, slot, part, self._config)
                self._put(slot, to_blocks(weight, self._types[slot.name].lower()))
                self._put_sides(slot, value)
            else:
                dense = _values(value, slot, part, self._config)
                self._put(slot, dense.to(FLOATS[self._types[slot.name]]))

    def _put(self, slot: Slot, data: Tensor) -> None:
        if slot.index is None:
            self._writer.put(slot.name, data.contiguous())
            return
        held = self._stacks.setdefault(slot.name, {})
        held[slot.index] = data
        if len(held) == self._sizes[slot.name]:
            self._writer.put(slot.name, torch.stack([held[i] for i in sorted(held)]))
            del self._stacks[slot.name]

    def _put_sides(self, slot: Slot, value: Quantized) -> None:
        if self._types[slot.name] != "NVFP4":
            return
        planes = {"scale": value.weight.planes["scale1"], "input_scale": value.act.get("scale1")}
        for side, plane in planes.items():
            if plane is not None:
                flat = plane.float().flatten()
                count = value.weight.shape[0] if len(value.weight.shape) == 3 else 1
                self._put(
                    Slot(_side(slot.name, side), slot.index), flat.expand(count) if slot.index is None else flat[0]
                )

    def close(self) -> None:
        """Check that everything came, and give the file its name."""
        self._closed = True
        self._writer.close()

    def abort(self) -> None:
        self._writer.abort()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        if kind is not None:
            self.abort()
        elif not self._closed:
            self.close()


def create(
    out: str | Path, config: Mapping[str, Any], layout: Layout, files: Mapping[str, bytes], overwrite: bool = False
) -> Sink:
    """Plan a GGUF file from a config.json, the layout and the tokenizer files -> where to put the tensors."""
    arch, config = architecture_of(config), dict(config)
    slots = {name: slots_of(name, arch, config) for name in layout}
    types, shapes = _plan(layout, slots, config)
    if "token_embd.weight" not in shapes:
        raise CheckpointError("model.embed_tokens.weight is not among the tensors to write")
    vocab = shapes["token_embd.weight"][0]
    tables = rotary_tables(config)
    kv = metadata_of(config, arch, vocab) | tokenizer_kv(files, vocab)
    kv |= _special_kv(config, kv)
    kv["general.file_type"] = "u32", FILE_TYPES[_most(types, shapes)]
    if problems := check_vocabulary({key: value for key, (_, value) in kv.items()}):
        raise CheckpointError("\n".join(["the tokenizer cannot be written:", *(f"  {p}" for p in problems)]))
    tensors = {n: (GGML_IDS[types[n]], shape) for n, shape in shapes.items()}
    tensors |= {n: (GGML_IDS["F32"], tuple(table.shape)) for n, table in tables.items()}
    path = Path(out)
    writer = GGUFWriter(path if path.suffix == ".gguf" else path / "model.gguf", kv, tensors, overwrite)
    for n, table in tables.items():
        writer.put(n, table)
    return Sink(writer, slots, types, config)


def architecture_of(config: Mapping[str, Any]) -> str:
    """What a GGUF file calls the architecture of a config.json."""
    arch = ARCHITECTURES.get(str(config.get("model_type")))
    if arch is None:
        known = [f"known: {', '.join(sorted(ARCHITECTURES))}"]
        raise UnsupportedError(
            f"config.json: model_type {config.get('model_type')!r} has no GGUF architecture here", known
        )
    return arch


def refuse(config: Mapping[str, Any], names: Iterable[str], files: Mapping[str, bytes]) -> None:
    """Raise what `create` would raise of a model whatever it is quantized to: before the work, not after it."""
    arch, config = architecture_of(config), dict(config)
    for name in names:
        slots_of(name, arch, config)
    rotary_tables(config)
    vocab = int(config["vocab_size"])
    metadata_of(config, arch, vocab)
    tokenizer_kv(files, vocab)


def _special_kv(config: Mapping[str, Any], kv: Mapping[str, Any]) -> dict[str, tuple[str, Any]]:
    """Special tokens that config.json knows and the tokenizer's files do not; the second end is that of a turn."""
    out = {}
    for word, name in WORDS.items():
        key, ids = f"tokenizer.ggml.{name}_token_id", config.get(f"{word}_token_id")
        ids = [i for i in (ids if isinstance(ids, list) else [ids]) if isinstance(i, int)]
        if ids and key not in kv:
            out[key] = "u32", ids[0]
        if word == "eos" and (turn := [i for i in ids if i != (kv.get(key) or out[key])[1]]):
            out["tokenizer.ggml.eot_token_id"] = "u32", turn[0]
    return out


def _most(types: Mapping[str, str], shapes: Mapping[str, tuple[int, ...]]) -> str:
    """The type of most weights."""
    count: Counter[str] = Counter()
    for name, kind in types.items():
        count[kind] += int(torch.Size(shapes[name]).numel())
    return count.most_common(1)[0][0]


def _plan(
    layout: Layout, slots: Mapping[str, tuple[Slot, ...]], config: Mapping[str, Any]
) -> tuple[dict[str, str], dict[str, tuple[int, ...]]]:
    """-> the ggml type and shape of every tensor of the file."""
    types: dict[str, str] = {}
    shapes: dict[str, tuple[int, ...]] = {}
    experts = _expert_counts(slots, {})
    for name, (form, shape) in layout.items():
        for slot in slots[name]:
            kind, held = _held(name, form, tuple(shape), slot)
            if types.setdefault(slot.name, kind) != kind:
                raise UnsupportedError(f"{name}: is {kind}, and other experts of its stack are {types[slot.name]}")
            shapes[slot.name] = held if slot.index is None else (experts[slot.name], *held)
            if kind == "NVFP4":
                _plan_sides(form, slot, held, experts[slot.name], types, shapes)
    return types, shapes


def _expert_counts(slots: Mapping[str, tuple[Slot, ...]], types: Mapping[str, str]) -> Counter[str]:
    """How many entries each stack waits for, the scales beside NVFP4 included."""
    counts = Counter(s.name for each in slots.values() for s in each if s.index is not None)
    counts.update({_side(n, side): c for n, c in list(counts.items()) if types.get(n) == "NVFP4" for side in SIDES})
    return counts


def _plan_sides(
    form: Format | str, slot: Slot, held: tuple[int, ...], count: int, types: dict[str, str], shapes: dict[str, Any]
) -> None:
    sides = ["scale"] + (["input_scale"] if isinstance(form, Format) and form.act is not None else [])
    for side in sides:
        types[_side(slot.name, side)] = "F32"
        shapes[_side(slot.name, side)] = (count or (held[0] if len(held) == 3 else 1),)


def _side(name: str, side: str) -> str:
    return name.removesuffix("weight") + side


def _held(name: str, form: Format | str, shape: tuple[int, ...], slot: Slot) -> tuple[str, tuple[int, ...]]:
    """-> ggml type and shape of one tensor once its operation is done."""
    quantized = isinstance(form, Format)
    shape = _shape(shape, slot.operation, quantized)
    if isinstance(form, str):
        if form not in FLOATS:
            raise UnsupportedError(f"{name}: a dense tensor of {form} cannot be written", [f"can: {', '.join(FLOATS)}"])
        small = len(shape) < 2 or slot.name.endswith(("norm.weight", "ffn_gate_inp.weight", "sinks.weight"))
        return "F32" if small else form, shape  # ggml computes with these in float32 only
    kind = type_of(form.weight)
    if kind is None:
        raise UnsupportedError(f"{name}: {describe(form.weight)} is not a ggml type; fit it first")
    if shape[-1] % TYPES[kind].weights:
        reason = f"{kind.upper()} has blocks of {TYPES[kind].weights}"
        raise UnsupportedError(f"{name}: a row of {shape[-1]} cannot be written", [reason])
    return kind.upper(), shape


def _shape(shape: tuple[int, ...], operation: str, quantized: bool) -> tuple[int, ...]:
    if operation == "one_row":
        return shape[1:]
    if operation == "transpose":
        return shape if quantized else (shape[0], shape[2], shape[1])
    if operation != "interleave":
        return shape
    if len(shape) == 2:
        return shape[0], shape[1] // 2
    return (shape[0], shape[1] // 2, shape[2]) if quantized else (shape[0], shape[2] // 2, shape[1])


def slots_of(name: str, arch: str, config: Mapping[str, Any]) -> tuple[Slot, ...]:
    """A Hugging Face tensor (or module, without its ending) -> its places in a GGUF file."""
    names, full = NAMES[arch], name
    bare, ending = _ending(name)
    for leaf, hf in TOP.items():
        if bare == hf:
            shifted = names.plus_one and leaf.endswith("norm")
            return (Slot(f"{leaf}.{ending}", operation="plus_one" if shifted else ""),)
    if match := re.fullmatch(r"model\.layers\.(\d+)\.(.+)", name):
        layer, rest = match.groups()
        for target, (leaves, operation) in names.joined.items():
            if rest == target and operation == "interleave":
                return tuple(Slot(f"blk.{layer}.{leaf}", operation=operation) for leaf in leaves)
        for leaf, target in names.exact.items():
            if rest == target:
                transposed = leaf == "ffn_down_exps.weight"
                return (Slot(f"blk.{layer}.{leaf}", operation="transpose" if transposed else ""),)
        if slot := _layer_slot(layer, _mixtral(_ending(rest)[0], config), ending, arch):
            return (slot,)
    raise UnsupportedError(f"{full}: a GGUF file of architecture {arch!r} has no name for it")


def _ending(name: str) -> tuple[str, str]:
    for ending in ("weight", "bias"):
        if name.endswith(f".{ending}"):
            return name.removesuffix(f".{ending}"), ending
    return name, "weight"


def _mixtral(rest: str, config: Mapping[str, Any]) -> str:
    """Tools disagree on what Mixtral's experts are called."""
    if config.get("model_type") != "mixtral":
        return rest
    rest = re.sub(r"^mlp\.(gate$|experts\.)", r"block_sparse_moe.\1", rest)
    return re.sub(r"(gate|up|down)_proj$", lambda m: MIXTRAL_NAMES[m[0]], rest) if ".experts." in rest else rest


def _layer_slot(layer: str, rest: str, ending: str, arch: str) -> Slot | None:
    names = NAMES[arch]
    for leaf, target in names.layer.items():
        match = re.fullmatch(re.escape(target).replace(r"\{\}", r"(\d+)"), rest)
        if match is None:
            continue
        index = int(match[1]) if match.groups() else None
        return Slot(f"blk.{layer}.{leaf}.{ending}", index, _operation(leaf, arch))
    return None


def _operation(leaf: str, arch: str) -> str:
    names = NAMES[arch]
    if names.pairs and leaf in ("attn_q", "attn_k"):
        return "pairs_q" if leaf == "attn_q" else "pairs_k"
    if names.plus_one and leaf.endswith("norm"):
        return "plus_one"
    return "one_row" if leaf == "ffn_gate_inp_shexp" else ""


def _rows(rows: int, operation: str, part: int, config: Mapping[str, Any]) -> Tensor | None:
    """Which rows of a tensor go where, or None for all as they are."""
    if operation == "interleave":
        return torch.arange(part, rows, 2)
    heads = {"pairs_q": "num_attention_heads", "pairs_k": "num_key_value_heads"}.get(operation)
    return half_rows(rows, int(config.get(heads) or config["num_attention_heads"])) if heads else None


def _codes(weight: QTensor, slot: Slot, part: int, config: Mapping[str, Any]) -> QTensor:
    index = _rows(weight.shape[-2], slot.operation, part, config)
    if index is None:
        return weight
    moved = qtensor.rows(weight, index)
    return QTensor(moved.spec, (*weight.shape[:-2], len(index), weight.shape[-1]), moved.planes)


def _values(value: Tensor, slot: Slot, part: int, config: Mapping[str, Any]) -> Tensor:
    operation = slot.operation
    if operation in ("transpose", "interleave") and value.dim() == 3:
        value = value.transpose(1, 2)
    if operation == "plus_one":
        return value.float() + 1
    if operation == "one_row":
        return value.squeeze(0)
    axis = 1 if operation == "interleave" else 0
    index = _rows(value.shape[axis], operation, part, config)
    return value if index is None else value.index_select(axis, index)
