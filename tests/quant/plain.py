"""The algebra once more, in loops over numpy scalars: what the vectorized code is held to."""

from collections.abc import Sequence

import numpy as np
import torch

from fewbit.quant import elements
from fewbit.quant.elements import Element
from fewbit.quant.qtensor import QTensor
from fewbit.quant.spec import FLAT, QuantSpec, Scale

Array = np.ndarray


def bit_stream(row: Sequence[int], bits: int) -> bytes:
    """One row of codes as one long number, first code lowest."""
    number = sum(code << (i * bits) for i, code in enumerate(row))
    return number.to_bytes(-(-len(row) * bits // 8), "little")


def codes_of(plane: torch.Tensor, element: Element, cols: int) -> Array:
    """A stored plane [rows, bytes] -> codes [rows, cols]."""
    if element.kind == "native":
        return plane.float().numpy()
    bits = int(element.bits)
    stream = np.unpackbits(plane.numpy(), axis=-1, bitorder="little")[:, : cols * bits]
    return (stream.reshape(len(plane), cols, bits) * 2 ** np.arange(bits)).sum(-1)


def values_of(plane: torch.Tensor, element: Element, cols: int) -> Array:
    found = codes_of(plane, element, cols)
    return found if element.kind == "native" else elements.values(element).numpy()[found]


def block_index(block: tuple[int, int], i: int, j: int, k: int) -> tuple[int, int]:
    """The grid place that weight (i, j) of a matrix with k columns belongs to."""
    rows, cols = block
    if rows == FLAT:
        return 0, (i * k + j) // cols
    return (i // rows if rows else 0), (j // cols if cols else 0)


def chain_at(q: QTensor, stem: str, chain: tuple[Scale, ...]) -> Array:
    """-> [N, K] float32: what a chain of planes amounts to at every weight."""
    n, k = q.shape
    total = np.ones((n, k), np.float32)
    for level, scale in enumerate(chain):
        rows, cols = scale.block
        count = -(-n * k // cols) if rows == FLAT else (-(-k // cols) if cols else 1)
        plane = values_of(q.planes[f"{stem}{level}"], scale.element, count)
        spread = np.array([[plane[block_index(scale.block, i, j, k)] for j in range(k)] for i in range(n)], np.float32)
        with np.errstate(all="ignore"):
            if level == 0:
                total = 1 / spread if scale.op == "div" else spread
            else:
                total = {"mul": np.multiply, "div": np.divide, "add": np.add}[scale.op](total, spread)
    return total


def decode(q: QTensor) -> Array:
    """[N, K] -> float32."""
    spec = q.spec
    codes = values_of(q.planes["codes"], spec.element, q.shape[-1])
    scale = chain_at(q, "scale", spec.scales)
    zero = chain_at(q, "zero", spec.zeros) if spec.zeros else np.float32(0)
    return scale * (codes - zero) if spec.zeros_in_codes else scale * codes - zero


def nearest(q: QTensor, w: torch.Tensor) -> Array:
    """-> [N, K] float64: how near any code could come to each weight, scales and zeros as they are."""
    spec = q.spec
    table = elements.values(spec.element).double().numpy()
    table = table[np.isfinite(table)]
    scale = chain_at(q, "scale", spec.scales).astype(np.float64)[..., None]
    zero = chain_at(q, "zero", spec.zeros).astype(np.float64)[..., None] if spec.zeros else 0.0
    reach = scale * (table - zero) if spec.zeros_in_codes else scale * table - zero
    return np.abs(reach - w.double().numpy()[..., None]).min(-1)


def searched(spec: QuantSpec) -> bool:
    """ggml's types: their codes are chosen by its own arithmetic, not by rounding to the nearest."""
    from fewbit.quant.ggml import GGML_RULES

    return spec.rule in GGML_RULES
