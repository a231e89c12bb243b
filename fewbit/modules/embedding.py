"""Embedding: a quantized table that decodes only the rows asked for."""

from collections.abc import Callable
from typing import Any, Self

import torch
from torch import Tensor, nn

from fewbit.quant.qtensor import QTensor
from fewbit.quant.reference import decode


class Embedding(nn.Module):
    """Wraps transformers' own embedding, which may scale what it looks up: it is given the rows needed, renumbered."""

    def __init__(self, host: nn.Embedding, table: QTensor, dtype: torch.dtype):
        super().__init__()
        host._parameters.pop("weight", None)
        host.padding_idx = None
        self.host, self.table, self.dtype = host, table, dtype
        self.num_embeddings, self.embedding_dim = table.shape

    def forward(self, ids: Tensor) -> Tensor:
        if ids.is_cuda:  # `unique` would wait for the device, and keep this out of a CUDA graph
            needed = ids.reshape(-1)
            places = torch.arange(len(needed), device=ids.device).view(ids.shape)
        else:
            needed, places = ids.unique(return_inverse=True)
        self.host.weight = rows(self.table, needed).to(self.dtype)
        try:
            return self.host(places)
        finally:
            del self.host.weight

    def __getattr__(self, name: str) -> Any:
        if name == "weight" and "table" in self.__dict__:
            return decode(self.table).to(self.dtype)
        return super().__getattr__(name)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        super()._apply(fn, recurse)
        self.table = self.table.to(fn(torch.empty(0, dtype=torch.uint8, device=self.table.device)).device)
        return self


def rows(q: QTensor, index: Tensor) -> Tensor:
    """index: [n] -> those rows of q, decoded: [n, K] float32."""
    chain = (*q.spec.scales, *q.spec.zeros)
    if any(scale.block[0] not in (0, 1) for scale in chain):
        return decode(q).index_select(0, index)
    planes = {"codes": q.planes["codes"].index_select(0, index)}
    for stem, scales in (("scale", q.spec.scales), ("zero", q.spec.zeros)):
        for i, scale in enumerate(scales):
            plane = q.planes[f"{stem}{i}"]
            planes[f"{stem}{i}"] = plane.index_select(0, index) if scale.block[0] else plane
    return decode(QTensor(q.spec, (len(index), q.shape[-1]), planes))
