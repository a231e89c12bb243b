"""Job: what a quantization needs, resolved and checked before any work: source, layers, what each module becomes."""

import hashlib
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import fewbit
from fewbit import codecs
from fewbit.codecs import gguf
from fewbit.codecs.source import Source
from fewbit.errors import RequestError, UnsupportedError
from fewbit.models import hf
from fewbit.models.build import ROUTERS
from fewbit.models.fill import owner
from fewbit.models.finding import refuse_on_errors
from fewbit.models.layers import Layers, State, Unit, layer_of
from fewbit.models.text import tokenizer_of
from fewbit.models.verify import model_config, verify_source
from fewbit.modules.linear import Linear
from fewbit.quant.kv import FP8, measured
from fewbit.quant.spec import QuantSpec
from fewbit.workflows import recipe as recipes
from fewbit.workflows.assemble import dialect
from fewbit.workflows.calibration import Samples, calibration
from fewbit.workflows.floats import Floats
from fewbit.workflows.recipe import Recipe, Target
from fewbit.workflows.schemes import Place
from fewbit.workflows.small_files import carried

KV: dict[str, QuantSpec | None] = {
    "none": None,
    "fp8": FP8,
    "fp8-head": measured(FP8, per_head=True),
}
ROTATE = "rotate"


@dataclass(frozen=True, slots=True)
class Calibration:
    """What to run through the model, and how."""

    data: Any = None  # None = the text that ships; a path, a data set's name, or token ids
    samples: int = 128
    length: int = 512
    seed: int = 0
    chat: bool = False
    order: str = "shuffled"
    batch_tokens: int = 4096  # run together
    observer: str = "max"
    experts: str = "weights-only"  # what happens to those that saw too few tokens
    least_tokens: int = 32


@dataclass(slots=True)
class Job:
    """One quantization, not begun. Close it when done."""

    source: Source
    floats: Any
    layers: Layers
    recipe: Recipe
    codec: Any
    to: str
    targets: dict[str, Target]
    places: dict[str, Place]
    calibrate: Calibration
    device: torch.device
    max_memory: int | None = None
    samples: Samples | None = None

    @property
    def kv(self) -> QuantSpec | None:
        return KV[self.recipe.kv]

    @property
    def units(self) -> list[Unit]:
        return self.layers.units

    @property
    def needs(self) -> frozenset[Any]:
        """What calibration must gather; empty = no text is needed."""
        found: set[Any] = set()
        for target in self.targets.values():
            for algo in target.chain:
                found |= algo.needs | ({"moments"} if algo.tune else set())
            if static(target.format.act):
                found.add("moments")
        return frozenset(found | ({"moments"} if self.kv else set()))

    def within(self, unit: Unit) -> dict[str, Target]:
        """The unit's modules to quantize, by module name."""
        names = (name.removesuffix(".weight") for name in unit.names)
        return {name: self.targets[name] for name in names if name in self.targets}

    def outside(self) -> dict[str, Target]:
        """Targets in no layer: the embedding and the head, where asked for."""
        inside = {name.removesuffix(".weight") for unit in self.units for name in unit.names}
        return {name: t for name, t in self.targets.items() if name not in inside}

    def close(self) -> None:
        self.source.close()


def static(act: QuantSpec | None) -> bool:
    """True when the scales of an input are not all chosen at each call."""
    return act is not None and not all(scale.dynamic for scale in (*act.scales, *act.zeros))


def prepared(src: str | Path, format: str | Path | Recipe, **asked: Any) -> Job:
    """`prepare` with what is about calibration among the other arguments."""
    names = {"calib": "data", "samples": "samples", "length": "length", "seed": "seed", "chat": "chat",
             "order": "order", "observer": "observer", "experts": "experts"}  # fmt: skip
    calibrate = Calibration(**{field: asked.pop(name) for name, field in names.items() if name in asked})
    return prepare(src, format, calibrate=calibrate, **asked)


def prepare(
    src: str | Path,
    format: str | Path | Recipe,
    *,
    algo: str | None = None,
    options: Mapping[str, Any] | None = None,
    to: str = "compressed-tensors",
    group_size: int | None = None,
    kv: str | None = None,
    ignore: Sequence[str] = (),
    calibrate: Calibration | None = None,
    device: str | torch.device = "cpu",
    dtype: str | torch.dtype | None = None,
    max_memory: int | None = None,
    trust_remote_code: bool = False,
) -> Job:
    """Resolve what was asked against the model; nothing is computed and nothing written."""
    recipe = format if isinstance(format, Recipe) else recipes.load(format)
    rules = (*(recipes.Rule(name, recipes.DENSE) for name in ignore), *recipe.rules)
    recipe = recipes.with_options(
        recipe, algo=algo, options=dict(options) if options else None, kv=kv, group_size=group_size, rules=rules
    )
    if recipe.kv not in KV:
        raise RequestError(f"kv {recipe.kv!r} is not known; known: {', '.join(KV)}")
    codec = dialect(to)
    source = codecs.open(src, trust_remote_code)
    try:
        refuse_on_errors(source.path, verify_source(source))
        floats, recipe_in = _rotated(source, recipe, dtype)
        layers = Layers(floats, dtype=dtype, device=device)
        places = places_of(layers)
        found = recipes.targets(recipe_in, places.values(), codec)
        if not found:
            raise RequestError(f"{src}: the recipe quantizes nothing of this model")
        job = Job(source, floats, layers, recipe, codec, to, found, places, calibrate or Calibration(),
                  torch.device(device), max_memory)  # fmt: skip
        if codec is gguf:
            gguf.refuse(source.config, [*source.modules, *source.dense], carried(source))
        if job.kv and not getattr(codec, "kv_endings", None):
            raise UnsupportedError(f"{to} has no place for KV scales", ["leave out --kv, or choose another --to"])
    except BaseException:
        source.close()
        raise
    return job


def _rotated(source: Source, recipe: Recipe, dtype: Any) -> tuple[Any, Recipe]:
    """The model as floats, turned where the recipe begins with `rotate+`."""
    text = str(source.config.get("dtype") or source.config.get("torch_dtype") or "bfloat16").removeprefix("torch.")
    floats: Any = Floats(source, {"float32": "F32", "float16": "F16"}.get(text, "BF16"))
    first, _, rest = recipe.algo.partition("+")
    if first != ROTATE:
        return floats, recipe
    from fewbit.models.observe import observe
    from fewbit.models.rewrite import Rotated

    return Rotated(floats, observe(model_config(source))), recipes.with_options(recipe, algo=rest or recipes.AUTO)


def places_of(layers: Layers) -> dict[str, Place]:
    """Every matrix of the checkpoint that could be quantized, by module name."""
    model = layers.model
    head, embedding = hf.output_head(model), hf.input_embedding(model)
    count = len(layers.units) if layers.path else 0
    tied = bool(hf.ties(model))
    out = {}
    for name, place in layers.places.items():
        shape = tuple(layers.source.dense[name].shape)
        if len(shape) != 2 or not name.endswith(".weight") or place.group is not None:
            continue
        module, _ = owner(model, place.target)
        kind = _kind(module, name, place.expert, head, embedding)
        if kind:
            at = layer_of(place.target, layers.path) if layers.path else None
            short = name.removesuffix(".weight")
            out[short] = Place(short, kind, shape, -1 if at is None else at, count, tied)
    return out


def _kind(module: Any, name: str, expert: int | None, head: Any, embedding: Any) -> str:
    if expert is not None:
        return "expert"
    if module is embedding:
        return "embedding"
    if module is head:
        return "head"
    if not isinstance(module, Linear | nn.Linear):
        return ""
    return "router" if name.removesuffix(".weight").rpartition(".")[2] in ROUTERS else "linear"


def gather(job: Job) -> Samples:
    """The calibration samples, tokenized."""
    if job.samples is None:
        job.samples = samples_of(job.calibrate, job.source, job.layers.config)
    return job.samples


def samples_of(c: Calibration, source: Source, config: Any) -> Samples:
    """The same for a checkpoint, checked against the tokens that its model has."""
    words = tokenizer_of(source) if not _ids(c.data) else None
    found = calibration(words, c.data, samples=c.samples, length=c.length, seed=c.seed, chat=c.chat, order=c.order)
    top, size = max(int(row.max()) for row in found.ids), int(config.get_text_config().vocab_size)
    if top >= size:
        raise RequestError(f"token id {top} of the calibration data: the model has {size} tokens")
    return found


def begin(job: Job, folder: Path | None = None) -> State | None:
    """The calibration batches at the first layer's input; None where no text is needed."""
    return start(job, folder) if job.needs else None


def start(job: Job, folder: Path | None = None) -> State:
    """The same whether or not the algorithms ask for a text."""
    rows = max(1, job.calibrate.batch_tokens // job.calibrate.length)
    state = job.layers.start(gather(job).batches(rows), job.max_memory, folder)
    job.layers.release()
    return state


def _ids(data: Any) -> bool:
    return isinstance(data, list | tuple | Tensor)


def depends(job: Job) -> dict[str, Any]:
    """What the bytes of the result depend on: the first line of the journal."""
    samples = gather(job) if job.needs else None
    return {
        "model": {p.name: _identity(p) for p in model_files(job.source)},
        "recipe": job.recipe.to_yaml(),
        "dialect": job.to,
        "calibration": samples.digest if samples else None,
        "calibration options": [job.calibrate.observer, job.calibrate.experts, job.calibrate.least_tokens,
                                job.calibrate.batch_tokens] if samples else None,
        "fewbit": fewbit.__version__,
        "torch": torch.__version__,
        "transformers": hf.VERSION,
        "device": str(job.device.type),
        "threads": torch.get_num_threads() if job.needs and job.device.type == "cpu" else None,
        "dtype": str(job.layers.options.dtype),
    }  # fmt: skip


def model_files(source: Source) -> list[Path]:
    path = source.path
    if path.is_file():
        return [path]
    endings = (".safetensors", ".json", ".gguf", *((".py",) if source.trusted else ()))
    return sorted(p for p in path.iterdir() if p.suffix in endings and p.is_file())


def _identity(path: Path) -> str:
    """Size, time of the last change, and a digest of its beginning."""
    found = os.stat(path)
    with path.open("rb") as file:
        head = hashlib.sha256(file.read(1 << 20)).hexdigest()[:16]
    return f"{found.st_size} bytes, changed {found.st_mtime_ns}, begins {head}"
