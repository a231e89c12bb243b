"""One dialect: codes as fewbit packs them, scales beside them, modules that stay dense listed under `skip`."""

from collections.abc import Mapping

import torch
from torch import Tensor

from fewbit.codecs.codec import Codec, Config, Tensors, by_header, by_method, refuse, want
from fewbit.quant.plan import Plan, Rule
from fewbit.quant.qtensor import Quantized, make
from fewbit.quant.spec import Format, QuantSpec
from fewbit_toy.formats import INT4_G16

NAME, CODES, SCALE = "toy-int4", ".toy_codes", ".toy_scale"


def plan(config: Config) -> Plan:
    skip = [Rule(name, "exact", None, f"skip[{i}]") for i, name in enumerate(config.get("skip", []))]
    return Plan((*skip, Rule("Linear", "class", INT4_G16, "quant_method")), dialect=NAME)


def read(form: Format, tensors: Mapping[str, Tensor]) -> Quantized:
    n, half = tensors[CODES].shape
    codes = want(CODES, tensors[CODES], torch.uint8, (n, half))
    scale = want(SCALE, tensors[SCALE], torch.float32, (n, -(-half // 8)))
    return Quantized(form, make(form.weight, (n, 2 * half), {"codes": codes, "scale0": scale}))


def fit(form: Format) -> Format:
    if form.weight.stored != INT4_G16.weight.stored or form.act or form.transforms:
        raise refuse(NAME, "this format", "it holds int4-g16 and nothing else")
    return INT4_G16


def write(q: Quantized) -> Tensors:
    return {CODES: q.weight.planes["codes"], SCALE: q.weight.planes["scale0"]}


def config(formats: Mapping[str, Format], dense: list[str], kv: QuantSpec | None) -> dict[str, Config]:
    return {"quantization_config": {"quant_method": NAME, "skip": dense}}


CODEC = Codec(
    NAME, by_method(NAME), plan, (CODES, SCALE), (CODES,), by_header(read), read, fit, write, config,
    summary="an example: INT4 in blocks of 16",
)  # fmt: skip
