"""Engine: requests in, deltas out, one step at a time. One thread calls it; nothing here knows of HTTP.

A step is: the scheduler chooses tokens, the runner computes the logits that are wanted, the sampler draws, and each
continuation is told what it was given. Continuations of one request differ by their seeds and share its prompt's pages.

On a GPU a step is begun before the one before it is told: its tokens are PENDING, and stay on the device. Only who
needs to know a token to draw the next one (a grammar, a penalty) makes the engine wait.
"""

import logging
import random
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor

from fewbit.engine.batch import Flight
from fewbit.engine.config import EngineConfig
from fewbit.engine.facts import cache_said, facts, said
from fewbit.engine.guided import Grammars
from fewbit.engine.limits import Limits, limits_of
from fewbit.engine.outputs import Logprob
from fewbit.engine.pages import PagePool
from fewbit.engine.params import SamplingParams
from fewbit.engine.request import PENDING, Delta, Finish, Request, Stream
from fewbit.engine.runner import Logits
from fewbit.engine.sampler import Drawn, Sampled, Sampler, prompt_logprobs
from fewbit.engine.sampler_edits import edited
from fewbit.engine.sampler_row import Row
from fewbit.engine.scheduler import Scheduler, Work
from fewbit.engine.start import Loaded, load
from fewbit.engine.text import Detokenizer, token_text
from fewbit.errors import RequestError
from fewbit.kernels import saturation

LOG = logging.getLogger("fewbit.engine")


@dataclass(slots=True)
class Stats:
    """Where an engine stands; the counters only grow."""

    running: int = 0
    waiting: int = 0
    pages_used: int = 0
    pages_total: int = 0
    prefix_queries: int = 0
    prefix_hits: int = 0
    preemptions: int = 0
    steps: int = 0
    prompt_tokens: int = 0
    generated_tokens: int = 0
    nan_rows: int = 0
    saturated: int = 0


@dataclass(slots=True)
class Begun:
    """A step whose tokens are drawn on the device. places: where in its stream's tokens each is to stand."""

    streams: list[Stream]
    places: list[int]
    drawn: Drawn | None
    knows: bool  # the next step can be begun without these tokens

    @property
    def flight(self) -> Flight | None:
        return None if self.drawn is None else Flight(self.drawn.tokens, {s: i for i, s in enumerate(self.streams)})


class Engine:
    """config: as the user wrote it; limits: what became of "auto"."""

    def __init__(self, config: EngineConfig):
        self.config = config
        self.loaded: Loaded = load(config)
        try:
            self.limits: Limits = limits_of(config, self.loaded)
            self.runner = self.loaded.runner(self.limits)
            self.loaded.record(self.runner, config.enforce_eager)
            found = self.facts()
            for line in (*said(found["kernels"]), cache_said(found, self.limits.token)):
                LOG.info("%s", line)
        except BaseException:
            self.loaded.free()
            raise
        self.pool = PagePool(self.limits.pages, config.block_size,
                             config.enable_prefix_caching and self.runner.paged)  # fmt: skip
        self.scheduler = Scheduler(self.pool, self.limits.most_running, self.limits.budget, config.max_queue)
        self.sampler = Sampler(self.vocab, self.loaded.device)
        self.ahead = self.runner.ahead
        self._begun: Begun | None = None
        self.counters = Stats(pages_total=self.limits.pages)
        self._saturated = saturation.total()
        self._streams: dict[str, list[Stream]] = {}
        self._seeds = random.Random(config.seed)
        self._grammars: Grammars | None = None

    @property
    def model_executor(self) -> "Engine":
        """Where vLLM's users look for `shutdown`."""
        return self

    @property
    def tokenizer(self) -> Any:
        return self.loaded.tokenizer

    @property
    def vocab(self) -> int:
        return self.loaded.vocab

    def add(self, request: Request) -> None:
        """Take a request in, or say why it can never run."""
        self._check(request)
        params = request.params = request.params.checked(self.vocab, self.limits.max_len, len(request.prompt))
        seed = params.seed if params.seed is not None else self._seeds.getrandbits(63)
        grammar = self._grammar(params)
        streams = [Stream(request, i, seed + i, list(request.prompt), Detokenizer(self.tokenizer, params),
                          grammar.start() if grammar else None) for i in range(params.n)]  # fmt: skip
        self.scheduler.add(streams)
        self._streams[request.id] = streams
        self.counters.prompt_tokens += len(request.prompt)

    def _check(self, request: Request) -> None:
        if request.id in self._streams:
            raise RequestError(f"request id {request.id!r} is in use: each needs its own")
        if not request.prompt:
            raise RequestError("the prompt is empty: at least one token is needed")
        vocab = self.vocab
        wrong = [t for t in request.prompt if isinstance(t, bool) or not isinstance(t, int) or not 0 <= t < vocab]
        if wrong:
            raise RequestError(f"prompt: {wrong[0]!r} is no token id; they go from 0 to {self.vocab - 1}")
        if len(request.prompt) >= self.limits.max_len:
            raise RequestError(f"the prompt has {len(request.prompt)} tokens; with at least one to generate, "
                               f"{self.limits.max_len - 1} fit (max_model_len {self.limits.max_len})")  # fmt: skip

    def prepare(self, params: SamplingParams) -> None:
        """Compile a grammar before the request comes: the one call that another thread may make."""
        self._grammar(params)

    def _grammar(self, params: SamplingParams) -> Any:
        if params.structured_outputs is None:
            return None
        if self._grammars is None:
            if self.tokenizer is None:
                raise RequestError("structured outputs need a tokenizer, and this model came without one")
            self._grammars = Grammars(self.tokenizer, self.vocab, self.loaded.ends)
        return self._grammars.compile(params.structured_outputs)

    def abort(self, request_id: str) -> None:
        """Give a request up; its pages are free when this returns, and nothing more is told of it."""
        for stream in self._streams.pop(request_id, []):
            self.scheduler.remove(stream)

    def has_work(self) -> bool:
        self.loaded.check()
        return bool(self.scheduler.running or self.scheduler.waiting or self._begun)

    def step(self) -> list[Delta]:
        """One turn; what it gave to whom."""
        told = [] if self._begun is None or self._begun.knows else self._land()
        begun = self._begin()
        told += self._land()
        self._begun = begun
        return told if self.ahead else told + self._land()

    def _begin(self) -> Begun | None:
        """Everything that the next step computes is on its way when this returns."""
        works = self.scheduler.next()
        if not works:
            return None
        self.counters.steps += 1
        found = self.runner.run(works, self._begun.flight if self._begun else None)
        for work in works:
            self.scheduler.computed(work)
        self._prompts(works, found)
        ready = [i for i, work in enumerate(works) if work.samples]
        streams = [works[i].stream for i in ready]
        if not ready:
            return Begun([], [], None, True)
        rows = [self._row(stream) for stream in streams]
        drawn = self.sampler.draw(found.last(ready), rows)
        places = [len(stream.tokens) for stream in streams]
        for stream in streams:
            stream.tokens.append(PENDING)
        return Begun(streams, places, drawn, not any(row.allowed is not None or edited(row) for row in rows))

    def _land(self) -> list[Delta]:
        """Wait for the tokens of the step that was begun, and tell them."""
        begun, self._begun = self._begun, None
        if begun is None or begun.drawn is None:
            return []
        sampled = begun.drawn.read()
        self.loaded.check()  # a rank that died leaves numbers that mean nothing
        found: list[Delta] = []
        for i, (stream, place) in enumerate(zip(begun.streams, begun.places, strict=True)):
            stream.tokens[place] = sampled.tokens[i]
            if not stream.ended:
                found.append(self._told(stream, place, sampled, i))
        return found

    def _row(self, stream: Stream) -> Row:
        allowed = stream.matcher.mask() if stream.matcher is not None else None
        return Row(stream.request.params, stream.request.prompt, stream.output, stream.seed, allowed, self.loaded.ends)

    def _prompts(self, works: list[Work], found: Logits) -> None:
        """The prompts' own logprobs, where they are asked for."""
        if any(work.stream.request.params.prompt_logprobs is not None for work in works):
            for work, logits in zip(works, found.each(), strict=True):
                self._prompt_logprobs(work, logits)

    def _prompt_logprobs(self, work: Work, logits: Tensor) -> None:
        """Collected chunk by chunk; the first token has none."""
        stream, count = work.stream, work.stream.request.params.prompt_logprobs
        if count is None or work.stop > stream.prompt_length:
            return
        if work.start == 0:
            stream.prompt_logprobs = [None]
        assert stream.prompt_logprobs is not None
        following = stream.tokens[work.start + 1 : min(work.stop + 1, stream.prompt_length)]
        found = prompt_logprobs(logits[: len(following)], following, count)
        stream.prompt_logprobs += [self._spelt(each) for each in found]

    def _told(self, stream: Stream, place: int, sampled: Sampled, i: int) -> Delta:
        delta = Delta(stream.request.id, stream.index)
        if not stream.told:
            stream.told = True
            delta.prompt_logprobs, delta.cached = stream.prompt_logprobs, stream.cached
        if sampled.bad[i]:
            self.counters.nan_rows += 1
            return self._ended(stream, delta, "error", None)
        token = sampled.tokens[i]
        self.counters.generated_tokens += 1
        delta.tokens = [token]
        if (found := sampled.logprobs[i]) is not None:
            delta.logprobs = [self._spelt(found)]
        finish, reason = self._finish(stream, token, place + 1 - stream.prompt_length)
        ending = token in self.loaded.ends or token in (stream.request.params.stop_token_ids or ())
        if finish != "stop" or not ending:  # the token that ends a text is not part of it
            delta.text = stream.detokenizer.push([token])
            if stream.detokenizer.stopped is not None:
                finish, reason = "stop", stream.detokenizer.stopped
        return delta if finish is None else self._ended(stream, delta, finish, reason)

    def _finish(self, stream: Stream, token: int, made: int) -> tuple[Finish | None, int | str | None]:
        params = stream.request.params
        if made > params.min_tokens:
            if token in self.loaded.ends and not params.ignore_eos:
                return "stop", None
            if token in (params.stop_token_ids or ()):
                return "stop", token
        if stream.matcher is not None:
            stream.matcher.accept(token)
            if stream.matcher.finished:
                return ("error", stream.matcher.error) if stream.matcher.error else ("stop", None)
        return ("length", None) if params.max_tokens is not None and made >= params.max_tokens else (None, None)

    def _spelt(self, found: dict[int, Logprob]) -> dict[int, Logprob]:
        if self.tokenizer is None:
            return found
        return {t: replace(of, decoded_token=token_text(self.tokenizer, t)) for t, of in found.items()}

    def _ended(self, stream: Stream, delta: Delta, finish: Finish, reason: int | str | None) -> Delta:
        delta.text += stream.detokenizer.finish()
        delta.finish, delta.stop_reason = finish, reason
        self.scheduler.remove(stream)
        streams = self._streams[stream.request.id]
        streams.remove(stream)
        if not streams:
            del self._streams[stream.request.id]
        return delta

    def facts(self) -> dict[str, Any]:
        found = facts(self.loaded.model, self.loaded.cache_dtype)
        return found if self.loaded.session is None else found | {"inc": self.loaded.session.facts()}

    def stats(self) -> Stats:
        now = self.counters
        now.running, now.waiting = len(self.scheduler.running), len(self.scheduler.waiting)
        now.pages_used = self.pool.used
        now.prefix_queries, now.prefix_hits = self.pool.queries, self.pool.hits
        now.preemptions = self.scheduler.preemptions
        now.saturated = saturation.total() - self._saturated
        return now

    def shutdown(self) -> None:
        """Free the model and the cache. What INC's MEASURE has seen is written first."""
        for request_id in list(self._streams):
            self.abort(request_id)
        self._begun = None
        try:
            self.loaded.finish()
        finally:
            self.runner.free()
            self.loaded.free()
