"""What a CUDA graph computes, without one: numbers packed to a size, and rows and streams of nobody among the others.

Triton's interpreter runs attention's kernels; tests/gpu/test_engine.py records and replays.
"""

from collections.abc import Sequence
from pathlib import Path

import pytest
import torch

from fewbit.engine.batch import Batch
from fewbit.engine.config import EngineConfig
from fewbit.engine.graph import ROWS, Graphs, Size
from fewbit.engine.params import SamplingParams
from fewbit.engine.request import Request, Stream
from fewbit.engine.runner import Paged
from fewbit.engine.scheduler import Work
from fewbit.engine.start import load
from fewbit.engine.tables import Tables
from fewbit.kernels.table import BLOCK
from fewbit.kernels.triton_runtime import lacking
from tests.kernels.conftest import loops_of_the_interpreter  # noqa: F401, used by being here
from tests.tiny import llama

CPU = torch.device("cpu")
LACKING = lacking(CPU)
pytestmark = pytest.mark.skipif(LACKING is not None or torch.cuda.is_available(), reason=str(LACKING))
PAGE, PAGES, REACH = 16, 48, 256
STEPS = {  # (stream, start, stop), step by step
    "a prompt": [[(0, 0, 5)]],
    "a prompt longer than a block of rows": [[(0, 0, BLOCK + 3)]],
    "a prompt in chunks": [[(0, 0, 20)], [(0, 20, 41)]],
    "a prompt beside single tokens": [
        [(0, 0, 7), (1, 0, 1)], [(0, 7, 8), (2, 0, 18), (1, 1, 2)], [(0, 8, 9), (2, 18, 19)]],
    "single tokens": [[(0, 0, 1), (1, 0, 1)], [(0, 1, 2)]],
}  # fmt: skip


def stream(number: int) -> Stream:
    """Its text is a prompt, and the last of its tokens is yet to be computed."""
    each = PAGES // 3
    ids = [(7 * number + 3 * at) % 250 for at in range(200)]
    pages = list(range(number * each, (number + 1) * each))
    return Stream(Request(str(number), ids, SamplingParams()), 0, 0, ids, pages=pages[::-1])


def works(step: Sequence[tuple[int, int, int]], streams: Sequence[Stream]) -> list[Work]:
    for number, _, stop in step:
        streams[number].tokens = streams[number].tokens[:stop]
    return [Work(streams[number], start, stop) for number, start, stop in step]


@pytest.mark.parametrize("name", STEPS)
def test_the_logits_of_a_step_without_it(name: str, tmp_path: Path) -> None:
    path = llama(tmp_path / "model", num_attention_heads=2, num_key_value_heads=1, head_dim=16, hidden_size=32,
                 intermediate_size=64, max_position_embeddings=REACH)  # fmt: skip
    loaded = load(EngineConfig.of(model=str(path), device="cpu", dtype="float32"))
    plain, recorded = (Paged(loaded.model, PAGES, PAGE, None) for _ in range(2))
    tables = Tables(4, REACH // PAGE, CPU)
    graphs = Graphs(tables, PAGE, REACH, recorded.capacity, recorded._step, recorded._model, 2048)
    ways = [[stream(i) for i in range(3)] for _ in range(2)]
    whole = [list(s.tokens) for s in ways[0]]
    for step in STEPS[name]:
        for streams in ways:
            for held, tokens in zip(streams, whole, strict=True):
                held.tokens = list(tokens)
        want = plain.run(works(step, ways[0])).rows
        batch = Batch.of(works(step, ways[1]), PAGE)
        size = graphs.size(batch)
        assert size is not None
        with torch.inference_mode():
            graphs._send_batch(size, batch)
            found = graphs._run(size)
        assert bool(found.isfinite().all())
        torch.testing.assert_close(found[: len(batch.asked)], want, rtol=1e-4, atol=1e-5)


def test_sizes() -> None:
    """Each step gets the smallest that has room; what asks for more than a graph has runs without one."""
    graphs = Graphs(Tables(20, 16, CPU), PAGE, REACH, 0, lambda **_: None, lambda *_: torch.zeros(1), 100)
    assert [(size.rows, size.streams) for size in graphs.sizes] == [
        (1, 1), (2, 2), (4, 4), (8, 8), (16, 16), (20, 20), (16, 16), (32, 20), (64, 20), (128, 20)]  # fmt: skip
    ones = [Work(stream(0), 0, 1) for _ in range(3)]
    for held in ones:
        held.stream.tokens = held.stream.tokens[:1]
    prompt, unfinished = Work(stream(1), 0, 200), Work(stream(1), 0, 30)
    for given, want in (
        (ones, Size(4, 4)),
        ([*ones, unfinished], Size(64, 20, 16)),
        ([unfinished], Size(32, 20, 16)),
        ([Work(stream(1), 0, 1)], Size(16, 16, 16)),  # no logits are wanted of it
        ([prompt], None),
        ([*ones, *ones, *ones, *ones, *ones, *ones, *ones], None),
    ):
        assert graphs.size(Batch.of(given, PAGE)) == want
    assert sorted(ROWS) == list(ROWS)
