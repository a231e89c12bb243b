"""Writing what a calibration gave: float weights as they then are, and the state of quantizers beside them.

The state is written twice, as `quant_amax.pth`, which ModelOpt's own readers take, and as `quant_amax.st`, which is
safetensors under an ending that loaders of every *.safetensors in a folder leave alone.
"""

import io
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save
from torch import Tensor

from fewbit import codecs
from fewbit.codecs.source import Source
from fewbit.compat.fakequant_arrivals import Maker
from fewbit.compat.fakequant_ask import Asked, Wish, config_of, static, told, wish
from fewbit.compat.fakequant_run import Tell, needs_data, run
from fewbit.compat.fakequant_state import Reader, State
from fewbit.compat.modelopt_config import Rounding
from fewbit.errors import CheckpointError, RequestError, UnsupportedError
from fewbit.files.writer import SafetensorsWriter, check_free
from fewbit.models.arrival import Arrival, rewritten
from fewbit.models.emulation import Emulation
from fewbit.models.fill import Filler
from fewbit.models.layers import Layers
from fewbit.models.placement import Placement, cut
from fewbit.quant.qtensor import make, scale_of, store
from fewbit.quant.reference import decode
from fewbit.workflows.small_files import small_files

AMAX, PICKLED = "quant_amax.st", "quant_amax.pth"
KEY = "fewbit_quantizers"  # in the metadata of a state file: what each quantizer does
Batches = Callable[[Wish, Layers], list[Tensor]]


def opened(source: Source, device: torch.device, dtype: Any) -> Layers:
    if source.modules:
        reason = f"it is {source.dialect} already: serve it as it is, or its float original"
        raise UnsupportedError(f"{source.path}: fakequant rounds float weights", [reason])
    return Layers(source, dtype=dtype, device=device, plain=True)


def calibrate(model: str | Path, out: str | Path, fakequant: Asked, kv_fakequant: Asked, batches: Batches, *,
              device: str | torch.device = "cpu", dtype: Any = None, max_shard: int = 5_000_000_000,
              overwrite: bool = False, trust_remote_code: bool = False,
              tell: Tell = lambda done, total: None) -> State:  # fmt: skip
    """A folder with float weights and the state of its quantizers; all of it appears, or nothing. -> the state

    trust_remote_code: of a model whose code lies in its folder; it goes with it.
    """
    check_free(Path(out), overwrite)
    if config_of(fakequant) is None and config_of(kv_fakequant) is None:
        raise RequestError("calibrate: nothing says what to calibrate for: give --fakequant, --kv-fakequant")
    with codecs.open(model, trust_remote_code) as source:
        if Path(out).resolve() == source.path.resolve():
            raise RequestError(f"{out}: is the model that is read; give another folder")
        layers = opened(source, torch.device(device), dtype)
        wanted = wish(fakequant, kv_fakequant, layers)
        found = run(layers, wanted, batches(wanted, layers) if needs_data(wanted) else [], tell)
        made = Maker(wanted, layers, Reader(found.state, "calibration"), found.codes).emulation()
        layout = {name: (e.dtype, tuple(e.shape)) for name, e in source.dense.items()}
        weights = Weights(layers, made, source)
        with SafetensorsWriter(out, layout, max_shard=max_shard, overwrite=overwrite) as writer:
            for name, data in (small_files(source, {}) | files_of(found.state, static(wanted))).items():
                writer.add_file(name, data)
            for name in source.dense:
                writer.put(name, weights.read(name))
    return found.state


def files_of(state: State, quantizers: Mapping[str, Rounding]) -> dict[str, bytes]:
    """quantizers: what each of them does, by its name."""
    pickled = io.BytesIO()
    torch.save(dict(state), pickled)
    return {AMAX: save(state, {KEY: json.dumps(told(quantizers))}), PICKLED: pickled.getvalue()}


class Weights:
    """The tensors of a checkpoint as calibration left them: scaled, without a branch of low rank, or of its codes."""

    def __init__(self, layers: Layers, emulation: Emulation, source: Source):
        self.layers, self.arrivals, self.source = layers, emulation.arrivals, source
        self.filler = Filler(layers.model, layers.rules, layers.options, torch.device("cpu"))
        self.filler._offsets(layers.places, source)

    def read(self, name: str) -> Tensor:
        tensor: Tensor = self.source.read(name)  # type: ignore[assignment]
        place = self.layers.places.get(name)
        found = [self.arrival(target) for target in place.targets] if place is not None else []
        if place is None or all(a is None or not ("codes" in a.weight or a.transforms) for a in found):
            return tensor
        if place.group is not None or place.swap:
            raise UnsupportedError(f"{name}: transformers rearranges it when it is read, and it cannot be changed here")
        if len(found) == 1:
            return self.changed(place, tensor, found[0])
        shapes = [self.layers.rules.parameters[target] for target in place.targets]
        each = [self.changed(Placement((target,)), piece, a) for target, piece, a in
                zip(place.targets, cut(tensor, shapes, place.axis), found, strict=True)]  # fmt: skip
        return torch.cat(each, place.axis)

    def arrival(self, target: str) -> Arrival | None:
        return self.arrivals.get(target) or self.arrivals.get(target.removesuffix(".weight"))

    def changed(self, place: Placement, tensor: Tensor, arrival: Arrival | None) -> Tensor:
        if arrival is None:
            return tensor
        if tensor.dim() > 2:
            host: Any = self.layers.model.get_submodule(place.target.rpartition(".")[0])
            each = [self.matrix(m.mT if host.is_transposed else m, arrival.expert(e)) for e, m in enumerate(tensor)]
            whole = torch.stack(each)
            return whole.mT.contiguous() if host.is_transposed else whole
        return self.matrix(tensor, self.filler.part(place, arrival, len(tensor)))

    def matrix(self, w: Tensor, arrival: Arrival) -> Tensor:
        dtype = self.layers.options.dtype
        if "codes" not in arrival.weight:
            return rewritten(w.to(dtype), arrival.transforms).to(w.dtype).contiguous()
        spec = arrival.format.weight
        planes = {n: p if n == "codes" else store(p, scale_of(spec, n).element) for n, p in arrival.weight.items()}
        return decode(make(spec, w.shape, planes)).to(w.dtype)


def state_file(path: str | Path) -> Path:
    """A file, or the one that a folder holds."""
    path = Path(path)
    names = (AMAX, PICKLED, "quantizer_state.pth", "vllm_fq_modelopt_state.pth")
    found = path if path.is_file() else next((path / name for name in names if (path / name).is_file()), None)
    if found is None:
        raise CheckpointError(f"{path}: there is no such file" + (f", and none of {', '.join(names)} in it"
                                                                  if path.is_dir() else ""))  # fmt: skip
    return found
