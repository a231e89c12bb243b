"""What a finished quantization leaves beside the model: the page, the model card, the recipe and the log."""

import platform
import shutil
import sys
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

import fewbit
from fewbit.files.manifest import MANIFEST, read_manifest
from fewbit.models import hf
from fewbit.quant.reference import decode
from fewbit.workflows.card import card, source_licence
from fewbit.workflows.job import Job
from fewbit.workflows.plan import Forecast, sizes
from fewbit.workflows.report import NAME, write
from fewbit.workflows.report_data import Run, gathered, kind_of
from fewbit.workflows.run_log import read_log
from fewbit.workflows.run_view import peak_memory

LOG, RECIPE, CARD = "fewbit_log.jsonl", "fewbit_recipe.yaml", "README.md"
BINS = 64
SHOWN = 4  # modules whose weights are drawn


def leave(job: Job, out: Path, run: Run, log: Path) -> None:
    """Put them in the output folder; beside a GGUF file, under its name."""
    single = out.suffix == ".gguf"
    folder, stem = (out.parent, f"{out.stem}.") if single else (out, "")
    write(folder / f"{stem}{NAME}", run)
    (folder / f"{stem}{RECIPE}").write_text(job.recipe.to_yaml())
    shutil.copyfile(log, folder / f"{stem}{LOG}")
    if not single:
        (folder / CARD).write_text(card(run, str(out)))


def described(
    job: Job, out: Path, log: Path, command: str, units: Mapping[str, Any], forecast: Forecast | None, spent: float
) -> Run:
    """The run as the page and the card want it."""
    events = gathered(read_log(log))
    config = job.source.config
    modules: Any = [m | dict(zip(("layer", "kind"), kind_of(m["name"]), strict=True)) for m in events["modules"]]
    text = job.layers.config.get_text_config()
    held = peak_memory()
    run: Run = {
        "title": f"{job.source.path.name.removesuffix('.gguf')}, {job.recipe.format} by {job.recipe.algo}",
        "model": {"name": job.source.path.name, "architecture": (config.get("architectures") or ["?"])[0],
                  "model_type": str(config.get("model_type")), "layers": int(getattr(text, "num_hidden_layers", 0)),
                  "parameters": sum(int(torch.Size(e.shape).numel()) for e in job.floats.dense.values()),
                  "dtype": str(job.layers.options.dtype).removeprefix("torch."),
                  "licence": source_licence(job.source.path if job.source.path.is_dir() else job.source.path.parent)},
        "version": fewbit.__version__,
        "command": command,
        "recipe": job.recipe.to_yaml(),
        "format": job.recipe.format,
        "algo": job.recipe.algo,
        "dialect": job.to,
        "trusted": job.source.trusted,
        "out": str(out),
        "sizes": _sizes(job),
        "error_means": "relative output error on the calibration text" if job.needs else "relative weight error",
        "modules": modules,
        "layers": events["layers"],
        "warnings": events["warnings"],
        "timing": {"total": spent, "memory": held, "device": str(job.device)},
        "environment": {"python": sys.version.split()[0], "torch": torch.__version__, "transformers": hf.VERSION,
                        "machine": platform.machine(), "threads": torch.get_num_threads()},
        "digests": _digests(out),
    }  # fmt: skip
    if job.samples is not None:
        run["coverage"] = _coverage(job, units)
    if forecast is not None and forecast.seconds is not None and forecast.memory is not None:
        run["predictions"] = [
            {"what": "time", "predicted": forecast.seconds, "actual": spent, "unit": "seconds", "tolerance": 0.5},
            {"what": "peak memory", "predicted": forecast.memory, "actual": held, "unit": "bytes", "tolerance": 0.2},
        ]
    return run


def _sizes(job: Job) -> Any:
    parts = sizes(job)
    before: Counter[str] = Counter()
    after: Counter[str] = Counter()
    for held in job.source.modules.values():
        before[held.format.weight.element.name] += held.nbytes
    for entry in job.source.dense.values():
        before[entry.dtype.lower()] += entry.nbytes
    weights = 0
    for name, nbytes in parts.items():
        target = job.targets.get(name)
        after[target.row if target else job.floats.dense[name].dtype.lower()] += nbytes
    for entry in job.floats.dense.values():
        weights += int(torch.Size(entry.shape).numel())
    quantized = sum(int(torch.Size(job.places[n].shape).numel()) for n in job.targets)
    return {
        "before": sum(before.values()),
        "after": sum(after.values()),
        "bits_per_weight": sum(after.values()) * 8 / weights,
        "quantized_bits_per_weight": sum(parts[n] for n in job.targets) * 8 / quantized,
        "parts_before": [{"format": f, "bytes": b} for f, b in before.most_common()],
        "parts_after": [{"format": f, "bytes": b} for f, b in after.most_common()],
    }


def _coverage(job: Job, units: Mapping[str, Any]) -> Any:
    samples = job.samples
    assert samples is not None
    experts, dead = [], []
    for unit, notes in units.items():
        held = notes.get("coverage", {})
        layer = kind_of(unit + ".x")[0]
        experts += [{"layer": layer or 0, "tokens": list(tokens)} for tokens in held.get("experts", {}).values()]
        dead += [{"name": name, "dead": n, "channels": held["channels"]} for name, n in held["inactive"].items()]
    found = {
        "source": samples.source, "licence": samples.licence, "digest": samples.digest, "tokens": samples.tokens,
        "documents": samples.documents, "samples": len(samples.ids), "lengths": [len(row) for row in samples.ids],
        "least_tokens": job.calibrate.least_tokens, "policy": job.calibrate.experts,
    }  # fmt: skip
    return found | ({"experts": experts} if experts else {}) | ({"dead": dead} if dead else {})


def _digests(out: Path) -> dict[str, str]:
    folder = out.parent if out.suffix == ".gguf" else out
    if not (folder / MANIFEST).is_file():
        return {}
    return {name: str(entry["sha256"]) for name, entry in read_manifest(folder).items()}


def distributions(job: Job, module: Any, notes: Any) -> list[Any]:
    """Weights before and after of the modules that lost most, counted in bins."""
    worst = sorted(notes, key=lambda note: -float(note.get("error", 0.0)))[:SHOWN]
    out = []
    for note in worst:
        name = note["name"]
        if name not in job.targets:
            continue
        q = module(name)
        before = job.floats.read(f"{name}.weight").float()
        after = decode(q.weight) if not q.transforms else before
        low, high = float(before.min()), float(before.max())
        if high > low:
            counts = [torch.histc(w.float(), BINS, low, high).int().tolist() for w in (before, after)]
            out.append({"module": name, "low": low, "high": high, "before": counts[0], "after": counts[1]})
    return out
