"""Which runner an architecture can have, decided by its twin: tokens packed over a paged cache, or each text alone."""

import math
from dataclasses import replace
from typing import Any

import torch

from fewbit.engine.params import SamplingParams
from fewbit.engine.request import Request, Stream
from fewbit.engine.runner import Alone, Paged
from fewbit.engine.scheduler import Work
from fewbit.models import hf, twin
from fewbit.models.shrink import shrink
from fewbit.modules import paged

SIZE = 4  # tokens of a page of the twin
CACHES = ("past_key_values", "cache_params")
CHUNK = 7  # tokens at a time: neither pages nor windows end there

hf.register_unmasked_attention(paged.NAME, paged.forward)
_SEEN: dict[str, twin.Verdict] = {}


def check(config: Any) -> twin.Verdict:
    """Two ragged texts in chunks, then a step of one token each, against eager transformers."""
    small = shrink(config)
    key = type(config).__name__ + small.to_json_string(use_diff=False)
    if key not in _SEEN:
        try:
            _SEEN[key] = twin.Verdict(_error(small), paged.NAME)
        except Exception as error:  # whatever a model definition raises without masks and caches is the finding
            _SEEN[key] = twin.Verdict(math.inf, paged.NAME, f"{type(error).__name__}: {twin.first_line(error)}")
    return _SEEN[key]


def attention(config: Any) -> str:
    """What `load` is to build with."""
    return paged.NAME if check(config).exact else twin.require(config)


def cache_of(config: Any) -> str:
    """The cache of transformers' own with which an architecture that has no pages goes on exactly, "" for none."""
    small = shrink(config)
    attention = twin.require(config)
    for name in CACHES:
        try:
            if _goes_on(small, attention, name):
                return name
        except Exception:  # an argument that the class does not have, a state that cannot be carried
            continue
    return ""


def _goes_on(small: Any, attention: str, name: str) -> bool:
    ids = torch.randint(10, 100, (1, twin.LENGTH + 1), generator=torch.Generator().manual_seed(0))[0].tolist()
    _, model = twin.filled(small, attention)
    stream = Stream(Request("0", ids[:-3], SamplingParams()), 0, 0, ids[:-3])
    runner, whole = Alone(model, name), Alone(model, "")
    start = 0
    for token in [*ids[-3:], 0]:
        work = Work(stream, start, len(stream.tokens))
        got, want = runner.run([work]).rows, whole_run(whole, work)
        if twin.relative(got, want) > twin.LIMIT:
            return False
        start = len(stream.tokens)
        stream.tokens.append(token)
    return True


def whole_run(runner: Alone, work: Work) -> torch.Tensor:
    """The same work on a stream that holds nothing."""
    return runner.run([Work(replace(work.stream, state=None), 0, work.stop)]).rows


def _error(small: Any) -> float:
    truth = twin.random(small)
    ids = torch.randint(10, 100, (2, twin.LENGTH + 1), generator=torch.Generator().manual_seed(0))
    lengths = (twin.LENGTH + 1, twin.LENGTH - 4)
    with torch.no_grad():
        expected = [truth(input_ids=row[None, :n]).logits[0] for row, n in zip(ids, lengths, strict=True)]
    _, model = twin.filled(small, paged.NAME)
    runner = Paged(model, 16, SIZE, None)
    everything = SamplingParams(prompt_logprobs=0)
    streams = [Stream(Request(str(i), row[:n].tolist(), everything), 0, 0, row[:n].tolist())
               for i, (row, n) in enumerate(zip(ids, lengths, strict=True))]  # fmt: skip
    for i, stream in enumerate(streams):
        stream.pages = list(range(14 - 8 * i, 6 - 8 * i, -1))  # in no order that memory has
    got: list[list[torch.Tensor]] = [[], []]
    starts = [0, 0]
    while any(s < n for s, n in zip(starts, lengths, strict=True)):
        works = []
        for i, stream in enumerate(streams):
            last = lengths[i] - 1  # computed alone, as a step of one token
            stop = min(starts[i] + CHUNK, last) if starts[i] < last else lengths[i]
            if starts[i] < stop:
                works.append(Work(stream, starts[i], stop))
                starts[i] = stop
        for work, logits in zip(works, runner.run(works).each(), strict=True):
            got[int(work.stream.request.id)].append(logits)
    return max(twin.relative(torch.cat(g), e) for g, e in zip(got, expected, strict=True))
