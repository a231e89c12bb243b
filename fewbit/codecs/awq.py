"""AWQ checkpoints: 4-bit integers with a zero per group. What AWQ scaled away is folded into other weights.

Three layouts. gemm packs along N, eight columns to a word in the order 0 2 4 6 1 3 5 7. gemv packs along K in plain
order, one row of codes, zeros and scales per output. gemv_fast shuffles K within 32, interleaves four rows, and keeps
each zero as a float, already times its scale.
"""

from collections.abc import Callable, Iterator, Mapping
from functools import partial

import torch
from torch import Tensor

from fewbit.codecs.codec import FLOATS, Codec, Config, Located, by_header, refuse, want
from fewbit.codecs.int_config import fit_int, flag, group_size, int_format, integer, names
from fewbit.codecs.int_packing import (
    FLOAT_DTYPES,
    as_bytes,
    assemble,
    one_group,
    read_awq,
    unpack_words,
    write_awq,
)
from fewbit.errors import CheckpointError, UnsupportedError
from fewbit.quant.elements import UINT4
from fewbit.quant.pack import pack, unpack
from fewbit.quant.plan import Plan, Rule
from fewbit.quant.qtensor import Quantized, make
from fewbit.quant.spec import Format, QuantSpec, Scale

ENDINGS = (".qweight", ".qzeros", ".scales")
VERSIONS = {"gemm": "awq", "gemv": "awq-gemv", "gemv-fast": "awq-gemv-fast"}
ROWS, STEP = 4, 64  # gemv_fast: rows that interleave, and the columns of each before the next row's


def _version(config: Config) -> str:
    found = config.get("version") or config.get("format") or config.get("checkpoint_format") or "gemm"
    return str(found).lower().replace("_", "-")


def _claims(located: Located, name: str) -> str | None:
    config = located.config
    method = str(config.get("quant_method") or "").lower()
    if method != "awq" and not (not method and {"w_bit", "q_group_size"} <= config.keys()):
        return None
    version = _version(config)
    if VERSIONS.get(version, "awq") != name:  # an unknown version is refused by the plan
        return None
    what = "quant_method = awq" if method else "w_bit and q_group_size"
    return f"{located.where}: {what}, version = {version}"


def _plan(config: Config) -> Plan:
    version = _version(config)
    if version not in VERSIONS:
        reason = "its tensors have no published layout" if version == "llm-awq" else f"known: {', '.join(VERSIONS)}"
        raise UnsupportedError(f"AWQ version {version!r} cannot be read; gemm can", [reason])
    bits = integer(config, "w_bit" if "w_bit" in config else "bits", 4)
    if bits != 4:
        raise UnsupportedError(f"AWQ of {bits} bits cannot be read", ["only 4 bits have a layout"])
    group = group_size(config, "q_group_size" if "q_group_size" in config else "group_size", 128)
    form = int_format(4, group, not flag(config, "zero_point", True))
    if version == "gemv-fast":
        form = _float_zeros(form)
    return Plan(
        (*_skipped(config), Rule("Linear", "class", form, "quantization_config.bits")), dialect=VERSIONS[version]
    )


def _float_zeros(form: Format) -> Format:
    scale = form.weight.scales[0]
    return Format(QuantSpec(UINT4, (scale,), (Scale(scale.element, scale.block),), "range"))


def _skipped(config: Config) -> Iterator[Rule]:
    key = "modules_to_not_convert"
    for i, name in enumerate(names(config, key)):
        yield Rule(name, "substring", None, f"quantization_config.{key}[{i}]")


def _matrix(qweight: Tensor, rows: int, cols: int) -> tuple[int, int]:
    """[N, K], where an element of qweight stands for so many rows and columns."""
    if qweight.dim() != 2:
        raise CheckpointError(f".qweight: want two axes, found {list(qweight.shape)}")
    return qweight.shape[0] * rows, qweight.shape[1] * cols


def read_gemv(form: Format, tensors: Mapping[str, Tensor]) -> Quantized:
    n, k = _matrix(tensors[".qweight"], 1, 8)
    groups = -(-k // one_group(form.weight, k))
    qweight = want(".qweight", tensors[".qweight"], torch.int32, (n, k // 8))
    scales, qzeros = tensors[".scales"], tensors[".qzeros"]
    padded = scales.shape[-1]  # up to a multiple of 8, 16 or 32 groups
    if padded < groups:
        raise CheckpointError(f".scales: want at least {groups} groups a row, found {list(scales.shape)}")
    want(".scales", scales, FLOAT_DTYPES, (n, padded))
    zeros = unpack_words(want(".qzeros", qzeros, torch.int32, (n, padded // 8)), 4)
    kept = zeros[:, :groups].contiguous()
    weight = assemble(form.weight, as_bytes(qweight), scales[:, :groups], kept, (n, k))
    return Quantized(Format(weight.spec), weight)


def read_gemv_fast(form: Format, tensors: Mapping[str, Tensor]) -> Quantized:
    n, k = _matrix(tensors[".qweight"], ROWS, 1)
    groups = -(-k // one_group(form.weight, k))
    qweight = want(".qweight", tensors[".qweight"], torch.int16, (n // ROWS, k))
    if k % STEP:
        raise CheckpointError(f".qweight: gemv_fast interleaves runs of {STEP} columns, found {k} columns")
    padded = tensors[".scales"].shape[0]
    scales = want(".scales", tensors[".scales"], FLOAT_DTYPES, (padded, n))[:groups].T.contiguous()
    offsets = want(".qzeros", tensors[".qzeros"], scales.dtype, (padded, n))[:groups].T
    element, block = FLOATS[scales.dtype], form.weight.scales[0].block
    spec = QuantSpec(UINT4, (Scale(element, block),), (Scale(element, block),), form.weight.rule)
    planes = {"codes": pack(_rows(qweight, n, k), 4), "scale0": scales, "zero0": -offsets.contiguous()}
    weight = make(spec, (n, k), planes)
    return Quantized(Format(spec), weight)


def _rows(words: Tensor, n: int, k: int) -> Tensor:
    """[n / 4, k] int16 of gemv_fast -> [n, k] uint8."""
    nibbles = unpack(words.contiguous().view(torch.uint8), 4, k * ROWS)
    rows = nibbles.reshape(n // ROWS, k // STEP, ROWS, STEP).transpose(1, 2).reshape(n, k)
    return rows.reshape(n, k // 32, 32)[..., _within_32().argsort()].reshape(n, k)


def _within_32() -> Tensor:
    """The column of each of 32 nibbles: pairs taken across four runs of eight, then even places before odd ones."""
    pairs = torch.arange(32).reshape(4, 4, 2).transpose(0, 1).reshape(4, 4, 2)
    return pairs.transpose(1, 2).reshape(32)


def _fit(form: Format) -> Format:
    if form.transforms:
        raise refuse("awq", f"the transforms {', '.join(form.transforms)}", "it stores nothing beside codes and scales")
    return fit_int("awq", form, (4,), asym=True)


def _config(formats: Mapping[str, Format], dense: list[str], kv: QuantSpec | None) -> dict[str, Config]:
    groups = {form.weight.scales[0].block[1] or -1 for form in formats.values()}
    if len(groups) != 1:
        raise refuse("awq", f"groups of {sorted(groups)} side by side", "one group size serves the whole checkpoint")
    clash = [(d, m) for d in dense for m in formats if d in m]
    if clash:
        raise refuse("awq", f"{clash[0][0]} dense", f"it excludes by substring, and that is one of {clash[0][1]}")
    whole = {"quant_method": "awq", "bits": 4, "group_size": groups.pop(), "zero_point": True, "version": "gemm"}
    return {"quantization_config": whole | {"modules_to_not_convert": sorted(dense) or None}}


def _codec(name: str, read: Callable[[Format, Mapping[str, Tensor]], Quantized], summary: str) -> Codec:
    writes = name == "awq"
    return Codec(
        name, partial(_claims, name=name), _plan, ENDINGS, (".qweight", ".qzeros"), by_header(read), read,
        _fit if writes else None, partial(write_awq, dialect=name) if writes else None, _config if writes else None,
        explicit=False, summary=summary,
    )  # fmt: skip


CODECS = (
    _codec("awq", read_awq, "AWQ, packed along N: the layout other engines read"),
    _codec("awq-gemv", read_gemv, "AWQ, packed along K; read only"),
    _codec("awq-gemv-fast", read_gemv_fast, "AWQ, rows interleaved, float zeros; read only"),
)
