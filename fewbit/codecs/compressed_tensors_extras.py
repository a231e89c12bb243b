"""What compressed-tensors files hold beside codes and scales: bitmasks, column orders, rotations of inputs.

The library has dropped the first two; files of them remain.
"""

from collections.abc import Mapping
from dataclasses import replace

import torch
from torch import Tensor

from fewbit.codecs.planes import matrix, need
from fewbit.errors import CheckpointError, UnsupportedError
from fewbit.quant.pack import packed_size, unpack
from fewbit.quant.qtensor import QTensor, Transform, columns, store

SPARSE = (".compressed", ".bitmask", ".shape")
ORDER = ".weight_g_idx"


def expanded(tensors: Mapping[str, Tensor]) -> Tensor:
    """Values that are not zero, in order, and a bit for each place: [N, K / 8], lowest bit first."""
    values, mask = (need(tensors, ending, "a sparse module has three tensors") for ending in SPARSE[:2])
    n, k = need(tensors, SPARSE[2], "a sparse module has three tensors").reshape(-1).tolist()
    matrix(SPARSE[1], mask, torch.uint8)
    if tuple(mask.shape) != (n, packed_size(k, 1)):
        raise CheckpointError(f"{SPARSE[1]}: want [{n}, {packed_size(k, 1)}] for [{n}, {k}], found {list(mask.shape)}")
    out = torch.zeros(n, k, dtype=values.dtype, device=values.device)
    if mask.is_meta:
        return out
    places = unpack(mask, 1, k).bool()
    count = int(places.sum())
    if count != values.numel():
        raise CheckpointError(f"{SPARSE[1]} marks {count} places, {SPARSE[0]} holds {values.numel()} values")
    if values.element_size() == 1:
        out.view(torch.uint8)[places] = values.reshape(-1).view(torch.uint8)
    else:
        out[places] = values.reshape(-1)
    return out


def in_order(weight: QTensor, groups: Tensor) -> tuple[QTensor, list[Transform]]:
    """Columns whose group is given one by one -> columns in order of group, and the order that inputs must take."""
    k, size = weight.shape[-1], weight.spec.scales[0].block[1]
    if groups.numel() != k:
        raise CheckpointError(f"{ORDER}: want one group for each of {k} columns, found {list(groups.shape)}")
    plain = torch.arange(k, device=groups.device) // (size or k)
    if bool((groups == plain).all()) or bool((groups == -1).all()):  # -1: reserved, never filled
        return weight, []
    index = torch.argsort(groups.reshape(-1), stable=True)
    if not torch.equal(groups.reshape(-1)[index].long(), plain):
        raise CheckpointError(f"{ORDER}: want {size} columns in each of the groups 0 .. {int(plain[-1])}")
    codes = columns(weight, index.to(weight.device))
    weight = replace(weight, planes=weight.planes | {"codes": store(codes, weight.spec.element)})
    return weight, [Transform("permute", {"index": index})]


def rotation(kind: str, weight: QTensor, tensors: Mapping[str, Tensor]) -> Transform:
    """rotate:ending:b:inverse:stored -> the orthonormal matrix of b columns (0: of all).

    Files of 0.13 and later hold it, up to its norm; where none does, and nothing is random, it is Sylvester's.
    """
    _, ending, run, inverse, stored = kind.split(":")
    size = int(run) or weight.shape[-1]
    name, order = f"{ending}.weight:{size}", f"{ending}.perm:{size}"
    if weight.shape[-1] % size:
        raise UnsupportedError(f"transform_config: runs of {size} do not divide {weight.shape[-1]} columns")
    if name not in tensors:
        matrix = _sylvester(size, stored, ending)
    elif tuple(tensors[name].shape) != (size, size):
        raise CheckpointError(f"{ending}.weight: want [{size}, {size}], found {list(tensors[name].shape)}")
    else:
        matrix = tensors[name].float()
    if order in tensors and not matrix.is_meta:
        matrix = matrix[tensors[order]][:, tensors[order]]
    return Transform("rotate", {"matrix": (matrix.T if inverse else matrix).contiguous() / size**0.5})


def _sylvester(size: int, stored: str, ending: str) -> Tensor:
    if stored or size & (size - 1):
        reasons = ["a matrix that is random, or of a size that is no power of two, must be in the file"]
        raise UnsupportedError(f"transform_config: no tensor {ending}.weight of [{size}, {size}]", reasons)
    h = torch.ones(1, 1)
    while h.shape[0] < size:
        h = torch.cat([torch.cat([h, h], 1), torch.cat([h, -h], 1)])
    return h
