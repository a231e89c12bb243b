"""A user's own checkpoints: FEWBIT_TEST_CHECKPOINTS=a:b pytest -m checkpoints, or make fixtures DIR=a."""

from pathlib import Path

import pytest
import torch

import fewbit
from fewbit import codecs, env
from fewbit.quant.qtensor import Quantized
from fewbit.workflows.refit import effective
from tests.checkpoints.compare import logits, relative

OWN = env.test_checkpoints()


def found() -> list[Path]:
    """The checkpoints under the folders given: a folder with a config, or GGUF files."""
    paths = []
    for root in OWN:
        inside = [p.parent for p in root.rglob("config.json")] + list(root.rglob("*.gguf"))
        paths += sorted(inside) or [root]
    return paths


@pytest.mark.checkpoints
@pytest.mark.skipif(not OWN, reason="FEWBIT_TEST_CHECKPOINTS names no folder")
@pytest.mark.parametrize("path", found(), ids=str)
def test_own_checkpoint(path: Path) -> None:
    """Weights only: our logits against transformers' own model class filled with the decoded weights."""
    findings = [f for f in fewbit.verify(path) if f.severity == "error"]
    assert findings == [], "\n".join(map(str, findings))
    from fewbit.models import hf

    ids = torch.randint(0, 100, (2, 16), generator=torch.Generator().manual_seed(0))
    ours = logits(fewbit.load(path, dtype=torch.float32, activations="off"), ids)
    with codecs.open(path) as source:
        config = hf.read_config(source.config)
        state = {}
        for name in [*source.modules, *source.dense]:
            value = source.read(name)
            weight = effective(value) if isinstance(value, Quantized) else value
            state[f"{name}.weight" if name in source.modules else name] = weight.float()
    theirs = hf.model_class(config).from_pretrained(None, config=config, state_dict=state, dtype=torch.float32)
    with torch.inference_mode():
        error = relative(ours, theirs.eval()(ids).logits)
    print(f"{path}: relative error {error:.2e}")
    assert error <= 1e-3
