"""LLM: a checkpoint that answers, in process, with the keyword names and results of vLLM's class of that name."""

import itertools
import sys
from collections import deque
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Self

from fewbit.compat import fakequant
from fewbit.engine.engine import Engine
from fewbit.engine.outputs import CompletionOutput, RequestOutput
from fewbit.engine.params import SamplingParams
from fewbit.engine.request import Delta, Request
from fewbit.errors import RequestError

Prompt = str | Sequence[int] | Mapping[str, Any]
Params = SamplingParams | Sequence[SamplingParams] | None
Messages = Sequence[Mapping[str, Any]]


class LLM:
    """model: a folder or a .gguf file; the other keywords are EngineConfig's, and compat.fakequant's."""

    def __init__(self, model: str | Path, **options: Any):
        with fakequant.prepared({"model": str(model), **options}) as config:
            self.llm_engine = Engine(config)
        self._numbers = itertools.count()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.llm_engine.shutdown()

    def get_tokenizer(self) -> Any:
        return self.llm_engine.tokenizer

    def generate(
        self,
        prompts: Prompt | Sequence[Prompt],
        sampling_params: Params = None,
        *,
        use_tqdm: bool = True,
        priority: Sequence[int] | None = None,
    ) -> list[RequestOutput]:
        """prompts: a text, token ids, {"prompt": text} or {"prompt_token_ids": ids}, or a list of these."""
        each = [self._prompt(p) for p in listed(prompts)]
        return self._run(each, sampling_params, use_tqdm, priority)

    def chat(
        self,
        messages: Messages | Sequence[Messages],
        sampling_params: Params = None,
        *,
        use_tqdm: bool = True,
        chat_template: str | None = None,
        add_generation_prompt: bool = True,
        tools: Sequence[Mapping[str, Any]] | None = None,
    ) -> list[RequestOutput]:
        """One conversation ([{"role": ..., "content": ...}, ...]) or a list of them."""
        one = bool(messages) and isinstance(messages[0], Mapping)
        texts = [
            self._tokenizer().apply_chat_template(
                list(m), tools=tools, chat_template=chat_template, add_generation_prompt=add_generation_prompt,
                tokenize=False,
            )
            for m in ([messages] if one else messages)
        ]  # fmt: skip
        each = [(text, self._ids(text, special=False)) for text in texts]
        return self._run(each, sampling_params, use_tqdm, None)

    def _tokenizer(self) -> Any:
        if self.llm_engine.tokenizer is None:
            raise RequestError("this model came without a tokenizer: give prompt_token_ids, or tokenizer=")
        return self.llm_engine.tokenizer

    def _ids(self, text: str, special: bool = True) -> list[int]:
        return list(self._tokenizer()(text, add_special_tokens=special)["input_ids"])

    def _prompt(self, prompt: Prompt) -> tuple[str | None, list[int]]:
        if isinstance(prompt, Mapping):
            ids = prompt.get("prompt_token_ids")
            text = prompt.get("prompt")
            if ids is None and not isinstance(text, str):
                raise RequestError(f"a prompt has 'prompt' or 'prompt_token_ids', found {', '.join(prompt)}")
            return text, self._ids(text) if ids is None else list(ids)
        return (prompt, self._ids(prompt)) if isinstance(prompt, str) else (None, list(prompt))

    def _run(
        self, prompts: list[tuple[str | None, list[int]]], params: Params, show: bool, priority: Sequence[int] | None
    ) -> list[RequestOutput]:
        given = [params or SamplingParams()] * len(prompts) if not isinstance(params, Sequence) else list(params)
        ranks = list(priority or [0] * len(prompts))
        if len(given) != len(prompts) or len(ranks) != len(prompts):
            raise RequestError(f"{len(prompts)} prompts, {len(given)} sampling_params, {len(ranks)} priorities")
        waiting = [Request(str(next(self._numbers)), ids, one, rank, text=text)
                   for (text, ids), one, rank in zip(prompts, given, ranks, strict=True)]  # fmt: skip
        try:
            return self._collect(waiting, show and sys.stderr.isatty())
        except BaseException:
            for request in waiting:
                self.llm_engine.abort(request.id)
            raise

    def _collect(self, requests: list[Request], show: bool) -> list[RequestOutput]:
        from rich.progress import Progress

        found = {r.id: [Gathered() for _ in range(r.params.n)] for r in requests}
        coming = deque(requests)
        ended, total = 0, sum(map(len, found.values()))
        with Progress(disable=not show, transient=True) as progress:
            bar = progress.add_task("generating", total=total)
            while ended < total:
                while coming and self.llm_engine.scheduler.takes(coming[0].params.n):
                    self.llm_engine.add(coming.popleft())
                for delta in self.llm_engine.step():
                    found[delta.request_id][delta.index].add(delta)
                    ended += delta.finish is not None
                progress.update(bar, completed=ended)
        return [answer(request, found[request.id]) for request in requests]


class Gathered:
    """The deltas of one continuation, added up."""

    def __init__(self) -> None:
        self.texts: list[str] = []
        self.tokens: list[int] = []
        self.logprobs: list[Any] = []
        self.prompt_logprobs: list[Any] | None = None
        self.finish: str | None = None
        self.reason: int | str | None = None

    def add(self, delta: Delta) -> None:
        self.texts.append(delta.text)
        self.tokens += delta.tokens
        self.logprobs += delta.logprobs or []
        self.prompt_logprobs = delta.prompt_logprobs or self.prompt_logprobs
        self.finish, self.reason = delta.finish, delta.stop_reason

    def output(self, index: int) -> CompletionOutput:
        """As vLLM shapes it."""
        held = self.logprobs or None
        total = (
            sum(each[token].logprob for each, token in zip(self.logprobs, self.tokens, strict=True)) if held else None
        )
        return CompletionOutput(index, "".join(self.texts), self.tokens, total, held, self.finish, self.reason)


def listed(prompts: Any) -> list[Any]:
    """One prompt or many -> many."""
    if isinstance(prompts, (str, Mapping)):
        return [prompts]
    each = list(prompts)
    return [each] if each and all(isinstance(t, int) for t in each) else each


def answer(request: Request, gathered: Sequence[Gathered]) -> RequestOutput:
    outputs = [one.output(i) for i, one in enumerate(gathered)]
    return RequestOutput(request.id, request.text, request.prompt, gathered[0].prompt_logprobs, outputs, True)
