"""QuantizationArgs, the words in which compressed-tensors describes one tensor, as specs and back.

A cache is seen as [kv heads, everything a head holds]: a scale per tensor has block (0, 0), one per head (`attn_head`)
block (1, 0).
"""

from dataclasses import replace
from typing import Any

from fewbit.errors import CheckpointError, UnsupportedError
from fewbit.quant.elements import E2M1, E4M3, E8M0, ELEMENTS, F32, Element
from fewbit.quant.spec import QuantSpec, Scale

Args = dict[str, Any]
INT8: Args = {"num_bits": 8, "type": "int", "strategy": "channel"}
TOKEN: Args = {"num_bits": 8, "type": "int", "strategy": "token", "dynamic": True}
FP8: Args = {"num_bits": 8, "type": "float", "strategy": "tensor"}
FP8_TOKEN: Args = {**FP8, "strategy": "token", "dynamic": True}
NVFP4: Args = {"num_bits": 4, "type": "float", "strategy": "tensor_group", "group_size": 16}
MX: Args = {"type": "float", "strategy": "group", "group_size": 32, "scale_dtype": "torch.uint8"}


def _group128(bits: int) -> Args:
    return {"num_bits": bits, "type": "int", "strategy": "group", "group_size": 128}


# name -> (weights, input activations), as version 0.19 defines them
PRESETS: dict[str, tuple[Args | None, Args | None]] = {
    "UNQUANTIZED": (None, None),
    **{f"W{bits}A16": (_group128(bits), None) for bits in range(2, 9)},
    **{f"W{bits}A8": (_group128(bits), TOKEN) for bits in range(2, 8)},
    **{f"W{bits}A4": (_group128(bits), {**TOKEN, "num_bits": 4}) for bits in range(2, 5)},
    "W8A8": (INT8, TOKEN),
    "INT8": (INT8, TOKEN),
    "W4A16_ASYM": ({**_group128(4), "symmetric": False}, None),
    "W4AFP8": (_group128(4), FP8_TOKEN),
    "FP8": (FP8, FP8),
    "FP8_DYNAMIC": ({**FP8, "strategy": "channel"}, FP8_TOKEN),
    "FP8_BLOCK": (
        {**FP8, "strategy": "block", "block_structure": [128, 128]},
        {**FP8, "strategy": "group", "group_size": 128, "dynamic": True},
    ),
    "NVFP4A16": (NVFP4, None),
    "NVFP4": (NVFP4, {**NVFP4, "dynamic": "local"}),
    **{f"MXFP{bits}A16": ({**MX, "num_bits": bits}, None) for bits in (4, 8)},
    **{f"MXFP{bits}": ({**MX, "num_bits": bits}, {**MX, "num_bits": bits, "dynamic": True}) for bits in (4, 8)},
}


def weight_spec(args: Args, where: str, packing: str = "") -> QuantSpec:
    """Of weights; float scales are F32 until a file says otherwise."""
    element, strategy = _element(args, where), _strategy(args)
    size = _size(args, where) if "group" in strategy else 0
    if strategy == "tensor_group":
        return QuantSpec(element, (Scale(E4M3, (1, size)), Scale(F32, (0, 0), "div")), rule="range")
    blocks = {"tensor": (0, 0), "channel": (1, 0), "group": (1, size), "block": _rectangle(args, where)}
    if strategy not in blocks:
        raise CheckpointError(f"{where}.strategy = {strategy} does not go with weights; known: {', '.join(blocks)}")
    shared = _shared_exponent(args, packing)
    return _spec(element, Scale(E8M0 if shared else F32, blocks[strategy]), shared)


def act_spec(args: Args, where: str) -> QuantSpec:
    """Of input activations."""
    element, strategy = _element(args, where), _strategy(args)
    dynamic = args.get("dynamic", False)
    if dynamic not in (True, False, "local"):
        raise CheckpointError(f"{where}.dynamic = {dynamic!r}; known: true, false, local")
    size = _size(args, where) if "group" in strategy else 0
    if strategy == "tensor_group" and dynamic is not True:
        return QuantSpec(element, (Scale(E4M3, (1, size), dynamic=True), Scale(F32, (0, 0), "div")), rule="range")
    if strategy not in ("tensor", "token", "group", "tensor_group") or (not dynamic and strategy != "tensor"):
        how = "dynamic" if dynamic else "static"
        raise UnsupportedError(f"{where}: {how} activations per {strategy}", ["known: tensor; dynamic token and group"])
    block = {"tensor": (0, 0), "token": (1, 0)}.get(strategy, (1, size))
    shared = _shared_exponent(args, "")
    kept = E8M0 if shared else E4M3 if strategy == "tensor_group" else F32
    return _spec(element, Scale(kept, block, dynamic=bool(dynamic)), shared)


def cache_spec(args: Args, where: str) -> QuantSpec:
    """Of the cache of keys and values."""
    if _strategy(args) != "attn_head":
        return act_spec(args, where)
    return _spec(_element(args, where), Scale(F32, (1, 0), dynamic=bool(args.get("dynamic"))), False)


def is_reordered(weights: Args) -> bool:
    """Groups of columns in order of activation: files before 0.19 hold them, with weight_g_idx."""
    order = weights.get("actorder")
    return _strategy(weights) == "group" and (order is True or order in ("group", "dynamic"))


def _spec(element: Element, scale: Scale, shared: bool) -> QuantSpec:
    unsigned = element.kind == "int" and not element.signed
    zeros = (replace(scale, element=element),) if unsigned else ()
    return QuantSpec(element, (scale,), zeros, "mx-round" if shared else "range")


def _element(args: Args, where: str) -> Element:
    bits, kind, symmetric = args.get("num_bits", 8), str(args.get("type", "int")).lower(), args.get("symmetric", True)
    if kind == "float" and symmetric and bits in (4, 8):
        return E4M3 if bits == 8 else E2M1
    if kind == "int" and isinstance(bits, int) and 1 <= bits <= 8:
        return ELEMENTS[f"{'int' if symmetric else 'uint'}{bits}"]
    sign = "" if symmetric else "asymmetric "
    raise UnsupportedError(f"{where}: {sign}{kind} of {bits} bits", ["known: int of 1 to 8 bits, float of 4 and 8"])


def _strategy(args: Args) -> str:
    size = args.get("group_size")
    if args.get("strategy"):
        return str(args["strategy"]).lower()
    if not size:
        return "tensor"
    return "channel" if size == -1 else "group"


def _size(args: Args, where: str) -> int:
    size = args.get("group_size")
    if not isinstance(size, int) or size <= 0:
        raise CheckpointError(f"{where}.group_size must be a positive number, found {size!r}")
    return size


def _rectangle(args: Args, where: str) -> tuple[int, int]:
    if _strategy(args) != "block":
        return 0, 0
    found = args.get("block_structure")
    sides = [int(s) for s in found.split("x") if s.isdigit()] if isinstance(found, str) else found
    if not isinstance(sides, list) or len(sides) != 2 or not all(isinstance(s, int) and s > 0 for s in sides):
        raise CheckpointError(f"{where}.block_structure must be two positive numbers, found {found!r}")
    return sides[0], sides[1]


def _shared_exponent(args: Args, packing: str) -> bool:
    """MX: the library's own test, and the formats that say it by name."""
    if str(args.get("type")).lower() != "float" or args.get("group_size") != 32:
        return False
    return packing.startswith("mx") or args.get("num_bits") == 4 or str(args.get("scale_dtype")).endswith("uint8")


def args_of(s: QuantSpec, per_head: bool = False) -> Args:
    """The inverse: a spec in QuantizationArgs."""
    inner = s.scales[0]
    strategy, extra = ("attn_head", {}) if per_head else _strategy_of(s)
    kept = {E8M0: "torch.uint8", E4M3: "torch.float8_e4m3fn"}.get(inner.element)
    return {
        "num_bits": int(s.element.bits),
        "type": "int" if s.element.kind == "int" else "float",
        "symmetric": not s.zeros,
        "strategy": strategy,
        "group_size": None,
        "block_structure": None,
        "dynamic": "local" if inner.dynamic and len(s.scales) == 2 else inner.dynamic,
        "actorder": None,
        "scale_dtype": kept,
        "zp_dtype": "torch.int8" if s.zeros else None,
        "observer": None,
        **extra,
    }


def _strategy_of(s: QuantSpec) -> tuple[str, Args]:
    rows, cols = s.scales[0].block
    if len(s.scales) == 2 or (s.element == E2M1 and s.scales[0].element == E4M3):
        return "tensor_group", {"group_size": cols}
    if (rows, cols) == (0, 0):
        return "tensor", {}
    if (rows, cols) == (1, 0):
        return "token" if s.scales[0].dynamic else "channel", {}
    return ("group", {"group_size": cols}) if rows == 1 else ("block", {"block_structure": [rows, cols]})
