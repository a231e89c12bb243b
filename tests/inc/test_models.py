"""MEASURE, then QUANTIZE, on tiny models of four architectures, against transformers' own with plain hooks."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from fewbit import LLM, SamplingParams
from fewbit.inc.session import Session
from fewbit.models.build import load
from tests.inc import emulate
from tests.models import saved

PROMPTS = [[5, 6, 7, 8, 9, 30, 31], [20, 21, 22], [100, 5, 60, 61, 62, 63, 64, 65, 66, 9, 9, 12]]
MODELS = ["llama", "qwen3", "gemma3_text", "mixtral"]
GREEDY = {"temperature": 0.0, "ignore_eos": True}


@pytest.fixture(autouse=True, scope="module")
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def config(folder: Path, **keys: Any) -> Path:
    path = folder / f"{len(list(folder.glob('*.json')))}.json"
    path.write_text(json.dumps({"dump_stats_path": str(folder / "out" / "inc"), **keys}))
    return path


def generate(path: Path, quant: Path, prompts: Any = PROMPTS, tokens: int = 4, **options: Any) -> list[list[int]]:
    llm = LLM(str(path), quantization="inc", quant_config=str(quant), dtype="float32", **options)
    try:
        found = llm.generate(prompts, SamplingParams(max_tokens=tokens, **GREEDY))
    finally:
        llm.llm_engine.model_executor.shutdown()
    return [p + list(one.outputs[0].token_ids) for p, one in zip(prompts, found, strict=True)]


@pytest.fixture(scope="module", params=MODELS)
def measured(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[list[int]]]:
    """A checkpoint whose folder has measurements, and the texts that were measured."""
    path = saved.save(saved.model(request.param), tmp_path_factory.mktemp("inc") / request.param)
    return path, generate(path, config(path, mode="MEASURE"))


def logits(model: Any) -> Tensor:
    with torch.no_grad():
        return torch.cat([model(torch.tensor([ids])).logits[0] for ids in PROMPTS])


def quantized(path: Path, quant: Path, cached: bool = True) -> Any:
    """As an engine loads it, with attention in plain torch."""
    session = Session(quant)
    session.plan(path, cached)
    model = load(path, dtype="float32", format=session.arrives, kv=session.becomes.kv)
    session.loaded(model)
    return model


def test_what_is_measured(measured: tuple[Path, list[list[int]]]) -> None:
    """Prompts in one batch and decoding over pages see what hooks on transformers' model see of the same texts."""
    path, texts = measured
    nodes = json.loads((path / "out" / "inc_hooks_maxabs.json").read_text())["Nodes"]
    theirs = emulate.model(path)
    with emulate.measured(theirs) as want, torch.no_grad():
        for ids in texts:
            theirs(torch.tensor([ids[:-1]]), logits_to_keep=4)
    for name, held in want.items():
        moe = name.endswith("moe_op")
        for at, amax in held.items():
            states = nodes[name]["outputs" if at and (moe or name.endswith("softmax")) else "inputs"]
            found = states[0 if name.endswith("softmax") else at][0][0]
            assert found == pytest.approx(amax, rel=1e-4), (name, at)
    linears = {emulate.node_name(n): 0.0 for n, m in theirs.named_modules() if isinstance(m, torch.nn.Linear)}
    for name, module in theirs.named_modules():
        if isinstance(module, torch.nn.Linear):
            node = emulate.node_name(name)
            linears[node] = max(linears[node], float(module.weight.detach().abs().max()))
    assert {n: nodes[n]["params"]["weight"][0][0] for n in linears} == linears
    assert set(want) <= set(nodes)
    assert json.loads((path / "out" / "inc_hooks_maxabs_mod_list.json").read_text()) == list(nodes)


CASES = [  # method, device, number type
    ("maxabs_hw", "GAUDI2", "E4M3"),
    ("maxabs_hw", "GAUDI3", "E4M3"),
    ("maxabs_pow2", "GAUDI2", "E4M3"),
    ("maxabs_pow2", "GAUDI3", "E5M2"),
    ("maxabs_arbitrary", "GAUDI3", "E4M3"),
    ("maxabs_hw_opt_weight", "GAUDI2", "E4M3"),
    ("maxabs_pow2_opt_weight", "GAUDI3", "E4M3"),
    ("act_maxabs_hw_weights_pcs_maxabs_pow2", "GAUDI2", "E4M3"),
    ("act_maxabs_pow2_weights_pcs_opt_pow2", "GAUDI3", "E4M3"),
    ("unit_scale", "GAUDI2", "E4M3"),
    ("hw_aligned_single_scale", "GAUDI3", "E5M2"),
]


@pytest.mark.parametrize("case", CASES, ids="-".join)
def test_logits(measured: tuple[Path, list[list[int]]], case: tuple[str, str, str]) -> None:
    path, _ = measured
    method, *unit = case
    quant = config(path, mode="QUANTIZE", scale_method=method, device_for_scales=unit[0], fp8_config=unit[1])
    ours = logits(quantized(path, quant))
    emulated = emulate.model(path)
    head = ("lm_head",) if emulated.config.tie_word_embeddings else ()
    emulate.Emulation(emulated, path / "out" / "inc_hooks_maxabs.json", method, (unit[0], unit[1]), head)
    want = logits(emulated)
    dense = logits(emulate_nothing(path))
    noise = float((want - dense).norm())
    assert float((ours - want).norm()) < 0.02 * noise, (float((ours - want).norm()), noise)
    assert noise > 1e-3 * float(dense.norm())


def emulate_nothing(path: Path) -> Any:
    model = emulate.model(path)
    for module in (*emulate.attentions(model).values(), *emulate.stacks(model).values()):
        module.plain = lambda what, x, e=0: x
    return model
