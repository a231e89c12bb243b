"""Run: what one quantization was, as plain JSON: what the page and the model card show, what the log is folded into.

Only `title`, `model`, `modules` are needed; a part that is not there is left out of the page. Sizes and memory are
bytes, times seconds, errors and changes shares (0.018 is 1.8 %), intervals are of 95 %.
"""

import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import asdict, is_dataclass
from typing import Any, NotRequired, TypedDict, cast


class Model(TypedDict):
    """The source."""

    name: str  # as the user named it: a folder, a file or a name on the hub
    base: NotRequired[str]  # its name on the hub, where known
    architecture: NotRequired[str]
    model_type: NotRequired[str]
    parameters: NotRequired[int]
    layers: NotRequired[int]
    dtype: NotRequired[str]
    licence: NotRequired[dict[str, str]]  # license, license_name, license_link of the source's own card
    facts: NotRequired[dict[str, Any]]  # anything else worth a line


class Part(TypedDict):
    """The bytes of everything in one format."""

    format: str
    bytes: int


class Sizes(TypedDict):
    before: int
    after: int
    bits_per_weight: float  # of everything
    quantized_bits_per_weight: NotRequired[float]  # of the quantized modules
    parts_before: NotRequired[list[Part]]
    parts_after: NotRequired[list[Part]]


class Module(TypedDict):
    """One quantized module; also the fields of the log's event "module"."""

    name: str
    layer: int | None  # None: outside the decoder layers
    kind: str  # the name inside its layer without expert numbers: "self_attn.q_proj", "mlp.experts.down_proj"
    format: str
    algo: str
    shape: NotRequired[list[int]]  # [N, K]
    bytes: NotRequired[int]
    bits: NotRequired[float]
    error: NotRequired[float]  # what `error_means` says
    loss: NotRequired[float]  # the algorithm's own objective
    rtn_loss: NotRequired[float]  # the same objective of rtn
    damp: NotRequired[float]
    seconds: NotRequired[float]
    rule: NotRequired[str]
    note: NotRequired[str]  # what is unusual: damping raised, an expert without tokens


class Layer(TypedDict):
    """One decoder layer; also the fields of the log's event "layer"."""

    name: str
    layer: NotRequired[int]  # its column; the place in the list where missing
    seconds: NotRequired[float]
    memory: NotRequired[int]  # peak resident
    error: NotRequired[float]  # of the layer's output


class Experts(TypedDict):
    """The tokens that each expert of one layer saw."""

    layer: int
    tokens: list[int]


class Dead(TypedDict):
    """Input channels that were never active."""

    name: str
    dead: int
    channels: int


class Coverage(TypedDict):
    source: str
    licence: NotRequired[str]
    digest: NotRequired[str]
    documents: NotRequired[int]
    samples: NotRequired[int]
    tokens: int
    lengths: NotRequired[list[int]]  # of every sample
    experts: NotRequired[list[Experts]]
    least_tokens: NotRequired[int]  # an expert below saw too few
    policy: NotRequired[str]  # for those experts
    dead: NotRequired[list[Dead]]


class Evaluation(TypedDict):
    """One figure with its interval."""

    metric: str
    text: str  # what it was measured on
    value: float
    low: NotRequired[float]
    high: NotRequired[float]
    base: NotRequired[float]  # the same figure of the source
    change: NotRequired[float]  # relative to base
    change_low: NotRequired[float]
    change_high: NotRequired[float]
    share: NotRequired[bool]  # show as percent
    tokens: NotRequired[int]
    documents: NotRequired[int]


class Timing(TypedDict):
    total: NotRequired[float]
    stages: NotRequired[dict[str, float]]
    memory: NotRequired[int]  # peak resident of the whole run
    device: NotRequired[str]


class Prediction(TypedDict):
    """One figure of `fewbit plan` beside what came out."""

    what: str
    predicted: float
    actual: float
    unit: NotRequired[str]  # bytes, seconds, or what follows the number
    tolerance: NotRequired[float]


class Distribution(TypedDict):
    """Weights of one module before and after, counted in equal bins from low to high."""

    module: str
    low: float
    high: float
    before: list[int]
    after: list[int]


class Serve(TypedDict):
    engine: str
    command: str


class Run(TypedDict):
    title: str
    model: Model
    modules: list[Module]
    version: NotRequired[str]  # of fewbit
    created: NotRequired[str]
    command: NotRequired[str]
    recipe: NotRequired[str]
    format: NotRequired[str]
    algo: NotRequired[str]
    dialect: NotRequired[str]
    trusted: NotRequired[bool]  # code of the model's folder came with it
    out: NotRequired[str]
    sizes: NotRequired[Sizes]
    error_means: NotRequired[str]  # in words, such as "relative output error"
    layers: NotRequired[list[Layer]]
    coverage: NotRequired[Coverage]
    evaluation: NotRequired[list[Evaluation]]
    timing: NotRequired[Timing]
    predictions: NotRequired[list[Prediction]]
    distributions: NotRequired[list[Distribution]]
    digests: NotRequired[dict[str, str]]  # file -> sha256
    environment: NotRequired[dict[str, Any]]
    serve: NotRequired[list[Serve]]  # instead of what the dialect suggests
    warnings: NotRequired[list[str]]


class Gathered(TypedDict):
    modules: list[Module]
    layers: list[Layer]
    warnings: list[str]


def gathered(events: Iterable[Mapping[str, Any]]) -> Gathered:
    """The parts of a Run that a log holds, over every resumption; what came last about a name counts."""
    found: dict[str, dict[str, Any]] = {"module": {}, "layer": {}, "warning": {}}
    for event in events:
        kind = event.get("event")
        if kind in found:
            key = event["message" if kind == "warning" else "name"]
            found[kind][key] = {k: v for k, v in event.items() if k not in ("event", "time")}
    return Gathered(
        modules=list(found["module"].values()), layers=list(found["layer"].values()), warnings=list(found["warning"])
    )


def evaluation_rows(result: Any) -> list[Evaluation]:
    """The rows of a fewbit.eval: perplexity with its paired change, KL divergence, agreement; those it has."""
    found = asdict(result) if is_dataclass(result) and not isinstance(result, type) else dict(result)
    base, moved = found.get("base_perplexity"), found.get("difference")
    rows = [_row(found, "perplexity", found.get("perplexity"))]
    if base and moved:
        rows[0] |= {"base": base["value"], "change": math.expm1(moved["value"])}
        rows[0] |= {f"change_{end}": math.expm1(moved[end]) for end in ("low", "high") if moved[end] is not None}
    rows += [_row(found, "KL divergence", found.get("kl"))]
    rows += [_row(found, "top-1 agreement", found.get("agreement")) | {"share": True}]
    return [cast(Evaluation, row) for row in rows if "value" in row]


def _row(found: Mapping[str, Any], metric: str, estimate: Mapping[str, Any] | None) -> dict[str, Any]:
    about = {key: found[key] for key in ("text", "tokens", "documents") if key in found}
    return {"metric": metric, **about, **{key: v for key, v in (estimate or {}).items() if v is not None}}


def prepared(run: Run | Mapping[str, Any]) -> Run:
    """The same as strict JSON, without the rows whose figures are not numbers."""
    held = plain(run)
    for part, needed in (("evaluation", ("value",)), ("predictions", ("predicted", "actual"))):
        held[part] = [row for row in held.get(part) or [] if all(finite(row.get(key)) is not None for key in needed)]
    return cast(Run, held)


def kind_of(name: str) -> tuple[int | None, str]:
    """(layer, kind) of a module by its name: the first number is the layer, a later one an expert."""
    found = re.search(r"(?:^|\.)(\d{1,6})\.", name)
    if found is None:
        return None, name
    outer, inner = name[: found.start()], re.sub(r"\.\d+(?=\.|$)", "", name[found.end() :])
    tower = re.search(r"(^|\.)(visual|vision\w*|audio\w*|encoder)(\.|$)", outer)  # numbered like the decoder
    return int(found[1]), f"{outer}.{inner}" if tower else inner


def plain(value: Any) -> Any:
    """The same as strict JSON holds it: no NaN or infinity, no paths, no numbers of numpy or torch."""
    if isinstance(value, Mapping):
        return {str(key): plain(held) for key, held in value.items()}
    if isinstance(value, (list, tuple, set, frozenset)):
        return [plain(held) for held in value]
    if value is None or isinstance(value, (str, bool, int)):
        return value
    if hasattr(value, "item") and not isinstance(value, float):
        return plain(value.item())
    if isinstance(value, float):
        return float(value) if math.isfinite(value) else None
    return str(value)


def finite(value: Any) -> float | None:
    """The number, or None for what is missing or no number."""
    return float(value) if isinstance(value, (int, float)) and math.isfinite(value) else None
