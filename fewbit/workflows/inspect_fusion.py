"""What can be fused in a checkpoint's architecture, and how its layers are wired: read off its twin."""

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from fewbit import codecs
from fewbit.models import fuse
from fewbit.models.fuse_count import Counted, counted
from fewbit.models.fuse_values import Decision, Plan, lines
from fewbit.models.observe import observe
from fewbit.models.observe_wiring import Wiring
from fewbit.models.twin import told
from fewbit.models.verify import model_config


@dataclass(frozen=True, slots=True)
class Fusion:
    """kernels: of a decoder layer outside attention; None where they could not be counted, and why."""

    plan: Plan
    wiring: Wiring
    kernels: Counted | None
    why: str = ""

    def to_json(self) -> dict[str, Any]:
        layers = [{"layer": layer.index, "kind": layer.kind, "groups": [asdict(g) for g in layer.groups],
                   "readers": layer.readers, "writers": layer.writers} for layer in self.wiring.layers]  # fmt: skip
        said = [_said(d) for d in self.plan.refused] + [{"what": r.what, "why": r.why, "error": r.error}
                                                        for r in self.wiring.refused]  # fmt: skip
        return {
            "model_type": self.plan.model_type,
            "kernels_per_layer": asdict(self.kernels) if self.kernels else {"why": self.why},
            "groups": self._of("merged"), "norms": self._of("norm"), "gated": self._of("glu"),
            "rotary": self._of("rotary"), "latent": self._of("latent"), "routers": self._of("route"),
            "mixtures": self._of("mixture"), "sums": self._of("sums"),
            "wiring": {"path": self.wiring.path, "layers": layers, "stream": asdict(self.wiring.stream)},
            "refused": said,
        }  # fmt: skip

    def _of(self, kind: str) -> list[str]:
        return list(dict.fromkeys(str(r.form) for r in self.plan.rewrites if r.kind == kind))

    def __str__(self) -> str:
        count = f"{self.kernels.fused} kernels a layer outside attention, {self.kernels.plain} in its own code" if (
            self.kernels) else f"kernels of a layer not counted: {self.why}"  # fmt: skip
        found = [Decision(r.target.name, r.kind, str(r.form)) for r in self.plan.rewrites]
        return "\n".join([f"{self.plan.model_type}: {count}", *lines((*found, *self.plan.refused)), str(self.wiring)])


def _said(decision: Decision) -> dict[str, Any]:
    return {"what": f"{decision.where}: {decision.kind} {decision.what}", "why": decision.reason, "error": None}


def fusion(path: str | Path, trust_remote_code: bool = False) -> Fusion:
    """Of the architecture of a folder or a .gguf file. Reads headers alone."""
    with codecs.open(path, trust_remote_code) as source:
        config = model_config(source)
    plan, wiring = fuse.plan(config), observe(config)
    try:
        return Fusion(plan, wiring, counted(config))
    except Exception as error:  # what a model's own code raises is the finding
        return Fusion(plan, wiring, None, told(error))
