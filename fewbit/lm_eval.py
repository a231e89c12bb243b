"""The adapter for lm-eval (extra `eval`): `--model fewbit` runs a checkpoint in this process.

    python -m fewbit.lm_eval run --model fewbit --model_args path=FOLDER --tasks TASK

or, in Python, `import fewbit.lm_eval` before `lm_eval.simple_evaluate(model="fewbit", model_args={"path": FOLDER})`.
"""

from collections.abc import Sequence
from typing import Any

from fewbit.engine.params import SamplingParams
from fewbit.errors import RequestError, UnsupportedError
from fewbit.llm import LLM

try:
    import lm_eval.models  # noqa: F401  what comes with lm-eval is registered first: it looks for it only while nothing is
    from lm_eval.api.model import TemplateLM
    from lm_eval.api.registry import register_model
    from lm_eval.utils import get_rolling_token_windows, make_disjoint_window
except ImportError as error:
    raise UnsupportedError("the adapter for lm-eval needs lm-eval", ["pip install 'fewbit[eval]'"]) from error

Pair = tuple[Any, list[int], list[int]]  # what was asked, ids of the context, ids of the continuation


@register_model("fewbit")
class FewbitLM(TemplateLM):
    """path: a folder or a .gguf file; the other options are LLM's (dtype, quantization, max_model_len ...).

    Texts are tokenized as lm-eval's own `hf` model does it, so that figures compare. batch_size: texts at once.
    """

    def __init__(
        self,
        path: str,
        batch_size: int | str = 1,
        max_batch_size: int | None = None,
        device: str = "cpu",
        max_length: int | None = None,
        max_gen_toks: int = 256,
        add_bos_token: bool | None = None,
        **options: Any,
    ):
        super().__init__()
        if not str(batch_size).isdigit() or int(batch_size) < 1:
            raise RequestError(f"batch_size={batch_size!r}: a number of sequences that run together, 1 or more")
        if device.startswith("cuda"):
            device = "auto"  # lm-eval asks for cuda:0 whatever there is
        self.llm = LLM(path, device=device, max_num_seqs=int(batch_size), **options)
        self.path, self.tokenizer = path, self.llm.get_tokenizer()
        self.max_gen_toks, self.add_bos_token = max_gen_toks, add_bos_token
        room = self.llm.llm_engine.limits.max_len - 2  # a window is one token longer, and one more is generated
        self.max_length = min(max_length or room, room)

    @property
    def eot_token_id(self) -> int:
        return self.tokenizer.eos_token_id

    @property
    def prefix_token_id(self) -> int:
        start = self.tokenizer.bos_token_id
        return self.eot_token_id if start is None else start

    @property
    def tokenizer_name(self) -> str:
        return self.path.replace("/", "__")

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        return self.tokenizer.apply_chat_template(
            chat_history,
            tokenize=False,
            add_generation_prompt=add_generation_prompt,
            continue_final_message=not add_generation_prompt,
        )

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **kwargs: Any) -> list[int]:
        special = self.add_bos_token if add_special_tokens is None else add_special_tokens
        if add_special_tokens is None and string.startswith(self.tokenizer.decode(self.prefix_token_id)):
            special = False
        asked = {} if special is None else {"add_special_tokens": special}
        return list(self.tokenizer(string, verbose=False, **asked).input_ids)

    def _loglikelihood_tokens(self, requests: Sequence[Pair], **kwargs: Any) -> list[tuple[float, bool]]:
        prompts = [(context + wanted)[-self.max_length - 1 :] for _, context, wanted in requests]
        outs = self.llm.generate(prompts, SamplingParams(max_tokens=1, temperature=0.0, prompt_logprobs=0))
        found = [scored(out.prompt_logprobs, prompt, len(wanted))
                 for out, prompt, (_, _, wanted) in zip(outs, prompts, requests, strict=True)]  # fmt: skip
        for (asked, _, _), result in zip(requests, found, strict=True):
            if asked is not None:
                self.cache_hook.add_partial("loglikelihood", asked, result)
        return found

    def loglikelihood_rolling(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[float]:
        found = []
        for (text,) in (request.args for request in requests):
            pairs = get_rolling_token_windows(self.tok_encode(text), self.prefix_token_id, self.max_length, 1)
            windows = [(None, *make_disjoint_window(pair)) for pair in pairs]
            found.append(sum(score for score, _ in self._loglikelihood_tokens(windows)))
            self.cache_hook.add_partial("loglikelihood_rolling", (text,), found[-1])
        return found

    def generate_until(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[str]:
        asked = [request.args for request in requests]
        params = [self._params(dict(options)) for _, options in asked]
        prompts = [self.tok_encode(context)[-(self.max_length - p.max_tokens) :]
                   for (context, _), p in zip(asked, params, strict=True)]  # fmt: skip
        found = [out.outputs[0].text for out in self.llm.generate(prompts, params)]
        for args, text in zip(asked, found, strict=True):
            self.cache_hook.add_partial("generate_until", args, text)
        return found

    def _params(self, options: dict[str, Any]) -> SamplingParams:
        """What a task says of generation, under transformers' names."""
        until = options.get("until") or []
        counts = [options.get(name) for name in ("max_gen_toks", "max_new_tokens", "max_tokens")]
        count = next((c for c in counts if c is not None), self.max_gen_toks)
        sampling = {"temperature": 0.0}
        if options.get("do_sample"):
            sampling = {name: options.get(name, 1.0) for name in ("temperature", "top_p")}
            sampling["top_k"] = options.get("top_k", 0)
        return SamplingParams(max_tokens=count, stop=[s for s in ([until] if isinstance(until, str) else until) if s],
                              **sampling)  # fmt: skip


def scored(logprobs: Any, prompt: Sequence[int], wanted: int) -> tuple[float, bool]:
    """Of the last `wanted` tokens: their log-probability, and whether greedy decoding would give them."""
    first = max(1, len(prompt) - wanted)
    held = [logprobs[i][prompt[i]] for i in range(first, len(prompt))]
    return sum(one.logprob for one in held), all(one.rank == 1 for one in held)


if __name__ == "__main__":
    from lm_eval.__main__ import cli_evaluate

    cli_evaluate()
