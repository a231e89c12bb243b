"""KERNELS: every way to run an op, as a table. A kernel says what it can hold, or the reason why not.

Ops: `linear` runs x [..., K] -> [..., N] on one Quantized; `experts` runs x [S, K], sorted by expert, with the number
of rows of each expert, on a Quantized whose planes have a leading axis of experts. Others join through the entry-point
group `fewbit.kernels`: a Kernel, or a function that returns several.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import cache, partial
from importlib.metadata import entry_points
from typing import Any, Literal

import torch
from torch import Tensor

from fewbit.errors import SpecError
from fewbit.kernels import (
    coded,
    humming_linear,
    packed,
    scaled_linear,
    torch_dequant,
    torch_emulated,
    triton_experts,
    triton_linear,
)
from fewbit.kernels.input_rounding import Rounding, Unscaled
from fewbit.quant.qtensor import Quantized
from fewbit.quant.spec import Format

Op = Literal["linear", "experts"]
Supports = Callable[[Format, torch.device, torch.dtype], str | None]


@dataclass(frozen=True, slots=True)
class Kernel:
    """One way to run one op. The rules are data; `supports` adds what only code can tell: None, or why not."""

    name: str
    op: Op
    devices: tuple[str, ...]  # device types; empty = every device
    dtypes: tuple[torch.dtype, ...]  # of the input and output
    supports: Supports
    prepack: Callable[..., Any]  # Quantized -> what `run` takes; None: this weight is left to the next kernel
    run: Callable[..., Tensor]  # linear: (x, packed, bias); experts: (x, packed, rows of each expert)
    capability: tuple[int, int] = (0, 0)  # least CUDA compute capability
    asked: bool = False  # only for who names it
    note: str = ""
    owns: bool = False  # prepack(q, dtype) takes the planes over; its result has a `source` without them, or with
    gathers: bool = False  # experts: run takes one more, which row of x each row is, and x is not sorted then
    invariant: bool = False  # whether a row's result never depends on how many rows are beside it
    unscaled: Callable[..., Unscaled] | None = None  # linear: (x, packed), for a reader that applies scales itself
    rounds: Callable[[Quantized], Rounding | None] | None = None  # linear: inputs, unless they come with their codes

    def prepacked(self, q: Quantized, dtype: torch.dtype) -> Any:
        """A weight as `run` takes it, or None."""
        return self.prepack(q, dtype) if self.owns else self.prepack(q)

    def refusal(self, format: Format, device: torch.device, dtype: torch.dtype) -> str | None:
        """None when it can run, else the first reason why not."""
        if self.devices and device.type not in self.devices:
            return f"runs on {', '.join(self.devices)}, not on {device.type}"
        if dtype not in self.dtypes:
            return f"takes {', '.join(_short(d) for d in self.dtypes)}, not {_short(dtype)}"
        if device.type == "cuda" and (found := torch.cuda.get_device_capability(device)) < self.capability:
            return f"needs compute capability {self.capability[0]}.{self.capability[1]}, found {found[0]}.{found[1]}"
        return self.supports(format, device, dtype)


def _short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _anything(format: Format, device: torch.device, dtype: torch.dtype) -> None:
    return None


HALVES = (torch.bfloat16, torch.float16)
FLOATS = (torch.float32, *HALVES)
REFERENCE, DECODED, EMULATED = "reference", "decoded", "emulated"

KERNELS: tuple[Kernel, ...] = (
    Kernel(
        "packed", "linear", ("cpu",), (torch.bfloat16,), packed.supports, packed.prepack_linear, packed.run_linear,
        note="codes of 2 to 8 bits read as stored; by matrix units, else up to 16 rows in registers, each as if alone",
    ),
    Kernel(
        "packed", "experts", ("cpu",), (torch.bfloat16,), packed.supports, packed.prepack_experts, packed.run_experts,
        note="the same, one expert at a time",
    ),
    Kernel(
        "scaled", "linear", ("cuda",), (torch.bfloat16,), scaled_linear.supports, scaled_linear.prepack_linear,
        scaled_linear.run_linear, (8, 9), unscaled=scaled_linear.run_unscaled, rounds=scaled_linear.rounds,
        note="FP8 times FP8 through cuBLASLt, the scales of rows in a step of their own; up to 16 rows by few.cu",
    ),
    Kernel(
        "humming", "linear", ("cuda",), HALVES, humming_linear.supports, humming_linear.prepack_linear,
        humming_linear.run_linear, (7, 5), owns=True, unscaled=humming_linear.run_unscaled,
        note="humming-kernels: weights of 2 to 8 bits in its own layout, compiled for each shape when first met; "
        "up to 16 rows by few.cu, but where inputs are rounded",
    ),
    Kernel(
        "humming-rounded", "linear", ("cuda",), HALVES, partial(humming_linear.supports, rounded=True),
        partial(humming_linear.prepack_linear, rounded=True), humming_linear.run_linear, (7, 5),
        owns=True, unscaled=humming_linear.run_unscaled,
        note="the same, with group scales and zeros between codes rounded to the 16-bit type of the inputs, by at most "
        "2**-8 of each",
    ),
    Kernel(
        "triton", "linear", ("cuda",), FLOATS, triton_linear.supports, coded.coded, triton_linear.run_linear,
        note="planes read as they are stored, few rows in registers, many through a buffer and cuBLAS",
    ),
    Kernel(
        "triton", "experts", ("cuda",), FLOATS, triton_experts.supports, triton_experts.prepack_experts,
        triton_experts.run_experts, gathers=True,
        note="all experts in one launch, whose rows only the device need know",
    ),
    Kernel(
        EMULATED, "linear", (), FLOATS, _anything, torch_emulated.prepack, torch_emulated.run_linear, asked=True,
        owns=True,
        note="weights decoded once and kept as floats, inputs rounded at each call: fakequant, and latent attention",
    ),
    Kernel(
        EMULATED, "experts", (), FLOATS, _anything, torch_emulated.prepack_experts, torch_emulated.run_experts,
        asked=True, owns=True, note="the same, for inputs alike in one launch on a GPU",
    ),
    Kernel(
        DECODED, "linear", (), FLOATS, _anything, partial(torch_emulated.prepack, keep=True), torch_emulated.run_linear,
        asked=True, owns=True,
        note="the same beside what they were decoded from: quantize, evaluate and diff run a layer on it and let it go",
    ),
    Kernel(
        DECODED, "experts", (), FLOATS, _anything, partial(torch_emulated.prepack_experts, keep=True),
        torch_emulated.run_experts, asked=True, owns=True, note="the same, for inputs alike in one launch on a GPU",
    ),
    Kernel(
        REFERENCE, "linear", (), FLOATS, _anything, torch_dequant.prepack_linear, torch_dequant.run_linear,
        note="the oracle: weights decoded at each call, activations rounded as the format says",
    ),
    Kernel(
        REFERENCE, "experts", (), FLOATS, _anything, torch_dequant.prepack_experts, torch_dequant.run_experts,
        note="the oracle, one expert at a time",
    ),
)  # fmt: skip


@cache
def kernels() -> tuple[Kernel, ...]:
    """KERNELS and what entry points add to them, fastest first as far as known: the reference is last."""
    return (*_extensions(), *KERNELS)


def _extensions() -> Iterable[Kernel]:
    for point in entry_points(group="fewbit.kernels"):
        loaded = point.load()
        for kernel in (loaded,) if isinstance(loaded, Kernel) else loaded():
            if not isinstance(kernel, Kernel):
                raise SpecError(
                    f"entry point {point.name!r} of fewbit.kernels gives {type(kernel).__name__}, not Kernel"
                )
            yield kernel
