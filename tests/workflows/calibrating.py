"""A tokenizer of bytes, and small files, for the tests of calibration."""

import json
from pathlib import Path
from typing import Any

import torch

from fewbit.workflows.calibration_read import read

WORDS = " ".join(f"word{i}" for i in range(4000))


class Bytes:
    """A tokenizer of bytes, with first and last tokens where asked."""

    chat_template: str | None = "a template"

    def __init__(self, first: bool = False, last: bool = False):
        self.before, self.after = [1] if first else [], [2] if last else []

    def __len__(self) -> int:
        return 259

    def __call__(self, text: Any, add_special_tokens: bool = True, **_: Any) -> dict[str, Any]:
        if isinstance(text, list):
            return {"input_ids": [self(t, add_special_tokens)["input_ids"] for t in text]}
        ids = [byte + 3 for byte in text.encode()]
        return {"input_ids": self.before + ids + self.after if add_special_tokens else ids}

    def apply_chat_template(self, messages: list[dict[str, str]], tokenize: bool) -> str:
        if messages[0]["role"] not in ("user", "system"):
            raise ValueError("conversations start with the user")
        return "".join(f"<{m['role']}>{m['content']}" for m in messages)

    def text(self, ids: torch.Tensor) -> str:
        return bytes(i - 3 for i in ids.tolist() if i > 2).decode(errors="replace")


TOKENIZER = Bytes()


def write(path: Path, *rows: Any) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def texts(path: Path, limit: int = 1 << 30, column: str | None = None) -> list[str]:
    return [document.text for document in read(path, limit, column)]
