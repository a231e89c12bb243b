"""GGUF: bare files and folders with one, read as a Hugging Face checkpoint.

Names, values, config and tokenizer are those of the Hugging Face model the file was made from; weights stay the codes
they are. Stacked experts are one module each, read apart; what a table does not know is shown, not dropped.
"""

import re
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from fewbit.codecs.gguf_config import architecture, config_of
from fewbit.codecs.gguf_names import Recipe, interleave_rows, pair_rows, sort_tensors, split_name
from fewbit.codecs.gguf_tokenizer import tokenizer_files
from fewbit.codecs.gguf_write import NVFP4_INPUT
from fewbit.codecs.gguf_write import create as create
from fewbit.codecs.gguf_write import fit as fit
from fewbit.codecs.gguf_write import refuse as refuse
from fewbit.codecs.source import Entry, Source
from fewbit.errors import CheckpointError, UnsupportedError
from fewbit.files.checkpoint import Checkpoint
from fewbit.files.disk import DiskFile
from fewbit.files.gguf import GGUFFile, GGUFTensor
from fewbit.files.safetensors import TensorInfo
from fewbit.files.vocabulary import check_vocabulary
from fewbit.quant import qtensor
from fewbit.quant.ggml import TYPES, from_blocks
from fewbit.quant.plan import Plan, Rule
from fewbit.quant.qtensor import Planes, QTensor, Quantized
from fewbit.quant.reference import decode
from fewbit.quant.spec import Format

name = "gguf"
FLOATS = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "F64": torch.float64}
THROUGH_VALUES = ("kv_b", "minus_one", "one_row")


def open_source(checkpoint: Checkpoint) -> Source:
    """Sort the tensors of a GGUF checkpoint into modules, dense tensors and surplus, under Hugging Face names."""
    file = checkpoint.gguf
    assert file is not None
    arch = architecture(file)
    if problems := check_vocabulary(file.kv):
        raise CheckpointError("\n".join([f"{file.path}: {len(problems)} problems", *(f"  {p}" for p in problems)]))
    config = config_of(file)
    reader = Reader(file, config)
    evidence = f"{file.path.name}: GGUF version {file.version}, general.architecture = {arch}"
    source = Source(checkpoint.path, name, evidence, config, Plan(dialect=name), checkpoint, reader=reader.dense)
    found = sort_tensors({n: t.shape for n, t in file.tensors.items()}, arch, config["num_hidden_layers"])
    source.surplus |= found.surplus
    reader.recipes |= found.recipes
    reader.recipes |= {unknown: Recipe((unknown,), template=unknown) for unknown in found.unknown}
    rules = {recipe.template: _rule(reader, recipe) for recipe in reader.recipes.values() if reader.is_module(recipe)}
    source.plan = Plan(tuple(rules.values()), dialect=name)
    for target, recipe in reader.recipes.items():
        _add(source, reader, target, rules.get(recipe.template))
    source.tokenizer = tokenizer_files(file)
    return source


def _rule(reader: "Reader", recipe: Recipe) -> Rule:
    """What a quantized tensor of the file says about its module, or about all modules of its stack."""
    module = recipe.template.removesuffix(".weight")
    first = reader.file.info(recipe.sources[0])
    where = f"{first.file.name}: {' and '.join(recipe.sources)}: {first.type_name}"
    if "{}" not in module:
        return Rule(module, "exact", reader.format(recipe), where)
    pattern = re.escape(module).replace(r"\{\}", r"\d+") + "$"
    return Rule(pattern, "regex", reader.format(recipe), where)


def _add(source: Source, reader: "Reader", target: str, rule: Rule | None) -> None:
    recipe = reader.recipes[target]
    shape, infos = reader.shape(recipe), [reader.file.info(s) for s in recipe.sources]
    if not reader.is_module(recipe):
        kept = infos[0].type_name in FLOATS and recipe.operation not in ("kv_b", "minus_one")
        dtype = infos[0].type_name if kept else "F32"
        nbytes = int(torch.Size(shape).numel()) * FLOATS[dtype].itemsize
        source.dense[target] = TensorInfo(target, dtype, shape, infos[0].file, infos[0].start, nbytes)
        return
    names = (*recipe.sources, *reader.sides(recipe).values())
    share = infos[0].shape[0] if recipe.index is not None else 1
    nbytes = sum(reader.file.info(n).nbytes for n in names) // share
    entry = Entry(reader.format(recipe), shape, names, nbytes, rule, lambda: reader.module(recipe))
    source.modules[target.removesuffix(".weight")] = entry


class Reader:
    """Makes Hugging Face tensors of GGUF tensors, one recipe at a time."""

    def __init__(self, file: GGUFFile, config: dict[str, Any]):
        self.file, self.config = file, config
        self.recipes: dict[str, Recipe] = {}

    def is_module(self, recipe: Recipe) -> bool:
        """Quantized weights stay codes, unless the operation goes through the values."""
        infos = [self.file.info(s) for s in recipe.sources]
        quantized = infos[0].type_name.lower() in TYPES and len(self.shape(recipe)) > 1
        return quantized and recipe.operation not in THROUGH_VALUES and len({t.type_name for t in infos}) == 1

    def format(self, recipe: Recipe) -> Format:
        weight = TYPES[self.file.info(recipe.sources[0]).type_name.lower()].spec
        return Format(weight, NVFP4_INPUT if "input_scale" in self.sides(recipe) else None)

    def sides(self, recipe: Recipe) -> dict[str, str]:
        """NVFP4's scales in tensors of their own: {"scale": name, "input_scale": name}."""
        parts = split_name(recipe.sources[0])
        if parts is None or self.file.info(recipe.sources[0]).type_name != "NVFP4":
            return {}
        names = {side: recipe.sources[0].removesuffix("weight") + side for side in ("scale", "input_scale")}
        return {side: n for side, n in names.items() if n in self.file.tensors}

    def shape(self, recipe: Recipe) -> tuple[int, ...]:
        """Of the Hugging Face tensor."""
        shape = self.file.info(recipe.sources[0]).shape
        if recipe.index is not None:
            return shape[1:]
        return SHAPES[recipe.operation](shape, self.config, self._quantized(recipe))

    def _quantized(self, recipe: Recipe) -> bool:
        return self.file.info(recipe.sources[0]).type_name.lower() in TYPES

    def module(self, recipe: Recipe) -> Quantized:
        parts = [self._codes(source, recipe) for source in recipe.sources]
        weight = parts[0] if len(parts) == 1 else _join(parts)
        index = self._row_index(recipe, weight.shape[-2])
        if index is not None:
            weight = qtensor.rows(weight, index)
        return Quantized(self.format(recipe), weight, self._input_scale(recipe))

    def dense(self, target: str) -> Tensor:
        if target not in self.recipes:
            raise CheckpointError(f"{self.file.path}: no tensor makes {target!r}")
        recipe = self.recipes[target]
        values = [self._values(source, recipe) for source in recipe.sources]
        index = self._row_index(recipe, values[0].shape[0])
        if recipe.operation.startswith("pairs") and index is not None:
            return values[0].index_select(0, index)
        return VALUES[recipe.operation](values, self.config)

    def _row_index(self, recipe: Recipe, rows: int) -> Tensor | None:
        if recipe.operation == "interleave":
            return interleave_rows(rows)
        heads = {"pairs_q": "num_attention_heads", "pairs_k": "num_key_value_heads"}.get(recipe.operation)
        return pair_rows(rows, self.config[heads]) if heads else None

    def _codes(self, source: str, recipe: Recipe) -> QTensor:
        info = self.file.info(source)
        kind, shape = info.type_name.lower(), info.shape if recipe.index is None else info.shape[1:]
        return from_blocks(self._raw(info, recipe.index), kind, shape, self._side_planes(recipe, shape))

    def _side_planes(self, recipe: Recipe, shape: tuple[int, ...]) -> Planes:
        name = self.sides(recipe).get("scale")
        if name is None:
            return {}
        scale = self.file.read(name).view(torch.float32).flatten()
        scale = scale if recipe.index is None or len(scale) == 1 else scale[recipe.index : recipe.index + 1]
        return {"scale1": scale.view(-1, *[1] * (len(shape) - 1)).expand(*shape[:-2], 1, 1).contiguous()}

    def _input_scale(self, recipe: Recipe) -> Planes:
        name = self.sides(recipe).get("input_scale")
        if name is None:
            return {}
        scale = self.file.read(name).view(torch.float32).flatten()
        return {"scale1": (scale if recipe.index is None else scale[recipe.index : recipe.index + 1]).max().view(1, 1)}

    def _values(self, source: str, recipe: Recipe) -> Tensor:
        info = self.file.info(source)
        if info.type_name in FLOATS:
            return self._raw(info, recipe.index).view(FLOATS[info.type_name])
        if info.type_name.lower() not in TYPES:
            kinds = [f"read are {', '.join([*FLOATS, *(t.upper() for t in TYPES)])}"]
            raise UnsupportedError(
                f"{info.file}: tensor {source!r}: weights of type {info.type_name} are not read", kinds
            )
        raw = self._raw(info, recipe.index)
        flat = raw.view(-1, raw.shape[-1])
        shape = info.shape if recipe.index is None else info.shape[1:]
        return decode(from_blocks(flat, info.type_name.lower(), (flat.shape[0], shape[-1]))).view(shape)

    def _raw(self, info: GGUFTensor, index: int | None) -> Tensor:
        """The bytes of a tensor, or of one entry of its leading axis."""
        if index is None:
            return self.file.read(info.name)
        out = torch.empty(info.byte_shape[1:], dtype=torch.uint8)
        disk = DiskFile(info.file)
        try:
            disk.read_into(info.start + index * out.nbytes, out, f"tensor {info.name!r}")
        finally:
            disk.close()
        return out


def _join(parts: list[QTensor]) -> QTensor:
    """Rows of equal QTensors one after the other."""
    first, n = parts[0], sum(part.shape[-2] for part in parts)
    if any(part.spec.scales and part.spec.scales[-1].block == (0, 0) for part in parts):
        raise UnsupportedError("gate and up with a tensor scale each cannot be one stack", ["one scale for both can"])
    planes = {plane: torch.cat([part.planes[plane] for part in parts], -2) for plane in first.planes}
    return QTensor(first.spec, (*first.shape[:-2], n, first.shape[-1]), planes)


def _same(shape: tuple[int, ...], config: Mapping[str, Any], quantized: bool) -> tuple[int, ...]:
    return shape


def _interleaved(shape: tuple[int, ...], config: Mapping[str, Any], quantized: bool) -> tuple[int, ...]:
    if len(shape) == 2:
        return shape[0], 2 * shape[1]
    e, n, k = shape
    return (e, 2 * n, k) if quantized else (e, k, 2 * n)


def _transposed(shape: tuple[int, ...], config: Mapping[str, Any], quantized: bool) -> tuple[int, ...]:
    return shape if quantized else (shape[0], shape[2], shape[1])


def _kv_b_shape(shape: tuple[int, ...], config: Mapping[str, Any], quantized: bool) -> tuple[int, ...]:
    heads, rank = shape[0], shape[1]
    return heads * (config["qk_nope_head_dim"] + config["v_head_dim"]), rank


def _interleave(values: list[Tensor], config: Mapping[str, Any]) -> Tensor:
    joined = torch.stack(values, 2).flatten(1, 2)
    return joined.transpose(1, 2).contiguous() if joined.dim() == 3 else joined


def _kv_b(values: list[Tensor], config: Mapping[str, Any]) -> Tensor:
    """[H, rank, nope] and [H, v, rank] -> [H * (nope + v), rank]: what the absorbed form of MLA took apart."""
    keys, queries = values
    return torch.cat([keys.float().transpose(1, 2), queries.float()], 1).flatten(0, 1)


SHAPES = {
    "": _same,
    "pairs_q": _same,
    "pairs_k": _same,
    "minus_one": _same,
    "one_row": lambda shape, config, quantized: (1, *shape),
    "interleave": _interleaved,
    "transpose": _transposed,
    "kv_b": _kv_b_shape,
}
VALUES: dict[str, Callable[[list[Tensor], Mapping[str, Any]], Tensor]] = {
    "": lambda values, config: values[0],
    "minus_one": lambda values, config: values[0].float() - 1,
    "one_row": lambda values, config: values[0].unsqueeze(0),
    "interleave": _interleave,
    "transpose": lambda values, config: values[0].transpose(1, 2).contiguous(),
    "kv_b": _kv_b,
}
