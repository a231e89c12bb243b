"""Quanto checkpoints: INT8 or FP8 with a scale per row, and quanto_qmap.json, which lists every module by name.

Its INT4 and INT2 files hold the flattened matrix without its shape, so they are refused. The scales of inputs and
outputs are ones unless activations were quantized.
"""

from collections.abc import Iterator, Mapping

import torch
from torch import Tensor

from fewbit.codecs.codec import Codec, Config, Located, by_header
from fewbit.codecs.int_config import names
from fewbit.codecs.planes import FP8, bound, matrix, need, raw
from fewbit.errors import CheckpointError, UnsupportedError
from fewbit.quant.elements import E4M3, E5M2, F32, INT8, Element
from fewbit.quant.plan import Plan, Rule
from fewbit.quant.qtensor import Quantized
from fewbit.quant.spec import Format, spec

MAP = "quanto_qmap.json"
DTYPES: dict[Element, torch.dtype] = {INT8: torch.int8, E4M3: FP8, E5M2: torch.float8_e5m2}
ELEMENTS = {
    "qint8": INT8, "int8": INT8, "qfloat8": E4M3, "float8": E4M3, "qfloat8_e4m3fn": E4M3, "qfloat8_e5m2": E5M2,
}  # fmt: skip
NOT_READ = "INT4 and INT2 files hold the flattened matrix without its shape; int8 and float8 can be read"


def _claims(located: Located) -> str | None:
    if located.where == MAP:
        return f"{MAP} is there"
    method = str(located.config.get("quant_method") or "").lower()
    return f"{located.where}.quant_method = quanto" if method == "quanto" else None


def _plan(config: Config) -> Plan:
    return Plan(tuple(_whole(config) if "quant_method" in config else _mapped(config)), dialect="quanto")


def _mapped(config: Config) -> Iterator[Rule]:
    for name, own in config.items():
        if not isinstance(own, dict):
            raise CheckpointError(f"{MAP}: {name}: want an object, found {type(own).__name__}")
        yield Rule(name, "exact", _format(f"{MAP}: {name}", own), f"{MAP}[{name!r}]")


def _whole(config: Config) -> Iterator[Rule]:
    for i, name in enumerate(names(config, "modules_to_not_convert")):
        yield Rule(name, "substring", None, f"quantization_config.modules_to_not_convert[{i}]")
    yield Rule("Linear", "class", _format("quantization_config", config), "quantization_config.weights")


def _format(where: str, own: Config) -> Format | None:
    weights, activations = own.get("weights"), own.get("activations") or "none"
    if activations != "none":
        reasons = ["weights alone can", "its activations are rounded between modules, outputs too"]
        raise UnsupportedError(f"{where}: quanto's {activations} activations cannot be read", reasons)
    if weights == "none":
        return None
    if weights not in ELEMENTS:
        raise UnsupportedError(f"{where}: quanto's weights {weights!r} cannot be read", [NOT_READ])
    return Format(spec(ELEMENTS[weights], (F32, 1, 0), rule="amax"))


def _read(form: Format, tensors: Mapping[str, Tensor]) -> Quantized:
    element = form.weight.element
    stored = need(tensors, ".weight._data", f"the map says {element.name}")
    codes = matrix(".weight._data", stored, DTYPES[element])
    scale = (".weight._scale", need(tensors, ".weight._scale", "it scales the codes"))
    weight = bound(form.weight, codes.shape, raw(codes), scale)
    return Quantized(Format(weight.spec), weight)


CODECS = (
    Codec(
        "quanto", _claims, _plan, (".weight._data", ".weight._scale"), (".weight._data",), by_header(_read), _read,
        unused=(".input_scale", ".output_scale"), summary="Quanto: INT8 and FP8 rows; read only",
    ),
)  # fmt: skip
