"""In bfloat16 on a CPU with matrix units a request's logits are the same bits alone and in company.

That holds where its prompt is cut alike: torch's attention rounds otherwise when a chunk starts elsewhere. Where a
kernel of ours takes prompts, and linears add whole numbers, they are the same wherever it is cut.
"""

import itertools
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from fewbit.engine import proof
from fewbit.engine.params import SamplingParams
from fewbit.engine.request import Request, Stream
from fewbit.engine.runner import Paged
from fewbit.engine.scheduler import Work
from fewbit.kernels import attend, tiles
from fewbit.models import build
from tests.tiny import llama

TILED = pytest.mark.skipif(tiles.native() is None, reason="no matrix units (AMX) here")
OURS = attend.prompts(torch.zeros(1, dtype=torch.bfloat16), explicit=False) and tiles.vectors() is not None
LENGTHS = (37, 33, 6, 60, *range(2, 18))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return llama(tmp_path_factory.mktemp("invariance") / "model", num_hidden_layers=2, hidden_size=256,
                 intermediate_size=512, num_attention_heads=4, num_key_value_heads=2, head_dim=64)  # fmt: skip


def streams(count: int) -> list[Stream]:
    found, page = [], 0
    for i, length in enumerate(LENGTHS[:count]):
        draw = torch.Generator().manual_seed(i)
        ids = torch.randint(10, 90, (length,), generator=draw).tolist()
        found.append(Stream(Request(str(i), ids, SamplingParams()), 0, 0, list(ids)))
        found[-1].pages = list(range(page, page + 5))
        page += 5
    return found


def logits(model: Any, company: int) -> Tensor:
    """Of the first stream: after its prompt, and after each of three more tokens."""
    runner, held = Paged(model, 5 * len(LENGTHS), 16, None), streams(company)
    found = [runner.run([Work(s, 0, len(s.tokens)) for s in held]).each()[0][-1]]
    for token in (7, 8, 9):
        for stream in held:
            stream.tokens.append(token)
        found.append(runner.run([Work(s, len(s.tokens) - 1, len(s.tokens)) for s in held]).each()[0][-1])
    return torch.stack(found)


@TILED
@pytest.mark.parametrize("format", [None, "int4-g128", "int8-channel-a8", "q4_0"])
def test_the_same_bits(folder: Path, format: str | None) -> None:
    model = build.load(folder, dtype="bfloat16", format=format, attend=proof.attention)
    alone = logits(model, 1)
    for company in (2, 7, len(LENGTHS)):
        assert torch.equal(logits(model, company), alone), company


@pytest.mark.skipif(not OURS, reason="prompts go to torch here, or whole numbers have no unit")
@pytest.mark.parametrize("cuts", [(20,), (5, 12), (31,), (32,)])
def test_the_same_bits_wherever_a_prompt_is_cut(folder: Path, cuts: tuple[int, ...]) -> None:
    """Pieces of 5 tokens and more: fewer are attended to one by one, without rounding their weights."""
    model = build.load(folder, dtype="bfloat16", format="int8-channel-a8", attend=proof.attention)
    found = []
    for stops in ((), cuts):
        runner, (stream,) = Paged(model, 5, 16, None), streams(1)
        bounds = [0, *stops, len(stream.tokens)]
        found.append([runner.run([Work(stream, *span)]).each()[0] for span in itertools.pairwise(bounds)][-1][-1])
    assert torch.equal(*found)
