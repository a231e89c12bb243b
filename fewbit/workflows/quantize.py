"""quantize: any model to any format in any dialect, layer by layer from disk to disk, resumable to the byte.

A layer is read, watched on the calibration text where the algorithm asks for it, encoded, and put into the journal with
its digest; then the quantized layer computes the next one's inputs. The checkpoint is assembled from the journal.
"""

import os
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fewbit.errors import RequestError
from fewbit.files.writer import check_free
from fewbit.quant.qtensor import Quantized
from fewbit.workflows import job as jobs
from fewbit.workflows.assemble import GGUF, Contents, assemble
from fewbit.workflows.convert import quiet, tokenizer_files
from fewbit.workflows.job import Job
from fewbit.workflows.journal import FOLDER, Journal
from fewbit.workflows.layer_work import Done, advance, by_name, encode_groups, passed, quantize_layer, weights_of
from fewbit.workflows.plan import Forecast, peak, plan
from fewbit.workflows.quantize_report import LOG, described, distributions, leave
from fewbit.workflows.recipe import Recipe
from fewbit.workflows.report import NAME
from fewbit.workflows.run_log import RunLog
from fewbit.workflows.stored import KV, Stored, flat

OUTSIDE = "outside the layers"


@dataclass(frozen=True, slots=True)
class Quantization:
    """What quantize did. modules: one line each, as in the log."""

    source: Path
    out: Path
    dialect: str
    modules: tuple[Mapping[str, Any], ...]
    resumed: int  # layers found finished
    tokens: int
    seconds: float
    memory: int  # the most that was resident, in bytes
    forecast: Forecast | None = None

    @property
    def error(self) -> float:
        """The worst module's."""
        return max((float(m.get("error", 0.0)) for m in self.modules), default=0.0)

    @property
    def report(self) -> Path:
        """The page."""
        single = self.out.suffix == ".gguf"
        return self.out.with_name(f"{self.out.stem}.{NAME}") if single else self.out / NAME

    def worst(self, count: int) -> list[Mapping[str, Any]]:
        """The modules that lost most."""
        return sorted(self.modules, key=lambda m: -float(m.get("error", 0.0)))[:count]

    def to_json(self) -> dict[str, Any]:
        return asdict(self) | {"error": self.error, "report": str(self.report)}


def quantize(
    src: str | Path,
    out: str | Path,
    format: str | Path | Recipe,
    *,
    algo: str | None = None,
    options: Mapping[str, Any] | None = None,
    to: str = "compressed-tensors",
    group_size: int | None = None,
    kv: str | None = None,
    ignore: Sequence[str] = (),
    calib: Any = None,
    samples: int = 128,
    length: int = 512,
    seed: int = 0,
    chat: bool = False,
    order: str = "shuffled",
    observer: str = "max",
    experts: str = "weights-only",
    device: str | torch.device = "cpu",
    dtype: str | torch.dtype | None = None,
    max_memory: int | None = None,
    max_shard: int = 5_000_000_000,
    overwrite: bool = False,
    restart: bool = False,
    show: bool = False,
    report: bool = True,
    command: str = "",
) -> Quantization:
    """Quantize a checkpoint.

    format: a row of `fewbit.formats()`, a scheme (W4A16, FP8_DYNAMIC, NVFP4, Q4_K_M ...) or a recipe file (.yaml).
    algo: rtn, gptq, awq, smooth, autoround, hqq, imatrix, or a chain such as smooth+gptq; None = gptq below 5 bits.
    calib: None for the text that ships, a file, a data set's name, or token ids. max_memory: bytes of activations kept
    in memory. The same command goes on where an interrupted one stopped; restart=True begins anew. show: progress on
    stderr. report: forecast first, and leave a page, a model card and the recipe beside the model.
    """
    job = jobs.prepared(src, format, algo=algo, options=options, to=to, group_size=group_size, kv=kv, ignore=ignore,
                        calib=calib, samples=samples, length=length, seed=seed, chat=chat, order=order,
                        observer=observer, experts=experts, device=device, dtype=dtype,
                        max_memory=max_memory)  # fmt: skip
    try:
        return run(job, Path(out), max_shard, overwrite, restart, show, report, command)
    finally:
        job.close()


def run(
    job: Job,
    out: Path,
    max_shard: int,
    overwrite: bool,
    restart: bool,
    show: bool,
    report: bool = True,
    command: str = "",
) -> Quantization:
    """Do a prepared job."""
    begun = time.monotonic()
    folder = out.parent / f"{FOLDER}.{out.name}" if out.suffix == ".gguf" else out / FOLDER
    # what an unfinished run half published is its own to replace; beginning anew is another run
    overwrite = overwrite or (folder.is_dir() and not restart)
    _check(job, out, max_shard, overwrite)
    with (
        Journal(folder, jobs.depends(job) | {"out": out.name}, restart) as journal,
        open(os.devnull, "w") as nowhere,
        RunLog(journal.folder / LOG, len(job.units), stream=None if show else nowhere) as log,
        torch.no_grad(),
    ):
        journal.check()
        resumed = len(journal.done)
        log.start(model=str(job.source.path), command=command, recipe=job.recipe.to_yaml())
        expected = plan(job) if report and not resumed else None
        work(job, journal, log)
        journal.flush()
        contents = contents_of(job, journal)
        assemble(out, job.codec, contents, max_shard, overwrite, quiet)
        units = {unit: line["notes"] for unit, line in journal.done.items()}
        modules = tuple(note for notes in units.values() for note in notes["modules"])
        log.done(modules=len(modules), out=str(out))
        if report:
            page = described(job, out, log.path, command, units, expected, time.monotonic() - begun)
            page["distributions"] = distributions(job, contents.module, modules)
            leave(job, out, page, log.path)
        journal.remove()
    tokens = job.samples.tokens if job.samples else 0
    return Quantization(job.source.path, out, job.to, modules, resumed, tokens, time.monotonic() - begun, peak(),
                        expected)  # fmt: skip


def _check(job: Job, out: Path, max_shard: int, overwrite: bool) -> None:
    """Refuse early what would be refused late."""
    if max_shard < 1:
        raise RequestError(f"max_shard={max_shard}: the largest shard is a number of bytes above 0")
    target = out / "model.gguf" if job.to == GGUF and out.suffix != ".gguf" else out
    check_free(target, overwrite)
    source = job.source.path.resolve()
    if source in (out.resolve(), target.resolve()):
        raise RequestError(f"{out}: is the model that is read; give another folder")


def work(job: Job, journal: Journal, log: RunLog) -> None:
    """Every unit that the journal does not have yet; finished ones only compute the inputs of the next."""
    last = max((u.index for u in job.units if u.name not in journal.done), default=-1)
    state = jobs.begin(job, journal.folder) if last >= 0 else None
    tuned = state is not None and any(t.algo.tune for t in job.targets.values())
    floats = jobs.begin(job, journal.folder) if tuned else None
    for unit in job.units[: last + 1]:
        if unit.name not in journal.done:
            done = quantize_layer(job, unit, state, floats)
            instead: Mapping[str, Quantized | Tensor] = {**done.values, **done.dense}
            if state is not None and unit.index < last:
                done.error = advance(job, unit, state, instead, done.first)
            _save(journal, unit.name, done)
            _tell(log, unit.name, done)
        elif state is not None and unit.index < last:
            with journal.open(unit.name) as file:
                advance(job, unit, state, finished(job, Stored(file)), None)
            if floats is not None:
                with job.layers.loaded(unit) as module:
                    passed(job, unit, module, floats)
    _outside(job, journal, log)


def _outside(job: Job, journal: Journal, log: RunLog) -> None:
    """The embedding and the head, where the recipe speaks of them."""
    targets = job.outside()
    if targets and OUTSIDE not in journal.done:
        done = Done()
        for group in by_name(targets):
            part = {name: targets[name] for name in group.names}
            encode_groups(job, part, [group], weights_of(job, part), done)
        _save(journal, OUTSIDE, done)
        _tell(log, OUTSIDE, done)


def _save(journal: Journal, unit: str, done: Done) -> None:
    tensors: dict[str, Tensor] = {}
    for name, value in {**done.values, **done.dense}.items():
        tensors |= flat(name, value)
    for module, scales in done.kv.items():
        tensors |= {f"{KV}|{module}|{of}": t for of, t in scales.items()}
    coverage = {"experts": done.coverage.experts, "starved": done.coverage.starved,
                "inactive": done.coverage.inactive, "channels": done.coverage.channels}  # fmt: skip
    notes = {"modules": done.notes, "error": done.error, "seconds": done.seconds, "coverage": coverage}
    journal.save(unit, tensors, notes)


def _tell(log: RunLog, unit: str, done: Done) -> None:
    for note in done.notes:
        log.module(**note)
    for warning in done.warnings:
        log.warning(warning)
    log.layer(unit, seconds=done.seconds, error=done.error)


def finished(job: Job, stored: Stored) -> dict[str, Quantized | Tensor]:
    """A unit's result back from the journal."""
    out: dict[str, Quantized | Tensor] = {n: stored.read(n, job.targets[n].format) for n in stored.modules}
    return out | {name: stored.file.read(name) for name in stored.dense}


def contents_of(job: Job, journal: Journal) -> Contents:
    """The finished checkpoint, its parts still in the journal and in the source."""
    stored = {unit: Stored(journal.open(unit)) for unit in journal.done}
    modules = {name: held for held in stored.values() for name in held.modules}
    changed = {name: held for held in stored.values() for name in held.dense}
    kv = {module: {of: held.file.read(key) for of, key in scales.items()}
          for held in stored.values() for module, scales in held.kv.items()}  # fmt: skip
    dense = {name: (entry.dtype, tuple(entry.shape)) for name, entry in job.floats.dense.items()
             if name.removesuffix(".weight") not in modules}  # fmt: skip
    left = [p.name for p in job.places.values() if p.name not in modules and p.kind != "embedding"]

    def tensor(name: str) -> Tensor:
        value = changed[name].file.read(name) if name in changed else job.floats.read(name)
        return value.to(_DTYPES.get(dense[name][0], value.dtype))

    def module(name: str, meta: bool) -> Quantized:
        return modules[name].read(name, job.targets[name].format, meta)

    ordered = [name for name in job.targets if name in modules]
    return Contents(_config(job), ordered, module, dense, tensor, tokenizer_files(job.source), left, kv, job.kv)


_DTYPES = {"BF16": torch.bfloat16, "F16": torch.float16, "F32": torch.float32, "F64": torch.float64}


def _config(job: Job) -> dict[str, Any]:
    """config.json of the source without what it said of its quantization."""
    gone = ("quantization_config", "compression_config")
    config = {k: v for k, v in dict(job.floats.config).items() if k not in gone}
    if isinstance(config.get("text_config"), dict):
        config["text_config"] = {k: v for k, v in config["text_config"].items() if k not in gone}
    return config
