"""The twin: the same architecture with every width made small, to prove at load that our path computes what eager
transformers computes.

Both are filled with the same random weights, ours through the names that a checkpoint would have, and run on a ragged
batch and a cached step. `load` refuses an architecture that differs, with the figure.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from fewbit.errors import UnsupportedError
from fewbit.models import hf
from fewbit.models.account import finish
from fewbit.models.fill import Filler, prepare
from fewbit.models.shrink import shrink
from fewbit.modules.linear import Options

LIMIT = 1e-4
LENGTH = 20  # tokens of the longer sequence: past the small window


@dataclass(frozen=True, slots=True)
class Verdict:
    """error: relative, of logits; attention: the implementation it was reached with ("" when none could be built)."""

    error: float
    attention: str
    why: str = ""

    @property
    def exact(self) -> bool:
        return self.error <= LIMIT


@dataclass(frozen=True, slots=True)
class Shape:
    shape: tuple[int, ...]


@dataclass(slots=True)
class Memory:
    """Tensors in memory, seen as a checkpoint."""

    tensors: dict[str, Tensor]
    modules: dict[str, Any] = field(default_factory=dict)

    @property
    def dense(self) -> Mapping[str, Shape]:
        return {name: Shape(tuple(t.shape)) for name, t in self.tensors.items()}

    def read(self, name: str) -> Tensor:
        return self.tensors[name].clone()


def check(config: Any) -> Verdict:
    """Our path against eager transformers on the twin; our attention first, transformers' own where that differs."""
    try:
        small = shrink(config)
        truth = random(small)
        wanted = logits(truth, small)
    except Exception as error:  # whatever a model definition raises on this config is the finding
        return Verdict(math.inf, "", f"no twin: {told(error)}")
    state = hf.disk_state(truth)
    verdict = Verdict(math.inf, "")
    for attention in (hf.OURS, "eager"):
        found = attempt(small, attention, state, wanted)
        if found.exact or verdict.error == math.inf:
            verdict = found
        if found.exact:
            break
    return verdict


def random(small: Any) -> Any:
    """transformers' own model of a config, its weights always the same."""
    torch_state = torch.get_rng_state()
    try:
        torch.manual_seed(0)
        truth = hf.random_model(small)
        randomize(truth)
    finally:
        torch.set_rng_state(torch_state)
    return truth


def filled(small: Any, attention: str) -> tuple[dict[str, Tensor], Any]:
    """The twin of a shrunk config on our path: its weights by disk name, and the model that holds them."""
    state = hf.disk_state(random(small))
    model = hf.build(small, torch.float32, attention)
    fill(model, Memory(state))
    return state, model


def attempt(small: Any, attention: str, state: dict[str, Tensor], wanted: list[Tensor]) -> Verdict:
    try:
        model = hf.build(small, torch.float32, attention)
        fill(model, Memory(state))
        got = logits(model, small)
    except Exception as error:
        return Verdict(math.inf, attention, told(error))
    return Verdict(max(relative(a, b) for a, b in zip(got, wanted, strict=True)), attention)


def fill(model: nn.Module, source: Memory) -> None:
    prepare(model)
    filler = Filler(model, hf.rules(model), Options(), torch.device("cpu"))
    finish(filler, filler.fill(source), source)


def told(error: Exception) -> str:
    reasons = error.reasons if isinstance(error, UnsupportedError) else ()
    return "; ".join([f"{type(error).__name__}: {first_line(error)}", *reasons])


def first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [""])[0][:160]


def randomize(model: nn.Module) -> None:
    """Weights that make every parameter matter: none zero, none one, outputs of order one."""
    with torch.no_grad():
        for tensor in {id(t): t for t in model.state_dict(keep_vars=True).values()}.values():
            if not tensor.is_floating_point():
                continue
            if tensor.dim() > 1:
                tensor.normal_(0, 1 / math.sqrt(tensor.shape[-1]))
            else:
                tensor.add_(torch.randn_like(tensor), alpha=0.1)


def logits(model: nn.Module, config: Any, cached: bool = True) -> list[Tensor]:
    """A ragged batch, then one cached step. -> logits at the places that hold tokens. cached: else without a cache."""
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(10, 100, (2, LENGTH + 1), generator=generator)
    mask = torch.ones(2, LENGTH, dtype=torch.long)
    mask[1, LENGTH - 5 :] = 0
    with torch.no_grad():
        first = model(input_ids=ids[:, :LENGTH], attention_mask=mask, use_cache=cached)
        found = [first.logits[mask.bool()]]
        cache = getattr(first, "past_key_values", None) if cached else None
        if cache is not None:
            longer = torch.cat([mask, mask.new_ones(2, 1)], 1)
            step = model(input_ids=ids[:, LENGTH:], attention_mask=longer, past_key_values=cache, use_cache=True)
            found.append(step.logits)
    return found


def relative(got: Tensor, wanted: Tensor) -> float:
    if got.shape != wanted.shape or not bool(wanted.isfinite().all()) or not bool(got.isfinite().all()):
        return math.inf
    return float((got - wanted).abs().max() / wanted.abs().max())


_VERDICTS: dict[str, Verdict] = {}  # by class and shrunk config


def require(config: Any) -> str:
    """The attention implementation under which this architecture is exact, or UnsupportedError with the figure."""
    key = type(config).__name__ + shrink(config).to_json_string(use_diff=False)
    if key not in _VERDICTS:
        _VERDICTS[key] = check(config)
    verdict = _VERDICTS[key]
    if verdict.exact:
        return verdict.attention
    asked = f"model_type {config.model_type!r} does not compute here what eager transformers {hf.VERSION} computes"
    detail = verdict.why or f"relative error of a tiny twin's logits {verdict.error:.2g}, allowed {LIMIT:.0e}"
    raise UnsupportedError(asked, [detail])


def forget() -> None:
    """Check again what was checked in this process."""
    _VERDICTS.clear()
