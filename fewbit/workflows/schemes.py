"""Schemes: the names people know, as formats of ours. A name is one row, or a mixture that depends on the tensor.

The mixtures are llama.cpp's: what a `Q4_K_M` file holds per kind of tensor and number of layer.
"""

from collections.abc import Callable
from dataclasses import dataclass

from fewbit.errors import SpecError
from fewbit.quant import formats
from fewbit.quant.formats import FORMATS

# the name, in any case and with - or _, of a scheme of llm-compressor, ModelOpt or vLLM -> a row of FORMATS
NAMES: dict[str, str] = {
    "fp8": "fp8-tensor-static",
    "fp8-static": "fp8-tensor-static",
    "fp8-dynamic": "fp8-channel",
    "fp8-block": "fp8-block",
    "fp8-per-channel-per-token": "fp8-channel",
    "fp8-pb-wo": "fp8-block-a16",
    "w8a8-fp8": "fp8-channel",
    "w8a16-fp8": "fp8-channel-a16",
    "w4a16": "int4-g128",
    "w4a16-asym": "int4-g128-asym",
    "w3a16": "int3-g128",
    "w2a16": "int2-g128",
    "w8a16": "int8-channel",
    "w8a8": "int8-channel-a8",
    "int8": "int8-channel-a8",
    "w4afp8": "int4-g128-a8fp8",
    "w4a8-awq": "int4-g128-a8fp8",
    "int4-awq": "int4-g128",
    "nvfp4a16": "nvfp4-a16",
    "w4a16-nvfp4": "nvfp4-a16",
    "mxfp4a16": "mxfp4-a16",
    "mxfp8a16": "mxfp8-a16",
}
DENSE = "dense"


@dataclass(frozen=True, slots=True)
class Place:
    """What a mixture looks at."""

    name: str
    kind: str  # linear, expert, head, embedding
    shape: tuple[int, ...]
    layer: int
    layers: int
    tied: bool = False  # the embedding is the output head too
    experts: int = 0


Mixture = Callable[[Place], str]


def resolve(name: str, group: int | None = None) -> str | Mixture:
    """A row of FORMATS, a scheme, or a file type of llama.cpp. group: another length for the groups of an int row."""
    plain = name.lower().replace("_", "-")
    if plain == DENSE:
        return DENSE
    if name.upper() in MIXTURES:
        return MIXTURES[name.upper()]
    row = NAMES.get(plain, plain)
    row = row if row in FORMATS else name.lower()
    if row not in FORMATS:
        known = [*sorted(n.upper().replace("-", "_") for n in NAMES), *MIXTURES]
        try:
            formats.get(row)
        except SpecError as error:
            raise SpecError(f"{error}; schemes: {', '.join(known)}") from None
    return row if group is None else regrouped(row, group)


def regrouped(row: str, group: int) -> str:
    """The row of the same integers with groups of another length (-1: a whole row, as the peers write it)."""
    base, found, rest = row.partition("-g")
    digits = rest.partition("-")[0]
    if not found or not digits.isdigit():
        raise SpecError(f"format {row} has no groups whose length can be chosen; int4-g128 and its like have")
    label = "-channel" if group == -1 else f"-g{group}"
    new = base + label + rest[len(digits) :]
    if new not in FORMATS:
        raise SpecError(f"group size {group} of {row}: no row {new}; known are 32, 64, 128 and -1 (a row)")
    return new


def more_bits(layer: int, layers: int) -> bool:
    """The layers to which llama.cpp gives more: the first and last eighth, and every third between."""
    eighth = layers // 8
    return layer < eighth or layer >= 7 * layers // 8 or (layer - eighth) % 3 == 2


def _k_mixture(base: str, size: str = "") -> Mixture:
    """base: q4_k ..., size: S, M, L."""

    def chosen(at: Place) -> str:
        if at.kind == "head" or (at.kind == "embedding" and at.tied):
            return _fitting("q6_k", at)
        role = next((role for role, leaves in ROLES.items() if at.name.endswith(leaves)), "")
        better = BETTER.get((base, size, role)) if at.kind != "embedding" else None
        return _fitting(better(at) or base if better else base, at)

    return chosen


# the part of a module's name -> what llama.cpp calls its role
ROLES = {
    "v": ("v_proj",),
    "qkv": ("qkv_proj", "query_key_value", "c_attn"),
    "o": ("o_proj", "out_proj", "attention.dense"),
    "down": ("down_proj", "w2", "fc2"),
}


def _always(name: str) -> Callable[[Place], str | None]:
    return lambda at: name


def _early(name: str, part: int) -> Callable[[Place], str | None]:
    return lambda at: name if at.layer < max(at.layers // part, 1) else None


def _often(name: str) -> Callable[[Place], str | None]:
    return lambda at: name if more_bits(at.layer, at.layers) else None


def _q3_down(at: Place) -> str | None:
    if at.layer < at.layers // 16:
        return "q5_k"
    return "q4_k" if more_bits(at.layer, at.layers) else None


# (type, size, role) -> what it gets instead; nothing = the type itself
BETTER: dict[tuple[str, str, str], Callable[[Place], str | None]] = {
    ("q2_k", "", "v"): _always("q4_k"),
    ("q2_k", "", "down"): _always("q3_k"),
    ("q2_k", "", "o"): _always("q3_k"),
    ("q3_k", "M", "v"): lambda at: "q5_k" if at.layer < 2 else "q4_k",
    ("q3_k", "M", "qkv"): _always("q4_k"),
    ("q3_k", "M", "o"): _always("q4_k"),
    ("q3_k", "M", "down"): _q3_down,
    ("q3_k", "L", "v"): _always("q5_k"),
    ("q3_k", "L", "qkv"): _always("q4_k"),
    ("q3_k", "L", "o"): _always("q5_k"),
    ("q3_k", "L", "down"): _always("q5_k"),
    ("q4_k", "S", "v"): lambda at: "q5_k" if at.layer < 4 else None,
    ("q4_k", "S", "down"): _early("q5_k", 8),
    ("q4_k", "M", "v"): _often("q6_k"),
    ("q4_k", "M", "qkv"): _always("q5_k"),
    ("q4_k", "M", "down"): _often("q6_k"),
    ("q5_k", "M", "v"): _often("q6_k"),
    ("q5_k", "M", "qkv"): _always("q6_k"),
    ("q5_k", "M", "down"): _often("q6_k"),
}
# what a row that is no whole number of blocks of 256 gets
SMALLER = {"q2_k": "iq4_nl", "q3_k": "iq4_nl", "q4_k": "q5_0", "q5_k": "q5_1", "q6_k": "q8_0", "iq4_xs": "iq4_nl"}


def _fitting(row: str, at: Place) -> str:
    if at.shape[-1] % 256 and row in SMALLER:
        row = SMALLER[row]
    return row if at.shape[-1] % 32 == 0 else DENSE


MIXTURES: dict[str, Mixture] = {
    "Q2_K": _k_mixture("q2_k"),
    "Q3_K_S": _k_mixture("q3_k", "S"),
    "Q3_K_M": _k_mixture("q3_k", "M"),
    "Q3_K_L": _k_mixture("q3_k", "L"),
    "Q4_K_S": _k_mixture("q4_k", "S"),
    "Q4_K_M": _k_mixture("q4_k", "M"),
    "Q5_K_S": _k_mixture("q5_k", "S"),
    "Q5_K_M": _k_mixture("q5_k", "M"),
    "Q6_K": _k_mixture("q6_k"),
    "Q4_0": _k_mixture("q4_0"),
    "Q4_1": _k_mixture("q4_1"),
    "Q5_0": _k_mixture("q5_0"),
    "Q5_1": _k_mixture("q5_1"),
    "Q8_0": _k_mixture("q8_0"),
    "IQ4_NL": _k_mixture("iq4_nl"),
    "IQ4_XS": _k_mixture("iq4_xs"),
}
EMBEDS = frozenset(MIXTURES)  # file types that hold the embedding and the head in low bits too
