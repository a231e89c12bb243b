"""calibrate: the scales of a KV cache measured on a text, layer by layer, into a side file.

The checkpoint stays as it is. What is gathered is the largest magnitude of keys and of values, as they would be cached,
of a layer or of each of its heads; a scale is that / what the format reaches. Keys and values are seen unrounded, also
where the checkpoint declares a format of its own.
"""

from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from fewbit import codecs
from fewbit.errors import RequestError
from fewbit.models import kv, kv_file
from fewbit.models.finding import refuse_on_errors
from fewbit.models.kv_file import KvScales, shapes_of
from fewbit.models.layers import WHOLE, Layers
from fewbit.models.verify import verify_source
from fewbit.quant.kv import HEAD, KV_FORMATS, MEASURED
from fewbit.workflows.job import Calibration, samples_of
from fewbit.workflows.layer_work import attention_name
from fewbit.workflows.stats import Watcher
from fewbit.workflows.stats_range import kv_scales


@dataclass(frozen=True, slots=True)
class Calibrated:
    """What calibrate_kv did. modules: attention module -> the largest scale of its keys, and of its values."""

    source: Path
    out: Path
    format: str
    tokens: int
    modules: dict[str, tuple[float, float]]

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


def calibrate_kv(
    src: str | Path,
    out: str | Path,
    kv_format: str = "fp8",
    *,
    calib: Any = None,
    samples: int = 128,
    length: int = 512,
    seed: int = 0,
    chat: bool = False,
    order: str = "shuffled",
    device: str | torch.device = "cpu",
    dtype: str | torch.dtype | None = None,
    max_memory: int | None = None,
    overwrite: bool = False,
    trust_remote_code: bool = False,
    tell: Callable[[int, int], None] = lambda done, total: None,
) -> Calibrated:
    """Measure the scales of a cache in `kv_format` (a name of MEASURED, with -head for one of each head) -> a file.

    calib, samples, length, seed, chat, order: as of quantize. tell: called with how many layers are done, of how many.
    """
    name, out = kv_format.removesuffix(HEAD), Path(out)
    if name not in MEASURED:
        raise RequestError(f"--kv {kv_format!r}: scales are measured for {', '.join(MEASURED)}, each also with {HEAD}")
    if out.exists() and not overwrite:
        raise RequestError(f"{out}: is there already; overwrite=True, --overwrite")
    if not out.parent.is_dir():
        raise RequestError(f"{out}: there is no such folder")
    per_head, element = kv_format.endswith(HEAD), KV_FORMATS[name].element
    asked = Calibration(calib, samples, length, seed, chat, order)
    with codecs.open(src, trust_remote_code) as source, torch.no_grad():
        refuse_on_errors(source.path, verify_source(source), kv.FINDINGS)
        layers = Layers(source, dtype=dtype, device=device, cached=kv.Asked("float32"))
        text = samples_of(asked, source, layers.config)
        state = layers.start(text.batches(max(1, asked.batch_tokens // asked.length)), max_memory)
        layers.release()
        found = {}
        for unit in layers.units:
            with layers.loaded(unit) as module, Watcher(module, (), kv=True) as watcher:
                for i in range(len(state)):
                    value = layers.run(unit, module, state, i)
                    if unit.name != WHOLE:
                        state[i] = value
            if watcher.kv or unit.name == WHOLE:  # a layer may have a state of another kind
                scales = kv_scales(watcher.kv, "head" if per_head else "tensor", element)
                found |= {attention_name(layers, unit, path): held for path, held in scales.items()}
            tell(unit.index + 1, len(layers.units))
        measured = {"text": text.source, "samples": len(text.ids), "tokens": text.tokens, "digest": text.digest,
                    "dtype": str(layers.options.dtype).removeprefix("torch.")}  # fmt: skip
        if not found:
            kv_scales({})  # raises
        kv_file.write(out, KvScales(name, per_head, shapes_of(layers.config), found, measured))
    modules = {name: (float(held["k"].max()), float(held["v"].max())) for name, held in found.items()}
    return Calibrated(source.path, out, kv_format, text.tokens, modules)
