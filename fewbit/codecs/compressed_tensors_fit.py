"""What compressed-tensors can hold: a format as it would store it, or every reason why not."""

from dataclasses import replace

from fewbit.codecs.codec import refuse
from fewbit.quant.elements import E2M1, E4M3, E8M0, F32, Element
from fewbit.quant.spec import Format, QuantSpec, Scale, describe

GONE = {"permute": "it has dropped columns in another order than their groups (gptq holds them)"}


def fit(form: Format) -> Format:
    """The format by this dialect's conventions: offsets in codes, NVFP4 by reciprocals, its tools' rules."""
    reasons = [GONE.get(kind, f"it has no place for {kind}") for kind in form.transforms]
    weight = _weight(form.weight, reasons)
    act = _act(form.act, reasons) if form.act else None
    if reasons:
        raise refuse("compressed-tensors", describe(form.weight), *reasons)
    return Format(weight, act)


def _weight(spec: QuantSpec, reasons: list[str]) -> QuantSpec:
    element, blocks = spec.element, [s.block for s in spec.scales]
    kept = [s.element for s in spec.scales]
    if element == E2M1 and kept == [E4M3, F32] and blocks == [(1, 16), (0, 0)]:
        return _two_levels(spec, dynamic=False)
    if element in (E2M1, E4M3) and kept == [E8M0] and blocks == [(1, 32)]:
        return replace(spec, rule="mx-round")
    if element.kind != "int" and element != E4M3:
        reasons.append(f"it knows int1 to int8, e4m3, NVFP4 and MXFP4, and not {describe(spec)}")
    elif len(spec.scales) != 1 or kept[0].kind != "native":
        reasons.append("it keeps one float scale for each block")
    elif blocks[0][0] < 0 or (blocks[0][0] > 1 and element != E4M3) or (blocks[0][0] == 0 and blocks[0][1]):
        reasons.append(f"its {element.name} blocks are tensors, rows, or groups of one row, and not {blocks[0]}")
    return _one_level(spec, reasons)


def _one_level(spec: QuantSpec, reasons: list[str]) -> QuantSpec:
    scales = tuple(replace(s, op="mul") for s in spec.scales[:1])
    unsigned = spec.element.kind == "int" and not spec.element.signed
    if unsigned and not spec.zeros:
        reasons.append(f"{spec.element.name} codes need zero points")
    if spec.zeros and not unsigned:
        reasons.append(f"{spec.element.name} codes have no zero points")
    zeros = tuple(Scale(spec.element, s.block, dynamic=s.dynamic) for s in scales) if unsigned else ()
    return QuantSpec(spec.element, scales, zeros, "range")


def _two_levels(spec: QuantSpec, dynamic: bool) -> QuantSpec:
    inner, outer = spec.scales
    rule = spec.rule if spec.rule == "four-over-six" else "range"
    scales = (replace(inner, dynamic=dynamic), replace(outer, op="div", dynamic=False))
    return replace(spec, scales=scales, rule=rule)


def _act(spec: QuantSpec, reasons: list[str]) -> QuantSpec:
    """Inputs: the outer scale of NVFP4 is static here; whoever writes must know it."""
    element, blocks, kept = spec.element, [s.block for s in spec.scales], [s.element for s in spec.scales]
    if element == E2M1 and kept == [E4M3, F32] and blocks == [(1, 16), (0, 0)]:
        return _two_levels(spec, dynamic=True)
    if element in (E2M1, E4M3) and kept == [E8M0] and blocks == [(1, 32)] and spec.dynamic:
        return replace(spec, rule="mx-round")
    if len(spec.scales) != 1 or not _known(element) or kept[0].kind != "native":
        reasons.append(f"it does not round inputs to {describe(spec)}")
    elif blocks[0][0] not in (0, 1) or (not spec.dynamic and blocks[0] != (0, 0)):
        reasons.append(f"inputs have a scale per tensor, or one at each call per token or group, not {describe(spec)}")
    return _one_level(spec, reasons)


def _known(element: Element) -> bool:
    return element == E4M3 or element.kind == "int"
