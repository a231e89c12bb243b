"""A tiny Llama in a folder with a tokenizer, texts for it, and what tests ask of a checkpoint."""

from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

import fewbit
from tests.tiny import llama

TEXTS = [
    "The fog came in from the sea before noon and lay over the harbour until the lamps were lit.",
    "def area(width, height):\n    return width * height",
    "Nobody had told the miller that the bridge was down, and so he drove on.",
    "Il pleut sur la ville; les toits sont gris, les rues aussi.",
]
CHAT = "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}\n{% endfor %}"


def tokenizer() -> PreTrainedTokenizerFast:
    """Bytes, and three special tokens before them."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: i for i, token in enumerate(["<pad>", "<s>", "</s>", *alphabet])}
    made = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(
        tokenizer_object=made, bos_token="<s>", eos_token="</s>", pad_token="<pad>", chat_template=CHAT
    )


def folder(path: Path, **changes: Any) -> Path:
    """A Llama and its tokenizer as a user has them."""
    llama(path, vocab_size=288, **changes)
    tokenizer().save_pretrained(path)
    return path


def model(path: Path, **options: Any) -> Any:
    return AutoModelForCausalLM.from_pretrained(path, **{"dtype": torch.float32, **options})


def ids() -> Tensor:
    """[4, 32]: the beginnings of the texts."""
    made = tokenizer()
    return torch.tensor([made(text)["input_ids"][:32] for text in TEXTS])


def loop(model: Any) -> None:
    for row in ids():
        model(row[None])


def logits(model: nn.Module) -> Tensor:
    with torch.no_grad():
        return model(ids()).logits


def sound(path: Path) -> dict[str, Tensor]:
    """The tensors of a checkpoint that verify has nothing to say about."""
    tokenizer().save_pretrained(path)
    assert fewbit.verify(path) == []
    return load_file(path / "model.safetensors")
