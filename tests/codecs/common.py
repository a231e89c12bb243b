"""Checkpoints of the peers, run through transformers' own classes with what our codecs read from them."""

import json
import re
from functools import cache
from pathlib import Path
from types import MethodType
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from fewbit import codecs
from fewbit.codecs import Source
from fewbit.codecs.codec import Codec, Located, Parts
from fewbit.files.checkpoint import open_checkpoint
from fewbit.quant.qtensor import Planes, Quantized
from fewbit.quant.reference import encode, linear
from fewbit.quant.spec import Format, QuantSpec
from tests.codecs.roundtrip import NAME, layout, random_weight, to_meta

FIXTURES = Path(__file__).resolve().parents[3] / "shared" / "fixtures"
EXPERT = re.compile(r"(.*)\.(?:mlp|block_sparse_moe)\.experts\.(\d+)\.(gate_proj|up_proj|down_proj|w1|w2|w3)$")
PARTS = {"gate_proj": "gate", "w1": "gate", "up_proj": "up", "w3": "up", "down_proj": "down", "w2": "down"}


def fixture(name: str) -> Path:
    if not (FIXTURES / name).is_dir():
        pytest.skip(f"{name} is not here: the fixtures of the peers lie beside the repository")
    return FIXTURES / name


@cache
def reference(name: str) -> dict[str, Tensor]:
    return load_file(fixture(name) / "reference.safetensors")


def open_source(name: str) -> Source:
    """A fixture, read without a single problem."""
    source = codecs.open(fixture(name))
    assert not source.problems, source.problems
    return source


def effective(q: Quantized) -> Tensor:
    """[N, K] float32: the matrix that a plain linear would have to hold, transforms and all."""
    return linear(torch.eye(q.weight.shape[-1]), q, activations=False).T.contiguous()


def sampled(name: str, source: Source) -> dict[str, float]:
    """Module -> how far our first rows are from those the peer decoded, relative to their largest value."""
    gaps = {}
    for key, want in reference(name).items():
        if match := re.match(r"dequantized\.(.+)\.weight\[0:(\d+)\]", key):
            got = effective(source.modules[match[1]].read())[: int(match[2])]
            gaps[match[1]] = float((got - want).abs().amax() / want.abs().amax())
    return gaps


def logits(name: str, source: Source, activations: bool) -> Tensor:
    """A float32 forward pass; with activations, every quantized linear is quant.reference.linear."""
    model = build(source, activations)
    with torch.no_grad():
        return model(reference(name)["input_ids"]).logits


def relative(got: Tensor, want: Tensor) -> float:
    return float((got - want).norm() / want.norm())


def build(source: Source, activations: bool) -> nn.Module:
    import transformers

    config = {k: v for k, v in source.config.items() if k not in ("quantization_config", "compression_config")}
    config = transformers.AutoConfig.for_model(**config)
    model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32, attn_implementation="eager")
    held = {module: entry.read() for module, entry in source.modules.items()}
    state = {name: source.read(name).float() for name in source.dense}
    state |= {f"{module}.weight": effective(q) for module, q in held.items()}
    missing, unexpected = model.load_state_dict(_stacked(state), strict=False)
    assert not unexpected and all(name == "lm_head.weight" for name in missing), (missing, unexpected)
    if activations:
        _patch(model, held)
    return model.eval()


def _stacked(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Experts one by one -> the stacks that transformers holds."""
    out, experts = {}, {}
    for name, tensor in state.items():
        if match := EXPERT.match(name.removesuffix(".weight")):
            experts.setdefault(match[1], {})[int(match[2]), PARTS[match[3]]] = tensor
        else:
            out[name.replace("block_sparse_moe.gate", "mlp.gate")] = tensor
    for parent, found in experts.items():
        count = range(1 + max(i for i, _ in found))
        both = [torch.cat([found[i, "gate"], found[i, "up"]]) for i in count]
        out[f"{parent}.mlp.experts.gate_up_proj"] = torch.stack(both)
        out[f"{parent}.mlp.experts.down_proj"] = torch.stack([found[i, "down"] for i in count])
    return out


def _patch(model: nn.Module, held: dict[str, Quantized]) -> None:
    experts: dict[str, dict[tuple[int, str], Quantized]] = {}
    for name, q in held.items():
        if match := EXPERT.match(name):
            experts.setdefault(f"{match[1]}.mlp.experts", {})[int(match[2]), PARTS[match[3]]] = q
        else:
            module = model.get_submodule(name)
            module.forward = MethodType(lambda self, x, q=q: linear(x, q, self.bias), module)
    for name, found in experts.items():
        module = model.get_submodule(name)
        module.forward = MethodType(lambda self, x, i, w, found=found: _experts(self, x, i, w, found), module)


def _experts(module: nn.Module, x: Tensor, index: Tensor, weight: Tensor, found: Any) -> Tensor:
    out = torch.zeros_like(x)
    for expert in range(1 + max(i for i, _ in found)):
        token, place = torch.where(index == expert)
        if len(token):
            y = module.act_fn(linear(x[token], found[expert, "gate"])) * linear(x[token], found[expert, "up"])
            out.index_add_(0, token, linear(y, found[expert, "down"]) * weight[token, place, None])
    return out


def filled(form: Format, n: int = 64, k: int = 256) -> Quantized:
    """A random module with every static scale of its inputs."""
    return Quantized(form, encode(random_weight(n, k), form.weight), _static(form.act) if form.act else {})


def _static(act: QuantSpec) -> Planes:
    planes = {f"scale{i}": torch.full((1, 1), 0.37) for i, scale in enumerate(act.scales) if not scale.dynamic}
    known = act.zeros and not act.zeros[0].dynamic
    return planes | ({"zero0": torch.tensor([[5]], dtype=torch.uint8)} if known else {})


def check(codec: Codec, q: Quantized, folder: Path) -> dict[str, Any]:
    """Write a module and its config, and find them in files again: equal planes, headers and meta that agree."""
    assert codec.write and codec.config
    written = codec.write(q)
    assert layout(codec.write(to_meta(q))) == layout(written)
    files = codec.config({NAME: q.format}, ["lm_head"], None)
    config = files["quantization_config"]
    save_file({NAME + e: t.contiguous() for e, t in written.items()}, folder / "model.safetensors", {"format": "pt"})
    reader, _ = codecs.claimant(Located(json.loads(json.dumps(config)), "config.json: quantization_config"))
    plan = reader.plan(config)
    assert plan.for_module("lm_head")[0] is None
    form, _ = plan.for_module(NAME)
    assert form is not None and reader.name == codec.name
    with open_checkpoint(folder) as checkpoint:
        parts = Parts(checkpoint, NAME, {n.removeprefix(NAME): info for n, info in checkpoint.tensors.items()})
        assert set(parts) <= set(reader.endings)
        found, back = reader.shape(form, parts), reader.read(form, parts)
    assert isinstance(found, Quantized) and same_format(found.format, back.format)
    assert found.weight.shape == back.weight.shape == q.weight.shape
    assert layout(found.weight.planes) == layout(back.weight.planes) and layout(found.act) == layout(back.act)
    assert same_format(back.format, q.format), f"{back.format} is not {q.format}"
    for mine, other in ((back.weight.planes, q.weight.planes), (back.act, q.act)):
        assert mine.keys() == other.keys()
        for name, plane in other.items():
            assert torch.equal(mine[name], plane), name
    for mine, other in zip(back.transforms, q.transforms, strict=True):
        assert all(torch.equal(mine.tensors[name], tensor) for name, tensor in other.tensors.items())
    return files


def same_format(a: Format, b: Format) -> bool:
    """Equal in all that a file can say: how scales were chosen is not in it."""
    acts = (a.act and a.act.stored) == (b.act and b.act.stored)
    return a.weight.stored == b.weight.stored and acts and a.transforms == b.transforms
