"""Which kernel runs an op on a format, and why the others do not."""

from collections.abc import Iterator

import torch

from fewbit.errors import SpecError, UnsupportedError
from fewbit.kernels.registry import REFERENCE, Kernel, Op, kernels
from fewbit.quant.spec import Format, describe

Refusals = list[tuple[str, str]]  # (kernel, reason)


def select(
    op: Op, format: Format, device: torch.device, dtype: torch.dtype, mode: str = "auto"
) -> tuple[Kernel, Refusals]:
    """The first kernel that can. mode: "auto", or the name of the one kernel that may run."""
    refused: Refusals = []
    for kernel in _named(op, mode):
        reason = kernel.refusal(format, device, dtype)
        if reason is None:
            return kernel, refused
        refused.append((kernel.name, reason))
    asked = f"{op} with {describe(format.weight)} on {device}"
    raise UnsupportedError(f"no kernel runs {asked}", [f"{name}: {why}" for name, why in refused])


def able(op: Op, format: Format, device: torch.device, dtype: torch.dtype, mode: str = "auto") -> Iterator[Kernel]:
    """Every kernel that can, in order: what one leaves is the next one's. Behind one that is named: the reference."""
    select(op, format, device, dtype, mode)  # says why not, where none can
    last = [k for k in kernels() if k.op == op and k.name == REFERENCE] if mode != "auto" else []
    for kernel in (*_named(op, mode), *last):
        if kernel.refusal(format, device, dtype) is None:
            yield kernel


def _named(op: Op, mode: str) -> list[Kernel]:
    named = [k for k in kernels() if k.op == op and (mode == k.name or (mode == "auto" and not k.asked))]
    if not named:
        known_or_raise(mode, op)
    return named


def known_or_raise(mode: str, op: Op = "linear") -> None:
    """Refuse a name that no kernel has, also where there is nothing to run on one."""
    known = sorted({k.name for k in kernels() if k.op == op} | {"auto"})
    if mode not in known:
        raise SpecError(f"kernels={mode!r}: no {op} kernel has that name; known: {', '.join(known)}")


__all__ = ["REFERENCE", "Refusals", "able", "known_or_raise", "select"]
