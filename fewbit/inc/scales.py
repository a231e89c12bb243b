"""Scales as INC chooses them: a scale method is a row of two rules, one for activations and one for weights.

A tensor whose largest magnitude is m is divided by s = m / (F * backoff), F being the largest value of the number type
on the device; a rule may round s up to a power of two, or to the scales that the device applies at no cost. Where the
row says opt, weights take the candidate with the least squared error instead. Reference: Intel Neural Compressor,
fp8_quant; computed in float64 here, and in hp_dtype there, which may differ where bfloat16 rounds onto a power of two.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from fewbit.errors import RequestError
from fewbit.inc.words import choice, known_keys
from fewbit.quant import elements
from fewbit.quant.elements import E4M3, E4M3_240, E5M2, E8M0, F32, Element
from fewbit.quant.spec import QuantSpec, spec

Choose = Literal["fixed", "maxabs", "opt"]
Round = Literal["none", "unit", "single", "pow2", "hw"]
Per = Literal["tensor", "channel", "token"]


@dataclass(frozen=True, slots=True)
class Unit:
    """A number type on a device. low, high, step: powers of two of the scales that it applies at no cost."""

    element: Element
    low: int
    high: int
    step: int

    @property
    def scales(self) -> tuple[float, ...]:
        """Largest first, in the order of the exponent biases that they stand for."""
        return tuple(2.0**k for k in range(self.high, self.low - 1, -self.step))


UNITS: dict[tuple[str, str], Unit] = {
    ("GAUDI2", "E4M3"): Unit(E4M3_240, -8, 4, 4),
    ("GAUDI3", "E4M3"): Unit(E4M3, -55, 7, 1),
    ("GAUDI2", "E5M2"): Unit(E5M2, -8, 4, 4),  # INC rounds by the scales of E4M3 whatever the number type
    ("GAUDI3", "E5M2"): Unit(E5M2, -55, 7, 1),
}


@dataclass(frozen=True, slots=True)
class Rule:
    """How one tensor's scale is chosen. backoff: of the full scale, how much is used; None: the config's."""

    round: Round
    choose: Choose = "maxabs"
    per: Per = "tensor"
    backoff: float | None = None


@dataclass(frozen=True, slots=True)
class Method:
    act: Rule
    weight: Rule

    @property
    def measures(self) -> bool:
        """Whether it asks for measurements."""
        return self.act.choose != "fixed" and self.act.per != "token"

    @property
    def dynamic(self) -> bool:
        return self.act.per == "token"


UNIT, SINGLE = Rule("unit", "fixed"), Rule("single", "fixed")
PLAIN, POW2, HW = Rule("none"), Rule("pow2"), Rule("hw")
HW_OPT, POW2_OPT = Rule("hw", "opt"), Rule("pow2", "opt")
ROWS, ROWS_OPT = Rule("pow2", per="channel"), Rule("pow2", "opt", "channel")
TOKEN = Rule("pow2", per="token", backoff=1.0)

METHODS: dict[str, Method] = {
    "UNIT_SCALE": Method(UNIT, UNIT),
    "HW_ALIGNED_SINGLE_SCALE": Method(SINGLE, SINGLE),
    "MAXABS_ARBITRARY": Method(PLAIN, PLAIN),
    "MAXABS_POW2": Method(POW2, POW2),
    "MAXABS_HW": Method(HW, HW),
    "MAXABS_HW_OPT_WEIGHT": Method(HW, HW_OPT),
    "MAXABS_POW2_OPT_WEIGHT": Method(POW2, POW2_OPT),
    "ACT_MAXABS_HW_WEIGHTS_PCS_MAXABS_POW2": Method(HW, ROWS),
    "ACT_MAXABS_HW_WEIGHTS_PCS_OPT_POW2": Method(HW, ROWS_OPT),
    "ACT_MAXABS_POW2_WEIGHTS_PCS_MAXABS_POW2": Method(POW2, ROWS),
    "ACT_MAXABS_POW2_WEIGHTS_PCS_OPT_POW2": Method(POW2, ROWS_OPT),
    "ACT_MAXABS_PCS_POW2_WEIGHT_MAXABS_PTS_POW2_HW": Method(TOKEN, HW),
    "MAXABS_PCS_POW2": Method(TOKEN, ROWS),
}
SMOOTHING = "it moves scales from activations into the layer before; `fewbit quantize --algo smooth` does that"
REFUSED: dict[str, str] = {
    "SMOOTHQUANT_WEIGHTS_OUTPUT_CHANNEL_MAXABS_POW2": SMOOTHING,
    "WEAKSMOOTHQUANT_WEIGHTS_OUTPUT_CHANNEL_MAXABS_POW2": SMOOTHING,
    "SMOOTHQUANT_OPT": SMOOTHING,
    "MAX": "INC names it and has no scales for it",
}


def plain(scale: Tensor, unit: Unit) -> Tensor:
    return torch.where(scale > 0, scale, 1.0)


def pow2(scale: Tensor, unit: Unit) -> Tensor:
    """Up to a power of two; what was never other than zero takes 1."""
    mantissa, power = torch.frexp(scale)  # scale = mantissa * 2**power, mantissa in [0.5, 1)
    return torch.where(scale > 0, torch.exp2((power - (mantissa == 0.5).int()).double()), 1.0)


def hw(scale: Tensor, unit: Unit) -> Tensor:
    """Up to a scale of the device, within those that it has."""
    power = pow2(scale, unit).log2()
    power = (torch.ceil(power / unit.step) * unit.step).clamp(unit.low, unit.high)
    return torch.exp2(torch.where(scale > 0, power, float(unit.low)))


ROUNDINGS: dict[str, Callable[[Tensor, Unit], Tensor]] = {
    "none": plain,
    "unit": lambda scale, unit: torch.ones_like(scale),
    "single": lambda scale, unit: torch.full_like(scale, unit.scales[0]),
    "pow2": pow2,
    "hw": hw,
}


def scale_of(amax: Tensor | float, rule: Rule, unit: Unit, backoff: float) -> Tensor:
    """amax: any shape, the largest magnitudes -> scales, float64. backoff: the config's."""
    amax = torch.as_tensor(amax, dtype=torch.float64)
    share = backoff if rule.backoff is None else rule.backoff
    return ROUNDINGS[rule.round](amax / (unit.element.max * share), unit)


def candidates(rule: Rule, unit: Unit) -> tuple[float, ...]:
    """What opt chooses among: scales, or for channels the factors of each channel's own."""
    if rule.per == "channel":
        return tuple(2.0**k for k in range(-3, 5))
    return unit.scales if rule.round == "hw" else tuple(2.0**k for k in range(-10, 10))


def losses(w: Tensor, scales: Sequence[Tensor], element: Element) -> Tensor:
    """w: [N, K]; scales: [] or [N, 1] each -> [candidates, N], squared errors of rows."""
    w = w.double()

    def loss(scale: Tensor) -> Tensor:
        back = elements.decode(elements.encode((w / scale).float(), element), element).double() * scale
        return (back - w).square().sum(-1)

    return torch.stack([loss(scale) for scale in scales])


def least(found: Tensor) -> int:
    """found: [candidates], errors -> the least one; of equal ones the last, as INC's comparison leaves it."""
    return len(found) - 1 - int(found.flip(0).argmin())


def channel_scales(w: Tensor, rule: Rule, unit: Unit, backoff: float) -> Tensor:
    """w: [N, K] -> [N, 1] float64."""
    own = scale_of(w.abs().amax(-1, keepdim=True), rule, unit, backoff)
    if rule.choose != "opt":
        return own
    factors = candidates(rule, unit)
    best = losses(w, [own * factor for factor in factors], unit.element).argmin(0)  # of equal ones the first
    return own * torch.tensor(factors, dtype=torch.float64)[best][:, None]


def act_spec(rule: Rule, unit: Unit) -> QuantSpec:
    """What inputs are rounded to."""
    if rule.per == "token":
        return spec(unit.element, (E8M0, 1, 0), rule="mx-ceil", dynamic=1)
    return spec(unit.element, (F32, 0, 0))


def weight_spec(rule: Rule, unit: Unit) -> QuantSpec:
    return spec(unit.element, (F32, 1, 0) if rule.per == "channel" else (F32, 0, 0))


def rule_from(given: Mapping[str, object], where: str) -> Rule:
    """One half of a scale method that is spelt out: granularity, scale_value_type, rounding_method, backoff."""
    known_keys(given, ("granularity", "scale_value_type", "rounding_method", "backoff"), where)
    words: dict[str, str] = {
        key: choice(given.get(key, default), tuple(table), f"{where}.{key}") for key, (default, table) in SPELT.items()
    }
    backoff = given.get("backoff")
    if backoff is not None and not (isinstance(backoff, int | float) and 0 < backoff <= 1):
        raise RequestError(f"{where}.backoff={backoff!r}: want a share, above 0 up to 1")
    values = {key: SPELT[key][1][word] for key, word in words.items()}
    return Rule(
        values["rounding_method"],  # type: ignore[arg-type]
        values["scale_value_type"],  # type: ignore[arg-type]
        values["granularity"],  # type: ignore[arg-type]
        None if backoff is None else float(backoff),
    )


SPELT: dict[str, tuple[str, dict[str, str]]] = {
    "granularity": ("PTS", {"PTS": "tensor", "PCS": "channel"}),
    "scale_value_type": ("MAXABS", {"MAXABS": "maxabs", "FIXED_VALUE": "fixed", "OPT": "opt"}),
    "rounding_method": ("IDENTITY", {
        "IDENTITY": "none", "POW2": "pow2", "HW_ALIGNED": "hw", "HW_ALIGNED_FIXED": "single", "SCALE_UNIT": "unit",
    }),
}  # fmt: skip
