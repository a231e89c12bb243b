"""Plain checkpoints: every tensor is a float. What `--to dense` writes."""

from collections.abc import Mapping

from torch import Tensor

from fewbit.codecs.codec import Codec, Config, Located, Parts, refuse
from fewbit.quant.plan import Plan
from fewbit.quant.qtensor import Quantized
from fewbit.quant.spec import Format


def _claims(located: Located) -> str | None:
    return located.where if not located.config else None


def _plan(config: Config) -> Plan:
    return Plan(dialect="dense")


def _shape(form: Format, parts: Parts) -> tuple[int, ...]:
    raise AssertionError("a dense checkpoint has no quantized modules")


def _read(form: Format, tensors: Mapping[str, Tensor]) -> Quantized:
    raise AssertionError("a dense checkpoint has no quantized modules")


def _fit(form: Format) -> Format:
    raise refuse("dense", "codes", "it holds plain floats: ask for --to dense, which decodes")


CODECS = (Codec("dense", _claims, _plan, (), (), _shape, _read, _fit, summary="plain safetensors"),)
