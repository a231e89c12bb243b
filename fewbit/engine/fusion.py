"""Fused modules as an engine asks for them: never, where the twin agrees, or all that is proposed and else an error.

The twin is small, random and on a CPU. So a few tokens run through the loaded model both ways before it serves: what
its own sizes, parameters and device make of a kernel shows there, and where logits part transformers' code comes back.
"""

import logging
import math
from collections.abc import Callable, Collection, Iterable
from contextlib import ExitStack
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from fewbit.engine import proof
from fewbit.engine.config import EngineConfig
from fewbit.engine.params import SamplingParams
from fewbit.engine.request import Request, Stream
from fewbit.engine.scheduler import Work
from fewbit.errors import UnsupportedError
from fewbit.inc.session import Session
from fewbit.models import fuse
from fewbit.models.fuse_place import put_back
from fewbit.models.fuse_values import Decision, Fused, Kind, refusals
from fewbit.models.twin import first_line, told

if TYPE_CHECKING:
    from fewbit.engine.start import Loaded

LOG = logging.getLogger("fewbit.engine")
STRICT = "strict"
KINDS: tuple[Kind, ...] = ("sums", "norm", "glu", "rotary", "latent", "route", "mixture")  # what can be put back
TEXT, TOKENS = "The capital of France is Paris, and that of Italy is Rome.", 8
TIMES = 4  # what fused modules may change, in what one rounding of each of their outputs changes


def asked(config: EngineConfig, session: Session | None) -> bool:
    """Whether a model is to be fused as it is loaded. Where INC measures, its nodes are the model's own modules."""
    measured = session is not None and session.measures
    if measured and config.fusion == STRICT:
        reason = "INC measures the modules that a model is made of, and its config says so: mode MEASURE fuses nothing"
        raise UnsupportedError(f"{config.model}: fusion=strict cannot be", [reason])
    return config.fusion != "off" and not measured


def attention(config: EngineConfig, architecture: Any) -> str:
    """proof.attention; it comes before weights are read, and so does strict's error about what the twin refuses."""
    found = proof.attention(architecture)
    if config.fusion == STRICT:
        refuse(config, fuse.plan(architecture).refused)
    return found


def fused(model: nn.Module) -> bool:
    return isinstance(getattr(model, fuse.ATTRIBUTE, None), Fused)


def settle(config: EngineConfig, loaded: "Loaded") -> None:
    """Hold a fused model against transformers' code, and say what was refused, each once; strict raises it."""
    if not fused(loaded.model):
        return
    compare(loaded)
    decisions = getattr(loaded.model, fuse.ATTRIBUTE).decisions
    if config.fusion == STRICT:
        refuse(config, decisions)
    for line in refusals(decisions):
        LOG.info("not fused: %s", line)


def refuse(config: EngineConfig, decisions: Iterable[Decision]) -> None:
    if reasons := refusals(decisions):
        said = f"{config.model}: fusion=strict, and not all can be fused; auto leaves these as transformers has them"
        raise UnsupportedError(said, reasons)


def compare(loaded: "Loaded") -> None:
    """A few tokens both ways. Where they part, the kind is put back without which they do not; all, where none is."""
    model, report = loaded.model, getattr(loaded.model, fuse.ATTRIBUTE)
    kinds = [kind for kind in KINDS if report.count(kind)]
    if not kinds:
        return
    got = attempt(loaded)
    try:
        wanted = logits(loaded, kinds)
        found = distance(got, wanted)
        limit = TIMES * distance(logits(loaded, kinds, noisy=True), wanted) if found else 0.0
    except Exception as error:  # whatever a model definition raises on this device
        loaded.check()
        LOG.info("fused modules were not held against transformers' code, which fails: %s", first_line(error))
        return
    LOG.debug("fused modules and transformers' code: logits of %d tokens differ by %.2g, allowed %.2g", TOKENS, found,
              limit)  # fmt: skip
    if found > limit:
        alone = (kind for kind in kinds if distance(attempt(loaded, [kind]), wanted) <= limit)
        left = [first] if (first := next(alone, None)) else kinds
        if loaded.team is not None:
            loaded.team.command("put_back", kinds=left)
        put_back(model, left)
        why = f"logits of a few tokens differ by {found:.2g} from transformers' code, rounding allows {limit:.2g}"
        why = f"a few tokens fail with what is fused, {told(got)}" if isinstance(got, Exception) else why
        now = (replace(d, reason=why) if d.kept and d.kind in left else d for d in report.decisions)
        setattr(model, fuse.ATTRIBUTE, replace(report, decisions=tuple(now)))


def attempt(loaded: "Loaded", left: Collection[Kind] = ()) -> Tensor | Exception:
    try:
        return logits(loaded, left)
    except Exception as error:  # a kernel that fails is one that differs
        loaded.check()
        return error


def logits(loaded: "Loaded", left: Collection[Kind] = (), noisy: bool = False) -> Tensor:
    """Of a few tokens, by all ranks: [TOKENS, V], in the model's type."""
    mine = partial(own_logits, loaded, left, noisy)
    return mine() if loaded.team is None else loaded.team.logits(mine, left, noisy)


def own_logits(loaded: "Loaded", left: Collection[Kind], noisy: bool) -> Tensor:
    """This rank's part of it. left: to transformers' code meanwhile.

    noisy: what that gives is rounded once more, which is how far apart two right ways may be.
    """
    with ExitStack() as stack:
        back = put_back(loaded.model, left)
        for one in back:
            stack.callback(one.again)
        if noisy:
            hook = rounding(torch.Generator(loaded.device).manual_seed(0))
            for module in (one.module for one in back if one.kind != "sums"):
                stack.callback(module.register_forward_hook(hook).remove)
        ids = loaded.tokenizer(TEXT)["input_ids"] if loaded.tokenizer is not None else []
        ids = [i for i in (*ids, *range(10, 10 + TOKENS)) if i < loaded.vocab][:TOKENS]
        stream = Stream(Request("", ids, SamplingParams(prompt_logprobs=0)), 0, 0, ids)
        stream.pages = list(range(-(-len(ids) // loaded.page)))
        runner = loaded.single(len(stream.pages))
        stack.callback(runner.free)
        return runner.run([Work(stream, 0, len(ids))]).rows


def rounding(generator: torch.Generator) -> Callable[..., Any]:
    """A hook that rounds what a module gives once more."""

    def rounded(t: Tensor) -> Tensor:
        eps = torch.finfo(t.dtype).eps / 2
        noise = torch.empty_like(t, dtype=torch.float32).uniform_(-eps, eps, generator=generator)
        return (t.float() * (1 + noise)).to(t.dtype)

    def hook(module: nn.Module, given: Any, made: Any) -> Any:
        if not isinstance(made, tuple):
            return rounded(made)
        return tuple(rounded(t) if isinstance(t, Tensor) and t.is_floating_point() else t for t in made)

    return hook


def distance(got: Tensor | Exception, wanted: Tensor) -> float:
    """Relative, of logits without their mean; the median of tokens, for an expert chosen by a hair moves one far.

    A divergence of probabilities would be blind where a model is unsure: docs/log.md has figures.
    """
    if isinstance(got, Exception):
        return math.inf
    if not bool(wanted.isfinite().all()):  # they say nothing
        return 0.0
    a, b = (t.float() - t.float().mean(-1, keepdim=True) for t in (got, wanted))
    each = (a - b).norm(dim=-1) / b.norm(dim=-1).clamp_min(torch.finfo(torch.float32).tiny)
    return float(each.median()) if bool(each.isfinite().all()) else math.inf
