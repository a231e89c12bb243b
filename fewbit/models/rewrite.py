"""rewrite: weights changed so that a model computes the same.

`fold` takes a group's input scaling out of what makes the input; it works on the weights of one decoder layer, float,
by parameter path: linears [N, K], stacks [E, N, K]. `Rotated` is a source read in rotated coordinates.
"""

from collections.abc import Mapping
from dataclasses import is_dataclass, replace
from math import prod
from typing import Any, Self

import torch
from torch import Tensor

from fewbit.errors import CheckpointError, SpecError, UnsupportedError
from fewbit.files.safetensors import DTYPE_NAMES
from fewbit.models import hf
from fewbit.models.observe_roles import Role, roles, turned, untied, untied_raw
from fewbit.models.observe_values import Group, Source, bias_of, parameter
from fewbit.models.observe_wiring import Wiring
from fewbit.models.placement import Placement, cut
from fewbit.models.verify import model_config
from fewbit.transforms.rotate import matrix, rotate_out, rotation, turn

ROWS = 1 << 14  # rows of a matrix turned together

Weights = Mapping[str, Tensor]


def fold(weights: Weights, group: Group, s: Tensor) -> dict[str, Tensor]:
    """Multiply the group's columns by s, and divide what makes its input. -> the weights that change.

    s: [K], above 0, equal where channels share a row (`tied`); [E, K] where the group is one stack fed by a stack.
    """
    if group.source is None:
        raise UnsupportedError(f"{', '.join(group.linears)}: nothing that makes their input can take a scaling")
    if not bool((s > 0).all() and s.isfinite().all()):
        raise SpecError(f"a scaling must be finite and above 0, found {float(s.min()):g} to {float(s.max()):g}")
    return scaled(weights, group, s) | divided(weights, group.source, s)


def tied(s: Tensor, source: Source | None) -> Tensor:
    """s [.., K] with the channels that share a row given the largest of their scalings."""
    if source is None or source.repeat == 1:
        return s
    k = s.shape[-1]
    block = source.block or k // source.repeat
    runs = s.reshape(*s.shape[:-1], -1, source.repeat, block)
    return runs.amax(-2, keepdim=True).expand_as(runs).reshape(s.shape)


def scaled(weights: Weights, group: Group, s: Tensor) -> dict[str, Tensor]:
    """The readers' side: columns times s."""
    out = {}
    for path in group.readers:
        name = parameter(weights, path)
        value = weights[name]
        factor = s[:, None, :] if s.dim() == 2 else s
        if value.shape[-1] != s.shape[-1] or (s.dim() == 2 and value.shape[:1] != s.shape[:1]):
            raise SpecError(f"{name}: {list(value.shape)} cannot be scaled by {list(s.shape)}")
        out[name] = (value * factor).to(value.dtype)
    return out


def divided(weights: Weights, source: Source, s: Tensor) -> dict[str, Tensor]:
    """The maker's side: a norm's weight, or rows and bias of a linear, over s."""
    name = parameter(weights, source.path)
    bias, value = bias_of(name), weights[name]
    if source.kind == "norm":
        by, out = s, (value + source.offset) / s - source.offset
    else:
        by = by_row(s, source, value.shape[-2])
        out = value / by[..., None]
    found = {name: out} | ({bias: weights[bias] / by} if bias in weights else {})
    return {path: new.to(weights[path].dtype) for path, new in found.items()}


def by_row(s: Tensor, source: Source, n: int) -> Tensor:
    """s [.., K] -> [.., n]: one for each row of the maker, 1 where a row makes no channel."""
    index = source.rows(n, s.shape[-1]).to(s.device)
    rows = s.new_ones(*s.shape[:-1], n)
    rows[..., index] = s
    if not torch.equal(rows[..., index], s):
        raise SpecError(f"{source.path}: {source.repeat} channels share each row, and their scalings differ")
    return rows


def turn_columns(weight: Tensor, q: Tensor) -> Tensor:
    """[N, K] whose inputs are turned by q in each run of its size."""
    return (weight.view(len(weight), -1, len(q)) @ q).view_as(weight)


def turn_rows(weight: Tensor, rows: Tensor, q: Tensor) -> Tensor:
    """[N, K] or [N] whose outputs `rows` [heads, size] are turned by q, head by head."""
    out = weight.clone()
    held = weight[rows].view(*rows.shape, -1)
    out[rows] = (q.T @ held).view_as(weight[rows])
    return out


class Rotated:
    """A source of float weights with its residual stream rotated, and the values of attention where that is exact.

    Norms on the stream become plain, their weights part of what reads them; a head that was the embedding becomes its
    own tensor, and `config` says so. Reads as a Source does. dtype: of what changes, None = as it is stored.
    """

    def __init__(
        self, source: Any, wiring: Wiring, *, seed: int = 0, dtype: torch.dtype | None = None, config: Any = None
    ):
        refuse(source, wiring)
        given = model_config(source) if config is None else config
        self.source, self.dtype = source, dtype
        self.hf_config = untied(given)
        self.config = untied_raw(source.config) if config is None else {}
        self.modules: dict[str, Any] = {}
        self.dense: dict[str, Any] = dict(source.dense)
        model = hf.build(self.hf_config, torch.float32, wiring.attention)
        self.rules = hf.rules(model)
        self.transposed = {path for path in self.rules.parameters if turned(model, path)}
        self.roles = roles(wiring, given, model)
        self._places()
        self.head = self._own_head(wiring.stream.head, hf.ties(hf.build(given, torch.float32, wiring.attention)))
        self.norms = {p: source.read(self.names[p]).float() for p in {r.norm[0] for r in self.roles.values() if r.norm}}
        self.q = rotation(self.rules.parameters[f"{wiring.stream.embedding}.weight"][1], seed)
        heads = {role.columns for role in self.roles.values() if role.columns}
        self.value_q = {size: matrix(rotation(size, seed), torch.float32) for size in heads}
        for name in self.dense:
            self._retyped(name)

    def __getattr__(self, name: str) -> Any:
        if name == "source":  # not there yet
            raise AttributeError(name)
        return getattr(self.source, name)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self.source.close()

    def _places(self) -> None:
        self.places = self.rules.place(self.dense)
        self.names = {p.target: name for name, p in self.places.items() if p is not None and len(p.targets) == 1}
        for path, role in self.roles.items():
            if role.norm and role.norm[0] not in self.names:
                raise CheckpointError(f"{role.norm[0]}: missing, and {path} reads what it gives")
        for name, place in self.places.items():
            if place is not None and (why := self._unfit(place)):
                raise UnsupportedError(f"{name}: cannot be rotated where it is stored", [why])

    def _unfit(self, place: Placement) -> str:
        """Why a tensor cannot be rotated on its own."""
        found = [self.roles[t] for t in place.targets if t in self.roles]
        if found and place.group is not None:
            return "only an operation of transformers brings it into the model's form"
        if place.parts > 1 and any(r.outward or r.rows is not None or r.columns for r in found):
            return "it is a part of what is turned as a whole"
        return ""

    def _own_head(self, head: str, ties: Mapping[str, str]) -> str:
        """The name of the head's tensor, made where the embedding served for it."""
        path = f"{head}.weight"
        if path in self.names or path not in ties:
            return ""
        table = self.names[ties[path]]
        if (place := self.rules.place([path])[path]) is None or place.targets != (path,):
            raise UnsupportedError(f"{path}: the head has no name of its own beside the embedding's {table}")
        entry = self.dense[table]
        self.dense[path] = replace(entry, name=path) if hasattr(entry, "name") else entry
        self.places[path], self.names[path] = place, table
        return path

    def _retyped(self, name: str) -> None:
        """Headers say what is read."""
        entry, place = self.dense[name], self.places[name]
        touched = place is not None and any(t in self.roles for t in place.targets)
        if self.dtype is not None and touched and is_dataclass(entry) and hasattr(entry, "dtype"):
            size = prod(entry.shape) * self.dtype.itemsize
            self.dense[name] = replace(entry, dtype=DTYPE_NAMES[self.dtype], nbytes=size)

    def read(self, name: str) -> Tensor:
        """A tensor by its name on disk, as the rotated model has it."""
        value = self.source.read(self.names[name] if name == self.head else name)
        place = self.places[name]
        if place is None or not any(t in self.roles for t in place.targets):
            return value
        shapes = [self.rules.parameters[t] for t in place.targets]
        held = value.transpose(*place.swap) if place.swap else value
        pieces = cut(held, shapes, place.axis) if len(shapes) > 1 else (held,)
        dtype = self.dtype or value.dtype
        made = [self._turned(t, piece, dtype).to(dtype) for t, piece in zip(place.targets, pieces, strict=True)]
        out = made[0] if len(made) == 1 else torch.cat(made, place.axis)
        return (out.transpose(*place.swap) if place.swap else out).contiguous()

    def _turned(self, path: str, value: Tensor, dtype: torch.dtype) -> Tensor:
        """One parameter, or one expert's part of it; a tall one, an embedding, a share of its rows at a time."""
        role = self.roles.get(path)
        if role is None:
            return value
        if role.neutral is not None:
            return torch.full_like(value, role.neutral)
        flip = path in self.transposed
        value = value.mT if flip else value
        if role.rows is None and not role.outward:
            out = torch.cat([self._by_role(rows.float(), role, False).to(dtype) for rows in value.split(ROWS)])
        else:
            out = self._by_role(value.float(), role, path.endswith("bias"))
        return out.mT if flip else out

    def _by_role(self, w: Tensor, role: Role, bias: bool) -> Tensor:
        if role.inward:
            w = turn(w * (self.norms[role.norm[0]] + role.norm[1]) if role.norm else w, self.q)
        if role.columns:
            w = turn_columns(w, self.value_q[role.columns])
        if role.rows is not None:
            w = turn_rows(w, role.rows, self.value_q[role.rows.shape[-1]])
        if role.outward:
            w = turn(w, self.q) if bias else rotate_out(w, self.q)
        return w


def refuse(source: Any, wiring: Wiring) -> None:
    asked = f"{wiring.model_type}: the residual stream cannot be rotated"
    if wiring.stream.reasons:
        raise UnsupportedError(asked, wiring.stream.reasons)
    if source.modules:
        raise UnsupportedError(asked, [f"{len(source.modules)} modules are quantized; float weights are needed"])
