"""Fused modules as an engine asks for them: never, where the twin agrees, or all that is proposed and else an error."""

import logging
from collections.abc import Iterable
from typing import Any

import torch

from fewbit.engine import proof
from fewbit.engine.config import EngineConfig
from fewbit.errors import UnsupportedError
from fewbit.inc.session import Session
from fewbit.models import fuse
from fewbit.models.fuse_values import Decision, refusals

LOG = logging.getLogger("fewbit.engine")
STRICT = "strict"


def asked(config: EngineConfig, device: torch.device, session: Session | None) -> bool:
    """Whether a model is to be fused as it is loaded. Where INC measures, its nodes are the model's own modules."""
    measured = session is not None and session.measures
    if measured and config.fusion == STRICT:
        reason = "INC measures the modules that a model is made of, and its config says so: mode MEASURE fuses nothing"
        raise UnsupportedError(f"{config.model}: fusion=strict cannot be", [reason])
    wanted = config.fusion == STRICT or (config.fusion != "off" and device.type == "cuda")
    return wanted and not measured


def attention(config: EngineConfig, architecture: Any) -> str:
    """proof.attention; it comes before weights are read, and so does strict's error about what the twin refuses."""
    found = proof.attention(architecture)
    if config.fusion == STRICT:
        refuse(config, fuse.plan(architecture).refused)
    return found


def tell(config: EngineConfig, model: Any) -> None:
    """What was refused, each once, with its figure; strict raises it."""
    found = getattr(model, fuse.ATTRIBUTE, None)
    if found is None:
        return
    if config.fusion == STRICT:
        refuse(config, found.decisions)
    for line in refusals(found.decisions):
        LOG.info("not fused: %s", line)


def refuse(config: EngineConfig, decisions: Iterable[Decision]) -> None:
    if reasons := refusals(decisions):
        told = f"{config.model}: fusion=strict, and not all can be fused; auto leaves these as transformers has them"
        raise UnsupportedError(told, reasons)
