"""certify: what is emulated is what is served. Each kernel held against the reference, on every format that it runs.

Values: a weight is read back out of the kernel, column by column, by inputs with one value that is not zero, so that
nothing is added up. Inputs: what the kernel makes of its inputs is read out of a weight that is the identity. Both must
be the reference's bit for bit. Sums: random inputs and weights, against sums in float64 of the same values; what
differs is the order of adding and one rounding of the result, and is held under a bound made of these alone.
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from fewbit.errors import SpecError
from fewbit.kernels import few
from fewbit.kernels.registry import Kernel, kernels
from fewbit.models.device import present
from fewbit.quant import elements
from fewbit.quant.blocks import regrid
from fewbit.quant.formats import FORMATS, get
from fewbit.quant.qtensor import Planes, QTensor, Quantized, planes_of, scale_of, store
from fewbit.quant.reference import assign, decode, encode, fake_quant, zero_values
from fewbit.quant.spec import Format, QuantSpec
from fewbit.workflows import schemes

N, K = 32, 256  # of the weights; K in whole blocks of all formats
STATIC = 0.125  # a scale of inputs that is given
ROWS = (1, 3, 16, 65)  # of inputs, for the sums
UNIT = {torch.float32: 2.0**-24, torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11}  # of one rounding to nearest
PARTS = {"humming": 8, "humming-rounded": 8}  # roundings to the 16-bit type within a sum: parts of K are added so
PLACED = 9  # float16 holds sums up to so many powers of two below their scale, so that they do not overflow
EXACT, EQUAL = ("exact", "in ", "within"), ("equal", "as ")  # how words begin that are no complaint
SCALES = {"humming-rounded": 2.0**-8}  # how far values may be off, because a kernel rounds scales and zeros and says so


@dataclass(frozen=True, slots=True)
class Certificate:
    """One kernel on one format. error, bound: of a sum, as a share of the sum of magnitudes."""

    format: str
    kernel: str
    device: str
    dtype: str
    values: str  # exact, also from a magnitude up, in bfloat16 (float16), or what is wrong
    inputs: str  # equal, equal from a magnitude up, as they are, or what is wrong
    error: float
    bound: float

    @property
    def ok(self) -> bool:
        return self.values.startswith(EXACT) and self.inputs.startswith(EQUAL) and self.error <= self.bound

    def to_json(self) -> dict[str, Any]:
        return asdict(self) | {"ok": self.ok}


COLUMNS = ("format", "kernel", "dtype", "values", "inputs", "bound")


def cells(one: Certificate) -> tuple[str, ...]:
    return one.format, one.kernel, one.dtype, one.values, one.inputs, f"{one.bound:.1e}"


def render(found: Sequence[Certificate]) -> str:
    """A table in Markdown: formats that share all else share a row."""
    groups: dict[tuple[str, ...], list[str]] = {}
    for one in found:
        verdict = "holds" if one.ok else f"does not hold ({one.error:.1e})"
        groups.setdefault((*cells(one)[1:], verdict), []).append(one.format)
    lines = ["| kernel | in | values | inputs | bound of a sum | | formats |", "|---|---|---|---|--:|---|---|"]
    lines += [f"| {' | '.join(key)} | {', '.join(names)} |" for key, names in sorted(groups.items())]
    return "\n".join(lines)


def certify(names: Sequence[str] = (), device: str = "cpu", which: Sequence[str] = ()) -> Iterator[Certificate]:
    """Formats by name (none: all) on every kernel of the device that takes them, or on those named."""
    place = present(device)
    linear = [k for k in kernels() if k.op == "linear"]
    if unknown := sorted(set(which) - {k.name for k in linear}):
        raise SpecError(f"kernel {', '.join(unknown)} is not known; known: {', '.join(k.name for k in linear)}")
    for name in names or writable():
        form = get(name)
        for kernel in linear:
            if not which or kernel.name in which:
                yield from _each(name, form, kernel, place)


def rows(names: Sequence[str]) -> list[str]:
    """Rows of the table or schemes that people know -> rows."""
    found = [schemes.resolve(name) for name in names]
    for name, row in zip(names, found, strict=True):
        if not isinstance(row, str) or row == schemes.DENSE:
            raise SpecError(f"{name} is not one format: name those that it is made of")
    return [str(row) for row in found]


def writable() -> list[str]:
    """Formats that have an encoder. The others are only read, by the reference alone."""
    return [name for name, row in FORMATS.items() if row.weight.element.kind != "run"]


def _each(name: str, form: Format, kernel: Kernel, device: torch.device) -> Iterator[Certificate]:
    for dtype in kernel.dtypes:
        if kernel.refusal(form, device, dtype) is None and _takes(form, kernel, device, dtype):
            inputs = _inputs(form, kernel, device, dtype)
            values, error, bound = _products(form, kernel, device, dtype)
            short = str(dtype).removeprefix("torch.")
            yield Certificate(name, kernel.name, str(device), short, values, inputs, error, bound)


def _takes(form: Format, kernel: Kernel, device: torch.device, dtype: torch.dtype) -> bool:
    """Whether it does not leave the weight to the next one."""
    return _prepacked(kernel, Quantized(form, _weight(form.weight), static(form.act)), device, dtype) is not None


def _prepacked(kernel: Kernel, q: Quantized, device: torch.device, dtype: torch.dtype) -> Any:
    act = {name: plane.to(device) for name, plane in q.act.items()}
    return kernel.prepacked(Quantized(q.format, q.weight.to(device), act, q.transforms), dtype)


def _run(kernel: Kernel, q: Quantized, x: Tensor) -> Tensor:
    return kernel.run(x, _prepacked(kernel, q, x.device, x.dtype), None)


def _products(form: Format, kernel: Kernel, device: torch.device, dtype: torch.dtype) -> tuple[str, float, float]:
    q = Quantized(form, _weight(form.weight), static(form.act))
    values, draw = decode(q.weight), torch.Generator().manual_seed(2)
    found, held = _values(q, values, kernel, device, dtype)
    worst = 0.0
    for rows in ROWS:
        x = torch.randn(rows, K, generator=draw).to(dtype)
        seen = (fake_quant(x, form.act, q.act) if form.act else x).double()
        y = _run(kernel, q, x.to(device)).cpu().double()
        off = (y - seen @ held.double().T).abs() / (seen.abs() @ held.double().abs().T).clamp_min(1e-30)
        worst = max(worst, float(off.max()) if bool(y.isfinite().all()) else float("inf"))
    return found, worst, bound(kernel, dtype)


@lru_cache(1)
def _weight(spec: QuantSpec) -> QTensor:
    return encode(torch.randn(N, K, generator=torch.Generator().manual_seed(0)) * K**-0.5, spec)


def bound(kernel: Kernel, dtype: torch.dtype) -> float:
    """Sums in float32 in any order, roundings of parts where the kernel has them, and one of the result."""
    return K * UNIT[torch.float32] + (1 + PARTS.get(kernel.name, 0)) * UNIT[dtype] + SCALES.get(kernel.name, 0.0)


def _values(
    q: Quantized, values: Tensor, kernel: Kernel, device: torch.device, dtype: torch.dtype
) -> tuple[str, Tensor]:
    """What the kernel holds of a weight, in words, and the values that sums are made of."""
    top = _top(q.format.act)
    x = (torch.eye(K) * top).to(dtype)
    seen = fake_quant(x, q.format.act, q.act) if q.format.act else x
    found = [_read(got, seen, values, shifts(q.weight), kernel) for got in _runs(kernel, q, x.to(device))]
    return next((each for each in found if not each[0].startswith(EXACT)), found[0])


def _runs(kernel: Kernel, q: Quantized, x: Tensor) -> Iterator[Tensor]:
    """All rows at once, and where a GPU may do few rows otherwise also a few, if no scale is found in all of them."""
    yield _run(kernel, q, x).cpu()
    apart = all(scale.block[0] == 1 or not scale.dynamic for scale in q.format.act.scales) if q.format.act else True
    if x.is_cuda and apart:
        yield torch.cat([_run(kernel, q, part).cpu() for part in x.split(few.TILE)])


def shifts(w: QTensor) -> Tensor:
    """By how much zeros that lie between codes move each value: where scales are rounded, those are as well."""
    zeros = None if w.spec.zeros_in_codes else zero_values(w)
    return torch.zeros(()) if zeros is None else regrid(zeros, w.shape, w.spec.zeros[0].block, (1, 1)).abs()


def _read(got: Tensor, seen: Tensor, values: Tensor, shift: Tensor, kernel: Kernel) -> tuple[str, Tensor]:
    """got: what came of `seen`, a matrix with numbers on its diagonal alone."""
    dtype, factor = got.dtype, seen.diagonal().double()[:, None]
    for word, held in (("exact", values), (f"in {str(dtype).removeprefix('torch.')}", values.to(dtype).float())):
        want = (held.T.double() * factor).to(torch.float32).to(dtype)
        if torch.equal(got.float(), want.float()):
            return word, held
    want = (values.T.double() * factor).to(torch.float32).to(dtype)
    if least := _least(kernel, got, want):
        return f"exact from {least:.1e} up", values
    back = (got.double() / factor).T
    off = float(((back - values).abs() / (values.abs() + shift).clamp_min(1e-30))[values != 0].max())
    allowed = SCALES.get(kernel.name, 0.0)
    word = f"within {allowed:.1e}" if off <= allowed + 2 * UNIT[dtype] else f"off by {off:.1e}"
    return word, values


def _inputs(form: Format, kernel: Kernel, device: torch.device, dtype: torch.dtype) -> str:
    if form.act is None:
        return "as they are"
    q = Quantized(form, identity(form.weight, K), static(form.act))
    draw = torch.Generator().manual_seed(1)
    spread = torch.logspace(-4, 3, 48)[:, None]
    x = (torch.randn(48, K, generator=draw) * spread).to(dtype)
    x[0] = 0
    want = fake_quant(x, form.act, q.act)
    found = [_same(got, want, kernel) for got in _runs(kernel, q, x.to(device))]
    return next((each for each in found if not each.startswith(EQUAL)), found[0])


def _same(got: Tensor, want: Tensor, kernel: Kernel) -> str:
    if torch.equal(got, want):
        return "equal"
    if least := _least(kernel, got, want):
        return f"equal from {least:.1e} up"
    return f"{int((got != want).sum())} of {want.numel()} differ"


def _least(kernel: Kernel, got: Tensor, want: Tensor) -> float:
    """The magnitude from which on they are equal where sums below are subnormal numbers of float16; 0: none."""
    off = (got.float() - want.float()).abs()
    for power in range(1, PLACED + 1) if want.dtype == torch.float16 and kernel.name in PARTS else ():
        least, step = 2.0 ** (power - 14), 2.0 ** (power - 24)
        if not bool(off[want.abs() >= least].any()) and bool((off <= step).all()):
            return least
    return 0.0


def static(spec: QuantSpec | None) -> Planes:
    """Planes for the scales of inputs that are not chosen at each call: a power of two, so that they hide nothing."""
    held = {f"scale{i}": s for i, s in enumerate(spec.scales if spec else ()) if not s.dynamic}
    return {name: store(elements.encode(torch.full((1, 1), STATIC), s.element), s.element) for name, s in held.items()}


@lru_cache(1)
def identity(spec: QuantSpec, size: int) -> QTensor:
    """The identity, scales all 1."""
    planes = {}
    for name, (shape, _) in planes_of(spec, (size, size)).items():
        if name.startswith("scale"):
            element = scale_of(spec, name).element
            planes[name] = elements.encode(torch.ones(_grid(spec, name, size, shape)), element)
    q = assign(torch.eye(size), spec, planes)
    if not torch.equal(decode(q), torch.eye(size)):
        raise SpecError("a format that rounds inputs cannot hold the identity; its inputs cannot be read out")
    return q


def _grid(spec: QuantSpec, name: str, size: int, shape: Iterable[int]) -> tuple[int, int]:
    rows, cols = scale_of(spec, name).block
    return (size // rows if rows else 1), (size // cols if cols else 1)


def _top(spec: QuantSpec | None) -> float:
    """A value that the scale of its row brings to a code without rounding: the largest, where that is chosen."""
    if spec is None:
        return 1.25
    if all(not scale.dynamic for scale in spec.scales):
        return 10 * STATIC
    return (spec.element.max - spec.element.min) / 2 if spec.rule == "range" else spec.element.max
