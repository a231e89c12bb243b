"""Session: what QUANT_CONFIG makes of one model on one rank, from before it is loaded until the engine ends.

MEASURE loads the model as it is, watches it while requests run, and writes at the end. QUANTIZE reads measurements,
chooses scales, and says what each weight becomes as it is read; scales are left in a file, as INC leaves them.
"""

import logging
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from fewbit import codecs
from fewbit.errors import CheckpointError, FewbitError, RequestError, UnsupportedError
from fewbit.inc import config as configs
from fewbit.inc import files
from fewbit.inc.chosen import LINEARS, choose, gathered, spread, taken
from fewbit.inc.config import Config
from fewbit.inc.files import Node, Stats
from fewbit.inc.measure import Measure
from fewbit.inc.nodes import Site, idle, sites
from fewbit.inc.quantize import Becomes, becomes
from fewbit.inc.weights import Weights
from fewbit.models import hf
from fewbit.models.arrival import Arrival
from fewbit.models.build import module_path
from fewbit.models.kv import FROM
from fewbit.models.verify import building, model_config
from fewbit.modules.attention import INSIDE
from fewbit.quant.spec import Format

LOG = logging.getLogger("fewbit.inc")


class Session:
    """measure: while a model is watched. becomes: what loading is given; left: nodes that stay as they are, and why."""

    def __init__(self, path: str | Path, rank: int = 0, size: int = 1):
        self.config: Config = configs.read(path)
        self.rank, self.size = rank, size
        self.becomes = Becomes()
        self.left: dict[str, str] = {}
        self.kinds: Counter[str] = Counter()
        self.measure: Measure | None = None
        if self.measures and size > 1 and not self.config.flags["seperate_measure_files"]:
            reason = "each has seen a part: let them write files of their own, and unify those"
            raise UnsupportedError(f"{self.config.where}: seperate_measure_files is false on {size} ranks", [reason])

    @property
    def measures(self) -> bool:
        return self.config.mode in ("MEASURE", "SHAPE")

    @property
    def quantizes(self) -> bool:
        return self.config.mode == "QUANTIZE"

    @property
    def formats(self) -> set[Format]:
        return {arrival.format for arrival in self.becomes.arrivals.values()}

    def plan(self, model: str | Path, cached: bool, trust_remote_code: bool = False) -> None:
        """Decide what the weights of a checkpoint become. cached: keys and values are stored in FP8."""
        if not self.quantizes:
            return
        with codecs.open(model, trust_remote_code) as source:
            if source.modules:
                reason = f"it is {source.dialect}; leave --quantization inc and QUANT_CONFIG out to serve it as it is"
                raise UnsupportedError(f"{model}: already quantized, and mode QUANTIZE needs float weights", [reason])
            with building(source):
                empty = hf.build(model_config(source), torch.bfloat16)
            self._plan(source, empty, cached)

    def _plan(self, source: codecs.Source, model: Any, cached: bool) -> None:
        every, tied = sites(model), hf.ties(model)
        for text in idle((*self.config.allow.names, *self.config.block.names), every):
            LOG.warning("%s: no node of this model is called %s", self.config.where, text)
        found = taken(every, self.config, cached)
        if cached and not any(site.kind == "kv_cache" for site in found):
            raise RequestError(f"{self.config.where}: kv_cache_dtype=fp8_inc, and its lists leave the caches out")
        for site in [s for s in found if s.kind in LINEARS and any(f"{path}.weight" in tied for path in s.paths)]:
            self.left[site.name] = f"its weight is that of {tied[f'{site.paths[0]}.weight']}"
            found.remove(site)
        scales = self._scales(source, model, found)
        if bare := [site.name for site in found if site.kind == "kv_cache" and site.name not in scales]:
            reasons = [f"{bare[0]}: {self.left[bare[0]]}", "what works: leave kv_cache_dtype=fp8_inc out"]
            raise UnsupportedError(f"{self.config.where}: there are no scales of caches", reasons)
        self.becomes = becomes(found, scales, self.config, model)
        self.kinds = Counter(site.kind for site in found if site.name in scales)
        for reason, count in Counter(self.left.values()).items():
            LOG.warning("%d nodes are left as they are: %s", count, reason)

    def _scales(self, source: codecs.Source, model: Any, found: Sequence[Site]) -> dict[str, Node]:
        """Of a file that is to be kept, or of measurements, which then leave one."""
        path = files.stem(self.config, self.rank, self.size, self.config.methods.name)
        asks = any(self.config.methods.of(site.name, site.kind).measures for site in found)
        stats = self._stats() if asks and not (self.config.keeps and files.there(path)) else None
        if asks and stats is None:
            if not files.there(path) or self.config.flags["recalc_scales"]:
                raise RequestError(f"{self.config.where}: there are no measurements of {self.size} ranks at "
                                   f"{files.stem(self.config, self.rank, self.size)}.json or .npz; mode MEASURE, or "
                                   "fewbit calibrate MODEL --inc CONFIG, makes them")  # fmt: skip
            LOG.info("scales are those of %s", path)
            return self._kept(found, path)
        weights = Weights(source, model, self.config, found, stats)
        chosen = choose(found, stats, self.config, weights)
        self.left |= chosen.left
        try:
            files.write(path, Stats(spread(chosen.scales), "Scale", self.rank if self.size > 1 else None))
        except FewbitError as error:
            LOG.warning("the scales are not written: %s", error)
        return chosen.scales

    def _kept(self, found: Sequence[Site], path: Path) -> dict[str, Node]:
        stats = files.read(path)
        if stats.mode != "Scale":
            raise CheckpointError(f"{path}: Mode is {stats.mode}, and scales are wanted")
        held = gathered(found, stats)
        missing = [site.name for site in found if site.name not in held]
        if missing and not self.config.flags["ignore_modules_wo_measures"]:
            raise UnsupportedError(f"{path}: has no scales for {len(missing)} modules", [", ".join(missing[:6])])
        self.left |= dict.fromkeys(missing, "the file of scales has none for it")
        return held

    def _stats(self) -> Stats | None:
        """Those of all ranks, which give any number of them the same scales; or else this rank's own."""
        for path in (files.stem(self.config, 0, 1), files.stem(self.config, self.rank, self.size)):
            if files.there(path):
                stats = files.read(path)
                if stats.mode != "DynamicRange":
                    raise CheckpointError(f"{path}: Mode is {stats.mode}, and measurements are wanted")
                return stats
        return None

    def arrives(self, path: str, module: nn.Module) -> Arrival | None:
        """As models.build.load asks."""
        return self.becomes.arrivals.get(module_path(path, module))

    def loaded(self, model: nn.Module) -> None:
        """The model is there: attention rounds what its nodes say."""
        for path, rounds in self.becomes.inside.items():
            setattr(model.get_submodule(path), INSIDE, rounds)
        if self.becomes.kv:
            setattr(model, FROM, "INC's")

    def watch(self, model: nn.Module) -> None:
        """From here on what runs is measured; earlier files of this name make room."""
        if self.measures:
            if self.rank == 0:
                set_aside(Path(self.config.stats))
            self.measure = Measure(model, self.config, self.rank, self.size)

    def finish(self) -> list[Path]:
        """Write what was measured. -> files"""
        if self.measure is None:
            return []
        measure, self.measure = self.measure, None
        measure.close()
        written = measure.write()
        LOG.info("measured %d steps: %s", measure.samples, ", ".join(map(str, written)))
        return written

    def facts(self) -> dict[str, Any]:
        """For people."""
        return {"mode": self.config.mode, "scale_method": self.config.methods.name.lower(),
                "element": self.config.unit.element.name, "nodes": dict(self.kinds),
                "left": dict(Counter(self.left.values()))}  # fmt: skip


def set_aside(stats: Path) -> None:
    """Measurements and scales of an earlier run go into a folder beside them."""
    beside = list(stats.parent.iterdir()) if stats.parent.is_dir() else []
    if old := [path for path in beside if path.name.startswith(f"{stats.name}_hooks_")]:
        folder = stats.parent / f"{stats.name}_backup_{time.strftime('%Y-%m-%d_%H-%M-%S')}"
        folder.mkdir(exist_ok=True)
        for path in old:
            path.replace(folder / path.name)
        LOG.info("earlier measurements are in %s", folder)
