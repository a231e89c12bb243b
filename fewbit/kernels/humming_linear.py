"""Linears through humming-kernels, compiled for each shape as soon as it is met: weights of 2 to 8 bits in its layout.

Its choice of tile, and of how many blocks share a sum, depends on the number of rows, so a row's last bits may too. It
finds its compiler (nvrtc) beside torch and keeps what it compiles in ~/.humming, or where HUMMING_CACHE_DIR says. Few
rows are read by `few`, out of the same memory.
"""

from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import cache, partial
from importlib.util import find_spec
from threading import Lock
from typing import Any

import torch
from torch import Tensor

from fewbit.kernels import few, humming_weight, triton_runtime
from fewbit.kernels.capability import LEAST
from fewbit.kernels.humming_layout import PLAIN, Layout, layout
from fewbit.kernels.input_rounding import Rounding, Unscaled
from fewbit.kernels.torch_dequant import low_rank
from fewbit.quant.qtensor import QTensor, Quantized, scale_codes
from fewbit.quant.reference import scale_values, transformed
from fewbit.quant.spec import Format

LOCKS = 2048  # counters of blocks that share a sum, one set for each weight: streams may overlap
ROWS: tuple[int, ...] = ()  # numbers of rows to compile for, () = any: tests and benchmarks are spared minutes
SHAPES = 8  # that are compiled side by side; their compilers share the cores
MORE = 1.25  # rows that a tile of other ranges may multiply, in those of a range's own
MISSING = "needs humming-kernels: pip install 'fewbit[gpu]'"


Range = Sequence[Any]  # rows above, rows up to, the tile: humming's dict


@dataclass(frozen=True, slots=True)
class Few:
    """How `few` reads the same memory."""

    laid: few.Laid
    rows: int  # of x, up to which it does
    whole: Tensor | None  # [1] or [N] float32: the scales, where groups have none


@dataclass(slots=True)
class Held:
    """A weight in humming's layout; `source` has no planes left."""

    source: Quantized
    config: Any
    dtype: torch.dtype
    tensors: tuple[Tensor | None, ...]  # weight, weight_scale, weight_scale_2, zero_point
    columns: Tensor | None  # scales of rows of the weight that are applied after the product
    rounding: Rounding | None
    given: Tensor | None
    locks: Tensor
    few: Few | None
    plain: Tensor | None = None  # which kernel for how many rows
    biased: tuple[Tensor, Tensor, Tensor] | None = None  # (the bias, which kernels, the bias in humming's order)


def supports(form: Format, device: torch.device, dtype: torch.dtype, rounded: bool = False) -> str | None:
    how = layout(form, dtype, rounded)
    if isinstance(how, str):
        return how
    if find_spec("humming") is None:
        return MISSING
    least = max(LEAST[how.input.element] if how.input else (0, 0), (8, 0) if dtype == torch.bfloat16 else (0, 0))
    if torch.cuda.is_available() and (found := torch.cuda.get_device_capability(device)) < least:
        return f"needs compute capability {least[0]}.{least[1]} for this, found {found[0]}.{found[1]}"
    return triton_runtime.lacking(device)


def prepack_linear(q: Quantized, dtype: torch.dtype, rounded: bool = False) -> Held | None:
    """Columns and rows that do not come in whole words, and scales beyond the type, are left."""
    how = layout(q.format, dtype, rounded)
    assert isinstance(how, Layout), how
    device = q.weight.device
    with torch.cuda.device(device):
        made = humming_weight.tensors(q.weight, how, dtype)
    if made is None:
        return None
    config, tensors, columns = made
    names = ("weight", "weight_scale", "weight_scale_2", "zero_point")
    given = q.act["scale0"].float().view(1) if how.input and how.input.given else None
    locks = torch.zeros(LOCKS, dtype=torch.int32, device=device)
    held = tuple(map(tensors.get, names))
    by = _few(q.weight, config, how, dtype)
    _compiling(config, device, by)
    return Held(emptied(q), config, dtype, held, columns, how.input, given, locks, by)


def _few(w: QTensor, config: Any, how: Layout, dtype: torch.dtype) -> Few | None:
    """Of whole tiles of the layout that sm_90 has for inputs of 16 bits."""
    kinds = {("float4e2m1", "float8e4m3"): few.NVFP4}
    if dtype == torch.bfloat16:  # humming holds e8m0 otherwise beside float16
        kinds["float4e2m1", "float8e8m0"] = few.MXFP4
    whole = how.kind in ("tensor", "channel")
    integers = how.codes.startswith("uint") and (whole or how.scale == PLAIN[dtype])
    codes = few.INTEGERS if integers else kinds.get((how.codes, how.scale))
    if codes is None or how.input or how.group not in few.GROUPS[codes] or config.sm_version // 10 != 9:
        return None
    others = ("use_raw_weight", "use_flat_weight", "use_packed_k_layout", "use_native_dequant", "use_ldmatrix_dequant")
    if config.pad_shape_n or config.pad_shape_k or any(getattr(config, name, False) for name in others):
        return None
    if codes in few.LARGEST and int(scale_codes(w, "scale0").max()) > few.LARGEST[codes]:
        return None
    laid = few.Laid(codes, how.bits, how.group)
    able = {"": True, "codes": how.bits == 4 and how.group >= 32, "values": how.bits < 8 and laid.times > 1}
    if not able[how.zeros] or few.lacking(w.device):
        return None
    scales = scale_values(w).float().reshape(-1).contiguous() if whole else None
    return Few(laid, few.most_rows(w.shape[0], w.device), scales)


def emptied(q: Quantized) -> Quantized:
    """The same without the weight's planes."""
    planes = {name: plane.to("meta") for name, plane in q.weight.planes.items()}
    return Quantized(q.format, QTensor(q.weight.spec, q.weight.shape, planes), q.act, q.transforms)


def run_linear(x: Tensor, held: Held, bias: Tensor | None = None) -> Tensor:
    """x: [..., K] -> [..., N]."""
    q = held.source
    x = transformed(x, q.transforms)
    n = q.weight.shape[-2]
    y = _product(x, held, bias) if x.numel() else x.new_empty(0, n)
    return low_rank(x, q.transforms, y.view(*x.shape[:-1], n))


def run_unscaled(x: Tensor, held: Held) -> Unscaled:
    """The same, but for scales that would take a launch of their own."""
    if held.columns is None or held.source.transforms or not x.numel():
        return run_linear(x, held), None, None
    y, columns = _sums(x, held, None)
    return y.view(*x.shape[:-1], -1), None, columns


def _product(x: Tensor, held: Held, bias: Tensor | None) -> Tensor:
    """x: [..., K] -> [M, N]."""
    from fewbit.kernels.triton_scale import scale_

    y, columns = _sums(x, held, bias)
    return y if columns is None else scale_(y, None, columns, bias)


def _sums(x: Tensor, held: Held, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """-> [M, N], and what its columns are still to be times; the bias is added after that, where there is any."""
    scale = None
    if held.rounding is not None:
        from fewbit.kernels.triton_quantize import input_codes

        x, scale = input_codes(x, held.rounding, held.given)
    else:
        x = x.reshape(-1, x.shape[-1])
    weight, weight_scale, outer, zero = held.tensors
    by, n = held.few, held.source.weight.shape[-2]
    if by and weight is not None and len(x) <= by.rows and few.lies_well(x, bias, x.dtype):
        scales = (weight_scale, zero, outer, held.columns) if by.whole is None else (None, None, None, by.whole)
        return few.laid(x, weight, n, by.laid, *scales, bias), None
    inside = bias if held.columns is None else None
    configs, ordered = _biased(held, inside) if inside is not None else (_plain(held), None)
    y: Tensor = torch.ops.humming.launch_kernel.default(
        configs, x, weight, weight_scale, outer, scale, None, zero, ordered, None, None, None, None, None, held.locks,
        1, 0,
    )  # fmt: skip
    return y, held.columns


def _plain(held: Held) -> Tensor:
    if held.plain is None:
        held.plain = _compiling(held.config, held.locks.device, held.few).result()
    return held.plain


def _biased(held: Held, bias: Tensor) -> tuple[Tensor, Tensor]:
    """-> the kernels that add a bias, and it in humming's order."""
    if held.biased is None or held.biased[0] is not bias:
        from fewbit.kernels.humming_weight import bias_of, with_bias

        configs = _compiling(with_bias(held.config), held.locks.device, held.few).result()
        held.biased = bias, configs, bias_of(bias, held.dtype)
    return held.biased[1:]


_under_way: dict[tuple[str, torch.device, int, tuple[int, ...]], Future[Tensor]] = {}
_lock = Lock()


def _compiling(config: Any, device: torch.device, by: Few | None) -> Future[Tensor]:
    """Shapes are compiled side by side, and while other weights are still laid out."""
    above = by.rows if by else 0
    key = config.to_str(), device, above, ROWS
    with _lock:
        if key not in _under_way:
            _under_way[key] = _pool().submit(_compiled, config, device, above, ROWS)
        return _under_way[key]


@cache
def _pool() -> ThreadPoolExecutor:
    """Its threads wait for those of `_compilers`."""
    return ThreadPoolExecutor(SHAPES, "humming")


@cache
def _compilers() -> ThreadPoolExecutor:
    """As many as there are cores, or as HUMMING_MAX_PARALLEL_BUILD_WORKERS says: whoever starts many processes."""
    from humming.utils.cpu import get_parallel_build_workers

    return ThreadPoolExecutor(get_parallel_build_workers(), "humming-compiler")


def shared(ranges: Sequence[Range]) -> list[Range]:
    """The same rows with fewer tiles, since humming has one for every 8 rows, and compiling all takes half a minute.

    Powers of two keep theirs. The rows between take a taller tile that is there already and is else the same, where
    that multiplies no more than MORE times as many rows.
    """
    kept: list[Any] = []
    chosen: dict[int, Any] = {}
    for low, high, tile in sorted(ranges, key=lambda span: (_between(span), -span[1])):
        taller = [other for other in kept if _serves(other, tile, low + 1, high)] if _between((low, high)) else []
        best = min(taller, key=lambda other: _multiplied(other, high), default=tile)
        chosen[low] = best
        if best not in kept:
            kept.append(best)
    found: list[list[Any]] = []
    for low, high, _ in ranges:
        if found and found[-1][2] == chosen[low]:
            found[-1][1] = high
        else:
            found.append([low, high, chosen[low]])
    return list(found)


def begun(ranges: Sequence[Range], device: torch.device) -> list[Range]:
    """The same, begun before the last kernel ends as triton_early's are: humming's kernels wait in the same way.

    Weights that are read once, by one tile of rows, leave the L2 before what is read again.
    """
    from fewbit.kernels.triton_early import early

    again = [tile for _, high, tile in ranges if high > _tall(tile)]
    new = {"use_pdl": early(device)["EARLY"]}
    return [(low, high, tile | new | {"evict_weights_first": tile not in again}) for low, high, tile in ranges]


def _between(span: Range) -> bool:
    """Whether no power of two is in it."""
    return int(span[0]).bit_length() == int(span[1]).bit_length()


def _multiplied(tile: Any, rows: int) -> int:
    return -(-rows // _tall(tile)) * _tall(tile)


def _tall(tile: Any) -> int:
    found: int = tile["block_shape"][0]
    return found


def _serves(other: Any, tile: Any, *each: int) -> bool:
    alike = _tall(other) >= _tall(tile) and _kind(other) == _kind(tile)
    return alike and all(_multiplied(other, rows) <= MORE * _multiplied(tile, rows) for rows in each)


def _distinct(ranges: Sequence[Range]) -> list[Any]:
    return [tile for i, (*_, tile) in enumerate(ranges) if all(tile != other for *_, other in ranges[:i])]


def _kind(tile: Any) -> Any:
    """A tile but for how tall it is."""
    (tall, *block), (part, *warp) = tile["block_shape"], tile["warp_shape"]
    return tile | {"block_shape": block, "warp_shape": warp, "raster_group_m": tall // part}


def _compiled(config: Any, device: torch.device, above: int, only: tuple[int, ...]) -> Tensor:
    """-> int64 on the CPU: (rows above, rows up to, kernel, processors) of every tile that is used.

    above: rows that `few` takes, so that tiles for those are left out. only: as ROWS.
    """
    from humming.kernel.humming import HummingKernel
    from humming.tune import get_heuristics_config

    with torch.cuda.device(device):
        every = begun(shared(get_heuristics_config(config, device=device)), device)
        asked = [tile for tile in every if not only or any(tile[0] < rows <= tile[1] for rows in only)]
        (_, *first), *others = [tile for tile in asked if tile[1] > above] or every[:1]
        tiles = [[0, *first], *others]  # humming looks for the tile of one row, whatever it runs
        compiled = partial(_tile, config.to_str(), device)
        list(_compilers().map(compiled, sorted(_distinct(tiles), key=_tall, reverse=True)))  # these take the longest
        found: Tensor = HummingKernel.prepare_kernels(config.to_str(), None, tiles, device)
    return found


def _tile(config: str, device: torch.device, tile: Any) -> None:
    """Compile one."""
    from humming.kernel.humming import HummingKernel

    HummingKernel.prepare_kernels(config, None, tile, device)
