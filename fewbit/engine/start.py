"""Starting an engine: the model as asked for, its tokenizer, its runner."""

import gc
import logging
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from rich.console import Console
from rich.progress import Progress
from torch import nn

from fewbit import codecs
from fewbit.engine import activations, fusion, gaudi, proof
from fewbit.engine.config import EngineConfig
from fewbit.engine.parallel import Lockstep, Team, digest
from fewbit.engine.parallel_group import Group
from fewbit.engine.runner import Alone, Paged, Runner
from fewbit.errors import CheckpointError, RequestError, UnsupportedError
from fewbit.inc.session import Session
from fewbit.kernels.compiled import left_to_torch
from fewbit.kernels.registry import EMULATED
from fewbit.models import build, hf, kv
from fewbit.models.emulation import read as read_emulation
from fewbit.models.text import tokenizer as read_tokenizer
from fewbit.models.twin import first_line
from fewbit.modules import paged
from fewbit.modules.attention import INSIDE, is_attention
from fewbit.modules.attention_sides import CAST, SIDES, Side, of
from fewbit.modules.paged import PLAIN
from fewbit.quant.formats import FORMATS

if TYPE_CHECKING:
    from fewbit.engine.limits import Limits

LOG = logging.getLogger("fewbit.engine")
NAMES = {  # vLLM's names of a checkpoint's dialect, beside our own
    "modelopt-fp4": "modelopt", "modelopt-mxfp8": "modelopt", "awq-marlin": "awq", "gptq-marlin": "gptq",
    "auto-awq": "awq", "mxfp4-marlin": "mxfp4", "inc": "auto-round",
}  # fmt: skip
ONLINE = {"fp8": "fp8-tensor", "int8": "int8-channel-a8"}  # vLLM's names of what is quantized on arrival
CACHES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}  # of caches that hold values
DTYPES = {"half": "float16", "float": "float32"}
CHANGING = ("dynamic", "longrope")  # kinds of rotary tables that depend on the longest text of a batch


@dataclass(slots=True)
class Loaded:
    """A model ready to run. ends: token ids that end a text."""

    model: Any
    tokenizer: Any
    device: torch.device
    cache_dtype: torch.dtype | None
    page: int
    ends: frozenset[int]
    vocab: int
    longest: int  # tokens that its positions reach
    team: Team | None = None  # the other ranks
    session: Session | None = None  # of INC

    @property
    def paged(self) -> bool:
        return hf.attention_of(self.model) == paged.NAME

    def runner(self, limits: "Limits") -> Runner:
        if self.team is None:
            return self.own_runner(limits)
        self.team.command("runner", limits=asdict(limits))
        return Lockstep(self.own_runner(limits), self.team)

    def own_runner(self, limits: "Limits") -> Runner:
        """Of this rank. What was loaded stays, so that Python need not look through it for garbage between steps."""
        gc.collect()
        gc.freeze()
        if not self.paged:
            self.watch()
            return Alone(self.model, proof.cache_of(self.model.config))
        made = Paged(self.model, limits.pages, self.page, self.cache_dtype, apart(self.model), limits.most_running,
                     limits.max_len, limits.budget)  # fmt: skip
        made.exact = self.watch()
        return made

    def single(self, pages: int) -> Runner:
        """For one text that is no request's. Its cache is of the model's type: a narrower one rounds what differs."""
        return Paged(self.model, pages, self.page, None) if self.paged else Alone(self.model, "")

    def watch(self) -> bool:
        """Begin to measure, where INC's config says so: what ran until now was no text."""
        if self.session is None or not self.session.measures:
            return False
        self.session.watch(self.model)
        return True

    def finish(self) -> None:
        """Every rank writes what it has measured."""
        if self.session is None or self.session.measure is None:
            return
        if self.team is not None:
            self.team.command("finish")
        self.session.finish()
        if self.team is not None:
            for rank in self.team.ranks:
                self.team.answer(rank)

    def record(self, runner: Any, eager: bool) -> None:
        """CUDA graphs of steps, where they can be had. What cannot be recorded is said, and runs without."""
        if eager:
            return
        if self.session is not None and self.session.measures:
            return  # a graph does not call who watches
        if isinstance(runner, Paged) and not runner.apart and self.device.type == "cpu":
            runner.tape()
        if not runner.ahead:
            return
        if any(hasattr(module, INSIDE) for module in self.model.modules()):
            LOG.warning("attention computes in plain torch, and steps without CUDA graphs: %s; blocking the types "
                        "Matmul, Softmax and ModuleFusedSDPA leaves it to kernels", PLAIN)  # fmt: skip
            return
        for prompts, what in ((True, "steps with prompts run"), (False, "decoding runs")):
            try:
                with progress("recording graphs") as tell:
                    runner.capture(tell, prompts)
            except (RuntimeError, UnsupportedError) as error:
                runner.forget()
                LOG.warning("%s without CUDA graphs: %s", what, first_line(error))
            else:
                LOG.info("recorded %d CUDA graphs in %.1f s", len(runner.graphs.sizes), runner.graphs.seconds)
                return

    def check(self) -> None:
        """Raise if a rank is gone."""
        if self.team is not None:
            self.team.check()

    def free(self) -> None:
        if self.team is not None:
            self.team.close()
        self.model = None
        gc.unfreeze()
        gc.collect()
        if self.device.type == "cuda":
            torch.cuda.empty_cache()


@contextmanager
def progress(title: str) -> Iterator[Callable[[int, int], None]]:
    """A bar on a terminal. -> to be called with how much is done, of how much"""
    with Progress(console=Console(stderr=True), disable=not sys.stderr.isatty(), transient=True) as bar:
        task = bar.add_task(title, total=None)
        yield lambda done, total: bar.update(task, completed=done, total=total)


def load(config: EngineConfig, group: Group | None = None) -> Loaded:
    """group: of a rank beside rank 0; rank 0 starts the others itself."""
    session = gaudi.session(config, group)
    cached(config, session)
    device, format = torch.device(device_named(config.device)), online(config) if session is None else None
    if group is not None:
        return loaded(config, device, format, group, session)
    if config.tensor_parallel_size == 1:
        found = loaded(config, device, format, None, session)
        fusion.settle(config, found)
        return found
    team = Team(config, device.type)
    try:
        found = loaded(config, device, format, team.group, session)
        found.team = team
        team.connect(digest(found.model))
        fusion.settle(config, found)
    except BaseException:
        team.close()
        raise
    return found


def loaded(
    config: EngineConfig, device: torch.device, format: str | None, group: Group | None, session: Session | None
) -> Loaded:
    if group is not None and device.type == "cuda":
        device = torch.device("cuda", group.rank)
    if device.index is not None and device.type == "cuda":
        torch.cuda.set_device(device)  # Triton launches on the current one
    dtype = dtype_of(config, device) if session is None else gaudi.dtype(config, session) or dtype_of(config, device)
    given = given_to(config, device, dtype, format, session)
    on_cpu = device.type == "cpu"  # else twins alone run on one
    with progress("loading") as tell, nullcontext() if on_cpu else left_to_torch():
        model: Any = build.load(
            config.model, device=device, dtype=dtype, kernels=kernels_of(config),
            trust_remote_code=config.trust_remote_code, attend=partial(fusion.attention, config), ranks=group,
            fuse=fusion.asked(config, session), cached=cached(config, session),
            tell=tell, **given,
        )  # fmt: skip
    if session is not None and given["activations"] != "off":
        session.loaded(model)
    if config.kv_attn_math:
        multiply_in_fp8(model)
    try:
        tokenizer = read_tokenizer(config.tokenizer or config.model, config.trust_remote_code)
    except CheckpointError:
        if config.tokenizer:
            raise
        tokenizer = None  # token ids in, token ids out
    text = model.config.get_text_config()
    held, longest = CACHES.get(config.kv_cache_dtype), getattr(text, "max_position_embeddings", None)
    return Loaded(model, tokenizer, device, held, config.block_size, ends(model, tokenizer), text.vocab_size,
                  int(longest or 1 << 20), session=session)  # fmt: skip


def cached(config: EngineConfig, session: Session | None) -> kv.Asked:
    """What was asked of the KV cache, if it makes sense. INC has scales of its own for it, FP8 arithmetic locks 1."""
    if session is not None and config.kv_cache_dtype == gaudi.CACHE:
        return kv.Asked(scales=config.kv_scales, scale=config.kv_scale, turn=config.kv_rotate)
    locked = config.kv_attn_math is not None and config.kv_scales is None and config.kv_scale is None
    return kv.Asked(config.kv_cache_dtype, config.kv_scales, 1.0 if locked else config.kv_scale, config.kv_rotate)


def given_to(
    config: EngineConfig, device: torch.device, dtype: str | None, format: str | None, session: Session | None
) -> dict[str, Any]:
    """What becomes of weights, inputs, keys and values as models.build.load brings them."""
    if session is not None and session.quantizes:
        return gaudi.given(config, session, device)
    emulated = read_emulation(config.emulation) if config.emulation else None
    how = activations.resolved(config, format, device, dtype)
    if emulated is None:
        return {"format": format, "activations": how}
    return {"format": emulated.arrivals, "kv": emulated.sides, "activations": how}


def kernels_of(config: EngineConfig) -> str:
    return EMULATED if config.emulation and config.kernels == "auto" else config.kernels


def multiply_in_fp8(model: Any) -> None:
    """Queries and probabilities of attention become e4m3 by a cast, as keys and values do in the cache: no scales."""
    if hf.attention_of(model) != paged.NAME:
        reason = "the cache of this architecture is transformers' own, and holds no FP8"
        raise UnsupportedError("kv_attn_math=fp8 cannot be", [reason])
    held = [module for module in model.modules() if is_attention(module)]
    for module in held:
        setattr(module, SIDES, replace(of(module), q=Side(CAST), p=1.0))
    told = ("attention of %d modules computes as in FP8: keys and values in the cache, queries and probabilities are "
            "rounded to e4m3 by a cast (scales locked at 1.0); emulated, for products of e4m3 are exact in what "
            "multiplies them here, and sums are in float32")  # fmt: skip
    LOG.warning(told, len(held))


def dtype_of(config: EngineConfig, device: torch.device) -> str | None:
    """What "auto" computes in: as declared where that is 16 bits (on a CPU bfloat16 alone), else bfloat16."""
    if config.dtype != "auto":
        return DTYPES.get(config.dtype, config.dtype)
    with codecs.open(config.model) as source:
        text = source.config.get("text_config")
        held = [source.config, text if isinstance(text, dict) else {}]
    declared = next((d[key] for d in held for key in ("dtype", "torch_dtype") if d.get(key)), "float32")
    if declared == "bfloat16" or (declared == "float16" and device.type != "cpu"):
        return None
    LOG.info("computing in bfloat16, not in %s: --dtype %s keeps to it", declared, declared)
    return "bfloat16"


def device_named(name: str) -> str:
    if name.startswith("cuda") and not torch.cuda.is_available():
        raise RequestError(f"device={name!r}: no CUDA device is here; cpu and auto run")
    return ("cuda" if torch.cuda.is_available() else "cpu") if name == "auto" else name


def online(config: EngineConfig) -> str | None:
    """What `quantization` means for this checkpoint: nothing more than a check where it is quantized already."""
    asked = config.quantization
    if asked is None:
        return None
    with codecs.open(config.model) as source:
        dialect, quantized = source.dialect, bool(source.modules)
    plain = asked.lower().replace("_", "-")
    if quantized:
        if NAMES.get(plain, plain) != dialect:
            raise RequestError(f"quantization={asked!r}: {config.model} is {dialect}; leave it out, or say that")
        return None
    row = next((name for name in (ONLINE.get(plain, plain), asked.lower()) if name in FORMATS), "")
    if not row:
        raise RequestError(f"quantization={asked!r}: {config.model} is not quantized, and there is no such format to "
                           f"quantize it to; known: {', '.join([*ONLINE, *FORMATS])}")  # fmt: skip
    return row


def ends(model: nn.Module, tokenizer: Any) -> frozenset[int]:
    found: set[int] = set()
    for holder in (getattr(model, "generation_config", None), getattr(model, "config", None), tokenizer):
        value = getattr(holder, "eos_token_id", None)
        found |= {value} if isinstance(value, int) else set(value or ())
    return frozenset(found)


def apart(model: Any) -> bool:
    rope = getattr(model.config.get_text_config(), "rope_parameters", None) or {}
    kinds = [rope, *(v for v in rope.values() if isinstance(v, dict))]
    return any(kind.get("rope_type") in CHANGING for kind in kinds)
