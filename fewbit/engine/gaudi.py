"""quantization="inc" and kv_cache_dtype="fp8_inc": what vLLM on Gaudi means by them, from an engine's config.

The same name stands for two things: with QUANT_CONFIG it is INC's measuring and quantizing of a float model; without,
upstream vLLM means a checkpoint that AutoRound or INC has quantized already, and that is read without any config.
"""

import logging
from typing import Any

import torch

from fewbit import codecs, env
from fewbit.engine.config import EngineConfig
from fewbit.engine.parallel_group import Group
from fewbit.errors import RequestError, UnsupportedError
from fewbit.inc.session import Session
from fewbit.kernels.capability import lacking
from fewbit.models.build import ACTIVATIONS
from fewbit.quant.kv import KV_FORMATS

LOG = logging.getLogger("fewbit.engine")
NAME, CACHE = "inc", "fp8_inc"


def session(config: EngineConfig, group: Group | None) -> Session | None:
    """Of this rank; None where INC has no part in it."""
    path = config.quant_config or env.quant_config()
    asked = (config.quantization or "").lower() == NAME
    if not asked or not path:
        refuse_halves(config, path, asked)
        return None
    for name, value in env.vllm_waits().items() if group is None else ():
        LOG.info("%s=%s is accepted and changes nothing: there is no warm-up to skip, and no timeout of a step", name,
                 value)  # fmt: skip
    found = Session(path, group.rank if group is not None else 0, config.tensor_parallel_size)
    if found.config.mode == "NONE":
        LOG.warning("%s: mode is NONE: the model runs as it is", path)
    if config.kv_cache_dtype == CACHE and not found.quantizes:
        LOG.info("kv_cache_dtype=%s: keys and values are cached as computed in mode %s", CACHE, found.config.mode)
    found.plan(config.model, config.kv_cache_dtype == CACHE, config.trust_remote_code)
    refuse_twice(config, found)
    return found


def refuse_twice(config: EngineConfig, found: Session) -> None:
    """What INC decides, decided by something else as well."""
    if config.emulation is not None:
        raise RequestError(f"quantization={NAME!r} and fakequant both say what weights become; give one of them")
    if found.becomes.kv and config.kv_cache_dtype in KV_FORMATS and config.kv_cache_dtype != CACHE:
        raise RequestError(f"kv_cache_dtype={config.kv_cache_dtype!r}: INC's config rounds keys and values; {CACHE} "
                           "takes its scales, or block its types KVCache, Matmul and ModuleFusedSDPA")  # fmt: skip


def refuse_halves(config: EngineConfig, path: str, asked: bool) -> None:
    """One of the things that belong together, without the others."""
    if asked and not quantized(config.model):
        raise RequestError(
            f"quantization={NAME!r}: {config.model} is not quantized, and QUANT_CONFIG is not set; set it to a JSON "
            "config of INC, of mode MEASURE to calibrate and then of QUANTIZE. A checkpoint that AutoRound or INC has "
            "quantized is served without it"
        )
    if path and not asked:
        LOG.warning("QUANT_CONFIG=%s is not used: quantization is %s, not %s", path, config.quantization, NAME)


def quantized(model: str) -> bool:
    with codecs.open(model) as source:
        return bool(source.modules)


def dtype(config: EngineConfig, found: Session) -> str | None:
    """hp_dtype where the config names it and nothing else is asked for."""
    asked = found.config.asked_dtype
    if asked is not None and config.dtype not in ("auto", asked):
        LOG.info("dtype=%s is computed in, not hp_dtype of %s", config.dtype, found.config.where)
    return asked if config.dtype == "auto" else None


def given(config: EngineConfig, found: Session, device: torch.device) -> dict[str, Any]:
    """What models.build.load is given. Inputs are rounded as INC says, in software where nothing multiplies them."""
    if config.activations not in ACTIVATIONS:
        raise RequestError(f"activations={config.activations!r}: known are {', '.join(ACTIVATIONS)}")
    reasons = sorted({why for form in found.formats if (why := lacking(form, device))})
    if reasons and config.strict_activations:
        raise UnsupportedError(f"{config.model}: its activations cannot be multiplied as INC's config says", reasons)
    for why in reasons:
        LOG.warning("FP8 is emulated, exactly and slowly: %s", why)
    how = "off" if config.activations == "off" else "declared"
    return {"format": found.arrives, "kv": found.becomes.kv, "activations": how}
