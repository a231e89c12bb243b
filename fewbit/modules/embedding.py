"""Embedding: a quantized table that decodes only the rows asked for."""

from collections.abc import Callable
from typing import Any, Self

import torch
from torch import Tensor, nn

from fewbit.kernels import triton_runtime
from fewbit.kernels.coded import Coded, coded, lacking
from fewbit.kernels.triton_linear import decode_rows
from fewbit.quant.qtensor import QTensor, Quantized
from fewbit.quant.reference import decode
from fewbit.quant.spec import Format

FEW = 16  # ids of which each may be looked up for itself


class Embedding(nn.Module):
    """Wraps transformers' own embedding, which may scale what it looks up: it is given the rows needed, renumbered."""

    def __init__(self, host: nn.Embedding, table: QTensor, dtype: torch.dtype):
        super().__init__()
        host._parameters.pop("weight", None)
        host.padding_idx = None
        self.host, self.table, self.dtype = host, table, dtype
        self.coded: Coded | None = None
        self.num_embeddings, self.embedding_dim = table.shape

    def forward(self, ids: Tensor) -> Tensor:
        find = self.on_device if ids.is_cuda else self.each if ids.numel() <= FEW else self.distinct
        self.host.weight, places = find(ids)
        try:
            return self.host(places)
        finally:
            del self.host.weight

    def distinct(self, ids: Tensor) -> tuple[Tensor, Tensor]:
        """-> the rows that ids name, each once, and ids renumbered by them."""
        needed, places = ids.unique(return_inverse=True)
        return rows(self.table, needed).to(self.dtype), places

    def each(self, ids: Tensor) -> tuple[Tensor, Tensor]:
        """The same, a row for each id: to know which are distinct is to look at them, which nothing recorded can."""
        return rows(self.table, ids.reshape(-1)).to(self.dtype), self.numbered(ids)

    def on_device(self, ids: Tensor) -> tuple[Tensor, Tensor]:
        """As each, in one kernel where there is one."""
        if lacking(self.table.spec) or triton_runtime.lacking(ids.device):
            return self.each(ids)
        if self.coded is None:
            self.coded = coded(Quantized(Format(self.table.spec), self.table))
        out = torch.empty(ids.numel(), self.embedding_dim, dtype=self.dtype, device=ids.device)
        return decode_rows(self.coded, out, index=ids.reshape(-1)), self.numbered(ids)

    @staticmethod
    def numbered(ids: Tensor) -> Tensor:
        return torch.arange(ids.numel(), device=ids.device).view(ids.shape)

    def __getattr__(self, name: str) -> Any:
        if name == "weight" and "table" in self.__dict__:
            return decode(self.table).to(self.dtype)
        return super().__getattr__(name)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        super()._apply(fn, recurse)
        self.table = self.table.to(fn(torch.empty(0, dtype=torch.uint8, device=self.table.device)).device)
        self.coded = None
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
