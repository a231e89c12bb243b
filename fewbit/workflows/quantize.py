"""quantize: any model to any format in any dialect, layer by layer from disk to disk, resumable to the byte.

A layer is read, watched on the calibration text where the algorithm asks for it, encoded, and put into the journal with
its digest; then the quantized layer computes the next one's inputs. The journal's files become the checkpoint.
"""

import os
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fewbit.codecs import gguf
from fewbit.errors import RequestError
from fewbit.files.shard import Part
from fewbit.files.writer import check_free
from fewbit.models.layers import Unit
from fewbit.quant.qtensor import Quantized
from fewbit.quant.spec import Format
from fewbit.workflows import job as jobs
from fewbit.workflows.assemble import GGUF, Contents, assemble
from fewbit.workflows.job import Job
from fewbit.workflows.journal import FOLDER, Journal
from fewbit.workflows.layer_work import Done, advance, encode_unseen, passed, quantize_layer
from fewbit.workflows.plan import Forecast, plan
from fewbit.workflows.quantize_report import LOG, described, distributions, leave
from fewbit.workflows.recipe import Recipe
from fewbit.workflows.report import NAME
from fewbit.workflows.run_log import RunLog
from fewbit.workflows.run_view import peak_memory
from fewbit.workflows.small_files import carried
from fewbit.workflows.unit_file import Stored, kv_tensors, module_tensors, part
from fewbit.workflows.weights import as_stored

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
    trust_remote_code: bool = False,
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
    trust_remote_code: of a model whose code lies in its folder; it goes with it.
    """
    job = jobs.prepared(src, format, algo=algo, options=options, to=to, group_size=group_size, kv=kv, ignore=ignore,
                        calib=calib, samples=samples, length=length, seed=seed, chat=chat, order=order,
                        observer=observer, experts=experts, device=device, dtype=dtype, max_memory=max_memory,
                        trust_remote_code=trust_remote_code)  # fmt: skip
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
        Journal(folder, jobs.depends(job) | {"out": out.name, "max_shard": max_shard}, restart) as journal,
        open(os.devnull, "w") as nowhere,
        RunLog(journal.folder / LOG, len(job.units), stream=None if show else nowhere) as log,
        torch.no_grad(),
    ):
        journal.check()
        resumed = sum(unit.name in journal.done for unit in job.units)
        log.start(model=str(job.source.path), command=command, recipe=job.recipe.to_yaml())
        expected = plan(job) if report and not resumed else None
        work(job, journal, log, max_shard)
        units = {name: journal.done[name]["notes"] for name in _order(job) if name in journal.done}
        modules = tuple(note for notes in units.values() for note in notes["modules"])
        files = {path: entry for name in units for path, entry in journal.files(name).items()}
        with Stored(job.codec, files) as stored:
            contents = contents_of(job, stored, modules)
            assemble(out, job.codec, contents, stored, files, max_shard, overwrite)
            shown = distributions(job, contents.module, modules) if report else []
        log.done(modules=len(modules), out=str(out))
        if report:
            page = described(job, out, log.path, command, units, expected, time.monotonic() - begun)
            page["distributions"] = shown
            leave(job, out, page, log.path)
        journal.remove()
    tokens = job.samples.tokens if job.samples else 0
    return Quantization(job.source.path, out, job.to, modules, resumed, tokens, time.monotonic() - begun, peak_memory(),
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


def work(job: Job, journal: Journal, log: RunLog, max_shard: int) -> None:
    """Every unit that the journal does not have yet; finished ones only compute the inputs of the next."""
    last = max((u.index for u in job.units if u.name not in journal.done), default=-1)
    state = jobs.begin(job, journal.folder) if last >= 0 else None
    tuned = state is not None and any(t.algo.tune for t in job.targets.values())
    floats = jobs.begin(job, journal.folder) if tuned else None
    _outside(job, journal, log, max_shard)
    for unit in job.units[: last + 1]:
        if unit.name not in journal.done:
            done = quantize_layer(job, unit, state, floats)
            if state is not None and unit.index < last:
                done.error = advance(job, unit, state, {**done.values, **done.dense}, done.first)
            _save(job, journal, unit, done, max_shard)
            _tell(log, unit.name, done)
        elif state is not None:
            with Stored(job.codec, journal.files(unit.name)) as stored:
                advance(job, unit, state, finished(job, stored, journal.done[unit.name]["notes"]), None)
            if floats is not None:
                with job.layers.loaded(unit) as module:
                    passed(job, unit, module, floats)
    journal.flush()


def _order(job: Job) -> list[str]:
    return [OUTSIDE, *(unit.name for unit in job.units)]


def _outside(job: Job, journal: Journal, log: RunLog, max_shard: int) -> None:
    """What is in no layer, encoded where the recipe speaks of it. Before the layers: it is the largest to write."""
    if OUTSIDE in journal.done:
        return
    done, targets = Done(), job.outside()
    encode_unseen(job, targets, done)
    inside = {name for unit in job.units for name in unit.names}
    unit = Unit(OUTSIDE, -1, tuple(name for name in job.floats.dense if name not in inside))
    _save(job, journal, unit, done, max_shard)
    if targets:
        _tell(log, OUTSIDE, done)


def _save(job: Job, journal: Journal, unit: Unit, done: Done, max_shard: int) -> None:
    parts = {k: part(t) for name, q in done.values.items() for k, t in module_tensors(job.codec, name, q).items()}
    if job.codec is not gguf:  # whose file takes what is dense from the source in the end
        left = [
            name for name in unit.names if name in job.floats.dense and name.removesuffix(".weight") not in job.targets
        ]
        parts |= {name: _dense(job, name) for name in left}
    parts |= {name: part(t) for name, t in {**done.dense, **kv_tensors(job.codec, done.kv)}.items()}
    coverage = {"experts": done.coverage.experts, "starved": done.coverage.starved,
                "inactive": done.coverage.inactive, "channels": done.coverage.channels}  # fmt: skip
    notes = {"modules": done.notes, "dense": list(done.dense), "error": done.error, "seconds": done.seconds,
             "coverage": coverage}  # fmt: skip
    journal.save(unit.name, unit.index + 1, parts, notes, max_shard)


def _dense(job: Job, name: str) -> Part:
    """A tensor of the source as the result holds it."""
    entry = job.floats.dense[name]
    return Part(entry.dtype, tuple(entry.shape), lambda: as_stored(job, name, job.floats.read(name)))


def _tell(log: RunLog, unit: str, done: Done) -> None:
    for note in done.notes:
        log.module(**note)
    for warning in done.warnings:
        log.warning(warning)
    log.layer(unit, seconds=done.seconds, error=done.error)


def finished(job: Job, stored: Stored, notes: Mapping[str, Any]) -> dict[str, Quantized | Tensor]:
    """A unit's result back from its files."""
    formats = formats_of(job, notes["modules"])
    out: dict[str, Quantized | Tensor] = {
        name: stored.module(name, form, job.places[name].shape) for name, form in formats.items()
    }
    return out | {name: stored.read(name) for name in notes["dense"]}


def formats_of(job: Job, modules: Iterable[Mapping[str, Any]]) -> dict[str, Format]:
    """Module -> its format with the transforms that came out, by the lines about them."""
    found = {}
    for note in modules:
        form = job.targets[note["name"]].format
        found[note["name"]] = Format(form.weight, form.act, tuple(note["transforms"]))
    return found


def contents_of(job: Job, stored: Stored, modules: Sequence[Mapping[str, Any]]) -> Contents:
    """The finished checkpoint, its parts still in the journal and in the source."""
    formats = formats_of(job, modules)
    dense = {name: (entry.dtype, tuple(entry.shape)) for name, entry in job.floats.dense.items()
             if name.removesuffix(".weight") not in formats}  # fmt: skip
    left = [p.name for p in job.places.values() if p.name not in formats and p.kind != "embedding"]

    def tensor(name: str) -> Tensor:
        return stored.read(name) if name in stored.of else _dense(job, name).value()

    def module(name: str) -> Quantized:
        return stored.module(name, formats[name], job.places[name].shape)

    ordered = {name: formats[name] for name in job.targets if name in formats}
    return Contents(_config(job), ordered, module, dense, tensor, carried(job.source), left, job.kv)


def _config(job: Job) -> dict[str, Any]:
    """config.json of the source without what it said of its quantization."""
    gone = ("quantization_config", "compression_config")
    config = {k: v for k, v in dict(job.floats.config).items() if k not in gone}
    if isinstance(config.get("text_config"), dict):
        config["text_config"] = {k: v for k, v in config["text_config"].items() if k not in gone}
    return config
