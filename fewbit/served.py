"""A model emulated and the same model really quantized, both served: whether they say the same, and if not, why.

Both hold the same codes under the same scales; one multiplies their values as floats, the other runs the kernels that
are made for codes. Greedy texts go on from the shipped text. Where they part, every linear of the one is given what the
other's saw: the first whose outputs differ is named, with how far apart they are.
"""

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fewbit.compat import fakequant
from fewbit.engine.params import SamplingParams
from fewbit.kernels.registry import EMULATED
from fewbit.kernels.select import select
from fewbit.llm import LLM
from fewbit.models import build
from fewbit.models.emulation import read
from fewbit.models.text import tokenizer
from fewbit.modules.linear import Linear
from fewbit.quant.formats import get
from fewbit.workflows.calibration import calibration

PROMPT, EACH = 32, 64  # tokens of a prompt, and of what follows
CALIBRATED = 16  # texts that static scales come from: the same for both, so it need not be many


@dataclass(frozen=True, slots=True)
class Served:
    """tokens: compared; same: until each text parted; parted: (prompt, token) of the first. why: "" if none."""

    format: str
    kernel: str
    tokens: int
    same: int
    parted: tuple[int, int] | None
    why: str = ""

    @property
    def ok(self) -> bool:
        return self.parted is None or bool(self.why)

    def to_json(self) -> dict[str, Any]:
        return asdict(self) | {"ok": self.ok}

    def __str__(self) -> str:
        told = f"{self.format} on {self.kernel}: {self.same} of {self.tokens} greedy tokens are the emulation's"
        if self.parted is None:
            return told
        return f"{told}; text {self.parted[0]} parts at token {self.parted[1]}: {self.why or 'nothing explains it'}"


def certify(model: str | Path, form: str, tokens: int = 2000, device: str = "cpu", kernel: str = "auto",
            dtype: str = "bfloat16") -> Served:  # fmt: skip
    """kernel: of the really quantized one; auto: the fastest of the device."""
    if kernel == "auto":
        kernel = select("linear", get(form), torch.device(device), getattr(torch, dtype))[0].name
    prompts = calibration(tokenizer(model), None, samples=-(-tokens // EACH), length=PROMPT).ids
    asked = [torch.as_tensor(ids).tolist() for ids in prompts]
    options = {"model": str(model), "fakequant": form, "device": device, "dtype": dtype,
               "calib_size": CALIBRATED, "max_model_len": PROMPT + EACH + 1}  # fmt: skip
    wanted, found = (said(asked, options | {"kernels": name}) for name in (EMULATED, kernel))
    same, parted = compared(wanted, found)
    why = "" if parted is None else guilty(asked[parted[0]] + wanted[parted[0]], options, kernel)
    return Served(form, kernel, sum(map(len, wanted)), same, parted, why)


def said(prompts: list[list[int]], options: dict[str, Any]) -> list[list[int]]:
    """The tokens of each text."""
    greedy = SamplingParams(max_tokens=EACH, temperature=0.0, ignore_eos=True, detokenize=False)
    with LLM(**options) as llm:
        return [list(out.outputs[0].token_ids) for out in llm.generate(prompts, greedy, use_tqdm=False)]


def compared(wanted: list[list[int]], found: list[list[int]]) -> tuple[int, tuple[int, int] | None]:
    """-> how many tokens are the same until each text parts, and where the first parts."""
    same, first = 0, None
    for i, (a, b) in enumerate(zip(wanted, found, strict=True)):
        at = next((j for j, (x, y) in enumerate(zip(a, b, strict=True)) if x != y), None)
        same += len(a) if at is None else at
        first = first or (None if at is None else (i, at))
    return same, first


@torch.no_grad()
def guilty(text: list[int], options: dict[str, Any], kernel: str) -> str:
    """The first linear that gives other outputs than the emulation's for the same inputs, "" for none."""
    with fakequant.prepared(options) as config:
        assert config.emulation is not None
        held = read(config.emulation)
    loads = {"device": options["device"], "dtype": options["dtype"], "format": held.arrivals, "kv": held.sides}
    emulated, real = (build.load(options["model"], kernels=name, **loads) for name in (EMULATED, kernel))
    theirs, seen = dict(real.named_modules()), []

    def look(path: str, module: Linear, x: Tensor) -> None:
        for some in () if seen else (x, x[..., -1:, :]):  # a prompt, a token: few rows may take other kernels
            y = module.forward(some).float()
            off = float((theirs[path](some).float() - y).norm() / y.norm())
            if off and not seen:
                why = f"{kernel} rounds or adds in another order, within the bound that `fewbit certify` shows"
                seen.append(f"first at {path}, {off:.1e} apart on the same inputs: {why}")

    for path, module in emulated.named_modules():
        if isinstance(module, Linear) and module.parts:
            module.register_forward_pre_hook(hook(path, look))
    emulated(torch.tensor([text], device=options["device"]), use_cache=False)
    return seen[0] if seen else ""


def hook(path: str, look: Any) -> Any:
    def run(module: nn.Module, args: tuple[Tensor, ...]) -> None:
        look(path, module, args[0])

    return run
