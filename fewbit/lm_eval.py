"""The adapter for lm-eval (extra `eval`): `--model fewbit` runs a checkpoint in this process.

    python -m fewbit.lm_eval run --model fewbit --model_args path=FOLDER --tasks TASK

or, in Python, `import fewbit.lm_eval` before `lm_eval.simple_evaluate(model="fewbit", model_args={"path": FOLDER})`.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from fewbit.errors import RequestError, UnsupportedError
from fewbit.models.build import load
from fewbit.models.text import tokenizer as read_tokenizer

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
    """path: a folder or a .gguf file; format, kernels, activations, dtype: as `fewbit.load` takes them.

    Texts are tokenized as lm-eval's own `hf` model does it, so that figures compare.
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
        if unknown := options.keys() - {"dtype", "kernels", "activations", "format", "trust_remote_code"}:
            raise RequestError(f"model_args: {', '.join(sorted(unknown))}: not an option of fewbit.load")
        if device.startswith("cuda") and not torch.cuda.is_available():
            device = "cpu"  # lm-eval asks for cuda:0 whatever there is
        self.path, self.batch_size, self._device = path, int(batch_size), torch.device(device)
        self.model = load(path, device=device, **options)
        self.tokenizer = read_tokenizer(path)
        self.max_gen_toks, self.add_bos_token = max_gen_toks, add_bos_token
        self.max_length = max_length or positions(self.model.config)

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
        """Sequences of like length together, the longest first; -> in the order asked."""
        order = sorted(range(len(requests)), key=lambda i: -len(requests[i][1]) - len(requests[i][2]))
        found: list[Any] = [None] * len(requests)
        for start in range(0, len(order), self.batch_size):
            batch = order[start : start + self.batch_size]
            for i, result in zip(batch, self._score([requests[i] for i in batch]), strict=True):
                found[i] = result
                if requests[i][0] is not None:
                    self.cache_hook.add_partial("loglikelihood", requests[i][0], result)
        return found

    def _score(self, batch: Sequence[Pair]) -> list[tuple[float, bool]]:
        """Padded on the right: what follows changes nothing of what stands before it."""
        rows = [torch.tensor((context + wanted)[-self.max_length - 1 :]) for _, context, wanted in batch]
        ids = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True)
        with torch.no_grad():
            logits = self.model(input_ids=ids[:, :-1].to(self.device), use_cache=False).logits
        out = []
        for row, held, (_, _, wanted) in zip(rows, logits, batch, strict=True):
            count = min(len(wanted), len(row) - 1)
            out.append(continuation(held[len(row) - 1 - count : len(row) - 1], row[len(row) - count :]))
        return out

    def loglikelihood_rolling(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[float]:
        found = []
        for (text,) in (request.args for request in requests):
            pairs = get_rolling_token_windows(self.tok_encode(text), self.prefix_token_id, self.max_length, 1)
            windows = [(None, *make_disjoint_window(pair)) for pair in pairs]
            found.append(sum(score for score, _ in self._loglikelihood_tokens(windows)))
            self.cache_hook.add_partial("loglikelihood_rolling", (text,), found[-1])
        return found

    def generate_until(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[str]:
        found = []
        for context, options in (request.args for request in requests):
            found.append(self._generate(context, dict(options)))
            self.cache_hook.add_partial("generate_until", (context, options), found[-1])
        return found

    def _generate(self, context: str, options: dict[str, Any]) -> str:
        until = options.pop("until", None) or []
        stops = [stop for stop in ([until] if isinstance(until, str) else until) if stop]
        counts = [options.pop(name, None) for name in ("max_gen_toks", "max_new_tokens", "max_tokens")]
        count = next((c for c in counts if c is not None), self.max_gen_toks)
        if not options.get("do_sample"):
            options = {"do_sample": False, "temperature": None, "top_p": None, "top_k": None}
        if stops:
            options |= {"stop_strings": stops, "tokenizer": self.tokenizer}
        ids = torch.tensor([self.tok_encode(context)[-(self.max_length - count) :]], device=self.device)
        with torch.no_grad():
            made = self.model.generate(
                ids,
                attention_mask=torch.ones_like(ids),
                max_new_tokens=count,
                pad_token_id=self.eot_token_id,
                **options,
            )
        text = self.tokenizer.decode(made[0, ids.shape[1] :], skip_special_tokens=True)
        return min((text.split(stop)[0] for stop in stops), key=len, default=text)


def continuation(logits: Tensor, wanted: Tensor) -> tuple[float, bool]:
    """-> its log-probability, and whether it is what greedy decoding would give."""
    scores = logits.float().log_softmax(-1).cpu()
    chosen = scores.gather(-1, wanted[:, None])[:, 0]
    return float(chosen.sum()), bool((scores.argmax(-1) == wanted).all())


def positions(config: Any) -> int:
    found = getattr(config.get_text_config(), "max_position_embeddings", None)
    return found if isinstance(found, int) else 2048


if __name__ == "__main__":
    from lm_eval.__main__ import cli_evaluate

    cli_evaluate()
