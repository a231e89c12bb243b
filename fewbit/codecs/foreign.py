"""Dialects that are known and cannot be read: each is refused by name, with what would work instead."""

from collections.abc import Mapping

from torch import Tensor

from fewbit.codecs.codec import Codec, Config, Located, Parts
from fewbit.errors import UnsupportedError
from fewbit.quant.plan import Plan
from fewbit.quant.qtensor import Quantized
from fewbit.quant.spec import Format

AGAIN = "quantize the original model again, to gptq, awq, compressed-tensors or gguf"
CODEBOOK = "its codes index learned vectors, which the algebra of scales and zeros does not hold"
TRELLIS = "its codes are states of a trellis over rotated weights, decoded by its own kernels"
KERNEL = "its bytes lie in the order of one kernel"

# quant_method -> why it is not read; what would work follows
REASONS: dict[str, str] = {
    "aqlm": f"additive codebooks: {CODEBOOK}",
    "vptq": f"vector codebooks: {CODEBOOK}",
    "quip": f"QuIP#: {CODEBOOK}, and they are rotated",
    "quip-sharp": f"QuIP#: {CODEBOOK}, and they are rotated",
    "qtip": f"QTIP: {TRELLIS}",
    "exl2": "EXL2: the rows of one matrix have different widths, in an order of its own kernels",
    "exl3": f"EXL3: {TRELLIS}",
    "higgs": f"HIGGS: {CODEBOOK}, and they are rotated",
    "spqr": "SpQR: single weights that are kept apart, in a sparse layout of its own kernels",
    "squeezellm": "SqueezeLLM: each row has a table of its own, beside a sparse matrix",
    "hqq": "HQQ: zeros and packing depend on options that only its own package reads",
    "eetq": f"EETQ: {KERNEL}; it is INT8 per column made at load, so load the original with format int8-channel",
    "bitnet": "BitNet: ternary weights that need its own layer (a norm inside the linear)",
    "fp-quant": "FP-Quant: weights behind a Hadamard rotation whose matrix is not in the file",
    "quark": "Quark: its layouts are not published; Quark can export compressed-tensors or AWQ",
    "sinq": "SINQ: a second scale along the other axis, in a layout of its own package",
    "fouroversix": "fouroversix: its own tensor names; NVFP4 of ModelOpt or compressed-tensors is the same grid",
    "metal": f"MLX affine weights for Metal: {KERNEL}",
    "qqq": f"QQQ: {KERNEL}",
    "paroquant": "ParoQuant: pairwise rotations beside the codes, applied by its own kernels",
    "marlin": f"Marlin: {KERNEL}; the gptq checkpoint that it was made from can be read",
    "bitblas": f"BitBLAS: {KERNEL}; the gptq checkpoint that it was made from can be read",
    "gptq-marlin-24": f"Marlin with 2:4 sparsity: {KERNEL}",
    "deepspeedfp": "DeepSpeedFP: it quantizes at load, and stores nothing quantized",
    "tpu-int8": "it quantizes at load, and stores nothing quantized",
    "experts-int8": "it quantizes at load, and stores nothing quantized: load the original with format int8-channel",
    "owq": "OWQ: columns kept in 16 bit beside the codes, in an order of its own kernels",
    "flute": f"FLUTE: {KERNEL}, with a table per tensor",
}


def _method(config: Config) -> str:
    return str(config.get("quant_method") or "").lower().replace("_", "-")


def _claims(located: Located) -> str | None:
    method = _method(located.config)
    return f"{located.where}.quant_method = {method}" if method in REASONS else None


def _plan(config: Config) -> Plan:
    method = _method(config)
    if method not in REASONS:
        raise UnsupportedError(f"quant_method {method!r} is not known", [f"known and refused: {', '.join(REASONS)}"])
    raise UnsupportedError(f"quant_method {method!r} is known and cannot be read", [REASONS[method], AGAIN])


def _shape(form: Format, parts: Parts) -> tuple[int, ...]:
    raise AssertionError("the plan of a foreign dialect is never made")


def _read(form: Format, tensors: Mapping[str, Tensor]) -> Quantized:
    raise AssertionError("the plan of a foreign dialect is never made")


CODECS = (Codec("foreign", _claims, _plan, (), (), _shape, _read, summary=f"refused by name: {', '.join(REASONS)}"),)
