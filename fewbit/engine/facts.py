"""What an engine came to run: kernels by format, the type of the KV cache and where its scales come from."""

from collections import Counter
from collections.abc import Iterable
from itertools import chain
from typing import Any

import torch
from torch import nn

from fewbit.engine.runner import device_of
from fewbit.kernels.cache import held_as
from fewbit.kernels.registry import kernels
from fewbit.models import hf
from fewbit.models.kv import FROM
from fewbit.modules.attention import INSIDE, KV, KV_TURN
from fewbit.modules.attention_sides import CAST, SIDES, of
from fewbit.modules.linear import Linear, Part
from fewbit.modules.paged import NAME as PAGED
from fewbit.quant.formats import name_of
from fewbit.quant.spec import describe


def facts(model: nn.Module, cache: torch.dtype | None) -> dict[str, Any]:
    """cache: the type of the KV cache, None for the model's."""
    counts: Counter[tuple[str, str]] = Counter()
    for module in model.modules():
        counts.update((part.kernel.name, name_of(part.quantized.format) or describe(part.quantized.weight.spec))
                      for part in _parts(module))  # fmt: skip
        if type(module) is Linear and not module.parts and module.weight is not None:
            counts["dense", _short(module.weight.dtype)] += 1  # slices of a merged one are counted with the whole
    rows = [{"kernel": k, "format": f, "modules": n} for (k, f), n in sorted(counts.items())]
    inside = sorted({str(held) for module in model.modules() if (held := getattr(module, INSIDE, None)) is not None})
    attention = {"attention": f"{'; '.join(inside)} (exactly, in plain torch)"} if inside else {}
    return {"kernels": rows, **_cache(model, cache), **attention}


def said(rows: Iterable[dict[str, Any]]) -> list[str]:
    """The quantized rows of `facts` as lines, each with what its kernel says of itself."""
    notes = {kernel.name: kernel.note for kernel in kernels() if kernel.op == "linear"}
    return [f"{row['modules']} modules of {row['format']} run on {row['kernel']}: {notes.get(row['kernel'], '')}"
            for row in rows if row["kernel"] != "dense"]  # fmt: skip


def cache_said(found: dict[str, Any], token: int) -> str:
    """The KV cache in a line. token: the bytes that one takes, 0 where no pages are kept."""
    held = {"emulated": ", rounded to that and held as values", "packed": ", packed"}.get(found["kv_held"], "")
    size = f", {token} bytes a token" if token else ""
    return f"KV cache: {found['kv']}{held}; scales: {found['kv_scales']}{size}"


def _parts(module: nn.Module) -> Iterable[Part]:
    held = getattr(module, "parts", ())
    return chain.from_iterable(held.values()) if isinstance(held, dict) else held


def _cache(model: Any, cache: torch.dtype | None) -> dict[str, str]:
    """kv: to what keys and values are rounded; kv_scales: where its scales come from; kv_held: what is in memory."""
    specs = Counter(kv[0] for module in model.modules() if (kv := getattr(module, KV, None)) is not None)
    sides = [of(module) for module in model.modules() if hasattr(module, SIDES)]
    also = sorted({describe(side.spec) for each in sides for side in (each.k, each.v) if side is not None})[:1]
    if not specs:
        held = _short(cache) if cache else "as computed"
        return {"kv": ", rounded through ".join([held, *also]), "kv_scales": "none", "kv_held": "values"}
    spec = specs.most_common(1)[0][0]
    turned = any(getattr(module, KV_TURN, None) is not None for module in model.modules())
    paged, scales = hf.attention_of(model) == PAGED, str(getattr(model, FROM))
    locked = any(each.q is not None and each.q.spec == CAST for each in sides)
    return {
        "kv": ", rounded through ".join([describe(spec) + (", turned" if turned else ""), *also]),
        "kv_scales": "1.0, locked" if locked else scales,
        "kv_held": held_as(spec, device_of(model)) if paged else "emulated",
    }


def _short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
