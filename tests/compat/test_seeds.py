"""The code in the documentation of both tools, run as it stands: import lines, paths and the hub's data aside."""

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch

import fewbit
from tests.compat import small

SEEDS = Path(__file__).parents[3] / "shared" / "seeds"
SWAPS = {
    "import modelopt.torch.quantization as mtq": "import fewbit.compat.modelopt as mtq",
    "from modelopt.torch.export import": "from fewbit.compat.modelopt import",
    "from auto_fp8 import": "from fewbit.compat.autofp8 import",
    "from datasets import load_dataset\n": "",
    '.to("cuda")': "",
}


def blocks(file: str, having: str) -> list[str]:
    """Code blocks of a page, their indent taken off, with our imports."""
    if not (SEEDS / file).is_file():
        pytest.skip(f"{file} is not beside the repository")
    text = (SEEDS / file).read_text()
    fenced = re.findall(r"^( *)```python\n(.*?)^ *```", text, re.M | re.S)
    fenced += [("    ", body) for body in re.findall(r"^\.\. code-block:: python\n((?:    .*\n|\n)+)", text, re.M)]
    found = []
    for indent, body in fenced:
        code = "\n".join(line.removeprefix(indent) for line in body.splitlines())
        if having in code:
            for old, new in SWAPS.items():
                code = code.replace(old, new)
            found.append(code)
    return found


@pytest.fixture
def base(tmp_path: Path) -> Path:
    return small.folder(tmp_path / "base")


def test_modelopt(base: Path, tmp_path: Path) -> None:
    (quantize,) = blocks("modelopt_checkpoints_in_vllm.md", "mtq.quantize")
    (export,) = blocks("modelopt_checkpoints_in_vllm.md", "export_hf_checkpoint(")
    here: dict[str, Any] = {"calib_set": [row[None] for row in small.ids()], "export_dir": str(tmp_path / "out")}
    exec(quantize.replace("<path_or_model_id>", str(base)), here)
    exec(export, here)
    tensors = small.sound(tmp_path / "out")
    assert tensors["model.layers.1.mlp.up_proj.weight"].dtype == torch.float8_e4m3fn
    assert tensors["model.layers.1.mlp.up_proj.input_scale"].shape == ()
    config = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]
    assert (config["quant_method"], config["quant_algo"], config["ignore"]) == ("modelopt", "FP8", ["lm_head"])
    agreeing(tmp_path / "out", here["model"])


def agreeing(out: Path, model: Any) -> None:
    got, want = small.logits(fewbit.load(out, kernels="reference")).float(), small.logits(model).float()
    assert torch.nn.functional.cosine_similarity(got.flatten(), want.flatten(), 0) > 0.999


class Texts(list[dict[str, Any]]):
    """Stands for a data set of the hub."""

    def select(self, rows: range) -> "Texts":
        return self


def load_dataset(name: str, split: str) -> Texts:
    return Texts({"messages": [{"role": "user", "content": text}]} for text in small.TEXTS)


@pytest.mark.parametrize("scheme", ["dynamic", "static"])
def test_autofp8(scheme: str, base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (code,) = blocks("fp8_and_autofp8.md", f'activation_scheme="{scheme}"')
    out = tmp_path / "out"
    code = re.sub(r'(pretrained_model_dir =) ".*"', rf'\1 "{base}"', code)
    code = re.sub(r'(quantized_model_dir =) ".*"', rf'\1 "{out}"', code)
    here: dict[str, Any] = {"load_dataset": load_dataset}
    exec(code, here)
    printed = capsys.readouterr().out
    assert f"(q_proj): FP8{scheme.title()}Linear()" in printed and f"Saving the model to {out}\n" in printed
    assert fewbit.verify(out) == []
    names = {path.name for path in out.iterdir()}
    assert {"config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"} <= names
    agreeing(out, here["model"])
