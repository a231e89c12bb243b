"""Fused modules as an engine asks for them: never, where the twin agrees, or all that is proposed and else an error.

The twin is small, random and on a CPU. So a few tokens run through the loaded model both ways before it serves: what
its own sizes, parameters and device make of a kernel shows there, and where logits part transformers' code comes back.
"""

import logging
import math
from collections.abc import Collection, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from fewbit.engine import proof
from fewbit.engine.config import EngineConfig
from fewbit.engine.parallel_group import Group
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
    if loaded.team is None:
        compare(loaded)
    elif loaded.device.type == "cpu":
        loaded.team.command("compare")
        loaded.team.guarded(partial(compare, loaded, loaded.team.group))
    decisions = getattr(loaded.model, fuse.ATTRIBUTE).decisions
    if config.fusion == STRICT:
        refuse(config, decisions)
    for line in refusals(decisions):
        LOG.info("not fused: %s", line)


def refuse(config: EngineConfig, decisions: Iterable[Decision]) -> None:
    if reasons := refusals(decisions):
        said = f"{config.model}: fusion=strict, and not all can be fused; auto leaves these as transformers has them"
        raise UnsupportedError(said, reasons)


def compare(loaded: "Loaded", group: Group | None = None) -> None:
    """A few tokens both ways. Where they part, the kind is put back without which they do not; all, where none is.

    group: of ranks, which do this in step.
    """
    model, report = loaded.model, getattr(loaded.model, fuse.ATTRIBUTE)
    kinds = [kind for kind in KINDS if report.count(kind)]
    if not kinds:
        return
    got = attempt(loaded)
    try:
        with own_code(model, kinds) as modules:
            wanted = logits(loaded)
            found = agreed(got, wanted, group)
            limit = TIMES * agreed(noisy(loaded, modules), wanted, group) if found else 0.0
    except Exception as error:  # whatever a model definition raises on this device
        LOG.info("fused modules were not held against transformers' code, which fails: %s", first_line(error))
        return
    LOG.debug("fused modules and transformers' code: logits of %d tokens differ by %.2g, allowed %.2g", TOKENS, found,
              limit)  # fmt: skip
    if found > limit:
        left = guilty(loaded, kinds, wanted, limit, group)
        why = f"logits of a few tokens differ by {found:.2g} from transformers' code, rounding allows {limit:.2g}"
        why = f"a few tokens fail with what is fused, {told(got)}" if isinstance(got, Exception) else why
        now = (replace(d, reason=why) if d.kept and d.kind in left else d for d in report.decisions)
        setattr(model, fuse.ATTRIBUTE, replace(report, decisions=tuple(now)))


@contextmanager
def own_code(model: nn.Module, kinds: Collection[Kind]) -> Iterator[list[nn.Module]]:
    """Within, modules of these kinds are transformers' own. -> those whose outputs they may round elsewhere."""
    back = put_back(model, kinds)
    try:
        yield [one.module for one in back if one.kind != "sums"]
    finally:
        for one in back:
            one.again()


def guilty(
    loaded: "Loaded", kinds: Collection[Kind], wanted: Tensor, limit: float, group: Group | None
) -> Collection[Kind]:
    """The kinds that are put back."""
    for kind in kinds:
        with own_code(loaded.model, [kind]):
            got = attempt(loaded)
        if agreed(got, wanted, group) <= limit:
            put_back(loaded.model, [kind])
            return [kind]
    put_back(loaded.model, kinds)
    return kinds


def noisy(loaded: "Loaded", modules: Sequence[nn.Module]) -> Tensor:
    """Logits where what these modules give is rounded once more: how far apart two right ways may be."""
    generator = torch.Generator(loaded.device).manual_seed(0)

    def rounded(t: Tensor) -> Tensor:
        eps = torch.finfo(t.dtype).eps / 2
        noise = torch.empty_like(t, dtype=torch.float32).uniform_(-eps, eps, generator=generator)
        return (t.float() * (1 + noise)).to(t.dtype)

    def hook(module: nn.Module, given: Any, made: Any) -> Any:
        if not isinstance(made, tuple):
            return rounded(made)
        return tuple(rounded(t) if isinstance(t, Tensor) and t.is_floating_point() else t for t in made)

    with ExitStack() as stack:
        for module in modules:
            stack.callback(module.register_forward_hook(hook).remove)
        return logits(loaded)


def attempt(loaded: "Loaded") -> Tensor | Exception:
    try:
        return logits(loaded)
    except Exception as error:  # a kernel that fails is one that differs
        return error


def logits(loaded: "Loaded") -> Tensor:
    """Of a few tokens: [TOKENS, V], in the model's type."""
    ids = loaded.tokenizer(TEXT)["input_ids"] if loaded.tokenizer is not None else []
    ids = [i for i in (*ids, *range(10, 10 + TOKENS)) if i < loaded.vocab][:TOKENS]
    stream = Stream(Request("", ids, SamplingParams(prompt_logprobs=0)), 0, 0, ids)
    stream.pages = list(range(-(-len(ids) // loaded.page)))
    runner = loaded.single(len(stream.pages))
    try:
        return runner.run([Work(stream, 0, len(ids))]).rows
    finally:
        runner.free()


def agreed(got: Tensor | Exception, wanted: Tensor, group: Group | None) -> float:
    """The distance, as rank 0 finds it."""
    found = math.inf if isinstance(got, Exception) else distance(got, wanted)
    return found if group is None else float(group.broadcast(torch.tensor([found], dtype=torch.float64)))


def distance(got: Tensor, wanted: Tensor) -> float:
    """Relative, of logits without their mean; the median of tokens, for an expert chosen by a hair moves one far.

    A divergence of probabilities would be blind where a model is unsure: docs/log.md has figures.
    """
    if not bool(wanted.isfinite().all()):  # they say nothing
        return 0.0
    a, b = (t.float() - t.float().mean(-1, keepdim=True) for t in (got, wanted))
    each = (a - b).norm(dim=-1) / b.norm(dim=-1).clamp_min(torch.finfo(torch.float32).tiny)
    return float(each.median()) if bool(each.isfinite().all()) else math.inf
