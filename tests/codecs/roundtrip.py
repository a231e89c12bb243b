"""A module and its config, written; found again by whoever claims the config; and equal, plane by plane."""

from collections.abc import Iterator
from dataclasses import replace

import torch
from torch import Tensor

from fewbit import codecs
from fewbit.codecs.codec import Codec, Located
from fewbit.errors import UnsupportedError
from fewbit.quant.formats import FORMATS
from fewbit.quant.qtensor import Quantized, Transform
from fewbit.quant.reference import decode, encode
from fewbit.quant.spec import Format

NAME = "model.layers.0.mlp.down_proj"


def accepted(codec: Codec) -> Iterator[tuple[str, Format]]:
    """Every row of FORMATS that a codec can write, as it holds it."""
    assert codec.fit is not None
    for name, row in FORMATS.items():
        try:
            yield name, codec.fit(row)
        except UnsupportedError as refusal:
            assert refusal.reasons, name


def random_weight(n: int = 64, k: int = 256, seed: int = 0) -> Tensor:
    return torch.randn(n, k, generator=torch.Generator().manual_seed(seed))


def encoded(form: Format, n: int = 64, k: int = 256) -> Quantized:
    return Quantized(form, encode(random_weight(n, k), form.weight))


def back_again(codec: Codec, q: Quantized) -> Quantized:
    """Only the tensors and the config go from the writer to the reader."""
    assert codec.write and codec.config
    tensors = codec.write(q)
    config = codec.config({NAME: q.format}, ["lm_head"], None)["quantization_config"]
    reader, _ = codecs.claimant(Located(config, "config.json: quantization_config"))
    form, _ = reader.plan(config).for_module(NAME)
    assert form is not None and set(tensors) <= set(reader.endings)
    return reader.read(form, tensors)


def check_round_trip(codec: Codec, q: Quantized) -> None:
    """Equal planes after write and read, and the same layout on meta tensors."""
    assert codec.write
    back = back_again(codec, q)
    assert back.format == q.format
    assert back.weight.planes.keys() == q.weight.planes.keys()
    for name, plane in q.weight.planes.items():
        assert torch.equal(back.weight.planes[name], plane), name
    assert layout(codec.write(to_meta(q))) == layout(codec.write(q))


def to_meta(q: Quantized) -> Quantized:
    transforms = tuple(Transform(t.kind, {n: p.to("meta") for n, p in t.tensors.items()}) for t in q.transforms)
    return replace(q, weight=q.weight.to("meta"), transforms=transforms)


def layout(tensors: dict[str, Tensor]) -> dict[str, tuple[torch.dtype, tuple[int, ...]]]:
    return {ending: (t.dtype, tuple(t.shape)) for ending, t in tensors.items()}


def in_order(q: Quantized) -> Tensor:
    """The decoded weight, with its columns in the order of the input."""
    weight = decode(q.weight)
    for transform in q.transforms:
        assert transform.kind == "permute"
        weight = torch.empty_like(weight).index_copy_(-1, transform.tensors["index"], weight)
    return weight


def unsigned(words: Tensor) -> list[int]:
    return [int(word) & 0xFFFFFFFF for word in words.flatten()]


def stream(values: list[int], bits: int) -> list[int]:
    """The words of a dense little-endian bit stream, by arithmetic on one big number."""
    total = sum(value << (bits * i) for i, value in enumerate(values))
    return [total >> (32 * i) & 0xFFFFFFFF for i in range(len(values) * bits // 32)]
