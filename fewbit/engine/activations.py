"""What becomes of the inputs of quantized linears on this device. What differs from the checkpoint's word is said."""

import logging
from collections.abc import Collection

import torch

from fewbit import codecs
from fewbit.engine.config import EngineConfig
from fewbit.errors import RequestError, UnsupportedError
from fewbit.kernels.capability import lacking, not_fast
from fewbit.models.build import ACTIVATIONS
from fewbit.quant.formats import FORMATS, name_of
from fewbit.quant.spec import Format, describe

LOG = logging.getLogger("fewbit.engine")


def resolved(config: EngineConfig, online: str | None, device: torch.device, dtype: str | None) -> str:
    """-> as models.build.load takes it. online: the format quantized to on arrival."""
    if config.activations not in ACTIVATIONS:
        raise RequestError(f"activations={config.activations!r}: known are {', '.join(ACTIVATIONS)}")
    if config.strict_activations and config.emulate_activations:
        raise RequestError("strict_activations and emulate_activations: an error, or software; not both")
    if config.emulate_activations or config.emulation:
        return "off" if config.activations == "off" else "declared"
    if config.activations in ("declared", "off"):
        return config.activations
    with codecs.open(config.model) as source:
        formats = {entry.format for entry in source.modules.values()} | ({FORMATS[online]} if online else set())
    found = sorted({why for each in formats if (why := lacking(each, device))})
    if found and config.strict_activations:
        raise UnsupportedError(f"{config.model}: its activations cannot be multiplied as declared", found)
    for why in found:
        LOG.warning("activations are left as they are, weights alone are quantized: %s "
                    "(--emulate-activations rounds them in software, --strict-activations refuses)", why)  # fmt: skip
    if config.activations == "fast":
        say_fast(formats, device, getattr(torch, dtype or "bfloat16", torch.bfloat16))
    return config.activations


def say_fast(formats: Collection[Format], device: torch.device, dtype: torch.dtype) -> None:
    weights_alone = [format for format in formats if format.act is None]
    for format in sorted(weights_alone, key=lambda f: describe(f.weight)):
        name, why = name_of(format) or describe(format.weight), not_fast(format, device, dtype)
        if why is None:
            LOG.warning("activations of %s are rounded to int8 per token, as --activations fast asks", name)
        else:
            LOG.warning("activations of %s are left as they are by --activations fast: %s", name, why)
