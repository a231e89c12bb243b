"""Tiny random models as transformers saves them."""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fewbit.models import hf, twin
from fewbit.models.shrink import shrink

FULL: dict[str, dict[str, Any]] = {"mixtral": {"head_dim": 128}, "llama": {"num_key_value_heads": 8}}


def model(model_type: str, **changes: Any) -> Any:
    """A tiny transformers model with every weight random."""
    config = shrink(hf.read_config({"model_type": model_type, **FULL.get(model_type, {}), **changes}))
    torch.manual_seed(0)
    made = hf.random_model(config)
    twin.randomize(made)
    return made


def save(made: Any, folder: Path) -> Path:
    made.save_pretrained(folder)
    return folder


def logits(made: nn.Module, tokens: int = 12) -> Tensor:
    ids = torch.randint(10, 90, (2, tokens), generator=torch.Generator().manual_seed(3))
    with torch.no_grad():
        return made(ids).logits
