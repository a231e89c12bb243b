"""What the values of a checkpoint say, one module at a time; verify asks for them, load watches them pass."""

from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from fewbit.codecs.source import Source
from fewbit.models.finding import Finding
from fewbit.quant import elements
from fewbit.quant.blocks import regrid
from fewbit.quant.qtensor import QTensor, Quantized, codes, scale_codes
from fewbit.quant.reference import decode
from fewbit.quant.spec import FLAT

SIBLINGS = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"), ("w1", "w3"))
SIGN_IS_FREE = 0.9  # of the scales of a module: about half are negative where a tool chooses the sign, never nearly all
PIECE = 1 << 22  # codes looked at together


@dataclass(slots=True)
class Watch:
    """Sees every quantized module of a source; `findings` grows, `finish` adds what only the whole can say."""

    source: Source
    findings: list[Finding] = field(default_factory=list)
    outer: dict[str, Tensor] = field(default_factory=dict)  # module -> its outer scale, for two-level formats

    def see(self, name: str, q: Quantized) -> None:
        self.findings += module_findings(name, q, self.source.dialect)
        scales = q.format.weight.scales
        if len(scales) == 2 and scales[1].block == (0, 0):
            self.outer[name] = q.weight.planes["scale1"]

    def finish(self) -> list[Finding]:
        self.findings += [*_sibling_scales(self.outer), *_kv_values(self.source), *_nibble_order(self.source)]
        return self.findings


def module_findings(name: str, q: Quantized, dialect: str = "") -> Iterator[Finding]:
    """What the planes of one module say."""
    for plane in q.weight.planes:
        if plane == "codes" or (dialect == "gguf" and plane.startswith("zero")):
            continue
        yield from _plane(name, plane, q.weight, signed=dialect == "gguf" or plane.startswith("zero"))
    yield from _codes(name, q.weight)
    for plane, value in q.act.items():
        v = value.float()
        if not bool(v.isfinite().all()) or (plane.startswith("scale") and bool((v <= 0).any())):
            yield Finding(
                "error", "act-scale", name, f"activation {plane} must be finite and above 0, found {_show(v)}"
            )
    for transform in q.transforms:
        yield from _transform(name, transform.kind, transform.tensors, q.weight.shape[-1])


def _codes(name: str, q: QTensor) -> Iterator[Finding]:
    """Codes that mean no number; looked for a piece at a time, in the packed plane where a code is a byte."""
    element = q.spec.element
    if element.kind not in ("float", "exponent") or element.bits != 8:
        return
    bad = (~elements.values(element).isfinite()).nonzero().flatten().tolist()
    count = sum(int((part == c).sum()) for part in q.planes["codes"].flatten().split(PIECE) for c in bad)
    if count:
        yield Finding("error", "code-not-finite", name, f"{count} codes of {element.name} mean NaN or infinity")


def _plane(name: str, plane: str, q: QTensor, signed: bool) -> Iterator[Finding]:
    chain = q.spec.scales if plane.startswith("scale") else q.spec.zeros
    scale = chain[int(plane[-1])]
    value = elements.decode(scale_codes(q, plane), scale.element)
    if not bool(value.isfinite().all()):
        count = int((~value.isfinite()).sum())
        yield Finding("error", "scale-not-finite", name, f"{plane}: {count} of {value.numel()} are NaN or infinite")
    if signed or scale.op == "add" or scale.element.kind == "table":
        return
    below = int((value < 0).sum())
    if below > (SIGN_IS_FREE * value.numel() if _sign_is_free(q, plane) else 0):
        yield Finding("error", "scale-not-positive", name, f"{plane}: {below} of {value.numel()} are below 0")
    if bool((value == 0).any()) and _zero_matters(q, plane, value):
        text = f"{plane}: {int((value == 0).sum())} are 0 where codes are not: those weights are lost"
        yield Finding("error", "scale-not-positive", name, text)


def _sign_is_free(q: QTensor, plane: str) -> bool:
    """auto-round and ggml give an integer block the sign that puts its extreme on the lowest code."""
    return plane == "scale0" and q.spec.element.kind == "int" and q.spec.scales[0].block[0] == 1


def _zero_matters(q: QTensor, plane: str, value: Tensor) -> bool:
    """True when a zero scale stands over codes that mean something else than zero."""
    block = (q.spec.scales if plane.startswith("scale") else q.spec.zeros)[int(plane[-1])].block
    table = elements.values(q.spec.element)
    if block[0] == FLAT:
        return True
    meant = table[codes(q).long()] != 0
    zero = regrid((value == 0).float(), q.shape, block, (1, 1)) if block != (0, 0) else (value == 0).float()
    return bool((meant & (zero > 0)).any())


def _transform(name: str, kind: str, tensors: Mapping[str, Tensor], k: int) -> Iterator[Finding]:
    for label, tensor in tensors.items():
        if tensor.is_floating_point() and not bool(tensor.isfinite().all()):
            yield Finding("error", "transform", name, f"{kind} {label} holds NaN or infinity")
        if kind == "permute" and not torch.equal(tensor.sort().values.cpu().long(), torch.arange(k)):
            yield Finding("error", "transform", name, f"{kind} {label} is not a permutation of {k} inputs")


def sibling_groups(names: Iterable[str]) -> dict[str, list[str]]:
    groups: dict[str, list[str]] = defaultdict(list)
    for name in names:
        parent, _, leaf = name.rpartition(".")
        for i, group in enumerate(SIBLINGS):
            if leaf in group:
                groups[f"{parent}.{i}"].append(name)
    return {key.rpartition(".")[0] + f".{{{','.join(n.rpartition('.')[2] for n in found)}}}": found
            for key, found in groups.items() if len(found) > 1}  # fmt: skip


def _sibling_scales(outer: Mapping[str, Tensor]) -> Iterator[Finding]:
    """Tools make one outer scale for siblings that engines fuse; where they differ, that engine is silently wrong."""
    for parent, found in sibling_groups(outer).items():
        values = {name.rpartition(".")[2]: float(outer[name].float().max()) for name in found}
        if len(set(values.values())) > 1:
            shown = ", ".join(f"{leaf} {value:.6g}" for leaf, value in values.items())
            text = f"outer scales differ ({shown}): a fused engine would apply one of them to all"
            yield Finding("error", "sibling-scales", parent, text)


def _kv_values(source: Source) -> Iterator[Finding]:
    for module, scales in source.kv.items():
        for of, tensor in scales.items():
            value = source.checkpoint.read(tensor).float()
            if of.endswith("_zero"):
                continue
            if not bool(value.isfinite().all()) or bool((value <= 0).any()):
                text = f"{tensor} must be finite and above 0, found {_show(value)}"
                yield Finding("error", "kv-scale", module, text)


def _nibble_order(source: Source) -> Iterator[Finding]:
    """Siblings read the same input, so their column norms go together; a pair-swapped one betrays itself."""
    for found in list(sibling_groups(source.modules).values())[:2]:
        norms = {}
        for name in found:
            q = source.modules[name].read()
            if q.format.weight.element.bits == 4 and not q.transforms and len(q.weight.shape) == 2:
                norms[name] = decode(q.weight).norm(dim=0)
        if norms:
            agreeing = {name: sum(_swapped(norm, n) is None for n in norms.values()) for name, norm in norms.items()}
            first = max(agreeing, key=agreeing.__getitem__)  # the odd one out is not the measure of the others
            for name, norm in norms.items():
                if (by := _swapped(norms[first], norm)) is not None:
                    text = f"pairs swapped, its column norms go with {first} ({by[1]:.2f}, not {by[0]:.2f})"
                    yield Finding("error", "nibble-order", name, text)


def _swapped(first: Tensor, norm: Tensor) -> tuple[float, float] | None:
    """How two rows of column norms go together, straight and pair-swapped, where only the second does."""
    if len(norm) != len(first) or len(norm) % 2:
        return None
    straight, swapped = _correlation(first, norm), _correlation(first, norm.view(-1, 2).flip(1).flatten())
    return (straight, swapped) if swapped > 0.5 and straight < swapped - 0.3 else None


def _correlation(a: Tensor, b: Tensor) -> float:
    return float(torch.corrcoef(torch.stack([a, b]))[0, 1])


def _show(value: Tensor) -> str:
    flat = value.flatten()[:4].tolist()
    return ", ".join(f"{v:g}" for v in flat) + (" ..." if value.numel() > 4 else "")
