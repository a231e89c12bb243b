"""Prompts padded on the left generate, token for token, what transformers does; float16 works on a CPU."""

from pathlib import Path

import pytest
import torch

from fewbit.models.build import load
from tests.models import saved


@pytest.mark.parametrize("model_type", ["llama", "gemma3_text"])
def test_left_padding(model_type: str, tmp_path: Path) -> None:
    theirs = saved.model(model_type)
    ours = load(saved.save(theirs, tmp_path), dtype=torch.float32)
    lengths = (12, 3, 7)
    ids = torch.randint(10, 90, (3, 12), generator=torch.Generator().manual_seed(1))
    mask = torch.stack([torch.arange(12) >= 12 - n for n in lengths]).long()
    ids = ids * mask
    settings = {"max_new_tokens": 12, "min_new_tokens": 12, "do_sample": False, "pad_token_id": 0}
    want = theirs.generate(ids, attention_mask=mask, **settings)
    assert torch.equal(ours.generate(ids, attention_mask=mask, **settings), want)
    for row, n in enumerate(lengths):
        alone = ours.generate(ids[row : row + 1, 12 - n :], **settings)
        assert torch.equal(alone[0, n:], want[row, 12:])


@pytest.mark.parametrize("model_type", ["llama", "gemma3_text", "mixtral"])
@pytest.mark.parametrize("form", [None, "int4-g32", "fp8-channel-a16"])
def test_float16(model_type: str, form: str | None, tmp_path: Path) -> None:
    folder = saved.save(saved.model(model_type), tmp_path)
    single, half = (saved.logits(load(folder, dtype=dtype, format=form)) for dtype in (torch.float32, torch.float16))
    assert half.dtype == torch.float16 and half.isfinite().all()
    assert (half.float() - single).abs().max() <= 0.02 * single.abs().max()
