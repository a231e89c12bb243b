"""Every example and every command of docs/serve.md, and the serving examples of the documents that users come from."""

import json
import shutil
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import httpx
import pytest

import fewbit
from fewbit.models import hf
from tests.models import saved
from tests.server.documents import ROOT, Block, Shell, blocks, commands
from tests.server.served import Running, engine, model, running, tokenizer_into

PAGE = blocks((ROOT / "docs" / "serve.md").read_text())
SEEDS = ROOT / ".." / "shared" / "seeds"
URL = "http://127.0.0.1:8000"
VOCAB = 1000  # so that random token ids, as bench sends them, are the model's


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Tokens beyond the bytes have names of their own."""
    folder = model(tmp_path_factory.mktemp("examples") / "tiny", vocab_size=VOCAB, max_position_embeddings=2048)
    file = folder / "tokenizer.json"
    found = json.loads(file.read_text())
    known = found["model"]["vocab"]
    known |= {f"t{i}": i for i in range(len(known), VOCAB)}
    file.write_text(json.dumps(found))
    return folder


@pytest.fixture(scope="module")
def server(tiny: Path) -> Iterator[Running]:
    with running(engine(tiny, served_model_name=("m", str(tiny)))) as up:
        yield up


@pytest.fixture
def shell(tmp_path: Path, tiny: Path, server: Running) -> Shell:
    """The examples are there, and the files that the page shows."""
    made = Shell(tmp_path, {URL: server.url, "MODEL": str(tiny), "TOKENIZER": str(tiny)})
    shutil.copytree(ROOT / "examples", tmp_path / "examples")
    for block in PAGE:
        if block.name:
            (tmp_path / block.name).write_text(made.filled(block.text))
    return made


def answers(url: str) -> None:
    """What is up goes on with a text."""
    head = {"authorization": "Bearer sk-doc"}
    body = {"prompt": "ab", "max_tokens": 2, "ignore_eos": True}
    found = httpx.post(f"{url}/v1/completions", json=body, headers=head, timeout=60, trust_env=False)
    assert found.status_code == 200 and found.json()["usage"]["completion_tokens"] == 2, found.text


@pytest.mark.parametrize("block", [b for b in PAGE if not b.name], ids=str)
def test_the_page(block: Block, shell: Shell) -> None:
    if block.kind == "python":
        shell.program(block.text)
        return
    rest: list[str] = []
    for command in commands(block.text):
        if "fewbit serve" in command:
            if rest:  # what it is to serve with
                assert shell.script("\n".join(rest)).strip()
                rest = []
            with shell.server(command) as url:
                answers(url)
        else:
            rest.append(command)
    if rest:
        assert shell.script("\n".join(rest)).strip()


def test_every_example_is_on_the_page() -> None:
    told = "".join(block.text for block in PAGE)
    assert all(f"examples/{file.name}" in told for file in (ROOT / "examples").glob("*.py"))
    assert all(len(file.read_text().splitlines()) < 40 for file in (ROOT / "examples").glob("*.py"))


@cache
def seed(name: str) -> list[Block]:
    if not SEEDS.is_dir():
        pytest.skip("../shared/seeds is not there")
    return blocks((SEEDS / name).read_text())


def shown(name: str, words: str, which: int = 0) -> str:
    """The block of a seed that holds these words; the program's name is ours."""
    text = [block.text for block in seed(name) if words in block.text][which]
    return text.replace("vllm serve", "fewbit serve").replace("from vllm import", "from fewbit import")


@pytest.fixture(scope="module")
def opt(tmp_path_factory: pytest.TempPathFactory) -> Path:
    sizes = {"vocab_size": 264, "hidden_size": 64, "word_embed_proj_dim": 64, "ffn_dim": 128, "num_hidden_layers": 1,
             "num_attention_heads": 2, "max_position_embeddings": 512}  # fmt: skip
    made = hf.random_model(hf.read_config({"model_type": "opt", "architectures": ["OPTForCausalLM"], **sizes}))
    return tokenizer_into(saved.save(made, tmp_path_factory.mktemp("examples") / "opt"))


FP8, MODELOPT, FAKE, INC = (f"{name}.md" for name in (
    "fp8_and_autofp8", "modelopt_checkpoints_in_vllm", "modelopt_fakequant_in_vllm", "inc_fp8_gaudi"))  # fmt: skip


def test_seed_fp8_online(shell: Shell, opt: Path) -> None:
    shell.words = {"facebook/opt-125m": str(opt)}
    shell.program(shown(FP8, "from vllm import LLM"))


def test_seed_fp8_dynamic(shell: Shell, tiny: Path) -> None:
    """Its own script makes the checkpoint."""
    shell.words = {"from auto_fp8 import": "from fewbit.compat.autofp8 import",
                   '"meta-llama/Meta-Llama-3-8B-Instruct"': repr(str(tiny))}  # fmt: skip
    shell.program(shown(FP8, 'BaseQuantizeConfig(quant_method="fp8", activation_scheme="dynamic")'))
    shell.program(shown(FP8, '"Meta-Llama-3-8B-Instruct-FP8-Dynamic/"'))


def test_seed_fp8_static(shell: Shell, tiny: Path, tmp_path: Path) -> None:
    """Its own script wants a data set of a hub."""
    fewbit.quantize(tiny, tmp_path / "Meta-Llama-3-8B-Instruct-FP8", "FP8", to="fp8", samples=4, report=False)
    shell.program(shown(FP8, '"Meta-Llama-3-8B-Instruct-FP8/"'))


def test_seed_modelopt(shell: Shell, tiny: Path, tmp_path: Path) -> None:
    out = fewbit.quantize(tiny, tmp_path / "out", "FP8", to="modelopt", samples=4, report=False).out
    shell.words = {"nvidia/Llama-3.1-8B-Instruct-FP8": str(out), "<path_to_exported_checkpoint>": str(out)}
    said = shell.program(shown(MODELOPT, "def main"))
    assert said.count("Prompt: ") == 4 and "The capital of France is" in said
    with shell.server(shown(MODELOPT, "vllm serve")) as url:
        answers(url)


SCALE = "--kv-scale 1.0"  # what scales are where nobody has measured them
GAUDI = {"--quantization inc": "--quantization fp8", '"inc"': '"fp8"', '"fp8_inc"': '"fp8_inc", kv_scale=1.0',
         "--tensor_paralel_size 8": f"--tensor_parallel_size 1 {SCALE}"}  # fmt: skip
REFUSED = [("--quantization inc", "'inc'"), ("--kv-cache-dtype fp8_inc", SCALE),
           ("--tensor_paralel_size 8", "--tensor-parallel-size")]  # fmt: skip


@pytest.mark.parametrize(("flags", "words"), REFUSED)
def test_seed_gaudi_is_refused_by_name(shell: Shell, tiny: Path, flags: str, words: str) -> None:
    """Intel's names for Gaudi stand for measurement files that nothing else reads; one flag is misspelt there."""
    assert flags in shown(INC, "vllm serve")
    with pytest.raises(AssertionError) as caught:
        shell.script(f"fewbit serve {tiny} {flags}")
    assert words in str(caught.value) and "Traceback" not in str(caught.value)


def test_seed_gaudi_by_our_names(shell: Shell, tiny: Path) -> None:
    shell.words = {"llama3.1/Meta-Llama-3.1-8B-Instruct": str(tiny), **GAUDI,
                   "meta-llama/Llama-3.1-405B-Instruct": str(tiny)}  # fmt: skip
    text = shown(INC, "from vllm import LLM")
    assert "model_executor.shutdown()" in text
    shell.program(text)
    with shell.server(shown(INC, "vllm serve").split("\n")[1]) as url:
        answers(url)


def test_seed_fakequant(shell: Shell, tiny: Path) -> None:
    """Its script takes the format from the environment and `vllm serve`'s flags; here the format is a flag."""
    ours = "fewbit serve -q nvfp4"
    shell.words = {"<model_path>": str(tiny), "python vllm_serve_fakequant.py": f"{ours} {SCALE}",
                   "-tp 8": "-tp 1"}  # fmt: skip
    command = next(commands(shown(FAKE, "KV_ATTN_MATH=fp8 \\\npython")))
    with shell.server(command) as url:
        shell.words |= {"http://127.0.0.1:8000": url}
        said = json.loads(shell.script(shown(FAKE, "curl -X POST")))
    assert said["model"] == str(tiny) and said["usage"]["completion_tokens"] <= 8


def test_seed_fakequant_lm_eval(shell: Shell) -> None:
    """gsm8k lies on a hub, and this lm-eval takes the batch size as a flag; the rest of the line as it stands there."""
    text = shown(FAKE, "lm_eval --model")
    shell.words |= {"--tasks gsm8k": "--tasks facts_gen --include_path . --batch_size 128", ",batch_size=128": "",
                    "<model_name>": "m"}  # fmt: skip
    assert "exact_match" in shell.script("cd examples/lm_eval; export OPENAI_API_KEY=none\n" + text)
