"""What an engine came to run: kernels by format, the type of the KV cache and where its scales come from."""

from collections import Counter
from collections.abc import Iterable
from itertools import chain
from typing import Any

import torch
from torch import nn

from fewbit.kernels.registry import kernels
from fewbit.modules.attention import INSIDE, KV
from fewbit.modules.attention_sides import CAST, SIDES, of
from fewbit.modules.linear import Linear, Part
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


def _parts(module: nn.Module) -> Iterable[Part]:
    held = getattr(module, "parts", ())
    return chain.from_iterable(held.values()) if isinstance(held, dict) else held


def _cache(model: nn.Module, cache: torch.dtype | None) -> dict[str, str]:
    held = [kv for module in model.modules() if (kv := getattr(module, KV, None)) is not None]
    if not held:
        kv, scales = _short(cache) if cache else "as computed", "1.0" if cache else "none"
        sides = [of(module) for module in model.modules() if hasattr(module, SIDES)]
        rounded = sorted({describe(side.spec) for each in sides for side in (each.k, each.v) if side is not None})
        locked = any(each.q is not None and each.q.spec == CAST for each in sides)
        return {
            "kv": ", rounded through ".join([kv, *rounded[:1]]),
            "kv_scales": f"{scales}, locked" if locked else scales,
        }
    stored = sum(bool(key) for _, key, _ in held)
    return {
        "kv": describe(held[0][0]),
        "kv_scales": f"{stored} modules of the checkpoint" if stored else "at each call",
    }


def _short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
