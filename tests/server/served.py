"""A tiny model with a byte-level tokenizer and a chat template, and a server over it in this process."""

import contextlib
import json
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

from fewbit.engine.loop import Loop
from fewbit.server.app import build
from fewbit.server.config import ServerConfig
from fewbit.server.run import Server, settings
from tests.tiny import llama

SPECIAL = ("<unk>", "<s>", "</s>", "<|im_start|>", "<|im_end|>")
TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}<|im_start|>{{ message.role }}\n{{ message.content }}<|im_end|>\n"
    "{% endfor %}{% if tools %}{{ tools | tojson }}<tool_call>{% endif %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def tokenizer_into(folder: Path, template: str | None = TEMPLATE) -> Path:
    """Five special tokens and one for each byte."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {name: i for i, name in enumerate([*SPECIAL, *alphabet])}
    made = Tokenizer(models.BPE(vocab, [], unk_token="<unk>"))
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    made.add_special_tokens([AddedToken(name, special=True) for name in SPECIAL])
    made.save(str(folder / "tokenizer.json"))
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": "<s>", "eos_token": "</s>",
              "unk_token": "<unk>", "chat_template": template}  # fmt: skip
    (folder / "tokenizer_config.json").write_text(json.dumps({k: v for k, v in config.items() if v}))
    return folder


def model(folder: Path, template: str | None = TEMPLATE, **changes: Any) -> Path:
    changes = {"vocab_size": 264, "max_position_embeddings": 512, "num_hidden_layers": 1} | changes
    return tokenizer_into(llama(folder, **changes), template)


def engine(folder: Path, **config: Any) -> Callable[[], Any]:
    def make() -> Any:
        import torch

        from fewbit.engine.config import EngineConfig
        from fewbit.engine.engine import Engine

        torch.set_num_threads(1)
        return Engine(EngineConfig.of(**{"model": str(folder), "served_model_name": "tiny", "device": "cpu",
                                         "kv_cache_memory_bytes": 64 << 20, **config}))  # fmt: skip

    return make


class Running:
    """A server of this process, and what a test asks of it."""

    def __init__(self, url: str, loop: Loop, server: Server):
        self.url, self.loop, self.server, self.state = url, loop, server, server.state
        self.http = httpx.Client(base_url=url, timeout=60, trust_env=False)

    def post(self, path: str, body: Any, **more: Any) -> httpx.Response:
        return self.http.post(path, json=body, **more)

    def good(self) -> bool:
        """Whether the next good request succeeds."""
        body = {"prompt": "ab", "max_tokens": 2, "temperature": 0, "ignore_eos": True}
        found = self.post("/v1/completions", body)
        return found.status_code == 200 and found.json()["usage"]["completion_tokens"] == 2

    def until(self, done: Callable[[], Any], seconds: float = 10) -> None:
        until(done, seconds)

    def idle(self) -> None:
        """Return when nothing runs and no page is held."""
        self.until(lambda: self.loop.rows == 0 and self.loop.stats.running == self.loop.stats.waiting == 0)
        self.until(lambda: not self.loop.engine.has_work())


def until(done: Callable[[], Any], seconds: float = 10) -> None:
    end = time.monotonic() + seconds
    while not done():
        assert time.monotonic() < end, f"not so within {seconds} s"
        time.sleep(0.01)


@contextlib.contextmanager
def running(make: Callable[[], Any], facts: dict[str, Any] | None = None, buffer: int = 1024,
            **config: Any) -> Iterator[Running]:  # fmt: skip
    loop = Loop(make, buffer)
    loop.start()
    asked = ServerConfig(**{"port": 0, "access_log": False, "drain_seconds": 5.0, **config})
    app = build(loop, asked, facts)
    started, urls = threading.Event(), []

    def ready(url: str) -> None:
        urls.append(url)
        started.set()

    server = Server(settings(app, asked), app.state.fewbit, ready)
    thread = threading.Thread(target=server.run)
    thread.start()
    assert started.wait(30)
    found = Running(urls[0], loop, server)
    try:
        yield found
    finally:
        found.http.close()
        server.should_exit = True
        thread.join(20)
        loop.stop()
        assert not thread.is_alive()
