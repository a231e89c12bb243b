"""Intel Neural Compressor's surface: the JSON of QUANT_CONFIG, measurement files, and calibration from end to end.

What `LLM(quantization="inc")` and `fewbit serve --quantization inc` do is in fewbit.inc and fewbit.engine.gaudi.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fewbit.errors import RequestError
from fewbit.inc import config as configs
from fewbit.inc import files
from fewbit.inc.config import Config
from fewbit.inc.files import Node, Stats
from fewbit.inc.scales import METHODS
from fewbit.inc.unify import expand, postprocess, unify
from fewbit.workflows.calibration import Order, calibration

__all__ = ["METHODS", "Calibrated", "Config", "Node", "Stats", "calibrate", "expand", "postprocess", "read_config",
           "read_stats", "unify", "unify_files", "write_stats"]  # fmt: skip

read_config, read_stats, write_stats = configs.read, files.read, files.write


@dataclass(frozen=True, slots=True)
class Calibrated:
    """Files: of every rank, then of all together. nodes: how many were measured."""

    written: tuple[Path, ...]
    nodes: int
    samples: int
    tokens: int
    source: str


def calibrate(
    model: str | Path,
    config: str | Path,
    *,
    calib: Any = None,
    samples: int = 512,
    length: int = 512,
    seed: int = 0,
    chat: bool = False,
    order: Order = "shuffled",
    tokens: int = 1,
    **options: Any,
) -> Calibrated:
    """Run calibration text through an engine in mode MEASURE, then unify what its ranks have measured.

    config: INC's JSON. tokens: generated after each sample. options: of LLM (tensor_parallel_size, device, dtype ...).
    """
    from fewbit.engine.params import SamplingParams
    from fewbit.llm import LLM
    from fewbit.models.text import tokenizer

    asked = configs.read(config)
    if asked.mode not in ("MEASURE", "SHAPE"):
        raise RequestError(f"{config}: mode is {asked.mode}, and calibration measures: set it to MEASURE")
    own = calib is None or isinstance(calib, str | Path)
    trusted = bool(options.get("trust_remote_code", False))
    read = tokenizer(options.get("tokenizer") or model, trusted) if own else None
    text = calibration(read, calib, samples=samples, length=length, seed=seed, chat=chat, order=order)
    with LLM(model, quantization="inc", quant_config=str(config), **options) as llm:
        params = SamplingParams(max_tokens=tokens, temperature=0.0, ignore_eos=True)
        llm.generate([row.tolist() for row in text.ids], params)
        size, dealt = llm.llm_engine.config.tensor_parallel_size, deals_out_experts(llm.llm_engine.loaded.model)
    whole = files.stem(asked, 0, 1)
    if size > 1:
        unify_files([files.stem(asked, rank, size) for rank in range(size)], whole, dealt)
    written = sorted(path for path in whole.parent.iterdir() if path.name.startswith(whole.name))
    return Calibrated(tuple(written), len(files.read(whole).nodes), len(text.ids), text.tokens, text.source)


def unify_files(parts: Sequence[Path], whole: Path, expert_parallel: bool = False) -> list[Path]:
    """parts: files of ranks in their order, without their endings. -> what was written"""
    return files.write(whole, unify([files.read(path) for path in parts], expert_parallel))


def deals_out_experts(model: Any) -> bool:
    """Whether each rank of a loaded model has experts of its own."""
    from fewbit.models.shard_source import SHARDS

    shards = getattr(model, SHARDS, None)
    return shards is not None and any(cut.kind == "experts" for cut in shards.cuts.values())
