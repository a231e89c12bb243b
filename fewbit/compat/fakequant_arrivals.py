"""A wish and a state -> how every module arrives: specs, scales, transforms, and what attention rounds."""

import logging
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from fewbit.compat.fakequant_ask import Wish, static
from fewbit.compat.fakequant_state import (
    AMAX,
    BIAS,
    FUSED,
    GLOBAL,
    LORA,
    ORDER,
    SMOOTH,
    Reader,
    planes_of,
)
from fewbit.compat.insert import OTHERS, disk_modules
from fewbit.compat.modelopt import role
from fewbit.compat.modelopt_config import Rounding
from fewbit.compat.quantizer import by_rule
from fewbit.errors import CheckpointError
from fewbit.models.arrival import Arrival
from fewbit.models.emulation import Emulation
from fewbit.models.layers import Layers
from fewbit.modules.attention_sides import Side, Sides
from fewbit.quant.elements import BF16, E4M3, F16, F32
from fewbit.quant.qtensor import Planes, QTensor, Transform, scale_codes
from fewbit.quant.spec import Format, QuantSpec

LOG = logging.getLogger("fewbit.fakequant")
PLAIN = {torch.float32: QuantSpec(F32), torch.bfloat16: QuantSpec(BF16), torch.float16: QuantSpec(F16)}


@dataclass(slots=True)
class Maker:
    """came: the weights of the model are as the state wants them already, scaled and folded."""

    wish: Wish
    layers: Layers
    reader: Reader
    codes: Mapping[str, QTensor] = field(default_factory=dict)
    came: bool = False
    folded: list[str] = field(default_factory=list)  # weights whose quantizer the state does not know
    _disk: dict[str, list[str]] = field(init=False, default_factory=dict)  # parameter -> modules on disk
    _by: dict[tuple[str, str], Rounding] = field(init=False, default_factory=dict)  # (owner, leaf) -> what it does

    def emulation(self) -> Emulation:
        pairs = {(place.owner, place.leaf.rpartition(".")[0]): None for place in self.wish.found
                 if role(place) in ("weight", "input")}  # fmt: skip
        self._disk = disk_modules(self.layers.model)
        said = static(self.wish)
        self._by = {(place.owner, place.leaf): said[place.names[0]] for place in self.wish.found}
        arrivals = {f"{owner}.{name}" if name else owner: self._arrival(owner, name) for owner, name in pairs}
        attentions = dict.fromkeys(p.owner for p in self.wish.found if role(p) in ("cache", "softmax"))
        sides = {path: self._sides(path) for path in attentions}
        if self.folded:
            LOG.info(
                "%d weights are left as they are: %s has no magnitudes of them", len(self.folded), self.reader.where
            )
        if left := self.reader.left:
            LOG.warning("%s: %d entries are not used: %s ...", self.reader.where, len(left), ", ".join(left[:3]))
        return Emulation(arrivals, sides)

    def _arrival(self, owner: str, name: str) -> Arrival:
        path, leaf = (f"{owner}.{name}", f"{name}.") if name else (owner, "")
        weight, inputs = (self._by.get((owner, f"{leaf}{of}_quantizer")) for of in ("weight", "input"))
        spec, planes = self._weight(owner, name, path, weight)
        act, act_planes = self._input(owner, name, path, inputs)
        transforms = self._transforms(owner, name)
        form = Format(spec, act, tuple(t.kind for t in transforms))
        return Arrival(form, planes, act_planes, transforms, rewrite=not self.came)

    def _weight(self, owner: str, name: str, path: str, what: Rounding | None) -> tuple[QuantSpec, Planes]:
        plain = PLAIN[self.layers.options.dtype]
        if what is None:
            return plain, {}
        if path in self.codes:
            q = self.codes[path]
            return q.spec, {n: p if n == "codes" else scale_codes(q, n) for n, p in q.planes.items()}
        if by_rule(what.spec):
            return what.spec, {}
        amax = torch.tensor(what.spec.element.max) if what.constant else self._merged(owner, name, "weight", AMAX)
        if amax is None:
            self.folded.append(path)
            return plain, {}
        whole = self._merged(owner, name, "weight", GLOBAL) if len(what.spec.scales) == 2 else None
        where = f"{path}.weight_quantizer"
        return what.spec, planes_of(what.spec, amax, whole, self._shape(owner, name), where, what.outer)

    def _input(self, owner: str, name: str, path: str, what: Rounding | None) -> tuple[QuantSpec | None, Planes]:
        if what is None:
            return None, {}
        spec = what.spec
        if not spec.scales or spec.scales[-1].dynamic:
            return spec, {}
        amax = torch.tensor(spec.element.max) if what.constant else self._merged(owner, name, "input", AMAX)
        if amax is None:
            raise CheckpointError(f"{self.reader.where}: no {path}.input_quantizer.{AMAX}, and its scale is static")
        where, shape = f"{path}.input_quantizer", (1, self._shape(owner, name)[-1])
        return spec, planes_of(spec, amax.amax(), None, shape, where, what.outer)

    def _transforms(self, owner: str, name: str) -> tuple[Transform, ...]:
        found = []
        if (smooth := self._get(owner, name, "input", SMOOTH)) is not None:
            found.append(Transform("input_scale", {"scale": smooth}))
        pair = [self._get(owner, name, "weight", leaf, f"{owner}.{leaf}") for leaf in LORA] if not name else [None]
        if all(t is not None for t in pair):
            found.append(Transform("low_rank", dict(zip("ab", pair, strict=True))))  # type: ignore[arg-type]
        return tuple(found)

    def _get(self, owner: str, name: str, of: str, suffix: str, *more: str) -> Tensor | None:
        if name:
            others = self._disk.get(f"{owner}.{name}", [])
            return self.reader.stack(owner, name, of, suffix, others, self._shape(owner, name)[0])
        found = self.reader.linear(owner, of, suffix, self._rows(owner))
        return self.reader.get(*more) if found is None and more else found

    def _merged(self, owner: str, name: str, of: str, suffix: str) -> Tensor | None:
        """What whole tensors have is the largest of what engines fuse."""
        own = self._get(owner, name, of, suffix)
        parent, _, leaf = owner.rpartition(".")
        if name or own is None or own.numel() > 1 or leaf not in FUSED:
            return own
        spec = self._by[owner, f"{of}_quantizer"].spec
        if spec.scales[-1].block != (0, 0):
            return own
        others = [f"{parent}.{other}" for other in ORDER[FUSED[leaf]]]
        alike = [o for o in others if (w := self._by.get((o, f"{of}_quantizer"))) is not None and w.spec == spec]
        seen = [t for o in alike if (t := self._get(o, "", of, suffix)) is not None and t.numel() == 1]
        return torch.stack([t.float().reshape(()) for t in seen]).amax()

    def _rows(self, owner: str) -> dict[str, int]:
        parent, _, leaf = owner.rpartition(".")
        names = ORDER[FUSED[leaf]] if leaf in FUSED else ()
        held = {f"{parent}.{n}": self.layers.rules.parameters.get(f"{parent}.{n}.weight") for n in names}
        return {path: shape[0] for path, shape in held.items() if shape is not None}

    def _shape(self, owner: str, name: str) -> tuple[int, ...]:
        """[N, K] or [E, N, K]."""
        shape = tuple(self.layers.rules.parameters[f"{owner}.{name or 'weight'}"])
        host: Any = self.layers.model.get_submodule(owner)
        return (*shape[:-2], shape[-1], shape[-2]) if name and host.is_transposed else shape

    def _sides(self, path: str) -> Sides:
        q, k, v = (self._side(path, leaf) for leaf in (OTHERS[0], "k_bmm_quantizer", "v_bmm_quantizer"))
        return Sides(q, k, v, E4M3.max if (path, OTHERS[1]) in self._by else 0.0)

    def _side(self, path: str, leaf: str) -> Side | None:
        what = self._by.get((path, leaf))
        if what is None:
            return None
        bias = None
        if what.affine and (bias := self.reader.attention(path, leaf, BIAS)) is None:
            raise CheckpointError(f"{self.reader.where}: no {path}.{leaf}.{BIAS}")
        planes: Planes = {}
        if what.spec.scales and not what.spec.scales[-1].dynamic:
            amax = torch.tensor(what.spec.element.max) if what.constant else self.reader.attention(path, leaf, AMAX)
            if amax is None:
                reason = "state files of quantization-aware training may lack it: calibrate keys and values anew"
                raise CheckpointError(
                    f"{self.reader.where}: no {path}.{leaf}.{AMAX}, and its scale is static ({reason})"
                )
            planes = planes_of(what.spec, amax.amax(), None, (1, 1), f"{path}.{leaf}", what.outer)
        return Side(what.spec, planes, None if bias is None else bias.reshape(bias.shape[-3:]), what.turned)
