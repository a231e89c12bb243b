"""Text: the tokenizer and the chat template, on one thread of their own, which keeps the event loop free."""

import asyncio
import json
import subprocess
import sys
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, TypeVar

from fewbit.errors import RequestError

T = TypeVar("T")
RENDER = Path(__file__).with_name("render.py")


class Text:
    """seconds: how long one rendering may take. longest: tokens that any prompt can have."""

    def __init__(self, tokenizer: Any, template: str | None, longest: int, seconds: float = 2.0):
        self.tokenizer, self.longest, self.seconds = tokenizer, longest, seconds
        self.template = template if template is not None else template_of(tokenizer)
        self._worker = ThreadPoolExecutor(1, "text")
        self._renderer: subprocess.Popen[str] | None = None
        self._widest = 0  # characters of the longest token
        self._tokens: dict[int, str] = {}

    async def encode(self, text: str, special: bool = True) -> list[int]:
        return await self._run(lambda: self._encode(text, special))

    async def encode_all(self, texts: Sequence[str], special: bool) -> list[list[int]]:
        return await self._run(lambda: [self._encode(text, special) for text in texts])

    async def decode(self, ids: Sequence[int]) -> str:
        return await self._run(lambda: self._need().decode(list(ids)))

    async def render(self, context: dict[str, Any]) -> str:
        return await self._run(lambda: self._render(context))

    def token(self, number: int) -> str:
        """The text of one token by itself."""
        if number not in self._tokens:
            self._tokens[number] = self.tokenizer.decode([number]) if self.tokenizer else ""
        return self._tokens[number]

    async def warm(self) -> None:
        """Start the renderer before the first chat does."""
        if self.template:
            await self._run(self._started)

    def close(self) -> None:
        self._worker.shutdown(cancel_futures=True)
        self._end()

    async def _run(self, work: Callable[[], T]) -> T:
        return await asyncio.get_running_loop().run_in_executor(self._worker, work)

    def _need(self) -> Any:
        if self.tokenizer is None:
            raise RequestError("this model came without a tokenizer: give prompts as token ids")
        return self.tokenizer

    def _encode(self, text: str, special: bool) -> list[int]:
        tokenizer = self._need()
        if not self._widest:
            self._widest = max(map(len, tokenizer.get_vocab()), default=1)
        if len(text) > self.longest * self._widest:
            raise RequestError(f"the prompt has {len(text)} characters, which cannot be {self.longest} tokens or fewer")
        ids: list[int] = tokenizer.encode(text, add_special_tokens=special, verbose=False)
        return ids

    def _render(self, context: dict[str, Any]) -> str:
        if not self.template:
            raise RequestError("this model has no chat template: give one with --chat-template, or use /v1/completions")
        child = self._started()
        found = self._exchange(child, context)
        if found is None:
            self._end()
            raise RequestError(
                f"the chat template took more than {self.seconds:g} s or too much memory on this request"
            )
        if "error" in found:
            raise RequestError(f"the chat template refuses this request: {found['error']}")
        return found["text"]

    def _exchange(self, child: "subprocess.Popen[str]", value: Any) -> dict[str, str] | None:
        assert child.stdin and child.stdout
        try:
            child.stdin.write(json.dumps(value) + "\n")
            child.stdin.flush()
            line = child.stdout.readline()
        except OSError:
            return None
        return json.loads(line) if line.endswith("\n") else None

    def _started(self) -> "subprocess.Popen[str]":
        if self._renderer is not None and self._renderer.poll() is None:
            return self._renderer
        self._end()
        command = [sys.executable, "-P", str(RENDER), str(self.seconds)]
        self._renderer = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
                                          encoding="utf-8", errors="surrogatepass")  # fmt: skip
        found = self._exchange(self._renderer, self.template)
        if found is None or "error" in found:
            self._end()
            raise RequestError((found or {}).get("error", "the chat template cannot be compiled"))
        return self._renderer

    def _end(self) -> None:
        child, self._renderer = self._renderer, None
        if child is not None:
            child.kill()
            child.communicate()


def template_of(tokenizer: Any) -> str | None:
    """The tokenizer's own; of several, the one for tools, then the default."""
    found = getattr(tokenizer, "chat_template", None)
    if isinstance(found, dict):
        return found.get("default") or next(iter(found.values()), None)
    return found or None


def special_tokens(tokenizer: Any) -> dict[str, Any]:
    """bos_token, eos_token ... as templates name them."""
    found = getattr(tokenizer, "special_tokens_map", None) or {}
    return {name: str(value) for name, value in found.items() if isinstance(value, str)}
