"""bitsandbytes checkpoints: NF4 and FP4 over the flattened matrix, and rows of INT8.

4 bits: two codes a byte, the first in the high nibble; blocks of 64 run over row ends; double quantization keeps the
block maxima as codes of an 8-bit table. A JSON text among the tensors says what they are, and must agree with them.
8 bits: SCB is the largest magnitude of each row, w = q * SCB / 127.
"""

import json
import re
from collections.abc import Iterator, Mapping
from functools import cache
from typing import Any

import torch
from torch import Tensor

from fewbit.codecs.codec import Codec, Config, Tensors, by_header, by_method, refuse, want
from fewbit.codecs.int_config import flag, names
from fewbit.codecs.int_packing import matrix
from fewbit.errors import CheckpointError
from fewbit.files.text import load_json
from fewbit.quant.elements import DYNAMIC8, F32, FP4, INT8, NF4, Element
from fewbit.quant.pack import pack, unpack
from fewbit.quant.plan import Plan, Rule
from fewbit.quant.qtensor import QTensor, Quantized, make
from fewbit.quant.spec import FLAT, Format, QuantSpec, Scale, spec

TABLES = {"nf4": NF4, "fp4": FP4}
STATE = ".weight.quant_state.bitsandbytes__"
STATES = tuple(STATE + name for name in TABLES)
NESTED = 256  # maxima that share one float
BLOCKS = (32, 64, 128, 256, 512, 1024, 2048, 4096)
DTYPES = ("float16", "bfloat16", "float32")
STATE_BYTES = 256  # the JSON we write, padded so that its length does not hang on a number
ENDINGS = (
    ".weight", ".weight.absmax", ".weight.quant_map", ".weight.nested_absmax", ".weight.nested_quant_map", *STATES,
    ".SCB", ".weight_format",
)  # fmt: skip
TOKEN_INT8 = spec(INT8, (F32, 1, 0), dynamic=1)


def four_bit(element: Element, block: int, nested: int = 0) -> QuantSpec:
    """nested: maxima that share a float; 0 = they are floats themselves."""
    if not nested:
        return QuantSpec(element, (Scale(F32, (FLAT, block)),))
    chain = (Scale(DYNAMIC8, (FLAT, block)), Scale(F32, (FLAT, block * nested)), Scale(F32, (0, 0), "add"))
    return QuantSpec(element, chain, rule="double")


def eight_bit(act: QuantSpec | None) -> Format:
    return Format(QuantSpec(INT8, (Scale(F32, (1, 0)),)), act)


def _plan(config: Config) -> Plan:
    eight = flag(config, "load_in_8bit", flag(config, "_load_in_8bit", False))
    four = flag(config, "load_in_4bit", flag(config, "_load_in_4bit", False))
    if eight == four:
        raise CheckpointError("quantization_config: want one of load_in_4bit and load_in_8bit to be true")
    key = "load_in_8bit" if eight else "bnb_4bit_quant_type"
    form = _eight(config) if eight else _four(config)
    return Plan(
        (*_skipped(config), Rule("Linear", "class", form, f"quantization_config.{key}")), dialect="bitsandbytes"
    )


def _four(config: Config) -> Format:
    name = config.get("bnb_4bit_quant_type", "fp4")
    if name not in TABLES:
        raise CheckpointError(f"quantization_config.bnb_4bit_quant_type: want {' or '.join(TABLES)}, found {name!r}")
    nested = NESTED if flag(config, "bnb_4bit_use_double_quant", False) else 0
    return Format(four_bit(TABLES[name], 64, nested))


def _eight(config: Config) -> Format:
    """With a threshold, columns that hold an outlier stay in 16 bits, for whose sake all of the input does here."""
    threshold = config.get("llm_int8_threshold", 6.0)
    if not isinstance(threshold, int | float) or isinstance(threshold, bool) or threshold < 0:
        raise CheckpointError(f"quantization_config.llm_int8_threshold: want a number >= 0, found {threshold!r}")
    return eight_bit(None if threshold else TOKEN_INT8)


def _skipped(config: Config) -> Iterator[Rule]:
    """A name excludes what starts with it, up to a dot, and what ends with it."""
    key = "llm_int8_skip_modules"
    for i, name in enumerate(names(config, key)):
        pattern = rf"(?:{name})(?:\.|$)|.*{re.escape(name)}$"
        yield Rule(pattern, "regex", None, f"quantization_config.{key}[{i}]")


def read(form: Format, tensors: Mapping[str, Tensor]) -> Quantized:
    return _read_eight(form, tensors) if form.weight.element == INT8 else _read_four(form, tensors)


def _read_eight(form: Format, tensors: Mapping[str, Tensor]) -> Quantized:
    codes = tensors[".weight"]
    if ".weight_format" in tensors and int(tensors[".weight_format"]) != 0:
        raise CheckpointError(
            f".weight_format: want 0 (rows), found {int(tensors['.weight_format'])}: a GPU's own tiles"
        )
    if codes.dim() != 2:
        raise CheckpointError(f".weight: want [N, K], found {list(codes.shape)}")
    n, k = codes.shape
    want(".weight", codes, torch.int8, (n, k))
    scb = want(".SCB", tensors[".SCB"], torch.float32, (n,))
    planes = {"codes": codes.contiguous().view(torch.uint8), "scale0": (scb / 127).unsqueeze(-1)}
    return Quantized(form, make(form.weight, (n, k), planes))


def _read_four(form: Format, tensors: Mapping[str, Tensor]) -> Quantized:
    state = _state(form, tensors)
    n, k = state["shape"]
    block, nested = state["blocksize"], state.get("nested_blocksize", 0)
    weight = four_bit(form.weight.element, block, nested)
    stored = tensors[".weight"].contiguous().view(torch.uint8).flatten()
    if stored.numel() * 2 != n * k:
        raise CheckpointError(f"{STATE}*: shape [{n}, {k}] has {n * k} codes, and .weight holds {stored.numel() * 2}")
    _same_table(".weight.quant_map", tensors, form.weight.element)
    blocks = -(-n * k // block)
    planes = {"codes": _rows(_swap(stored), n, k)}
    if nested:
        _same_table(".weight.nested_quant_map", tensors, DYNAMIC8)
        groups = -(-blocks // nested)
        planes["scale0"] = want(".weight.absmax", tensors[".weight.absmax"], torch.uint8, (blocks,))[None]
        ending = ".weight.nested_absmax"
        planes["scale1"] = want(ending, tensors[ending], torch.float32, (groups,))[None]
        planes["scale2"] = torch.tensor([[state["nested_offset"]]], dtype=torch.float32)
    else:
        planes["scale0"] = want(".weight.absmax", tensors[".weight.absmax"], torch.float32, (blocks,))[None]
    return Quantized(Format(weight), make(weight, (n, k), planes))


def _swap(stored: Tensor) -> Tensor:
    """The nibbles of each byte change places."""
    return (stored >> 4) | (stored << 4)


def _rows(stream: Tensor, n: int, k: int) -> Tensor:
    """The bytes of n * k nibbles -> [n, bytes of a row]."""
    return stream.view(n, k // 2) if k % 2 == 0 else pack(unpack(stream, 4, n * k).reshape(n, k), 4)


def _same_table(ending: str, tensors: Mapping[str, Tensor], element: Element) -> None:
    found = want(ending, tensors[ending], torch.float32, (len(element.table),))
    ours = torch.tensor(element.table)
    if not torch.allclose(found, ours, rtol=1e-6, atol=1e-9):  # bitsandbytes computes it, to the last bit or not
        at = int((found - ours).abs().argmax())
        raise CheckpointError(f"{ending}: code {at} means {found[at]:g}; in {element.name} it means {ours[at]:g}")


def _state(form: Format, tensors: Mapping[str, Tensor]) -> dict[str, Any]:
    """The JSON among the tensors, held to its word and to the plan's."""
    endings = [ending for ending in STATES if ending in tensors]
    if len(endings) != 1:
        raise CheckpointError(f"{STATE}nf4 or {STATE}fp4: want one of them, found {endings or 'none'}")
    ending = endings[0]
    text = tensors[ending]
    state = load_json(bytes(want(ending, text, torch.uint8, (text.numel(),)).tolist()), ending, 1 << 16)
    if not isinstance(state, dict):
        raise CheckpointError(f"{ending}: want an object, found {type(state).__name__}")
    for key, (what, good) in _fields(ending, form, bool("nested_blocksize" in state)).items():
        if not good(state.get(key)):
            raise CheckpointError(f"{ending}: {key}: want {what}, found {state.get(key)!r}")
    if unknown := state.keys() - _fields(ending, form, "nested_blocksize" in state).keys():
        raise CheckpointError(f"{ending}: unknown fields {sorted(unknown)}")
    declared = len(form.weight.scales) > 1
    if declared != ("nested_blocksize" in state):
        raise CheckpointError(f"{ending}: bnb_4bit_use_double_quant is {declared}, and the tensor says otherwise")
    return state


def _fields(ending: str, form: Format, nested: bool) -> dict[str, tuple[str, Any]]:
    """Field -> what it must be, and the test of it."""
    name = form.weight.element.name
    fields = {
        "quant_type": (f"{name} (the config, and the tensor's name)", lambda v: v == name and ending == STATE + name),
        "blocksize": (f"one of {BLOCKS}", lambda v: _whole(v) and v in BLOCKS),
        "dtype": (f"one of {DTYPES}", lambda v: v in DTYPES),
        "shape": ("[N, K]", lambda v: isinstance(v, list) and len(v) == 2 and all(_whole(x) and x > 0 for x in v)),
    }
    if nested:
        fields["nested_blocksize"] = (f"{NESTED}", lambda v: _whole(v) and v == NESTED)
        fields["nested_dtype"] = ("float32", lambda v: v == "float32")
        fields["nested_offset"] = ("a number", lambda v: isinstance(v, float) or _whole(v))
    return fields


def _whole(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def write(q: Quantized) -> Tensors:
    n, k = matrix("bitsandbytes", q)
    return _write_eight(q.weight) if q.weight.spec.element == INT8 else _write_four(q.weight, n, k)


def _write_eight(q: QTensor) -> Tensors:
    return {
        ".weight": q.planes["codes"].view(torch.int8),
        ".SCB": _largest(q.planes["scale0"].squeeze(-1)),
        ".weight_format": torch.zeros((), dtype=torch.uint8, device=q.device),
    }


def _largest(scale: Tensor) -> Tensor:
    """The SCB that, divided by 127, gives the scale back; some scales of full float32 precision have none that does."""
    near = scale * 127
    for toward in (torch.inf, -torch.inf):
        other = torch.nextafter(near, torch.full_like(near, toward))
        near = torch.where((near / 127 != scale) & (other / 127 == scale), other, near)
    return near


def _write_four(q: QTensor, n: int, k: int) -> Tensors:
    if n * k % 2:
        raise refuse("bitsandbytes", f"a matrix of {n} x {k}", "it packs two codes a byte")
    codes = q.planes["codes"] if k % 2 == 0 else pack(unpack(q.planes["codes"], 4, k).reshape(1, -1), 4)
    element, nested = q.spec.element, len(q.spec.scales) > 1
    out = {
        ".weight": _swap(codes.reshape(-1, 1)),
        ".weight.absmax": q.planes["scale0"].flatten(),
        ".weight.quant_map": _table(element).to(q.device),
        STATE + element.name: _state_bytes(q, n, k),
    }
    if nested:
        out[".weight.nested_absmax"] = q.planes["scale1"].flatten()
        out[".weight.nested_quant_map"] = _table(DYNAMIC8).to(q.device)
    return out


@cache
def _table(element: Element) -> Tensor:
    return torch.tensor(element.table)


def _state_bytes(q: QTensor, n: int, k: int) -> Tensor:
    block = q.spec.scales[0].block[1]
    state: Config = {"quant_type": q.spec.element.name, "blocksize": block, "dtype": "bfloat16", "shape": [n, k]}
    if len(q.spec.scales) > 1:
        mean = q.planes["scale2"]
        offset = 0.0 if mean.is_meta else float(mean)
        state |= {"nested_blocksize": NESTED, "nested_dtype": "float32", "nested_offset": offset}
    text = json.dumps(state).encode().ljust(STATE_BYTES)
    return torch.frombuffer(bytearray(text), dtype=torch.uint8).to(q.device)


def fit(form: Format) -> Format:
    weight = form.weight
    if form.transforms:
        raise refuse("bitsandbytes", f"the transforms {', '.join(form.transforms)}", "it has no place for them")
    if weight.element == INT8 and not weight.zeros and [s.block for s in weight.scales] in ([(1, 0)], [(0, 0)]):
        if form.act is not None and not (form.act.element == INT8 and form.act.dynamic):
            raise refuse("bitsandbytes", f"{form.act.element.name} activations", "beside INT8 rows it rounds to INT8")
        return eight_bit(TOKEN_INT8 if form.act else None)
    if weight.element.name not in TABLES or form.act is not None:
        reasons = ("it holds nf4, fp4, and int8 with a scale per row",)
        raise refuse("bitsandbytes", f"{weight.element.name} codes", *reasons)
    rows, block = weight.scales[0].block
    if rows != FLAT or block not in BLOCKS or len(weight.scales) not in (1, 3):
        raise refuse("bitsandbytes", f"blocks of {weight.scales[0].block}", f"its blocks are flat, of {BLOCKS}")
    return Format(four_bit(weight.element, block, NESTED if len(weight.scales) == 3 else 0))


def config(formats: Mapping[str, Format], dense: list[str], kv: QuantSpec | None) -> dict[str, Config]:
    if len(set(formats.values())) != 1:
        names = sorted({form.weight.element.name for form in formats.values()})
        raise refuse("bitsandbytes", f"several formats side by side ({', '.join(names)})", "a checkpoint has one")
    form = next(iter(formats.values()))
    eight = form.weight.element == INT8
    whole: Config = {"quant_method": "bitsandbytes", "load_in_4bit": not eight, "load_in_8bit": eight}
    if eight:
        whole["llm_int8_threshold"] = 0.0 if form.act else 6.0
    else:
        whole["bnb_4bit_quant_type"] = form.weight.element.name
        whole["bnb_4bit_use_double_quant"] = len(form.weight.scales) > 1
        whole |= {"bnb_4bit_quant_storage": "uint8", "bnb_4bit_compute_dtype": "bfloat16"}
    return {"quantization_config": whole | {"llm_int8_skip_modules": sorted(dense) or None}}


SMALL = (*STATES, ".weight.quant_map", ".weight.nested_quant_map", ".weight_format")
CODECS = (
    Codec(
        "bitsandbytes", by_method("bitsandbytes"), _plan, ENDINGS,
        (".weight.absmax", ".weight.quant_map", *STATES, ".SCB"), by_header(read, *SMALL), read, fit, write, config,
        explicit=False, summary="NF4, FP4 and INT8 of bitsandbytes",
    ),
)  # fmt: skip
