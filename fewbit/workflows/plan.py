"""plan: what a quantization will give and cost, before it is begun: sizes by arithmetic, time and memory by one layer.

The layer is really run: on one batch, its time per batch and its time to encode are told apart and extrapolated.
"""

import time
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from math import prod
from pathlib import Path
from typing import Any

import torch

from fewbit.codecs import gguf
from fewbit.kernels.select import select
from fewbit.models.hidden import Hidden
from fewbit.models.layers import WHOLE, State, Unit
from fewbit.quant.qtensor import Quantized, empty
from fewbit.quant.spec import Format
from fewbit.workflows import job as jobs
from fewbit.workflows.job import Job
from fewbit.workflows.layer_work import Done, advance, quantize_layer, watch
from fewbit.workflows.run_view import peak_memory

# who loads what each dialect writes, as their documentation says
ENGINES: dict[str, tuple[str, ...]] = {
    "compressed-tensors": ("fewbit", "vllm", "transformers"),
    "gptq": ("fewbit", "vllm", "transformers", "sglang"),
    "gptq-v2": ("fewbit", "vllm"),
    "awq": ("fewbit", "vllm", "transformers", "sglang"),
    "auto-round": ("fewbit", "vllm", "transformers"),
    "fp8": ("fewbit", "vllm", "transformers", "sglang"),
    "modelopt": ("fewbit", "vllm", "tensorrt-llm", "sglang"),
    "mxfp4": ("fewbit", "vllm", "transformers"),
    "bitsandbytes": ("fewbit", "vllm", "transformers"),
    "gguf": ("fewbit", "llama.cpp", "ollama"),
}
COPY = 4e8  # bytes a second at which a checkpoint is put together from the journal, digests included
FLOATS = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2}


@dataclass(frozen=True, slots=True)
class ModulePlan:
    """One module: what it becomes, and which rule says so."""

    name: str
    format: str
    algo: str
    rule: str
    bits: float


@dataclass(frozen=True, slots=True)
class Forecast:
    """What a run will give and cost. seconds and memory are None until a layer was run."""

    source: str
    dialect: str
    bytes_before: int
    bytes_after: int
    bits_per_weight: float  # of everything
    modules: tuple[ModulePlan, ...]
    dense: tuple[str, ...]  # matrices that stay as they are
    engines: tuple[str, ...]
    kernels: Mapping[str, str]  # format -> the kernel that will run it here
    tokens: int
    layers: int
    layer_by_layer: bool
    speed_gain: float | None  # of decoding one stream, by bytes alone, where a kernel reads packed weights
    seconds: float | None = None
    memory: int | None = None

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


def plan(job: Job, measure: bool = True) -> Forecast:
    """A prepared job's forecast; measure: run one layer for time and memory."""
    parts = sizes(job)
    before = sum(entry.nbytes for entry in job.source.dense.values()) + sum(
        e.nbytes for e in job.source.modules.values()
    )
    after = sum(parts.values())
    weights = sum(prod(entry.shape) for entry in job.floats.dense.values())
    bits = {name: parts[name] * 8 / prod(job.places[name].shape) for name in job.targets}
    modules = tuple(
        ModulePlan(name, t.row, "+".join(a.name for a in t.chain), t.rule, bits[name])
        for name, t in job.targets.items()
    )
    dense = tuple(p.name for p in job.places.values() if p.name not in job.targets)
    kernels = {t.row: kernel_of(job, t.format) for t in job.targets.values()}
    fast = kernels and not any(name in ("reference", "none") for name in kernels.values())
    seconds, memory = forecast(job, after) if measure else (None, None)
    return Forecast(
        str(job.source.path), job.to, before, after, after * 8 / weights, modules, dense,
        ENGINES.get(job.to, ("fewbit",)), kernels, jobs.gather(job).tokens if job.needs else 0, len(job.units),
        bool(job.layers.path), before / after if fast else None, seconds, memory,
    )  # fmt: skip


def forecast_of(src: str | Path, format: str | Path, *, measure: bool = True, **asked: Any) -> Forecast:
    """`plan` of the arguments that quantize takes."""
    job = jobs.prepared(src, format, **asked)
    try:
        with torch.no_grad():
            return plan(job, measure)
    finally:
        job.close()


def sizes(job: Job) -> Counter[str]:
    """Module or tensor -> bytes in the result, by its layout."""
    out: Counter[str] = Counter()
    for name, target in job.targets.items():
        out[name] = module_bytes(job, target.format, job.places[name].shape)
    for name, entry in job.floats.dense.items():
        if name.removesuffix(".weight") not in job.targets:
            out[name] = prod(entry.shape) * FLOATS.get(entry.dtype, 1)
    return out


def module_bytes(job: Job, form: Format, shape: tuple[int, ...]) -> int:
    """Of one module as the dialect writes it."""
    weight = empty(form.weight, shape, "meta")
    if job.codec is gguf:
        return weight.nbytes
    act = {}
    if form.act is not None:
        held = empty(form.act, (1, shape[-1]), "meta").planes
        act = {n: p for n, p in held.items() if n != "codes" and jobs.static(form.act) and not _dynamic(form, n)}
    return sum(t.nbytes for t in job.codec.write(Quantized(form, weight, act)).values())


def _dynamic(form: Format, plane: str) -> bool:
    assert form.act is not None
    chain = form.act.scales if plane.startswith("scale") else form.act.zeros
    return chain[int(plane[-1])].dynamic


def kernel_of(job: Job, form: Format) -> str:
    """The kernel that would run a format on the job's device."""
    try:
        return select("linear", form, job.device, job.layers.options.dtype)[0].name
    except Exception as error:  # a format without a kernel is a finding of the plan
        return f"none: {error}".splitlines()[0]


def forecast(job: Job, after: int) -> tuple[float, int]:
    """(seconds, peak resident bytes) of the whole run."""
    begun = time.monotonic()
    unit = min(job.units, key=lambda u: (not job.within(u), u.index))
    state = jobs.begin(job)
    started = time.monotonic() - begun
    if state is None or unit.name == WHOLE:
        return started + len(job.units) * _timed(lambda: quantize_layer(job, unit, state)) + after / COPY, peak_memory()
    batches = len(state)
    held: list[Done] = []
    once = _timed(lambda: held.append(quantize_layer(job, unit, only(state, 1), only(state, 1))))
    instead = {**held[0].values, **held[0].dense}
    watching = _slope(job, lambda part: watched(job, unit, part), state)
    passing = _slope(job, lambda part: advance(job, unit, part, instead, None), state)
    tuned = any(t.algo.tune for t in job.targets.values())
    streams = 2 if tuned else 1  # a tuned run carries the float model's stream too
    seconds = started + len(job.units) * (once + (batches - 1) * watching * streams + batches * passing)
    return seconds + after / COPY, peak_memory() + (2 * state.hidden.in_memory if tuned else 0)


def watched(job: Job, unit: Unit, state: State) -> None:
    """The part of a layer's work that goes with the text."""
    with job.layers.loaded(unit) as module:
        watch(job, unit, module, job.within(unit), state, Done())


def _slope(job: Job, work: Callable[[State], Any], state: State) -> float:
    """Seconds for each batch more."""
    if len(state) < 2:
        return 0.0
    more = min(3, len(state))
    few, many = (min(_timed(lambda n=n: work(only(state, n))) for _ in range(2)) for n in (1, more))
    return max(many - few, 0.0) / (more - 1)


def _timed(work: Callable[[], Any]) -> float:
    begun = time.monotonic()
    work()
    return time.monotonic() - begun


def only(state: State | None, count: int) -> Any:
    """The first batches of a state, to be thrown away."""
    if state is None:
        return None
    hidden = Hidden(count)
    if state.hidden.filled:
        for i in range(count):
            hidden[i] = state.hidden[i].clone()
    return State(state.ids[:count], hidden, state.calls)


def told(found: Forecast) -> list[tuple[str, str]]:
    """The forecast in lines."""
    from fewbit.workflows.inspect import size

    formats = Counter((m.format, m.algo) for m in found.modules)
    rows = [
        ("size", f"{size(found.bytes_before)} -> {size(found.bytes_after)}"),
        ("bits per weight", f"{found.bits_per_weight:.3f} over everything"),
        *(("quantized", f"{count} modules to {row} by {algo}") for (row, algo), count in formats.items()),
        ("left dense", f"{len(found.dense)} matrices" + (f": {', '.join(found.dense[:4])}" if found.dense else "")),
        ("engines", ", ".join(found.engines)),
        *(("kernel", f"{row}: {kernel}") for row, kernel in found.kernels.items()),
        ("calibration", f"{found.tokens} tokens" if found.tokens else "none needed"),
        ("layers", f"{found.layers}" if found.layer_by_layer else "not separable: the whole model is in memory"),
    ]
    if found.seconds is not None and found.memory is not None:
        rows += [("time", f"about {found.seconds:.0f} s"), ("peak memory", f"about {size(found.memory)}")]
    gain = f"{found.speed_gain:.1f} times, by bytes" if found.speed_gain else "not known: no packed kernel here"
    return [*rows, ("decoding speed", gain)]
