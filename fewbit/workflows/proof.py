"""The proof of a conversion: what each module decodes to before and after."""

from dataclasses import dataclass
from math import inf

import torch
from torch import Tensor

from fewbit.errors import UnsupportedError
from fewbit.quant import qtensor
from fewbit.quant.qtensor import QTensor, Quantized
from fewbit.quant.spec import describe
from fewbit.workflows.refit import effective

PIECE = 1 << 18  # values compared at a time: the temporaries stay in cache
ROUNDING = 2.0**-10  # what a scale may lose to its new float type, of the tensor's largest value


@dataclass(frozen=True, slots=True)
class ModuleProof:
    """One module before and after."""

    name: str
    source: str
    target: str
    codes_equal: bool
    difference: float  # largest of the decoded weights, relative to the tensor's largest value
    error: float  # relative Frobenius norm of the difference: what requantizing cost


def compare(name: str, old: Quantized | Tensor, new: Quantized) -> ModuleProof:
    """Decode both, and say how far apart they are."""
    same = isinstance(old, Quantized) and same_codes(old.weight, new.weight)
    was = describe(old.weight.spec) if isinstance(old, Quantized) else str(old.dtype).removeprefix("torch.")
    return ModuleProof(name, was, describe(new.weight.spec), same, *apart(effective(old), effective(new)))


def apart(before: Tensor, after: Tensor) -> tuple[float, float]:
    """ModuleProof's difference and error; in pieces, for an embedding may be half of a machine's memory.

    What is no number on both sides is no difference; on one side alone it makes both figures NaN.
    """
    found = []
    for old, narrow in zip(before.flatten().split(PIECE), after.flatten().split(PIECE), strict=True):
        new = narrow.float()
        gap = (new - old).masked_fill_((new == old) | (new.isnan() & old.isnan()), 0.0)
        known = old.nan_to_num(0.0, inf, -inf)
        found.append([float(n) for n in (known.norm(inf), gap.norm(inf), known.norm(), gap.norm())])
    each = torch.tensor(found, dtype=torch.float64)
    (top, largest), (norm, lost) = each[:, :2].amax(0).tolist(), each[:, 2:].square().sum(0).sqrt().tolist()
    return largest / (top or 1.0), lost / (norm or 1.0)


def same_codes(old: QTensor, new: QTensor) -> bool:
    """Equal codes; a signed and an unsigned integer of one width count as equal when they differ by the middle."""
    a, b = old.spec.element, new.spec.element
    if a == b:
        return torch.equal(old.planes["codes"], new.planes["codes"])
    if a.kind == b.kind == "int" and a.bits == b.bits:
        return torch.equal(qtensor.codes(old) ^ (1 << (int(a.bits) - 1)), qtensor.codes(new))
    return False


def refuse_inexact(proofs: list[ModuleProof], requantize: bool | str) -> None:
    """Without --requantize the codes must be equal, and scales within the rounding of their new type."""
    bad = [p for p in proofs if not p.codes_equal or not p.difference <= ROUNDING]  # NaN is not equal
    if bad and not requantize:
        lines = [f"{p.name}: {p.source} -> {p.target}: largest difference {p.difference:.3g}" for p in bad[:8]]
        hint = "--requantize chooses new codes and prints what that costs"
        raise UnsupportedError(f"{len(bad)} modules would not come out equal; nothing was written", [*lines, hint])


def rounding(name: str, q: Quantized, weight: Tensor, written: Tensor) -> ModuleProof:
    label = str(written.dtype).removeprefix("torch.")
    return ModuleProof(name, describe(q.weight.spec), label, True, *apart(weight, written))
