"""One peer's quantization, run by the Python of that peer's own environment; nothing of fewbit is imported.

    python ptq_peers.py TOOL SCHEME DENSE_MODEL OUT calib.txt

On the CPU, with the first 128 x 512 tokens of the text in order. Prints one line of JSON: seconds of quantizing (no
import, no loading; writing only where the tool does both in one call: autoround), peak resident MiB, version of the
tool. What the tool prints goes to stderr. benchmarks/ptq.py takes `rows` from here and runs them.

Schemes: fp8, nvfp4, w8a8, and w4-g64-sym-rtn and so on (bits, group length, sym or asym, algorithm, and iterations of
autoround).
"""

import copy
import json
import os
import re
import resource
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

SAMPLES, LENGTH = 128, 512
PACKAGES = {
    "llmcompressor": "llmcompressor", "gptqmodel": "gptqmodel", "autoround": "auto-round",
    "modelopt": "nvidia-modelopt",
}  # fmt: skip
# what pip installs into a peer's environment; some ask for a torch that others do not take
TORCH = "torch>=2.11,<2.14"
NEEDS = {
    "llmcompressor": ["llmcompressor==0.14.*", TORCH], "gptqmodel": ["gptqmodel==7.*", TORCH],
    "autoround": ["auto-round==0.16.*", TORCH], "modelopt": ["nvidia-modelopt[hf]==0.47.*", TORCH],
}  # fmt: skip
Steps = tuple[Callable[[], Any], Callable[[], Any]]  # quantize, then write


@dataclass(frozen=True, slots=True)
class Grouped:
    """Integer weights in groups, as a scheme names them."""

    bits: int
    group: int
    symmetric: bool
    algorithm: str
    iters: int


def rows(group: int = 64) -> list[dict[str, str]]:
    """What is run: label (chosen by --rows), tool, scheme. W2 keeps groups of 64, as our rows do."""
    w4, w3, l4, l3 = f"w4-g{group}", f"w3-g{group}", f"W4 g{group}", f"W3 g{group}"
    table = [
        (f"{l4} sym rtn", "llmcompressor", f"{w4}-sym-rtn"),
        (f"{l4} asym rtn", "llmcompressor", f"{w4}-asym-rtn"),
        (f"{l4} sym gptq", "llmcompressor", f"{w4}-sym-gptq"),
        ("FP8 dynamic", "llmcompressor", "fp8"),
        ("INT8 W8A8 smooth+gptq", "llmcompressor", "w8a8"),
        ("NVFP4 W4A4 rtn", "llmcompressor", "nvfp4"),
        (f"{l4} sym gptq", "gptqmodel", f"{w4}-sym-gptq"),
        (f"{l3} sym gptq", "gptqmodel", f"{w3}-sym-gptq"),
        ("W2 g64 sym gptq", "gptqmodel", "w2-g64-sym-gptq"),
        (f"{l4} sym autoround 20", "autoround", f"{w4}-sym-autoround-20"),
        (f"{l4} sym autoround 200", "autoround", f"{w4}-sym-autoround-200"),
        (f"{l3} sym autoround 20", "autoround", f"{w3}-sym-autoround-20"),
        (f"{l3} sym autoround 200", "autoround", f"{w3}-sym-autoround-200"),
        ("W2 g64 sym autoround 20", "autoround", "w2-g64-sym-autoround-20"),
        ("W2 g64 sym autoround 200", "autoround", "w2-g64-sym-autoround-200"),
        (f"{l4} sym awq", "modelopt", f"{w4}-sym-awq"),
        ("FP8 static rtn", "modelopt", "fp8"),
        ("NVFP4 W4A4 rtn", "modelopt", "nvfp4"),
    ]
    return [{"label": label, "tool": tool, "scheme": scheme} for label, tool, scheme in table]


def grouped(scheme: str, algorithms: str, signs: str = "sym|asym", bits: str = "[2348]") -> Grouped:
    """The parts of a scheme, of those that the tool has."""
    found = re.fullmatch(rf"w({bits})-g(\d+)-({signs})-({algorithms})(?:-(\d+))?", scheme)
    if not found:
        raise SystemExit(f"scheme {scheme}: not one of this tool's; what works: those of `rows`")
    width, group, sign, algorithm, iters = found.groups()
    return Grouped(int(width), int(group), sign == "sym", algorithm, int(iters or 200))


def samples(dense: Path, text: Path) -> list[list[int]]:
    from transformers import AutoTokenizer

    stream = AutoTokenizer.from_pretrained(dense)(text.read_text(encoding="utf-8"), verbose=False)["input_ids"]
    ends = range(LENGTH, min(len(stream), SAMPLES * LENGTH) + 1, LENGTH)
    return [stream[end - LENGTH : end] for end in ends]


def loaded(dense: Path) -> Any:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(dense, dtype="auto").eval()


def recipe(scheme: str) -> list[Any]:
    """llmcompressor's modifiers."""
    from llmcompressor.modifiers.quantization import GPTQModifier, QuantizationModifier
    from llmcompressor.modifiers.transform.smoothquant import SmoothQuantModifier

    linears = {"targets": "Linear", "ignore": ["lm_head"]}
    if scheme in ("fp8", "nvfp4"):
        return [QuantizationModifier(scheme={"fp8": "FP8_DYNAMIC", "nvfp4": "NVFP4"}[scheme], **linears)]
    if scheme == "w8a8":
        return [SmoothQuantModifier(smoothing_strength=0.8), GPTQModifier(scheme="W8A8", **linears)]
    of = grouped(scheme, "rtn|gptq")
    weights = {"num_bits": of.bits, "type": "int", "symmetric": of.symmetric, "strategy": "group",
               "group_size": of.group}  # fmt: skip
    groups = {"config_groups": {"group_0": {"targets": ["Linear"], "weights": weights}}, "ignore": ["lm_head"]}
    return [GPTQModifier(actorder="weight", **groups) if of.algorithm == "gptq" else QuantizationModifier(**groups)]


def llmcompressor(scheme: str, dense: Path, out: Path, text: Path) -> Steps:
    from datasets import Dataset
    from llmcompressor import oneshot
    from transformers import AutoTokenizer

    model, tokenizer, ids = loaded(dense), AutoTokenizer.from_pretrained(dense), samples(dense, text)
    data = Dataset.from_dict({"input_ids": ids, "attention_mask": [[1] * LENGTH] * len(ids)})

    def quantize() -> None:
        oneshot(model=model, tokenizer=tokenizer, recipe=recipe(scheme), dataset=data, max_seq_length=LENGTH,
                num_calibration_samples=len(ids), shuffle_calibration_samples=False)  # fmt: skip

    return quantize, lambda: model.save_pretrained(out, save_compressed=True)


def gptqmodel(scheme: str, dense: Path, out: Path, text: Path) -> Steps:
    os.environ.setdefault("GPTQMODEL_CPU_WORKERS", "2")  # its default of half the cores fails below 3 of them
    from gptqmodel import GPTQModel, QuantizeConfig

    of, ids = grouped(scheme, "gptq"), samples(dense, text)
    model = GPTQModel.load(str(dense), QuantizeConfig(bits=of.bits, group_size=of.group, sym=of.symmetric))
    data = [{"input_ids": row, "attention_mask": [1] * LENGTH} for row in ids]
    return lambda: model.quantize(data, batch_size=1), lambda: model.save(str(out))


def autoround(scheme: str, dense: Path, out: Path, text: Path) -> Steps:
    import torch
    from auto_round import AutoRound
    from transformers import AutoTokenizer

    of, ids = grouped(scheme, "autoround"), torch.tensor(samples(dense, text))
    model, tokenizer = loaded(dense), AutoTokenizer.from_pretrained(dense)

    def quantize() -> None:
        tool = AutoRound(model, tokenizer, scheme=f"W{of.bits}A16", group_size=of.group, sym=of.symmetric,
                         iters=of.iters, nsamples=len(ids), seqlen=LENGTH, dataset=list(ids.split(8)),
                         device_map="cpu")  # fmt: skip
        tool.quantize_and_save(str(out), format="auto_round")

    return quantize, lambda: lift(out)


def lift(out: Path) -> None:
    """autoround writes into a folder of its own naming below the one asked for."""
    for folder in [config.parent for config in out.glob("*/config.json")]:
        for file in folder.iterdir():
            file.rename(out / file.name)
        folder.rmdir()


def modelopt(scheme: str, dense: Path, out: Path, text: Path) -> Steps:
    import modelopt.torch.quantization as mtq
    import torch
    from modelopt.torch.export import export_hf_checkpoint

    names = {"fp8": "FP8_DEFAULT_CFG", "nvfp4": "NVFP4_DEFAULT_CFG"}
    config = copy.deepcopy(getattr(mtq, names.get(scheme, "INT4_AWQ_CFG")))
    if scheme not in names:
        in_groups(config, grouped(scheme, "awq", "sym", "4").group)
    model, ids = loaded(dense), torch.tensor(samples(dense, text))

    def forward(model: Any) -> None:
        with torch.inference_mode():
            for row in ids:
                model(row[None], use_cache=False)

    def save() -> None:
        with torch.inference_mode():
            export_hf_checkpoint(model, export_dir=str(out))

    return lambda: mtq.quantize(model, config, forward), save


def in_groups(config: dict[str, Any], group: int) -> None:
    """modelopt's INT4_AWQ comes with groups of 128."""
    for entry in config["quant_cfg"]:
        if entry["quantizer_name"] == "*weight_quantizer" and "cfg" in entry:
            entry["cfg"]["block_sizes"][-1] = group


def carry_tokenizer(dense: Path, out: Path) -> None:
    """Some tools leave it out; ours needs it to measure."""
    for file in dense.glob("*token*"):
        if not (out / file.name).exists():
            (out / file.name).write_bytes(file.read_bytes())


def measured(tool: str, scheme: str, dense: Path, out: Path, text: Path) -> dict[str, Any]:
    tools = {"llmcompressor": llmcompressor, "gptqmodel": gptqmodel, "autoround": autoround, "modelopt": modelopt}
    quantize, save = tools[tool](scheme, dense, out, text)
    begun = time.monotonic()
    quantize()
    seconds = time.monotonic() - begun
    save()
    carry_tokenizer(dense, out)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    return {"seconds": seconds, "peak": peak, "version": version(PACKAGES[tool])}


def main() -> None:
    if len(sys.argv) != 6 or sys.argv[1] not in PACKAGES:
        raise SystemExit(__doc__)
    dense, out, text = (Path(word).resolve() for word in sys.argv[3:])
    answer = os.dup(1)
    os.dup2(2, 1)
    with TemporaryDirectory() as place:
        os.chdir(place)  # the tools drop folders where they stand
        found = measured(sys.argv[1], sys.argv[2], dense, out, text)
        os.chdir("/")
    os.write(answer, (json.dumps(found) + "\n").encode())


if __name__ == "__main__":
    main()
